"""Rewards in ordinary Python: a HostReward runs between two jits, on NumPy arrays; ``on_host``
calls it.
"""

import math
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Number
from typing import Any, Protocol

import jax
import numpy as np
from numpy import ma

from rlhf_jax.errors import UserError
from rlhf_jax.types import Rollout

Columns = Mapping[str, Sequence[Any]]
"""{name: one value for each row}, the other columns of the prompts' data rows."""

HostValues = Sequence[float | None] | np.ndarray
"""[B] numbers, or None for a row that cannot be scored."""

HostScores = tuple[HostValues, Mapping[str, HostValues]]
"""Scores [B], and {name of a part: [B]}."""

HostReward = Callable[[Rollout, Columns], HostScores]
"""A reward in ordinary Python, of a rollout of NumPy arrays and the columns."""

TextScorer = Callable[[Sequence[Any], Sequence[str]], np.ndarray]
"""(conversations, responses) -> scores [N]; a conversation is a list of messages."""

_LARGEST = float(np.finfo(np.float32).max)


class Decoder(Protocol):
    """What a tokenizer must have for rewards that read texts: a text without pads and EOS."""

    def decode(self, ids: list[int], /) -> str: ...


def on_host(
    reward: HostReward,
    rollout: Rollout,
    columns: Columns,
    name: str = "the reward",
) -> tuple[Rollout, dict[str, np.ndarray]]:
    """Scores a rollout of NumPy or JAX arrays outside jit. Error messages call the reward by
    ``name``.

    Returns:
      The Rollout with ``scores`` [B] float32, and {part: [B] float32}, as NumPy arrays. A row whose
      score is None gets an empty ``response_mask``, which makes it a missing row; its score is 0,
      and so is a part that is None.

    Raises:
      FloatingPointError: the score or a part of a row is not finite; it names the row.
      UserError: the reward did not return one number or None for each row, or called ``sys.exit``.
    """
    host: Any = jax.tree.map(np.asarray, rollout)  # Any: the fields are declared as JAX arrays
    mask = host.response_mask
    labels = [f"row {i}" for i in range(len(mask))]
    if host.row_ids is not None:
        labels = [f"row {i} (data row {row_id})" for i, row_id in enumerate(host.row_ids)]
    result = _called(name, reward, host, columns)
    if not _has_parts(result):
        raise UserError(f"{name}: expected a pair, (scores, {{part: scores}}), {_got(result)}")
    scores, parts = _checked(name, result, labels, host.present)
    is_scored = ~ma.getmaskarray(scores)
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

    def score(rollout: Rollout, columns: Columns) -> HostScores:
        in_response = rollout.mask
        is_before = np.cumsum(in_response, axis=1) == 0
        in_prompt = is_before & (rollout.attention_mask != 0)
        num_rows = len(in_response)
        rows = np.flatnonzero(rollout.present).tolist()
        if not rows:
            return ma.masked_all(num_rows), {}

        def texts(mask: Any) -> list[str]:
            return [tokenizer.decode(rollout.tokens[i, mask[i]].tolist()) for i in rows]

        prompts = texts(in_prompt)
        present_columns = {key: [column[i] for i in rows] for key, column in columns.items()}
        result = _called(name, fn, prompts, texts(in_response), **present_columns)
        if not _has_parts(result):
            result = (result, {})
        labels = [f"row {i}, prompt {prompt!r}" for i, prompt in zip(rows, prompts, strict=True)]
        scores, parts = _checked(name, result, labels, [True] * len(rows))

        def in_all_rows(values: ma.MaskedArray) -> ma.MaskedArray:
            whole = ma.masked_all(num_rows)
            whole[rows] = values
            return whole

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

    def score_rollout(rollout: Rollout, columns: Columns) -> HostScores:
        in_response = rollout.mask
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


def _checked(
    name: str,
    result: HostScores,
    labels: Sequence[str],
    present: Iterable[bool],
) -> tuple[ma.MaskedArray, dict[str, ma.MaskedArray]]:
    """Scores and parts as numbers [B], masked for rows that are missing or cannot be scored.
    Error messages name a row by its label.
    """
    scores, parts = result
    numbers = _numbers(name, scores, labels, present)
    is_scored = ~ma.getmaskarray(numbers)
    checked = {
        part: _numbers(f"{name}, part {part!r}", values, labels, is_scored)
        for part, values in parts.items()
    }
    return numbers, checked


def _numbers(
    name: str,
    values: Any,
    labels: Sequence[str],
    present: Iterable[bool],
) -> ma.MaskedArray:
    if isinstance(values, np.ndarray | jax.Array):
        values = values.tolist()
    if not isinstance(values, list | tuple) or len(values) != len(labels):
        raise UserError(
            f"{name}: expected a list, tuple or array of {len(labels)} scores, one for each row, "
            f"{_got(values)}"
        )
    rows = zip(values, labels, present, strict=True)
    numbers = [_number(entry, f"{name}, {label}") if here else None for entry, label, here in rows]
    not_finite = []
    for label, number in zip(labels, numbers, strict=True):
        if number is not None and not math.isfinite(number):
            not_finite.append(f"{label}: {number}")
    if not_finite:
        listed = "; ".join(not_finite)
        raise FloatingPointError(f"{name} is not finite ({listed}); return None to leave a row out")
    return ma.masked_invalid(np.array(numbers, float))


def _number(entry: Any, where: str) -> float | None:
    """A score as a float; True and False are 1 and 0."""
    if getattr(entry, "shape", None) == ():
        entry = entry.item()
    if entry is None:
        return None
    is_number = isinstance(entry, Number) and not isinstance(entry, complex)
    if not is_number:
        raise UserError(f"{where}: expected a number or None, {_got(entry)}")
    if abs(entry) > _LARGEST:  # such as an int that is no float
        return math.inf if entry > 0 else -math.inf
    return float(entry)


def _got(value: Any) -> str:
    """The end of an error message."""
    return f"got {type(value).__name__}: {reprlib.repr(value)}"


def _filled(numbers: ma.MaskedArray) -> np.ndarray:
    return numbers.filled(0).astype(np.float32)
