"""A GPU that JAX does not use is named with the line that installs its plugin; nobody falls back to
the CPU unaware.
"""

import fnmatch
import os
import re
import subprocess
import sys
import types
from dataclasses import replace

import jax
import pytest

from rlhf_jax import models
from rlhf_jax.config import RunConfig
from rlhf_jax.errors import UserError
from rlhf_jax.runs import devices
from rlhf_jax.training.common.opening import open_run
from rlhf_jax.training.common.setup import set_up


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (
            "/dev/nvidia0",
            r"an NVIDIA GPU.*'rlhf-jax\[cuda13\].* before 580 'rlhf-jax\[cuda12\]'.*--device cpu",
        ),
        ("/usr/lib/wsl/lib/libcuda.so.1", r"an NVIDIA GPU.*--device cpu"),
        ("/dev/accel0", r"a TPU.*'rlhf-jax\[tpu\].*--device cpu"),
    ],
)
def test_an_idle_accelerator_is_refused_with_its_install_line(file, message, monkeypatch):
    jax.devices()  # starts JAX
    monkeypatch.setattr(devices.glob, "glob", lambda pattern: fnmatch.filter([file], pattern))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("XLA_FLAGS", "")
    with pytest.raises(UserError, match=message):
        devices.choose(None)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # the user's choice
    devices.choose(None)
    assert not os.environ["XLA_FLAGS"]  # JAX has started: too late
    monkeypatch.setattr(devices.xla_bridge, "backends_are_initialized", lambda: False)
    devices.choose(None)
    assert "--xla_backend_optimization_level=1" in os.environ["XLA_FLAGS"].split()


def test_an_accelerator_in_use_is_not_idle(monkeypatch):
    monkeypatch.setattr(devices.glob, "glob", lambda pattern: ["/dev/nvidia0"])
    assert "an NVIDIA GPU" in devices.idle_accelerator()
    used = [types.SimpleNamespace(platform=platform) for platform in ("gpu", "tpu")]
    monkeypatch.setattr(jax, "devices", lambda: used)
    assert devices.idle_accelerator() is None


def test_an_apple_gpu_is_refused_with_what_to_give_instead():
    with pytest.raises(
        UserError, match=r"--device mps: JAX has no maintained backend.*--device cpu"
    ):
        devices.choose("mps")


@pytest.mark.parametrize(
    ("device", "variable", "file", "flags"),
    [
        ("cpu", "cuda", "/dev/nvidia0", "cpu"),
        ("cuda", None, None, "gpu"),
        ("gpu", "cpu", None, "gpu"),
        ("tpu", None, None, None),
        (None, "cpu", "/dev/nvidia0", "cpu"),
        (None, "cuda,cpu", None, "gpu"),
        (None, None, "/dev/nvidia0", "gpu"),
        (None, None, "/dev/accel0", None),
        (None, None, None, "cpu"),
    ],
)
def test_flags_are_those_of_the_platform_that_jax_will_use(
    device, variable, file, flags, monkeypatch
):
    """What is chosen counts, then JAX_PLATFORMS, then what the machine has."""
    monkeypatch.setattr(devices.glob, "glob", lambda pattern: fnmatch.filter([file or ""], pattern))
    monkeypatch.setenv("JAX_PLATFORMS", variable or "")
    assert devices.flags_for(device) == devices.FLAGS.get(flags, {})


def test_deterministic_gives_a_gpu_its_flags_or_says_that_it_is_too_late(monkeypatch):
    ordered = {"xla_gpu_deterministic_ops": "true", "xla_gpu_autotune_level": "0"}
    assert devices.flags_for("gpu", deterministic=True) == devices.FLAGS["gpu"] | ordered
    assert devices.flags_for("cpu", deterministic=True) == devices.FLAGS["cpu"]
    known = devices.xla_flags(ordered, "--xla_gpu_autotune_level=3")
    assert known == "--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=3"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(UserError, match="JAX had started before"):
        devices.choose(None, deterministic=True)
    devices.choose(None)
    monkeypatch.setenv("XLA_FLAGS", known)
    devices.choose(None, deterministic=True)


@pytest.mark.parametrize(
    ("deterministic", "of_jax", "compiled"),
    [(False, None, "DEFAULT"), (False, "high", "HIGH"), (True, "high", "HIGHEST")],
)
def test_a_deterministic_run_has_full_precision_and_another_that_of_jax(
    deterministic, of_jax, compiled, tmp_path
):
    config = RunConfig(output_dir=str(tmp_path / "run"), deterministic=deterministic)
    with jax.default_matmul_precision(of_jax), open_run(config, "sft", {}):
        x = jax.numpy.ones((2, 2))
        text = jax.jit(jax.numpy.dot).lower(x, x).as_text()
    assert re.findall(r"precision = \[(\w+)", text) == [compiled]


def test_a_run_on_a_gpu_says_that_its_bits_may_differ(monkeypatch, capsys):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(devices, "choose", lambda *how, **more: None)
    set_up(RunConfig(deterministic=True))
    assert "bits may differ" not in capsys.readouterr().out
    set_up(RunConfig())
    assert (
        "the bits may differ from run to run on a GPU; --deterministic" in capsys.readouterr().out
    )


def test_flags_keep_the_users_and_are_those_that_this_jaxlib_knows(tmp_path, monkeypatch):
    """A name that is no flag any more may still be part of a longer string, as in jaxlib 0.12."""
    (tmp_path / "libjax_common.so").write_bytes(
        b"\0xla_a\0says\0xla_b\0says\0a_field xla_cR\x19xla_other"
    )
    monkeypatch.setattr(devices.jaxlib, "__file__", str(tmp_path / "__init__.py"))
    ours = {"xla_a": "1", "xla_b": "2", "xla_c": "3", "xla_d": "4"}
    assert devices.xla_flags(ours, "") == "--xla_a=1 --xla_b=2"
    assert (
        devices.xla_flags(ours, "--xla_b= --xla_dump_to=x") == "--xla_a=1 --xla_b= --xla_dump_to=x"
    )


def test_programs_of_four_blocks_and_more_have_the_newer_kernels_where_a_run_chose_the_older(
    monkeypatch,
):
    newer = {"xla_cpu_use_fusion_emitters": True}
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_cpu_use_fusion_emitters=false")
    assert [devices.compiler_options(layers) for layers in (3, 4, 24)] == [{}, newer, newer]
    monkeypatch.setenv(
        "XLA_FLAGS", "--xla_a=1 --xla_cpu_use_fusion_emitters=true"
    )  # nor where jaxlib has lost it
    assert not devices.compiler_options(24)
    config = models.GPT2Config(11, 16, 16, 5, 2)
    assert config.num_blocks == 5
    assert replace(config, scan_layers=True).num_blocks == 2
    assert replace(config, num_layers=1, scan_layers=True).num_blocks == 1


@pytest.mark.parametrize(
    ("platform", "number", "expected"),
    [("cpu", 2, devices.SAVING_MEMORY), ("cpu", 1, {}), ("gpu", 2, {})],
)
def test_several_cpu_devices_run_no_collectives_at_once(platform, number, expected, monkeypatch):
    """Four devices on two busy cores stood in half of the runs of GRPO otherwise."""
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(jax, "device_count", lambda: number)
    assert devices.compiler_options(0) == expected


def test_the_order_that_saves_memory_is_another_one():
    """A compiler option that XLA takes and does not heed would leave the order as it is."""
    flags = os.environ["XLA_FLAGS"]
    program = (
        "import sys, jax, jax.numpy as jnp\n"
        "def f(x): return (jnp.sin(x) @ x) @ (jnp.cos(x) @ x) + jnp.exp(x) @ x\n"
        "of = lambda o: jax.jit(f, compiler_options=o).lower(jnp.ones((64, 64))).compile()\n"
        "from rlhf_jax.runs import devices\n"
        "print(of({}).as_text() == of(devices.SAVING_MEMORY).as_text())\n"
    )
    usual = " ".join(flag for flag in flags.split() if "scheduler_type" not in flag)
    said = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "XLA_FLAGS": usual, "JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout == "False\n"


def test_this_jaxlib_knows_the_flags_that_every_version_has():
    known = devices.xla_flags(devices.FLAGS["gpu"] | devices.FLAGS["cpu"], "")
    names = {flag.partition("=")[0].removeprefix("--") for flag in known.split()}
    assert (
        names | {"xla_cpu_use_fusion_emitters"}
        == devices.FLAGS["gpu"].keys() | devices.FLAGS["cpu"].keys()
    )


@pytest.mark.slow
@pytest.mark.parametrize("platform", devices.FLAGS)
def test_xla_reads_the_flags(platform):
    """It ends the process at a name or a value that it does not know, on the CPU too."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": devices.xla_flags(devices.flags_for(platform, deterministic=True), ""),
    }
    subprocess.run(
        [sys.executable, "-c", "import jax; jax.numpy.ones(2) + 1"], env=environment, check=True
    )
