"""Public forms of records, as data sets are published, in ours: one table.

A form has a name, the keys by which a record is known to have it, a function that gives the record
in our keys, and an example. To add one is to write its function here, with the decorator `form`, or
a row of `renamed` if its keys alone differ from ours: the docs, the checks of data and the stages
find it in `FORMS`.

Our keys are ``messages`` (as OpenAI writes them) with ``tools``; ``prompt`` with ``response``, with
``chosen`` and ``rejected``, or with ``responses`` and one of ``best``, ``ranking``, ``ranks`` and
``targets``; ``desirable``; ``margin``. All other keys are columns for a reward.
"""

import contextlib
import difflib
import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

from rlhf_jax.data.conversation import are_turns
from rlhf_jax.data.rows import BadRow, Drop, Fields, Kind, Message, Record

PAIR = ("chosen", "rejected")
NO_WINNER = "neither answer was preferred"
# Roles of a conversation under the names that data sets give them.
ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "claude": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "function": "tool",
    "ipython": "tool",
}
_CALLS = ("function_call", "tool_call")  # roles and types of content that hold calls of tools
# Whether a turn is learned: of LLaMA-Factory, OpenAI, ms-swift, axolotl and tinker.
_FLAGS = ("loss_weight", "weight", "loss", "train", "training", "trainable")
# Columns that may hold messages, and in files without lists the text of them.
_DIALOGUES = (
    *("messages", "conversations", "conversation", "prompt", "completion", "response", *PAIR),
    *("context", "question", "query", "instruction", "conversation_a", "conversation_b"),
    *("prompt_messages", "chosen_messages", "rejected_messages"),
)
_SPELLED = re.compile(r"\s*\[\s*\{")
_IN_PYTHON = re.compile(r"\s*\[\s*\{\s*'(role|content|from|value)'\s*:.*\}\s*\]\s*", re.DOTALL)
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")
_ONLY_IN_OURS = ("prompt", "messages", "response", "responses", "chosen", "text")
_BROKEN = (KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError)

Read = Callable[[Record], Fields | list[Fields]]
R = TypeVar("R", bound=Read)


@dataclass(frozen=True)
class PublicForm:
    """A form in which others publish records."""

    name: str
    keys: tuple[str, ...]
    """A record of this form has all of them."""
    read: Read
    """A record of this form in our keys, or several of them. What it does not use stays as it is.
    """
    example: str
    """A line of JSON lines."""
    also: tuple[str, ...] = ()
    """Keys that the form has only sometimes."""
    without: tuple[str, ...] = ()
    """A record with one of these keys has another form."""
    fits: Callable[[Fields], bool] = bool
    """Whether the values fit, where the keys do not tell."""

    @property
    def known(self) -> set[str]:
        """All keys of the form."""
        return {*self.keys, *self.also}


FORMS: list[PublicForm] = []
_BEFORE = "system system_prompt history"  # keys of what stands before a question
ANNOTATED = ("instruction", "response1", "response2", "annotator1")
OURS: dict[tuple[str, ...], Kind] = {
    ("responses",): "comparisons",
    ("prompt", *PAIR): "comparisons",
    PAIR: "comparisons",
    ("messages", "desirable"): "feedback",
    ("messages",): "demonstrations",
    ("prompt", "response", "desirable"): "feedback",
    ("prompt", "response"): "demonstrations",
    ANNOTATED: "annotated",
    ("prompt",): "prompts",
    ("text",): "demonstrations",
}
"""The kind of a record in our keys: that of the first of these whose keys it has."""


def form(
    name: str,
    keys: str,
    example: str,
    *,
    also: str = "",
    without: Sequence[str] = (),
    fits: Callable[[Fields], bool] = bool,
) -> Callable[[R], R]:
    """Puts the function below it into `FORMS`; ``keys`` and ``also`` are divided by spaces."""

    def register(read: R) -> R:
        sometimes = tuple(also.split())
        known = PublicForm(
            name, tuple(keys.split()), read, example, sometimes, tuple(without), fits
        )
        FORMS.append(known)
        return read

    return register


def renamed(
    name: str,
    names: str,
    example: str,
    *,
    also: str = "",
    without: Sequence[str] = (),
    fits: Callable[[Fields], bool] = bool,
) -> None:
    """Puts a form into `FORMS` that has our keys, some of them under other names: ``prompt=question
    response``. A history and a system's message, which it may have, stand before the prompt.
    """
    pairs = [entry.partition("=") for entry in names.split()]
    theirs_of = {ours: theirs or ours for ours, _, theirs in pairs}
    keys = " ".join(dict.fromkeys(theirs_of.values()))

    @form(name, keys, example, also=also, without=without, fits=fits)
    def read(record: Record) -> Fields:
        row = record.value
        values = {ours: row[theirs] for ours, theirs in theirs_of.items()}
        if theirs_of.get("prompt") == "instruction":
            texts = (row["instruction"], row.get("input") or row.get("context"))
            values["prompt"] = "\n\n".join(filter(None, texts))
        before = _opening({key: row.get(key) for key in also.split()})
        if not before:
            return values
        asked = values["messages"] if "messages" in values else values.pop("prompt")
        turns = [*before, *([_says("user", asked)] if isinstance(asked, str) else asked)]
        if values.keys() == {"response"}:  # whose history is learned too
            return {"messages": [*turns, _says("assistant", values["response"])]}
        return values | {"messages" if "messages" in values else "prompt": turns}


def _opening(row: Fields) -> list[Message]:
    """The system's message and the turns of ``history``."""
    system = row.get("system") or row.get("system_prompt")
    messages = [_says("system", system)] if system else []
    for question, answer in row.get("history") or []:
        messages += [_says("user", question), _says("assistant", answer)]
    return messages


def converted(record: Record, given: Fields) -> list[Record]:
    """The record in our keys, with the name of its form; itself if no public form fits.

    Args:
      given: what ``--columns`` gave the record under our keys; it stands in place of what the form
        gives.

    Raises:
      BadRow: two forms fit, a value is not as the form has it, or the record has pictures, videos
        or sounds; as `Drop` if training cannot use the record.
    """
    row = record.value
    for key in filter(row.get, _MEDIA):
        what = f"has {key!r}, and no model here reads such input; remove the column or these rows"
        record.expect(False, what)
    row = _with_dialogues(record)
    record = record._replace(value=row)
    found = _fitting(record, given)
    try:
        if found is None:
            if not any(row.keys() >= set(keys) for keys in OURS):
                _check_spelling(record)
            return [_in_turns(record)]
        read = found.read(record)
        rest = {key: value for key, value in row.items() if key not in found.known}
        kept = {key: value for key, value in given.items() if key not in found.known}
        if not isinstance(read, list):
            return [_in_turns(Record(rest | read | kept, record.source, found.name))]
        records = []
        for number, values in enumerate(read, 1):
            source = f"{record.source}, prompt {number}"
            records.append(_in_turns(Record(rest | values | kept, source, found.name)))
        return records
    except BadRow:
        raise
    except _BROKEN as error:
        fault = f"{type(error).__name__}: {error}"
        name = f"{found.name} ({', '.join(found.keys)})" if found else "OpenAI's messages"
        raise BadRow(record.source, f"not in the form of {name}: {fault}") from error


def _with_dialogues(record: Record) -> Fields:
    """The row with lists of messages in place of their JSON, as cells of CSV have it."""
    row: Fields = record.value
    for key in _DIALOGUES:
        text = row.get(key)
        # Beside a plain prompt, its answer and mere columns are texts, whatever they spell.
        may_be = key.endswith("messages") or key in ("prompt", "conversations", *PAIR)
        is_text = isinstance(row.get("prompt"), str) and not may_be
        if is_text or not isinstance(text, str) or not _SPELLED.match(text):
            continue
        what = f"{key!r} holds messages as Python writes them; write them as JSON, by json.dumps"
        record.expect(not _IN_PYTHON.fullmatch(text), what)
        with contextlib.suppress(ValueError, RecursionError):
            turns = json.loads(text)
            if are_turns(turns):
                row = row | {key: turns}
    return row


def _fitting(record: Record, given: Fields) -> PublicForm | None:
    """The form of a record; None if it has ours alone, or if ``--columns`` gave a key of ours.

    Where the keys of one form include those of another, it is the first.

    Raises:
      BadRow: two forms fit and none of them includes the other.
    """
    row = record.value
    fitting = [known for known in _with_keys(tuple(row)) if known.fits(row)]
    if not fitting:
        return None
    narrow = []
    for known in fitting:
        if not any(set(known.keys) < set(other.keys) for other in fitting):
            narrow.append(known)
    if not narrow:
        return None
    own = [keys for keys in OURS if row.keys() >= set(keys) and not narrow[0].known >= set(keys)]
    if own and given.keys() & set(own[0]):
        return None
    names = [known.name for known in narrow] + [", ".join(keys) for keys in own[:1]]
    what = f"fits {' and '.join(names)}; say by --columns OURS=THEIRS which keys count"
    record.expect(len(names) == 1, what)
    return narrow[0]


@lru_cache(maxsize=256)
def _with_keys(keys: tuple[str, ...]) -> list[PublicForm]:
    """The forms that records with these keys may have."""
    has = set(keys)
    return [
        known for known in FORMS if has.issuperset(known.keys) and has.isdisjoint(known.without)
    ]


def _check_spelling(record: Record) -> None:
    """Raises `BadRow` if a key of this record, which has no known form, looks misspelled."""
    for key in record.value:
        for near in meant(key, tuple(record.value)):
            record.expect(False, f"has no known form; did you mean {near!r} by {key!r}?")


@lru_cache(maxsize=256)
def meant(key: str, keys: tuple[str, ...]) -> list[str]:
    """The key of a public form that ``key`` looks like, of a record with all its other keys."""
    if any(key in known.known for known in FORMS):
        return []
    is_ours = any(set(keys).issuperset(own) for own in OURS)
    candidates: list[str] = []
    for known in FORMS:
        missing = set(known.keys).difference(keys)
        if len(missing) == 1 and (len(known.keys) > 1 or not is_ours):
            candidates += missing.difference(*OURS, (key.rpartition("_")[0],))  # question_id
    return difflib.get_close_matches(key.strip().lower(), candidates, n=1, cutoff=0.8)


def _in_turns(record: Record) -> Record:
    """The record with its conversations as `messages_of`, and their tools as a list."""
    row = record.value
    turned: Fields = {}
    for key in ("messages", "prompt", "response", "chosen", "rejected"):
        value = row.get(key)
        turns = [value] if isinstance(value, dict) else value
        if isinstance(turns, list) and turns and all(map(_is_turn, turns)):
            turned[key] = messages_of(record, turns)
    if not turned:
        return record
    if row.get("tools"):
        turned["tools"] = _tools(record, row["tools"])
    return record._replace(value=row | turned)


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and ("from" in turn or "role" in turn)


def messages_of(record: Record, turns: Sequence[Fields]) -> list[Message]:
    """Turns of any data set as OpenAI's messages: who speaks under our role, tool calls and
    reasoning under keys of their own, and a weight of 0 or 1.
    """
    return [_message(record, turn) for turn in turns]


def _message(record: Record, turn: Fields) -> Message:
    message = {key: value for key, value in turn.items() if key not in ("from", "value")}
    flags: list[int] = []
    speaker = turn.get("role", turn.get("from"))
    message["role"] = ROLES.get(str(speaker).lower(), speaker)
    if "value" in turn:
        message["content"] = turn["value"]
    if speaker in _CALLS:
        message["tool_calls"] = _calls(record, message["content"])
        message["content"] = ""
    if isinstance(message.get("function_call"), dict):  # OpenAI's before tools
        message["tool_calls"] = [_wrapped(message.pop("function_call"))]
    for key in _FLAGS:
        flag = message.pop(key, None)
        what = f"{key!r} of a message must be 0 or 1, or true or false, found {flag!r:.40}"
        record.expect(flag in (None, 0, 1), what)
        if flag is not None and message["role"] == "assistant":
            flags.append(int(flag))
    if flags:
        message["weight"] = min(flags)
    if isinstance(message.get("content"), list):
        _split_content(record, message)
    return message


def _split_content(record: Record, message: Message) -> None:
    """Puts the parts of a content where OpenAI has them: calls and reasoning beside the texts."""
    texts = []
    for part in message["content"]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in _CALLS:
            calls = _calls(record, part["value"])
            message["tool_calls"] = [*(message.get("tool_calls") or []), *calls]
        elif kind == "reasoning":
            message["reasoning_content"] = part["value"]
        elif kind == "text" and "value" in part:
            texts.append({"type": "text", "text": part["value"]})
        else:
            texts.append(part)
    match texts:
        case [] | [{"text": str(), "type": "text"}]:
            message["content"] = "".join(part["text"] for part in texts)
        case _:
            message["content"] = texts


def _calls(record: Record, value: Any) -> list[Fields]:
    """Tool calls, of which there may be several, from an object or its JSON."""
    calls = _unpacked(record, "a tool call", value)
    several = calls if isinstance(calls, list) else [calls]
    return [_wrapped(call) for call in several]


def _tools(record: Record, value: Any) -> list[Fields]:
    """Descriptions of tools, a list or its JSON, each as ``{type, function}``."""
    tools = _unpacked(record, "'tools'", value)
    record.expect(isinstance(tools, list), "'tools' must be a list or the JSON of one", tools)
    return [_wrapped(tool) for tool in tools]


def _wrapped(function: Any) -> Any:
    is_bare = isinstance(function, dict) and "name" in function and "function" not in function
    return {"type": "function", "function": function} if is_bare else function


def _unpacked(record: Record, what: str, value: Any) -> Any:
    """The value that a text holds as JSON; any other value itself."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRow(record.source, f"{what} is not JSON: {value[:60]!r}") from error


def _says(role: str, content: Any) -> Message:
    return {"role": role, "content": content}


def _preferred(record: Record, answers: Sequence[Any], winner: int | None) -> Fields:
    """A pair of which answer number ``winner`` is the better one; None is a tie."""
    if winner is None:
        raise Drop(record.source, NO_WINNER)
    record.expect(winner in (0, 1), f"the better one of two answers is 0 or 1, found {winner!r}")
    return {"chosen": answers[int(winner)], "rejected": answers[1 - int(winner)]}


# --- Demonstrations

renamed(
    "ShareGPT",
    "messages=conversations",
    '{"conversations": [{"from": "human", "value": "Is ice warm?"}, {"from": "gpt", "value": '
    '"No."}]}',
    also="system",
    fits=lambda row: not _are_texts(row["conversations"]),
)


@form(
    "LIMA",
    "conversations",
    '{"conversations": ["Is ice warm?", "No."], "source": "stackexchange"}',
    fits=lambda row: _are_texts(row["conversations"]),
)
def _lima(record: Record) -> Fields:
    roles = itertools.cycle(("user", "assistant"))
    return {"messages": list(map(_says, roles, record.value["conversations"]))}


@form(
    "conversation",
    "conversation",
    '{"conversation": [{"system": "Be brief.", "human": "Is ice warm?", "assistant": "No."}]}',
    also="system",
    without=_ONLY_IN_OURS,
)
def _conversation(record: Record) -> Fields:
    """Messages, as in WildChat, or questions with their answers, as in ms-swift or Capybara."""
    turns: list[Message] = []
    for turn in record.value["conversation"]:
        if _is_turn(turn):
            turns.append(turn)
            continue
        asked, answer = ("human", "assistant") if "human" in turn else ("input", "output")
        turns += [_says("system", turn["system"])] if turn.get("system") else []
        turns += [_says("user", turn[asked]), _says("assistant", turn[answer])]
    system = record.value.get("system")
    return {"messages": [_says("system", system), *turns] if system else turns}


renamed(
    "Alpaca",
    "prompt=instruction response=output",
    '{"instruction": "Add the numbers.", "input": "1 2", "output": "3"}',
    also=f"{_BEFORE} input text",
)

renamed(
    "Dolly",
    "prompt=instruction response",
    '{"instruction": "Name the colour.", "context": "The sky is blue.", "response": "Blue."}',
    also=f"{_BEFORE} context input",
)

renamed(
    "OpenOrca",
    "prompt=question response",
    '{"system_prompt": "Be brief.", "question": "Is ice warm?", "response": "No."}',
    also=_BEFORE,
    without=("prompt", "messages"),
)

renamed(
    "ms-swift",
    "prompt=query response",
    '{"system": "Be brief.", "query": "Is ice warm?", "response": "No.", "history": []}',
    also=_BEFORE,
    without=("prompt", "messages"),
)

renamed(
    "input and output",
    "prompt=input response=output",
    '{"input": "Translate into French: cheese", "output": "fromage"}',
    without=(*_ONLY_IN_OURS, "instruction", "question"),
)

renamed(
    "TRL prompt and completion",
    "prompt response=completion",
    '{"prompt": "The sky is", "completion": " blue."}',
)

renamed(
    "OpenAI functions",
    "messages tools=functions",
    '{"messages": [{"role": "user", "content": "Is it warm?"}, {"role": "assistant", '
    '"content": "", "function_call": {"name": "f", "arguments": "{}"}}, {"role": "function", '
    '"name": "f", "content": "30"}, {"role": "assistant", "content": "Yes."}], "functions": '
    '[{"name": "f", "parameters": {"type": "object", "properties": {}}}]}',
)


# --- Pairs

renamed(
    "ShareGPT preferences",
    "prompt=conversations chosen rejected",
    '{"conversations": [{"from": "human", "value": "Is ice warm?"}], "chosen": {"from": '
    '"gpt", "value": "No."}, "rejected": {"from": "gpt", "value": "Yes."}}',
    also="system",
)

renamed(
    "Alpaca preferences",
    "prompt=instruction chosen rejected",
    '{"instruction": "Add the numbers.", "input": "1 2", "chosen": "3", "rejected": "4"}',
    also=f"{_BEFORE} input",
)

renamed(
    "Orca pairs",
    "prompt=question chosen rejected",
    '{"system": "Be brief.", "question": "Is ice warm?", "chosen": "No.", "rejected": "Yes."}',
    also=_BEFORE,
)

renamed(
    "ms-swift preferences",
    "prompt=query chosen=response rejected=rejected_response",
    '{"query": "Is ice warm?", "response": "No.", "rejected_response": "Yes."}',
    also=_BEFORE,
)


@form(
    "ms-swift messages",
    "messages rejected_response",
    '{"messages": [{"role": "user", "content": "Is ice warm?"}, {"role": "assistant", '
    '"content": "No."}], "rejected_response": "Yes."}',
)
def _swift_messages(record: Record) -> Fields:
    *before, chosen = record.value["messages"]
    return {"prompt": before, "chosen": [chosen], "rejected": record.value["rejected_response"]}


renamed(
    "ms-swift conversations",
    "chosen=messages rejected=rejected_messages",
    '{"messages": [{"role": "user", "content": "Is ice warm?"}, {"role": "assistant", '
    '"content": "No."}], "rejected_messages": [{"role": "user", "content": "Is ice warm?"}, '
    '{"role": "assistant", "content": "Yes."}]}',
)

renamed(
    "stack-exchange-paired",
    "prompt=question chosen=response_j rejected=response_k",
    '{"qid": 1, "question": "Is ice warm?", "response_j": "No.", "response_k": "Yes."}',
)


@form(
    "LLaMA-Factory messages",
    "chosen_messages rejected_messages",
    '{"chosen_messages": [{"role": "user", "content": [{"type": "text", "value": "Hi"}], '
    '"loss_weight": 0.0}, {"role": "assistant", "content": [{"type": "text", "value": '
    '"Hi!"}]}], "rejected_messages": [{"role": "user", "content": [{"type": "text", "value": '
    '"Hi"}], "loss_weight": 0.0}, {"role": "assistant", "content": [{"type": "text", '
    '"value": "No."}]}]}',
    also="prompt_messages",
)
def _factory_pair(record: Record) -> Fields:
    row = record.value
    pair = {"chosen": row["chosen_messages"], "rejected": row["rejected_messages"]}
    before = row.get("prompt_messages")
    return pair | ({"prompt": before} if before else {})


@form(
    "OpenAI preferences",
    "input preferred_output non_preferred_output",
    '{"input": {"messages": [{"role": "user", "content": "Is ice warm?"}], "tools": []}, '
    '"preferred_output": [{"role": "assistant", "content": "No."}], "non_preferred_output": '
    '[{"role": "assistant", "content": "Yes."}]}',
)
def _openai_pair(record: Record) -> Fields:
    row = record.value
    tools = row["input"].get("tools")
    pair = {
        "prompt": row["input"]["messages"],
        "chosen": row["preferred_output"],
        "rejected": row["non_preferred_output"],
    }
    return pair | ({"tools": tools} if tools else {})


@form(
    "UltraFeedback, binarised",
    "prompt chosen rejected messages",
    '{"prompt": "Is ice warm?", "chosen": [{"role": "user", "content": "Is ice warm?"}, '
    '{"role": "assistant", "content": "No."}], "rejected": [{"role": "user", "content": "Is '
    'ice warm?"}, {"role": "assistant", "content": "Yes."}], "messages": [{"role": "user", '
    '"content": "Is ice warm?"}, {"role": "assistant", "content": "No."}], "score_chosen": '
    '8.0, "score_rejected": 3.0}',
)
def _binarised(record: Record) -> Fields:
    row = record.value
    return {key: row[key] for key in ("prompt", "chosen", "rejected")}


@form(
    "SHP",
    "history human_ref_A human_ref_B labels",
    '{"history": "Is ice warm?", "human_ref_A": "No.", "human_ref_B": "Yes.", "labels": 1}',
)
def _shp(record: Record) -> Fields:
    row = record.value
    answers = (row["human_ref_A"], row["human_ref_B"])
    return {"prompt": row["history"], **_preferred(record, answers, 1 - int(row["labels"]))}


@form(
    "OpenAI summaries, comparisons",
    "info summaries choice",
    '{"info": {"subreddit": "pets", "title": "My cat", "post": "It sleeps all day."}, '
    '"summaries": [{"text": " My cat sleeps."}, {"text": " A dog barks."}], "choice": 0}',
)
def _summaries(record: Record) -> Fields:
    row = record.value
    summaries = [_summary(summary["text"]) for summary in row["summaries"]]
    return {"prompt": _post(row["info"]), **_preferred(record, summaries, row["choice"])}


@form(
    "PKU-SafeRLHF",
    "prompt response_0 response_1 better_response_id",
    '{"prompt": "Is ice warm?", "response_0": "Yes.", "response_1": "No.", '
    '"is_response_0_safe": true, "is_response_1_safe": true, "better_response_id": 1, '
    '"safer_response_id": 1}',
    also="best",
)
def _safe(record: Record) -> Fields:
    row = record.value
    answers = (row["response_0"], row["response_1"])
    best = row.get("best", row["better_response_id"])
    return {"prompt": row["prompt"], **_preferred(record, answers, best)}


@form(
    "HelpSteer preferences",
    "prompt response_1 response_2 preference_strength",
    '{"prompt": "Is ice warm?", "response_1": "Yes.", "response_2": "No.", '
    '"preference_strength": 2}',
)
def _helpsteer_pair(record: Record) -> Fields:
    row = record.value
    answers = (row["response_1"], row["response_2"])
    return {"prompt": row["prompt"], **_stronger(record, answers, row["preference_strength"])}


@form(
    "HelpSteer3",
    "context response1 response2 overall_preference",
    '{"context": [{"role": "user", "content": "Is ice warm?"}], "response1": "Yes.", '
    '"response2": "No.", "overall_preference": 2}',
)
def _helpsteer3(record: Record) -> Fields:
    row = record.value
    answers = (row["response1"], row["response2"])
    return {"prompt": row["context"], **_stronger(record, answers, row["overall_preference"])}


def _stronger(record: Record, answers: Sequence[Any], strength: float) -> Fields:
    """A pair whose second answer is the better one by this strength, which may be negative."""
    return _preferred(record, answers, int(strength > 0) if strength else None)


@form(
    "arena conversations",
    "conversation_a conversation_b winner",
    '{"conversation_a": [{"role": "user", "content": "Is ice warm?"}, {"role": "assistant", '
    '"content": "Yes."}], "conversation_b": [{"role": "user", "content": "Is ice warm?"}, '
    '{"role": "assistant", "content": "No."}], "winner": "model_b"}',
)
def _arena(record: Record) -> Fields:
    row = record.value
    votes = {"model_a": 0, "model_b": 1, "tie": None, "tie (bothbad)": None}
    record.expect(row["winner"] in votes, f"'winner' must be one of {', '.join(votes)}")
    conversations = (row["conversation_a"], row["conversation_b"])
    return _preferred(record, conversations, votes[row["winner"]])


@form(
    "arena votes",
    "prompt response_a response_b winner_model_a winner_model_b",
    '{"prompt": "[\\"Is ice warm?\\"]", "response_a": "[\\"No.\\"]", "response_b": "[\\"Yes.\\"]", '
    '"winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0}',
    also="winner_tie",
)
def _arena_votes(record: Record) -> Fields:
    row = record.value
    conversations = []
    for side in ("response_a", "response_b"):
        turns = []
        pairs = (_unpacked(record, repr(key), row[key]) for key in ("prompt", side))
        for question, answer in zip(*pairs, strict=True):
            turns += [_says("user", question), _says("assistant", answer)]
        conversations.append(turns)
    has_won = [int(row["winner_model_a"]), int(row["winner_model_b"])]
    winner = has_won.index(1) if sum(has_won) == 1 else None
    return _preferred(record, conversations, winner)


# --- Rankings and scores


@form(
    "lm-human-preferences",
    "sample0",
    '{"query": "Is ice", "sample0": " warm?", "sample1": " cold?", "best": 1}',
    also="query prompt " + " ".join(f"sample{number}" for number in range(1, 64)),
)
def _samples(record: Record) -> Fields:
    row = record.value
    samples: list[Any] = []
    while (key := f"sample{len(samples)}") in row:
        samples.append(row[key])
    # A table has the same columns in all rows: a row with fewer samples has empty ones at its end.
    while samples and samples[-1] is None:
        samples.pop()
    given = [row[key] for key in ("query", "prompt") if key in row]
    return {"responses": samples} | ({"prompt": given[0]} if given else {})


renamed(
    "query and responses",
    "prompt=query responses",
    '{"query": "Is ice warm?", "responses": ["Yes.", "No."], "best": 1}',
    without=("prompt",),
)


@form(
    "RewardBench 2",
    "prompt chosen rejected",
    '{"prompt": "Name a prime.", "chosen": ["Seven."], "rejected": ["Nine.", "One.", "Four."]}',
    fits=lambda row: _are_texts(row["chosen"]) and _are_texts(row["rejected"]),
)
def _right_and_wrong(record: Record) -> Fields:
    row = record.value
    right = row["chosen"]
    label: Fields = {"best": 0}
    if len(right) > 1:
        label = {"ranks": [0] * len(right) + [1] * len(row["rejected"])}
    return {"prompt": row["prompt"], "responses": right + row["rejected"], **label}


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(isinstance(i, str) for i in value)


@form(
    "WebGPT comparisons",
    "question answer_0 answer_1 score_0 score_1",
    '{"question": {"dataset": "eli5", "full_text": "Is ice warm?"}, "answer_0": "No.", '
    '"answer_1": "Yes.", "score_0": 1.0, "score_1": -1.0}',
    also="quotes_0 quotes_1 tokens_0 tokens_1",
)
def _webgpt(record: Record) -> Fields:
    row = record.value
    return {
        "prompt": row["question"]["full_text"],
        "responses": [row["answer_0"], row["answer_1"]],
        "ranks": [-row["score_0"], -row["score_1"]],
    }


@form(
    "UltraFeedback",
    "instruction completions",
    '{"instruction": "Is ice warm?", "completions": [{"model": "a", "response": "No.", '
    '"overall_score": 8.0}, {"model": "b", "response": "Yes.", "overall_score": 2.5}]}',
    also="targets",
)
def _ultrafeedback(record: Record) -> Fields:
    row = record.value
    completions = row["completions"]
    scores = row.get("targets") or [answer["overall_score"] for answer in completions]
    return {
        "prompt": row["instruction"],
        "responses": [answer["response"] for answer in completions],
        "targets": scores,
        "ranks": [-score for score in scores],
    }


@form(
    "Nectar",
    "prompt answers",
    '{"prompt": "\\n\\nHuman: Is ice warm?\\n\\nAssistant: ", "answers": [{"answer": "No.", '
    '"model": "a", "rank": 1.0}, {"answer": "Yes.", "model": "b", "rank": 2.0}]}',
    fits=lambda row: _are_ranked(row["answers"]),
)
def _nectar(record: Record) -> Fields:
    row = record.value
    return {
        "prompt": row["prompt"],
        "responses": [answer["answer"] for answer in row["answers"]],
        "ranks": [answer["rank"] for answer in row["answers"]],
    }


def _are_ranked(value: Any) -> bool:
    has_one = isinstance(value, list) and value and isinstance(value[0], dict)
    return bool(has_one and value[0].keys() >= {"answer", "rank"})


@form(
    "HelpSteer",
    "prompt response helpfulness",
    '{"prompt": "Is ice warm?", "response": "No.", "helpfulness": 4, "correctness": 4, '
    '"coherence": 4, "complexity": 1, "verbosity": 0}',
    also="targets",
)
def _helpsteer(record: Record) -> Fields:
    row = record.value
    score = row.get("targets", row["helpfulness"])
    return {"prompt": row["prompt"], "responses": [row["response"]], "targets": [score]}


@form(
    "OpenAI summaries, scores",
    "info summary",
    '{"info": {"subreddit": "pets", "title": "My cat", "post": "It sleeps all day."}, '
    '"summary": {"text": " My cat sleeps.", "axes": {"overall": 7, "accuracy": 7}}}',
)
def _scored_summary(record: Record) -> Fields:
    row = record.value
    summary = row["summary"]
    return {
        "prompt": _post(row["info"]),
        "responses": [_summary(summary["text"])],
        "targets": [summary["axes"]["overall"]],
    }


@form(
    "OpenAI TL;DR",
    "subreddit title post summary",
    '{"subreddit": "pets", "title": "My cat", "post": "It sleeps.", "summary": "My cat sleeps."}',
)
def _tldr(record: Record) -> Fields:
    return {"prompt": _post(record.value), "response": _summary(record.value["summary"])}


def _post(info: Fields) -> str:
    """The query of Stiennon et al. (2020); a news article stands before ``TL;DR:`` alone."""
    if info.get("article"):
        return f"{info['article']}\n\nTL;DR:"
    texts = (f"SUBREDDIT: r/{info['subreddit']}", f"TITLE: {info['title']}")
    return "\n\n".join((*texts, f"POST: {info['post']}", "TL;DR:"))


def _summary(text: str) -> str:
    """With one space before it, as behind ``TL;DR:``."""
    return f" {text.lstrip()}"


@form(
    "Open Assistant trees",
    "prompt",
    '{"message_tree_id": "1", "prompt": {"role": "prompter", "text": "Is ice warm?", '
    '"replies": [{"role": "assistant", "text": "Yes.", "rank": 1, "replies": []}, {"role": '
    '"assistant", "text": "No.", "rank": 0, "replies": []}]}}',
    also="message_tree_id tree_state",
    fits=lambda row: isinstance(row["prompt"], dict) and "replies" in row["prompt"],
)
def _trees(record: Record) -> list[Fields]:
    """A ranking for each prompter's message with two replies of known rank, where 0 is best; those
    of earlier turns first.
    """
    rankings: list[Fields] = []
    waiting: list[tuple[Any, list[Message]]] = [(record.value["prompt"], [])]
    while waiting:
        message, before = waiting.pop(0)
        role = "user" if message["role"] == "prompter" else "assistant"
        turns = [*before, _says(role, message["text"])]
        replies = message.get("replies") or []
        answers = [reply for reply in replies if reply["role"] == "assistant"]
        ranked = [reply for reply in answers if reply.get("rank") is not None]
        if role == "user" and len(ranked) > 1:
            texts = [reply["text"] for reply in ranked]
            ranks = [reply["rank"] for reply in ranked]
            rankings.append({"prompt": turns, "responses": texts, "ranks": ranks})
        waiting += [(reply, turns) for reply in replies]
    if not rankings:
        raise Drop(record.source, "message tree without two ranked replies to one prompt")
    return rankings


@form(
    "Open Assistant messages",
    "message_id parent_id text role",
    '{"message_id": "1", "parent_id": null, "text": "Is ice warm?", "role": "prompter"}',
)
def _single_messages(record: Record) -> Fields:
    what = "is one message of a tree, without those before and after it; give the file of trees"
    raise BadRow(record.source, what)


# --- Feedback

renamed(
    "TRL unpaired preferences",
    "prompt response=completion desirable=label",
    '{"prompt": "Is ice warm?", "completion": "No.", "label": true}',
)

renamed(
    "messages with label",
    "messages desirable=label",
    '{"messages": [{"role": "user", "content": "Is ice warm?"}, {"role": "assistant", '
    '"content": "No."}], "label": true}',
)

renamed(
    "ShareGPT with label",
    "messages=conversations desirable=label",
    '{"conversations": [{"from": "human", "value": "Is ice warm?"}, {"from": "gpt", "value": '
    '"No."}], "label": true}',
    also="system",
)

renamed(
    "ShareGPT with kto_tag",
    "messages=conversations desirable=kto_tag",
    '{"conversations": [{"from": "human", "value": "Is ice warm?"}, {"from": "gpt", "value": '
    '"No."}], "kto_tag": true}',
    also="system",
)

renamed(
    "Alpaca with kto_tag",
    "prompt=instruction response=output desirable=kto_tag",
    '{"instruction": "Add the numbers.", "input": "1 2", "output": "3", "kto_tag": true}',
    also=f"{_BEFORE} input",
)

renamed(
    "BeaverTails",
    "prompt response desirable=is_safe",
    '{"prompt": "Is ice warm?", "response": "No.", "is_safe": true}',
)

renamed(
    "ms-swift with label",
    "prompt=query response desirable=label",
    '{"query": "Is ice warm?", "response": "No.", "label": true}',
    also=_BEFORE,
)


@form(
    "TRL stepwise",
    "prompt completions labels",
    '{"prompt": "1 + 2 + 3 =", "completions": ["1 + 2 = 3.", "3 + 3 = 7."], "labels": [true, '
    "false]}",
)
def _stepwise(record: Record) -> Fields:
    what = "labels the steps of an answer, and no stage trains on labels of steps"
    raise BadRow(record.source, f"{what}; give whole answers, as {{prompt, response, desirable}}")


# --- Tasks with a known answer, which is a column for the reward

renamed(
    "GSM8K",
    "prompt=question response=answer answer",
    '{"question": "What is 1 + 2?", "answer": "One and two are 3.\\n#### 3"}',
    without=_ONLY_IN_OURS,
)


@form(
    "MATH",
    "problem solution",
    '{"problem": "What is $1 + 2$?", "solution": "It is $\\\\boxed{3}$.", "level": "Level 1"}',
    also="answer",
    without=_ONLY_IN_OURS,
)
def _math(record: Record) -> Fields:
    row = record.value
    answer = row.get("answer", row["solution"])
    return {"prompt": row["problem"], "response": row["solution"], "answer": answer}


renamed(
    "problems and answers",
    "prompt=problem answer",
    '{"problem": "What is $1 + 2$?", "answer": "3"}',
    without=(*_ONLY_IN_OURS, "solution"),
)


@form(
    "MT-Bench",
    "turns",
    '{"question_id": 81, "category": "writing", "turns": ["Name a prime.", "And another?"]}',
    without=_ONLY_IN_OURS,
    fits=lambda row: _are_texts(row["turns"]),
)
def _first_turn(record: Record) -> Fields:
    """The first question; the others, which follow an answer, are a column."""
    return {"prompt": record.value["turns"][0], "turns": record.value["turns"]}


@form(
    "verl",
    "prompt reward_model",
    '{"data_source": "openai/gsm8k", "prompt": [{"role": "user", "content": "What is 1 + '
    '2?"}], "reward_model": {"style": "rule", "ground_truth": "3"}, "extra_info": {"split": '
    '"train", "index": 0}}',
    fits=lambda row: (
        isinstance(row["reward_model"], dict) and "ground_truth" in row["reward_model"]
    ),
)
def _verl(record: Record) -> Fields:
    truth = record.value["reward_model"]["ground_truth"]
    return {"prompt": record.value["prompt"], "ground_truth": truth, "answer": truth}
