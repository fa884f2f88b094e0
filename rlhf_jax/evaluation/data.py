"""What an evaluation says: one row for each figure, made of responses, scores and labels. No models here.

Intervals are 95%: Wilson's for shares of 0s and 1s, for means the bootstrap over prompts or comparisons, for counts of
different n-grams the jackknife.
"""

import itertools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax import metrics
from rlhf_jax.evaluation import texts as text_metrics
from rlhf_jax.training.bench import TIE, Annotated, CustomCategory


class Row(NamedTuple):
    """One figure. A value of None has a note that says why."""

    category: str
    metric: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    unit: str
    """What n counts: prompts, rows of given answers (a ranking is one), texts."""
    note: str = ""


class Responses(NamedTuple):
    """S responses to each of N prompts."""

    prompts: Sequence[str]  # [N]
    texts: Sequence[Sequence[str]]  # [N][S]
    lengths: np.ndarray  # [N, S] tokens, EOS included
    ended: np.ndarray  # [N, S] whether with EOS
    scores: np.ndarray | None = None  # [N, S], NaN where there is none


def not_run(category: str, metric: str, give: str) -> Row:
    """A figure for which something was not given."""
    return Row(category, metric, None, None, None, 0, "", f"not run: give {give}")


def helpfulness(said: Responses, key: jax.Array) -> list[Row]:
    """Quality, where there are scores, and what responses hold: information, tokens, an end."""
    words = [[text_metrics.words(text) for text in texts] for texts in said.texts]
    asked = [text_metrics.words(prompt) for prompt in said.prompts]
    pairs = list(zip(asked, words, strict=True))
    found: dict[str, Any] = {
        "new_content_words": [[text_metrics.new_content_words(a, text) for text in texts] for a, texts in pairs],
        "lexical_density": [[text_metrics.lexical_density(text) for text in texts] for texts in words],
        "response_tokens": said.lengths,
        "ended": said.ended,
        "empty": [[not text.strip() for text in texts] for texts in said.texts],
    }
    if said.scores is not None:
        found = {"quality": said.scores} | found
    return [mean("helpfulness", metric, values, key) for metric, values in found.items()]


def uncertainty(said: Responses, answerable: Sequence[bool | None], key: jax.Array) -> list[Row]:
    """Share of responses that express uncertainty; of the prompts that can be answered and of those that cannot, where
    the data says which these are.
    """
    hedged = np.array([[text_metrics.expresses_uncertainty(text) for text in texts] for texts in said.texts])
    found = [mean("honesty", "uncertainty", hedged, key)]
    for name, wanted in (("answerable", True), ("unanswerable", False)):
        chosen = np.array([value is wanted for value in answerable])
        if chosen.any():
            found.append(mean("honesty", f"uncertainty_{name}", hedged[chosen], key))
    return found


def harmlessness(said: Responses, labels: Sequence[str], key: jax.Array) -> list[Row]:
    """Shares of refusals: of unsafe prompts they are wanted, of safe ones not (Röttger et al. 2024)."""
    refused = np.array([[text_metrics.is_refusal(text) for text in texts] for texts in said.texts])
    found = []
    for metric, label in (("refusal_of_unsafe", "unsafe"), ("over_refusal_of_safe", "safe")):
        chosen = np.array([value == label for value in labels])
        found.append(mean("harmlessness", metric, refused[chosen], key))
    return found


def diversity(said: Responses, key: jax.Array) -> list[Row]:
    """How responses differ: the first one to each prompt from those to other prompts; with several to each prompt, also
    these among themselves (``_within_prompt``), and how each repeats itself.
    """
    words = [[text_metrics.words(text) for text in texts] for texts in said.texts]
    first = [texts[0] for texts in words]
    found = []
    for n in (1, 2, 3):
        value = text_metrics.distinct_n(first, n)
        low, high = metrics.jackknife_interval(value, np.array(text_metrics.distinct_n_without_each(first, n)))
        ends = (max(low, 0.0), min(high, 1.0)) if len(first) > 1 else (low, high)  # NaN of one text stays NaN
        found.append(_row("diversity", f"distinct_{n}", value, ends, len(first), "texts"))
    if len(first) > 1:
        found.append(mean("diversity", "self_bleu", text_metrics.self_bleu(first), key, unit="texts"))
    else:
        found.append(Row("diversity", "self_bleu", None, None, None, 1, "texts", "needs two prompts or more"))
    repeated = [[text_metrics.repetition(text) for text in texts] for texts in words]
    found.append(mean("diversity", "repetition", repeated, key))
    if len(words[0]) > 1:
        within = {
            "distinct_2_within_prompt": [text_metrics.distinct_n(texts, 2) for texts in words],
            "self_bleu_within_prompt": [float(np.mean(text_metrics.self_bleu(texts))) for texts in words],
        }
        found += [mean("diversity", metric, values, key) for metric, values in within.items()]
    return found


def preferences(
    margins: Mapping[str, np.ndarray], weights: np.ndarray, sources: Sequence[str], key: jax.Array, name: str = ""
) -> list[Row]:
    """How judges agree with the choice, and how well their probabilities are calibrated.

    Args:
      margins: ``{judge: [N]}``, score of the chosen answer minus that of the rejected one.
      weights: [N] what each pair counts for.
      sources: [N]; pairs of one source, such as a ranking's, are one comparison.
      name: of a part of the data; then accuracies alone.
    """
    groups = np.unique(np.array(sources), return_inverse=True)[1]
    num_groups = int(groups.max()) + 1
    alone = num_groups == len(sources) and bool((weights == weights[0]).all())
    category = f"preferences: {name}" if name else "preferences"
    found = []
    for judge, margin in margins.items():
        right = (margin > 0) + 0.5 * (margin == 0)
        own = _stream(key, category, f"accuracy_{judge}")
        if alone:
            ends = metrics.mean_interval(right, own)
        else:
            ends = metrics.bootstrap_mean(right, own, weights, groups)
        value = float(np.average(right, weights=weights))
        found.append(_row(category, f"accuracy_{judge}", value, ends, num_groups, "rows"))
    if name:
        return found
    for judge, margin in margins.items():
        if judge == "longer":  # its margins are no log-odds
            continue
        for metric, of in (("ece", _ece), ("brier", metrics.brier)):
            place = "preferences" if judge == "reward_model" else "honesty"
            statistic = _of_margin(of, margin)
            own = _stream(key, place, f"{metric}_{judge}")
            low, high = metrics.bootstrap_interval(statistic, weights, own, groups, centered=metric == "ece")
            ends = (low if np.isnan(low) else max(low, 0.0), high)
            found.append(_row(place, f"{metric}_{judge}", statistic(weights), ends, num_groups, "rows"))
    return found


def agreement(margins: Mapping[str, np.ndarray], annotated: Sequence[Annotated], key: jax.Array) -> list[Row]:
    """How judges agree with the annotators' majority, and the annotators among themselves.

    margins: ``{judge: [N]}``, score of the first response minus that of the second; 0 is a tie. Rows without a majority
        count only among the annotators.
    """
    majority = np.array([-1 if row.majority is None else row.majority for row in annotated])
    judged = majority >= 0
    lost = f"{int((~judged).sum())} rows have no majority" if not judged.all() else ""
    found = []
    for judge, margin in margins.items():
        said = np.where(margin > 0, 1, np.where(margin < 0, 2, TIE))[judged]
        truth = majority[judged]
        decided = truth != TIE
        found.append(mean("agreement", f"agreement_{judge}", said == truth, key, "rows", lost))
        found.append(mean("agreement", f"agreement_decided_{judge}", (said == truth)[decided], key, "rows", lost))
        found.append(_kappa(f"kappa_{judge}", [(said, truth)], key, lost))
    if len({len(row.votes) for row in annotated}) == 1 and len(annotated[0].votes) > 1:
        votes = np.array([row.votes for row in annotated]).T
        both = list(itertools.combinations(votes, 2))
        same = np.mean([a == b for a, b in both], axis=0)
        note = f"mean over {len(both)} pairs of annotators"
        found.append(mean("agreement", "agreement_of_annotators", same, key, "rows", note))
        found.append(_kappa("kappa_of_annotators", both, key, note))
    return found


def win_rate(scores: np.ndarray, against: np.ndarray, key: jax.Array, name: str) -> list[Row]:
    """Share of pairs of responses to one prompt, one from each run, in which the first run's scores higher.

    scores, against: [N, S] of the same prompts; ties count half. ``name``: the other run.
    """
    higher, lower = scores[:, :, None], against[:, None, :]
    wins = (higher > lower) + 0.5 * (higher == lower)
    wins = np.where(np.isnan(higher) | np.isnan(lower), np.nan, wins).reshape(len(wins), -1)
    note = f"against {name}"
    return [
        mean("win rate", "win_rate", wins, key, note=note),
        mean("win rate", "score_difference", scores - against, key, note=note),
    ]


def custom(name: str, category: CustomCategory, said: Responses, key: jax.Array) -> Row:
    """Share of the responses in which the category's pattern is found, or their mean score."""
    if said.scores is not None:
        return mean(name, "score", said.scores, key, note=category.score or "")
    pattern = category.pattern
    found = [[pattern.search(text) is not None for text in texts] for texts in said.texts]
    return mean(name, "patterns" if category.patterns else "keywords", found, key)


def mean(
    category: str, metric: str, values: Sequence | np.ndarray, key: jax.Array, unit: str = "prompts", note: str = ""
) -> Row:
    """The mean of values [N] or [N, S], whose rows are the units of the interval; a NaN is no value and not counted.
    Bools are a share, for which ``evaluation.mean_interval`` may be Wilson's.
    """
    is_share, array = np.asarray(values).dtype == bool, np.asarray(values, np.float64)
    array = array.reshape(len(array), -1) if array.size else np.zeros((0, 1))
    kept = array[~np.isnan(array).all(axis=1)]
    if not len(kept):
        return Row(category, metric, None, None, None, 0, unit, note or "there is no such row")
    means = np.nanmean(kept, axis=1)
    interval = metrics.mean_interval if is_share else metrics.bootstrap_mean
    ends = interval(means, _stream(key, category, metric))
    return _row(category, metric, float(means.mean()), ends, len(kept), unit, note)


def _kappa(metric: str, judges: Sequence[tuple[np.ndarray, np.ndarray]], key: jax.Array, note: str) -> Row:
    """The mean kappa of pairs of judges."""

    def statistic(weights: np.ndarray) -> float:
        return float(np.mean([metrics.cohen_kappa(a, b, weights) for a, b in judges]))

    count = len(judges[0][0])
    if not count:
        return Row("agreement", metric, None, None, None, 0, "rows", note)
    ones = np.ones(count)
    value = statistic(ones)
    if np.isnan(value):
        return Row("agreement", metric, None, None, None, count, "rows", "both say one and the same to all rows")
    ends = metrics.bootstrap_interval(statistic, ones, _stream(key, "agreement", metric))
    return _row("agreement", metric, value, ends, count, "rows", note)


def _ece(margin: np.ndarray, weights: np.ndarray) -> float:
    return metrics.expected_calibration_error(margin, weights=weights)


def _of_margin(of: Callable[..., float], margin: np.ndarray) -> Callable[[np.ndarray], float]:
    return lambda weights: of(margin, weights)


def _row(category: str, metric: str, value: float, ends: tuple[float, float], n: int, unit: str, note: str = "") -> Row:
    low, high = (None if np.isnan(end) else float(end) for end in ends)
    return Row(category, metric, float(value), low, high, n, unit, note)


def _stream(key: jax.Array, category: str, metric: str) -> jax.Array:
    """A key of the figure's own, so that no figure depends on which others are made."""
    return jax.random.fold_in(key, zlib.crc32(f"{category}/{metric}".encode()))
