"""Runs under LoRA, on a frozen base in bfloat16 or in 4 bits: what is trained, what is saved, the
reference, its refresh, resume.
"""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from builders import TINY, goes_on_alike, metric_rows, run_ppo, save_base, stages
from flax.traverse_util import flatten_dict
from numpy.testing import assert_allclose

from rlhf_jax import models, ppo, training, vpg
from rlhf_jax.config import LoRA, RunConfig, Tokenizer, model_source, parse
from rlhf_jax.errors import UserError
from rlhf_jax.models import lora
from rlhf_jax.report import export
from rlhf_jax.training.common import references


@pytest.fixture
def lora_config(config, data, tmp_path):
    return replace(
        config,
        model=save_base(tmp_path / "base", data, num_layers=2, dtype=jnp.bfloat16),
        tokenizer=Tokenizer(),
        lora=LoRA(rank=2, alpha=4.0),
        reward_model=replace(config.reward_model, normalize_samples=16),
        rl=replace(config.rl, num_iterations=6, kl_coef=0.01, kl_target=None),
        ppo=ppo.Config(num_epochs=2, num_minibatches=2, shuffle_blocks=4),
    )


def holds_merged(folder, base, adapters):
    """The folder's model is the base with the adapters merged."""
    saved = flatten_dict(models.load(folder)[1])
    expected = flatten_dict(lora.merge(base, adapters))
    assert saved.keys() == expected.keys()
    for path, leaf in expected.items():
        assert_allclose(saved[path].astype("f4"), leaf.astype("f4"), rtol=1e-6, atol=1e-7)


# The stages whose base has 4 bits here; the others keep it in bfloat16.
ON_NF4 = (training.sft.run, training.reward_model.run)


@pytest.mark.slow
@stages()
def test_a_run_saves_the_merged_model_and_its_adapters(run, lora_config, tmp_path):
    """The base that was trained on, with the adapters; ``export`` gives that or, of the adapters'
    folder, the original weights with them.
    """
    form = "nf4" if run in ON_NF4 else None
    done = run(replace(lora_config, lora=replace(lora_config.lora, base=form)))
    _, original = models.load(lora_config.model)
    base = original if form is None else lora.quantized(original, form)
    _, merged = models.load(done.model_folder)
    adapters = lora.load(done.folder / "adapter", original)
    kernels = [path for path in flatten_dict(original) if path[-1] == "kernel"]
    assert {path[:-1] for path in flatten_dict(adapters) if path[-1] == "lora_a"} == {
        path[:-1] for path in kernels
    }
    unchanged = flatten_dict(lora.merge(base, {}))
    holds_merged(done.model_folder, base, adapters)
    holds_merged(export.export(done.folder, tmp_path / "merged"), base, adapters)
    holds_merged(export.export(done.folder / "adapter", tmp_path / "new"), original, adapters)
    for path, leaf in flatten_dict(merged).items():
        if path in kernels:
            assert np.abs(leaf - unchanged[path].astype("f4")).max() > 1e-4
        elif path[0] != "score":
            assert (leaf == unchanged[path]).all()


@pytest.mark.slow
def test_a_refreshed_reference_is_the_policy_again_and_a_stopped_run_goes_on_with_it(lora_config):
    config = replace(lora_config, rl=replace(lora_config.rl, reference_refresh=2))
    straight = run_ppo(config)
    rows = metric_rows(straight.folder)
    kl = {row["step"]: abs(row["objective/kl"]) for row in rows if "objective/kl" in row}
    assert max(kl[1], kl[3], kl[5]) < 1e-5 < 1e-4 < min(kl[2], kl[4], kl[6])
    goes_on_alike(run_ppo, config, straight)


@pytest.mark.slow
def test_a_run_whose_adapters_drop_learns_otherwise_and_goes_on_alike(lora_config):
    """On a base of 4 bits."""
    config = replace(lora_config, lora=LoRA(rank=2, dropout=0.5, base="nf4"))
    straight = training.sft.run(config)
    goes_on_alike(training.sft.run, config, straight)
    lora = LoRA(rank=2, base="nf4")
    plain = replace(config, lora=lora, output_dir=f"{config.output_dir}-plain")
    drops, whole = (
        [row["sft/loss"] for row in metric_rows(done.folder) if "sft/loss" in row]
        for done in (straight, training.sft.run(plain))
    )
    assert drops[0] == pytest.approx(whole[0], rel=1e-5)  # B is 0: the term is 0 in both
    assert abs(drops[-1] - whole[-1]) > 1e-6


def test_a_stage_with_a_reference_says_that_adapters_do_not_drop(lora_config, caplog):
    config = replace(lora_config, lora=LoRA(rank=2, dropout=0.5))
    references.check(model_source(config), config.sft)
    assert "lora.dropout" not in caplog.text
    for stage in (training.dpo, training.kto):
        caplog.clear()
        with pytest.raises(UserError, match=r"nowhere\.json"):
            stage.run(replace(config, data=("nowhere.json",)))
        assert "lora.dropout 0.5 is not used" in caplog.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora.rank", "2"], "lora.rank adapts a trained model: give --model"),
        (["--lora.match", "("], "match is no regular expression"),
        (["--lora.alpha", "0"], "alpha must be above 0"),
        (
            ["--rl.reference-refresh", "3", "--rl.kl-coef", "0"],
            "rl.reference_refresh: no KL is used here",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(flags, message, tmp_path):
    argv = ["--config", str(TINY), "--output-dir", str(tmp_path / "run"), *flags]
    with pytest.raises(UserError) as refused:
        training.rl.run(parse(RunConfig, argv), vpg)
    assert message in str(refused.value)
