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
from rlhf_jax.data.rows import BadRow, Drop, Record, kind
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
    renamed = [_renamed(record, names) for record in records]
    return [record for tree in renamed for record in _rankings(tree)]


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
        if any(_is_present(value, theirs) for value in values):
            continue
        entry = f"{ours}={theirs}"
        hint = did_you_mean(theirs, keys) or f"; the keys are {', '.join(keys)}"
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


def _is_present(value: dict[str, Any], path: str) -> bool:
    try:
        return _value(value, path) is not None
    except TypeError:  # the value is present, and `adapted` reports its type
        return True


def _renamed(record: Record, names: dict[str, str]) -> Record:
    """The record with our ``names`` for its keys."""
    row = record.value
    if not isinstance(row, dict):
        return record
    try:
        values = {ours: _value(row, theirs) for ours, theirs in names.items()}
    except TypeError as error:
        return Record(BadRow(record.source, str(error)), record.source)
    taken = {part for theirs in names.values() for part in theirs.split("+")}
    kept = {key: value for key, value in row.items() if key not in taken}
    kept |= {ours: value for ours, value in values.items() if value is not None}
    adapted_row = {key: _messages(value) for key, value in _with_responses(kept).items()}
    return Record(adapted_row, record.source)


def _with_responses(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the responses of lm-human-preferences, ``{query, sample0, sample1, ...}``, or of
    two lists of texts ``chosen`` and ``rejected``, as ``{prompt, responses, LABEL}``.

    A table has the same sample columns in all rows: if a row has fewer samples, its last ones are
    empty.
    """
    row = dict(row)
    if "prompt" not in row and "query" in row and row.keys() & {"sample0", "responses"}:
        row["prompt"] = row.pop("query")
    samples: list[Any] = []
    while (key := f"sample{len(samples)}") in row:
        samples.append(row.pop(key))
    while samples and samples[-1] is None:
        samples.pop()
    chosen = row.get("chosen")
    rejected = row.get("rejected")
    if _are_texts(chosen) and _are_texts(rejected):
        del row["chosen"]
        del row["rejected"]
        row["responses"] = [*chosen, *rejected]
        if len(chosen) == 1:
            row["best"] = 0
        else:
            row["ranks"] = [0] * len(chosen) + [1] * len(rejected)
    elif samples:
        row["responses"] = samples
    return row


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
        role = _ROLES.get(str(turn["from"]), turn["from"])
        messages.append({"role": role, "content": turn["value"]})
    return messages


def _value(value: Any, path: str) -> Any:
    """The value under the key or path; None if the record lacks it.

    Raises:
      TypeError: A+B joins values that are not texts.
    """
    if isinstance(value, list):
        values = [_value(item, path) for item in value]
        return None if None in values else values
    if not isinstance(value, dict):
        return None
    if path in value:
        return value[path]
    if "+" in path:
        parts = [_value(value, part) for part in path.split("+")]
        for part in parts:
            if not isinstance(part, str | None):
                raise TypeError(f"--columns joins texts with +, found {kind(part)} in {path}")
        return "\n\n".join(filter(None, parts)) or None
    outer, dot, rest = path.partition(".")
    if not dot:
        return None
    inner = value.get(outer)
    if isinstance(inner, dict) and rest not in inner:
        if rest == "keys":
            return list(inner)
        if rest == "values":
            return list(inner.values())
    return _value(inner, rest)


def _rankings(record: Record) -> list[Record]:
    """The record itself. A message tree becomes one record for each prompter's message with two
    replies of known rank, where 0 is the best rank.
    """
    source = record.source
    root = record.value.get("prompt") if isinstance(record.value, dict) else None
    if not isinstance(root, dict) or "replies" not in root:
        return [record]
    try:
        rows = list(_walk(root))
    except (KeyError, TypeError, AttributeError) as error:
        what = f"not a message tree: {type(error).__name__}: {error}"
        return [Record(BadRow(source, what), source)]
    if rows:
        return [Record(row, f"{source}, prompt {number}") for number, row in enumerate(rows, 1)]
    no_rank = Drop(source, "message tree without two ranked replies to one prompt")
    return [Record(no_rank, source)]


def _walk(root: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rankings of a message tree, those of earlier turns first."""
    no_turns: list[Message] = []
    waiting = [(root, no_turns)]  # messages with the turns before them
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
