"""Records of other projects in our form: renamed columns (``--columns OURS=THEIRS``), ShareGPT's
turns, Open Assistant's message trees, rows of lm-human-preferences and of RewardBench 2.

THEIRS is one of:

- a key of the record;
- ``OUTER.INNER``: the value inside an object; of a list of objects the values inside each of them;
- ``OUTER.keys`` or ``OUTER.values``: the list of an object's keys, or of its values;
- ``A+B``: two texts with an empty line between them. One of them may be empty.
"""

from collections.abc import Iterator, Sequence
from typing import Any, TypeGuard

from rlhf_jax.data.chat import Message
from rlhf_jax.data.rows import BadRow, Drop, Fields, Record
from rlhf_jax.errors import UserError, did_you_mean

_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names


def adapted(records: Sequence[Record], columns: Sequence[str] = ()) -> list[Record]:
    """The records in our form: with the renamed ``columns``, ShareGPT's turns ``{from, value}`` as
    messages, lists of chosen and of rejected texts as ``responses``, and each ranking of a message
    tree as a record ``{prompt, responses, ranks}``.

    A column that a record lacks does not change the record; see ``unused``.

    Raises:
      UserError: an entry is not of the form ``OURS=THEIRS``.
    """
    names = _names(columns)
    result = []
    for record in records:
        try:
            result += _adapted(record, names)
        except BadRow as error:
            result.append(Record(error, record.source))
    return result


def unused(records: Sequence[Record], columns: Sequence[str]) -> dict[str, str]:
    """{column: sentence} for the columns that no record has. The sentence names the keys of the
    records.
    """
    values = [record.value for record in records if isinstance(record.value, dict)]
    if not values:
        return {}
    keys = dict.fromkeys(key for value in values for key in value)
    sentences = {}
    for ours, theirs in _names(columns).items():
        if not any(_is_present(value, theirs) for value in values):
            entry = f"{ours}={theirs}"
            known = ", ".join(keys)
            hint = did_you_mean(theirs, keys) or f"; the keys are {known}"
            sentences[entry] = f"--columns {entry}: no row has {theirs!r}{hint}"
    return sentences


def _names(columns: Sequence[str]) -> dict[str, str]:
    """{our name: theirs}"""
    names = {}
    for entry in columns:
        ours, _, theirs = entry.partition("=")
        if not ours or not theirs:
            raise UserError(f"--columns {entry}: expected OURS=THEIRS, such as prompt=question")
        names[ours] = theirs
    return names


def _adapted(record: Record, names: dict[str, str]) -> list[Record]:
    """The record in our form, or the rankings of its message tree. ``names``: our names and theirs.

    Raises:
      BadRow: A+B joins a value that is no text, or the record is a broken message tree; as `Drop`
        if the tree has no ranking.
    """
    if not isinstance(record.value, dict):
        return [record]
    row = dict(record.value)
    values = {ours: _joined(record, theirs) for ours, theirs in names.items()}
    for theirs in names.values():
        for key in theirs.split("+"):
            row.pop(key, None)
    row |= {ours: value for ours, value in values.items() if value is not None}
    _gather_responses(row)
    root = row.get("prompt")
    if isinstance(root, dict) and "replies" in root:
        return _rankings(root, record.source)
    turned = {key: _messages(value) for key, value in row.items()}
    return [Record(turned, record.source)]


def _joined(record: Record, theirs: str) -> Any:
    """The value of a column; None if the record lacks it."""
    parts = _parts(record.value, theirs)
    if len(parts) == 1:
        return parts[0]
    for part in parts:
        is_text = isinstance(part, str | None)
        record.expect(is_text, f"--columns {theirs} joins texts with +", part)
    return "\n\n".join(filter(None, parts)) or None


def _is_present(row: Fields, theirs: str) -> bool:
    return any(part is not None for part in _parts(row, theirs))


def _parts(row: Fields, theirs: str) -> list[Any]:
    """The values that ``A+B`` joins, or the one value of any other column."""
    paths = [theirs] if theirs in row else theirs.split("+")
    return [_value(row, path) for path in paths]


def _gather_responses(row: Fields) -> None:
    """Puts into ``responses`` those of lm-human-preferences, ``{query, sample0, sample1, ...}``,
    and of two lists of texts, ``chosen`` and ``rejected``, with their label.

    A table has the same sample columns in all rows: if a row has fewer samples, its last ones are
    empty.
    """
    if "prompt" not in row and "query" in row and row.keys() & {"sample0", "responses"}:
        row["prompt"] = row.pop("query")
    samples: list[Any] = []
    while (key := f"sample{len(samples)}") in row:
        samples.append(row.pop(key))
    while samples and samples[-1] is None:
        samples.pop()
    if samples:
        row["responses"] = samples
    chosen = row.get("chosen")
    rejected = row.get("rejected")
    if _are_texts(chosen) and _are_texts(rejected):
        del row["chosen"]
        del row["rejected"]
        row["responses"] = [*chosen, *rejected]
        if len(chosen) == 1:
            row["best"] = 0
        else:
            best = [0] * len(chosen)
            row["ranks"] = best + [1] * len(rejected)


def _are_texts(value: Any) -> TypeGuard[list[str]]:
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(text, str) for text in value)


def _messages(value: Any) -> Any:
    """Turns ``{from, value}`` as messages ``{role, content}``; any other value itself."""
    if not isinstance(value, list):
        return value
    messages = []
    for turn in value:
        if not isinstance(turn, dict) or not {"from", "value"} <= set(turn):
            return value
        speaker = turn["from"]
        role = _ROLES.get(str(speaker), speaker)
        messages.append({"role": role, "content": turn["value"]})
    return messages


def _value(value: Any, path: str) -> Any:
    """The value under the key or path; None if it is missing."""
    if isinstance(value, list):
        values = [_value(item, path) for item in value]
        return None if None in values else values
    if not isinstance(value, dict):
        return None
    if path in value:
        return value[path]
    outer, _, rest = path.partition(".")
    inner = value.get(outer)
    if isinstance(inner, dict) and rest not in inner:
        if rest == "keys":
            return list(inner)
        if rest == "values":
            return list(inner.values())
    return _value(inner, rest)


def _rankings(root: Any, source: str) -> list[Record]:
    """A record for each prompter's message of a tree with two replies of known rank, where 0 is the
    best rank.
    """
    try:
        rows = list(_walk(root))
    except (KeyError, TypeError, AttributeError) as error:
        fault = f"{type(error).__name__}: {error}"
        raise BadRow(source, f"not a message tree: {fault}") from error
    if not rows:
        raise Drop(source, "message tree without two ranked replies to one prompt")
    numbered = enumerate(rows, 1)
    return [Record(row, f"{source}, prompt {number}") for number, row in numbered]


def _walk(root: Fields) -> Iterator[Fields]:
    """The rankings of a message tree, those of earlier turns first."""
    waiting: list[tuple[Any, list[Message]]] = [(root, [])]  # messages and the turns before them
    while waiting:
        message, before = waiting.pop(0)
        role = "user" if message["role"] == "prompter" else "assistant"
        turns = [*before, {"role": role, "content": message["text"]}]
        replies = message.get("replies") or []
        answers = [reply for reply in replies if reply["role"] == "assistant"]
        ranked = [reply for reply in answers if reply.get("rank") is not None]
        if role == "user" and len(ranked) > 1:
            yield {
                "prompt": turns,
                "responses": [reply["text"] for reply in ranked],
                "ranks": [reply["rank"] for reply in ranked],
            }
        waiting += [(reply, turns) for reply in replies]
