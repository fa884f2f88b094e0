"""How much of a result is the seed? 64 reward models and 64 policies as one program each.

    python experiments/seed_variance.py --out seed_variance.json

In a world of overoptimisation.py, with its 256 comparisons, the first weights of reward models and
the order of comparisons are crossed, eight by eight. Four weights by four orders pay policies, of
four sampling keys: 64 again. The variance is split into the factors and what they do together
(random effects). Means of k of the 64 reward models are judged, and pay policies too. Worlds
repeat the whole, for intervals; in each the comparisons and the first policy are fixed.
"""

import functools
import itertools
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import overoptimisation
import results
import scipy.stats
import tyro
from jax import Array
from overoptimisation import Curve, Proxy, Tree, World, take

from rlhf_jax import cli
from rlhf_jax.errors import logger

COMPARISONS = 256
FACTORS = ("weights", "order", "sampling")
N = 64  # answers of which an ensemble chooses the best
TRAINED_ON = "policies on the mean of"
OUTCOMES: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # of gold [..., measurements]
    "gold at the end": lambda gold: gold[..., -1],
    "highest gold": lambda gold: gold.max(axis=-1),
}


class Sizes(NamedTuple):
    """How much is trained."""

    worlds: int = 4
    models: int = 8  # first weights of reward models, and orders
    paying: int = 4  # of these that pay policies
    samplings: int = 4
    numbers: tuple[int, ...] = (1, 2, 4, 8, 10, 16, 32, 64)  # members of ensembles
    draws: int = 200  # ensembles of each number
    trained_on: tuple[int, ...] = (1, 4, 10)  # members that pay a policy
    runs: int = 4  # policies of each
    of_each: overoptimisation.Sizes = overoptimisation.FULL._replace(every=10)


FULL = Sizes()


def components(values: np.ndarray, names: tuple[str, ...]) -> dict[str, float]:
    """{factors: variance} of a crossed design with random effects and one value in each cell.

    A factor is one of the first axes of ``values``; the mean squares are means over further ones.
    The estimates have no bias, so one of a small variance may be below 0. The last, of all factors
    together, has what is left.
    """
    axes = range(len(names))
    sets = [one for num in range(1 + len(names)) for one in itertools.combinations(axes, num)]
    effects: dict[tuple[int, ...], np.ndarray] = {}
    found: dict[tuple[int, ...], float] = {}
    for inside in sets:
        others = tuple(axis for axis in axes if axis not in inside)
        mean = values.mean(axis=others, keepdims=True)
        parts = (effect for smaller, effect in effects.items() if {*smaller} < {*inside})
        effects[inside] = mean - sum(parts, np.zeros(()))

    def cells(inside: tuple[int, ...]) -> int:  # that have the same levels
        return math.prod(values.shape[axis] for axis in axes if axis not in inside)

    for inside in reversed(sets[1:]):
        degrees = math.prod(values.shape[axis] - 1 for axis in inside)
        squares = np.square(effects[inside]).sum(axis=tuple(axes)).mean() * cells(inside) / degrees
        larger = (cells(of) * value for of, value in found.items() if {*inside} < {*of})
        found[inside] = float((squares - sum(larger)) / cells(inside))
    return {" x ".join(names[axis] for axis in inside): found[inside] for inside in sets[1:]}


class Measured(NamedTuple):
    """What is known of one world, as NumPy arrays."""

    gold: np.ndarray  # [pool]
    scores: np.ndarray  # [weights, orders, pool]
    prefers_second: np.ndarray  # [weights, orders, C] in pairs that no model has learned from
    best: np.ndarray  # [C] the annotator's choices
    curves: Curve  # [weights, orders, samplings, measurements]
    of_means: dict[int, Curve]  # {members: [runs, measurements]}
    beside_one: dict[str, float]  # the programs of 64 beside those of one


@jax.jit
def prefers_second(params: overoptimisation.Params, pairs: Array) -> Array:
    """[L, C] of reward models [L] in pairs [C, 2, T]."""
    score = jax.vmap(overoptimisation.in_parts, (0, None))
    return score(params, pairs[:, 1]) > score(params, pairs[:, 0])


@functools.partial(jax.jit, static_argnames="sizes")
def reward_models(world: World, keys: Array, sizes: overoptimisation.Sizes) -> Proxy:
    """Of keys [L, 2], of the first weights and of the order."""

    def one(keys: Array) -> Proxy:
        wrong = jnp.zeros(())
        return overoptimisation.train_proxy(world, 0, COMPARISONS, wrong, keys, sizes)

    return jax.vmap(one)(keys)


@functools.partial(jax.jit, static_argnames="sizes")
def policies(world: World, proxies: Proxy, keys: Array, sizes: overoptimisation.Sizes) -> Curve:
    """Curves [P] of policies on the means of proxies [P, members]."""
    how = jnp.array(overoptimisation.HOW.index("mean"))

    def one(proxies: Proxy, key: Array) -> Curve:
        return overoptimisation.train_policy(world, proxies, None, how, key, sizes)

    return jax.vmap(one)(proxies, keys)


def timed(function: Callable[..., Tree], *args: Any) -> tuple[Tree, float]:
    """What the function returns, and the seconds."""
    started = time.monotonic()
    found = jax.block_until_ready(function(*args))
    return found, time.monotonic() - started


def measure(seed: int, sizes: Sizes) -> Measured:
    """Trains everything in one world."""
    of = sizes.of_each
    world = jax.jit(overoptimisation.make_world, static_argnums=1)(jax.random.key(seed), of)
    init_key, order_key, sample_key, draw_key = jax.random.split(jax.random.key(1000 + seed), 4)

    num = sizes.models
    weights, orders = np.indices((num, num)).reshape(2, -1)
    init_keys, order_keys = jax.random.split(init_key, num), jax.random.split(order_key, num)
    keys = jnp.stack([init_keys[weights], order_keys[orders]], axis=1)
    models, models_time = timed(reward_models, world, keys, of)
    model, model_time = timed(reward_models, world, keys[:1], of)
    votes = prefers_second(models.params, world.pairs[-overoptimisation.OF_JUDGE :])

    shape = (sizes.paying, sizes.paying, sizes.samplings)
    weights, orders, samplings = np.indices(shape).reshape(3, -1)
    sample_keys = jax.random.split(sample_key, sizes.samplings)
    paying = take(models, (num * weights + orders)[:, None])
    curves, policies_time = timed(policies, world, paying, sample_keys[samplings], of)
    curve, policy_time = timed(policies, world, take(paying, np.s_[:1]), sample_keys[:1], of)
    rng = np.random.default_rng(seed)
    drawn = np.array([rng.permutation(num**2) for _ in range(sizes.runs)])
    run_keys = jax.random.split(draw_key, sizes.runs)  # the same for all numbers of members
    paid_by = {k: take(models, drawn[:, :k]) for k in sizes.trained_on}
    of_means = {k: policies(world, means, run_keys, of) for k, means in paid_by.items()}
    apart = 1e6 * jnp.abs(curves.gold[0] - curve.gold[0])
    beside_one = {
        "reward models: times as long": models_time / model_time,
        "reward models: millionths apart": 1e6 * jnp.abs(models.scores[0] - model.scores[0]).max(),
        "policies: times as long": policies_time / policy_time,
        "policies: millionths apart at first": apart[0],
        "policies: millionths apart": apart.max(),
    }
    held_out = world.best[-overoptimisation.OF_JUDGE :]
    scores, votes = (x.reshape(num, num, -1) for x in (models.scores, votes))
    curves = jax.tree.map(lambda x: x.reshape(*shape, -1), curves)
    known = (world.gold_of_pool, scores, votes, held_out, curves, of_means, beside_one)
    return Measured(*jax.device_get(known))


Numbers = dict[tuple[str, int, str], float]  # {(variant, step, metric): value} of one world


def rank_correlation(gold: np.ndarray, scores: np.ndarray) -> float:
    return float(scipy.stats.spearmanr(gold, scores).statistic)


def shares_of(kind: str, outcomes: dict[str, np.ndarray], factors: tuple[str, ...]) -> Numbers:
    """The mean and the deviation of outcomes [factors ...], and each factor's share."""
    found: Numbers = {}
    for outcome, values in outcomes.items():
        parts = components(values, factors)
        whole = sum(parts.values())
        found[f"{kind}: mean", 0, outcome] = values.mean()
        found[f"{kind}: deviation", 0, outcome] = max(whole, 0.0) ** 0.5
        for name, part in parts.items():
            if whole > 0:  # all the same, or estimates that are below 0 together
                found[f"{kind}: {name}", 0, f"share of {outcome}"] = part / whole
    return found


def of_models(measured: Measured) -> Numbers:
    """The split of the reward models, and how often two of them disagree."""
    gold, scores = measured.gold, measured.scores
    ranks = np.array([[rank_correlation(gold, one) for one in of_weights] for of_weights in scores])
    accuracy = (measured.prefers_second == measured.best).mean(axis=2)
    outcomes = {"rank correlation": ranks, "accuracy": accuracy, "score": scores}
    found = shares_of("reward models", outcomes, FACTORS[:2])
    num, votes = len(scores), measured.prefers_second
    flat = votes.reshape(num**2, -1)
    for name, one, other, levels in (
        ("two of other order", votes[:, :, None], votes[:, None], num),
        ("two of other weights", votes[:, None], votes[None], num),
        ("any two", flat[:, None], flat[None], num**2),
    ):  # a model agrees with itself, which is no pair
        found[name, 0, "disagreement"] = (one != other).mean() * levels / (levels - 1)
    return found


def of_policies(curves: Curve, steps: list[int]) -> Numbers:
    """The split of the policies, and the curve with the band of 90% of them."""
    outcomes = {metric: outcome(curves.gold) for metric, outcome in OUTCOMES.items()}
    found = shares_of("policies", outcomes, FACTORS)
    found["policies: mean", 0, "share below the start"] = (outcomes["gold at the end"] < 0).mean()
    distance = np.sqrt(np.maximum(curves.kl.mean(axis=(0, 1, 2)), 0))
    for name in ("gold", "proxy"):
        values = getattr(curves, name).reshape(-1, len(steps))
        lines = {"mean of": values.mean(axis=0)}
        lines |= {f"{p}% of": np.percentile(values, p, axis=0) for p in (5, 95)}
        for line, numbers in lines.items():
            for step, place, value in zip(steps, distance, numbers, strict=True):
                found[f"{name}, {line} the seeds", step, "reward"] = value
                found[f"{name}, {line} the seeds", step, "sqrt(KL)"] = place
    return found


def of_ensembles(measured: Measured, seed: int, sizes: Sizes) -> Numbers:
    """Means of k of the reward models: rank correlation, and gold of the best of N."""
    scores = measured.scores.reshape(-1, measured.scores.shape[2])
    rng = np.random.default_rng(seed)
    best_of = functools.partial(overoptimisation.best_of, measured.gold, n=N)
    found: Numbers = {}
    for k in sizes.numbers:
        values: dict[str, list[float]] = {"rank correlation": [], "best of 64": [], "mean - sd": []}
        for _ in range(sizes.draws if k < len(scores) else 1):
            drawn = scores[rng.choice(len(scores), k, replace=False)]
            mean = drawn.mean(axis=0)
            values["rank correlation"].append(rank_correlation(measured.gold, mean))
            values["best of 64"].append(best_of(mean)[0])
            values["mean - sd"].append(best_of(mean - drawn.std(axis=0))[0])
        for metric, of_draws in values.items():
            found[f"{k} members", 0, metric] = float(np.mean(of_draws))
            for edge, at in zip((5, 95), np.percentile(of_draws, (5, 95)), strict=True):
                found[f"{k} members", 0, f"{metric}: {edge}% of draws"] = at
    few, all_of_them = (f"{k} members" for k in (min(sizes.numbers), max(sizes.numbers)))
    for name, _, metric in [key for key in found if not key[2].endswith("of draws")]:
        least = found[few, 0, metric]
        gain = (found[name, 0, metric] - least) / (found[all_of_them, 0, metric] - least)
        found[name, 0, f"{metric}: share of the gain"] = gain
    return found


def of_trained(of_means: dict[int, Curve]) -> Numbers:
    """Policies on the means of k, and how much higher they are than those on one model."""
    found: Numbers = {}
    alone = of_means[min(of_means)]
    for (k, curve), (metric, outcome) in itertools.product(of_means.items(), OUTCOMES.items()):
        value = outcome(curve.gold).mean()
        found[f"{TRAINED_ON} {k}", 0, metric] = value
        found[f"{TRAINED_ON} {k}", 0, f"{metric}: gain"] = value - outcome(alone.gold).mean()
    return found


def main(out: Path, sizes: tyro.conf.OmitArgPrefixes[Sizes] = FULL) -> None:
    """Trains in all worlds, splits the variance, and writes what came out.

    Args:
        out: the file of the results, a table.
        sizes: of the experiment.
    """
    started, of = time.monotonic(), sizes.of_each
    steps = list(range(of.every, of.steps + 1, of.every))
    rows = []
    for seed in range(sizes.worlds):
        measured = measure(seed, sizes)
        found = of_models(measured) | of_policies(measured.curves, steps)
        found |= of_ensembles(measured, seed, sizes) | of_trained(measured.of_means)
        for name, value in measured.beside_one.items():
            if seed or "times" not in name:  # the first world compiles
                found["64 beside one", 0, name] = float(value)
        rows += [results.row(name, seed, *at, value) for (name, *at), value in found.items()]
        logger.info(f"world {seed}: {time.monotonic() - started:.0f} s")
    splits = [row for row in rows if row["variant"].startswith(("policies:", "reward models:"))]
    results.write(
        out,
        "python experiments/seed_variance.py --out seed_variance.json",
        time.monotonic() - started,
        [*results.over_seeds(rows), *splits],
        sizes=sizes._asdict() | {"of_each": of._asdict()},
    )


if __name__ == "__main__":
    cli.run_script(lambda: tyro.cli(main, args=sys.argv[1:]))
