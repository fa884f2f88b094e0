"""How the loop of a stage saves, ends and goes on, on a state of one number."""

import dataclasses
import errno
import json
import random
import signal
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml
from builders import Killed, finished_run, go_on, json_lines, metric_rows, run_loop, slow

from rlhf_jax.config import (
    Optimizer,
    RunConfig,
    Text,
    Tokenizer,
    for_algorithm,
    model_source,
    parse,
)
from rlhf_jax.data.rows import BadRow
from rlhf_jax.data.tokenizers import characters
from rlhf_jax.errors import ServiceError, Stopped, TrainingFault, UserError
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.runs import checkpoint, folder, keeping, manifest
from rlhf_jax.training.common import memory, opening, optimizer
from rlhf_jax.training.common.initial import Trainable
from rlhf_jax.training.common.opening import open_run
from rlhf_jax.training.common.progress import PAUSE, Progress
from rlhf_jax.training.common.saving import finish


def files(config: RunConfig) -> dict[str, bytes]:
    return {
        name: (Path(config.output_dir) / name).read_bytes()
        for name in ("metrics.jsonl", "samples.jsonl")
    }


@pytest.fixture
def config(tmp_path):
    return RunConfig(output_dir=str(tmp_path / "run"), checkpoint_interval=2)


RISING = [float(n) for n in range(7)]
LAST = {"loss": 2.5, "nonfinite": 0.0, "validation/score": 6.0}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The files of a run of RISING that nothing stopped."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    config = RunConfig(output_dir=str(folder), checkpoint_interval=2)
    assert run_loop(config, scores=RISING) == (6, LAST)
    return files(config)


@pytest.mark.parametrize("asynchronous", [slow(False), True])
def test_a_run_that_is_killed_goes_on_without_a_row_twice_or_missing(
    config, straight, asynchronous
):
    config = replace(config, checkpoint_async=asynchronous)
    for resume, die_at in ((False, 3), (True, 5)):
        with pytest.raises(Killed):
            run_loop(replace(config, resume=resume), die_at=die_at, scores=RISING)
    assert run_loop(replace(config, resume=True), scores=RISING) == (6, LAST)
    assert files(config) == straight
    assert checkpoint.steps(Path(config.output_dir) / "checkpoints") == [4, 6]


class Watched:
    """A scalar on a device: notes when it is read."""

    def __init__(self, events, step):
        self.events = events
        self.step = step

    def __array__(self, *args, **kwargs):
        if ("read", self.step) not in self.events:
            self.events.append(("read", self.step))
        return np.zeros(())

    def __float__(self):
        return float(self.__array__())


def test_a_step_starts_before_the_metrics_of_the_last_one_are_read(config):
    """The host waits where something depends on the step: checkpoints at 4 and at the end, here
    after 8.
    """
    events: list[tuple[str, int]] = []

    def advance(state, step):
        events.append(("start", step + 1))
        return state, {"nonfinite": Watched(events, step + 1)}

    def order(**changes):
        events.clear()
        with open_run(replace(config, **changes), "sft", {}) as run:
            state = run.layout.copy({"n": jnp.float32(0)})
            go_on(Progress(run, state, num_steps=8, validation_interval=3), advance)
        return [f"{what[0]}{step}" for what, step in events]

    ahead = "s1 s2 r1 s3 r2 s4 r3 r4 s5 s6 r5 s7 r6 s8 r7 r8"
    assert " ".join(order(checkpoint_interval=4)) == ahead
    each = [f"{what}{step}" for step in range(1, 9) for what in "sr"]
    assert order(checkpoint_interval=4, alerts=("nonfinite > 1: stop",), overwrite=True) == each


@pytest.mark.parametrize(
    ("end", "steps"),
    [(None, [0, 4]), (True, [0, 2]), (PAUSE, [0])],
    ids=["last", "ended", "paused"],
)
def test_without_validations_the_first_and_the_last_state_are_sampled(config, end, steps):
    def advance(state, step):
        return {"n": state["n"] + 1}, {"nonfinite": jnp.float32(0)}

    def sample(state):
        return [{"n": int(state["n"])}]

    with open_run(config, "sft", {}) as run:
        start = run.layout.copy({"n": jnp.float32(0)})
        progress = Progress(run, start, num_steps=4, validation_interval=1, sample=sample)
        go_on(progress, advance, on_step=lambda step, *_: end if step == 2 else None)
    rows = json_lines(Path(config.output_dir, "samples.jsonl"))
    assert rows == [{"step": step, "n": step} for step in steps]


@pytest.mark.parametrize("losses", [[1.0] * 6, [1.0] * 4 + [jnp.nan, 1.0]])
def test_a_run_that_fails_keeps_the_row_of_its_last_step(config, losses):
    config = replace(config, checkpoint_interval=100)
    with pytest.raises((Killed, TrainingFault)):
        run_loop(config, losses=losses, die_at=5)
    assert [row["step"] for row in metric_rows(config.output_dir)] == [*range(6)]


@pytest.mark.parametrize(
    "error",
    [
        ServiceError("mine.py:7"),
        ZeroDivisionError("mine.py:7"),
        BadRow("mine.py:7", "the chat template failed"),  # a reply of an environment
    ],
)
def test_a_step_that_fails_leaves_the_state_before_it(config, straight, error, caplog):
    def fail(state, step):
        if step == 3:
            raise error

    config = replace(config, checkpoint_interval=100)
    with pytest.raises(type(error), match=r"mine\.py:7") as caught:
        run_loop(config, before_step=fail, scores=RISING)
    said = f"{caught.value} {caplog.text}"
    assert "Step 3 of 6 is saved" in said
    assert "--resume" in said
    assert [row["step"] for row in metric_rows(config.output_dir)] == [0, 1, 2, 3]
    if isinstance(error, BadRow):
        run_loop(replace(config, resume=True), scores=RISING)
        assert files(config) == straight


def test_a_resumed_run_checks_its_largest_step_before_its_checkpoint_is_read(config, monkeypatch):
    """One that fits no more ends there; one that is finished has nothing to try."""
    with pytest.raises(Killed):
        run_loop(config, die_at=5)
    events = []
    restore = checkpoint.Checkpoints.restore
    noted = lambda *args: events.append("read") or restore(*args)  # noqa: E731
    monkeypatch.setattr(checkpoint.Checkpoints, "restore", noted)

    def attempt(fits):
        def check_memory(state):
            events.append("checked")
            if not fits:
                raise memory.TooLarge("too much")

        return run_loop(replace(config, resume=True), check_memory=check_memory)

    with pytest.raises(TrainingFault, match="out of memory before the first step: too much"):
        attempt(fits=False)
    assert events == ["checked"]
    assert attempt(fits=True)[0] == attempt(fits=False)[0] == 6
    assert events == ["checked", "checked", "read", "read"]


def test_a_checkpoint_says_where_it_comes_from(config):
    config = replace(config, seed=7)
    run_loop(config, num_steps=1)
    with checkpoint.Checkpoints(Path(config.output_dir) / "checkpoints") as checkpoints:
        _, meta = checkpoints.restore({"n": jnp.float32(0), "optimizer": None})
    assert meta["seed"] == 7
    assert meta["device"] == "4 x cpu"
    assert meta["config"]["checkpoint_interval"] == 2


def test_a_save_that_fails_leaves_the_former_model(config):
    def full(model, folder, **how):
        assert former.exists()
        raise OSError(errno.ENOSPC, "No space left on device")

    with open_run(config, "sft", {}) as run:
        former = run.folder.model / "former.txt"
        former.parent.mkdir()
        former.write_text("")
        begun = LanguageModel(None, {}, characters("a"))
        with pytest.raises(OSError, match="No space left"):
            finish(run, model_source(config), begun, Trainable({}), {"": {}}, {}, save=full)
    assert former.exists()


def test_step_0_is_on_disk_before_the_first_update(config):
    def look(state, step):
        assert (Path(config.output_dir) / "checkpoints" / "0" / "record" / "metadata").exists()

    run_loop(replace(config, checkpoint_async=True), num_steps=1, before_step=look)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), slow(signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_saves(config, straight, number, code):
    def interrupt(state, step):
        if step == 2:
            signal.raise_signal(number)

    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=r"after step 3 of 6(.|\n)*--resume") as stopped:
        run_loop(config, before_step=interrupt, scores=RISING)
    assert stopped.value.exit_code == code
    assert signal.getsignal(number) == before
    assert checkpoint.steps(Path(config.output_dir) / "checkpoints") == [2, 3]
    run_loop(replace(config, resume=True), scores=RISING)
    assert files(config) == straight


def test_stopped_means_saved(config, monkeypatch):
    """Ctrl-C while the disk is full: an asynchronous save has returned long before it fails."""

    def full(self, directory):
        raise OSError(errno.ENOSPC, "No space left on device")

    def interrupt(state, step):
        if step == 2:
            monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "finalize", full)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(
        TrainingFault, match=r"checkpoint of step 3 could not be written .*No space left"
    ):
        run_loop(
            replace(config, checkpoint_async=True, checkpoint_interval=10),
            before_step=interrupt,
        )


def test_an_update_that_is_not_finite_names_step_checkpoint_and_rows(config):
    def sources(step):
        places = (("b", 1), ("a", 2), ("b", 7), ("b", 1))
        return (f"{file}.json, line {line + step}" for file, line in places)

    config = replace(config, checkpoint_async=True)
    rows = r"rows of this batch: a\.json, line 6, b\.json, line 11, line 5$"
    message = rf"at step 5; .*checkpoint is step 4 in .*{rows}"
    with pytest.raises(TrainingFault, match=message):
        run_loop(config, losses=[1.0] * 4 + [jnp.nan], sources=sources)


def test_the_best_checkpoint_becomes_the_model(config, capsys):
    config = replace(config, keep_best="min:validation/score", keep_last=1, checkpoint_interval=100)
    config = replace(config, early_stopping_patience=3)  # by the same metric
    state, row = run_loop(config, scores=[3.0, 2.0, jnp.nan, 0.5, 2.0, 1.0, 0.75])
    assert state == 3
    assert row["validation/score"] == 0.5
    assert checkpoint.steps(Path(config.output_dir) / "checkpoints") == [3, 6]
    assert (
        "validation/score is best at step 3: 0.5; model/ is of that step" in capsys.readouterr().out
    )
    assert run_loop(replace(config, resume=True), scores=[3.0] * 7)[0] == 3
    assert "finished already" in capsys.readouterr().out


def test_a_run_that_on_step_ends_is_validated_and_the_best_is_among_what_was(config):
    """The untrained weights of step 0 would be the best of one validation."""
    config = replace(config, keep_best="max:validation/score", checkpoint_interval=100)
    rows = []

    def on_step(step, state, row):
        rows.append(row)
        return step == 3

    given = {"scores": [0.5, 0.0, 0.0, 0.9], "validation_interval": 100, "on_step": on_step}
    assert run_loop(config, **given) == (
        3,
        {"loss": 1.0, "nonfinite": 0.0, "validation/score": 0.9},
    )
    written = [row.get("validation/score") for row in metric_rows(config.output_dir)]
    assert written == [0.5, None, None, 0.9]
    assert [row["loss"] for row in rows] == [0.0, 0.5, 1.0]
    without = replace(config, keep_best=None, overwrite=True)
    assert run_loop(without, num_steps=3, on_step=lambda *step: True)[0] == 1  # nothing held out


def test_a_run_that_fails_in_on_step_keeps_the_row_of_its_last_step(config):
    def on_step(step, state, row):
        raise Killed

    with pytest.raises(Killed):
        run_loop(config, on_step=on_step)
    assert [row["step"] for row in metric_rows(config.output_dir)] == [0, 1]


@pytest.mark.parametrize(
    ("options", "scores", "message"),
    [
        (
            {"keep_best": "max:validation/loss"},
            [1.0],
            "no metric validation/loss; .* give .*/score",
        ),
        ({"keep_best": "max:validation/loss"}, None, "keep_best .*/loss: nothing is held out"),
        ({"early_stopping_patience": 2}, None, "schedule plateau: nothing is held out"),
    ],
)
def test_a_run_needs_the_metric_that_it_is_judged_by(config, options, scores, message):
    with pytest.raises(UserError, match=message):
        run_loop(replace(config, **options), scores=scores)


# Step 5 is the third validation in a row without improvement.
SCORES = [1.0, 2.0, 3.0, 2.5, 3.0, 2.0, 4.0]


def test_early_stopping_ends_a_run_and_says_so(config, tmp_path, capsys):
    config = replace(config, early_stopping_patience=3)
    assert run_loop(config, scores=SCORES)[0] == 5
    said = "ended early, after step 5 of 6: validation/score has not improved for 3 validations"
    assert said in capsys.readouterr().out
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")[-1] == 5
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again = replace(config, resume=True)
    assert run_loop(again, die_at=5, scores=SCORES)[0] == 5  # finished: no step is taken
    assert said in capsys.readouterr().out
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_killed_run_ends_at_the_same_step_and_lowers_alike(config, tmp_path, monkeypatch):
    """Killed between a checkpoint and the validation that ends the run: what was counted before is
    not forgotten.
    """
    monkeypatch.setattr(optimizer, "PLATEAU_PATIENCE", 2)
    options = {"scores": SCORES, "optimizer": Optimizer(1e-3, schedule="plateau")}
    config = replace(config, early_stopping_patience=3)
    straight = replace(config, output_dir=str(tmp_path / "straight"))
    assert run_loop(straight, **options)[0] == 5
    # Step 4 is the second validation without improvement.
    scales = [row.get("plateau_scale") for row in metric_rows(tmp_path / "straight")]
    assert scales == [None, 1, 1, 1, 1, pytest.approx(0.1)]
    with pytest.raises(Killed):
        run_loop(config, die_at=4, **options)
    assert run_loop(replace(config, resume=True), **options)[0] == 5
    assert files(config) == files(straight)


@pytest.mark.parametrize(
    ("interval", "scores", "last", "early"),
    [
        (2, [1.0, 0, 2.0, 0, 2.0, 0, 3.0], 4, True),
        (6, [1.0] * 7, 6, False),
    ],  # the last step ends the run anyway
)
def test_validations_count_and_not_steps(config, capsys, interval, scores, last, early):
    config = replace(config, early_stopping_patience=1)
    assert run_loop(config, scores=scores, validation_interval=interval)[0] == last
    assert ("ended early" in capsys.readouterr().out) == early


def test_a_run_goes_on_with_what_is_allowed_to_differ(config, capsys):
    assert run_loop(config, num_steps=1)[0] == 1
    longer = replace(config, resume=True, sft=replace(config.sft, num_epochs=2))
    with pytest.raises(UserError, match=r"sft\.num_epochs was 1 and is now 2"):
        run_loop(longer)
    longer = replace(longer, allow_changed=("sft.num-epochs",))
    assert run_loop(longer, num_steps=2)[0] == 2
    said = "the run continues with other settings or data: sft.num_epochs was 1 and is now 2"
    assert said in capsys.readouterr().out
    # From now on this is the run, so that neither its report nor its next resumption is of the old
    # one.
    stored = parse(RunConfig, ["--config", str(Path(config.output_dir) / "config.yaml")])
    chosen = replace(longer.compute, scan_layers=False)
    assert stored == replace(longer, resume=False, allow_changed=(), compute=chosen)
    with open_run(replace(longer, allow_changed=()), "sft", {}):
        pass


BARE = {"modified": False}
COMMIT = {"commit": "c0ffee" * 6, **BARE}


def test_a_run_of_an_older_version_is_refused_with_its_revision(config):
    options = Text(template_options={"thinking": True})
    run_loop(replace(config, text=options), num_steps=1)
    folder = Path(config.output_dir)
    file, record = folder / "config.yaml", folder / "manifest.json"
    text = file.read_text("utf-8")
    for place, more in (
        ("  offload:", "  matmul_precision: null\n"),
        ("  pack:", "  of: {rows: 2}\n"),
        ("sft:", "lessons: 3\nlectures: {number: 4}\n"),  # a setting of a script, and a section
    ):
        assert text.count(f"\n{place}") == 1
        text = text.replace(f"\n{place}", f"\n{more}{place}")
    file.write_text(text, "utf-8")
    facts = json.loads(record.read_text("utf-8"))
    record.write_text(json.dumps(facts | {"git": COMMIT}), "utf-8")
    (folder / keeping.START).unlink()
    with pytest.raises(UserError) as caught, open_run(replace(config, resume=True), "sft", {}):
        pass
    assert str(caught.value) == (
        f"--resume: {folder} is a run of revision {COMMIT['commit']}, with settings that are none "
        "here: compute.matmul_precision, text.of.rows, lectures.number. Go on with that version, "
        "or start a new run with another --output-dir"
    )
    wheel = "rlhf-jax 0.0.7"
    for git, version in ((COMMIT, f"revision {COMMIT['commit']}"), (None, wheel), (BARE, wheel)):
        record.write_text(json.dumps({"git": git, "versions": {"rlhf-jax": "0.0.7"}}), "utf-8")
        with pytest.raises(UserError) as caught:
            parse(RunConfig, ["--config", str(file)])
        *keys, last = str(caught.value).splitlines()
        assert "unknown key compute.matmul_precision; here it is deterministic" in keys[0]
        assert len(keys) == 4
        assert last == f"{file} is of a run of {version}, which reads it"


def test_the_restored_state_is_adopted_with_the_settings_that_it_was_saved_with(config):
    run_loop(config, num_steps=1)
    saved = []

    def adopt(state, settings):
        saved.append(settings["seed"])
        return state

    again = replace(config, resume=True, seed=7, allow_changed=("seed",))
    run_loop(again, num_steps=1, adopt=adopt)
    assert saved == [config.seed]


def test_every_setting_may_change_freely_or_with_permission_or_never(config, monkeypatch):
    """The three kinds are all settings. What never may is refused by name."""
    monkeypatch.setattr(manifest, "Settings", dict)  # each value is a text here
    settings = manifest.dotted(dataclasses.asdict(config))
    settings = {key: str(value) for key, value in settings.items()}
    fixed = opening.fixed(config)
    kinds = {"never": {}, "freely": {}, "with permission": {}}
    for key in settings:
        name = "freely" if manifest.within(key, opening.MAY_CHANGE) else "with permission"
        kinds["never" if manifest.within(key, fixed) else name][key] = f"not {settings[key]}"
    assert min(map(len, kinds.values())) > 10
    finished_run(Path(config.output_dir))
    with folder.open_run(config.output_dir, resume=True) as run:
        run.config.write_text(yaml.safe_dump(settings))
        for name, changes in kinds.items():
            allowed = [] if name == "freely" else [*changes]
            how = {"may_change": opening.MAY_CHANGE, "allowed": allowed, "fixed": fixed}
            text = yaml.safe_dump(settings | changes)
            if name == "never":
                with pytest.raises(UserError, match="cannot help with") as caught:
                    manifest.check_unchanged(run, config=text, data={}, **how)
                never = str(caught.value).rpartition("cannot help with ")[2].split(", ")
                assert set(never) == changes.keys()
                continue
            said = manifest.check_unchanged(run, config=text, data={}, **how)
            assert len(said) == (0 if name == "freely" else len(changes))


@dataclass(frozen=True)
class Critic:
    value: str = "separate"
    value_from: str = "policy"


@pytest.mark.parametrize("changed", [Critic("shared"), Critic(value_from="reward")])
def test_the_values_of_an_algorithm_of_ones_own_cannot_change(tmp_path, changed):
    own = SimpleNamespace(__name__="own", Config=Critic)
    config, _ = for_algorithm(RunConfig(output_dir=str(tmp_path)), own)
    with open_run(config, "own", {}) as run:
        (run.folder.checkpoints / "0").mkdir(parents=True)
    again, _ = for_algorithm(replace(config, resume=True, allow_changed=("own",)), own, changed)
    with (
        pytest.raises(UserError, match=r"cannot help with own\.value"),
        open_run(again, "own", {}),
    ):
        pass


@pytest.mark.parametrize("tokenizer", [None, "some/tokenizer"])
def test_other_data_is_allowed_where_the_tokens_stay_the_same(tmp_path, tokenizer):
    """A tokenizer that was trained on the data would be another one."""
    config = RunConfig(output_dir=str(tmp_path), tokenizer=Tokenizer(name=tokenizer))
    with open_run(config, "sft", {"a.json": "1"}) as run:
        (run.folder.checkpoints / "0").mkdir(parents=True)
    again = replace(config, resume=True, allow_changed=("data",))
    refused = pytest.raises(UserError, match="cannot help with data")
    with nullcontext() if tokenizer else refused, open_run(again, "sft", {"a.json": "2"}):
        pass


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            "orbax.checkpoint.PyTreeCheckpointHandler.async_save",
            r"checkpoint of step 4 .*No space left on device.* last good checkpoint is step 2",
        ),
        ("rlhf_jax.runs.log.RowWriter.write", "run: the disk is full"),
    ],
)
def test_a_full_disk_ends_the_run_with_a_sentence_and_the_run_goes_on(
    config, straight, monkeypatch, target, message
):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(TrainingFault, match=message):
        run_loop(
            config,
            before_step=lambda state, step: step == 3 and patch.setattr(target, full),
            scores=RISING,
        )
    run_loop(replace(config, resume=True), scores=RISING)
    assert files(config) == straight


def test_other_generators_are_seeded_by_the_seed_and_the_step(config):
    """What a reward in Python draws is the same in a run that goes on from a checkpoint."""
    drawn = []

    def draw(state, step):
        drawn.append((step, random.random(), np.random.random()))  # noqa: NPY002

    with pytest.raises(Killed):
        run_loop(config, num_steps=4, die_at=3, before_step=draw)
    run_loop(replace(config, resume=True), num_steps=4, before_step=draw)
    assert [step for step, *_ in drawn] == [0, 1, 2, 3, 2, 3]
    assert drawn[2:4] == drawn[4:]
    run_loop(replace(config, overwrite=True, seed=6), num_steps=1, before_step=draw)
    assert len({number for _, *pair in drawn for number in pair}) == 2 * 5
