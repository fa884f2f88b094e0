"""Score against KL: what a policy earns for how far it has gone from the base model, the same for every algorithm.

    bench = frontier.Bench(model, params, tokenizer, tokens, attention_mask, sampling_config, key, score, samples=4)
    measure = frontier.measurement(bench)
    best, _ = frontier.best_of_n(bench, 64)
    points = [measure(params, "base"), measure(trained, "PPO", "KL coefficient 0.05")] + best

Nothing here trains.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from rlhf_jax import generator, models, sampling
from rlhf_jax import rollout as rollouts
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.report import figures
from rlhf_jax.types import Params, Rollout

ROWS_AT_ONCE = 4096  # sampled in one batch by best_of_n
BEST_OF_N, OPTIMUM = "best of n", "optimum"
NAMES = ("method", "strength", "score", "score error", "KL", "KL error", "length", "repeated words")  # of Point[:8]


class Bench(NamedTuple):
    """What policies are measured with."""

    model: models.Model
    params: Params  # of the base model, from which the KL is counted
    tokenizer: Tokenizer
    tokens: np.ndarray  # [N, P] held-out prompts, left-padded
    attention_mask: np.ndarray  # [N, P]
    sampling_config: sampling.SamplingConfig
    key: jax.Array
    score: Callable[[Rollout], np.ndarray]  # on the host: scores [B]
    samples: int  # responses to each prompt


class Point(NamedTuple):
    """A policy's place: means over all responses, with standard errors over the prompts."""

    method: str
    setting: str
    score: float
    score_error: float
    kl: float  # KL(policy || base) in nats per response
    kl_error: float | None  # None: the KL is not an estimate
    length: float  # tokens
    repeated: float  # share of a response's words that it has said before
    texts: Sequence[str]  # the first response to each prompt
    scores: Sequence[float]  # of these


def measurement(bench: Bench) -> Callable[[Params, str, str], Point]:
    """A function ``(params, method, setting) -> Point`` for policies of the base model's shape.

    All of them meet the same randomness. The KL is the mean over responses of the sum of log-ratios (k1).
    """
    policy_fn = models.policy_fn(bench.model, bench.sampling_config.temperature, bench.tokens.shape[1])
    collect = jax.jit(
        functools.partial(rollouts.collect, bench.model, sampling=bench.sampling_config, policy_fn=policy_fn)
    )
    prompts = [jnp.asarray(np.repeat(array, bench.samples, axis=0)) for array in (bench.tokens, bench.attention_mask)]
    ref_fn = jax.tree_util.Partial(policy_fn, bench.params)

    def measure(params: Params, method: str, setting: str = "") -> Point:
        rollout = jax.device_get(collect(params, *prompts, bench.key, ref_fn=ref_fn))
        kl = np.sum(rollout.log_probs - rollout.ref_log_probs, axis=1)
        return _point(bench, method, setting, rollout.replace(scores=bench.score(rollout)), *_mean(kl, bench.samples))

    return measure


def best_of_n(bench: Bench, largest: int) -> tuple[list[Point], np.ndarray]:
    """Best-of-n of the base model for n = 2, 4, ... up to ``largest``, one response to each prompt.

    Returns:
        The points, at ``sampling.best_of_n_kl(n)``, an upper bound on their KL; and the scores [N, largest] of all
        samples for the last of them.
    """
    points = []
    for n in (2**power for power in range(1, largest.bit_length())):
        at_once = max(ROWS_AT_ONCE // n, 1)
        parts = [
            # Not jitted, since the reward runs on the host.
            sampling.best_of_n(
                bench.model,
                bench.params,
                jnp.asarray(bench.tokens[rows]),
                jnp.asarray(bench.attention_mask[rows]),
                jax.random.fold_in(bench.key, n),
                bench.sampling_config,
                n=n,
                reward_fn=lambda samples: jnp.asarray(bench.score(samples)),
                row_ids=jnp.arange(len(bench.tokens), dtype=jnp.int32)[rows],
            )
            for rows in (slice(first, first + at_once) for first in range(0, len(bench.tokens), at_once))
        ]
        rollout, scores = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
        points.append(_point(bench, BEST_OF_N, f"{n}", rollout, sampling.best_of_n_kl(n), None))
    return points, scores


def optimum(scores: np.ndarray) -> tuple[list[float], list[float]]:
    """KLs in nats and mean scores of the policies of the highest score for their KL, base * exp(score / beta).

    scores: [N, M] of M samples of the base policy for each of N prompts, which stand for all that it might say. The
        points end at a KL of ln(M) / 2: further out too few of the samples carry the weight.
    """
    count = scores.shape[1]
    kls, means = [0.0], [float(scores.mean())]
    for beta in np.geomspace(10.0, 0.01, 100):
        logits = scores / beta
        mean = np.sum(scipy.special.softmax(logits, axis=1) * scores, axis=1)
        kl = float(np.mean(mean / beta - scipy.special.logsumexp(logits, axis=1) + np.log(count)))
        if kl > np.log(count) / 2:
            break
        kls.append(kl)
        means.append(float(mean.mean()))
    return kls, means


def plot(
    base: Point, points: Iterable[Point], best: Sequence[Point], bound: tuple[list[float], list[float]]
) -> figures.Plot:
    """Score against KL: a curve for each method from the base model on, best-of-n, and ``optimum``."""
    methods: dict[str, list[Point]] = {}
    for point in points:
        methods.setdefault(point.method, [base]).append(point)

    def series(some: Sequence[Point], **more: Any) -> figures.Series:
        ordered = sorted(some, key=lambda point: point.kl)
        return figures.Series([point.kl for point in ordered], [point.score for point in ordered], **more)

    curves = {method: series(some) for method, some in methods.items()}
    curves[BEST_OF_N] = series([base, *best], labels=["", *(point.setting for point in best)])
    curves[OPTIMUM] = figures.Series(*bound, style=1)
    return figures.Plot(
        "Score against KL",
        "KL(policy || base), nats per response",
        "mean score",
        curves,
        note=f"Every curve starts at the base model. {BEST_OF_N.capitalize()} stands at ln n - (n - 1)/n, the "
        "most that its KL can be. The optimum is base * exp(score / beta), estimated from the base model's samples as "
        "far as they reach.",
    )


def as_row(point: Point) -> Mapping[str, str | float | None]:
    """The point's numbers under their names in ``NAMES``."""
    return dict(zip(NAMES, point[: len(NAMES)], strict=True))  # type: ignore[arg-type]


def _point(bench: Bench, method: str, setting: str, rollout: Rollout, kl: float, kl_error: float | None) -> Point:
    """rollout: as many responses to each prompt in turn, with their scores."""
    texts = generator.responses(rollout, bench.tokenizer)
    each = len(texts) // len(bench.tokens)
    words = [text.lower().split() for text in texts]
    repeated = float(np.mean([1 - len(set(said)) / max(len(said), 1) for said in words]))
    length = float(np.sum(rollout.response_mask != 0) / len(texts))
    scores = np.asarray(rollout.scores)
    some = texts[::each], scores[::each].tolist()
    return Point(method, setting, *_mean(scores, each), kl, kl_error, length, repeated, *some)


def _mean(values: np.ndarray, each: int) -> tuple[float, float]:
    """Mean and standard error of values [N * each]; those of one prompt are not independent."""
    of_prompts = values.reshape(-1, each).mean(axis=1)
    return float(of_prompts.mean()), float(of_prompts.std(ddof=1) / np.sqrt(len(of_prompts)))
