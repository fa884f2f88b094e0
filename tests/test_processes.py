"""Runs that two processes share: they give one result, can be killed, and end together where one of them fails."""

import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from safetensors.numpy import load_file
from test_kills import ROOT, TINY, results

from rlhf_jax.errors import UserError
from rlhf_jax.runs import processes
from rlhf_jax.training.signals import stop_requests

# A function in Python runs in each process on its own rows; which row it is decides the score.
REWARD = """
import random, time

def score(prompts, responses):  # random, but by the run's seed and the step
    time.sleep(0.1)  # a signal is spread within a second
    return [len(prompt) % 7 - random.random() * len(response) for prompt, response in zip(prompts, responses)]
"""


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def launch(command: list, count: int, devices: int, flag: list[str]) -> list[subprocess.Popen]:
    """Starts a command once for each process, with so many devices each; ``flag`` stands before the process's place."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{server.getsockname()[1]},{count}"
    pipes = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    own = [[*flag, f"{place},{number}"] if count > 1 else [] for number in range(count)]
    return [subprocess.Popen([*map(str, command), *last], env=environment, cwd=ROOT, **pipes) for last in own]


def start(script: str, folder: Path, count: int, *flags: str, devices: int | None = None) -> list[subprocess.Popen]:
    """The processes of one run, the first one first, with so many devices each; None: two in all, or one each."""
    command = [sys.executable, f"experiments/{script}.py", "--config", TINY, "--output-dir", folder, *flags]
    return launch(command, count, devices or max(2 // count, 1), ["--processes"])


def finish(running: list[subprocess.Popen], code: int = 0) -> list[str]:
    said = [process.communicate(timeout=900)[0] for process in running]
    assert [process.returncode for process in running] == [code] * len(running), said
    return said


def wait_for(running: list[subprocess.Popen], metrics: Path, rows: int) -> None:
    """Returns once so many rows of metrics are written."""
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < rows:
        assert not any(process.poll() for process in running), finish(running)
        time.sleep(0.01)


def stop_one(running: list[subprocess.Popen], number: int, metrics: Path, sent: signal.Signals) -> None:
    """Sends a signal to one process during the run; all save and end, and say how to go on."""
    wait_for(running, metrics, 3)
    running[number].send_signal(sent)
    said = finish(running, 128 + sent)
    assert all(f"{sent.name}: stopped after step" in text and "--resume" in text for text in said), said
    assert not (metrics.parent / "model").exists()


def kill_last(running: list[subprocess.Popen], metrics: Path, rows: int) -> None:
    """Kills the last process after some rows; the others notice, say so and end."""
    wait_for(running, metrics, rows)
    running[-1].send_signal(signal.SIGKILL)
    said = [process.communicate(timeout=processes.HEARTBEAT_SECONDS + 40)[0] for process in running]
    assert all(process.returncode for process in running)
    assert re.search("another process has gone|unhealthy|heartbeat timeout", said[0]), said[0]


@pytest.mark.parametrize(
    ("script", "flags", "count"),
    [
        pytest.param("vpg", ["--checkpoint-async"], 2, marks=pytest.mark.soak),
        pytest.param("sft", ["--mesh.data", "1", "--mesh.fsdp", "2"], 2, marks=pytest.mark.soak, id="sft cut"),
        pytest.param("vpg", [], 4, marks=pytest.mark.soak),
        *(
            pytest.param(script, flags, 2, marks=pytest.mark.soak)
            for script in ("sft", "reward_model", "dpo", "ppo", "rloo", "grpo", "pipeline")
            for flags in ([], ["--checkpoint-async"])
        ),
    ],
)
def test_processes_of_which_one_is_killed_resume_to_the_same_bytes(script, flags, count, tmp_path):
    """Killed after some rows of metrics, in the pipeline in the middle of its first stage."""
    (tmp_path / "reward.py").write_text(REWARD)
    if script in ("vpg", "ppo", "rloo", "grpo"):
        flags = [*flags, "--reward", f"{tmp_path / 'reward.py'}:score"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    said = finish(start(script, whole, count, *flags))
    assert f"cpu: {count} x cpu" in said[0]
    assert "objective" not in said[1]  # the first one speaks
    metrics = killed / ("sft" if script == "pipeline" else "") / "metrics.jsonl"
    kill_last(start(script, killed, count, *flags), metrics, 7)
    finish(start(script, killed, count, *flags, "--resume"))
    assert results(killed) == results(whole)


@pytest.mark.parametrize(
    ("count", "devices", "number", "sent"),
    [
        pytest.param(2, 1, 1, signal.SIGTERM, marks=pytest.mark.soak),
        pytest.param(2, 2, 1, signal.SIGTERM, marks=pytest.mark.soak),
        pytest.param(2, 2, 0, signal.SIGINT, marks=pytest.mark.soak),
        pytest.param(4, 2, 2, signal.SIGTERM, marks=pytest.mark.soak),
    ],
)
def test_a_signal_to_one_process_saves_and_ends_all(count, devices, number, sent, tmp_path):
    """With exit code 143 or 130, as one process. Then killed with -9 and resumed, the run ends with the same bytes."""
    (tmp_path / "reward.py").write_text(REWARD)
    flags = ["--reward", f"{tmp_path / 'reward.py'}:score", "--rl.num-iterations", "30", "--mesh.fsdp", "2"]
    flags += ["--rl.validation-interval", "30", "--checkpoint-interval", "5"]
    finish(start("vpg", tmp_path / "whole", count, *flags, devices=devices))
    again = functools.partial(start, "vpg", tmp_path / "run", count, *flags, devices=devices)
    metrics = tmp_path / "run" / "metrics.jsonl"
    stop_one(again(), number, metrics, sent)
    kill_last(again("--resume"), metrics, 25)
    finish(again("--resume"))
    assert results(tmp_path / "run") == results(tmp_path / "whole")


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param([], marks=pytest.mark.soak, id="data"),
        pytest.param(["--mesh.data", "1", "--mesh.fsdp", "2"], marks=pytest.mark.slow, id="fsdp"),
    ],
)
def test_two_processes_learn_what_one_does(layout, tmp_path):
    """Two devices either way, so that rows and keys are the same; only the sums across devices are others."""
    two, one = tmp_path / "two", tmp_path / "one"
    # An eps of 1e-8 would blow rounding up to a step.
    flags = [*layout, "--sft.validation-interval", "5", "--sft.optimizer.eps", "1e-3"]
    finish(start("sft", two, 2, *flags))
    finish(start("sft", one, 1, *flags))
    rows = [map(json.loads, (path / "metrics.jsonl").read_text("utf-8").splitlines()) for path in (two, one)]
    for row, of_one in zip(*rows, strict=True):
        assert row == pytest.approx(of_one, rel=1e-4), row["step"]
    weights, of_one = (load_file(folder / "model" / "model.safetensors") for folder in (two, one))
    for name, value in of_one.items():
        np.testing.assert_allclose(weights[name], value, atol=1e-5, err_msg=name)


INTERLEAVED = """
import sys
import jax, numpy as np
from rlhf_jax import sharding
from rlhf_jax.runs import processes
from rlhf_jax.training.signals import stop_requests
processes.join(sys.argv[1])
mesh = jax.sharding.Mesh(np.array(jax.devices())[[0, 2, 1, 3]], ("data",))  # of the processes 0, 1, 0, 1
spread = sharding.shard_rows(mesh, np.arange(8))
assert processes.fetch(spread).tolist() == list(range(8))
assert sorted(shard.data.tolist() for shard in spread.addressable_shards) == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]][
    jax.process_index()
]
"""


@pytest.mark.slow
def test_rows_keep_their_order_on_a_mesh_of_interleaved_devices():
    finish(launch([sys.executable, "-c", INTERLEAVED], 2, devices=2, flag=[]))


@pytest.mark.parametrize("place", ["here", "10.0.0.1,2,0", "10.0.0.1:99,2", "10.0.0.1:99,2,2", "10.0.0.1:99,0,0"])
def test_a_place_that_is_none(place):
    with pytest.raises(UserError, match=rf"--processes {place}: expected HOST:PORT,COUNT,NUMBER"):
        processes.join(place)


def test_one_process_is_alone():
    """Work is done here, its errors are its own, and nothing is gathered."""
    assert processes.is_first()
    assert processes.agree(lambda: 3) == processes.in_first(lambda: 3) == processes.stop_signal([3]) == 3
    with pytest.raises(ZeroDivisionError):
        processes.agree(lambda: 1 // 0)
    rows = np.arange(4)
    assert processes.gather_rows(rows) is rows


def test_a_step_without_a_signal_waits_for_no_other_process(monkeypatch):
    """The processes' signals are compared once, at the step that the preemption service has chosen."""
    asked, gathered = [], []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda step: asked.append(step) or ends)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda own: gathered.append(own) or [own, others])
    ends, others = False, 0
    assert [processes.stop_signal([signal.SIGINT]) for _ in range(2)] == [0, 0]
    assert (gathered, asked[1] - asked[0]) == ([], 1)
    ends = True
    assert processes.stop_signal([]) == signal.SIGTERM  # caught by JAX alone
    others = signal.SIGINT
    assert processes.stop_signal([]) == signal.SIGINT


def test_with_several_processes_sigterm_is_left_to_jax(monkeypatch):
    """Ctrl-C in one of them raises it, so that the others hear of it."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))  # in the place of JAX's
    try:
        with stop_requests() as stops:
            signal.raise_signal(signal.SIGTERM)
            assert (stops, heard) == ([], [signal.SIGTERM])
            signal.raise_signal(signal.SIGINT)
        assert (stops, heard) == ([signal.SIGINT], [signal.SIGTERM] * 2)
    finally:
        signal.signal(signal.SIGTERM, before)
