"""Which learning rate a stage has by default, and that runs and plans use it."""

import json
from dataclasses import replace

import jax
import numpy as np
import optax
import pytest
import yaml
from builders import ROOT, UNASKED, initial_params, letters_run, metric_rows, with_rl

from rlhf_jax import models, ppo, training, vpg
from rlhf_jax.cli.planning import shapes
from rlhf_jax.config import (
    DPOStage,
    LoRA,
    Optimizer,
    PPOStage,
    RLStage,
    RunConfig,
    Text,
)
from rlhf_jax.data import tokenizers
from rlhf_jax.errors import UserError
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.iteration import NO_PENALTY
from rlhf_jax.training.common import rates
from rlhf_jax.training.common.optimizer import learning_rates, make_optimizer
from rlhf_jax.training.common.rates import POWERS, Size, default_rate
from rlhf_jax.training.rl import job, programs
from rlhf_jax.training.rl.method import Method, choose_rate, completed

MILLION = 10**6


def test_a_rate_is_a_power_of_the_size(monkeypatch):
    """2e-3 of a million parameters, a tenth of it for a hundred times as many."""
    monkeypatch.setitem(POWERS, "sft", (2e-3, 0.5))
    monkeypatch.setattr(rates, "OF_ADAPTERS", 10.0)
    sizes = (MILLION // 4, MILLION, 100 * MILLION)
    assert [default_rate("sft", Size(size, False)) for size in sizes] == [4e-3, 2e-3, 2e-4]
    assert default_rate("sft", Size(100 * MILLION, True)) == 2e-3
    assert default_rate("sft", Size(3 * MILLION, False)) == 1e-3  # 1.155e-3, in one digit
    assert default_rate("sft", Size(MILLION, True)) == 1e-2  # at most


@pytest.mark.parametrize("stage", POWERS)
def test_a_larger_network_never_gets_a_larger_rate(stage):
    sizes = [int(size) for size in np.geomspace(1e3, 1e12, 80)]
    for is_adapter in (False, True):
        found = [default_rate(stage, Size(size, is_adapter)) for size in sizes]
        assert found == sorted(found, reverse=True)
        ends = [default_rate(stage, Size(size, is_adapter)) for size in (100_000, 8 * 10**9)]
        assert (found[0], found[-1]) == tuple(ends)  # beyond them it is not extrapolated
        assert found[0] > 10 * found[-1]
    assert default_rate(stage, Size(MILLION, True)) > default_rate(stage, Size(MILLION, False))


def test_a_given_rate_stays_and_one_far_above_the_default_warns(capsys):
    size = Size(MILLION, False)
    usual = default_rate("dpo", size)
    default = rates.with_rate("dpo", Optimizer(schedule="linear"), size)
    assert default == Optimizer(usual, schedule="linear")
    short = np.format_float_scientific(usual, trim="-", exp_digits=1)
    assert capsys.readouterr().out == f"rate {short}: full training of 1,000,000 parameters\n"
    for factor, warns in ((9.9, False), (10.1, True)):
        given = Optimizer(factor * usual)
        assert rates.with_rate("dpo", given, size) == given
        out = capsys.readouterr().out
        assert out.startswith("warning: dpo.optimizer.learning_rate") == warns
        assert bool(out) == warns
    assert rates.with_rate("dpo", Optimizer(0.0), size) == Optimizer(0.0)


def test_an_optimizer_needs_a_rate():
    with pytest.raises(ValueError, match="learning_rate is null"):
        make_optimizer(Optimizer(), 1)


def test_adapters_count_the_network_that_they_adapt(capsys):
    params = {"h": {"kernel": np.ones((300, 1000))}, "ln": {"scale": np.ones(7)}}
    assert rates.size_of(LoRA(), params) == Size(300_007, False)
    assert rates.size_of(LoRA(rank=2), params) == Size(300_007, True)
    rates.with_rate("sft", Optimizer(), Size(300_007, True))
    assert "adapters of 300,007 parameters" in capsys.readouterr().out


@pytest.fixture
def config(tmp_path):
    """DPO of a model of characters, by the defaults: eighteen steps of four pairs."""
    letters = "abcdfghijklmpqrt"
    tokenizer = tokenizers.characters([letters, "yes no\n"])
    ids = {"pad_token_id": tokenizer.pad_id, "eos_token_id": tokenizer.eos_id}
    model = models.build(models.GPT2Config(tokenizer.vocab_size, 16, 8, 1, 1, **ids))
    begun = LanguageModel(model, initial_params(model), tokenizer)
    begun.save(tmp_path / "begun", template="{prompt}", config=None)
    rows = [{"prompt": letter, "chosen": "yes", "rejected": "no"} for letter in letters]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return RunConfig(
        data=(str(tmp_path / "rows.json"),),
        output_dir=str(tmp_path / "run"),
        model=str(tmp_path / "begun"),
        text=Text(bucket_multiple=16),
        dpo=DPOStage(batch_size=4, num_epochs=6, validation_fraction=0.25, **UNASKED),
    )


def test_dpo_by_its_defaults_moves_a_small_network_and_goes_on_at_the_same_rate(
    config, capsys, monkeypatch
):
    result = training.dpo.run(config)
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("rate ")]
    params = LanguageModel.load(config.model).params
    size = rates.size_of(LoRA(), params)
    assert line.endswith(f"full training of {size.num_params:,} parameters")
    usual = default_rate("dpo", size)
    steps = [row for row in metric_rows(result.folder) if "lr" in row]
    assert max(row["lr"] for row in steps) == pytest.approx(usual)
    assert steps[0]["lr"] < usual / 2  # a warm-up
    assert steps[-1]["dpo/margin"] > 0.01
    recorded = yaml.safe_load((result.folder / "config.yaml").read_text())
    assert recorded["dpo"]["optimizer"]["learning_rate"] == usual
    monkeypatch.setitem(POWERS, "dpo", (1.0, 0.0))  # of another version
    longer = replace(config, resume=True, allow_changed=("dpo.num_epochs",))
    longer = replace(longer, dpo=replace(config.dpo, num_epochs=7))
    optimizer = replace(longer.dpo.optimizer, learning_rate=0.5)
    with pytest.raises(UserError, match=r"dpo\.optimizer\.learning_rate was"):
        training.dpo.run(replace(longer, dpo=replace(longer.dpo, optimizer=optimizer)))
    training.dpo.run(longer)
    assert max(row["lr"] for row in metric_rows(result.folder) if "lr" in row) <= usual * 1.001


@pytest.mark.parametrize("adapters", [0, 2])
def test_an_rl_run_has_the_rate_of_its_policy(adapters, config, tmp_path, capsys):
    begun = replace(letters_run(tmp_path), model=config.model, lora=LoRA(rank=adapters))
    size = rates.size_of(begun.lora, LanguageModel.load(config.model).params)
    with job.open_job(begun, ppo, PPOStage(value="separate")) as opened:
        state = opened.networks.optimizer.init(opened.networks.trained.params)
    found = {name: float(rate) for name, rate in learning_rates(state).items()}
    usual = default_rate("rl", size)
    assert found == {"lr": pytest.approx(usual), "value/lr": pytest.approx(usual)}
    assert f": {size}\n" in capsys.readouterr().out


class Opened:
    """A run as far as it decides on settings."""

    config = RunConfig()

    def decide(self, **sections):
        return sections


def test_who_gives_an_optimizer_hears_of_no_rate(capsys):
    params = {"w": np.zeros(2, np.float32)}
    given = Method(vpg, vpg.Config(), RLStage(), NO_PENALTY, None, optimizer=optax.sgd(0.1))
    run = Opened()
    assert choose_rate(run, given, params) == (run, given)
    assert "rate " not in capsys.readouterr().out
    # The value function has an optimizer of its own, by the settings.
    critic = given._replace(algorithm=completed(ppo), algorithm_config=PPOStage(value_warmup=1))
    decided, critic = choose_rate(run, critic, params)
    assert "rate " in capsys.readouterr().out
    assert decided == {"rl": critic.settings}
    made = programs.make_optimizer(critic, params | {"value": params["w"]})
    found = learning_rates(made.init(params | {"value": params["w"]}))
    assert float(found["value/lr"]) == pytest.approx(default_rate("rl", Size(2, False)))


def test_the_value_function_keeps_a_rate_that_it_is_given():
    params = {"w": np.zeros(2, np.float32), "value": np.zeros(2, np.float32)}
    own = PPOStage(value_learning_rate=0.3)
    method = Method(completed(ppo), own, RLStage(), NO_PENALTY, None)
    _, method = choose_rate(Opened(), method, {"w": np.zeros(MILLION, np.float32)})
    found = learning_rates(programs.make_optimizer(method, params).init(params))
    assert float(found["value/lr"]) == pytest.approx(0.3)
    assert float(found["lr"]) == pytest.approx(default_rate("rl", Size(MILLION, False)))


@pytest.mark.parametrize("stage", ["dpo", "ppo"])
def test_a_plan_needs_no_rate(stage, config):
    planned = with_rl(replace(config, reward=("length",)), batch_size=4, max_new_tokens=2)
    found = shapes.shapes_of(planned, stage, 4)
    assert jax.tree.leaves(found.held["optimizer"])


def test_the_page_has_the_rates_of_the_rule():
    """SFT, DPO and RL of all weights, then of adapters."""
    page = (ROOT / "docs" / "rates.md").read_text("utf-8")
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if " M | " in line]
    assert len(lines) == 6
    for size, *cells in lines:
        number = round(float(size.removesuffix(" M").replace(",", "")) * MILLION)
        found = [
            default_rate(stage, Size(number, is_adapter))
            for is_adapter in (False, True)
            for stage in ("sft", "dpo", "rl")
        ]
        assert [float(cell) for cell in cells] == found
        for alike, stage in (("reward_model", "sft"), ("kto", "dpo")):
            rates = [default_rate(name, Size(number, False)) for name in (alike, stage)]
            assert rates[0] == rates[1]
