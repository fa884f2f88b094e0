"""Comparisons scored by a reward model or an ensemble: batches, metrics, and texts for
samples.jsonl.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.tree_util import Partial

from rlhf_jax import metrics, ops
from rlhf_jax.algorithms import reward_model
from rlhf_jax.data import batches
from rlhf_jax.data.encoding import EncodedTexts
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.runs import processes
from rlhf_jax.training.common.progress import in_order
from rlhf_jax.types import Comparisons, Params, ScoreFn


def answer_scorer(
    score_fn: ScoreFn, num_members: int = 1, jit: Callable[..., Any] = jax.jit
) -> Callable[[Params, Comparisons], Array]:
    """Jitted ``(params, comparisons [B, K, T]) -> scores [B, K]``, of packed ones [B, C, K]; of an
    ensemble's parameters [M, ...] the scores [..., M]. Arrays of a ``jax.tree_util.Partial`` travel
    as arguments.

    jit: of the run's stage, or JAX's own.
    """
    if not isinstance(score_fn, Partial):
        score_fn = Partial(score_fn)

    def score(score_fn: ScoreFn, params: Params, comparisons: Comparisons) -> Array:
        return reward_model.answer_scores(ops.by_rows(score_fn, None), params, comparisons)

    scorer: Callable[..., Array] = score
    if num_members > 1:
        scorer = jax.vmap(score, in_axes=(None, 0, None), out_axes=-1)
    return functools.partial(jit(scorer), score_fn)


def score_rows(
    score: Callable[[Comparisons], Array | np.ndarray],
    comparisons: EncodedTexts,
    rows: np.ndarray,
    *,
    batch_size: int,
    bucket_multiple: int,
    shard: Callable[[Comparisons], Comparisons] = lambda batch: batch,
) -> np.ndarray:
    """Scores [N, K] of the answers of N rows, or [N, K, M] of an ensemble. The scores of missing
    answers have no meaning.
    """
    scores = []
    for numbers in in_order(rows, batch_size):
        batch = batches.comparison_batch(comparisons, numbers, bucket_multiple)
        of_batch = processes.fetch(score(shard(batch)))
        if comparisons.shares_prompts:
            of_batch = of_batch[:, 0]  # one comparison in each row
        scores.append(of_batch[numbers >= 0])
    return np.concatenate(scores)


def pairs_of(
    comparisons: EncodedTexts, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray, metrics.Pairs]:
    """Each best answer of the given N rows with each other one: [P] place in ``rows``, [P, 2] the
    two answers' numbers, and the pairs. Rows of one source, such as the pairs of a ranking, are
    one row of ``Pairs``.
    """
    best = comparisons.best[rows]
    is_other = comparisons.response_lengths[rows] > 0
    every = np.arange(len(rows))
    is_other[every, best] = False
    place, other = np.nonzero(is_other)
    answers = np.stack([best[place], other], axis=1)
    row_of_pair = rows[place]
    texts = []
    for row, pair in zip(row_of_pair, answers, strict=True):
        texts += [comparisons.tokens[answer][row].tobytes() for answer in pair]
    _, labels = np.unique(np.array(texts, dtype=object), return_inverse=True)
    chosen, rejected = labels.reshape(-1, 2).T
    sources = [comparisons.sources[row] for row in row_of_pair]
    _, groups = np.unique(sources, return_inverse=True)
    pairs_of_row = np.bincount(place)[place]
    weights = comparisons.weight[row_of_pair].astype(np.float64)
    weights /= pairs_of_row
    return place, answers, metrics.Pairs(groups, chosen, rejected, weights)


def report(comparisons: EncodedTexts, rows: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """``metrics.preference_report`` of scores [N, K] of the given rows, weighted as the rows are;
    with targets ``metrics.target_report``.

    accuracy is of best answers against all others of their row (top-1), of a ranking's pairs too.
    Where a row has several pairs, pairwise_accuracy is of best answers (in a ranking: of better
    ones) against each other one; the same for length_accuracy and pairwise_length_accuracy.
    """
    weights = comparisons.weight[rows]
    lengths = comparisons.response_lengths[rows]
    if comparisons.targets is not None:
        return metrics.target_report(
            scores, comparisons.targets[rows], lengths=lengths, weights=weights
        )
    figures = metrics.preference_report(
        scores, comparisons.best[rows], lengths=lengths, weights=weights
    )
    place, both, pairs = pairs_of(comparisons, rows)
    if pairs.is_single:
        return figures
    best, other = both.T
    measured = {"accuracy": scores, "length_accuracy": lengths}
    for name, values in measured.items():
        margin = values[place, best] - values[place, other]
        right = np.heaviside(margin, 0.5)
        figures[name] = float(metrics.top_1(right, pairs).mean())
        figures[f"pairwise_{name}"] = float(np.average(right, weights=pairs.weights))
    return figures


def length_accuracy(pairs: EncodedTexts, rows: np.ndarray) -> float:
    """The accuracy, over the given rows, of a judge who takes the longer answer of a pair; ties
    count half. Weighted as the rows are.
    """
    lengths = pairs.response_lengths[rows]
    return metrics.win_rate(lengths[:, 0], against=lengths[:, 1], weights=pairs.weight[rows])


def desirable_length_accuracy(
    feedback: EncodedTexts,
    train_rows: np.ndarray,
    rows: np.ndarray,
) -> float:
    """The accuracy, over the given rows of single answers, of a judge who calls an answer desirable
    if it is longer than the median of the ``train_rows``; ties count half. Weighted as the rows
    are.
    """
    lengths = feedback.response_lengths[:, 0]
    median = np.median(lengths[train_rows])
    targets = feedback.targets
    assert targets is not None  # feedback has them
    is_desirable = targets[rows, 0] > 0.5
    excess = lengths[rows] - median
    margin = np.where(is_desirable, excess, -excess)
    right = np.heaviside(margin, 0.5)
    return float(np.average(right, weights=feedback.weight[rows]))


def disagreement(comparisons: EncodedTexts, rows: np.ndarray, scores: np.ndarray) -> float:
    """How far members differ: the standard deviation over them (population) of the margin, or with
    targets of the score, as a mean over the given rows, weighted as they are.

    The margin is the best answer's score minus the score of the other answer with the highest mean
    score. It does not depend on an offset that a member adds to all its scores, which comparisons
    do not determine.

    scores: [N, K, M] of the given N rows.
    """
    weights = comparisons.weight[rows]
    lengths = comparisons.response_lengths[rows]
    if comparisons.targets is not None:
        weights = np.where(lengths > 0, weights[:, None], 0.0)
        return float(np.average(scores.std(axis=2), weights=weights))
    row = np.arange(len(rows))
    best = comparisons.best[rows]
    rival = metrics.rival(scores.mean(axis=2), best, lengths=lengths)
    margins = scores[row, best] - scores[row, rival]
    return float(np.average(margins.std(axis=1), weights=weights))


def num_rows(texts: EncodedTexts, rows: np.ndarray) -> int:
    """The rows of the data among the given ones; the pairs of a ranking are one."""
    return len({texts.sources[row] for row in rows})


def evenly(num_rows: int, most: int) -> np.ndarray:
    """[min(num_rows, most)] numbers of rows from the first to the last of ``num_rows``, evenly
    spaced.
    """
    return np.linspace(0, num_rows - 1, min(num_rows, most)).round().astype(int)


def samples(
    comparisons: EncodedTexts,
    rows: np.ndarray,
    scores: np.ndarray,
    tokenizer: Tokenizer,
) -> list[dict[str, Any]]:
    """The given rows with their scores [N, K] as texts: for each the best answer and the
    highest-scored other one, or, with targets, every answer. Lengths are response tokens; source
    and weight are those of the data row.
    """
    lengths = comparisons.response_lengths[rows]

    def text(place: int, answer: int) -> str:
        row = rows[place]
        start = comparisons.starts[row, answer]
        return tokenizer.decode(comparisons.tokens[answer][row][start:])

    def sample(place: int, **answers: Any) -> dict[str, Any]:
        row = rows[place]
        weight = round(float(comparisons.weight[row]), 6)
        return {
            "prompt": comparisons.prompts[row],
            **answers,
            "source": comparisons.sources[row],
            "weight": weight,
        }

    if comparisons.targets is not None:
        return [
            sample(
                i,
                response=text(i, k),
                score=float(scores[i, k]),
                target=float(comparisons.targets[rows[i], k]),
                length=int(lengths[i, k]),
            )
            for i, k in np.argwhere(lengths > 0)
        ]
    best = comparisons.best[rows]
    rivals = metrics.rival(scores, best, lengths=lengths)
    return [
        sample(
            i,
            chosen=text(i, chosen),
            rejected=text(i, rejected),
            score_chosen=float(scores[i, chosen]),
            score_rejected=float(scores[i, rejected]),
            length_chosen=int(lengths[i, chosen]),
            length_rejected=int(lengths[i, rejected]),
        )
        for i, (chosen, rejected) in enumerate(zip(best, rivals, strict=True))
    ]
