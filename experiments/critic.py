"""Does PPO's critic earn its place? Seven tasks, and one that nothing was chosen on.

    python experiments/critic.py --out critic.json

A network of one layer learns from scratch, with equal numbers of samples for all methods:

- ``sparse``: one letter at the place of twelve that the prompt names pays 1, at the end;
- ``dense``: each of twelve letters that follows the one before it in the alphabet pays at once;
- ``long``: of 64 letters the first decides: it must be the prompt's;
- ``reward model``: a network pays, which has learned from noisy comparisons of texts of letters;
- ``sum``: sixteen letters, as numbers, pay minus the distance of their sum from the one that the
  prompt names: rewards of tens;
- ``rise``: of sixteen letters each that comes later in the alphabet than the one before it pays
  .01, at the end;
- ``match``: of ten letters, each that is odd where the prompt is, or even, pays .3, and each other
  costs 1, at once. These three were held out in their turn, until the first two showed that a
  critic in units of reward fails there, and the weight of the value loss was chosen on all;
- ``thrice``: of sixteen letters three are to be the prompt's; each more or less costs 1, at the
  end. No setting was chosen on this task.

Rates and seeds are lanes of one program (``jax.vmap``). Four seeds choose the rate of a method, and
twelve others measure it at all rates.
"""

import functools
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import results
import tyro
from algorithms import done_before
from jax import Array

from rlhf_jax import (
    Comparisons,
    Rollout,
    TrainState,
    cli,
    models,
    ppo,
    reward_model,
    rewards,
    rloo,
    rollout,
    sampling,
    vpg,
)
from rlhf_jax.errors import logger
from rlhf_jax.training.rl.critic import as_value_head, split
from rlhf_jax.types import Params

LETTERS = 20
PAD = LETTERS
LONGEST = 64
ENGLISH = (
    "the old man made some bread and a pot of tea in his garden home and gave it all to the poor"
)
VOWELS = "aeio"
NETWORK = models.GPT2Config(
    vocab_size=LETTERS + 1,
    max_length=1 + LONGEST,
    hidden_size=32,
    num_layers=1,
    num_heads=2,
    initializer_range=0.1,
)
MODEL = models.build(NETWORK)
SCORE_FN = models.score_fn(MODEL)
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
MEAN = "mean score"
AT_DEFAULT = f"{MEAN} at 0.003"  # the package's rate for a network of this size
FINAL = "final score"
EXPLAINED = "explained variance"
OURS = ("PPO, 1 pass", "PPO, 4 passes")
AGAINST = ("no critic", "PPO before", "RLOO", "VPG")  # with which PPO is compared


class Method(NamedTuple):
    """An algorithm with its settings."""

    module: Any
    config: Any
    changes: dict[str, float] = {}  # noqa: RUF012 (of settings, which need no other program)
    value: str = "shared"  # a head of the policy; "separate": its own network; "judge": from that
    only: str = ""  # the task that it is for; "": all


# As PPO was until its defaults changed, and as it is in lm-human-preferences and TRL.
BEFORE = ppo.Config(
    num_epochs=4,
    gae_lambda=0.95,
    value_clip=0.2,
    value_coef=0.1,
    normalize_returns=False,
    whiten_advantages=True,
)
NO_CRITIC = {"value_coef": 0.0}  # a head that learns nothing stays 0
METHODS = {
    "PPO, 1 pass": Method(ppo, ppo.Config(num_epochs=1)),
    "PPO, 1 pass, no critic": Method(ppo, ppo.Config(num_epochs=1), NO_CRITIC),
    "PPO, 1 pass, lambda 0.95": Method(ppo, ppo.Config(num_epochs=1), {"gae_lambda": 0.95}),
    "PPO, 1 pass, raw returns": Method(
        ppo, ppo.Config(num_epochs=1, normalize_returns=False), {"value_coef": 1.0}
    ),
    "VPG": Method(vpg, vpg.Config()),
    "RLOO": Method(rloo, rloo.Config()),
    "PPO, 4 passes": Method(ppo, ppo.Config(num_epochs=4)),
    "PPO, 4 passes, no critic": Method(ppo, ppo.Config(num_epochs=4), NO_CRITIC),
    "PPO before": Method(ppo, BEFORE),
    "PPO, 4 passes, separate critic": Method(ppo, ppo.Config(num_epochs=4), value="separate"),
    "PPO, 4 passes, critic from the reward model": Method(
        ppo, ppo.Config(num_epochs=4), value="judge", only="reward model"
    ),
}


class Sizes(NamedTuple):
    """How much is trained."""

    seeds: int = 4  # of a call: one call chooses the rates, ``calls`` measure
    calls: int = 3
    comparisons: int = 60  # steps of the reward model
    last: int = 10  # steps whose mean is the final score
    most_steps: int = 100


FULL = Sizes()


class Task(NamedTuple):
    """What the prompts ask for, and what the answers are paid."""

    length: int  # of an answer
    num_prompts: int  # a prompt is one letter, below this
    pay: Callable[[Rollout, Params], Rollout]  # with scores, or with dense rewards
    steps: int = 60
    batch_size: int = 32  # answers a step


def right_letter(batch: Rollout, judge: Params) -> Rollout:
    """1 for the first letter of the alphabet at the place that the prompt names."""
    at_place = jnp.take_along_axis(batch.tokens[:, 1:], batch.tokens[:, :1], axis=1)
    return batch.replace(scores=jnp.float32(at_place[:, 0] == 0))


def prompts_letter(batch: Rollout, judge: Params) -> Rollout:
    """1 for an answer that begins with the prompt's letter."""
    return batch.replace(scores=jnp.float32(batch.tokens[:, 1] == batch.tokens[:, 0]))


def next_letters(batch: Rollout, judge: Params) -> Rollout:
    """For each letter that follows the one before it in the alphabet its share, at once."""
    follows = batch.tokens[:, 1:] == (batch.tokens[:, :-1] + 1) % LETTERS
    paid = jnp.pad(follows / follows.shape[1], [(0, 0), (1, 0)])
    return batch.replace(rewards=paid, dense=True)


def by_model(batch: Rollout, judge: Params) -> Rollout:
    """What a reward model gives."""
    scores = SCORE_FN(judge, batch.tokens, batch.attention_mask, None)
    return batch.replace(scores=scores)


def near_sum(batch: Rollout, judge: Params) -> Rollout:
    """Minus the distance of the letters' sum, as numbers, from ten times the prompt."""
    total = jnp.sum(batch.tokens[:, 1:], axis=1)
    return batch.replace(scores=-jnp.abs(total - 10.0 * batch.tokens[:, 0]))


def rising(batch: Rollout, judge: Params) -> Rollout:
    """.01 for each letter that comes later in the alphabet than the one before it."""
    rises = batch.tokens[:, 2:] > batch.tokens[:, 1:-1]
    return batch.replace(scores=0.01 * jnp.sum(rises, axis=1))


def matching(batch: Rollout, judge: Params) -> Rollout:
    """At once .3 for a letter that is odd where the prompt is, or even, and -1 for another one."""
    is_right = batch.tokens[:, 1:] % 2 == batch.tokens[:, :1] % 2
    paid = jnp.pad(jnp.where(is_right, 0.3, -1.0), [(0, 0), (1, 0)])
    return batch.replace(rewards=paid, dense=True)


def three_times(batch: Rollout, judge: Params) -> Rollout:
    """Minus how many more or less than three letters are the prompt's."""
    is_prompts = batch.tokens[:, 1:] == batch.tokens[:, :1]
    return batch.replace(scores=-jnp.abs(jnp.sum(is_prompts, axis=1) - 3.0))


TASKS = {
    "sparse": Task(12, 12, right_letter, steps=100, batch_size=64),
    "dense": Task(12, LETTERS, next_letters),
    "long": Task(LONGEST, 8, prompts_letter),
    "reward model": Task(24, LETTERS, by_model),
    "sum": Task(16, LETTERS, near_sum),
    "rise": Task(16, LETTERS, rising),
    "match": Task(10, LETTERS, matching),
    "thrice": Task(16, LETTERS, three_times),
}


def texts(key: Array, num: int, length: int) -> Array:
    """Prompts of one letter with texts [num, 1 + length]: from letters that follow one another as
    in ENGLISH to letters at random.
    """
    letters = [sorted(set(ENGLISH) - {" "}).index(one) for one in ENGLISH.replace(" ", "")]
    follow = np.full((LETTERS, LETTERS), 0.1)
    np.add.at(follow, (letters[:-1], letters[1:]), 1.0)
    logits = jnp.log(jnp.asarray(follow / follow.sum(axis=1, keepdims=True)))
    first_key, random_key, next_key = jax.random.split(key, 3)
    first = jax.random.randint(first_key, (num,), 0, LETTERS)
    how_random = jax.random.uniform(random_key, (num, 1))

    def step(letter: Array, key: Array) -> tuple[Array, Array]:
        probabilities = (1 - how_random) * jnp.exp(logits[letter]) + how_random / LETTERS
        letter = jax.random.categorical(key, jnp.log(probabilities))
        return letter, letter

    _, later = jax.lax.scan(step, first, jax.random.split(next_key, length))
    return jnp.concatenate([first[:, None], later.T], axis=1)


def liked(tokens: Array) -> Array:
    """The rule behind the comparisons [N]: vowels, and three times the prompt's letter."""
    order = sorted(set(ENGLISH) - {" "})
    vowels = jnp.array([order.index(one) for one in VOWELS])
    said = tokens[:, 1:]
    is_prompts = said == tokens[:, :1]
    return jnp.sum(jnp.isin(said, vowels) + 3.0 * is_prompts, axis=1)


def judge_of(key: Array, sizes: Sizes) -> Params:
    """A reward model of noisy comparisons, whose scores of texts have mean 0 and variance 1."""
    length = TASKS["reward model"].length
    init_key, train_key, text_key = jax.random.split(key, 3)
    optimizer = optax.adam(3e-3)

    def step(state: TrainState, key: Array) -> tuple[TrainState, None]:
        first_key, second_key, choice_key = jax.random.split(key, 3)
        first = texts(first_key, 64, length)
        second = texts(second_key, 64, length).at[:, 0].set(first[:, 0])
        margin = liked(first) - liked(second)
        pair = jnp.stack([first, second], axis=1)
        ones = jnp.ones_like(pair)
        best = 1 - jax.random.bernoulli(choice_key, jax.nn.sigmoid(margin))
        state, _ = reward_model.update(
            state,
            Comparisons(pair, ones, ones.at[:, :, 0].set(0), best=best.astype(jnp.int32)),
            None,
            score_fn=SCORE_FN,
            optimizer=optimizer,
            config=reward_model.Config(),
        )
        return state, None

    params = models.add_head(init_key, MODEL.init(init_key), "score")
    state = TrainState.create(params, optimizer)
    state, _ = jax.lax.scan(step, state, jax.random.split(train_key, sizes.comparisons))
    some = texts(text_key, 256, length)
    scores = SCORE_FN(state.params, some, jnp.ones_like(some), None)
    gain = 1.0 / jnp.std(scores)
    head = state.params["score"] | {"gain": gain, "shift": -gain * jnp.mean(scores)}
    return state.params | {"score": head}


@functools.partial(jax.jit, static_argnames="sizes")
def judges_of(keys: Array, sizes: Sizes) -> Params:
    """Of each lane."""
    return jax.vmap(functools.partial(judge_of, sizes=sizes))(keys)


class Curve(NamedTuple):
    """Measurements [steps] of one run, each before the step's update."""

    score: Array
    explained: Array  # share of the returns' variance; 0 without a critic


def trainer(task: Task, module: Any, config: Any, value: str, sizes: Sizes) -> Callable[..., Curve]:
    """``train(key, judge, rate, changes)``: a whole run, as one pure function."""
    value_model = None if value == "shared" else MODEL
    policy_fn = models.policy_fn(MODEL, prompt_length=1, value_model=value_model)
    sampler = sampling.SamplingConfig(task.length, eos_id=None, pad_id=PAD)
    group_size = getattr(config, "group_size", 1)
    num_steps = min(task.steps, sizes.most_steps)

    def train(key: Array, judge: Params, rate: Array, changes: dict[str, Array]) -> Curve:
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, eps=1e-5))
        changed = replace(config, **changes)
        init_key, run_key = jax.random.split(key)
        start = MODEL.init(init_key)
        with_head = models.add_head(init_key, start, "value")
        if value == "judge":
            with_head = judge | {"value": as_value_head(judge["score"])}
        if value != "shared":  # each clips its own gradients
            start = {"policy": start, "value": with_head}
            optimizer = split(optimizer, optimizer, start)
        elif module.needs_values:
            start = with_head

        def step(state: Any, key: Array) -> tuple[Any, Curve]:
            prompt_key, sample_key, update_key = jax.random.split(key, 3)
            num = task.batch_size // group_size
            prompts = jax.random.randint(prompt_key, (num, 1), 0, task.num_prompts)
            prompts = jnp.repeat(prompts, group_size, axis=0)
            batch = rollout.collect(
                MODEL,
                state.params,
                prompts,
                jnp.ones_like(prompts),
                sample_key,
                sampling=sampler,
                policy_fn=policy_fn,
            )
            batch = task.pay(batch, judge)
            batch = batch.replace(rewards=rewards.kl_shaped(batch, 0.0), scores=None)
            score = jnp.mean(jnp.sum(batch.rewards, axis=1))
            state, metrics = module.update(
                state,
                batch,
                update_key,
                policy_fn=policy_fn,
                optimizer=optimizer,
                config=changed,
            )
            explained = metrics.get("value/explained_variance", jnp.zeros(()))
            return state, Curve(score, explained)

        state = module.State.create(start, optimizer)
        return jax.lax.scan(step, state, jax.random.split(run_key, num_steps))[1]

    return train


@functools.cache
def program(task: str, module: Any, config: Any, value: str, sizes: Sizes) -> Callable[..., Curve]:
    """Runs of seeds and rates, compiled once for all changes of settings."""
    train = trainer(TASKS[task], module, config, value, sizes)
    return jax.jit(jax.vmap(train, in_axes=(0, 0, 0, None)))


class Measured(NamedTuple):
    """What one method did on one task."""

    sweep: np.ndarray  # [rates] mean scores of the seeds that choose
    curves: Curve  # [rates, seeds, steps] of the others


def measure(task: str, method: Method, sizes: Sizes) -> Measured:
    """One program for all calls: rates and seeds are its lanes."""
    train = program(task, method.module, method.config, method.value, sizes)
    traced = [name for name in ("value_coef", "gae_lambda") if hasattr(method.config, name)]
    changes = {name: getattr(method.config, name) for name in traced} | method.changes
    rates = np.repeat(np.float32(RATES), sizes.seeds)

    def run(first: int) -> Curve:
        seeds = first + np.tile(np.arange(sizes.seeds), len(RATES))
        keys = jax.vmap(jax.random.key)(seeds)
        judges = judges_of(keys, sizes) if TASKS[task].pay is by_model else {}
        curves = jax.device_get(train(keys, judges, rates, changes))
        return Curve(*(x.reshape(len(RATES), sizes.seeds, -1) for x in curves))

    sweep = run(1000).score.mean(axis=(1, 2))
    calls = [run(number * sizes.seeds) for number in range(sizes.calls)]
    return Measured(sweep, Curve(*(np.concatenate(x, axis=1) for x in zip(*calls, strict=True))))


def rows_of(variant: str, measured: Measured, sizes: Sizes) -> list[results.Row]:
    """The rows of one method on one task, of seeds and of their means: at every rate, and at the
    chosen one without its name.
    """
    chosen = int(measured.sweep.argmax())
    curves = measured.curves
    num_steps = curves.score.shape[2]
    of_seeds = {
        MEAN: curves.score.mean(axis=2),
        FINAL: curves.score[..., -sizes.last :].mean(axis=2),
        EXPLAINED: np.median(curves.explained[..., num_steps // 2 :], axis=2),
    }
    row = functools.partial(results.row, variant, step=num_steps)
    rows = []
    for metric, values in of_seeds.items():
        named = {metric: values[chosen]}
        if metric == MEAN:
            named |= {f"{MEAN} at {rate:g}": of for rate, of in zip(RATES, values, strict=True)}
        for name, of_rate in named.items():
            rows += [row(seed, metric=name, value=value) for seed, value in enumerate(of_rate)]
    curve = [
        results.row(variant, seed, (number + 1) * sizes.last, "score", value)
        for seed, scores in enumerate(curves.score[chosen])
        for number, value in enumerate(scores.reshape(-1, sizes.last).mean(axis=1))
    ]
    of_all = {"learning rate": RATES[chosen]}
    for rate, value in zip(RATES, measured.sweep, strict=True):
        of_all[f"choosing seeds: {MEAN} at {rate:g}"] = value
    more = [row(results.ALL, metric=metric, value=value) for metric, value in of_all.items()]
    return [*results.over_seeds([*curve, *rows]), *rows, *more]


def comparisons(rows: list[results.Row]) -> list[results.Row]:
    """PPO minus the others of AGAINST on each task, of each seed and as means over the seeds: at
    the chosen rates, and at the default one. docs/write_pages.py makes the intervals of a page.
    """
    values: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        if row["seed"] != results.ALL:
            values.setdefault((row["variant"], row["metric"]), {})[row["seed"]] = row["value"]
    found = []
    for (variant, metric), ours in values.items():
        task, _, name = variant.partition(": ")
        for other in AGAINST:
            full_name = f"{name}, {other}" if other == "no critic" else other
            theirs = values.get((f"{task}: {full_name}", metric))
            if name not in OURS or theirs is None or metric not in (MEAN, AT_DEFAULT):
                continue
            row = functools.partial(results.row, variant, step=rows[-1]["step"])
            what = f"{metric} minus {other}'s"
            found += [
                row(seed, metric=what, value=value - theirs[seed]) for seed, value in ours.items()
            ]
    return [*results.over_seeds(found), *found]


def main(
    out: Path,
    tasks: tuple[str, ...] = tuple(TASKS),
    methods: tuple[str, ...] = tuple(METHODS),
    sizes: tyro.conf.OmitArgPrefixes[Sizes] = FULL,
) -> None:
    """Trains with each method on each task. What the file has is passed over.

    Args:
        out: the file of the results, a table; it grows with each method.
        tasks: which.
        methods: which.
        sizes: of the experiment.
    """
    rows, seconds = done_before(out, sizes)
    started = time.monotonic() - seconds
    for task in tasks:
        for name in methods:
            variant = f"{task}: {name}"
            if METHODS[name].only not in ("", task):
                continue
            if any(row["variant"] == variant for row in rows):
                continue
            measured = measure(task, METHODS[name], sizes)
            rows += rows_of(variant, measured, sizes)
            means = measured.curves.score.mean(axis=(1, 2))
            explained = np.median(measured.curves.explained, axis=(1, 2))
            logger.info(f"{variant}: {means.round(3)} at {RATES}, explained {explained.round(2)}")
            results.write(
                out,
                "python experiments/critic.py --out critic.json",
                time.monotonic() - started,
                [*rows, *comparisons(rows)],
                sizes=sizes._asdict(),
            )


if __name__ == "__main__":
    cli.run_script(lambda: tyro.cli(main, args=sys.argv[1:]))
