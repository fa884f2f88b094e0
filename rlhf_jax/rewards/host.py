"""Rewards in ordinary Python: a HostReward runs between two jits, on NumPy arrays; ``on_host`` calls it.

``rewards`` has these names too.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.types import Rollout


class Decoder(Protocol):
    """What ``from_text`` needs of a tokenizer. Pad and EOS are expected to be left out of the text."""

    def decode(self, ids: list[int], /) -> str: ...


_LARGEST = float(np.finfo(np.float32).max)

HostScores = Sequence[float | None] | np.ndarray
"""[B] numbers, or None for a row that cannot be scored."""


class HostReward(Protocol):
    """A reward in ordinary Python, called by ``on_host`` with a rollout of NumPy arrays and the data's other columns.

    Returns scores [B], or (scores, {part: [B]}). None marks a row that cannot be scored.
    """

    def __call__(
        self, rollout: Rollout, columns: Mapping[str, Sequence[Any]], /
    ) -> HostScores | tuple[HostScores, dict[str, HostScores]]: ...


class HostResult(NamedTuple):
    """A rollout with its scores, and the named parts of the reward [B], as NumPy arrays."""

    rollout: Rollout
    parts: dict[str, np.ndarray]


def on_host(reward: HostReward, rollout: Rollout, columns: Mapping[str, Sequence[Any]]) -> HostResult:
    """Scores a rollout outside jit.

    A row whose score is None gets an empty ``response_mask`` and so takes part in nothing; its score is 0, as is a part
    that is None.

    Args:
      rollout: NumPy or JAX arrays.
      columns: {name: one value a row}, the other columns of the prompts' data rows.

    Returns:
      The rollout, as NumPy arrays, with ``scores`` [B] float32 and its new ``response_mask``; and the parts.

    Raises:
      FloatingPointError: naming the rows, if a present row's score or part is not finite.
      UserError: the reward gave no number, or not one for each row.
    """
    host: Any = jax.tree.map(np.asarray, rollout)  # Any: the fields are declared as JAX arrays
    mask = host.response_mask
    labels = [f"row {i}" for i in range(len(mask))]
    if host.row_ids is not None:
        labels = [f"{label} (data row {row_id})" for label, row_id in zip(labels, host.row_ids, strict=True)]
    result = reward(host, columns)
    scores, named = result if isinstance(result, tuple) else (result, {})
    checked = _checked("the reward", scores, labels, (mask != 0).any(axis=1))
    kept = np.array([score is not None for score in checked], bool)
    parts = {name: _filled(_checked(f"reward part {name!r}", part, labels, kept)) for name, part in named.items()}
    mask = np.where(kept[:, None], mask, np.zeros_like(mask))
    return HostResult(host.replace(scores=_filled(checked), response_mask=mask), parts)


def _checked(name: str, scores: HostScores, labels: Sequence[str], present: np.ndarray) -> list[float | None]:
    """The scores as numbers, None where a row is absent or cannot be scored; ``labels`` name the rows in errors."""
    try:
        entries = list(scores)
    except TypeError as error:
        raise UserError(f"{name}: expected {len(labels)} scores, one a row, got {scores!r}") from error
    if len(entries) != len(labels):
        raise UserError(f"{name}: expected {len(labels)} scores, one a row, got {len(entries)}")
    checked: list[float | None] = []
    for score, label, here in zip(entries, labels, present, strict=True):
        try:
            checked.append(None if score is None or not here else float(score))
        except (TypeError, ValueError) as error:
            raise UserError(f"{name}: expected a number or None for {label}, got {score!r}") from error
    named = zip(checked, labels, strict=True)
    bad = [f"{label}: {score}" for score, label in named if score is not None and not abs(score) <= _LARGEST]
    if bad:
        raise FloatingPointError(f"{name} is not finite ({'; '.join(bad)}); return None to leave a row out")
    return checked


def _filled(scores: Sequence[float | None]) -> np.ndarray:
    return np.array([0.0 if score is None else score for score in scores], np.float32)


def from_text(fn: Callable[..., Any], tokenizer: Decoder) -> HostReward:
    """Makes a HostReward of ``fn(prompts, responses, **columns)``, which sees texts.

    ``prompts`` and ``responses`` are lists of str, and each column of the prompts' data rows is a list too, with one
    entry per present row: absent rows are not shown. The prompt is every real token before the first response token,
    the response what the policy said (so without the holes of ``response_mask``).

    Args:
      fn: returns one number a row, None where the row cannot be scored; or (those, {part: list of the same kind}).
      tokenizer: has ``decode(list[int]) -> str``.

    Returns:
      HostReward. It raises FloatingPointError naming rows and prompts where ``fn`` gives a number that is not finite,
      and UserError where it gives no number, or not one for each row it was shown.
    """

    def score(
        rollout: Rollout, columns: Mapping[str, Sequence[Any]]
    ) -> HostScores | tuple[HostScores, dict[str, HostScores]]:
        tokens, said = np.asarray(rollout.tokens), np.asarray(rollout.response_mask) != 0
        in_prompt = (np.cumsum(said, axis=1) == 0) & (np.asarray(rollout.attention_mask) != 0)
        present = said.any(axis=1)
        rows = np.flatnonzero(present).tolist()
        if not rows:
            return [None] * len(present)
        prompts = [tokenizer.decode(tokens[i, in_prompt[i]].tolist()) for i in rows]
        responses = [tokenizer.decode(tokens[i, said[i]].tolist()) for i in rows]
        labels = [f"row {i}, prompt {prompt!r}" for i, prompt in zip(rows, prompts, strict=True)]

        result = fn(prompts, responses, **{name: [column[i] for i in rows] for name, column in columns.items()})
        scores, parts = result if isinstance(result, tuple) else (result, {})
        checked = _checked("the reward function", scores, labels, present[present])
        kept = np.array([number is not None for number in checked], bool)
        named = {part: _checked(f"reward part {part!r}", shown, labels, kept) for part, shown in parts.items()}
        scores = _spread(checked, present)
        if not isinstance(result, tuple):
            return scores
        return scores, {part: _spread(numbers, present) for part, numbers in named.items()}

    return score


def _spread(shown: Sequence[float | None], present: np.ndarray) -> list[float | None]:
    """One entry for every row from entries for the present ones."""
    entries = iter(shown)
    return [next(entries) if here else None for here in present]
