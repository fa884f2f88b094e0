"""What the processes of one run compare before the first step, and the scores of all, which are
those of one process.
"""

import hashlib
import json
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import TINY, launch, metric_rows
from jax._src.array import ArrayImpl
from jax.experimental import multihost_utils
from jax.tree_util import Partial

from rlhf_jax import Rollout
from rlhf_jax.config import RLStage, RunConfig, Safety, Tokenizer
from rlhf_jax.data.encoding import EncodedPrompts
from rlhf_jax.data.rows import Row
from rlhf_jax.errors import TrainingFault, UserError
from rlhf_jax.graders import filter as filters
from rlhf_jax.graders import spec
from rlhf_jax.rewards import Unscored
from rlhf_jax.runs import devices, folder, manifest, processes
from rlhf_jax.training.common import opening
from rlhf_jax.training.rl.host import score_on_host
from rlhf_jax.training.rl.schedule import Batch


class Threads:
    """Threads that take the parts of a run's processes."""

    def __init__(self, count, monkeypatch):
        self.count = count
        self.own = threading.local()
        self.barrier = threading.Barrier(count, timeout=20)
        self.given = [None] * count
        monkeypatch.setattr(jax, "process_count", lambda: count)
        monkeypatch.setattr(jax, "process_index", lambda: self.own.number)
        monkeypatch.setattr(multihost_utils, "process_allgather", self.allgather)
        monkeypatch.setattr(processes, "gather", self.gather)

    def exchange(self, value):
        self.given[self.own.number] = value
        self.barrier.wait()
        found = [*self.given]
        self.barrier.wait()
        return found

    def allgather(self, tree, tiled=False):
        trees = self.exchange(tree)
        assert len({jax.tree.structure(tree) for tree in trees}) == 1, "a run would stand"
        assert len({str(jax.tree.map(np.shape, tree)) for tree in trees}) == 1, "gloo would abort"
        return jax.tree.map(lambda *rows: (np.concatenate if tiled else np.stack)(rows), *trees)

    def gather(self, work):
        try:
            report = {"result": work()}
        except UserError as error:
            report = {"error": str(error)}
        reports = [json.loads(text) for text in self.exchange(json.dumps(report))]
        errors = [report["error"] for report in reports if "error" in report]
        if errors:
            raise UserError(errors[0])
        return [report["result"] for report in reports]

    def run(self, work):
        """The results of all, the first one's first."""

        def one(number):
            self.own.number = number
            return work()

        with ThreadPoolExecutor(self.count) as pool:
            return [*pool.map(one, range(self.count))]


# --- Scores


B, T = 4, 5


def scored(reward, guard=None, **fields):
    """What becomes of four rows of 1 to 4 tokens behind a prompt of one token."""
    mask = np.int32([[0, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 1, 1, 1, 1]])
    blank = np.zeros((B, T), np.float32)
    rollout = Rollout(np.ones((B, T), np.int32), np.ones((B, T), np.int32), mask, blank)
    rollout = rollout.replace(row_ids=np.arange(B, dtype=np.int32))
    ones = np.ones((B, 1), np.int32)
    prompts = EncodedPrompts(ones, ones, [Row("a", (), "")] * B, (), {})
    layout = SimpleNamespace(shard=lambda batch: batch)
    reward = spec.Reward(host=reward, **fields)
    batch = Batch(prompts, np.arange(B), jax.random.key(0))
    return score_on_host(layout, reward, guard, rollout, batch, set())


def by_row(scores, **components):
    """A reward that looks up the values of rows by their ids. Only components with a value."""

    def reward(rollout, columns):
        rows = rollout.row_ids.tolist()
        found = {name: [of[row] for row in rows] for name, of in components.items()}
        some = {n: v for n, v in found.items() if any(x is not None for x in v)}
        return [scores[row] for row in rows], some

    return reward


REWARDS = {
    "of two names": by_row([1, 2, 3, 4], good=[1, 2, None, None], bad=[None, None, 5, 6]),
    "in the first": by_row([1, 2, 3, 4], good=[1, 2, None, None]),
    "in the second": by_row([1, 2, 3, 4], good=[None, None, 5, None]),
    "scores at tokens in the second": by_row([1, 2, [1.0] * T, 4]),
    "parts at tokens in the first": by_row([1, 2, 3, 4], good=[[0.5] * T, 2, 3, 4]),
    "no score in the first": by_row([None, None, [1.0] * T, 4], good=[None, None, 3, 4]),
    "no score": by_row([None] * 4),
    "reasons": by_row([Unscored("late", ("a",)), 1, Unscored("early", ("a", "b")), None]),
    "nothing else": by_row([1, 2, 3, 4]),
}


@pytest.mark.parametrize("name", REWARDS)
def test_scores_of_two_processes_are_those_of_one(name, monkeypatch):
    def work():
        return scored(REWARDS[name], weights={"a": 1.0, "b": 2.0})

    alone = work()
    for found in Threads(2, monkeypatch).run(work):
        assert found.reasons == alone.reasons
        assert [*found.metrics] == [*alone.metrics]
        for key, value in alone.metrics.items():
            np.testing.assert_array_equal(found.metrics[key], value, key)
        one, all_ = (jax.tree.leaves_with_path(x.rollout) for x in (alone, found))
        assert str(jax.tree.structure(found.rollout)) == str(jax.tree.structure(alone.rollout))
        for (path, value), (_, other) in zip(one, all_, strict=True):
            np.testing.assert_array_equal(other, value, str(path))


def test_parts_that_one_process_has_are_counted_over_their_rows(monkeypatch):
    for found in Threads(2, monkeypatch).run(lambda: scored(REWARDS["of two names"])):
        metrics = {key: float(value) for key, value in found.metrics.items()}
        assert (metrics["reward/good"], metrics["reward/rows/good"]) == (1.5, 2)
        assert (metrics["reward/bad"], metrics["reward/rows/bad"]) == (5.5, 2)
    for found in Threads(2, monkeypatch).run(
        lambda: scored(REWARDS["scores at tokens in the second"])
    ):
        rows = found.rollout.rewards.tolist()
        assert rows == [[0, 1, 0, 0, 0], [0, 0, 2, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 4]]


def test_scores_in_another_order_than_their_rows_are_refused(monkeypatch):
    turned = lambda tree: jax.tree.map(lambda x: x[::-1], tree)  # noqa: E731
    monkeypatch.setattr(processes, "gather_rows", turned)
    with pytest.raises(TrainingFault, match="order of their rows"):
        scored(by_row([1.0, 2.0, 3.0, 4.0]))


def test_an_error_of_a_reward_in_one_process_ends_all(monkeypatch):
    threads = Threads(2, monkeypatch)

    def reward(rollout, columns):
        return ["good"] * len(rollout.tokens) if threads.own.number else [1.0] * 2, {}

    def work():
        with pytest.raises(UserError, match="expected a number or None") as caught:
            scored(reward)
        return str(caught.value)

    assert len({*threads.run(work)}) == 1


def test_a_reward_that_is_cut_over_processes_scores_the_rows_of_all_at_once(monkeypatch):
    """Each would bring other rows to a program of all: their parts would become one score."""
    shapes = []

    def lengths(weight, rollout):
        shapes.append(rollout.tokens.shape)
        return weight * jnp.sum(rollout.response_mask, axis=1), {}

    with monkeypatch.context() as patch:
        patch.setattr(ArrayImpl, "is_fully_addressable", False)
        cut = spec.as_host(spec.Reward(fn=Partial(lengths, jnp.float32(2))))
    for found in Threads(2, monkeypatch).run(lambda: scored(cut)):
        assert found.rollout.scores.tolist() == [2, 4, 6, 8]
    assert {*shapes} == {(B, T)}


def test_each_process_filters_its_own_rows(monkeypatch):
    """A classifier may answer each process differently; all must drop the same rows."""
    threads = Threads(2, monkeypatch)
    asked = []

    def classifier(rollout, columns):
        asked.append(threads.own.number)
        scores = [0.0] * len(rollout.tokens)
        scores[threads.own.number] = 2.0
        return scores, {}

    tokenizer = SimpleNamespace(decode=lambda ids: "x" * len(ids))
    safety = Safety(classifier="any", above=1.0, responses="mask")
    guard = filters.Guard(safety, filters.Filter(), tokenizer, classifier).enforce
    for found in threads.run(lambda: scored(REWARDS["nothing else"], guard)):
        assert np.asarray(found.rollout.present).tolist() == [False, True, True, False]
        assert found.metrics["safety/unsafe"] == 0.5
        is_unsafe = {"classifier": "score 2 above 1"}
        assert found.verdicts == [is_unsafe, {}, {}, is_unsafe]
    assert sorted(asked) == [0, 1]


# --- What is compared before the first step


def facts_of(config, name="vpg", fingerprints=(("data.json", "1" * 64),), given=()):
    """What a process of this run tells the others."""
    told = []

    def gather(work):
        found = json.loads(json.dumps(work()))
        if found is not None:
            told.append(found)
            raise UserError("enough")
        return [None]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "gather", gather)
        patch.setattr(folder, "check_usable", lambda *args, **how: None)
        with (
            pytest.raises(UserError, match="enough"),
            opening.open_run(config, name, dict(fingerprints), given=dict(given)),
        ):
            pass
    return told[0]


def compared(config, facts, monkeypatch):
    """Opens the run of the first process beside others that told these facts."""

    def gather(work):
        found = work()
        return [found] if found is None else json.loads(json.dumps([found, *facts]))

    monkeypatch.setattr(processes, "gather", gather)
    monkeypatch.setattr(folder, "open_run", lambda *args, **how: pytest.fail("it took the folder"))
    with opening.open_run(config, "vpg", {"data.json": "1" * 64}):
        pass


@pytest.fixture
def config(tmp_path):
    return RunConfig(output_dir=str(tmp_path / "run"), tokenizer=Tokenizer(kind="characters"))


RL = RLStage()
OTHERS = {
    "seed": {"seed": 3},
    "reward": {"reward": ("length",)},
    "rl.num_iterations": {"rl": replace(RL, num_iterations=7)},
    "rl.batch_size": {"rl": replace(RL, batch_size=8)},
    "rl.optimizer.learning_rate": {
        "rl": replace(RL, optimizer=replace(RL.optimizer, learning_rate=0.1))
    },
    "resume": {"resume": True},
    "overwrite": {"overwrite": True},
    "track": {"track": ("tensorboard",)},
}


@pytest.mark.parametrize("key", OTHERS)
def test_other_settings_of_a_process_are_named_with_both_values(key, config, monkeypatch):
    other = facts_of(replace(config, **OTHERS[key]))
    same = facts_of(config)
    values = [manifest.dotted(facts)[key] for facts in (same, other)]
    with pytest.raises(UserError) as caught:
        compared(config, [same, other], monkeypatch)
    first, second = map(repr, values)
    assert str(caught.value).endswith(f": {key} is {first} in process 0 and {second} in process 2")
    assert not Path(config.output_dir).exists()


def test_what_else_the_processes_of_a_run_compare(config, tmp_path, monkeypatch):
    """Data, models, given objects, versions, revision, devices and the stage."""
    same = facts_of(config)
    models = [tmp_path / name for name in "ab"]
    for model in models:
        model.mkdir()
        (model / "weights").write_text("1")
    facts = [facts_of(replace(config, model=str(model))) for model in models]
    assert facts[0] == facts[1]  # the same model in another place
    (models[1] / "weights").write_text("2")
    other_model = facts_of(replace(config, model=str(models[1])))
    assert facts[0] != other_model
    monkeypatch.setattr(manifest, "_git_state", lambda: {"commit": "c0ffee", "modified": False})
    revision = facts_of(config)
    monkeypatch.undo()
    monkeypatch.setattr(jax, "local_device_count", lambda: 3)
    more_devices = facts_of(config)
    monkeypatch.undo()
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    flags = facts_of(config)
    monkeypatch.undo()
    for word, other in {
        "sha256.model": other_model,
        " model": facts_of(replace(config, model="another/name")),  # which no host has as a folder
        "sha256.data.json": facts_of(config, fingerprints={"data.json": "2" * 64}.items()),
        "given.optimizer": facts_of(config, given={"optimizer": 3}.items()),
        "stage": facts_of(config, "sft"),
        "versions.jax": same | {"versions": same["versions"] | {"jax": "0.1"}},
        "git": revision,
        "xla_flags": flags,
        "devices of a process": more_devices,
    }.items():
        with pytest.raises(UserError, match=f"{word}.* in process 0 and .* in process 1"):
            compared(config, [other], monkeypatch)


@pytest.mark.parametrize("revision", [None, {"commit": "c0ffee", "modified": False}])
def test_processes_may_see_a_run_at_other_places_and_have_other_cpus(revision, config, monkeypatch):
    """And a host may have no git."""
    own = None if revision else {"commit": "c0ffee", "modified": False}
    monkeypatch.setattr(manifest, "_git_state", lambda: own)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "_git_state", lambda: revision)
        patch.setattr(devices, "cpu", lambda: "another")
        patch.setattr(devices, "num_threads", lambda: 99)
        other = facts_of(replace(config, output_dir="elsewhere", processes="h:1,2,1"))
    with pytest.raises(pytest.fail.Exception, match="took the folder"):  # they agree
        compared(config, [other], monkeypatch)


@pytest.mark.parametrize("count", [1, 2])
def test_each_process_reads_its_models_once(count, config, monkeypatch):
    """And not for a folder that is used, because they are large."""
    read = []
    whole = opening.fingerprints_of
    monkeypatch.setattr(opening, "fingerprints_of", lambda *a: read.append(a) or whole(*a))
    threads = Threads(count, monkeypatch)
    entered = threading.Barrier(count, timeout=20)

    def work():
        with opening.open_run(config, "vpg", {}):
            entered.wait()
            return len(read)

    assert threads.run(work) == [count] * count
    with pytest.raises(UserError, match="holds files"):
        threads.run(work)
    assert len(read) == count


def test_a_report_of_a_lost_process_never_comes(monkeypatch):
    """Before a run has its folder too: a sentence, not a traceback."""

    def gone(key, value_or_time):
        raise jax.errors.JaxRuntimeError("UNAVAILABLE: Socket closed")

    def given(key, value):
        pass

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for of_set in (given, gone):
        store = SimpleNamespace(key_value_set=of_set, blocking_key_value_get=gone)
        monkeypatch.setattr(processes, "_store", lambda store=store: store)
        with pytest.raises(TrainingFault, match="another process has gone"):
            processes.gather(lambda: 1)


# --- The run folder


@pytest.mark.parametrize("before", ["nothing", "another run", "the same settings"])
def test_a_folder_that_only_the_first_process_sees(before, config, tmp_path, monkeypatch):
    """Another host may hold the folder of an earlier run at this path."""
    own = tmp_path / "own1"
    if before != "nothing":
        seed = 0 if before == "the same settings" else 3
        with opening.open_run(replace(config, output_dir=str(own), seed=seed), "vpg", {}):
            monkeypatch.setattr(sys, "argv", ["an earlier command"])
    monkeypatch.setattr(opening, "SEEN_SECONDS", 0.2)
    threads = Threads(2, monkeypatch)

    def work():
        place = tmp_path / f"own{threads.own.number}"
        try:
            with opening.open_run(replace(config, output_dir=str(place)), "vpg", {}):
                return "seen"
        except UserError as error:
            return str(error)

    for text in threads.run(work):
        assert "own1: all need to see the run folder of the first" in text
    assert not (tmp_path / "own0" / "manifest.json").exists()  # the next command needs it free


def test_a_folder_that_is_seen_a_little_later(tmp_path):
    run = folder.Run(tmp_path, False)
    threading.Timer(0.1, run.manifest.write_text, ["half"]).start()
    threading.Timer(0.3, run.manifest.write_text, ["whole"]).start()
    opening._see(run, hashlib.sha256(b"whole").hexdigest())
    assert run.manifest.read_text() == "whole"


# --- Real processes

REWARD = """
import jax

def parts(prompts, responses, completion_ids):
    if jax.process_index() == 0:
        return [1.0] * len(prompts), {"good": [1.0] * len(prompts)}
    return [[0.5] * len(ids) for ids in completion_ids], {"bad": [2.0] * len(prompts)}
"""
# Each of two processes: runs that are refused before the first step, and one that is not.
IN_PROCESSES = """
import sys
from rlhf_jax import config, errors, training
from rlhf_jax.algorithms import vpg
from rlhf_jax.training.common import opening
tiny, place, reward = sys.argv[1], sys.argv[-1], sys.argv[2]
opening.SEEN_SECONDS = 1
own = int(place[-1])

for name, *flags in (
    ("rate", *["--rl.optimizer.learning-rate", "0.1"] * own),
    ("batch", *["--rl.batch-size", "16"] * own),
    ("iterations", *["--rl.num-iterations", "3"] * own),
    ("seed", *["--seed", "3"] * own),
    ("folder", "--output-dir", f"{reward}.{own}"),
    ("parts", "--reward", f"{reward}:parts"),
):
    flags = ["--output-dir", f"{reward}s", "--rl.num-iterations", "2", *flags]
    flags = ["--config", tiny, "--rl.batch-size", "8", "--rl.max-new-tokens", "6", *flags]
    flags = [*flags, "--network.num-layers", "1", "--rl.validation-interval", "100"]
    try:
        training.rl.run(config.parse(config.RunConfig, [*flags, "--processes", place]), vpg)
    except errors.UserError as error:
        print(f"{name}: {error}", file=sys.stderr, flush=True)
"""


@pytest.mark.slow
def test_two_processes_that_differ(tmp_path):
    file = tmp_path / "reward.py"
    file.write_text(REWARD)
    running = launch([sys.executable, "-c", IN_PROCESSES, TINY, file], 2, 1, [])
    said = [process.communicate(timeout=600)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    for text in said:
        for line in (
            r"rate: .*rl\.optimizer\.learning_rate is 0\.001 in process 0 and 0\.1 in process 1",
            r"batch: .*rl\.batch_size is 8 in process 0 and 16 in process 1",
            r"iterations: .*rl\.num_iterations is 2 in process 0 and 3 in process 1",
            r"seed: .*seed is 0 in process 0 and 3 in process 1",
            r"folder: .*reward\.py\.1: all need to see the run folder",
        ):
            assert re.search(f"^{line}", text, re.MULTILINE), (line, text)
        assert "parts:" not in text
    assert not (tmp_path / "reward.py.0" / "metrics.jsonl").exists()
    last = metric_rows(tmp_path / "reward.pys")[-1]
    parts = {key: value for key, value in last.items() if key.startswith("reward/parts/")}
    assert parts == {"reward/parts/good": 1.0, "reward/parts/bad": 2.0}
