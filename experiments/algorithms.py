"""Which algorithm learns most from the same samples? Ten methods, two tasks, twelve seeds at once.

    python experiments/algorithms.py --out algorithms.json

A small network is asked to write a word of four letters backwards. A short supervised training,
the same for all methods, leaves it with about one right word in fifteen. In the task ``each
letter`` a reward then pays for each right letter, in ``whole word`` for a word without a mistake
alone. Every method sees the same number of samples, the same prompts and the same first network,
and makes four steps of each batch. Its learning rate is the best of four on seeds of their own;
then twelve other seeds measure it. Rates, tasks and seeds are lanes of one program (``jax.vmap``),
which is compiled once for each method.

Scores are of words that no method trains on: interquartile means over the seeds with bootstrap
intervals (Agarwal et al. 2021, "Deep RL at the edge of the statistical precipice").
"""

import functools
import json
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
import scipy.stats
import tyro
from jax import Array

from rlhf_jax import (
    Demonstrations,
    TrainState,
    cli,
    grpo,
    metrics,
    models,
    ops,
    ppo,
    rewards,
    rloo,
    rollout,
    sampling,
    sft,
)
from rlhf_jax.errors import UserError, logger
from rlhf_jax.types import Params

LETTERS = 8
LENGTH = 4  # letters of a word
NETWORK = models.GPT2Config(
    vocab_size=LETTERS + 1,  # the last is the pad, which no word has
    max_length=2 * LENGTH,
    hidden_size=32,
    num_layers=1,
    num_heads=2,
    initializer_range=0.1,
)
MODEL = models.build(NETWORK)
POLICY_FN = models.policy_fn(MODEL, prompt_length=LENGTH)
SAMPLER = sampling.SamplingConfig(LENGTH, eos_id=None, pad_id=LETTERS)
TASKS = ("each letter", "whole word")
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
BEST_OF = 8
FINAL = "final score"
MEAN = "mean score"
KL = "KL from the first policy"

PASSES: dict[str, Any] = {"num_epochs": 2, "num_minibatches": 2}
GROUPED: dict[str, Any] = {**PASSES, "group_size": 8}
OF_GRPO: dict[str, Any] = {**GROUPED, "kl_loss_coef": 0.0}
# Each with the values of its preset in configs/algorithms/ that do not depend on a run's size.
# PPO's rewards are not whitened here, and DAPO does not sample dynamically.
METHODS: dict[str, tuple[Any, Any]] = {
    "PPO": (
        ppo,
        ppo.Config(
            **PASSES,
            gae_lambda=0.95,
            value_clip=0.2,
            value_coef=0.1,
            normalize_returns=False,
        ),
    ),
    "RLOO": (rloo, rloo.Config(**GROUPED)),
    "REINFORCE++": (
        rloo,
        rloo.Config(
            **PASSES,
            group_size=1,
            baseline="global",
            aggregate="sequence",
        ),
    ),
    "GRPO": (grpo, grpo.Config(**OF_GRPO)),
    "Dr. GRPO": (
        grpo,
        grpo.Config(
            **OF_GRPO,
            scale=False,
            aggregate="fixed",
            length=LENGTH,
        ),
    ),
    "DAPO": (grpo, grpo.Config(**OF_GRPO, aggregate="token", clip_high=0.28)),
    "GSPO": (
        grpo,
        grpo.Config(
            **OF_GRPO,
            ratio="sequence",
            clip_low=3e-4,
            clip_high=4e-4,
        ),
    ),
    "CISPO": (
        grpo,
        grpo.Config(
            **OF_GRPO,
            aggregate="token",
            surrogate="cispo",
            clip_low=1.0,
            clip_high=4.0,
        ),
    ),
    "SAPO": (grpo, grpo.Config(**OF_GRPO, surrogate="sapo")),
    "VESPO": (
        grpo,
        grpo.Config(
            **OF_GRPO,
            aggregate="token",
            surrogate="vespo",
            ratio="product",
        ),
    ),
}
AGAINST = ("PPO", "GRPO")  # with which each method is compared


class Sizes(NamedTuple):
    """How much is trained."""

    demonstrations: int = 18  # steps of supervised training
    steps: int = 80
    batch_size: int = 64  # answers a step
    held_out: int = 32  # further answers a step, which measure
    every: int = 8  # steps of which a measurement is the mean
    sweep_seeds: int = 3  # for each rate; as many lanes measure the rate that was chosen


FULL = Sizes()


def words(key: Array, num: int, held_out: bool) -> Array:
    """Words [num, LENGTH]. Held out are those whose letters add up to a multiple of four."""
    free = jax.random.randint(
        key,
        (num, LENGTH),
        0,
        LETTERS,
    )
    rest = jnp.sum(free[:, 1:], axis=1)
    added = jnp.zeros((num,), jnp.int32) if held_out else 1 + free[:, 0] % 3
    first = (added - rest) % 4 + 4 * (free[:, 0] // 4)
    return free.at[:, 0].set(first)


def score(tokens: Array, whole: Array) -> Array:
    """[B] what the answers are paid: the share of right letters, or 1 for a right word."""
    is_right = tokens[:, LENGTH:] == tokens[:, :LENGTH][:, ::-1]
    share = jnp.mean(is_right, axis=1)
    return jnp.where(whole, jnp.all(is_right, axis=1), share)


class Start(NamedTuple):
    """Where all methods begin."""

    params: Params
    score: Array  # [tasks] of an answer to held-out words
    best: Array  # [tasks] of the best of BEST_OF answers


def begin(key: Array, sizes: Sizes) -> Start:
    """A network that has seen some right answers."""
    init_key, train_key, sample_key = jax.random.split(key, 3)
    optimizer = optax.adam(3e-3)

    def step(state: TrainState, key: Array) -> tuple[TrainState, None]:
        asked = words(key, sizes.batch_size, held_out=False)
        tokens = jnp.concatenate([asked, asked[:, ::-1]], axis=1)
        ones = jnp.ones_like(tokens)
        is_answer = ones.at[:, :LENGTH].set(0)
        batch = Demonstrations(tokens, ones, is_answer)
        config = sft.Config()
        state, _ = sft.update(
            state, batch, None, policy_fn=POLICY_FN, optimizer=optimizer, config=config
        )
        return state, None

    state = TrainState.create(MODEL.init(init_key), optimizer)
    state, _ = jax.lax.scan(step, state, jax.random.split(train_key, sizes.demonstrations))
    word_key, answer_key = jax.random.split(sample_key)
    asked = jnp.repeat(words(word_key, 8 * sizes.held_out, held_out=True), BEST_OF, axis=0)
    ones = jnp.ones_like(asked)
    said = sampling.generate(
        MODEL,
        state.params,
        asked,
        ones,
        answer_key,
        config=SAMPLER,
    )
    scores = jnp.stack([score(said.tokens, whole) for whole in (False, True)])
    best = jnp.max(scores.reshape(len(TASKS), -1, BEST_OF), axis=2)
    return Start(state.params, jnp.mean(scores, axis=1), jnp.mean(best, axis=1))


class Curve(NamedTuple):
    """Measurements [steps] of one run, each before the step's update."""

    score: Array
    kl: Array  # nats an answer, from the first policy


def trainer(name: str, sizes: Sizes) -> Callable[[Params, Array, Array, Array], Curve]:
    """``train(start, key, rate, whole)``: a whole run, as one pure function."""
    algorithm, config = METHODS[name]

    def train(start: Params, key: Array, rate: Array, whole: Array) -> Curve:
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, eps=1e-5))
        if algorithm.needs_values:
            start = models.add_head(key, start, "value")

        def step(state: TrainState, key: Array) -> tuple[TrainState, Curve]:
            word_key, held_out_key, sample_key, update_key = jax.random.split(key, 4)
            num_words = sizes.batch_size // config.group_size
            asked = words(word_key, num_words, held_out=False)
            asked = jnp.repeat(asked, config.group_size, axis=0)
            prompts = jnp.concatenate([asked, words(held_out_key, sizes.held_out, held_out=True)])
            batch = rollout.collect(
                MODEL,
                state.params,
                prompts,
                jnp.ones_like(prompts),
                sample_key,
                sampling=SAMPLER,
                policy_fn=POLICY_FN,
            )
            batch = batch.replace(scores=score(batch.tokens, whole))
            lesson = jax.tree.map(lambda x: x[: sizes.batch_size], batch)
            exam = jax.tree.map(lambda x: x[sizes.batch_size :], batch)
            of_start = POLICY_FN(
                start,
                exam.tokens,
                exam.attention_mask,
                None,
            )
            kl = ops.response_sums(ops.kl(exam.log_probs, of_start.log_probs), exam)
            lesson = lesson.replace(rewards=rewards.kl_shaped(lesson, 0.0))
            state, _ = algorithm.update(
                state,
                lesson,
                update_key,
                policy_fn=POLICY_FN,
                optimizer=optimizer,
                config=config,
            )
            return state, Curve(jnp.mean(exam.scores), jnp.mean(kl))

        state = TrainState.create(start, optimizer)
        return jax.lax.scan(step, state, jax.random.split(key, sizes.steps))[1]

    return train


class Measured(NamedTuple):
    """What one method did."""

    curves: Curve  # [tasks, seeds, steps]
    rates: list[float]  # [tasks], chosen
    sweep: np.ndarray  # [tasks, rates] mean scores
    seconds: float  # of the measured runs


def measure(name: str, starts: Start, sizes: Sizes) -> Measured:
    """Chooses a rate for each task on seeds of their own, then trains with the others."""
    num_lanes = len(RATES) * sizes.sweep_seeds
    both = np.repeat([False, True], num_lanes)
    many = jax.jit(jax.vmap(trainer(name, sizes)))

    def run(seeds: np.ndarray, rates: np.ndarray) -> Curve:
        """[tasks, lanes, steps], of seeds [lanes] and rates [tasks, lanes]."""
        lanes = np.tile(seeds, len(TASKS))
        params = jax.tree.map(lambda x: x[lanes], starts.params)
        keys = jax.vmap(jax.random.key)(lanes)
        curves = jax.device_get(
            many(
                params,
                keys,
                np.float32(rates.ravel()),
                both,
            )
        )
        return Curve(*(x.reshape(len(TASKS), num_lanes, -1) for x in curves))

    sweep_seeds = num_lanes + np.tile(np.arange(sizes.sweep_seeds), len(RATES))
    rates = np.repeat(RATES, sizes.sweep_seeds)
    sweep = run(sweep_seeds, np.tile(rates, (len(TASKS), 1))).score.mean(axis=2)
    means = sweep.reshape(len(TASKS), len(RATES), -1).mean(axis=2)
    chosen = [RATES[number] for number in means.argmax(axis=1)]
    began = time.monotonic()
    curves = run(np.arange(num_lanes), np.repeat(np.array(chosen)[:, None], num_lanes, axis=1))
    return Measured(
        curves,
        chosen,
        means,
        time.monotonic() - began,
    )


def interquartile(values: np.ndarray) -> dict[str, float]:
    """The interquartile mean {"": , " low": , " high": } of seeds [S], with a 95% interval by
    bootstrap.
    """
    mean = functools.partial(scipy.stats.trim_mean, proportiontocut=0.25)
    value = float(mean(values))
    drawn = np.random.default_rng(0).choice(values, (2000, len(values)))
    low, high = np.percentile(mean(drawn, axis=1), [2.5, 97.5])
    return {"": value, " low": float(low), " high": float(high)}


def difference(values: np.ndarray, others: np.ndarray, num: int) -> dict[str, float]:
    """The mean difference {"": , " low": , " high": } of paired seeds [S], with Student's interval
    that all of ``num`` such comparisons keep with 95% (Bonferroni).
    """
    differences = values - others
    interval = metrics.student(differences, level=1 - 0.05 / num)
    return results.with_edges(differences.mean(), interval)


def rows_of(task: int, name: str, measured: Measured, sizes: Sizes) -> list[results.Row]:
    """The rows of one method on one task."""
    variant = f"{TASKS[task]}: {name}"
    rows = []
    curve = Curve(*(x[task] for x in measured.curves))
    stretches = curve.score.reshape(len(curve.score), -1, sizes.every).mean(axis=2)
    for number, values in enumerate(stretches.T, start=1):
        for edge, value in interquartile(values).items():
            step = number * sizes.every
            rows.append(
                results.row(
                    variant,
                    results.ALL,
                    step,
                    f"score{edge}",
                    value,
                )
            )
    of_seeds = {
        FINAL: stretches[:, -1],
        MEAN: curve.score.mean(axis=1),
        KL: curve.kl[:, -sizes.every :].mean(axis=1),
    }
    last = functools.partial(results.row, variant, step=sizes.steps)
    for metric, values in of_seeds.items():
        for edge, value in interquartile(values).items():
            rows.append(last(seed=results.ALL, metric=metric + edge, value=value))
        for seed, value in enumerate(values):
            rows.append(last(seed=seed, metric=metric, value=value))
    of_all = {"learning rate": measured.rates[task], "seconds, all lanes": measured.seconds}
    for rate, mean in zip(RATES, measured.sweep[task], strict=True):
        of_all[f"sweep: mean score at {rate:g}"] = mean
    for metric, value in of_all.items():
        rows.append(last(seed=results.ALL, metric=metric, value=value))
    return rows


def comparisons(rows: list[results.Row]) -> list[results.Row]:
    """Each method against those of AGAINST, in the final and in the mean score, by the rows of
    single seeds.
    """
    values: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row["seed"] != results.ALL:
            values.setdefault((row["variant"], row["metric"]), []).append(row["value"])
    variants = list(dict.fromkeys(variant for variant, _ in values))
    num = max(len(variants) - len(TASKS), 1)
    found = []
    for variant in variants:
        task, _, name = variant.partition(": ")
        for other in AGAINST:
            if name == other or f"{task}: {other}" not in variants:
                continue
            for metric in (FINAL, MEAN):
                ours, theirs = (values[one, metric] for one in (variant, f"{task}: {other}"))
                for edge, value in difference(np.array(ours), np.array(theirs), num).items():
                    what = f"{metric} minus {other}'s{edge}"
                    last = rows[-1]["step"]
                    found.append(
                        results.row(
                            variant,
                            results.ALL,
                            last,
                            what,
                            value,
                        )
                    )
    return found


def rows_of_start(starts: Start, num_lanes: int) -> list[results.Row]:
    """The first policy, and the best of BEST_OF of its answers."""
    rows = []
    measured = {"first policy": starts.score, f"best of {BEST_OF}": starts.best}
    for name, scores in measured.items():
        for task, values in zip(TASKS, np.asarray(scores)[:num_lanes].T, strict=True):
            for edge, value in interquartile(values).items():
                variant = f"{task}: {name}"
                rows.append(
                    results.row(
                        variant,
                        results.ALL,
                        0,
                        FINAL + edge,
                        value,
                    )
                )
    return rows


def done_before(out: Path, sizes: Sizes) -> tuple[list[results.Row], float]:
    """The rows and the seconds of an earlier call with these sizes; no comparisons."""
    if not out.exists():
        return [], 0.0
    content = json.loads(out.read_text("utf-8"))
    if content["sizes"] != sizes._asdict():
        raise UserError(f"{out}: its results are of other sizes; give another --out")
    rows = [row for row in content["rows"] if " minus " not in row["metric"]]
    return rows, content["seconds"]


def main(
    out: Path,
    methods: tuple[str, ...] = tuple(METHODS),
    sizes: tyro.conf.OmitArgPrefixes[Sizes] = FULL,
) -> None:
    """Trains each method on each task, and says what came out. Methods that the file has are passed
    over.

    Args:
        out: the file of the results, a table; it grows with each method.
        methods: which.
        sizes: of the experiment.
    """
    rows, seconds = done_before(out, sizes)
    started = time.monotonic() - seconds
    num_lanes = len(RATES) * sizes.sweep_seeds
    keys = jax.vmap(jax.random.key)(1000 + np.arange(num_lanes + sizes.sweep_seeds))
    starts = jax.jit(jax.vmap(functools.partial(begin, sizes=sizes)))(keys)
    if not rows:
        rows += rows_of_start(starts, num_lanes)
    for name in methods:
        if any(row["variant"] == f"{TASKS[0]}: {name}" for row in rows):
            continue
        measured = measure(name, starts, sizes)
        for task in range(len(TASKS)):
            rows += rows_of(
                task,
                name,
                measured,
                sizes,
            )
        scores = measured.curves.score[..., -sizes.every :].mean(axis=(1, 2))
        logger.info(
            f"{name}: {', '.join(TASKS)}: {scores.round(3)} at rates {measured.rates}, "
            f"{measured.seconds:.0f} s"
        )
        command = "python experiments/algorithms.py --out algorithms.json"
        seconds = time.monotonic() - started
        table = [*rows, *comparisons(rows)]
        results.write(
            out,
            command,
            seconds,
            table,
            sizes=sizes._asdict(),
        )


if __name__ == "__main__":
    cli.run_script(lambda: tyro.cli(main, args=sys.argv[1:]))
