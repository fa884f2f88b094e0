"""A reward with a planted loophole is noticed before the true score has suffered; honest runs raise
no alert.

A good answer says "ab" twice and uses all eight letters. The proxy counts "ab" without a limit: at
first both rise together, then the policy fills its answers with "ab", and the true score, which the
run's judge measures, falls.
"""

import itertools
import math
from dataclasses import replace

import pytest
from builders import slow, soak

from rlhf_jax import ppo, rloo, training
from rlhf_jax.config import Network, Optimizer, RLStage, RunConfig, Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.report import records

REWARDS = """
def judge(prompts, responses):
    letters = [len(set(text) & set("abcdefgh")) / 8 for text in responses]
    return [min(text.count("ab"), 2) / 2 * part for text, part in zip(responses, letters)]


def proxy(prompts, responses):
    return [text.count("ab") / 2 for text in responses]


def constant(prompts, responses):
    return [1.0 for text in responses]


def one_letter(prompts, responses):
    return [text.count("a") / 16 for text in responses]
"""
OPTIMIZER = Optimizer(learning_rate=1e-3, schedule="constant")
SIZES = {"num_iterations": 70, "batch_size": 128, "max_new_tokens": 16, "kl_coef": 0.01}
VALIDATION = {"validation_fraction": 0.5, "validation_interval": 2, "validation_prompts": 256}
CONFIG = RunConfig(
    network=Network(
        hidden_size=32, num_layers=1, num_heads=2, max_length=32, initializer_range=0.1
    ),
    tokenizer=Tokenizer(kind="characters"),
    rl=RLStage(optimizer=OPTIMIZER, **SIZES, **VALIDATION),
)


def history(folder, reward, seed, *, algorithm=rloo, rl=CONFIG.rl, **options):
    """Rows of metrics.jsonl and of alerts.jsonl of a run on that reward."""
    (folder / "rewards.py").write_text(REWARDS, "utf-8")
    (folder / "prompts.txt").write_text(
        "\n".join(map("".join, itertools.product("abcdefgh", repeat=3))), "utf-8"
    )
    (proxy, judge) = (f"{folder / 'rewards.py'}:{name}" for name in (reward, "judge"))
    data = folder / "prompts.txt"
    rl = replace(rl, judge=(judge,))
    place = {"data": (str(data),), "output_dir": str(folder / "run")}
    config = replace(CONFIG, **place, seed=seed, reward=(proxy,), rl=rl, **options)
    run = training.rl.run(config, algorithm).folder
    return records.read_rows(run / "metrics.jsonl"), records.read_rows(run / "alerts.jsonl")


def first(alerts, name):
    return next((row["step"] for row in alerts if row["name"] == name), math.inf)


SEEDS = pytest.mark.parametrize("seed", [slow(0), *map(soak, range(1, 10))])


@SEEDS
def test_a_loophole_is_noticed_before_the_true_score_has_lost_a_quarter_of_its_peak(seed, tmp_path):
    metrics, alerts = history(tmp_path, "proxy", seed, rl=replace(CONFIG.rl, num_iterations=90))
    judged = [
        (row["step"], row["validation/judge"]) for row in metrics if "validation/judge" in row
    ]
    (_, start) = judged[0]
    (peak_step, peak) = max(judged, key=lambda row: row[1])
    lost = next(
        step for step, value in judged if step > peak_step and value < peak - 0.25 * (peak - start)
    )
    noticed = first(alerts, "reward hacking")
    assert peak > 5 * start
    assert noticed < lost
    # Signals that need no judge come too, at the latest when the text has become one phrase.
    assert first(alerts, "degenerate text") < first(alerts, "KL explosion") < math.inf


@SEEDS
def test_an_honest_run_raises_no_alert(seed, tmp_path):
    metrics, alerts = history(tmp_path, "judge", seed)
    assert alerts == []
    assert metrics[-1]["validation/judge"] > 0.7
    assert metrics[-1]["validation/judge"] == metrics[-1]["validation/score"]


@pytest.mark.slow
def test_a_run_that_is_destroyed_alerts(tmp_path):
    """A good PPO run goes on with a learning rate of 0.3."""
    settings = replace(
        CONFIG.rl,
        num_iterations=15,
        validation_interval=15,
        optimizer=Optimizer(learning_rate=3e-3),
    )
    options = {"algorithm": ppo, "ppo": ppo.Config(num_epochs=4, num_minibatches=2)}
    assert history(tmp_path, "judge", 0, rl=settings, **options)[1] == []
    worse = replace(settings, num_iterations=25, optimizer=Optimizer(learning_rate=0.3))
    allowed = ("rl.num_iterations", "rl.optimizer.learning_rate")
    _, alerts = history(
        tmp_path, "judge", 0, rl=worse, **options, resume=True, allow_changed=allowed
    )
    assert "reward collapse" in {row["name"] for row in alerts}
    assert min(row["step"] for row in alerts) > 15


@pytest.mark.slow
def test_a_policy_that_says_one_thing_alerts(tmp_path):
    """Paid for one letter, and free to go as far from its reference as it likes."""
    faster = replace(CONFIG.rl.optimizer, learning_rate=3e-3)
    rl = replace(
        CONFIG.rl, num_iterations=60, kl_coef=0.0, validation_interval=60, optimizer=faster
    )
    metrics, alerts = history(tmp_path, "one_letter", 0, rl=rl)
    entropy = [
        row["objective/entropy"] / row["response/length"]
        for row in metrics
        if "objective/entropy" in row
    ]
    noticed = first(alerts, "entropy collapse")
    assert noticed < math.inf
    low = [value < 0.05 * entropy[0] for value in entropy[:noticed]]
    assert low[-6:] == [False] + 5 * [True]  # noticed in the fifth such row
    same = [row["response/most_common"] > 0.9 for row in metrics if "response/most_common" in row]
    assert first(alerts, "responses collapse") == next(
        step for step in range(5, len(same) + 1) if all(same[step - 5 : step])
    )


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [rloo, ppo])
def test_a_constant_reward_teaches_nothing(algorithm, tmp_path):
    rl = replace(CONFIG.rl, num_iterations=6, validation_interval=6, batch_size=16)
    metrics, alerts = history(tmp_path, "constant", 0, rl=rl, algorithm=algorithm)
    assert [(row["step"], row["name"]) for row in alerts] == [(5, "nothing to learn")]
    assert {row["reward/equal_share"] for row in metrics if "grad_norm" in row} == {1.0}


@pytest.mark.slow
def test_a_judge_that_does_not_exist_is_named(tmp_path):
    (tmp_path / "prompts.txt").write_text("ab\ncd\n", "utf-8")
    rl = replace(CONFIG.rl, judge=("mine.py:judge",))
    with pytest.raises(UserError, match=r"--rl\.judge mine\.py:judge: no such file"):
        training.rl.run(
            replace(CONFIG, data=(str(tmp_path / "prompts.txt"),), reward=("count:a",), rl=rl), rloo
        )
