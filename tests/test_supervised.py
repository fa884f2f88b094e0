"""What SFT, reward models, DPO and KTO share: which rows train and which validate, and beside what
they are judged."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import UNASKED, initial_params, slow
from numpy.testing import assert_array_equal

from rlhf_jax import dpo, kto, models, training, vpg
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
from rlhf_jax.data import tokenizers
from rlhf_jax.errors import UserError
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.training.common import loop
from rlhf_jax.training.supervised import entry, reading, tasks

STAGES = ("sft", "reward_model", "dpo", "kto")


class Seen(Exception):
    """Ends a run when its task is made, and has the task's setting."""


def stop(setting):
    raise Seen(setting)


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


def setting_of(config, stage, make_task=stop):
    """What a run of the stage would make its task from, or what ``make_task`` stops with."""
    spec = replace(getattr(training, stage).SPEC, make_task=make_task)
    with pytest.raises(Seen) as seen:
        entry.run(config, spec)
    return seen.value.args[0]


def read(config, stage):
    """The rows of a run: as they were read, as token ids, and the numbers of two parts of them."""
    begun = LanguageModel.load(config.model)
    spec = getattr(training, stage).SPEC
    settings = getattr(config, stage)
    data, to_validate = reading.read(data_source(config), spec, settings)
    source = model_source(config)
    encoded, train_rows, held_out = reading.encoded_rows(
        source, spec, settings, begun, data, to_validate, jax.random.key(1)
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
    kind = getattr(training, stage).SPEC.kind
    assert f"{kind}: {len(held_out)} rows of 4 prompts held out\n" in capsys.readouterr().out


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
    setting = setting_of(replace(config, text=Text(max_length=6, too_long="drop")), "kto")
    assert len(setting.encoded) == 48
    assert set(setting.encoded.lengths.max(axis=1)) <= {4, 5}
    assert setting.batch(setting.rows_of(0)).tokens.shape[-1] == 6  # not the bucket's 16
    assert "0 bad, 16 too long" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"text\.max_length 17: the model reads 16 tokens"):
        read(replace(config, text=Text(max_length=17)), "kto")


def test_a_sample_of_the_rows_and_a_length_in_steps(config, monkeypatch, capsys):
    stage = "kto"
    limited = changed(config, stage, max_rows=20, max_steps=7, batch_size=4)
    counted = []
    monkeypatch.setattr(entry, "make_optimizer", lambda _, num_steps: counted.append(num_steps))
    setting = setting_of(limited, stage)
    assert counted == [7]
    task = tasks.Task(setting, *[lambda *_: None] * 4)
    assert entry._job(getattr(training, stage).SPEC, task, None).num_steps == 7
    places = [row.source for row in setting.rows]
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


@pytest.mark.parametrize("stage", ["sft", "dpo", "kto"])
def test_an_epoch_trains_on_every_training_row_once(stage, config):
    """What the update gets: neither one batch again and again, nor a row that validates."""

    def make_task(setting):
        steps = []

        def update(state, batch, key):
            steps.append(batch)
            return state, {}

        task = tasks.Task(setting, None, None, update, None)
        job = entry._job(getattr(training, stage).SPEC, task, None)
        for step in range(job.num_steps):
            rows = setting.rows_of(step)
            assert job.sources(step) == [setting.encoded.sources[row] for row in rows]
            job.advance(None, step)
        stop((setting, steps))

    apart = replace(config, compute=replace(config.compute, share_prompts=False))
    setting, steps = setting_of(changed(apart, stage, num_epochs=2), stage, make_task)
    answers = [texts[row] for texts in setting.encoded.tokens for row in setting.train_rows]
    wanted = sorted(map(tuple, answers))
    half = len(steps) // 2
    for epoch in (steps[:half], steps[half:]):
        seen = [text for batch in epoch for text in texts_of(batch.tokens, batch.attention_mask)]
        assert sorted(seen) == wanted
    first = [np.asarray(batch.tokens).tobytes() for batch in steps]
    assert first[:half] != first[half:]


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

    def validated(setting):
        task = getattr(training, stage).SPEC.make_task(setting)
        state = entry.first_state(task)
        params = state.params
        embedding = np.asarray(params["wte"]["embedding"])
        tokenizer = setting.initial.tokenizer
        no = embedding[[*tokenizer.encode("no"), tokenizer.eos_id]]
        to_no = no.sum(axis=0) - embedding[tokenizer.encode("yes")].sum(axis=0)
        said = params["ln_f"] | {"bias": jnp.asarray(20 * to_no / (to_no @ to_no))}
        moved = state.replace(params=params | {"ln_f": said})
        found = task.validate(moved).metrics
        batch = setting.stage.shard(setting.batch(setting.rows_of(0)))
        references = [
            task.update(jax.tree.map(jnp.copy, begun), batch, jax.random.key(0))[1]["reference"]
            for begun in (state, moved)
        ]
        assert_array_equal(*references)
        stop(found)

    config = with_validation_data(config, stage, tmp_path, *OPPOSITE)
    found = setting_of(config, stage, validated)
    assert stage == "kto" or found["validation/accuracy"] > 0.9  # KTO's is beside its own point
    assert found["validation/length_accuracy"] < 0.5  # "no" is shorter
    assert found[f"validation/{good}_log_ratio"] - found[f"validation/{bad}_log_ratio"] > 1.0


def test_sft_is_validated_in_nats_per_token_where_it_learns_from_sums(config):
    """A network with random weights finds all of its 20 or so characters about equally likely."""

    def validated(setting):
        task = training.sft.SPEC.make_task(setting)
        found = task.validate(entry.first_state(task)).metrics
        stop((found["validation/loss"], setting.initial.tokenizer.vocab_size))

    loss, size = setting_of(changed(config, "sft", aggregate="sum"), "sft", validated)
    assert loss == pytest.approx(np.log(size), rel=0.1)


def test_an_ensemble_trains_on_its_draws_and_validates_on_all_rows(config, tmp_path):
    """Three members, two answers: their mean is over the members. The rows that are held out have
    the shorter answer as the better one.
    """

    def make_task(setting):
        task = training.reward_model.SPEC.make_task(setting)
        create = partial(task.create, optimizer=setting.optimizer)
        state = setting.stage.take(create, task.start.params)
        stop((setting, task.setting.encoded.weight, task.validate(state)))

    config = with_validation_data(config, "reward_model", tmp_path, *OPPOSITE)
    config = changed(config, "reward_model", ensemble_size=3)
    setting, weight, validation = setting_of(config, "reward_model", make_task)
    assert setting.encoded.weight.shape == (len(setting.encoded),)
    assert weight.shape == (len(setting.encoded), 3)
    assert_array_equal(weight[setting.train_rows].sum(axis=0), len(setting.train_rows))
    assert_array_equal(weight[setting.held_out], 0)
    assert validation.metrics["validation/uncertainty"] > 0
    texts = [(row["chosen"], row["rejected"]) for row in validation.samples]
    assert texts == [("no", "yes")] * len(OPPOSITE)
    assert validation.metrics["validation/length_accuracy"] < 0.5


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
    monkeypatch.setattr(loop, "train", lambda *_: stop(None))
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
        training.kto.SPEC.say(read(config, "kto"))
        return [line for line in capsys.readouterr().out.splitlines() if "warning: all" in line]

    assert "are desirable; " in " ".join(warned("abcdfghi"))
    assert "are undesirable; " in " ".join(warned(""))
    assert not warned("abcd")
    with pytest.raises(ValueError, match="batch_size must be at least 2"):
        KTOStage(batch_size=1)


def test_experts_that_a_model_has_not_cannot_be_balanced(config):
    config = changed(config, "sft", router_aux_coef=0.1)
    with pytest.raises(UserError, match=r"sft\.router_aux_coef: the model has no experts"):
        setting_of(config, "sft")
