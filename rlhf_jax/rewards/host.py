"""Rewards in ordinary Python: a HostReward runs between two jits, on NumPy arrays; ``on_host``
calls it.
"""

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from numbers import Number
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
    """What a tokenizer must have for rewards that read texts: a text without pads and EOS."""

    def decode(self, ids: list[int], /) -> str: ...


HostReward = Callable[[Rollout, Columns], tuple[HostScores, Mapping[str, HostScores]]]
"""A reward in ordinary Python: (scores [B], {name of a part: [B]}) of a rollout of NumPy arrays and
the columns.
"""


TextScorer = Callable[[Sequence[Any], Sequence[str]], np.ndarray]
"""(conversations, responses) -> scores [N]; a conversation is a list of messages."""


def on_host(
    reward: HostReward,
    rollout: Rollout,
    columns: Columns,
    name: str = "the reward",
) -> tuple[Rollout, dict[str, np.ndarray]]:
    """Scores a rollout of NumPy or JAX arrays outside jit; errors call it by the ``name``.

    Returns:
      The Rollout with ``scores`` [B] float32, and {part: [B] float32}, as NumPy arrays. A row whose
      score is None gets an empty ``response_mask``, which makes it a missing row; its score is 0,
      and so is a part that is None.

    Raises:
      FloatingPointError: the score or a part of a row is not finite; it names the rows.
      UserError: the reward did not return one number or None for each row, or called ``sys.exit``.
    """
    host: Any = jax.tree.map(np.asarray, rollout)  # Any: the fields are declared as JAX arrays
    mask = host.response_mask
    present = (mask != 0).any(axis=1)
    labels = [f"row {i}" for i in range(len(mask))]
    if host.row_ids is not None:
        pairs = zip(labels, host.row_ids, strict=True)
        labels = [f"{label} (data row {row_id})" for label, row_id in pairs]
    result = _called(name, reward, host, columns)
    if not _has_parts(result):
        raise UserError(
            f"{name}: expected a pair, (scores, {{part: scores}}), got {_described(result)}"
        )
    scores, parts = _numbers(name, result, labels, present)
    is_scored = np.array([score is not None for score in scores], mask.dtype)
    host = host.replace(scores=_filled(scores), response_mask=mask * is_scored[:, None])
    return host, {part: _filled(values) for part, values in parts.items()}


def from_text(fn: Callable[..., Any], tokenizer: Decoder) -> HostReward:
    """A HostReward from ``fn(prompts, responses, **columns)``, a function of texts.

    ``prompts`` and ``responses`` are lists of str, and each column of the prompts' data rows is a
    list too. All have one entry for each row that is not missing. The prompt is the text of all
    real tokens before the first response token. The response is the text of the tokens that the
    policy wrote, without the holes of ``response_mask``.

    Args:
      fn: returns a list, tuple or array of one number for each row, or None for a row that cannot
        be scored; or a pair of such scores and {name of a part: such scores}.

    Returns:
      HostReward with the errors of ``on_host``, which name the function and the prompts too.
    """
    name = f"the reward function {getattr(fn, '__name__', type(fn).__name__)}"

    def score(rollout: Rollout, columns: Columns) -> tuple[HostScores, dict[str, HostScores]]:
        tokens = np.asarray(rollout.tokens)
        in_response = np.asarray(rollout.response_mask) != 0
        is_before = np.cumsum(in_response, axis=1) == 0
        in_prompt = is_before & (np.asarray(rollout.attention_mask) != 0)
        present = in_response.any(axis=1)
        rows = np.flatnonzero(present).tolist()
        if not rows:
            return [None] * len(present), {}

        prompts = [tokenizer.decode(tokens[i, in_prompt[i]].tolist()) for i in rows]
        responses = [tokenizer.decode(tokens[i, in_response[i]].tolist()) for i in rows]
        own_columns = {key: [column[i] for i in rows] for key, column in columns.items()}
        result = _called(name, fn, prompts, responses, **own_columns)
        if not _has_parts(result):
            result = (result, {})
        labels = [f"row {i}, prompt {prompt!r}" for i, prompt in zip(rows, prompts, strict=True)]
        scores, parts = _numbers(name, result, labels, present[rows])

        def in_all_rows(values: Sequence[float | None]) -> HostScores:
            by_row = dict(zip(rows, values, strict=True))
            return [by_row.get(i) for i in range(len(present))]

        return in_all_rows(scores), {part: in_all_rows(values) for part, values in parts.items()}

    return score


SINGLE_TURN = (
    "a reward model of another tokenizer reads a prompt and one response; with an environment give "
    "one of the policy's tokenizer"
)


def from_conversations(score_texts: TextScorer, tokenizer: Decoder, name: str) -> HostReward:
    """A HostReward from a model that reads texts: the prompts' messages, as the column ``messages``
    holds them before any template, and the responses.

    Raises:
      UserError: when it is called, beginning with ``name``: a row has no messages or several
        responses, or the model cannot read a text.
    """

    def score(
        prompts: list[str], responses: list[str], messages: Any = (), **columns: Any
    ) -> np.ndarray:
        if not messages or None in messages:
            raise UserError(
                f"{name}: a reward model of another tokenizer reads prompts as texts or messages, "
                "and here is one without; give a reward model of the policy's tokenizer"
            )
        try:
            return score_texts(messages, responses)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error

    from_texts = from_text(score, tokenizer)

    def score_rollout(
        rollout: Rollout, columns: Columns
    ) -> tuple[HostScores, Mapping[str, HostScores]]:
        in_response = np.asarray(rollout.response_mask) != 0
        begins = in_response[:, 1:] & ~in_response[:, :-1]
        if np.any(np.sum(begins, axis=1) > 1):
            raise UserError(f"{name}: {SINGLE_TURN}")
        return from_texts(rollout, columns)

    return score_rollout


def _called(name: str, fn: Callable[..., Any], *args: Any, **columns: Any) -> Any:
    """The result of the function. A ``SystemExit`` would end the run as if it were complete."""
    try:
        return fn(*args, **columns)
    except SystemExit as error:
        raise UserError(
            f"{name} called sys.exit({error.code!r}); a reward may not end the run: return None "
            "for a row that cannot be scored, or raise an exception"
        ) from error


def _has_parts(result: Any) -> bool:
    """Whether the result is a pair of scores and {name of a part: scores}."""
    return isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)


def _numbers(
    name: str,
    result: tuple[HostScores, Mapping[str, HostScores]],
    labels: Sequence[str],
    present: np.ndarray,
) -> tuple[list[float | None], dict[str, list[float | None]]]:
    """Scores and parts as numbers, None for rows that are missing or cannot be scored. Errors name
    the rows by ``labels``.
    """
    scores, parts = result
    numbers = _checked(name, scores, labels, present)
    is_scored = np.array([number is not None for number in numbers], bool)
    checked = {
        part: _checked(f"{name}, part {part!r}", values, labels, is_scored)
        for part, values in parts.items()
    }
    return numbers, checked


def _checked(
    name: str,
    scores: HostScores,
    labels: Sequence[str],
    present: np.ndarray,
) -> list[float | None]:
    if isinstance(scores, np.ndarray | jax.Array):
        is_sequence = scores.ndim == 1
    else:
        is_sequence = isinstance(scores, list | tuple)
    if not is_sequence or len(scores) != len(labels):
        raise UserError(
            f"{name}: expected a list, tuple or one-dimensional array of {len(labels)} scores, one "
            f"for each row, got {_described(scores)}"
        )
    numbers: list[float | None] = []
    not_finite = []
    for entry, label, is_present in zip(scores, labels, present, strict=True):
        number = None
        if is_present:
            number = _number(entry, f"{name}: expected a number or None for {label}")
        if number is not None and not abs(number) <= _LARGEST:
            not_finite.append(f"{label}: {number}")
        numbers.append(number)
    if not_finite:
        raise FloatingPointError(
            f"{name} is not finite ({'; '.join(not_finite)}); return None to leave a row out"
        )
    return numbers


def _number(entry: Any, expected: str) -> float | None:
    """A score as a float; True and False are 1 and 0. ``expected`` begins the UserError."""
    if entry is None:
        return None
    is_scalar = isinstance(entry, Number) or getattr(entry, "shape", None) == ()
    is_text = isinstance(entry, str | bytes)
    try:
        if is_scalar and not is_text and not np.iscomplexobj(entry):
            return float(entry)
    except OverflowError:  # an integer beyond float64
        return math.inf
    except (TypeError, ValueError):  # an array [] of objects that are not numbers
        pass
    raise UserError(f"{expected}, got {_described(entry)}")


def _described(value: Any) -> str:
    """A value in an error message, shortened."""
    shape = getattr(value, "shape", None)
    if shape:
        return f"{type(value).__name__} of shape {tuple(shape)}"
    length = f" of {len(value)}" if isinstance(value, list | tuple | dict | set) else ""
    return f"{type(value).__name__}{length}: {reprlib.repr(value)}"


def _filled(numbers: Sequence[float | None]) -> np.ndarray:
    return np.array([0.0 if number is None else number for number in numbers], np.float32)
