"""A GPU that JAX does not use is named with the line that installs its plugin; nobody falls back to the CPU unaware."""

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.runs import devices


@pytest.mark.parametrize(("driver", "extra"), [(580, "cuda13"), (550, "cuda12"), (None, "cuda12")])
def test_an_idle_gpu_is_refused_with_its_install_line(driver, extra, monkeypatch):
    monkeypatch.setattr(devices, "nvidia_gpu", lambda: ("an NVIDIA L4", driver))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    with pytest.raises(UserError, match=rf"NVIDIA L4.*\[{extra}\].*--device cpu"):
        devices.choose(None)


def test_an_idle_tpu_is_refused_too(monkeypatch):
    monkeypatch.setattr(devices, "nvidia_gpu", lambda: None)
    monkeypatch.setattr(devices, "tpu_present", lambda: True)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    with pytest.raises(UserError, match=r"\[tpu\]"):
        devices.choose(None)


def test_the_cpu_is_taken_where_there_is_nothing_else_or_it_was_asked_for(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(devices, "tpu_present", lambda: False)
    monkeypatch.setattr(devices, "nvidia_gpu", lambda: None)
    devices.choose(None)
    monkeypatch.setattr(devices, "nvidia_gpu", lambda: ("an NVIDIA L4", 580))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    devices.choose(None)


def test_an_apple_gpu_is_refused_with_what_to_give_instead():
    with pytest.raises(UserError, match=r"--device mps: JAX has no maintained backend.*--device cpu"):
        devices.choose("mps")


def test_nvidia_smi_is_understood(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H200, 580.65.06'\necho 'NVIDIA H200, 580.65.06'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert devices.nvidia_gpu() == ("an NVIDIA H200", 580)
