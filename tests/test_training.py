"""Runs of ``rlhf_jax.training`` on four devices: exact resume, other device counts, what is refused
and what they save.
"""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers as hf
from builders import (
    FAST,
    initial_params,
    metric_rows,
    run_ppo,
    stages,
    stopped_goes_on_alike,
)
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax import models, sharding, training
from rlhf_jax.cli import quickstart
from rlhf_jax.config import (
    Compute,
    Optimizer,
    RewardModelStage,
    RunConfig,
    Text,
    data_source,
    model_source,
)
from rlhf_jax.data.tokenizers import characters
from rlhf_jax.errors import TrainingFault, UserError
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.models import hf as model_files
from rlhf_jax.training.common import initial, layout, saving
from rlhf_jax.training.common.initial import Trainable
from rlhf_jax.training.common.opening import open_run
from rlhf_jax.training.common.saving import finish
from rlhf_jax.training.common.setup import set_up
from rlhf_jax.training.supervised import normalization, reading, reward_model


@stages()
def test_a_stopped_run_resumes_to_the_same_bytes(run, config, capsys):
    stopped = stopped_goes_on_alike(run, config, run(config), 6)
    assert "resumed from step 4 of" in capsys.readouterr().out
    steps = [row["step"] for row in metric_rows(stopped.folder)]
    assert steps == list(range(len(steps)))
    assert steps[-1] >= 7


@stages()
def test_one_device_and_four_agree(run, config, tmp_path, monkeypatch):
    """The same rows, samples and shuffles; numbers up to the order of summation."""
    # Where a gradient is 0 but for rounding, Adam's first steps divide that rounding by itself,
    # unless eps is larger.
    steady = replace(config.reward_model, optimizer=replace(FAST, eps=1e-3))
    config = replace(config, reward_model=steady)
    four = run(config)
    monkeypatch.setattr(layout, "mesh_of", lambda config: sharding.make_mesh(1))
    one = run(replace(config, output_dir=str(tmp_path / "one")))
    for name in ("metrics.jsonl", "samples.jsonl"):
        lines = ((r.folder / name).read_text("utf-8").splitlines() for r in (one, four))
        for first, second in zip(*(map(json.loads, texts) for texts in lines), strict=True):
            assert first.keys() == second.keys()
            if (
                first["step"] == 1
            ):  # DPO's policy is the reference still: the sign of a margin is rounding
                first["dpo/accuracy"] = second["dpo/accuracy"] = 0
            for key, value in first.items():
                if isinstance(value, str):
                    assert value == second[key]
                else:
                    assert_allclose(value, second[key], rtol=2e-3, atol=2e-3, err_msg=key)


@pytest.mark.slow
def test_non_finite_numbers_stop_the_run_and_name_the_last_good_checkpoint(config):
    # The first update makes the parameters infinite, the second finds out.
    exploding = replace(config.sft, optimizer=Optimizer(learning_rate=1e38, max_grad_norm=None))
    rows = r"rows of this batch: .*sft_data.json, \S+ \d+, "
    message = rf"not finite at step 2; .* checkpoint is step 0 .*{rows}"
    with pytest.raises(TrainingFault, match=message):
        training.sft.run(replace(config, sft=exploding))


def test_pairs_of_a_ranking_stay_together_and_what_is_left_of_them_weighs_as_much(tmp_path, capsys):
    """Of every second ranking two of three pairs go with its long answer; of one all answers are
    equal.
    """
    answers = [[f"{'abcdefghijkl'[i]}", "y", "z" * (60 if i % 2 else 1)] for i in range(12)]
    rankings = [
        {"prompt": "pqrstuvwxyzab"[i], "responses": texts, "ranking": [0, 1, 2]}
        for i, texts in enumerate([*answers, ["x"] * 3])
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rankings)))
    config = RunConfig(data=(str(tmp_path / "data.jsonl"),), text=Text(too_long="drop"))
    settings = RewardModelStage(validation_fraction=0.3)
    spec = training.reward_model.TASK
    data, none = reading.read(data_source(config), spec, settings, [config.data])
    model = models.build(models.GPT2Config(99, 16, 8, 1, 1))
    begun = LanguageModel(model, {}, characters("abcdefghijklmnopqrstuvwxyz"))
    key = jax.random.key(0)
    source = model_source(config)
    encoded, *parts = reading.encoded_rows(source, spec, settings, begun, data, none, key)
    train, held_out = ({encoded.sources[row] for row in part} for part in parts)
    assert (len(train | held_out), train & held_out) == (12, set())
    weights = dict.fromkeys(train | held_out, 0.0)
    for place, weight in zip(encoded.sources, encoded.weight, strict=True):
        weights[place] += weight
    assert_allclose(list(weights.values()), 1.0, rtol=1e-6)
    said = capsys.readouterr().out
    assert "12 pairs: dropped, too long\n" in said
    counts = "{} train, {} held out\n".format(*map(len, parts))
    assert f"37 pairs in, 1 bad, 12 too long, {counts}" in said


def test_scores_get_mean_0_and_variance_1():
    """Raw scores 1, 3, 8 whatever gain and shift the head had: mean 4, variance 26 / 3."""
    raw = jax.numpy.array([[1.0], [3.0], [8.0]])

    def score(params, comparisons):
        return params["score"]["gain"] * raw + params["score"]["shift"]

    params = {"score": {"gain": jax.numpy.float32(2.0), "shift": jax.numpy.float32(5.0)}}
    normalised = normalization.normalize(score, params, *[np.ones((3, 2))] * 2)
    expected = (np.array([[1.0], [3.0], [8.0]]) - 4.0) / np.sqrt(26 / 3)
    assert_allclose(score(normalised, None), expected, rtol=1e-6)


TEXTS = characters("abc")
ENDED, CUT = [*TEXTS.encode("ab"), TEXTS.eos_id], TEXTS.encode("abc")


@pytest.mark.parametrize(
    ("answers", "where"),
    [
        ([ENDED, ENDED, ENDED, CUT], model_files.END_OF_TURN),
        ([ENDED, CUT, CUT, CUT], model_files.LAST_TOKEN),
    ],
)
def test_a_score_stands_where_the_answers_that_were_trained_on_end(answers, where, monkeypatch):
    """Samples of which one was cut are scored as RL will score them. The row that is held out,
    whose answers are all of the other form, does not count.
    """
    held_out = CUT if where == model_files.END_OF_TURN else ENDED
    columns = [[np.array(text) for text in [*answers[i : i + 2], held_out]] for i in (0, 2)]
    model = SimpleNamespace(tokenizer=TEXTS)
    source = SimpleNamespace(model="base", text=Text())
    run = SimpleNamespace(layout=SimpleNamespace(jit=None))
    job = SimpleNamespace(
        encoded=SimpleNamespace(tokens=columns),
        train_rows=np.array([0, 1]),
        language_model=model,
        source=source,
        run=run,
    )
    assert reward_model.score_position(job) == where
    assert reward_model.TASK.save(job).keywords == {"score_position": where}
    read = []

    def score(params, comparisons):
        mask = np.asarray(comparisons.attention_mask)[:, 0]
        read.extend(
            row[row_mask != 0].tolist()
            for row, row_mask in zip(np.asarray(comparisons.tokens)[:, 0], mask, strict=True)
        )
        return mask.sum(axis=1, keepdims=True)

    tokens = np.array([ENDED, CUT])
    samples = SimpleNamespace(tokens=tokens, attention_mask=np.ones_like(tokens))
    monkeypatch.setattr(normalization, "base_samples", lambda job, number: samples)
    monkeypatch.setattr(normalization.scoring, "answer_scorer", lambda *args, **how: score)
    learner = SimpleNamespace(start=SimpleNamespace(bind=lambda fn: fn), fn=None)
    members = {"": {"score": {"gain": jnp.float32(1), "shift": jnp.float32(0)}}}
    reads_end = where == model_files.END_OF_TURN
    normalization.normalize_members(job, learner, members, 2, reads_end)
    assert read == [ENDED, [*CUT, TEXTS.eos_id] if reads_end else CUT]


@pytest.mark.parametrize(
    ("run", "section", "change", "message"),
    [
        (run_ppo, "ppo", {"num_minibatches": 5}, r"rl\.batch_size 16 .* 5 ppo\.num_minibatches"),
        (run_ppo, "ppo", {"num_microbatches": 3}, r"3 ppo\.num_microbatches; use 24"),
        (run_ppo, "ppo", {"kl_loss_estimator": "k1"}, "kl_loss_estimator 'k1'"),
        (run_ppo, "ppo", {"aggregate": "fixed"}, "length: aggregate 'fixed' needs a length"),
        (run_ppo, "rl", {"batch_size": 30}, r"rl\.batch_size 30 .* 4 devices; use 24 or 32"),
        (run_ppo, "rl", {"num_iterations": 0}, "num_iterations must be at least 1"),
        (training.sft.run, "sft", {"num_microbatches": 3}, r"sft\.batch_size 16 .* use 12 or 24"),
        (
            training.sft.run,
            "dpo",
            {"kind": "hinge", "label_smoothing": 0.1},
            "label_smoothing",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_happens(
    run, section, change, message, config
):
    with pytest.raises(ValueError, match=message):
        run(replace(config, **{section: replace(getattr(config, section), **change)}))
    assert not Path(config.output_dir).exists()


def test_a_network_of_a_width_that_its_heads_do_not_divide_is_refused(config):
    with pytest.raises(UserError, match=r"network: hidden_size 16 .* num_heads 3"):
        training.sft.run(replace(config, network=replace(config.network, num_heads=3)))


def test_float16_is_answered_by_bfloat16(config, capsys):
    config = replace(config, compute=Compute(dtype="float16"))
    set_up(config)
    assert "bfloat16 in place of float16" in capsys.readouterr().out
    made = []

    def params(key):
        made.append(initial.language_model(model_source(config), ["some text"], key))
        return made[0].params

    shapes = jax.eval_shape(params, jax.random.key(0))
    assert made[0].model.config.compute_dtype == "bfloat16"
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {np.dtype("float32")}


def test_full_training_writes_the_dtype_of_the_folder_that_it_started_from(tmp_path, capsys):
    model = models.build(models.GPT2Config(300, 16, 8, 1, 1))
    params = initial_params(model)
    coarse = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    begun = LanguageModel(model, coarse, characters("a"))
    for kind in ("auto", "float32"):
        compute = Compute(save_dtype=kind)
        config = RunConfig(model="base", output_dir=str(tmp_path / kind), compute=compute)
        with open_run(replace(config, model=None), "sft", {}) as run:
            run.folder.metrics.write_text("")
            source = model_source(config)
            result = finish(run, source, begun, Trainable(params), {"": params}, {})
        said = f"saved {config.output_dir}/model in bfloat16 (compute.save_dtype)"
        assert (said in capsys.readouterr().out) == (kind == "auto")
        expected = coarse if kind == "auto" else params
        jax.tree.map(assert_array_equal, models.load(result.model_folder)[1], expected)
    keys = json.loads((tmp_path / "auto" / "model" / "config.json").read_text())
    assert keys["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("wanted", "model", "is_full", "expected"),
    [
        ("auto", "folder", True, ("float16", "bfloat16", "float32")),
        ("auto", "folder", False, ("float32", "float32", "float32")),  # merged adapters
        ("auto", None, True, ("float32", "float32", "float32")),
        ("bfloat16", "folder", False, ("bfloat16", "bfloat16", "float32")),
        ("bfloat16", None, True, ("bfloat16", "bfloat16", "float32")),
        ("float32", "folder", True, ("float32", "float32", "float32")),
    ],
)
def test_dtypes_of_what_a_run_writes(wanted, model, is_full, expected):
    def params(*dtypes):
        names = ("h_0", "ln_f", "score")
        return {name: {"kernel": jnp.ones(2, x)} for name, x in zip(names, dtypes, strict=False)}

    source = model_source(RunConfig(model=model, compute=Compute(save_dtype=wanted)))
    loaded = params("float16", "bfloat16")
    written = saving.in_dtype(source, loaded, params(*3 * ["float32"]), is_full)
    assert tuple(leaf.dtype.name for leaf in jax.tree.leaves(written)) == expected


def test_dpo_refuses_labels_that_are_no_pairs(config, tmp_path):
    file = tmp_path / "four.json"
    file.write_text(
        json.dumps(
            [{"query": "q", **{f"sample{i}": f"a{i}" for i in range(4)}, "targets": [1, 2, 3, 4]}]
        )
    )
    with pytest.raises(UserError, match=r"four\.json.*: holds targets, which are no preference"):
        training.dpo.run(replace(config, data=(str(file),)))


def test_a_model_whose_tokenizer_has_no_pad_gains_one(data, tmp_path):
    """As GPT-2: end-of-text is the only special token, and the embedding has one row for each
    entry.
    """
    backend = hf.ByteLevelBPETokenizer()
    text = (Path(data) / "sft_data.json").read_text("utf-8")
    special = ["<|endoftext|>"]
    backend.train_from_iterator([text], vocab_size=300, special_tokens=special, show_progress=False)
    size = backend.get_vocab_size()
    model = models.build(
        models.GPT2Config(vocab_size=size, max_length=128, hidden_size=8, num_layers=1, num_heads=1)
    )
    models.save(tmp_path, model, initial_params(model))
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    for _ in range(2):  # what is saved has one, and does not grow again
        model, params, tokenizer = LanguageModel.load(tmp_path)
        assert (tokenizer.pad_id, tokenizer.vocab_size) == (size, size + 1)
        assert model.config.vocab_size == params["wte"]["embedding"].shape[0] == size + 1
        models.save(tmp_path, model, params)
        tokenizer.save(tmp_path)


def test_the_quickstart_refuses_data_of_ones_own(tmp_path):
    with pytest.raises(UserError, match="pipeline"):
        quickstart.run(
            quickstart.QuickstartConfig(data=("mine.json",), output_dir=str(tmp_path / "run"))
        )
    assert not (tmp_path / "run").exists()
