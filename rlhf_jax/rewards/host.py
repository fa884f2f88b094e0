"""Rewards in ordinary Python: a HostReward runs between two jits, on NumPy arrays; ``on_host``
calls it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.types import Rollout

Columns = Mapping[str, Sequence[Any]]
"""{name: one value for each row}, the other columns of the prompts' data rows."""

HostScores = Sequence[float | None] | np.ndarray
"""[B] numbers, or None for a row that cannot be scored."""

_LARGEST = float(np.finfo(np.float32).max)


class Decoder(Protocol):
    """What a tokenizer must have for rewards that read texts. The text has no pad and no EOS in it."""

    def decode(self, ids: list[int], /) -> str: ...


HostReward = Callable[[Rollout, Columns], tuple[HostScores, Mapping[str, HostScores]]]
"""A reward in ordinary Python: (scores [B], {name of a part: [B]}) of a rollout of NumPy arrays and
the columns.
"""


def on_host(
    reward: HostReward, rollout: Rollout, columns: Columns, name: str = "the reward"
) -> tuple[Rollout, dict[str, np.ndarray]]:
    """Scores a rollout of NumPy or JAX arrays outside jit; errors call it by the ``name``.

    Returns:
      The Rollout with ``scores`` [B] float32, and {part: [B] float32}, as NumPy arrays. A row whose
      score is None gets an empty ``response_mask``, so that nothing reads it; its score is 0, and
      so is a part that is None.

    Raises:
      FloatingPointError: the score or a part of a present row is not finite; it names the rows.
      UserError: the reward returned something else than one number or None for each row.
    """
    host: Any = jax.tree.map(np.asarray, rollout)  # Any: the fields are declared as JAX arrays
    mask = host.response_mask
    labels = [f"row {i}" for i in range(len(mask))]
    if host.row_ids is not None:
        labels = [
            f"{label} (data row {row_id})"
            for label, row_id in zip(labels, host.row_ids, strict=True)
        ]
    scores, parts = _numbers(name, reward(host, columns), labels, (mask != 0).any(axis=1))
    kept = np.array([score is not None for score in scores], mask.dtype)
    host = host.replace(scores=_filled(scores), response_mask=mask * kept[:, None])
    return host, {name: _filled(part) for name, part in parts.items()}


def from_text(fn: Callable[..., Any], tokenizer: Decoder) -> HostReward:
    """A HostReward from ``fn(prompts, responses, **columns)``, which sees texts.

    ``prompts`` and ``responses`` are lists of str, and each column of the prompts' data rows is a
    list too. All have one entry for each present row; absent rows are left out. The prompt is every
    real token before the first response token, the response is what the policy said (so without the
    holes of ``response_mask``).

    Args:
      fn: returns one number for each row, None for a row that cannot be scored; or a pair of such a
        list and {name of a part: such a list}.

    Returns:
      HostReward with the errors of ``on_host``, which name the prompts too.
    """

    def score(rollout: Rollout, columns: Columns) -> tuple[HostScores, dict[str, HostScores]]:
        tokens, in_response = np.asarray(rollout.tokens), np.asarray(rollout.response_mask) != 0
        in_prompt = (np.cumsum(in_response, axis=1) == 0) & (
            np.asarray(rollout.attention_mask) != 0
        )
        present = in_response.any(axis=1)
        rows = np.flatnonzero(present).tolist()
        if not rows:
            return [None] * len(present), {}
        decode, masks = tokenizer.decode, (in_prompt, in_response)
        prompts, responses = ([decode(tokens[i, mask[i]].tolist()) for i in rows] for mask in masks)
        result = fn(
            prompts,
            responses,
            **{name: [column[i] for i in rows] for name, column in columns.items()},
        )
        pair = result if isinstance(result, tuple) else (result, {})
        labels = [f"row {i}, prompt {prompt!r}" for i, prompt in zip(rows, prompts, strict=True)]
        scores, parts = _numbers("the reward function", pair, labels, present[rows])
        spread = [dict(zip(rows, numbers, strict=True)) for numbers in (scores, *parts.values())]
        all_rows = [[by_row.get(i) for i in range(len(present))] for by_row in spread]
        return all_rows[0], dict(zip(parts, all_rows[1:], strict=True))

    return score


def _numbers(
    name: str,
    result: tuple[HostScores, Mapping[str, HostScores]],
    labels: Sequence[str],
    present: np.ndarray,
) -> tuple[list[float | None], dict[str, list[float | None]]]:
    """Scores and parts as numbers, None for rows that are absent or cannot be scored; ``labels``
    name the rows.
    """
    scores, parts = result
    numbers = _checked(name, scores, labels, present)
    kept = np.array([number is not None for number in numbers], bool)
    return numbers, {
        part: _checked(f"reward part {part!r}", values, labels, kept)
        for part, values in parts.items()
    }


def _checked(
    name: str, scores: HostScores, labels: Sequence[str], present: np.ndarray
) -> list[float | None]:
    entries = list(scores) if hasattr(scores, "__iter__") else []
    if len(entries) != len(labels):
        given = len(entries) if entries else repr(scores)
        raise UserError(f"{name}: expected {len(labels)} scores, one for each row, got {given}")
    numbers: list[float | None] = []
    not_finite = []
    for entry, label, here in zip(entries, labels, present, strict=True):
        try:
            number = None if entry is None or not here else float(entry)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{name}: expected a number or None for {label}, got {entry!r}"
            ) from error
        if number is not None and not abs(number) <= _LARGEST:
            not_finite.append(f"{label}: {number}")
        numbers.append(number)
    if not_finite:
        raise FloatingPointError(
            f"{name} is not finite ({'; '.join(not_finite)}); return None to leave a row out"
        )
    return numbers


def _filled(numbers: Sequence[float | None]) -> np.ndarray:
    return np.array([0.0 if number is None else number for number in numbers], np.float32)
