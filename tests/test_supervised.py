"""What SFT, reward models, DPO and KTO share: which rows train and which validate, and beside what
they are judged."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import UNASKED, initial_params, metric_rows, slow
from numpy.testing import assert_array_equal

from rlhf_jax import TrainState, dpo, kto, models, training, vpg
from rlhf_jax.config import (
    DPOStage,
    KTOStage,
    Optimizer,
    RewardModelStage,
    RLStage,
    RunConfig,
    SFTStage,
    Text,
    data_source,
    model_source,
)
from rlhf_jax.data import batches, tokenizers
from rlhf_jax.data.rows import places
from rlhf_jax.errors import TrainingFault, UserError
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.runs import folder as folders
from rlhf_jax.runs.checkpoint import Checkpoints
from rlhf_jax.training.common import initial, memory
from rlhf_jax.training.common.initial import Trainable
from rlhf_jax.training.common.opening import OpenRun, stream_key
from rlhf_jax.training.common.progress import PAUSE, Progress, Validation
from rlhf_jax.training.supervised import ensembles, policies, reading, reward_model
from rlhf_jax.training.supervised import run as supervised
from rlhf_jax.training.supervised.job import Learner
from rlhf_jax.types import Comparisons, PolicyOutput

STAGES = ("sft", "reward_model", "dpo", "kto")


class Seen(Exception):
    """Ends a run, and has what a test looks at, such as its job."""


def stop(*seen):
    raise Seen(*seen)


def write(path, *pairs):
    """Rows that every stage reads: (prompt, chosen, rejected). Returns the data's names."""
    keys = ("prompt", "chosen", "rejected")
    path.write_text(json.dumps([dict(zip(keys, pair, strict=True)) for pair in pairs]))
    return (str(path),)


LETTERS = "abcdfghijklmpqrt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of characters with random weights: to load it takes less than to draw it."""
    tokenizer = tokenizers.characters([LETTERS, "yes no\n"])
    ids = {"pad_token_id": tokenizer.pad_id, "eos_token_id": tokenizer.eos_id}
    model = models.build(models.GPT2Config(tokenizer.vocab_size, 16, 8, 1, 1, **ids))
    path = tmp_path_factory.mktemp("model")
    begun = LanguageModel(model, initial_params(model), tokenizer)
    begun.save(path, template="{prompt}", config=None)
    return str(path)


@pytest.fixture
def config(folder, tmp_path):
    """A network that fits in a moment; 16 prompts with two rows each."""
    stage = {
        "batch_size": 8,
        "num_epochs": 4,
        "optimizer": Optimizer(learning_rate=3e-2),
        "validation_fraction": 0.25,
        "validation_interval": 100,
    }
    answers = (("yes", "no"), ("yes yes", "no"))
    pairs = [(letter, *answer) for letter in LETTERS for answer in answers]
    return RunConfig(
        data=write(tmp_path / "rows.json", *pairs),
        output_dir=str(tmp_path / "run"),
        checkpoint_interval=1000,
        model=folder,
        text=Text(bucket_multiple=16),
        sft=SFTStage(**stage, **UNASKED),
        reward_model=RewardModelStage(**stage, normalize_samples=0),
        dpo=DPOStage(**stage, **UNASKED),
        kto=KTOStage(**stage, **UNASKED),
    )


def changed(config, stage, **changes):
    return replace(config, **{stage: replace(getattr(config, stage), **changes)})


def with_validation_data(config, stage, tmp_path, *pairs):
    return changed(config, stage, validation_data=write(tmp_path / "validation.json", *pairs))


def job_of(config, stage, prepare=stop):
    """What a run of the stage would prepare its task from, or what ``prepare`` stops with."""
    task = replace(getattr(training, stage).TASK, prepare=prepare)
    with pytest.raises(Seen) as seen:
        supervised.run(config, task)
    return seen.value.args[0]


def read(config, stage):
    """The rows of a run: as they were read, as token ids, and the numbers of two parts of them."""
    begun = LanguageModel.load(config.model)
    task = getattr(training, stage).TASK
    settings = getattr(config, stage)
    parts, _ = initial.stage_data(config.data, settings, None, None)
    data, to_validate = reading.read(data_source(config), task, settings, parts)
    source = model_source(config)
    encoded, train_rows, held_out = reading.encoded_rows(
        source, task, settings, begun, data, to_validate, jax.random.key(1)
    )
    parts = {"train_rows": train_rows, "held_out": held_out}
    return SimpleNamespace(rows=data.rows, encoded=encoded, **parts)


@pytest.mark.parametrize("stage", STAGES)
def test_rows_with_equal_prompts_stay_together(stage, config, capsys):
    found = read(config, stage)
    prompt_of = {row.source: row.prompt for row in found.rows}
    prompts = [prompt_of[source] for source in found.encoded.sources]
    train = [prompts[row] for row in found.train_rows]
    held_out = [prompts[row] for row in found.held_out]
    assert not set(train) & set(held_out)
    assert (len(set(train)), len(set(held_out))) == (12, 4)
    kind = getattr(training, stage).TASK.kind
    assert f"{kind}: {len(held_out)} rows of 4 prompts held out\n" in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["reward_model", "dpo"])
def test_margins_are_of_reward_models_alone(stage, config, tmp_path, capsys):
    """DPO refuses them in a batch; its data may have them, which a line says are not read."""
    rows = [{"prompt": c, "chosen": "yes", "rejected": "no", "margin": 2.0} for c in LETTERS]
    (tmp_path / "margins.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = read(replace(config, data=(str(tmp_path / "margins.jsonl"),)), stage)
    batch = batches.comparison_batch(found.encoded, found.train_rows)
    assert (batch.margin is None) == (stage == "dpo")
    assert ("margin" in capsys.readouterr().out) == (stage == "dpo")


@pytest.mark.parametrize("stage", STAGES)
def test_validation_data_validates_and_all_other_rows_train(stage, config, tmp_path, capsys):
    config = with_validation_data(config, stage, tmp_path, ("a", "s", "o"), ("e", "s", "o"))
    found = read(config, stage)
    sources = [found.encoded.sources[row] for row in found.held_out]
    names = {source.rpartition("/")[2] for source in sources}
    assert names == {"validation.json, row 1", "validation.json, row 2"}
    assert len(found.train_rows) + len(found.held_out) == len(found.encoded)
    assert {row.source.rpartition("/")[2][:9] for row in found.rows} == {"rows.json"}
    said = capsys.readouterr().out
    assert "rows of 2 prompts held out, 1 of which are trained on too\n" in said


def test_too_long_acts_at_the_longest_text(config, capsys):
    """A prompt of one character, an answer of 7, 3 or 2 and EOS: 16 of the texts have 9 tokens."""
    with pytest.raises(UserError, match=r"max_length 6; shorten"):
        read(replace(config, text=Text(max_length=6)), "kto")
    job = job_of(replace(config, text=Text(max_length=6, too_long="drop")), "kto")
    assert len(job.encoded) == 48
    assert set(job.encoded.lengths.max(axis=1)) <= {4, 5}
    assert job.batch(job.step_rows(1)).tokens.shape[-1] == 6  # not the bucket's 16
    assert "0 bad, 16 too long" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"text\.max_length 17: the model reads 16 tokens"):
        read(replace(config, text=Text(max_length=17)), "kto")


def test_a_sample_of_the_rows_and_a_length_in_steps(config, monkeypatch, capsys):
    stage = "kto"
    limited = changed(config, stage, max_rows=20, max_steps=7, batch_size=4)
    counted = []
    monkeypatch.setattr(
        supervised, "make_optimizer", lambda _, num_steps: counted.append(num_steps)
    )
    job = job_of(limited, stage)
    assert counted == [job.num_steps] == [7]
    places = [row.source for row in job.rows]
    assert len(set(places)) == 20  # KTO's two answers of a pair stay together
    every = [row.source for row in read(config, stage).rows]
    assert places == [source for source in every if source in places]  # in the file's order
    assert f"{stage}.max_rows: 20 of 32 rows are used\n" in capsys.readouterr().out
    assert [row.source for row in read(replace(limited, seed=1), stage).rows] != places


def test_a_file_cannot_both_train_and_validate(config):
    config = changed(config, "dpo", validation_data=config.data)
    with pytest.raises(UserError, match=r"dpo\.validation_data: .*, which is trained on; give"):
        training.dpo.run(config)


def test_validation_data_has_the_labels_of_the_training(config, tmp_path):
    path = tmp_path / "targets.json"
    path.write_text(json.dumps([{"prompt": "a", "responses": ["x", "y"], "targets": [1, 0]}]))
    config = changed(config, "reward_model", validation_data=(str(path),))
    with pytest.raises(UserError, match=r"has no targets but .* has; train on one kind"):
        training.reward_model.run(config)


def texts_of(arrays, masks):
    tokens = np.asarray(arrays).reshape(-1, arrays.shape[-1])
    present = np.asarray(masks).reshape(tokens.shape) != 0
    return [tuple(row[here]) for row, here in zip(tokens, present, strict=True) if here.any()]


@pytest.fixture
def counted(monkeypatch):
    """A run of a stage whose weight counts its updates: its job, (weight before, batch, key) of
    each update, and the batch for which its memory was checked. Update number ``bad`` is not
    finite.
    """

    def run(config, stage, *, bad=None, on_step=None):
        jobs, updates, checked = [], [], []

        def update(state, batch, key):
            updates.append((int(state.params["n"]), batch, key))
            params = {"n": state.params["n"] + 1}
            return state.replace(params=params), {"nonfinite": float(params["n"]) == bad}

        def prepare(job):
            jobs.append(job)
            start = Trainable({"n": jnp.float32(0)})
            return Learner(start, TrainState.create, update, stop, stop)

        def validate(job, learner, state):
            return Validation({"validation/n": float(state.params["n"])})

        def finish(job, learner, state):
            raise Seen(int(state.params["n"]))

        task = getattr(training, stage).TASK
        task = replace(task, prepare=prepare, validate=validate, finish=finish)
        monkeypatch.setattr(memory, "check", lambda phase, update, *given: checked.append(given[1]))
        with pytest.raises((Seen, TrainingFault)) as ended:
            supervised.run(config, task, on_step)
        return SimpleNamespace(job=jobs[0], updates=updates, checked=checked, end=ended.value)

    return run


def tokens_of(batch):
    return np.asarray(batch.tokens)


@pytest.mark.parametrize("stage", ["sft", "dpo", "kto"])
def test_an_epoch_trains_on_every_training_row_once(stage, config, counted):
    """What the update gets: neither one batch again and again, nor a row that validates."""
    apart = replace(config, compute=replace(config.compute, share_prompts=False))
    apart = replace(apart, text=Text(bucket_multiple=1))  # batches of several widths
    found = counted(changed(apart, stage, num_epochs=2), stage)
    job = found.job
    answers = [texts[row] for texts in job.encoded.tokens for row in job.train_rows]
    wanted = sorted(map(tuple, answers))
    assert not {*job.train_rows} & {*job.held_out}
    steps = [batch for _, batch, _ in found.updates]
    half = len(steps) // 2
    for epoch in (steps[:half], steps[half:]):
        seen = [text for batch in epoch for text in texts_of(batch.tokens, batch.attention_mask)]
        assert sorted(seen) == wanted
    first = [tokens_of(batch).tobytes() for batch in steps]
    assert first[:half] != first[half:]
    [largest] = found.checked
    sizes = [batch.tokens.size for batch in steps]
    assert largest.tokens.size == max(sizes) > min(sizes)


def test_a_step_takes_the_state_its_key_and_its_row(config, counted):
    """The weight counts the updates: its row of metrics, its validation and its checkpoint are of
    the state after a step, and so is what ``on_step`` gets.
    """
    asked = []
    config = changed(config, "sft", num_epochs=2, validation_interval=2)
    found = counted(
        config, "sft", on_step=lambda step, state, row: asked.append((step, int(state.params["n"])))
    )
    steps = range(1, found.job.num_steps + 1)
    assert [number for number, _, _ in found.updates] == [step - 1 for step in steps]
    key = stream_key(config.seed, "sft", "update")
    for step, (_, _, used) in zip(steps, found.updates, strict=True):
        assert used == jax.random.fold_in(key, step - 1)
    assert asked == [(step, step) for step in steps]
    assert found.end.args == (len(steps),)
    assert {"trained parameters", "optimizer state", "gradients"} <= found.job.run.held.keys()
    rows = metric_rows(config.output_dir)
    assert [row["step"] for row in rows] == [0, *steps]
    validated = {row["step"]: row["validation/n"] for row in rows if "validation/n" in row}
    assert validated == {step: step for step in {0, *steps} if step % 2 == 0 or step == len(steps)}
    path = Path(config.output_dir) / "checkpoints"
    with Checkpoints(path) as checkpoints:
        saved = {step: checkpoints.arrays(step)["params/n"] for step in folders.steps(path)}
    assert saved == {0: 0.0, len(steps): len(steps)}


def test_a_stopped_run_goes_on_with_the_batches_and_keys_that_are_left(config, counted):
    whole = counted(changed(config, "dpo", num_epochs=2), "dpo")
    part = replace(changed(config, "dpo", num_epochs=2), overwrite=True)
    first = counted(part, "dpo", on_step=lambda step, state, row: PAUSE if step == 2 else None)
    rest = counted(replace(part, overwrite=False, resume=True), "dpo")
    assert [number for number, _, _ in rest.updates] == [*range(2, whole.job.num_steps)]
    for one, other in zip(whole.updates, first.updates + rest.updates, strict=True):
        assert_array_equal(tokens_of(one[1]), tokens_of(other[1]))
        assert one[2] == other[2]


def test_an_update_that_is_not_finite_names_the_rows_of_its_batch(config, counted):
    """Although the next batch is drawn before the host looks at the update."""
    found = counted(changed(config, "kto", num_epochs=2), "kto", bad=3)
    rows = sorted({*found.job.sources(found.job.step_rows(3))})
    assert "at step 3; the update was not applied" in str(found.end)
    assert str(found.end).endswith(f"rows of this batch: {places(rows, most=len(rows))}")
    assert places(rows, most=9) != places(sorted(found.job.sources(found.job.step_rows(4))), most=9)


# Rows that prefer the other answer: what is right on the training rows is wrong on them.
OPPOSITE = [(letter, "no", "yes") for letter in "abcdfghi"]


@pytest.mark.parametrize(
    ("stage", "good", "bad"),
    [("dpo", "chosen", "rejected"), slow("kto", "desirable", "undesirable")],
)
def test_a_policy_is_validated_on_the_rows_that_are_held_out_against_its_start(
    stage, good, bad, config, tmp_path, monkeypatch
):
    """By a state that has come to say no, which is right on these rows alone. A policy measured
    against itself has log-ratios of 0 whatever it has learned; so would one that learns.
    """

    def update(state, batch, key, **how):
        return state, {"reference": batch.ref_log_probs}

    monkeypatch.setattr({"dpo": dpo, "kto": kto}[stage], "update", update)

    def validated(job):
        task = getattr(training, stage).TASK
        learner = task.prepare(job)
        state = supervised.first_state(job, learner)
        params = state.params
        embedding = np.asarray(params["wte"]["embedding"])
        tokenizer = job.language_model.tokenizer
        no = embedding[[*tokenizer.encode("no"), tokenizer.eos_id]]
        to_no = no.sum(axis=0) - embedding[tokenizer.encode("yes")].sum(axis=0)
        said = params["ln_f"] | {"bias": jnp.asarray(20 * to_no / (to_no @ to_no))}
        moved = state.replace(params=params | {"ln_f": said})
        found = task.validate(job, learner, moved).metrics
        batch = job.run.layout.shard(job.batch(job.step_rows(1)))
        references = [
            learner.update(jax.tree.map(jnp.copy, begun), batch, jax.random.key(0))[1]["reference"]
            for begun in (state, moved)
        ]
        assert_array_equal(*references)
        stop(found)

    config = with_validation_data(config, stage, tmp_path, *OPPOSITE)
    found = job_of(config, stage, validated)
    assert stage == "kto" or found["validation/accuracy"] > 0.9  # KTO's is beside its own point
    assert found["validation/length_accuracy"] < 0.5  # "no" is shorter
    margin = found[f"validation/{good}_log_ratio"] - found[f"validation/{bad}_log_ratio"]
    assert margin > 1.0
    assert found["validation/log_ratio_margin"] == pytest.approx(margin)
    assert found["validation/moved"] >= margin / 2  # of both answers, |a - b| <= |a| + |b|
    assert found["validation/planned_steps"] == (16 if stage == "dpo" else 32)


def test_no_margin_where_all_answers_that_are_held_out_are_of_one_kind(config, tmp_path):
    def validated(job):
        learner = training.kto.TASK.prepare(job)
        stop(training.kto.TASK.validate(job, learner, supervised.first_state(job, learner)).metrics)

    good = [{"prompt": letter, "response": "no", "desirable": True} for letter in "abcdefgh"]
    (tmp_path / "good.json").write_text(json.dumps(good))
    config = changed(config, "kto", validation_data=(str(tmp_path / "good.json"),))
    found = job_of(config, "kto", validated)
    assert found["validation/moved"] == 0
    assert "validation/log_ratio_margin" not in found


def test_what_moved_is_the_mean_of_absolute_log_ratios():
    """The policy gives each token w, the reference has its own sums: 2w - 5, w - 5, and a missing
    answer, whose number does not count.
    """

    def policy_fn(params, tokens, attention_mask, key):
        return PolicyOutput(params["w"] * jnp.ones(tokens.shape), None)

    mask = jnp.array([[[1, 1], [0, 1]], [[0, 1], [0, 0]]])
    ones = jnp.ones_like(mask)
    reference = jnp.array([[5.0, 5.0], [8.0, 9.0]])
    pairs = Comparisons(ones, ones, mask, ref_log_probs=reference)
    found = policies.moved({"w": 6.0}, pairs, policy_fn)
    assert float(found.value) == pytest.approx((7 + 1 + 2) / 3)


def test_a_reward_model_has_moved_as_far_as_its_margins_since_the_first_validation():
    def samples(step, *margins):
        return [{"step": step, "score_chosen": m + 1.0, "score_rejected": 1.0} for m in margins]

    now = samples(9, 0.5, -1.0)
    assert reward_model.moved([], now) == 0
    assert reward_model.moved([*samples(0, 1.0, 1.0), *samples(3, 0.0, 0.0)], now) == 1.25


@pytest.mark.parametrize(
    ("warmup", "num_steps", "said"),
    [
        (0.1, 1, "the rate of the only step is 0"),
        (6, 3, "rises from 0 to 33%"),
        (3, 3, "rises from 0 to 67%"),
        (3, 4, ""),
        (0.5, 4, ""),
        (0, 1, ""),
    ],
)
def test_a_warm_up_that_the_run_does_not_leave_is_said(warmup, num_steps, said, capsys):
    optimizer = Optimizer(learning_rate=0.6, warmup_steps=warmup)
    initial.warn_of_warmup("sft", optimizer, num_steps)
    found = capsys.readouterr().out
    assert said in found
    assert bool(found) == bool(said)


def test_a_run_says_its_warm_up_and_counts_its_rows(config, tmp_path, capsys, monkeypatch):
    """Also in the copy by which --resume restores the manifest."""

    def counted(job):
        text = job.run.folder.manifest.read_text()
        copies = json.loads((job.run.folder.checkpoints / "start.json").read_text())["files"]
        assert copies["manifest.json"] == text
        stop(json.loads(text)["rows"])

    monkeypatch.setattr(OpenRun, "decide", lambda run, **sections: run)  # which writes copies too

    config = replace(config, text=replace(config.text, too_long="drop"))
    config = with_validation_data(config, "dpo", tmp_path, ("a", "s" * 40, "o"), ("e", "s", "o"))
    config = changed(config, "dpo", max_rows=20, optimizer=Optimizer(warmup_steps=99))
    found = job_of(config, "dpo", counted)
    assert found == {"read": 34, "dropped": {"too long": 1}, "cut": {}}
    assert "dpo.optimizer.warmup_steps 99" in capsys.readouterr().out


def test_sft_is_validated_in_nats_per_token_where_it_learns_from_sums(config):
    """A network with random weights finds all of its 20 or so characters about equally likely."""

    def validated(job):
        learner = training.sft.TASK.prepare(job)
        state = supervised.first_state(job, learner)
        found = training.sft.TASK.validate(job, learner, state).metrics
        stop((found["validation/loss"], job.language_model.tokenizer.vocab_size))

    loss, size = job_of(changed(config, "sft", aggregate="sum"), "sft", validated)
    assert loss == pytest.approx(np.log(size), rel=0.1)


def test_an_ensemble_trains_on_its_draws_and_validates_on_all_rows(config, tmp_path):
    """Three members, two answers: their mean is over the members. The rows that are held out have
    the shorter answer as the better one.
    """

    def prepared(job):
        learner = training.reward_model.TASK.prepare(job)
        state = supervised.first_state(job, learner)
        validation = training.reward_model.TASK.validate(job, learner, state)
        stop((job, ensembles.draw(job).encoded.weight, validation))

    config = with_validation_data(config, "reward_model", tmp_path, *OPPOSITE)
    config = changed(config, "reward_model", ensemble_size=3)
    job, weight, validation = job_of(config, "reward_model", prepared)
    assert job.encoded.weight.shape == (len(job.encoded),)
    assert weight.shape == (len(job.encoded), 3)
    assert_array_equal(weight[job.train_rows].sum(axis=0), len(job.train_rows))
    assert_array_equal(weight[job.held_out], 0)
    assert validation.metrics["validation/uncertainty"] > 0
    assert validation.metrics["validation/moved"] == 0
    assert validation.metrics["validation/planned_steps"] == job.num_steps
    texts = [(row["chosen"], row["rejected"]) for row in validation.samples]
    assert texts == [("no", "yes")] * len(OPPOSITE)
    assert validation.metrics["validation/length_accuracy"] < 0.5


def test_the_batches_of_an_ensemble_have_the_draws_of_its_members(config, counted):
    config = changed(config, "reward_model", ensemble_size=3, num_epochs=1)
    found = counted(config, "reward_model")
    drawn = ensembles.draw(found.job)
    for step, (_, batch, _) in enumerate(found.updates, start=1):
        assert_array_equal(batch.weight, drawn.batch(found.job.step_rows(step)).weight)
        assert batch.weight.shape[-1] == 3


def test_a_text_file_is_cut_into_pieces_that_are_not_framed(config, tmp_path, capsys):
    (tmp_path / "book.txt").write_text("a bc\n\nd e" * 40)
    text = Text(template="Human: {prompt}", bucket_multiple=16)
    config = replace(config, data=(str(tmp_path / "book.txt"),), text=text)
    found = read(config, "sft")
    lengths = found.encoded.lengths[:, 0]
    assert (len(lengths), set(lengths[:-1])) == (24, {16})  # 361 tokens by 15
    assert set(found.encoded.starts[:, 0]) == {1}
    assert (len(found.train_rows), len(found.held_out)) == (18, 6)
    said = capsys.readouterr().out
    assert "plain text of 360 tokens: cut into 24 pieces of up to 16 tokens\n" in said
    assert "24 pieces in, 0 bad, 0 too long, 18 train, 6 held out\n" in said


def test_rl_holds_out_whole_prompts_too(config, tmp_path, capsys, monkeypatch):
    prompts = [{"prompt": letter} for letter in "abcdfghi" for _ in range(2)]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    config = replace(
        config,
        data=(str(tmp_path / "prompts.json"),),
        reward=("count:a",),
        rl=RLStage(batch_size=8, max_new_tokens=2, validation_fraction=0.25),
    )
    monkeypatch.setattr(Progress, "__init__", lambda *_, **__: stop())
    with pytest.raises(Seen):
        training.rl.run(config, vpg)
    assert "prompts: 4 rows of 2 prompts held out\n" in capsys.readouterr().out


def test_kto_says_that_all_answers_are_of_one_kind_and_needs_two_rows(config, tmp_path, capsys):
    config = replace(config, data=(str(tmp_path / "feedback.json"),))

    def warned(liked):
        rows = [
            {"prompt": letter, "response": "yes", "desirable": letter in liked}
            for letter in "abcdfghi"
        ]
        (tmp_path / "feedback.json").write_text(json.dumps(rows))
        weights_of(config)
        return [line for line in capsys.readouterr().out.splitlines() if "warning: all" in line]

    assert "are desirable; " in " ".join(warned("abcdfghi"))
    assert "are undesirable; " in " ".join(warned(""))
    assert not warned("abcd")
    with pytest.raises(ValueError, match="batch_size must be at least 2"):
        KTOStage(batch_size=1)


@pytest.mark.parametrize(
    ("given", "counts", "expected"),
    [
        ({}, (300, 1200), (6.0, 1.0)),
        ({}, (1200, 300), (1.0, 1.0)),
        ({}, (10, 10), (1.5, 1.0)),
        ({}, (12, 10), (1.25, 1.0)),
        ({}, (3.0, 4.5), (2.25, 1.0)),
        ({"desirable_weight": 4.0}, (300, 1200), (4.0, 1.0)),
        ({"undesirable_weight": 0.0}, (300, 1200), (1.0, 0.0)),
        ({"desirable_weight": 1.0, "undesirable_weight": 1.0}, (300, 1200), (1.0, 1.0)),
        ({}, (0, 1200), (1.0, 1.0)),
        ({}, (1200, 0), (1.0, 1.0)),
    ],
)
def test_the_weights_of_kto_by_hand(given, counts, expected):
    """The most of the paper's eq. 9: desirable answers weigh 1.5 times as much in all, or more."""
    assert training.kto.weights(KTOStage(**given), *counts) == pytest.approx(expected)


def weights_of(config):
    """The settings of KTO for the rows of the data."""
    job = SimpleNamespace(settings=config.kto, **vars(read(config, "kto")))
    return training.kto.weighted(job)


def test_the_pairs_of_a_ranking_weigh_as_one_row(config, tmp_path):
    """Three pairs of a ranking are a third of a row each: one desirable row beside two."""
    ranked = {"prompt": "a", "responses": ["yes", "no", "yes no"], "ranking": [0, 1, 2]}
    bad = {"prompt": "a", "response": "no no", "desirable": False}
    (tmp_path / "rows.json").write_text(json.dumps([ranked, bad]))
    found = weights_of(changed(config, "kto", validation_fraction=0.0))
    assert (found.desirable_weight, found.undesirable_weight) == pytest.approx((3.0, 1.0))


@pytest.mark.parametrize(("weights", "expected"), [(None, 4.5), (1.0, 1.0)])
def test_kto_weighs_the_rows_that_it_trains_on(
    weights, expected, config, tmp_path, monkeypatch, capsys
):
    """Four of 16 are desirable, and all those that are held out."""
    rows = [
        {"prompt": letter, "response": "yes", "desirable": number < 4}
        for number, letter in enumerate(LETTERS)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "other.json").write_text(json.dumps([row | {"desirable": True} for row in rows]))
    given = {"desirable_weight": weights, "undesirable_weight": weights}
    given["validation_data"] = (str(tmp_path / "other.json"),)
    monkeypatch.setattr(kto, "update", lambda *_, config, **__: stop(config))
    with pytest.raises(Seen) as seen:
        training.kto.run(changed(config, "kto", **given))
    [of_update] = seen.value.args
    assert (of_update.desirable_weight, of_update.undesirable_weight) == (expected, 1.0)
    said = capsys.readouterr().out
    assert f"desirable_weight {expected:g} for 4 answers" in said
    assert "undesirable_weight 1 for 12\n" in said
    assert ("weigh 4 and undesirable ones 12" in said) == (weights == 1.0)


def test_experts_that_a_model_has_not_cannot_be_balanced(config):
    config = changed(config, "sft", router_aux_coef=0.1)
    with pytest.raises(UserError, match=r"sft\.router_aux_coef: the model has no experts"):
        job_of(config, "sft")
