"""Ensembles of reward models: members that train at once are members trained alone; bootstraps;
their runs.
"""

import functools
import json
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from builders import (
    goes_on_alike,
    initial_params,
    metric_rows,
    run_ppo,
    save_base,
    tiny_run,
    with_rl,
)
from flax.traverse_util import flatten_dict
from numpy.testing import assert_allclose, assert_array_equal
from tabular import assert_close, assert_identical, comparisons, score_fn

from rlhf_jax import models, training
from rlhf_jax.algorithms import reward_model
from rlhf_jax.config import LoRA, Optimizer, RewardModelStage, Tokenizer, model_source
from rlhf_jax.data import encoding
from rlhf_jax.data.rows import Row
from rlhf_jax.data.tokenizers import characters
from rlhf_jax.report.export import export
from rlhf_jax.training.common import initial
from rlhf_jax.training.common.optimizer import make_optimizer
from rlhf_jax.training.supervised import ensembles
from rlhf_jax.training.supervised.reward_model import start_of_member
from rlhf_jax.training.supervised.scoring import disagreement
from rlhf_jax.types import TrainState

KEY = jax.random.key(11)
LETTERS = characters("abcde? ")
# Clipped, decayed and with a schedule, whose state inject_hyperparams keeps.
ADAM = make_optimizer(
    Optimizer(learning_rate=0.1, schedule="linear", warmup_steps=1, max_grad_norm=0.3), 4
)


def noisy(params, tokens, attention_mask, key):
    """Dropout, as it were: the same key gives every text the same noise."""
    scores = score_fn(params, tokens, attention_mask, None)
    return scores if key is None else scores + 0.1 * jax.random.normal(key, scores.shape)


@functools.cache
def updates():
    """The update of one member and that of all, jitted."""
    settings = {
        "score_fn": noisy,
        "optimizer": ADAM,
        "config": reward_model.Config(),
    }
    return [
        jax.jit(partial(f, **settings)) for f in (reward_model.update, ensembles.update_members)
    ]


def test_members_trained_at_once_are_members_trained_alone():
    """Each with its key and weights, over three steps; in the first one the last member has drawn
    none of the rows.
    """
    of_one, of_all = updates()
    absent = [(3, 2), *((4, answer) for answer in range(4))]
    batch = comparisons(0, 8, 4, absent=absent).replace(best=np.arange(8) % 3)
    rng = np.random.default_rng(3)
    counts = rng.poisson(1.0, (3, 8, 3)).astype(np.float32)
    counts[0, :, 2] = 0.0
    starts = [{"scores": rng.normal(size=5).astype(np.float32)} for _ in range(3)]
    together = ensembles.create(starts, ADAM)
    alone = [TrainState.create(start, ADAM) for start in starts]
    for step in range(3):
        key = jax.random.fold_in(KEY, step)
        together, metrics = of_all(together, batch.replace(weight=counts[step]), key)
        results = [
            of_one(state, batch.replace(weight=counts[step, :, i]), jax.random.fold_in(key, i))
            for i, state in enumerate(alone)
        ]
        alone, each = zip(*results, strict=True)
        assert_close(metrics, jax.tree.map(lambda *found: np.mean(found, dtype="f4"), *each))
    for i, state in enumerate(alone):
        assert_close(jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], together), state)
        assert_close(ensembles.members(together.params)[f"member_{i}"], state.params)
    assert np.ptp(together.params["scores"], axis=0).min() > 0.01


def test_a_member_that_is_not_finite_stays_and_says_so():
    _, of_all = updates()
    batch = comparisons(0, 8, 4).replace(best=np.arange(8) % 3)
    line = np.linspace(-1.0, 1.0, 5, dtype=np.float32)
    state = ensembles.create([{"scores": line * i} for i in range(3)], ADAM)
    weight = np.ones((8, 3), np.float32)
    good, _ = of_all(state, batch.replace(weight=weight), KEY)
    lost = weight.copy()
    lost[2, 1] = np.inf
    found, metrics = of_all(state, batch.replace(weight=lost), KEY)
    assert metrics["nonfinite"] == 1.0
    for i, expected in enumerate((good, state, good)):
        assert_identical(
            *(
                jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], tree)
                for tree in (found, expected)
            )
        )
    with pytest.raises(AssertionError, match=r"\(8, \.\.\., 3\)"):
        of_all(state, batch.replace(weight=weight[:, 0]), KEY)


def test_bootstraps_draw_as_many_rows_as_there_are():
    counts = ensembles.bootstrap(KEY, 3, 200)
    assert_array_equal(counts.sum(axis=0), 200)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (counts[:, i] != counts[:, j]).mean() > 0.3
    assert_allclose(
        (counts == 0).mean(axis=0), np.exp(-1), atol=0.1
    )  # with replacement: (1 - 1/n)^n
    assert_array_equal(ensembles.bootstrap(KEY, 2, 200), counts[:, :2])


def test_a_rows_own_weight_counts_in_every_draw_of_it():
    pairs = [
        Row("a?", ("b", "c"), f"{i}", weight=weight) for i, weight in enumerate((0.5, 1.0, 0.25))
    ]
    encoded = encoding.encode_texts(pairs, LETTERS)
    counts = np.array([[2, 0], [1, 3]])
    weighted = ensembles.weigh(encoded, np.array([2, 0]), counts)
    assert_array_equal(weighted.weight, [[0.5, 1.5], [0, 0], [0.5, 0]])
    plain = ensembles.weigh(
        replace(encoded, weight=np.ones(3, np.float32)), np.array([0, 2]), counts
    )
    assert_array_equal(plain.weight, [[2, 0], [0, 0], [1, 3]])
    assert plain.weight.dtype == np.float32


def test_uncertainty_by_hand():
    """The spread of margins, whatever a member adds to all its scores; with targets that of
    scores.
    """
    pairs = [Row("a?", ("b", "c"), "1", weight=1.0), Row("b?", ("c", "d", "e"), "2", best=1)]
    encoded = encoding.encode_texts(pairs, LETTERS)
    scores = np.zeros((2, 3, 2))
    scores[0, :2] = [[3.0, 10.0], [1.0, 12.0]]  # margins 2 and -2: std 2
    scores[1] = [
        [0.0, 9.0],
        [4.0, 11.0],
        [1.0, 4.0],
    ]  # best 1, rival 0 (mean 4.5 > 2.5): margins 4 and 2: std 1
    both = np.arange(2)
    assert disagreement(encoded, both, scores) == pytest.approx(1.5)
    assert disagreement(encoded, both, scores + np.array([5.0, -3.0])) == pytest.approx(1.5)
    heavy = replace(encoded, weight=np.array([3.0, 1.0], np.float32))
    assert disagreement(heavy, both, scores) == pytest.approx((3 * 2 + 1) / 4)
    targets = [
        Row("a?", ("b", "c"), "1", targets=(1.0, 0.0)),
        Row("b?", ("c",), "2", targets=(0.5,)),
    ]
    scored = encoding.encode_texts(targets, LETTERS)
    spread = np.array(
        [[[0.0, 2.0], [1.0, 1.0]], [[4.0, 0.0], [50.0, -50.0]]]
    )  # the last answer is absent
    assert disagreement(scored, both, spread) == pytest.approx((1 + 0 + 2) / 3)


def test_members_start_apart(config):
    model = models.build(
        models.GPT2Config(vocab_size=20, max_length=8, hidden_size=8, num_layers=1, num_heads=1)
    )
    body = initial_params(model)

    def starts(params=body, model_name=None, **settings):
        number = RewardModelStage(**settings).ensemble_size
        source = model_source(replace(config, model=model_name))
        made = [start_of_member(source, model, i, params, KEY) for i in range(number)]
        return [start.params for start in made]

    (single,) = starts()
    random = starts(ensemble_size=3)
    given = starts(model_name="x", ensemble_size=3)
    assert_identical(single, random[0])
    assert_identical(single["wte"], body["wte"])
    for i, j in ((0, 1), (0, 2), (1, 2)):
        for members in (random, given):
            assert (
                np.abs(members[i]["score"]["kernel"] - members[j]["score"]["kernel"]).min() > 1e-5
            )
        assert np.abs(random[i]["wte"]["embedding"] - random[j]["wte"]["embedding"]).max() > 1e-3
        assert_identical(given[i]["wte"], body["wte"])


@pytest.fixture(scope="module")
def ensemble(data, tmp_path_factory):
    """(config, result, base) of an ensemble of two with LoRA on one base, normalised each."""
    folder = tmp_path_factory.mktemp("ensemble")
    config = tiny_run(data, folder / "run")
    base = save_base(folder / "base", data)
    own = {"ensemble_size": 2, "num_epochs": 1, "validation_interval": 3, "normalize_samples": 16}
    own |= {"sft_coef": 0.1}
    given = {"model": base, "tokenizer": Tokenizer(), "lora": LoRA(rank=2)}
    config = replace(config, reward_model=replace(config.reward_model, **own), **given)
    return config, training.reward_model.run(config), models.load(base)[1]


def members_of(folder):
    files = [folder / "model" / f"member_{i}" / "model.safetensors" for i in range(2)]
    return [path.read_bytes() for path in (*files, folder / "metrics.jsonl")]


@pytest.mark.slow
def test_the_run_of_an_ensemble_goes_on_bit_for_bit(ensemble, capsys):
    config, straight, _ = ensemble
    goes_on_alike(training.reward_model.run, config, straight, members_of)
    lines = capsys.readouterr().out.splitlines()
    normalised = {line for line in lines if line.startswith("normalised over 16 samples")}
    assert len(normalised) == 2
    metrics = metric_rows(straight.folder)
    assert metrics[1]["reward_model/sft_loss"] > 0
    assert all(row["validation/uncertainty"] > 0 for row in (metrics[0], metrics[-1]))


@pytest.mark.slow
def test_members_share_the_base_of_their_adapters_and_are_exported(ensemble, tmp_path):
    config, straight, base = ensemble
    members = [models.load(straight.model_folder / f"member_{i}")[1] for i in range(2)]
    shifts = {float(member.pop("score")["shift"]) for member in members}
    assert len(shifts) == 2
    for path, leaf in flatten_dict(base).items():
        first, second = (flatten_dict(member)[path] for member in members)
        adapted = path[-1] == "kernel" and path[0] != "ln_f"
        assert np.array_equal(first, leaf) != adapted, path
        assert np.array_equal(first, second) != adapted, path
    copy = export(straight.folder, tmp_path / "copy")
    assert "An ensemble of reward models" in (copy / "README.md").read_text("utf-8")
    for i, member in enumerate(members):  # PEFT's folder of each beside it
        adapters = models.lora.load(straight.folder / "adapter" / f"member_{i}", base)
        assert_close(models.lora.merge(base, adapters)["h_0"], member["h_0"])
        exported = initial.load_language_model(str(copy / f"member_{i}"), config.compute)
        assert "score" in exported.params


@pytest.mark.slow
def test_ppo_on_the_least_score_of_an_ensemble(ensemble, tmp_path, capsys):
    config, straight, _ = ensemble
    reward = f"min:{straight.model_folder}"
    config = replace(config, reward=(reward,), output_dir=str(tmp_path / "ppo"))
    folder = run_ppo(with_rl(config, num_iterations=2)).folder
    assert f"reward {reward}: 2 models" in capsys.readouterr().out
    metrics = metric_rows(folder)
    assert all(row["reward/uncertainty"] > 0 for row in metrics[1:])
    assert metrics[0]["validation/reward/uncertainty"] > 0
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    assert f"reward {straight.model_folder}" in manifest["data"]
