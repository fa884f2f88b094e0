"""Runs that two processes share: they give one result, can be killed, and end together where one of them fails."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_kills import ROOT, TINY, results

from rlhf_jax.errors import UserError
from rlhf_jax.runs import processes

# A function in Python runs in each process on its own rows; which row it is decides the score.
REWARD = """
import random

def score(prompts, responses):  # random, but by the run's seed and the step
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


def start(script: str, folder: Path, count: int, *flags: str) -> list[subprocess.Popen]:
    """The processes of one run, the first one first, with two devices in all, or one each."""
    command = [sys.executable, f"experiments/{script}.py", "--config", TINY, "--output-dir", folder, *flags]
    return launch(command, count, max(2 // count, 1), ["--processes"])


def finish(running: list[subprocess.Popen], code: int = 0) -> list[str]:
    said = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [code] * len(running), said
    return said


def kill_last(running: list[subprocess.Popen], metrics: Path, rows: int) -> None:
    """Kills the last process after some rows; the others notice, say so and end."""
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < rows:
        assert not any(process.poll() for process in running), finish(running)
        time.sleep(0.01)
    running[-1].send_signal(signal.SIGKILL)
    said = [process.communicate(timeout=processes.HEARTBEAT_SECONDS + 40)[0] for process in running]
    assert all(process.returncode for process in running)
    assert re.search("another process has gone|unhealthy|heartbeat timeout", said[0]), said[0]


@pytest.mark.parametrize(
    ("script", "flags", "count"),
    [
        pytest.param("vpg", ["--checkpoint-async"], 2, marks=pytest.mark.soak),
        pytest.param("sft", ["--mesh.data", "1", "--mesh.fsdp", "2"], 2, marks=pytest.mark.slow, id="sft cut"),
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
    assert processes.agree(lambda: 3) == processes.in_first(lambda: 3) == processes.highest(3) == 3
    with pytest.raises(ZeroDivisionError):
        processes.agree(lambda: 1 // 0)
    rows = np.arange(4)
    assert processes.gather_rows(rows) is rows
