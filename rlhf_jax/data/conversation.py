"""Conversations of data rows: lists of messages in OpenAI's form, checked at the border.

A message is ``{role, content}``. Its content is a text, a list of text parts ``{"type": "text",
"text": ...}``, or null for an assistant that only calls tools. Further keys reach the chat template
unchanged: ``tool_calls``, ``tool_call_id``, ``name`` and ``reasoning_content``. An assistant's
``weight`` of 0 says that its turn is not learned.
"""

import contextlib
import itertools
import json
from collections.abc import Sequence
from typing import Any

from rlhf_jax.data import rows
from rlhf_jax.data.rows import BadRow, Fields, Message, Record, common_length

ROLES = ("system", "developer", "user", "assistant", "tool")
NO_RESPONSE = "dialogue without a last response"
APART = "dialogues differ before the last response"
_OTHER_TEXTS = ("reasoning_content", "name", "tool_call_id")
VARIABLES = "chat_template_kwargs"
# What transformers and the row itself give a template.
_TAKEN = {"messages", "tools", "documents", "conversations", "chat_template", "tokenize"}
_TAKEN |= {"add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask"}
SYSTEM = ("system", "system_prompt", "system_message", "system_instruction")
_PLACES = (("messages",), ("prompt",), ("instruction",), ("chosen", "rejected"), ("response",))


def is_chat(row: Fields, *keys: str) -> bool:
    """Whether one of these keys holds messages."""
    values = [row.get(key) for key in keys]
    lists = [value for value in values if isinstance(value, list)]
    return any(isinstance(turn, dict) for turn in itertools.chain(*lists))


def are_turns(value: Any) -> bool:
    """Whether this is a list of turns, each {role, content} or {from, value}."""
    if not isinstance(value, list) or not value:
        return False
    keys = [turn.keys() if isinstance(turn, dict) else {"prompt"} for turn in value]
    return all(
        "prompt" not in has and has & {"role", "from"} and has & {"content", "value", "tool_calls"}
        for has in keys
    )


def is_answered(messages: Any) -> bool:
    """Whether the last of these messages is the assistant's."""
    last = messages[-1] if isinstance(messages, Sequence) and messages else None
    return isinstance(last, dict) and last.get("role") == "assistant"


def text_of(message: Message) -> str:
    """The text of a message's content; of parts, one line for each."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content)


def said(message: Message) -> bool:
    """Whether a message says or calls anything."""
    return bool(
        text_of(message).strip() or message.get("tool_calls") or message.get("reasoning_content")
    )


def says(role: str, content: Any) -> Message:
    """A message."""
    return {"role": role, "content": content}


def begun(row: Fields) -> Fields:
    """The row with what stands before its conversation in keys of their own as its first messages:
    the text of ``system`` and its other names, and the questions and answers of ``history``.

    Raises:
      BadRow: without a place, if they cannot stand there.
    """
    place = next((keys for keys in _PLACES if row.keys() >= set(keys)), ())
    systems = [row[key] for key in SYSTEM if key in row and place]
    before = [says("system", text) for text in dict.fromkeys(map(str, systems)) if text.strip()]
    if len(before) > 1 or not all(isinstance(text, str) for text in systems):
        raise BadRow("", f"{' or '.join(SYSTEM[:2])} must be one text, the system's message")
    before += _history(row.get("history")) if place else []
    if not before:
        return row
    row = dict(row)
    for key in place:
        asked = row[key]
        if isinstance(asked, str) and asked.strip() and key in ("prompt", "instruction"):
            asked = [says("user", asked)]
        if not are_turns(asked):
            what = f"{key!r} is {rows.kind(asked)}, and no messages or question that could stand"
            raise BadRow("", f"{what} behind a system's message or a history")
        is_twice = is_system(asked[0]) and is_system(before[0])
        if is_twice and not _same(asked[0], before[0]):
            raise BadRow("", f"'system' differs from the system's message of {key!r}")
        row[key] = [*before, *asked[is_twice:]]
    is_demonstration = "response" in row and not row.keys() & {"desirable", "responses"}
    if len(before) > 1 and "prompt" in place and is_demonstration:
        told = row["response"]  # whose history is learned too
        row["messages"] = [
            *row.pop("prompt"),
            *([says("assistant", told)] if isinstance(told, str) else told),
        ]
    return row


def _history(value: Any) -> list[Message]:
    """Turns, or questions with their answers, which may be JSON text; any other text is none."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not isinstance(value, list) or are_turns(value):
        return value if isinstance(value, list) else []
    told = [list(map(type, pair)) if isinstance(pair, list) else [] for pair in value]
    if told != [[str, str]] * len(value):
        raise BadRow("", "'history' must be a list of messages, or of questions with their answers")
    roles = itertools.cycle(("user", "assistant"))
    return list(map(says, roles, itertools.chain.from_iterable(value)))


def is_system(message: Message) -> bool:
    """Whether the system speaks."""
    return message.get("role") in ("system", "developer")


def _same(one: Message, other: Message) -> bool:
    """Whether messages say the same, whatever their spaces and the keys that templates add."""
    first, second = (
        (is_system(turn) or turn.get("role"), _words(turn.get("content")), turn.get("tool_calls"))
        for turn in (one, other)
    )
    return first == second


def _words(content: Any) -> Any:
    return content.split() if isinstance(content, str) else content


def asked(record: Record, key: str) -> list[Message]:
    """The messages under ``key`` as a prompt. A last assistant turn of ``messages``, ``chosen`` and
    the like is an answer and left out; that of ``prompt`` is the beginning of one.
    """
    if key == "prompt":
        return messages_of(record, key)
    before, behind = _parts(record, key)
    found = [*before, *behind]
    if not is_answered(found):
        return found
    record.expect(len(found) > 1, f"{key!r} has no message before the assistant's")
    return found[:-1]


def exchange(record: Record, key: str) -> tuple[list[Message], list[Message]]:
    """The messages before the answer under ``key``, and the answer's turns: what follows the
    ``prompt`` (`_parts`), or what begins with the first turn of the assistant. Raises `BadRow` if
    the answer does not end with an assistant's turn that says something.
    """
    before, found = _parts(record, key)
    record.expect(is_answered(found) and said(found[-1]), NO_RESPONSE)
    if before:
        return before, found
    roles = [message["role"] for message in found]
    first = roles.index("assistant")
    record.expect(first > 0, f"{key!r} has no message before the assistant's")
    return found[:first], found[first:]


def _parts(record: Record, key: str) -> tuple[list[Message], list[Message]]:
    """The messages of the row's ``prompt``, and those under ``key`` behind it: they continue it, or
    repeat it first. Of a text that is another of their questions there are none: the messages are
    the whole conversation.
    """
    prompt = record.value.get("prompt")
    before: list[Message] = []
    if isinstance(prompt, str):
        before = [says("user", record.text("prompt"))]
    elif prompt is not None:
        before = messages_of(record, "prompt")
    if before and isinstance(record.value[key], str):
        return before, [says("assistant", record.text(key))]
    found = messages_of(record, key)
    if not before:
        return [], found
    asks, turns = before[is_system(before[0]) :], found[is_system(found[0]) :]
    systems = [turn for turn in (before[0], found[0]) if is_system(turn)]
    is_one = len(systems) < 2 or _same(*systems)
    record.expect(is_one, f"the system's messages of 'prompt' and {key!r} differ")
    if len(turns) >= len(asks) and all(map(_same, asks, turns)):
        return [*systems[:1], *turns[: len(asks)]], turns[len(asks) :]
    is_asked = bool(turns) and turns[0]["role"] == "user"
    if not is_asked or (is_answered(before) and not _same(turns[0], asks[0])):
        return [*systems[:1], *asks], turns
    is_there = isinstance(prompt, str) and any(_same(asks[0], turn) for turn in turns)
    what = f"{key!r} does not begin with 'prompt' and does not hold it; leave one of the two out"
    record.expect(is_there, what)
    return [], found


def pair(
    record: Record, keys: tuple[str, str]
) -> tuple[list[Message], list[Message], list[Message]]:
    """The common beginning of two conversations, and the turns of each after it."""
    record.require(keys)
    before, chosen = exchange(record, keys[0])
    other, rejected = exchange(record, keys[1])
    given = len(before) if isinstance(record.value.get("prompt"), list) else 0
    first, second = before + chosen, other + rejected
    count = common_length(first, second)
    has_prompt = any(turn["role"] not in ("system", "developer") for turn in first[:count])
    record.expect(has_prompt and count >= given, APART)
    is_part = first != second and count == min(len(first), len(second))
    record.expect(not is_part, "one answer is the beginning of the other one")
    return first[:count], first[count:], second[count:]


def written(record: Record) -> dict[str, Any]:
    """What a row gives the chat template beside its messages, as `Row` has it: ``tools``, a list of
    JSON schemas, and ``variables``, its ``chat_template_kwargs``. Each may be JSON text.
    """
    tools = _unpacked(record, "tools") or None
    is_list = isinstance(tools, list | None) and all(isinstance(tool, dict) for tool in tools or ())
    record.expect(is_list, "'tools' must be a list of objects or its JSON text", tools)
    variables = _unpacked(record, VARIABLES) or {}
    record.expect(isinstance(variables, dict), f"{VARIABLES!r} must be an object", variables)
    given = {name: value for name, value in variables.items() if value is not None}
    texts = [name for name, value in given.items() if str(value).lower() in ("true", "false")]
    are_truths = all(isinstance(given[name], bool) for name in texts)
    record.expect(are_truths, f"{VARIABLES!r}: {', '.join(texts)} must be true or false, no text")
    taken = [name for name in given if name in _TAKEN or name.endswith("_token")]
    record.expect(not taken, f"{VARIABLES!r} may not set {', '.join(taken)}")
    return {"tools": tools, "variables": given}


def _unpacked(record: Record, key: str) -> Any:
    """The value under a key, which may be its JSON text."""
    value = record.value.get(key) if isinstance(record.value, dict) else None
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRow(record.source, f"{key!r} is not JSON: {error}") from error


def messages_of(record: Record, key: str) -> list[Message]:
    """The messages under ``key``: each part has a type that templates can write. Raises `BadRow`
    naming the message.
    """
    value = record.value[key]
    is_list = isinstance(value, list) and value
    record.expect(is_list, f"{key!r} must be a list of messages {{role, content}}", value)
    for number, message in enumerate(value, 1):
        where = f"message {number} of {key!r}"
        is_object = isinstance(message, dict)
        record.expect(is_object, f"{where} must be an object with role, content", message)
        role = message.get("role")
        record.expect(isinstance(role, str), f"'role' of {where} must be a string", role)
        wanted = f"the role of {where} must be one of {', '.join(ROLES)}, found {role!r}"
        record.expect(role in ROLES, wanted)
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            kind = part.get("type", "text") if isinstance(part, dict) else None
            is_text = kind == "text" and isinstance(part.get("text"), str)
            found = f"a part of type {kind!r}" if isinstance(kind, str) else "another part"
            if kind == "text":
                found += f" with {rows.kind(part.get('text'))}"
            what = f"the content of {where} has {found}; only text parts are read"
            record.expect(is_text, what)
        may_be = isinstance(content, str | list) or (content is None and role == "assistant")
        record.expect(may_be, f"'content' of {where} must be a string", content)
        record.checked(f"the content of {where}", text_of(message) or " ")
        for name in _OTHER_TEXTS:
            other = message.get(name)
            is_text = isinstance(other, str | None)
            record.expect(is_text, f"{name!r} of {where} must be a string", other)
            record.checked(f"{name!r} of {where}", other or " ")
        calls = message.get("tool_calls")
        is_calls = isinstance(calls, list | None)
        record.expect(is_calls, f"'tool_calls' of {where} must be a list", calls)
    return list(value)
