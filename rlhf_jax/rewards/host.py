"""Rewards in ordinary Python: a HostReward runs between two jits, on NumPy arrays; ``on_host``
calls it.

A row is scored or `Unscored`, which has a reason and is never a number. Scores, components and
reasons of a row stay together until ``on_host`` makes arrays of them.
"""

import contextlib
import copy
import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from numbers import Number
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.types import Rollout

Columns = Mapping[str, Sequence[Any]]
"""{name: one value for each row}, the other columns of the prompts' data rows."""


class Unscored(NamedTuple):
    """A row, or a component of it, that cannot be scored, and why. ``None`` in the scores of a
    reward is one without a reason of its own.
    """

    reason: str
    parts: tuple[str, ...] = ()  # of a sum, which have no score


Score = float | np.ndarray | Unscored
"""Of a row: a number, dense rewards [T], or why there is none."""

Components = dict[str, list[Score]]

HostValues = Sequence[Any] | np.ndarray
"""[B] or [B, T] numbers; or for each row a number, dense rewards [T], None or `Unscored`."""

HostScores = tuple[HostValues, Mapping[str, HostValues]]
"""Scores, and {name of a component: as the scores, for each row}."""

HostReward = Callable[[Rollout, Columns], HostScores]
"""A reward in ordinary Python, of a rollout of NumPy arrays and the columns."""

Place = Callable[[int, list[Any]], np.ndarray]
"""(row, its rewards at tokens) -> dense rewards [T]; UserError if they do not fit the response."""

NO_REASON = Unscored("the reward is None")
MISSING = Unscored("the row has no response")
_FEW = 3  # rows that a message shows
_LARGEST = float(np.finfo(np.float32).max)


class RowScores(NamedTuple):
    """What a reward says of B rows."""

    row_ids: Any  # [B] of the rollout that was scored, or None
    scores: list[Score]
    components: Components
    dense: Mapping[str | None, bool]  # {component, None for scores: whether any row has [T]}

    def arrays(self, mask: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Scores and components [B] float32, or [B, T] if a row has numbers at tokens: a number for
        the row then stands at its last token. Where a row has none, scores are 0 and components
        NaN. Outside the response scores are 0; components may say something of the prompt.
        """
        components = {
            name: _filled(self.components.get(name, [MISSING] * len(mask)), math.nan, mask, dense)
            for name, dense in self.dense.items()
            if name is not None
        }
        scores = _filled(self.scores, 0.0, mask, self.dense[None])
        return (np.where(mask != 0, scores, 0.0) if scores.ndim == 2 else scores), components

    def reasons(self) -> list[str | None]:
        """[B] why each row with a response has no score; None: it has one, or no response."""
        faults = (x if isinstance(x, Unscored) else MISSING for x in self.scores)
        return [None if fault is MISSING else fault.reason for fault in faults]


def _filled(scores: list[Score], instead: float, mask: np.ndarray, is_dense: bool) -> np.ndarray:
    filled = np.full(mask.shape if is_dense else len(mask), instead, np.float32)
    for row, score in enumerate(scores):
        if not isinstance(score, Unscored):
            filled[row] = at_tokens(score, mask[row]) if is_dense else score
    return filled


def at_tokens(score: float | np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Dense rewards [T] of a row with the response mask [T]: a number stands at its last token."""
    if isinstance(score, np.ndarray):
        return score
    dense = np.zeros(len(mask))
    dense[np.flatnonzero(mask)[-1]] = score
    return dense


def row_score(score: Score) -> float | Unscored:
    """A score as one number: the sum of dense rewards."""
    return float(np.sum(score)) if isinstance(score, np.ndarray) else score


def on_host(
    reward: HostReward,
    rollout: Rollout,
    columns: Columns,
    name: str = "the reward",
) -> tuple[Rollout, dict[str, np.ndarray]]:
    """Scores a rollout of NumPy or JAX arrays outside jit. Error messages call the reward by
    ``name``.

    Returns:
      The Rollout with ``scores`` [B] float32, or [B, T] if the reward is dense, and {component: [B]
      or [B, T] float32}, as NumPy arrays. An unscored row gets an empty ``response_mask``, which
      makes it a missing row; its score is 0. A component that is unscored is NaN.

    Raises:
      FloatingPointError: the score or a component of a row is not finite; it names the row.
      UserError: the reward did not return one number or None for each row, or called ``sys.exit``.
    """
    host: Any = jax.tree.map(np.asarray, rollout)  # Any: the fields are declared as JAX arrays
    return with_scores(host, row_scores(reward, host, columns, name))


def with_scores(host: Any, scored: RowScores) -> tuple[Rollout, dict[str, np.ndarray]]:
    """The rollout of NumPy arrays that was scored, with its scores, as ``on_host`` has it."""
    if not np.array_equal(scored.row_ids, host.row_ids):
        raise ValueError("the scores are those of other rows")
    scores, components = scored.arrays(host.mask)
    mask = host.response_mask.copy()
    for row, score in enumerate(scored.scores):
        if isinstance(score, Unscored):
            mask[row] = 0
    return host.replace(scores=scores, response_mask=mask), components


def row_scores(
    reward: HostReward, host: Any, columns: Columns, name: str = "the reward"
) -> RowScores:
    """The checked scores of a rollout of NumPy arrays; errors as of ``on_host``."""
    labels = [f"row {i}" for i in range(len(host.tokens))]
    if host.row_ids is not None:
        labels = [f"row {i} (data row {row_id})" for i, row_id in enumerate(host.row_ids)]
    result = pair(name, called(name, reward, host, copied(columns)))
    width = host.tokens.shape[1]

    def place(row: int, rewards: list[Any]) -> np.ndarray:
        where = f"{name}, {labels[row]}"
        numbers = [number(entry, where) for entry in rewards]
        is_whole = len(numbers) == width and None not in numbers
        if not is_whole:
            fault = f"expected a number for each of {width} columns"
            raise UserError(f"{where}: {fault}, {got(rewards)}")
        return np.array(numbers, float)

    present = host.present.tolist()
    scores, components = checked(name, result, labels, present, place)
    of_all: dict[Any, list[Score]] = {None: scores, **components}
    dense = {name: any(isinstance(x, np.ndarray) for x in of) for name, of in of_all.items()}
    return RowScores(host.row_ids, scores, components, dense)


def copied(columns: Columns) -> dict[str, list[Any]]:
    """The columns for one function, which may change what it gets: no other reward, row of the same
    prompt or later step reads it.
    """
    return {name: list(map(copy.deepcopy, column)) for name, column in columns.items()}


def called(name: str, fn: Callable[..., Any], *args: Any, **columns: Any) -> Any:
    """The result of the function. A ``SystemExit`` would end the run as if it were complete, and
    from another working folder the run would not find its relative paths.
    """
    try:
        with contextlib.chdir("."):
            return fn(*args, **columns)
    except SystemExit as error:
        raise UserError(
            f"{name} called sys.exit({error.code!r}); it may not end the run: return None for a "
            "row that cannot be scored, or raise an exception"
        ) from error


def has_components(result: Any) -> bool:
    """Whether the result is a pair of scores and {name of a component: scores}."""
    return isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)


def pair(name: str, result: Any) -> Any:
    """The result of a reward of a rollout; UserError unless it has ``has_components``."""
    if not has_components(result):
        pairs = "(scores, {component: scores}), or (scores, {})"
        raise UserError(f"{name}: expected a pair, {pairs}, {got(result)}")
    return result


def checked(
    name: str,
    result: HostScores,
    labels: Sequence[str],
    present: Sequence[bool],
    place: Place,
) -> tuple[list[Score], Components]:
    """Scores and components of each row. Error messages name a row by its label.

    Args:
      present: which rows are not missing; the others are `MISSING`.
    """
    scores, components = result
    of_rows = _of_rows(name, scores, labels, present, place)
    is_scored = [not isinstance(score, Unscored) for score in of_rows]
    of_components = {}
    for component, values in components.items():
        where = f"{name}, component {component!r}"
        of_component = _of_rows(where, values, labels, is_scored, place)
        if getattr(values, "ndim", 1) == 2:  # it is of tokens, also where no row has any
            nothing = np.full(np.shape(values)[1], math.nan)
            of_component = [nothing if isinstance(x, Unscored) else x for x in of_component]
        of_components[component] = of_component
    return of_rows, of_components


def _of_rows(
    name: str,
    values: Any,
    labels: Sequence[str],
    present: Sequence[bool],
    place: Place,
) -> list[Score]:
    values = plain(values)
    if not isinstance(values, list | tuple) or len(values) != len(labels):
        raise UserError(
            f"{name}: expected a list, tuple or array of {len(labels)} scores, one for each row, "
            f"{got(values)}"
        )
    scores: list[Score] = []
    not_finite = []
    for row, label in enumerate(labels):
        score: Score = MISSING
        if present[row]:
            score = _score(row, values[row], f"{name}, {label}", place)
        scores.append(score)
        if isinstance(score, Unscored):
            continue
        if not np.all(np.isfinite(score)):
            not_finite.append(f"{label}: {row_score(score)}")
    if not_finite:
        listed = "; ".join(not_finite[:_FEW])
        if len(not_finite) > _FEW:
            listed += f"; and {len(not_finite) - _FEW} more of {len(labels)} rows"
        raise FloatingPointError(f"{name} is not finite ({listed}); return None to leave a row out")
    return scores


def _score(row: int, entry: Any, where: str, place: Place) -> Score:
    if isinstance(entry, Unscored):
        return entry
    entry = plain(entry)
    if isinstance(entry, list | tuple):
        return place(row, list(entry))
    value = number(entry, where)
    return NO_REASON if value is None else value


def number(entry: Any, where: str) -> float | None:
    """A number as a float; True and False are 1 and 0."""
    entry = plain(entry)
    if entry is None:
        return None
    is_number = isinstance(entry, Number) and not isinstance(entry, complex)
    if not is_number:
        raise UserError(f"{where}: expected a number or None, {got(entry)}")
    try:
        value = float(entry)
    except OverflowError:  # an int that is no float
        value = math.inf if entry > 0 else -math.inf
    except ValueError:  # a signalling NaN
        value = math.nan
    return math.copysign(math.inf, value) if abs(value) > _LARGEST else value


def plain(values: Any) -> Any:
    """An array or tensor of any library as Python numbers, in lists; anything else as it is."""
    if isinstance(values, Unscored) or not hasattr(values, "__array__"):
        return values
    # A tensor may lie on a device or have a gradient; its own list needs neither.
    return values.tolist() if hasattr(values, "tolist") else np.asarray(values).tolist()


def got(value: Any) -> str:
    """The end of an error message."""
    return f"got {type(value).__name__}: {reprlib.repr(value)}"
