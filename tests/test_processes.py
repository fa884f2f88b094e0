"""Runs that two processes share: they give one result, can be killed, and end together where one of
them fails.
"""

import atexit
import functools
import inspect
import json
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stages
from builders import TINY, launch, letters_stage, metric_rows, program, results, slow
from jax._src import distributed
from jax._src.array import ArrayImpl
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from numpy.testing import assert_allclose, assert_array_equal
from recorded import rl_job
from safetensors.numpy import load_file
from servers import VLLM, Server

from rlhf_jax import sharding, training
from rlhf_jax.algorithms import spo
from rlhf_jax.cli.stages import find_algorithm
from rlhf_jax.data import encoding, tokenizers
from rlhf_jax.data.rows import Row
from rlhf_jax.errors import ServiceError, TrainingFault, UserError
from rlhf_jax.runs import processes
from rlhf_jax.runs.checkpoint import Checkpoints
from rlhf_jax.training.common.signals import stop_requests
from rlhf_jax.training.rl import validation
from rlhf_jax.training.rl.score import unfit_scores
from rlhf_jax.training.supervised import normalization, scoring
from rlhf_jax.types import Rollout

# A function in Python runs in each process on its own rows; which row it is decides the score.
REWARD = """
import random, time

def score(prompts, responses):  # random, but by the run's seed and the step
    time.sleep(0.1)  # a signal is spread within a second
    pairs = zip(prompts, responses)
    return [len(prompt) % 7 - random.random() * len(response) for prompt, response in pairs]
"""


def start(
    script: str, folder: Path, count: int, *flags: str, devices: int | None = None
) -> list[subprocess.Popen]:
    """The processes of one run, the first one first, with so many devices each; None: two in all,
    or one each.
    """
    command = [*program(script), "--config", TINY, "--output-dir", folder, *flags]
    return launch(command, count, devices or max(2 // count, 1), ["--processes"])


def finish(running: list[subprocess.Popen], *codes: int) -> list[str]:
    """What they said; each must end with one of the codes, if none is given with 0."""
    said = [process.communicate(timeout=3600)[0] for process in running]
    assert {process.returncode for process in running} <= {*(codes or [0])}, said
    return said


def wait_for(running: list[subprocess.Popen], metrics: Path, rows: int) -> None:
    """Returns once so many rows of metrics are written."""
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < rows:
        assert not any(process.poll() for process in running), finish(running)
        time.sleep(0.01)


def stop_one(
    running: list[subprocess.Popen], number: int, metrics: Path, sent: signal.Signals
) -> None:
    """Sends a signal to one process during the run; all save and end, and say how to go on."""
    wait_for(running, metrics, 3)
    running[number].send_signal(sent)
    said = finish(running, 128 + sent)
    assert all(
        f"{sent.name}: stopped after step" in text and "--resume" in text for text in said
    ), said
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
        pytest.param(
            "sft", ["--mesh.data", "1", "--mesh.fsdp", "2"], 2, marks=pytest.mark.soak, id="sft cut"
        ),
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
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
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
    """With exit code 143 or 130, as one process. Then killed with -9 and resumed, the run ends with
    the same bytes.
    """
    (tmp_path / "reward.py").write_text(REWARD)
    flags = ["--rl.num-iterations", "30", "--mesh.fsdp", "2", "--rl.validation-interval", "30"]
    flags += ["--checkpoint-interval", "5", "--reward", f"{tmp_path / 'reward.py'}:score"]
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
    """Two devices either way, so that rows and keys are the same; only the sums across devices are
    others.
    """
    two = tmp_path / "two"
    one = tmp_path / "one"
    # An eps of 1e-8 would blow rounding up to a step.
    flags = [*layout, "--sft.validation-interval", "2", "--sft.optimizer.eps", "1e-3"]
    flags += ["--sft.max-steps", "4"]
    finish(start("sft", two, 2, *flags))
    finish(start("sft", one, 1, *flags))
    for row, of_one in zip(metric_rows(two), metric_rows(one), strict=True):
        assert row == pytest.approx(of_one, rel=1e-4), row["step"]
    weights, of_one = (load_file(folder / "model" / "model.safetensors") for folder in (two, one))
    for name, value in of_one.items():
        assert_allclose(weights[name], value, atol=1e-5, err_msg=name)


def losses(row: dict[str, float]) -> dict[str, float]:
    return {name: row[name] for name in row if "loss" in name or name.endswith("/score")}


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(stages.STAGES, marks=pytest.mark.slow, id="stages"),
        pytest.param(stages.METHODS, marks=pytest.mark.slow, id="methods"),
        pytest.param(stages.VARIANTS, marks=pytest.mark.soak, id="variants"),
    ],
)
def test_every_stage_in_two_processes_gives_the_bytes_of_one(names, tmp_path, monkeypatch):
    """With ``compute.blocks``; under ``mesh.fsdp`` the losses and scores are those of one."""
    stages.prepare(tmp_path)
    policy = VLLM(tmp_path / "model")
    judge = Server(lambda number, body: {"choices": [{"message": {"content": "Score: 3"}}]})
    monkeypatch.setenv("VLLM_URL", policy.url)
    monkeypatch.setenv("JUDGE_URL", judge.url)
    for count in (1, 2):
        command = [sys.executable, "tests/stages.py", tmp_path, *names]
        finish(launch(command, count, 2 // count, ["--processes"]))
    for server in (policy, judge):
        server.stop()
    for name in names:
        folders = [tmp_path / number / name for number in ("two", "one")]
        if "fsdp" in name:
            two, one = ([losses(row) for row in metric_rows(folder)] for folder in folders)
            assert two == [pytest.approx(row, rel=1e-3, abs=1e-5) for row in one], name
            assert any(one), name
        else:
            two, one = map(results, folders)
            assert two == one, (name, [file for file in one if one[file] != two.get(file)])
            assert any(file.endswith("model.safetensors") for file in one), name


@pytest.mark.parametrize(
    ("name", "place"),
    [
        pytest.param("sft", "row", marks=pytest.mark.slow),
        pytest.param("dpo", "checkpoint", marks=pytest.mark.slow),
        pytest.param("sft", "checkpoint", marks=pytest.mark.soak),
        pytest.param("dpo", "row", marks=pytest.mark.soak),
    ],
)
def test_one_of_two_is_killed_and_the_run_goes_on_to_the_same_bytes(name, place, tmp_path):
    stages.prepare(tmp_path)
    command = [sys.executable, "tests/stages.py", tmp_path, name]
    finish(launch(command, 1, 2, []))
    survivor, killed = launch([*command, "--die", place], 2, 1, ["--processes"])
    said, _ = survivor.communicate(timeout=900)
    assert killed.wait() == -signal.SIGKILL, killed.communicate()
    assert survivor.returncode
    assert re.search("another process has gone|unhealthy|heartbeat timeout", said), said
    finish(launch([*command, "--resume"], 2, 1, ["--processes"]))
    assert results(tmp_path / "two" / name) == results(tmp_path / "one" / name)


def parts_of(step: int) -> dict[str, np.ndarray]:
    """Numbers that do not compress, a function of the step."""
    rng = np.random.default_rng(step)
    return {"cut": rng.random((64, 1024), np.float32), "copied": rng.random((2, 3), np.float32)}


PARTS = """
import errno, os, pathlib, signal, sys, warnings
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
sys.path.append("tests")
from rlhf_jax import sharding
from rlhf_jax.runs import checkpoint, processes
folder, place = pathlib.Path(sys.argv[1]), sys.argv[2]
processes.join(place)
number = jax.process_index()

# A mesh whose devices are the processes' 0, 1, 0, 1: every row is where it was.
spread = sharding.shard_rows(Mesh(np.array(jax.devices())[[0, 2, 1, 3]], ("data",)), np.arange(8))
assert processes.fetch(spread).tolist() == list(range(8))
mine = [[[0, 1], [4, 5]], [[2, 3], [6, 7]]][number]
assert sorted(shard.data.tolist() for shard in spread.addressable_shards) == mine

del processes.fetch  # no array is collected from here on
mesh, placed, put = sharding.make_mesh(1, fsdp=4), [], checkpoint._moved
checkpoint._moved = lambda array, target: (placed.append(array.shape), put(array, target))[1]

def state(step, *cut):
    def on(x, *spec):
        return sharding.place(x, NamedSharding(mesh, P(*spec)))
    parts = parts_of(step)
    loose = {"host": np.arange(4) + step, "coef": jnp.float32(step)}
    loose["key"] = on(jax.random.key(step))
    return {"cut": on(parts["cut"], *cut), "copied": on(parts["copied"])} | loose

def shards(x):
    return [shard.data for shard in x.addressable_shards] if isinstance(x, jax.Array) else [x]

def check(found, step, *cut):
    for name, wanted in state(step, *cut).items():
        x, y = ((jax.random.key_data(x) if name == "key" else x) for x in (found[name], wanted))
        assert type(x) is type(y), name
        assert getattr(x, "sharding", None) == getattr(y, "sharding", None), name
        pairs = zip(shards(x), shards(y))
        assert all(np.array_equal(a, b) for a, b in pairs), name

def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

rows, columns = ("fsdp",), (None, "fsdp")
with checkpoint.Checkpoints(folder, asynchronous=True) as checkpoints:
    for cut in (rows, columns):  # of a single process
        check(checkpoints.restore(state(9, *cut))[0], 0, *cut)
    given = state(1, *rows)
    checkpoints.save(1, given, {})
    jax.jit(lambda x: x * 0, donate_argnums=0)(given["cut"])  # as the next update does
    given["host"][:] = 0
    checkpoints.wait()
    saved = checkpoint._digests
    if number == 1:
        checkpoint._digests = full
    checkpoints.save(2, state(2, *rows), {})
    try:
        checkpoints.wait()
    except checkpoint.CheckpointError as error:
        assert "No space left on device); the last good checkpoint is step 1" in str(error), error
    else:
        raise AssertionError("no error")
    checkpoint._digests = saved
    assert number or [path.name for path in sorted(folder.iterdir())] == ["0", "1"]
    checkpoints.save(2, state(2, *rows), {"a": 1})
    restored, meta = checkpoints.restore(state(9, *rows))
    check(restored, 2, *rows)
    assert meta == {"a": 1}
    check(checkpoints.restore(state(9, *columns))[0], 2, *columns)
    processes.agree(lambda: None)
    if number == 0:  # a bit of what the other process has written
        of_second = (folder / "2" / "state" / "ocdbt.process_1" / "d").iterdir()
        file = max(of_second, key=lambda path: path.stat().st_size)
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    processes.agree(lambda: None)
    with warnings.catch_warnings(record=True) as caught:
        check(checkpoints.restore(state(9, *rows))[0], 1, *rows)
    warning = str(caught[0].message)
    assert "step 2" in warning and "Going back to step 1" in warning, caught
    checkpoints.save(2, state(2, *rows), {"a": 2})
    checkpoints.wait()
    checkpoint._digests = die
    checkpoints.save(3, state(3, *rows), {})
    checkpoints.wait()
"""


def whole(step):
    """The state of a step on one process."""
    key = jax.random.key(step)
    loose = {"host": np.arange(4) + step, "coef": jnp.float32(step), "key": key}
    return jax.tree.map(jnp.asarray, parts_of(step)) | loose


@pytest.mark.slow
def test_each_process_writes_its_own_parts_of_a_checkpoint(tmp_path):
    """A state on two processes of two devices: read from one process's checkpoint, saved, damaged,
    killed in a save, read by one process on another layout. And rows keep their order on a mesh of
    interleaved devices."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, whole(0), {})
    program = "import numpy as np\n" + inspect.getsource(parts_of) + PARTS
    # The second one is aborted if the first, which coordinates them, is gone before it kills
    # itself.
    running = launch([sys.executable, "-c", program, tmp_path], 2, 2, [])
    finish(running, -signal.SIGKILL, -signal.SIGABRT)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"1", "2", "damaged-2", "3.orbax-checkpoint-tmp"}
    written = [tmp_path / "2" / "state" / f"ocdbt.process_{number}" / "d" for number in range(2)]
    sizes = [sum(path.stat().st_size for path in folder.iterdir()) for folder in written]
    half = parts_of(2)["cut"].nbytes / 2
    assert all(0.85 * half < size < 1.15 * half for size in sizes), sizes
    by_tensor = NamedSharding(
        sharding.make_mesh(2, fsdp=1, tensor=2), PartitionSpec("data", "tensor")
    )
    with Checkpoints(tmp_path) as checkpoints:
        target = whole(9)
        restored, meta = checkpoints.restore(
            target | {"cut": jax.device_put(target["cut"], by_tensor)}
        )
        assert meta == {"a": 2}
        assert restored["cut"].sharding == by_tensor
        numbers = [
            state | {"key": jax.random.key_data(state["key"])} for state in (restored, whole(2))
        ]
        jax.tree.map(assert_array_equal, *numbers)
        checkpoints.save(3, restored, {})
    assert {path.name for path in tmp_path.iterdir()} == {"2", "3", "damaged-2"}


@pytest.fixture
def apart(monkeypatch):
    """Arrays that are cut over devices behave as those that are cut over processes: nothing but
    ``processes.fetch`` reads them.
    """
    value = ArrayImpl._value.fget
    fetch = processes.fetch
    fetching = []

    def read(array):
        if not fetching and not array.is_fully_replicated:
            raise RuntimeError("Fetching value for jax.Array that spans non-addressable devices")
        return value(array)

    def fetch_here(tree):
        fetching.append(tree)
        try:
            return fetch(tree)
        finally:
            fetching.pop()

    monkeypatch.setattr(ArrayImpl, "_value", property(read))
    monkeypatch.setattr(processes, "fetch", fetch_here)


def test_only_fetch_reads_what_is_cut_over_processes(apart):
    cut = sharding.shard_rows(sharding.make_mesh(2), np.arange(4))
    for read in (np.asarray, jax.device_get, list, lambda x: np.pad(x, (0, 1))):
        with pytest.raises(RuntimeError, match="spans non-addressable devices"):
            read(cut)
    assert_array_equal(processes.fetch(cut), np.arange(4))


@pytest.mark.parametrize(
    "stage", ["dpo", "vpg", *map(slow, ("sft", "reward_model", "kto", "ppo", "rloo", "grpo"))]
)
def test_a_stage_reads_by_fetch_what_is_cut_over_processes(stage, apart, tmp_path):
    config = letters_stage(tmp_path, stage)
    if (algorithm := find_algorithm(stage)) is not None:
        reward = f"{tmp_path / 'reward.py'}:same"  # in Python
        training.rl.run(replace(config, reward=(reward,)), algorithm)
    else:
        own = {"max_steps": 1} if stage == "reward_model" else {"max_steps": 1, "max_new_tokens": 2}
        section = replace(getattr(config, stage), **own)
        getattr(training, stage).run(replace(config, **{stage: section}))
    samples = metric_rows(tmp_path / "run", "samples.jsonl")
    assert samples
    assert stage != "dpo" or "log_ratio" in samples[0]


def test_scores_that_are_cut_over_processes_are_normalised(apart):
    """Under mesh.fsdp: scores 1, 2, 3 and 6 have mean 3 and variance 3.5."""
    scores = np.array([[1.0], [2.0], [3.0], [6.0]], np.float32)
    cut = sharding.shard_rows(sharding.make_mesh(2), scores)
    ids = np.ones((4, 3), np.int32)
    normalized = normalization.normalize(lambda params, _: cut, {"score": {}}, ids, ids)
    head = jax.tree.map(float, normalized["score"])
    assert head == pytest.approx({"gain": 3.5**-0.5, "shift": -3 * 3.5**-0.5})


def test_figures_of_rows_that_are_cut_over_processes(apart):
    """Three of four rows win; the last has a score that no pass rate is."""
    scores = np.array([1.0, 0.0, 1.0, 1.0], np.float32)
    ids = np.ones((4, 3), np.int32)
    rollout = Rollout(ids, ids, ids, ids.astype(np.float32), row_ids=np.arange(4), scores=scores)
    mesh = sharding.make_mesh(2)
    found = validation.win_rate(sharding.shard_rows(mesh, rollout), np.arange(4))
    assert 0.75 in list(map(float, found.values()))
    prompts = SimpleNamespace(rows=[Row("a", (), f"line {i}") for i in range(4)])
    job = rl_job(own=spo.Config(), inputs={"prompts": prompts})
    scored = sharding.shard_rows(mesh, rollout.replace(scores=scores * [1, 1, 1, 3]))
    assert "3.0 for line 3" in unfit_scores(job, scored)()


def test_scores_of_answers_that_are_cut_over_processes(apart):
    """The score is the number of the answer's tokens."""
    texts = encoding.encode_texts(
        [Row("ab", ("c", "de"), "line 1"), Row("a", ("bcd", "e"), "line 2")],
        tokenizers.characters("abcde"),
    )
    shard = functools.partial(sharding.shard_rows, sharding.make_mesh(2))
    how = {"batch_size": 2, "bucket_multiple": 4, "shard": shard}
    found = scoring.score_rows(
        lambda batch: jnp.sum(batch.response_mask, axis=-1), texts, np.array([1, 0]), **how
    )
    assert_array_equal(found, [[4, 2], [2, 3]])  # with EOS


@pytest.mark.parametrize(
    "place",
    [
        "here",
        "10.0.0.1,2,0",
        "10.0.0.1:99,2",
        "10.0.0.1:99,2,2",
        "10.0.0.1:99,0,0",
        "HOST:99999,1,0",
        "HOST:65536,1,0",
        "HOST:0,1,0",
    ],
)
def test_a_place_that_is_none(place, monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: pytest.fail("it waits"))
    with pytest.raises(UserError, match=rf"--processes {place}: expected HOST:PORT,COUNT,NUMBER"):
        processes.join(place)


def test_one_process_is_alone():
    """Work is done here, its errors are its own, and nothing is gathered."""
    assert processes.is_first()
    assert processes.agree(lambda: 3) == processes.in_first(lambda: 3) == 3
    assert processes.stop_signal([3]) == 3
    with pytest.raises(ZeroDivisionError):
        processes.agree(lambda: 1 // 0)
    rows = np.arange(4)
    assert processes.gather_rows(rows) is rows
    assert not processes.is_lost(RuntimeError("UNAVAILABLE"))  # nobody to lose


class Store(dict):
    """The processes' store, in which the second of two leaves its report at every place."""

    def __init__(self, report: dict):
        self.report = json.dumps(report)

    key_value_set = dict.__setitem__

    def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
        assert milliseconds == 24 * 3600 * 1000
        return self.report if key.endswith("/1") else self[key]


def test_what_a_process_hears_of_another(monkeypatch):
    """Its result, its error, or that it has ended."""
    registered = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **options: None)
    monkeypatch.setattr(atexit, "register", lambda *args: registered.append(args))
    processes.join("10.0.0.1:99,2,0")
    ((at_exit, last_words),) = registered
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    def gather(report, work=lambda: 3):
        monkeypatch.setattr(distributed.global_state, "client", Store(report))
        return processes.gather(work)

    assert gather({"result": 4}) == [3, 4]
    for kind in (UserError, TrainingFault, ServiceError):
        with pytest.raises(kind, match=r"^process 1: no such file$"):
            gather({"error": "no such file", "kind": kind.__name__})
    with pytest.raises(TrainingFault, match=r"^process 1: it has ended; its last lines say why$"):
        gather(last_words)
    for kind in (UserError, ServiceError, TrainingFault):  # the others hear which it was
        with pytest.raises(kind):
            gather({"result": 4}, mock.Mock(side_effect=kind("no such file")))
        [report] = map(json.loads, distributed.global_state.client.values())
        assert report == {"error": "no such file", "kind": kind.__name__}
    with pytest.raises(ZeroDivisionError):
        gather({"result": 4}, lambda: 1 // 0)
    store = distributed.global_state.client
    ((failed_at, report),) = store.items()
    assert "by zero" in json.loads(report)["error"]
    assert processes.is_lost(RuntimeError("Gloo: connection closed by peer"))
    assert not processes.is_lost(RuntimeError("out of memory"))
    at_exit(last_words)  # at the next place, and waits for nobody
    ended_at, report = store.popitem()
    assert (ended_at > failed_at, json.loads(report)) == (True, last_words)


def test_a_step_without_a_signal_waits_for_no_other_process(monkeypatch):
    """The processes' signals are compared once, at the step that the preemption service has
    chosen.
    """
    asked = []
    gathered = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        multihost_utils, "reached_preemption_sync_point", lambda step: asked.append(step) or ends
    )
    monkeypatch.setattr(
        multihost_utils, "process_allgather", lambda own: gathered.append(own) or [own, others]
    )
    ends = False
    others = 0
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
    before = signal.signal(
        signal.SIGTERM, lambda number, frame: heard.append(number)
    )  # in the place of JAX's
    try:
        with stop_requests() as stops:
            signal.raise_signal(signal.SIGTERM)
            assert (stops, heard) == ([], [signal.SIGTERM])
            signal.raise_signal(signal.SIGINT)
        assert (stops, heard) == ([signal.SIGINT], [signal.SIGTERM] * 2)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_outside_the_main_thread_no_signal_is_caught():
    """Python refuses handlers there; a run in a thread is its caller's to stop."""

    def requests():
        with stop_requests() as stops:
            return stops

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(requests).result() == []
