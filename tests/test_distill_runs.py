"""Distillation as a run: its teacher, with and without a reward, under LoRA, repeated."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from builders import goes_on_alike, initial_params, metric_rows, perturbed, save_base, slow, with_rl
from numpy.testing import assert_allclose

from rlhf_jax import models, training
from rlhf_jax.algorithms import distill
from rlhf_jax.config import DistillStage, LoRA, Optimizer, Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.training import verify

pytestmark = pytest.mark.usefixtures("no_pages")


def save_teacher(folder, data, **changes):
    """A folder with the tokenizer of ``save_base`` and weights that say something."""
    save_base(folder, data)
    model, params = models.load(folder)
    if changes:
        model = models.build(replace(model.config, **changes))
        params = initial_params(model)
    models.save(folder, model, perturbed(params))
    return str(folder)


@pytest.fixture
def short(config, data, tmp_path):
    """Eight iterations of a policy of random weights with a teacher, without a reward."""
    changes = {
        "model": save_base(tmp_path / "base", data),
        "distill": DistillStage(teacher=save_teacher(tmp_path / "teacher", data)),
        "tokenizer": Tokenizer(),
        "reward": (),
    }
    rl = {"num_iterations": 8, "kl_target": None, "validation_interval": 8}
    rl["optimizer"] = Optimizer(learning_rate=3e-2)
    return with_rl(replace(config, **changes), **rl)


def run(config):
    return training.rl.run(config, distill)


def with_distill(config, **changes):
    return replace(config, distill=replace(config.distill, **changes))


def of_steps(result, name):
    return [row[name] for row in metric_rows(result.folder) if name in row]


@pytest.mark.parametrize(
    "settings",
    [
        {"divergence": "reverse_kl"},
        slow({"divergence": "forward_kl"}),
        slow({"divergence": "jsd", "num_minibatches": 2}),
        slow({"divergence": "sampled", "clip_high": 5.0, "num_microbatches": 2}),
    ],
)
def test_a_policy_comes_nearer_to_its_teacher(settings, short):
    """Without a reward the score is minus the KL of whole responses."""
    if settings["divergence"] == "sampled":  # one number a token
        short = with_rl(short, num_iterations=40, validation_interval=40)
    result = run(with_distill(short, **settings))
    divergence = of_steps(result, "distill/divergence")
    assert divergence[-1] < 0.8 * divergence[0]
    before, after = of_steps(result, "validation/score")
    assert before < after < 0.1
    rows = metric_rows(result.folder)
    assert not any("reward/equal_share" in row for row in rows)  # nor an alert that reads it
    assert all(row.get("objective/reward", 0.0) == 0.0 for row in rows)
    manifest = json.loads((result.folder / "manifest.json").read_text("utf-8"))
    assert {"model", "teacher"} < manifest["data"].keys()


def test_a_stopped_run_goes_on_alike_and_is_repeated(short):
    config = with_rl(short, num_iterations=5, validation_interval=3)
    result = run(config)
    goes_on_alike(run, config, result, 4)
    audit = verify.verify(result.folder)
    assert audit.differences == []


def test_a_policy_that_is_its_teacher_learns_nothing(short):
    config = with_rl(replace(short, model=short.distill.teacher), num_iterations=1)
    result = run(config)
    assert_allclose(of_steps(result, "distill/divergence"), 0.0, atol=1e-6)
    assert_allclose(of_steps(result, "objective/score"), 0.0, atol=1e-4)


LETTERS = """
def letters(prompts, responses):
    return [len(set(response)) for response in responses]
"""


@pytest.mark.parametrize("learns", [False, True])
def test_a_reward_is_learned_from_beside_the_teacher(learns, short, tmp_path):
    """A teacher of weight 0 is measured alone."""
    (tmp_path / "reward.py").write_text(LETTERS)
    reward = (f"{tmp_path}/reward.py:letters",) if learns else ()
    config = with_rl(replace(short, reward=reward), num_iterations=3)
    result = run(with_distill(config, teacher_coef=0.0))
    scores = of_steps(result, "objective/score")
    assert (min(scores) > 0) == learns  # numbers of letters, or log-ratios
    _, before = models.load(short.model)
    _, after = models.load(result.model_folder)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, after)
    assert (max(jax.tree.leaves(moved)) > 0) == learns


def test_under_lora_the_adapters_learn_from_the_teacher(short):
    result = run(replace(short, lora=LoRA(rank=4, alpha=8.0)))
    divergence = of_steps(result, "distill/divergence")
    assert divergence[-1] < divergence[0]


def test_what_is_no_teacher(short, data, tmp_path):
    short_one = save_teacher(tmp_path / "short", data, max_length=16)
    with pytest.raises(UserError, match=r"distill\.teacher .*short: it reads 16 tokens"):
        run(with_distill(short, teacher=short_one))
    with pytest.raises(UserError, match=r"no teacher: give --distill\.teacher"):
        run(with_distill(replace(short, overwrite=True), teacher=None))
    with pytest.raises(UserError, match="nowhere"):
        run(with_distill(replace(short, overwrite=True), teacher=str(tmp_path / "nowhere")))
    other = replace(short, model=None, tokenizer=Tokenizer(kind="characters"), overwrite=True)
    with pytest.raises(UserError, match=r"its vocabulary is another one: \d+ of \d+ entries"):
        run(other)


def test_an_environment_pays_and_needs_a_reward_beside_it(short, tmp_path):
    (tmp_path / "talk.py").write_text("def talk(conversation, row):\n    return None\n")
    with pytest.raises(UserError, match="environment pays, so its run has a reward"):
        run(with_rl(short, environment=f"{tmp_path}/talk.py:talk"))
