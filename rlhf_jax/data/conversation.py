"""Conversations of data rows: lists of messages in OpenAI's form, checked at the border.

A message is ``{role, content}``. Its content is a text, a list of text parts ``{"type": "text",
"text": ...}``, or null for an assistant that only calls tools. Further keys reach the chat template
unchanged: ``tool_calls``, ``tool_call_id``, ``name`` and ``reasoning_content``. An assistant's
``weight`` of 0 says that its turn is not learned.
"""

import json
from collections.abc import Sequence
from typing import Any

from rlhf_jax.data import rows
from rlhf_jax.data.rows import Fields, Message, Messages, Record, Tools, common_length

ROLES = ("system", "developer", "user", "assistant", "tool")
NO_RESPONSE = "dialogue without a last response"
APART = "dialogues differ before the last response"
_OTHER_TEXTS = ("reasoning_content", "name", "tool_call_id")


def is_chat(row: Fields, *keys: str) -> bool:
    """Whether one of these keys holds messages."""
    for key in keys:
        value = row.get(key)
        if isinstance(value, list) and any(isinstance(turn, dict) for turn in value):
            return True
    return False


def are_turns(value: Any) -> bool:
    """Whether this is a list of turns, each {role, content} or {from, value}."""
    return isinstance(value, list) and value != [] and all(map(_is_turn, value))


def _is_turn(value: Any) -> bool:
    has = value.keys() if isinstance(value, dict) and "prompt" not in value else set()
    return bool(has & {"role", "from"} and has & {"content", "value", "tool_calls"})


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


def learned_turns(
    messages: Messages,
    start: int,
    last: bool = False,
) -> list[int]:
    """The numbers of the assistant's turns from message ``start`` on that are learned: those that
    say something and have no weight of 0. ``last``: only the last message, if it is one of them.
    """
    first = len(messages) - 1 if last else start
    learned = []
    for number, message in enumerate(messages[first:], first):
        counts = message["role"] == "assistant" and message.get("weight", 1) != 0
        if counts and said(message):
            learned.append(number)
    return learned


def asked(record: Record, key: str) -> list[Message]:
    """The messages under ``key`` as a prompt. A last assistant turn of ``messages``, ``chosen`` and
    the like is an answer and left out; that of ``prompt`` is the beginning of one.
    """
    found = messages_of(record, key)
    if key == "prompt" or not is_answered(found):
        return found
    record.expect(len(found) > 1, f"{key!r} has no message before the assistant's")
    return found[:-1]


def exchange(record: Record, key: str) -> tuple[list[Message], list[Message]]:
    """The messages before the answer under ``key``, and the answer's turns.

    If the row has a ``prompt`` (text or messages), the value under ``key`` (text or messages)
    continues it, unless it repeats it. Without a prompt, the answer begins with the first turn of
    the assistant. Raises `BadRow` if the answer does not end with an assistant's turn that says
    something.
    """
    row = record.value
    before: list[Message] = []
    if isinstance(row.get("prompt"), str):
        before = [{"role": "user", "content": record.text("prompt")}]
    elif row.get("prompt") is not None:
        before = messages_of(record, "prompt")
    if before and isinstance(row[key], str):
        return before, [{"role": "assistant", "content": record.text(key)}]
    found = messages_of(record, key)
    record.expect(is_answered(found) and said(found[-1]), NO_RESPONSE)
    if not before:
        roles = [message["role"] for message in found]
        first = roles.index("assistant")
        record.expect(first > 0, f"{key!r} has no message before the assistant's")
        return found[:first], found[first:]
    # They may hold the prompt themselves, perhaps after a system message.
    for start in (0, 1):
        end = start + len(before)
        if found[start:end] == before and len(found) > end:
            return found[:end], found[end:]
    return before, found


def pair(
    record: Record,
    keys: tuple[str, str],
) -> tuple[list[Message], list[Message], list[Message]]:
    """The common beginning of two conversations, and the turns of each after it."""
    record.require(keys)
    before, chosen = exchange(record, keys[0])
    other, rejected = exchange(record, keys[1])
    given = len(before) if record.value.get("prompt") is not None else 0
    first = before + chosen
    second = other + rejected
    count = common_length(first, second)
    common = first[:count]
    roles = {message["role"] for message in common}
    has_prompt = not roles <= {"system", "developer"}
    record.expect(has_prompt and count >= given, APART)
    return common, first[count:], second[count:]


def tools_of(record: Record) -> Tools:
    """The tools of a row: a list of JSON schemas, or the JSON text of one; None without any."""
    value = record.value.get("tools") if isinstance(record.value, dict) else None
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            record.expect(False, f"'tools' is no list in JSON: {error}")
    if not value:
        return None
    is_list = isinstance(value, list) and all(isinstance(tool, dict) for tool in value)
    record.expect(is_list, "'tools' must be a list of objects or its JSON text", value)
    tools: list[Fields] = value
    return tools


def messages_of(record: Record, key: str) -> list[Message]:
    """The messages under ``key``, checked. Raises `BadRow` naming the message."""
    value = record.value[key]
    is_list = isinstance(value, list) and value
    record.expect(is_list, f"{key!r} must be a list of messages {{role, content}}", value)
    for number, message in enumerate(value, 1):
        where = f"message {number} of {key!r}"
        is_object = isinstance(message, dict)
        record.expect(is_object, f"{where} must be an object with role, content", message)
        _check(record, message, where)
    messages: list[Message] = value
    return messages


def _check(
    record: Record,
    message: Message,
    where: str,
) -> None:
    """Raises `BadRow` unless each part of the message has a type that templates can write."""
    role = message.get("role")
    record.expect(isinstance(role, str), f"'role' of {where} must be a string", role)
    wanted = f"the role of {where} must be one of {', '.join(ROLES)}, found {role!r}"
    record.expect(role in ROLES, wanted)
    _check_content(record, message, where)
    for key in _OTHER_TEXTS:
        other = message.get(key)
        name = f"{key!r} of {where}"
        is_text = isinstance(other, str | None)
        record.expect(is_text, f"{name} must be a string", other)
        record.checked(name, other or " ")
    calls = message.get("tool_calls")
    is_calls = calls is None or isinstance(calls, list)
    record.expect(is_calls, f"'tool_calls' of {where} must be a list", calls)


def _check_content(
    record: Record,
    message: Message,
    where: str,
) -> None:
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            kind = part.get("type", "text") if isinstance(part, dict) else None
            is_text = kind == "text" and isinstance(part.get("text"), str)
            found = f"a part of type {kind!r}" if isinstance(kind, str) else "another part"
            if kind == "text":
                found += f" with {rows.kind(part.get('text'))}"
            what = f"the content of {where} has {found}; only text parts are read"
            record.expect(is_text, what)
    else:
        may_be_null = message.get("role") == "assistant"
        is_text = isinstance(content, str) or (content is None and may_be_null)
        record.expect(is_text, f"'content' of {where} must be a string", content)
    record.checked(f"the content of {where}", text_of(message) or " ")
