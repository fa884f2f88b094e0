"""A policy trained on a reward model: does it get better, or only better at pleasing the model?

    python experiments/overoptimisation.py --out overoptimisation.json

The experiment of Gao, Schulman and Hilton (2022, arXiv 2210.10760) at a size for two CPU cores. The
gold reward of an answer of twelve tokens is a fixed function: each token has a value, and a token
that is said more than twice costs more each time. An annotator compares pairs of the first policy's
answers by it, with noise (Bradley and Terry). Reward models, the proxies, learn from 64 to 4096
such comparisons. Then the answers are chosen by a proxy, as the best of n, or the policy is trained
on it, by RLOO without a KL penalty; the gold reward is only measured. Ensembles of proxies (Coste
et al. 2023, arXiv 2310.02743) are trained on too, also after a quarter of the labels was turned
round, the same ones for all members. A judge, a reward model of comparisons of its own, looks on,
for the alerts of a run (hacking_alerts.py), also where the policy is trained on gold itself.

All seeds, numbers of comparisons and ensembles are lanes of the same programs (``jax.vmap``).
"""

import collections
import functools
import sys
import time
from pathlib import Path
from typing import NamedTuple, TypeVar

import hacking_alerts
import jax
import jax.numpy as jnp
import numpy as np
import optax
import results
import scipy.special
import scipy.stats
import tyro
from jax import Array

from rlhf_jax import (
    Comparisons,
    Rollout,
    TrainState,
    cli,
    models,
    ops,
    reward_model,
    rloo,
    rollout,
    sampling,
)
from rlhf_jax.errors import logger
from rlhf_jax.rewards import EnsembleMethod
from rlhf_jax.rewards.functions import combined
from rlhf_jax.types import Params

Tree = TypeVar("Tree")
VOCABULARY = 16
LENGTH = 12  # tokens of an answer; the prompt is the token 0
ENOUGH = 2  # times that a token may be said
SAMPLER = sampling.SamplingConfig(LENGTH, eos_id=None, pad_id=VOCABULARY)
OF_ALL: tuple[EnsembleMethod, ...] = ("mean", "min", "uncertainty")
GOLD = "gold"
HOW = ("one", *OF_ALL, GOLD)  # what pays: one proxy, a number of an ensemble, or gold
MEMBERS = 3
COMPARISONS = (64, 256, 1024, 4096)
OF_ENSEMBLES = 256
OF_JUDGE = 1024  # comparisons of its own, behind those of the proxies
WRONG = (0.0, 0.25)
SHOWN = 15  # points of a curve
VALIDATION = 256  # comparisons at most, a quarter of those of a proxy
END = "gold at the end"
BELOW = "share of seeds that end below the first policy"
GAIN = "gold at the end minus one proxy's"
OF_SEEDS = ("highest gold", END, "proxy at the end")  # numbers of each seed in the file


def network(initializer_range: float) -> models.Model:
    """A GPT-2 of two layers."""
    config = models.GPT2Config(
        vocab_size=VOCABULARY,
        max_length=1 + LENGTH,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        initializer_range=initializer_range,
    )
    return models.build(config)


PROXY = network(initializer_range=0.1)
POLICY = network(initializer_range=0.02)
PROXY_FN = models.score_fn(PROXY)
POLICY_FN = models.policy_fn(POLICY, prompt_length=1)


class Sizes(NamedTuple):
    """How much is trained."""

    seeds: int = 12
    pool: int = 8192  # answers of which the best of n is one
    proxy_steps: int = 200
    proxy_batch: int = 64  # comparisons a step
    steps: int = 150
    batch_size: int = 64  # answers a step
    every: int = 5  # steps of which a measurement is the mean
    proxy_rate: float = 1e-3
    policy_rate: float = 1e-3


FULL = Sizes()


class World(NamedTuple):
    """What a seed fixes."""

    start: Params  # the first policy
    values: Array  # [VOCABULARY] of the gold reward
    mean: Array  # of the gold reward under the first policy
    sd: Array
    pool: Array  # [pool, T] answers of the first policy
    gold_of_pool: Array  # [pool]
    pairs: Array  # [C, 2, T] answers to compare, the last OF_JUDGE of them for the judge
    best: Array  # [C] the annotator's choices
    luck: Array  # [C] from 0 to 1: a choice is turned round where it is below a share


def gold_reward(values: Array, tokens: Array) -> Array:
    """[B] of answers [B, 1 + LENGTH]: the values of all tokens, minus the square of the times that
    a token is said beyond ENOUGH.
    """
    counts = jnp.sum(jax.nn.one_hot(tokens[:, 1:], VOCABULARY), axis=1)  # [B, VOCABULARY]
    excess = jnp.maximum(counts - ENOUGH, 0)
    return counts @ values - jnp.sum(jnp.square(excess), axis=1)


def gold_scores(world: World, tokens: Array) -> Array:
    """[B] with mean 0 and standard deviation 1 under the first policy."""
    return (gold_reward(world.values, tokens) - world.mean) / world.sd


def in_parts(params: Params, tokens: Array) -> Array:
    """A proxy's scores [N] of answers [N, T], a sixteenth of them at a time: less memory."""
    parts = tokens.reshape(16, -1, tokens.shape[1])
    scores = jax.lax.map(lambda part: PROXY_FN(params, part, jnp.ones_like(part)), parts)
    return scores.reshape(-1)


def sampled(params: Params, num: int, key: Array) -> Array:
    """Answers [num, T]."""
    prompts = jnp.zeros((num, 1), jnp.int32)
    ones = jnp.ones_like(prompts)
    return sampling.generate(
        POLICY,
        params,
        prompts,
        ones,
        key,
        config=SAMPLER,
    ).tokens


def make_world(key: Array, sizes: Sizes) -> World:
    """The gold reward, the first policy, and what it and the annotator do."""
    gold_key, start_key, sample_key, label_key = jax.random.split(key, 4)
    values = jax.random.normal(gold_key, (VOCABULARY,))
    start = POLICY.init(start_key)
    num_compared = 2 * max(COMPARISONS)
    answers = sampled(start, num_compared + sizes.pool, sample_key)
    compared, pool = jnp.split(answers, [num_compared])
    for_judge = sampled(start, 2 * OF_JUDGE, jax.random.fold_in(sample_key, 1))
    scores = gold_reward(values, answers)
    mean = jnp.mean(scores)
    sd = jnp.std(scores)
    pairs = jnp.concatenate([compared, for_judge]).reshape(-1, 2, answers.shape[1])
    gold = (gold_reward(values, pairs.reshape(-1, pairs.shape[2])) - mean) / sd
    first, second = gold.reshape(-1, 2).T
    is_second = jax.random.bernoulli(label_key, jax.nn.sigmoid(second - first))
    luck = jax.random.uniform(jax.random.fold_in(label_key, 1), first.shape)
    gold_of_pool = (scores[num_compared:] - mean) / sd
    best = is_second.astype(jnp.int32)
    return World(start, values, mean, sd, pool, gold_of_pool, pairs, best, luck)


class Lane(NamedTuple):
    """One proxy."""

    seed: int
    comparisons: int
    wrong: float  # share of labels that are turned round
    member: int
    first: int = 0  # of its comparisons


class Proxy(NamedTuple):
    """A trained one."""

    params: Params
    scores: Array  # [pool], with mean 0
    shift: Array  # the mean that was taken away


def train_proxy(
    world: World, first: Array, num: Array, wrong: Array, keys: Array, sizes: Sizes
) -> Proxy:
    """A reward model from ``num`` comparisons, from ``first`` on. Three quarters train; the
    parameters with the lowest loss on the others are kept. One key is of the first weights, one
    of the order of the comparisons.
    """
    init_key, loop_key = keys
    schedule = optax.cosine_decay_schedule(sizes.proxy_rate, sizes.proxy_steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
    config = reward_model.Config()
    best = jnp.where(world.luck < wrong, 1 - world.best, world.best)
    num_train = 3 * num // 4
    held_out = first + num_train + jnp.arange(VALIDATION) % (num - num_train)

    def batch_of(rows: Array) -> Comparisons:
        tokens = world.pairs[rows]
        ones = jnp.ones_like(tokens)
        return Comparisons(
            tokens,
            ones,
            ones.at[..., 0].set(0),
            best[rows],
        )

    def step(state: TrainState, key: Array) -> tuple[TrainState, None]:
        rows = first + jax.random.randint(key, (sizes.proxy_batch,), 0, num_train)
        batch = batch_of(rows)
        state, _ = reward_model.update(
            state, batch, None, score_fn=PROXY_FN, optimizer=optimizer, config=config
        )
        return state, None

    Kept = tuple[TrainState, Params, Array]

    def stretch(kept: Kept, keys: Array) -> tuple[Kept, None]:
        state, params, lowest = kept
        state, _ = jax.lax.scan(step, state, keys)
        batch = batch_of(held_out)
        loss, _ = reward_model.loss(
            state.params,
            batch,
            None,
            score_fn=PROXY_FN,
            config=config,
        )
        is_lower = loss.value < lowest
        params = jax.tree.map(functools.partial(jnp.where, is_lower), state.params, params)
        return (state, params, jnp.minimum(loss.value, lowest)), None

    params = models.add_head(jax.random.fold_in(init_key, 1), PROXY.init(init_key), "score")
    state = TrainState.create(params, optimizer)
    keys = jax.random.split(loop_key, sizes.proxy_steps).reshape(10, -1)
    (_, params, _), _ = jax.lax.scan(stretch, (state, params, jnp.inf), keys)
    scores = in_parts(params, world.pool)
    return Proxy(params, scores - jnp.mean(scores), jnp.mean(scores))


class Curve(NamedTuple):
    """Means [measurements] along a run, of a policy's own samples."""

    gold: Array
    proxy: Array  # what the policy is trained on
    kl: Array  # nats an answer, from the first policy
    judge: Array | None = None  # another reward model; None: nobody looks on


def train_policy(
    world: World, proxies: Proxy, judge: Params | None, how: Array, key: Array, sizes: Sizes
) -> Curve:
    """RLOO on all proxies [members] or the first or gold, ``how`` as a number in HOW."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(sizes.policy_rate, eps=1e-5))
    config = rloo.Config(group_size=8, num_minibatches=2)

    def score(batch: Rollout, gold: Array) -> Array:
        scores = jax.vmap(PROXY_FN, (0, None, None))(
            proxies.params, batch.tokens, batch.attention_mask
        )
        scores = scores - proxies.shift[:, None]
        ensembles = [combined(name, scores, coef=1.0) for name in OF_ALL]
        return jnp.stack([scores[0], *ensembles, gold])[how]

    def step(state: TrainState, key: Array) -> tuple[TrainState, Curve]:
        sample_key, update_key = jax.random.split(key)
        prompts = jnp.zeros((sizes.batch_size, 1), jnp.int32)
        batch = rollout.collect(
            POLICY,
            state.params,
            prompts,
            jnp.ones_like(prompts),
            sample_key,
            sampling=SAMPLER,
            policy_fn=POLICY_FN,
            ref_fn=jax.tree_util.Partial(POLICY_FN, world.start),
        )
        gold = gold_scores(world, batch.tokens)
        batch = batch.replace(scores=score(batch, gold))
        kl = ops.response_sums(ops.kl(batch.log_probs, batch.ref_log_probs), batch)
        judged = PROXY_FN(judge, batch.tokens, batch.attention_mask) if judge else None
        measured = Curve(gold, batch.scores, kl, judged)
        state, _ = rloo.update(
            state,
            batch.replace(ref_log_probs=None),  # the KL is measured alone
            update_key,
            policy_fn=POLICY_FN,
            optimizer=optimizer,
            config=config,
        )
        return state, jax.tree.map(jnp.mean, measured)

    state = TrainState.create(world.start, optimizer)
    _, curve = jax.lax.scan(step, state, jax.random.split(key, sizes.steps))
    return jax.tree.map(lambda x: jnp.mean(x.reshape(-1, sizes.every), axis=1), curve)


def best_of(gold: np.ndarray, proxy: np.ndarray, n: int) -> tuple[float, float]:
    """The expected gold and proxy reward of the best by the proxy among n of the answers, drawn
    without replacement: an unbiased estimate from all of them (Nakano et al. 2021, appendix).
    """
    order = np.argsort(proxy, kind="stable")
    num = len(order)
    below = np.arange(num)  # answers with a lower score
    chosen = np.exp(log_choose(below, n - 1) - log_choose(np.array(num), n))
    return float(chosen @ gold[order]), float(chosen @ proxy[order])


def log_choose(num: np.ndarray, n: int) -> np.ndarray:
    """log of ``num`` over n, -inf where n is larger."""
    rest = np.maximum(num - n, 0)
    value = scipy.special.gammaln(num + 1) - scipy.special.gammaln(rest + 1)
    return np.where(num < n, -np.inf, value - scipy.special.gammaln(n + 1))


def fitted(distance: np.ndarray, gold: np.ndarray, is_rl: bool) -> tuple[float, float]:
    """alpha and beta of gold = d (alpha - beta log d) in RL, d (alpha - beta d) in best of n."""
    second = np.log(distance) if is_rl else distance
    columns = np.stack([distance, -distance * second], axis=1)
    alpha, beta = np.linalg.lstsq(columns, gold, rcond=None)[0]
    return float(alpha), float(beta)


def curve_rows(variant: str, seed: int, steps: list[int], curve: Curve) -> list[results.Row]:
    """A curve over sqrt(KL), where it is highest, and its fit."""
    distance = np.sqrt(np.maximum(curve.kl, 0))
    rows = []
    stride = max(len(steps) // SHOWN, 1)
    for number in range(stride - 1, len(steps), stride):
        step = steps[number]
        for name, values in (("gold", curve.gold), ("proxy", curve.proxy)):
            shown_as = f"{variant}, {name}"
            rows.append(results.row(shown_as, seed, step, "reward", values[number]))
            rows.append(results.row(shown_as, seed, step, "sqrt(KL)", distance[number]))
    is_moved = distance > 0.2  # before, the KL is noise
    alpha, beta = fitted(distance[is_moved], curve.gold[is_moved], not variant.startswith("best"))
    highest = int(np.argmax(curve.gold))
    found = {
        "alpha": alpha,
        "beta": beta,
        "highest gold": curve.gold[highest],
        "sqrt(KL) there": distance[highest],
        END: curve.gold[-1],
        "fall of gold": curve.gold[highest] - curve.gold[-1],
        "proxy at the end": curve.proxy[-1],
        "sqrt(KL) at the end": distance[-1],
    }
    rows += [results.row(variant, seed, steps[-1], name, value) for name, value in found.items()]
    return rows


def lanes_of(num_seeds: int) -> list[Lane]:
    """All proxies, and the judges."""
    lanes = set()
    for seed in range(num_seeds):
        lanes |= {Lane(seed, num, 0.0, 0) for num in COMPARISONS}
        for wrong in WRONG:
            lanes |= {Lane(seed, OF_ENSEMBLES, wrong, member) for member in range(MEMBERS)}
        lanes.add(judge_of(seed))
    return sorted(lanes)


def judge_of(seed: int) -> Lane:
    """The reward model that no policy is trained on, with first weights of its own."""
    return Lane(seed, OF_JUDGE, 0.0, MEMBERS, first=max(COMPARISONS))


class Run(NamedTuple):
    """One policy."""

    seed: int
    comparisons: int
    wrong: float
    how: str

    @property
    def variant(self) -> str:
        if self.how == GOLD:
            return f"RL: {GOLD} itself"
        if self.how == "one" and not self.wrong:
            return f"RL: {self.comparisons} comparisons"
        labels = "a quarter wrong" if self.wrong else "all labels"
        return f"{labels}: {self.how}"


def runs_of(num_seeds: int) -> list[Run]:
    """All policies."""
    runs = []
    for seed in range(num_seeds):
        runs += [Run(seed, num, 0.0, "one") for num in COMPARISONS]
        runs += [Run(seed, OF_ENSEMBLES, 0.0, how) for how in OF_ALL]
        runs += [Run(seed, OF_ENSEMBLES, WRONG[1], how) for how in ("one", *OF_ALL)]
        runs.append(Run(seed, OF_ENSEMBLES, 0.0, GOLD))
    return runs


def take(tree: Tree, index: np.ndarray) -> Tree:
    """The rows of all arrays."""
    taken: Tree = jax.tree.map(lambda x: x[index], tree)
    return taken


class Measured(NamedTuple):
    """What the proxies score and the policies reach, as NumPy arrays."""

    gold_of_pool: np.ndarray  # [seeds, pool]
    scores: np.ndarray  # [lanes, pool] of lanes_of
    curves: Curve  # [runs, measurements] of runs_of


def measure(sizes: Sizes) -> Measured:
    """Trains all proxies, then all policies."""
    keys = jax.vmap(jax.random.key)(np.arange(sizes.seeds))
    worlds = jax.jit(jax.vmap(functools.partial(make_world, sizes=sizes)))(keys)

    lanes = lanes_of(sizes.seeds)
    seeds, nums, wrong, members, first = map(np.array, zip(*lanes, strict=True))
    proxy_keys = jax.vmap(jax.random.key)(1000 + 10 * seeds + members)
    train = jax.jit(jax.vmap(functools.partial(train_proxy, sizes=sizes)))
    keys = jax.vmap(jax.random.split)(proxy_keys)
    proxies = train(take(worlds, seeds), first, nums, wrong, keys)

    runs = runs_of(sizes.seeds)
    members_of = []
    for run in runs:
        asked = [0] * MEMBERS if run.how == "one" else range(MEMBERS)
        of_run = [Lane(run.seed, run.comparisons, run.wrong, one) for one in asked]
        members_of.append([lanes.index(lane) for lane in of_run])
    seeds = np.array([run.seed for run in runs])
    how = np.array([HOW.index(run.how) for run in runs])
    policy_keys = jax.vmap(jax.random.key)(2000 + seeds)
    learn = jax.jit(jax.vmap(functools.partial(train_policy, sizes=sizes)))
    judges = np.array([lanes.index(judge_of(run.seed)) for run in runs])
    curves = learn(
        take(worlds, seeds),
        take(proxies, np.array(members_of)),
        take(proxies.params, judges),
        how,
        policy_keys,
    )
    found: Measured = jax.device_get(Measured(worlds.gold_of_pool, proxies.scores, curves))
    return found


def best_of_n_rows(lanes: list[Lane], measured: Measured) -> list[results.Row]:
    """Best of n by the proxies of all numbers of comparisons."""
    num_pool = measured.gold_of_pool.shape[1]
    numbers = [2**power for power in range(1, 20) if 2**power <= num_pool // 8]
    kls = np.array([sampling.best_of_n_kl(n) for n in numbers])
    rows = []
    for lane, scores in zip(lanes, measured.scores, strict=True):
        if lane.member or lane.wrong:
            continue
        gold = measured.gold_of_pool[lane.seed]
        curve = Curve(*np.array([best_of(gold, scores, n) for n in numbers]).T, kls)
        variant = f"best of n: {lane.comparisons} comparisons"
        rows += curve_rows(variant, lane.seed, numbers, curve)
        rank = scipy.stats.spearmanr(gold, scores).statistic
        rows.append(results.row(variant, lane.seed, numbers[-1], "rank correlation", rank))
    return rows


def main(out: Path | None = None, sizes: tyro.conf.OmitArgPrefixes[Sizes] = FULL) -> None:
    """Trains proxies and policies, and says where the gold reward is highest.

    Args:
        out: a file for the results as a table.
        sizes: of the experiment.
    """
    started = time.monotonic()
    measured = measure(sizes)
    rows = best_of_n_rows(lanes_of(sizes.seeds), measured)
    steps = list(range(sizes.every, sizes.steps + 1, sizes.every))
    seen = collections.defaultdict(list)
    for run, *values in zip(runs_of(sizes.seeds), *measured.curves, strict=True):
        curve = Curve(*values)
        rows += curve_rows(run.variant, run.seed, steps, curve)
        if run.variant.startswith("RL"):
            alerts = hacking_alerts.seen(curve, steps)
            if run.how == GOLD:
                del alerts["gold"]  # the score itself can be no judge of the score
            seen[run.variant].append(alerts)
    means = [*results.over_seeds(rows), *ends_of(rows)]
    for variant, of_seeds in seen.items():
        means += hacking_alerts.rows(variant, of_seeds, steps[-1])
    for row in means:
        if row["metric"] in ("fall of gold", "sqrt(KL) there", BELOW):
            logger.info(f"{row['variant']}: {row['metric']} {row['value']:.3f}")
    if out is not None:
        command = "python experiments/overoptimisation.py --out overoptimisation.json"
        seconds = time.monotonic() - started
        rows = [*shown(means), *(row for row in rows if row["metric"] in OF_SEEDS)]
        results.write(out, command, seconds, rows, sizes=sizes._asdict())


def ends_of(rows: list[results.Row]) -> list[results.Row]:
    """In how many seeds gold ends below the first policy, and for ensembles how much better it
    ends than that of one proxy with the same labels, paired by seeds.
    """
    ends: dict[str, dict[int, float]] = {}
    last: dict[str, int] = {}
    for row in rows:
        if row["metric"] == END:
            ends.setdefault(row["variant"], {})[row["seed"]] = row["value"]
            last[row["variant"]] = row["step"]
    found = []
    for variant, of_seeds in ends.items():
        num_worse = sum(value < 0 for value in of_seeds.values())
        share = results.share(num_worse, len(of_seeds))
        numbers = {f"{BELOW}{edge}": value for edge, value in share.items()}
        labels, _, how = variant.partition(": ")
        alone = {"all labels": f"RL: {OF_ENSEMBLES} comparisons"}.get(labels, f"{labels}: one")
        if how in OF_ALL:
            gains = [value - ends[alone][seed] for seed, value in of_seeds.items()]
            paired = [results.row(variant, n, last[variant], GAIN, x) for n, x in enumerate(gains)]
            found += results.over_seeds(paired)
        found += [
            results.row(variant, results.ALL, last[variant], metric, value)
            for metric, value in numbers.items()
        ]
    return found


def shown(means: list[results.Row]) -> list[results.Row]:
    """What the page needs: of ensembles the gold reward alone, of a distance no interval."""
    found = []
    for row in means:
        is_ensemble = row["variant"].startswith(("all labels", "a quarter"))
        if is_ensemble and row["variant"].endswith("proxy"):
            continue
        if row["metric"] in [f"sqrt(KL){edge}" for edge in results.EDGES]:
            continue
        found.append(row)
    return found


if __name__ == "__main__":
    cli.run_script(lambda: tyro.cli(main, args=sys.argv[1:]))
