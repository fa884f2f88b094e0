"""Conversations of data rows: lists of messages in OpenAI's form, checked at the border.

A message is ``{role, content}``. Its content is a text, a list of text parts ``{"type": "text",
"text": ...}``, or null for an assistant that only calls tools. Further keys reach the chat template
unchanged: ``tool_calls``, ``tool_call_id``, ``name`` and ``reasoning_content``. An assistant's
``weight`` of 0 says that its turn is not learned.
"""

import itertools
import json
from collections.abc import Sequence
from typing import Any

from rlhf_jax.data import rows
from rlhf_jax.data.rows import Fields, Message, Record, Tools, common_length

ROLES = ("system", "developer", "user", "assistant", "tool")
NO_RESPONSE = "dialogue without a last response"
APART = "dialogues differ before the last response"
_OTHER_TEXTS = ("reasoning_content", "name", "tool_call_id")


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
    record: Record, keys: tuple[str, str]
) -> tuple[list[Message], list[Message], list[Message]]:
    """The common beginning of two conversations, and the turns of each after it."""
    record.require(keys)
    before, chosen = exchange(record, keys[0])
    other, rejected = exchange(record, keys[1])
    given = len(before) if record.value.get("prompt") is not None else 0
    first, second = before + chosen, other + rejected
    count = common_length(first, second)
    has_prompt = any(turn["role"] not in ("system", "developer") for turn in first[:count])
    record.expect(has_prompt and count >= given, APART)
    return first[:count], first[count:], second[count:]


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
