"""XLA's threads on a CPU decide bits: they are recorded, and set back wherever a run goes on."""

import json
import os
import shutil
import subprocess
import sys

import jax
import pytest
from builders import ROOT, results, run_loop

from rlhf_jax.cli import verify
from rlhf_jax.config import Compute, RunConfig
from rlhf_jax.runs import devices, manifest
from rlhf_jax.training import pipeline
from rlhf_jax.training.common.opening import run_folder
from rlhf_jax.training.common.setup import choose_devices


@pytest.mark.parametrize(
    ("given", "cores", "count", "threads"),
    [("", 2, 1, 2), ("", 1, 1, 1), ("4", 2, 1, 4), ("x", 3, 1, 3), ("1", 2, 8, 8)],
)
def test_threads_are_those_that_xla_starts(given, cores, count, threads, monkeypatch):
    monkeypatch.setenv("NPROC", given)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(jax, "local_device_count", lambda: count)
    assert devices.num_threads() == threads
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert devices.num_threads() is None


def chosen(monkeypatch, config, *folders, **options):
    """The number of threads that a run asks for."""
    asked = []
    monkeypatch.setattr(devices, "choose", lambda *words, threads, **_: asked.append(threads))
    choose_devices(config, folders, **options)
    return asked[0]


def test_a_resumed_run_asks_for_the_threads_of_its_last_start(tmp_path, monkeypatch, capsys):
    config = RunConfig(output_dir=str(tmp_path / "run"))
    monkeypatch.setattr(devices, "num_threads", lambda: 64)
    run_loop(config, num_steps=1)
    record = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert record["threads"] == 64
    run = run_folder(config, "sft")
    assert run == tmp_path / "run"
    resumed = RunConfig(output_dir=config.output_dir, resume=True)
    assert chosen(monkeypatch, resumed, run) == 64
    assert chosen(monkeypatch, resumed, tmp_path / "none", run) == 64  # of a pipeline's stages
    assert chosen(monkeypatch, config, run) is None  # a new run: one for each core
    assert chosen(monkeypatch, resumed, tmp_path / "none") is None
    blocks = RunConfig(compute=Compute(blocks=8), resume=True)
    assert chosen(monkeypatch, blocks, run) == 8
    assert chosen(monkeypatch, config, run, threads=3) == 3  # verify
    capsys.readouterr()
    monkeypatch.setattr(devices, "num_threads", lambda: 2)
    run_loop(resumed, num_steps=2)
    said = capsys.readouterr().out
    assert "--resume: threads was 64 and is now 2. The run goes on, but is no longer bit" in said
    assert chosen(monkeypatch, resumed, run) == 2


def test_a_pipeline_that_is_resumed_asks_for_its_stages_threads(tmp_path, monkeypatch):
    folders = []
    monkeypatch.setattr(pipeline, "choose_devices", lambda config, given: folders.extend(given))
    monkeypatch.setattr(pipeline, "run_stages", lambda config, path: None)
    pipeline.run(RunConfig(output_dir=str(tmp_path)))
    assert folders == [tmp_path / name for name in ("sft", "reward_model", "ppo")]


def test_a_machine_that_differs_in_its_threads_is_named_by_them_first():
    before = {"backend": "cpu", "threads": 2, "versions": {"jax": "1"}}
    now = {"backend": "gpu", "threads": None, "versions": {"jax": "2"}}
    [first, *_] = manifest.differences(verify._machine(before), verify._machine(now)).values()
    assert first == "threads was 2 and is now None"


COMMAND = [sys.executable, "-m", "rlhf_jax"]
RUN = ["rloo", "--config", "tiny", "--rl.num-iterations", "2", "--checkpoint-interval", "1"]


def on_one_core(*words, threads=None):
    """Runs a command on one core, with XLA's own number of threads or that of ``threads``."""
    environment = {name: value for name, value in os.environ.items() if name != "NPROC"}
    environment["XLA_FLAGS"] = ""
    if threads is not None:
        environment["NPROC"] = str(threads)
    core = str(min(os.sched_getaffinity(0)))
    return subprocess.run(
        ["taskset", "-c", core, *COMMAND, *map(str, words)],
        cwd=ROOT,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("taskset") is None, reason="needs taskset")
def test_a_run_of_two_threads_is_resumed_and_verified_on_one_core(tmp_path):
    """The number of threads changes the bits, and that of cores does not."""
    two = tmp_path / "two"
    on_one_core(*RUN, "--output-dir", two, threads=2)
    one = tmp_path / "one"
    on_one_core(*RUN, "--output-dir", one)
    assert (one / "metrics.jsonl").read_bytes() != (two / "metrics.jsonl").read_bytes()
    assert on_one_core("verify", two, "--all", "--trust-config").endswith("the same bytes\n")

    stopped = tmp_path / "stopped"
    shutil.copytree(two, stopped)
    shutil.rmtree(stopped / "checkpoints" / "2")
    shutil.rmtree(stopped / "model")
    on_one_core(*RUN, "--output-dir", stopped, "--resume")
    assert results(stopped) == results(two)
    starts = json.loads((stopped / "manifest.json").read_text())
    assert [starts["threads"], starts["resumed"][0]["threads"]] == [2, 2]
