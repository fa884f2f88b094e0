"""Rows of K responses to one prompt: the best of them, a full ranking, or a target score for each.

``{query, sample0 .. sample3, best}`` is the format of lm-human-preferences (Ziegler et al. 2019), texts or lists of
GPT-2 token ids; ``{prompt, responses: [...]}`` comes with ``best`` (a number from 0), ``ranking`` (response numbers
from 0, best first), ``ranks`` (one for each response, the lowest is best, equal ones are ties) or ``targets``
(numbers). As in InstructGPT (Ouyang et al. 2022) a ranking becomes all of its ordered pairs, which together count as
one comparison.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from rlhf_jax.data import chat
from rlhf_jax.data.chat import ChatTemplate
from rlhf_jax.data.records import Record
from rlhf_jax.data.rows import Comparison, Demonstration, Drop, Pair, Text, checked, kind, names, require, text
from rlhf_jax.errors import UserError

PAD_ID = 50259  # of lm-human-preferences, GPT-2's vocabulary size + 2; no token of GPT-2
EQUAL = "chosen and rejected are identical"
ALL_EQUAL = "all responses are identical"
TIED = "all responses are ranked equal"
LABELS = ("best", "ranking", "ranks", "targets")
_SAMPLE = re.compile(r"sample([0-9]{1,4})")
_LARGEST = 3.4e38  # of float32


class Answers(NamedTuple):
    """K responses to one prompt and what is known of them."""

    prompt: Text
    responses: tuple[Text, ...]
    source: str
    best: int | None
    ranks: tuple[float, ...] | None  # the lowest is best
    targets: tuple[float, ...] | None


def is_answers(row: dict[str, Any]) -> bool:
    """Whether the row has the keys of one of these formats."""
    return "responses" in row or any(_SAMPLE.fullmatch(key) for key in row)


def prompt_key(row: dict[str, Any]) -> str:
    """``query`` in rows that have it instead of ``prompt``."""
    return "query" if "query" in row and "prompt" not in row else "prompt"


def prompt(record: Record, template: ChatTemplate) -> Text:
    """The prompt alone: text, token ids or messages."""
    key = prompt_key(record.value)
    require(record, (key,))
    if chat.is_chat(record.value, key):
        return chat.prompt(record, key, template)[0]
    return _text_or_ids(record, key, record.value[key])


def read(record: Record, template: ChatTemplate) -> Answers:
    """Checks a row and takes it apart.

    Raises:
      UserError: for missing or contradictory labels and for whatever is wrong in a field, with file and line.
      Drop: if all responses are equal, unless they have targets of their own.
    """
    row = record.value
    samples = sorted((key for key in row if _SAMPLE.fullmatch(key)), key=lambda key: int(key[6:]))
    if "responses" in row:
        if not isinstance(row["responses"], list):
            raise UserError(f"{record.source}: 'responses' must be a list, found {kind(row['responses'])}")
        values = {f"'responses'[{i}]": value for i, value in enumerate(row["responses"])}
    else:
        expected = [f"sample{i}" for i in range(len(samples))]
        require(record, expected)
        # A table has the same columns in all rows; the last ones are empty where there are fewer responses.
        filled = max((i for i, key in enumerate(samples) if row[key] is not None), default=-1)
        values = {key: row[key] for key in samples[: filled + 1]}
    responses = tuple(_text_or_ids(record, key, value) for key, value in values.items())
    labels = [key for key in LABELS if row.get(key) is not None]
    targets = _numbers(record, "targets", len(responses)) if "targets" in labels else None
    if len(responses) < (1 if targets else 2):
        raise UserError(f"{record.source}: a comparison needs at least 2 responses, found {len(responses)}")
    if not labels:
        raise UserError(f"{record.source}: expected one of the keys {', '.join(LABELS)}, found {names(row)}")
    if targets is None and len(labels) > 1:
        raise UserError(f"{record.source}: expected one of {', '.join(LABELS)}, found {' and '.join(labels)}")
    if targets is None and len(set(responses)) == 1:
        raise Drop(EQUAL if len(responses) == 2 else ALL_EQUAL)
    best = _best(record, len(responses)) if "best" in labels else None
    ranks = None
    if "ranks" in labels:
        ranks = _numbers(record, "ranks", len(responses))
    elif "ranking" in labels:
        ranks = _ranks_of(record, len(responses))
    return Answers(prompt(record, template), responses, record.source, best, ranks, targets)


def comparisons(answers: Answers) -> list[Pair | Comparison]:
    """Rows to learn scores from: a ranking's pairs, a pair of two, else one comparison of all."""
    if answers.targets is not None:
        return [Comparison(answers.prompt, answers.responses, answers.source, targets=answers.targets)]
    if answers.ranks is not None or len(answers.responses) == 2:
        return list(pairs(answers))
    return [Comparison(answers.prompt, answers.responses, answers.source, best=answers.best)]


def pairs(answers: Answers) -> list[Pair]:
    """All ordered pairs of a ranking, or the best response with each other one; each weighs 1 / (number of them).

    Ties and equal texts make no pair; without any pair the row is dropped.
    """
    if answers.ranks is None and answers.best is None:
        raise UserError(f"{answers.source}: holds targets, which are no preference; pairs need best, ranking or ranks")
    ranks = answers.ranks or [float(i != answers.best) for i in range(len(answers.responses))]
    ordered = [
        (better, worse)
        for better, rank in zip(answers.responses, ranks, strict=True)
        for worse, other in zip(answers.responses, ranks, strict=True)
        if rank < other and better != worse
    ]
    if not ordered:
        raise Drop(TIED if len(set(ranks)) == 1 else ALL_EQUAL)
    weight = 1 / len(ordered) if len(ordered) > 1 else None
    return [Pair(answers.prompt, better, worse, answers.source, weight) for better, worse in ordered]


def demonstration(answers: Answers) -> Demonstration:
    """The best response, the first of several."""
    best = answers.best
    if answers.ranks is not None:
        best = answers.ranks.index(min(answers.ranks))
    if best is None:
        raise UserError(f"{answers.source}: holds targets; a demonstration needs best, ranking or ranks")
    return Demonstration(answers.prompt, answers.responses[best], answers.source)


def _text_or_ids(record: Record, key: str, value: Any) -> Text:
    what = key if key.startswith("'") else repr(key)
    if isinstance(value, str):
        return text(record, key) if key in record.value else checked(record, what, value, may_be_space=False)
    if not isinstance(value, list):
        raise UserError(f"{record.source}: {what} must be a string or a list of token ids, found {kind(value)}")
    for i in value:
        if type(i) is not int or i < 0:
            raise UserError(f"{record.source}: {what} must hold token ids, found {kind(i)}")
    ids = tuple(i for i in value if i != PAD_ID)
    if not ids:
        raise UserError(f"{record.source}: {what} is empty; remove the row or fill it in")
    return ids


def _best(record: Record, count: int) -> int:
    best = record.value["best"]
    if type(best) is not int or not 0 <= best < count:
        raise UserError(
            f"{record.source}: 'best' must be the number of a response, 0 to {count - 1}, found {kind(best)}"
        )
    return best


def _ranks_of(record: Record, count: int) -> tuple[float, ...]:
    ranking = record.value["ranking"]
    if not isinstance(ranking, list) or any(type(i) is not int for i in ranking) or sorted(ranking) != [*range(count)]:
        raise UserError(
            f"{record.source}: 'ranking' must hold each response number from 0 to {count - 1} once, best first, found "
            f"{ranking!r}; for the rank of each response use 'ranks'"
        )
    return tuple(float(ranking.index(i)) for i in range(count))


def _numbers(record: Record, key: str, count: int) -> tuple[float, ...]:
    values: Sequence[Any] = record.value[key]
    if not isinstance(values, list) or len(values) != count:
        found = f"{len(values)}" if isinstance(values, list) else kind(values)
        raise UserError(
            f"{record.source}: {key!r} must be a list of {count} numbers, one for each response, found {found}"
        )
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LARGEST:
            raise UserError(f"{record.source}: {key!r} must hold numbers, found {kind(value)}")
    return tuple(map(float, values))
