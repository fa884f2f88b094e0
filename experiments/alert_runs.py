"""Runs for alert_rates.py: what the default alerts raised in them.

Populations of small runs are lanes of one ``jax.vmap``. An answer of twelve tokens has a gold
reward: each pair of neighbours has a value, and a pair that is said again costs more each time. A
policy is paid by gold, by a rare reward, 1 for one token at one place, or by a proxy, a reward
model of 256 noisy comparisons that cannot see repetition. A reward model of 512 other comparisons,
which can, is the judge.
"""

import functools
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import results
from jax import Array

from rlhf_jax import TrainState, iteration, models, ppo, rloo, sampling
from rlhf_jax.report import records
from rlhf_jax.runs import alerts

RULES = {rule.name: rule for rule in alerts.parse([])}
TOKENS = 16
LENGTH = 12  # of an answer; a prompt is two tokens
PLACE = 6  # in the answer, of the token that the rare reward wants
MODEL = models.build(
    models.GPT2Config(
        vocab_size=TOKENS,
        max_length=2 + LENGTH,
        hidden_size=32,
        num_layers=1,
        num_heads=2,
        initializer_range=0.1,
    )
)
POLICY_FN = models.policy_fn(MODEL, prompt_length=2)
SAMPLER = sampling.SamplingConfig(LENGTH, eos_id=None, pad_id=TOKENS)
BATCH = 32
PAIRS = 512  # of answers to compare for the judge, and the proxy's behind them
OF_PROXY = 256
METHODS: dict[str, Any] = {
    "RLOO": (rloo, rloo.Config(group_size=8)),
    "PPO": (ppo, ppo.Config(num_epochs=2)),
}
COMMANDS = ("ppo", "rloo", "grpo", "vpg", "dpo")
LOOKS_ON = ", gold looks on"
BY_GOLD = f"reward hacking{LOOKS_ON}"
PAID = ("gold", "proxy", "rare", "constant")
# {name: (what pays, learning rate of the first and the second half, the rule that it is for)};
# honest ones are for none.
POPULATIONS: dict[str, tuple[str, tuple[float, float], str]] = {
    "gold": ("gold", (3e-3, 3e-3), ""),
    "gold, slowly": ("gold", (5e-4, 5e-4), ""),
    "rare reward": ("rare", (3e-3, 3e-3), ""),
    "proxy": ("proxy", (1e-3, 1e-3), "reward hacking"),
    "rate 1e-6": ("gold", (1e-6, 1e-6), "nothing learned"),
    "rate .1 from the middle on": ("gold", (3e-3, 0.1), "reward collapse"),
    "one reward for all": ("constant", (3e-3, 3e-3), "nothing to learn"),
}


def pair_counts(tokens: Array) -> Array:
    """[B, TOKENS**2] how often each two neighbours stand in answers [B, 2 + LENGTH]."""
    pairs = tokens[:, 1:-1] * TOKENS + tokens[:, 2:]
    return jnp.sum(jax.nn.one_hot(pairs, TOKENS**2), axis=1)


def repeats(counts: Array) -> Array:
    """[B, 1] what repeated pairs cost."""
    return jnp.sum(jnp.square(jnp.maximum(counts - 1, 0)), axis=1, keepdims=True)


def fitted(features: Array, labels: Array) -> Array:
    """The weights [F] of a reward model (Bradley and Terry) of pairs [C, 2, F]."""
    difference = features[:, 1] - features[:, 0]

    def step(_: Any, weights: Array) -> Array:
        error = labels - jax.nn.sigmoid(difference @ weights)
        return weights + 0.1 * (difference.T @ error / len(labels) * 10 - 0.01 * weights)

    return jax.lax.fori_loop(0, 300, step, jnp.zeros(features.shape[2]))


def trainer(method: str, num_steps: int) -> Callable[[Array, Array, Array], Any]:
    """``train(key, paid, rates [2])``: metrics {name: [steps]} of a whole run."""
    algorithm, config = METHODS[method]
    per_step = getattr(config, "num_epochs", 1) * config.num_minibatches

    def train(key: Array, paid: Array, rate: Array) -> Any:
        init_key, gold_key, answer_key, label_key, loop_key = jax.random.split(key, 5)
        params = MODEL.init(init_key)
        if algorithm.needs_values:
            params = models.add_head(init_key, params, "value")
        values = jax.random.normal(gold_key, (TOKENS**2,))

        def answers(params: Any, num: int, key: Array) -> Any:
            ask_key, key = jax.random.split(key)
            asked = jax.random.randint(ask_key, (num // config.group_size, 2), 0, TOKENS)
            asked = jnp.repeat(asked, config.group_size, axis=0)
            prompts = iteration.Prompts(asked, jnp.ones_like(asked), jnp.arange(num))
            return iteration.respond(params, prompts, key, model=MODEL, config=SAMPLER)

        def gold_of(counts: Array) -> Array:
            return counts @ values - repeats(counts)[:, 0]

        first = pair_counts(answers(params, 2 * (PAIRS + OF_PROXY), answer_key).tokens)
        mean, sd = jnp.mean(gold_of(first)), jnp.std(gold_of(first))
        compared = (gold_of(first) / sd).reshape(-1, 2)
        chance = jax.nn.sigmoid(compared[:, 1] - compared[:, 0])
        labels = jax.random.bernoulli(label_key, chance).astype(jnp.float32)
        both = jnp.concatenate([first, repeats(first)], axis=1).reshape(len(labels), 2, -1)
        judge = fitted(both[:PAIRS], labels[:PAIRS])
        proxy = fitted(both[PAIRS : PAIRS + OF_PROXY, :, :-1], labels[PAIRS : PAIRS + OF_PROXY])

        def schedule(count: Array) -> Array:
            return rate[(2 * count >= num_steps * per_step).astype(jnp.int32)]

        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, eps=1e-5))
        ref_fn = jax.tree_util.Partial(POLICY_FN, params)
        functions = iteration.Functions(jax.tree_util.Partial(POLICY_FN), ref_fn=ref_fn)
        penalty = iteration.kl_penalty(0.01)

        def step(loop: iteration.LoopState, key: Array) -> tuple[iteration.LoopState, Any]:
            sample_key, update_key = jax.random.split(key)
            batch = answers(iteration.policy(loop), BATCH, sample_key)
            batch, sampled = iteration.rescored(loop, batch, functions, eos_ids=(TOKENS,))
            counts = pair_counts(batch.tokens)
            gold = (gold_of(counts) - mean) / sd
            is_right = batch.tokens[:, 2 + PLACE] == batch.tokens[:, 0]
            one = jnp.ones(BATCH)
            scores = jnp.stack([gold, counts @ proxy, is_right * one, one])[paid]
            batch, scored = iteration.scored(batch, scores, {})
            loop, learned = iteration.learn(
                loop,
                batch,
                update_key,
                functions,
                algorithm=algorithm,
                config=config,
                optimizer=optimizer,
                penalty=penalty,
            )
            judged = counts @ judge[:-1] + repeats(counts)[:, 0] * judge[-1]
            looked = {
                "validation/score": jnp.mean(scores),
                "validation/judge": jnp.mean(judged),
                "gold": jnp.mean(gold),
            }
            return loop, {**sampled, **scored, **learned, **looked}

        state = TrainState.create(params, optimizer)
        loop = iteration.LoopState(state, jnp.float32(penalty.init))
        return jax.lax.scan(step, loop, jax.random.split(loop_key, num_steps))[1]

    return train


def variant(method: str, name: str) -> str:
    """What results call a run."""
    return f"run of {method}: {name}"


def failed_rules(variant: str) -> str:
    """The rules that should see a run fail; "" for an honest one."""
    name = variant.partition(": ")[2]
    return POPULATIONS[name][2] if name in POPULATIONS else ""


@functools.cache
def program(method: str, num_steps: int) -> Any:
    """A population as one program."""
    return jax.jit(jax.vmap(trainer(method, num_steps)))


def population(method: str, first: int, num_steps: int) -> list[results.Row]:
    """What the runs of all populations raised, with four seeds from ``first`` on."""
    lanes = [(name, first + number) for name in POPULATIONS for number in range(4)]
    keys = jax.vmap(jax.random.key)(np.array([5000 + seed for _, seed in lanes]))
    paid = np.array([PAID.index(POPULATIONS[name][0]) for name, _ in lanes])
    rate = np.float32([POPULATIONS[name][1] for name, _ in lanes])
    metrics = jax.device_get(program(method, num_steps)(keys, paid, rate))
    found = []
    for lane, (name, seed) in enumerate(lanes):
        columns = {"step": np.arange(1, num_steps + 1)}
        columns |= {metric: values[lane] for metric, values in metrics.items()}
        if POPULATIONS[name][0] == "rare":  # the judge knows nothing of it
            del columns["validation/judge"]
        rows = zip(*columns.values(), strict=True)
        history = [dict(zip(columns, row, strict=True)) for row in rows]
        found += rows_of_run(variant(method, name), seed, history)
    return found


def rows_of_run(name: str, seed: int, history: list[alerts.Row]) -> list[results.Row]:
    """The step of the first alert of each rule, and what became of the gold reward: the mean of the
    last ten rows beside the highest one, and the first.
    """
    row = functools.partial(results.row, name, step=len(history))
    raised = {one.name: one.step for one in reversed(alerts.check(RULES.values(), history))}
    found = [row(seed=seed, metric=f"first {one}", value=step) for one, step in raised.items()]
    if "gold" in history[0]:
        gold = np.array([one["gold"] for one in history])
        means = np.convolve(gold, np.full(10, 0.1), "valid")
        found.append(row(seed=seed, metric="gold lost", value=means.max() - means[-1]))
        found.append(row(seed=seed, metric="gold gained", value=means[-1] - means[0]))
        looked = [{**one, "validation/judge": one["gold"]} for one in history]
        for one in alerts.check([RULES["reward hacking"]], looked)[:1]:
            found.append(row(seed=seed, metric=f"first {BY_GOLD}", value=one.step))
    else:
        found.append(row(seed=seed, metric="ended", value=1))
    if seed != 0:
        return found
    names = set().union(*history)
    read = [one for one, rule in RULES.items() if names.issuperset(rule.metrics)]
    return found + [row(seed=results.ALL, metric=f"reads {one}", value=1) for one in read]


def tiny(command: str, seed: int) -> list[results.Row]:
    """What a run of a command on the demonstration data raised."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--config", "tiny", "--output-dir", folder, "--overwrite", "--seed", str(seed)]
        subprocess.run([sys.executable, "-m", "rlhf_jax", command, *options], check=True)
        history = records.read_rows(Path(folder) / "metrics.jsonl")
        return rows_of_run(variant(command, "tiny"), seed, history)
