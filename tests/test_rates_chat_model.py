"""The commands of experiments/rates_chat_model.py."""

import pytest
import rates_chat_model
from rates_chat_model import RATES

from rlhf_jax.training.common import rates


@pytest.mark.parametrize("name", RATES)
def test_a_stage_has_its_rate_and_starts_from_one_policy(name, tmp_path):
    rate = RATES[name][1]
    words = rates_chat_model.flags(tmp_path, name, rate, seed=3)
    assert words[0] == name
    section = "rl" if name == "rloo" else name
    given = dict(zip(words[1::2], words[2::2], strict=True))
    assert float(given[f"--{section}.optimizer.learning-rate"]) == rate
    start = "model" if name == "sft" else "rate-0.0003/sft/model"
    assert given["--model"] == str(tmp_path / start)
    kind = {"sft": "rows", "rloo": "prompts"}.get(name, "pairs")
    assert given["--data"] == str(tmp_path / f"train_{kind}.json")
    assert f"rate-{rate:g}" in given["--output-dir"]


def test_the_default_is_among_the_rates():
    for name, of_stage in RATES.items():
        section = {"rloo": "rl", "reward-model": "reward_model"}.get(name, name)
        default = rates.default_rate(section, rates.Size(134_515_008, is_adapter=True))
        assert min(of_stage) <= default <= max(of_stage)
