"""Which objective keeps several answers alive? MaxRL, GRPO, RLOO and pass@8, twelve seeds at once.

    python experiments/pass_at_k.py --out pass_at_k.json

A prompt is one of sixteen letters, an answer another letter. Which answer is right cannot be told
from the prompt alone: of eight answers, in an order of the prompt's own, the first is right half as
often again as the second, and so on. So the best policy for one answer says the likeliest one
alone, the best for eight spreads over several, and the likelihood is highest where answers are as
frequent as they are right. A step samples sixteen answers to each of sixteen prompts, whose right
answer is drawn anew and pays 1.

A small network learns from scratch. All its answers can be listed, so pass@k is exact. Rates and
seeds are lanes of one program (``jax.vmap``): three seeds choose the rate of a method, by the mean
of pass@1 and pass@8 at the end, and twelve others measure it.
"""

import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import results
import scipy.optimize
import tyro
from jax import Array

from rlhf_jax import TrainState, cli, grpo, models, rloo, rollout, sampling
from rlhf_jax.algorithms import maxrl, pass_at_k
from rlhf_jax.errors import logger
from rlhf_jax.types import Params

LETTERS = 16
NETWORK = models.GPT2Config(
    vocab_size=LETTERS + 1,  # the last is the pad
    max_length=2,
    hidden_size=32,
    num_layers=1,
    num_heads=2,
    initializer_range=0.1,
)
MODEL = models.build(NETWORK)
POLICY_FN = models.policy_fn(MODEL, prompt_length=1)
SAMPLER = sampling.SamplingConfig(1, eos_id=None, pad_id=LETTERS)
GROUP = 16
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
KS = (1, 8)
LIKELIHOOD = "log-likelihood of the right answer"
METHODS: dict[str, tuple[Any, Any]] = {
    "RLOO": (rloo, rloo.Config(group_size=GROUP)),
    "GRPO": (grpo, grpo.Config(group_size=GROUP, kl_loss_coef=0.0)),
    "MaxRL": (maxrl, maxrl.Config(group_size=GROUP)),
    "pass@8": (pass_at_k, pass_at_k.Config(group_size=GROUP, k=8)),
}


class Sizes(NamedTuple):
    """How much is trained."""

    steps: int = 300
    every: int = 10  # steps between measurements
    sweep_seeds: int = 3  # for each rate
    seeds: int = 12


FULL = Sizes()


def frequencies() -> np.ndarray:
    """[prompts, answers] how often each answer is right."""
    orders = np.random.default_rng(0).permuted(np.tile(np.arange(LETTERS), (LETTERS, 1)), axis=1)
    shares = (2 / 3) ** np.arange(8)
    found = np.zeros((LETTERS, LETTERS))
    np.put_along_axis(found, orders[:, :8], shares / shares.sum(), axis=1)
    return found


FREQUENCIES = frequencies()


def passes(policy: Array, frequency: Array, k: int) -> Array:
    """The expected pass@k [...] of policies [..., answers], of right answers with a frequency."""
    return (frequency * (1 - (1 - policy) ** k)).sum(-1)


def best(frequency: np.ndarray, k: int) -> np.ndarray:
    """The policy [answers] with the highest pass@k: all answers that it gives gain equally."""
    if k == 1:
        return np.eye(len(frequency))[frequency.argmax()]
    known = np.maximum(frequency, 1e-12)

    def policy(gain: float) -> np.ndarray:
        return np.maximum(1 - (gain / known) ** (1 / (k - 1)), 0)

    gain = scipy.optimize.brentq(lambda gain: policy(gain).sum() - 1, 1e-12, 1.0)
    return policy(gain)


class Curve(NamedTuple):
    """Measurements of one run, after each ``every`` steps; means over the prompts."""

    passes: Array  # [measurements, KS]
    likelihood: Array


def measured(params: Params) -> Curve:
    """By the probabilities of all answers to all prompts."""
    letters = jnp.arange(LETTERS)
    pairs = jnp.stack(jnp.meshgrid(letters, letters, indexing="ij"), axis=2).reshape(-1, 2)
    log_probs = POLICY_FN(params, pairs, jnp.ones_like(pairs), None).log_probs[:, 1]
    log_probs = log_probs.reshape(LETTERS, LETTERS)
    of_k = [jnp.mean(passes(jnp.exp(log_probs), FREQUENCIES, k)) for k in KS]
    return Curve(jnp.stack(of_k), jnp.mean(jnp.sum(FREQUENCIES * log_probs, axis=1)))


def trainer(name: str, sizes: Sizes) -> Callable[[Array, Array], Curve]:
    """``train(key, rate)``: a whole run, as one pure function."""
    algorithm, config = METHODS[name]

    def train(key: Array, rate: Array) -> Curve:
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, eps=1e-5))
        init_key, run_key = jax.random.split(key)

        def step(state: TrainState, key: Array) -> tuple[TrainState, None]:
            right_key, sample_key, update_key = jax.random.split(key, 3)
            prompts = jnp.repeat(jnp.arange(LETTERS), GROUP)[:, None]
            right = jax.random.categorical(right_key, jnp.log(FREQUENCIES))
            batch = rollout.collect(
                MODEL,
                state.params,
                prompts,
                jnp.ones_like(prompts),
                sample_key,
                sampling=SAMPLER,
                policy_fn=POLICY_FN,
            )
            is_right = batch.tokens[:, 1] == jnp.repeat(right, GROUP)
            state, _ = algorithm.update(
                state,
                batch.replace(scores=jnp.float32(is_right)),
                update_key,
                policy_fn=POLICY_FN,
                optimizer=optimizer,
                config=config,
            )
            return state, None

        def stretch(state: TrainState, keys: Array) -> tuple[TrainState, Curve]:
            state, _ = jax.lax.scan(step, state, keys)
            return state, measured(state.params)

        state = TrainState.create(MODEL.init(init_key), optimizer)
        keys = jax.random.split(run_key, (sizes.steps // sizes.every, sizes.every))
        return jax.lax.scan(stretch, state, keys)[1]

    return train


def measure(name: str, sizes: Sizes) -> tuple[Curve, float, np.ndarray]:
    """The curves of the seeds at the rate that was chosen, the rate, and the means [rates] that
    chose it.
    """
    many = jax.jit(jax.vmap(trainer(name, sizes)))

    def run(seeds: np.ndarray, rates: np.ndarray) -> Curve:
        return jax.device_get(many(jax.vmap(jax.random.key)(seeds), np.float32(rates)))

    seeds = 1000 + np.tile(np.arange(sizes.sweep_seeds), len(RATES))
    sweep = run(seeds, np.repeat(RATES, sizes.sweep_seeds)).passes[:, -1].mean(axis=1)
    means = sweep.reshape(len(RATES), -1).mean(axis=1)
    rate = RATES[int(means.argmax())]
    return run(np.arange(sizes.seeds), np.full(sizes.seeds, rate)), rate, means


def rows_of(
    name: str, curves: Curve, rate: float, sweep: np.ndarray, sizes: Sizes
) -> list[results.Row]:
    """The rows of one method: curves, which have the final values, and the choice of the rate."""
    row = functools.partial(results.row, name)
    rows = []
    for seed, (of_k, likelihood) in enumerate(zip(*curves, strict=True)):
        for number, (now, mean_log) in enumerate(zip(of_k, likelihood, strict=True), start=1):
            named = {f"pass@{k}": value for k, value in zip(KS, now, strict=True)}
            for metric, value in (named | {LIKELIHOOD: mean_log}).items():
                rows.append(row(seed, number * sizes.every, metric, value))
    of_all = {"learning rate": rate}
    for one, value in zip(RATES, sweep, strict=True):
        of_all[f"choosing seeds: mean of pass@1 and pass@8 at {one:g}"] = value
    more = [row(results.ALL, sizes.steps, metric, value) for metric, value in of_all.items()]
    return [*results.over_seeds(rows), *rows, *more]


def best_rows(sizes: Sizes) -> list[results.Row]:
    """What the best policies for each k, and for the likelihood, have."""
    policies = {f"best for pass@{k}": np.array([best(f, k) for f in FREQUENCIES]) for k in KS}
    policies["best likelihood"] = FREQUENCIES
    rows = []
    for name, policy in policies.items():
        for k in KS:
            value = passes(policy, FREQUENCIES, k).mean()
            rows.append(results.row(name, results.ALL, sizes.steps, f"pass@{k}", value))
    logs = np.log(FREQUENCIES, where=FREQUENCIES > 0, out=np.zeros_like(FREQUENCIES))
    value = (FREQUENCIES * logs).sum(axis=1).mean()
    return [*rows, results.row("best likelihood", results.ALL, sizes.steps, LIKELIHOOD, value)]


def main(out: Path, sizes: tyro.conf.OmitArgPrefixes[Sizes] = FULL) -> None:
    """Trains with each method, and writes what came out.

    Args:
        out: the file of the results, a table.
        sizes: of the experiment.
    """
    started = time.monotonic()
    rows = best_rows(sizes)
    for name in METHODS:
        curves, rate, sweep = measure(name, sizes)
        rows += rows_of(name, curves, rate, sweep, sizes)
        final = curves.passes[:, -1].mean(axis=0)
        logger.info(f"{name}: pass@{KS} {final.round(3)} at {rate}, of {sweep.round(3)}")
    results.write(
        out,
        "python experiments/pass_at_k.py --out pass_at_k.json",
        time.monotonic() - started,
        rows,
        sizes=sizes._asdict(),
    )


if __name__ == "__main__":
    cli.run_script(lambda: tyro.cli(main, args=sys.argv[1:]))
