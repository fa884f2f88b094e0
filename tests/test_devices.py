"""A GPU that JAX does not use is named with the line that installs its plugin; nobody falls back to the CPU unaware."""

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.runs import devices


@pytest.mark.parametrize(
    ("gpu", "tpu", "message"),
    [
        (("an NVIDIA L4", 580), False, r"NVIDIA L4.*\.\[cuda13\].*--device cpu"),
        *((("an NVIDIA L4", driver), False, r"\.\[cuda12\]") for driver in (550, None)),
        (None, True, r"a TPU.*\.\[tpu\]"),
    ],
)
def test_an_idle_accelerator_is_refused_with_its_install_line(gpu, tpu, message, monkeypatch):
    monkeypatch.setattr(devices, "nvidia_gpu", lambda: gpu)
    monkeypatch.setattr(devices, "tpu_present", lambda: tpu)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    with pytest.raises(UserError, match=message):
        devices.choose(None)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # the user's choice
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
