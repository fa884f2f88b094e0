"""Records as others publish them, in our keys: ``--columns OURS=THEIRS``, and the table of public
forms, `FORMS`. To add a form is to add its row, and an example to docs/api/forms.md.

Our keys are ``messages`` (as OpenAI writes them) with ``tools``; ``prompt`` with ``response``, with
``chosen`` and ``rejected``, or with ``responses`` and one of ``best``, ``ranking``, ``ranks`` and
``targets``; ``steps`` with ``labels``; ``desirable``; ``margin``. All other keys are columns for a
reward.

THEIRS is one of:

- a key of the record;
- ``OUTER.INNER``: the value inside an object; of a list of objects the values inside each of them;
- ``OUTER.keys`` or ``OUTER.values``: the list of an object's keys, or of its values;
- ``A+B``: two texts with an empty line between them. One of them may be empty or missing.
"""

import contextlib
import difflib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from rlhf_jax.data.conversation import are_turns, begun, is_answered, says
from rlhf_jax.data.rows import BadRow, Drop, Fields, Kind, Message, Record, kind
from rlhf_jax.errors import UserError, did_you_mean

PAIR = ("chosen", "rejected")
ANNOTATED = ("instruction", "response1", "response2", "annotator1")
NO_WINNER = "neither answer was preferred"
OURS: dict[tuple[str, ...], Kind] = {
    ("responses",): "comparisons",
    ("prompt", *PAIR): "comparisons",
    PAIR: "comparisons",
    ("messages", "desirable"): "feedback",
    ("messages",): "demonstrations",
    ("prompt", "response", "desirable"): "feedback",
    ("prompt", "steps", "labels"): "solutions",
    ("prompt", "response"): "demonstrations",
    ANNOTATED: "annotated",
    ("prompt",): "prompts",
    ("text",): "demonstrations",
}
"""The kind of a record in our keys: that of the first of these whose keys it has."""
# Roles of a conversation under the names that data sets give them.
_ROLES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "claude", "bot", "model"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("observation", "tool_response", "function_response"), "tool"),
    **dict.fromkeys(("function", "ipython"), "tool"),
}
_CALLS = ("function_call", "tool_call")  # roles and types of content that hold calls of tools
# Whether a turn is learned: of LLaMA-Factory, OpenAI, ms-swift, axolotl and tinker.
_FLAGS = ("loss_weight", "weight", "loss", "train", "training", "trainable")
# Columns that may hold messages, and in files without lists the text of them. The second half are
# mere texts beside a plain prompt, whatever they spell.
_DIALOGUES = (
    *("messages", "conversations", "prompt", *PAIR),
    *("prompt_messages", "chosen_messages", "rejected_messages"),
)
_DIALOGUES_ALONE = (
    *("conversation", "completion", "response", "context", "question", "query", "instruction"),
    *("conversation_a", "conversation_b"),
)
_SPELLED = re.compile(r"\s*\[\s*\{")
_IN_PYTHON = re.compile(r"\s*\[\s*\{\s*'(role|content|from|value)'\s*:.*\}\s*\]\s*", re.DOTALL)
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")
_BROKEN = (KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError)


@dataclass(frozen=True)
class PublicForm:
    """A form in which others publish records."""

    name: str
    columns: str
    """The keys that tell the form, divided by spaces, with our names: ``OURS=THEIRS``, ``KEY`` (of
    the same name as ours) or ``=KEY`` (not read)."""
    also: str = ""
    """Keys that it has only sometimes, in the same way."""
    without: str = ""
    """A record with one of these keys has another form."""
    fits: Callable[[Fields], bool] = bool
    """Whether the values fit, where the keys do not tell."""
    read: Callable[[Fields], Fields | list[Fields]] | None = None
    """Computes more of our keys; each of a list makes a record."""
    refused: str = ""
    """Why no stage can use such records."""

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """A record of this form has all of them."""
        firsts = [theirs.partition("+")[0] for _, theirs in _renamings(self.columns)]
        return tuple(dict.fromkeys(path.partition(".")[0] for path in firsts))

    @cached_property
    def known(self) -> set[str]:
        """All keys of the form. A record's other keys stay as they are."""
        renamings = _renamings(f"{self.columns} {self.also}")
        return {path.partition(".")[0] for _, theirs in renamings for path in theirs.split("+")}


@lru_cache(maxsize=256)
def _renamings(columns: str) -> list[tuple[str, str]]:
    """[(our key, "" if it is not read; theirs)]"""
    words = [word.rpartition("=") for word in columns.split()]
    return [(ours if equals else theirs, theirs) for ours, equals, theirs in words]


def parse_columns(columns: Sequence[str]) -> dict[str, str]:
    """{our key: theirs} of ``--columns``. Raises `UserError` unless each is OURS=THEIRS."""
    pairs = [entry.partition("=") for entry in columns]
    for entry, pair in zip(columns, pairs, strict=True):
        if not all(pair):
            raise UserError(f"--columns {entry}: expected OURS=THEIRS, such as prompt=question")
    return {ours: theirs for ours, _, theirs in pairs}


def unused_columns(records: Sequence[Record], columns: Mapping[str, str]) -> dict[str, str]:
    """{OURS=THEIRS: sentence} for the ``columns`` that no record has; the sentence names the keys
    of the records.
    """
    rows = [record.value for record in records if isinstance(record.value, dict)]
    sentences = {}
    for ours, theirs in columns.items() if rows else ():
        paths = theirs.split("+")
        if any(_value(row, path) is not None for row in rows for path in (theirs, *paths)):
            continue
        keys = dict.fromkeys(key for row in rows for key in row)
        hint = did_you_mean(theirs, keys) or f"; the keys are {', '.join(keys)}"
        sentences[f"{ours}={theirs}"] = f"--columns {ours}={theirs}: no row has {theirs!r}{hint}"
    return sentences


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
    if isinstance(inner, dict) and rest not in inner and rest in ("keys", "values"):
        return list(inner if rest == "keys" else inner.values())
    return _value(inner, rest)


def _joined(row: Fields, theirs: str) -> Any:
    """The value under the key or path, or the text of A+B; None if the row has none of them."""
    if theirs in row or "+" not in theirs:
        return _value(row, theirs)
    parts = [_value(row, path) for path in theirs.split("+")]
    for part in parts:
        _check(isinstance(part, str | None), f"{theirs} joins texts with +, found {kind(part)}")
    return None if parts == [None] * len(parts) else "\n\n".join(filter(None, parts))


def converted(record: Record, columns: Mapping[str, str]) -> list[Record]:
    """The record in our keys, with the name of its public form; several records if one holds
    several rankings; itself if no public form fits.

    Args:
      columns: our keys and theirs; what they give stands in place of what the form gives. One that
        the record lacks does not change it.

    Raises:
      BadRow: two forms fit, a value is not as the form has it, or the record has pictures, videos
        or sounds; as `Drop` if training cannot use the record.
    """
    row = record.value
    if are_turns(row):  # without a key, as nanochat has them
        row = {"messages": row}
    if not isinstance(row, dict):
        return [record]
    form = None
    row = {key: value for key, value in row.items() if value is not None}
    try:
        values = {ours: _joined(row, theirs) for ours, theirs in columns.items()}
        given = {ours: value for ours, value in values.items() if value is not None}
        if columns:
            renamed = {key for theirs in columns.values() for key in theirs.split("+")}
            row = {key: value for key, value in row.items() if key not in renamed} | given
        for key in filter(row.get, _MEDIA):
            what = f"has {key!r}, and no model here reads such input; remove the column or these"
            raise BadRow("", f"{what} rows")
        row = _with_dialogues(row)
        form = _form_of(row, given)
        if form is None:
            if not any(row.keys() >= set(keys) for keys in OURS):
                for key in row:
                    for near in meant(key, tuple(row)):
                        _check(False, f"has no known form; did you mean {near!r} by {key!r}?")
            return [Record(begun(_in_turns(row)), record.source)]
        _check(not form.refused, form.refused)
        read = form.read(row) if form.read else {}
        several = read if isinstance(read, list) else [_renamed(row, form) | read]
        rest = {key: value for key, value in row.items() if key not in form.known}
        kept = {key: value for key, value in given.items() if key not in form.known}
        rows = [begun(_in_turns(rest | values | kept)) for values in several]
    except BadRow as error:
        raise type(error)(record.source, error.what) from error
    except _BROKEN as error:
        name = f"{form.name} ({', '.join(form.keys)})" if form else "OpenAI's messages"
        what = f"not in the form of {name}: {type(error).__name__}: {error}"
        raise BadRow(record.source, what) from error
    if several is not read:
        return [Record(rows[0], record.source, form.name)]
    sources = [f"{record.source}, prompt {number}" for number in range(1, len(rows) + 1)]
    return [Record(*of_row, form.name) for of_row in zip(rows, sources, strict=True)]


def _check(holds: Any, what: str) -> None:
    """Raises `BadRow`, whose place `converted` adds."""
    if not holds:
        raise BadRow("", what)


def _with_dialogues(row: Fields) -> Fields:
    """The row with lists of messages in place of their JSON, as cells of CSV have it."""
    for key in (*_DIALOGUES, *_DIALOGUES_ALONE):
        text = row.get(key)
        is_text = key in _DIALOGUES_ALONE and isinstance(row.get("prompt"), str)
        if is_text or not isinstance(text, str) or not _SPELLED.match(text):
            continue
        what = f"{key!r} holds messages as Python writes them; write them as JSON, by json.dumps"
        _check(not _IN_PYTHON.fullmatch(text), what)
        with contextlib.suppress(ValueError, RecursionError):
            turns = json.loads(text)
            if are_turns(turns):
                row = row | {key: turns}
    return row


def _form_of(row: Fields, given: Fields) -> PublicForm | None:
    """The form of a record; None if it has ours alone, or if ``--columns`` gave a key of ours.

    Where the keys of one form include those of another, it is the first. Raises `BadRow` if two
    forms fit and none of them includes the other.
    """
    fitting = [form for form in _forms_with(tuple(row)) if form.fits(row)]
    narrow = [
        form for form in fitting if not any(set(form.keys) < set(other.keys) for other in fitting)
    ]
    if not narrow:
        return None
    own = [keys for keys in OURS if row.keys() >= set(keys) and not narrow[0].known >= set(keys)]
    if own and given.keys() & set(own[0]):
        return None
    names = [form.name for form in narrow] + [", ".join(keys) for keys in own[:1]]
    what = f"fits {' and '.join(names)}; say by --columns OURS=THEIRS which keys count"
    _check(len(names) == 1, what)
    return narrow[0]


@lru_cache(maxsize=256)
def _forms_with(keys: tuple[str, ...]) -> list[PublicForm]:
    """The forms that records with these keys may have."""
    has = set(keys)
    return [
        form for form in FORMS if has.issuperset(form.keys) and has.isdisjoint(form.without.split())
    ]


@lru_cache(maxsize=256)
def meant(key: str, keys: tuple[str, ...]) -> list[str]:
    """The key of a public form that ``key`` looks like, of a record with all its other keys."""
    if any(key in form.known for form in FORMS):
        return []
    is_ours = any(set(keys).issuperset(own) for own in OURS)
    candidates: list[str] = []
    for form in FORMS:
        missing = set(form.keys).difference(keys)
        if len(missing) == 1 and (len(form.keys) > 1 or not is_ours):
            candidates += missing.difference(*OURS, (key.rpartition("_")[0],))  # question_id
    return difflib.get_close_matches(key.strip().lower(), candidates, n=1, cutoff=0.8)


def _renamed(row: Fields, form: PublicForm) -> Fields:
    """The values of a row of this form under our keys."""
    values = {ours: _joined(row, theirs) for ours, theirs in _renamings(form.columns) if ours}
    for ours, theirs in _renamings(form.columns):
        if "." in theirs and values[ours] is None:
            raise KeyError(theirs)
    for ours, theirs in _renamings(form.also):
        if ours and (value := _joined(row, theirs)):
            values[ours] = value
    return values


def _in_turns(row: Fields) -> Fields:
    """The row with its conversations as messages of OpenAI, and their tools as a list."""
    turned: Fields = {}
    for key in ("messages", "prompt", "response", *PAIR):
        value = row.get(key)
        turns = [value] if isinstance(value, dict) else value
        if isinstance(turns, list) and turns and all(map(_is_turn, turns)):
            turned[key] = list(map(_message, turns))
    if turned and row.get("tools"):
        tools = _unpacked("'tools'", row["tools"])
        what = f"'tools' must be a list or the JSON of one, found {kind(tools)}"
        _check(isinstance(tools, list), what)
        turned["tools"] = list(map(_wrapped, tools))
    return row | turned if turned else row


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and ("from" in turn or "role" in turn)


def _message(turn: Fields) -> Message:
    """A turn of any data set as OpenAI's message: who speaks under our role, tool calls and
    reasoning under keys of their own, and a weight of 0 or 1.
    """
    message = {key: value for key, value in turn.items() if key not in ("from", "value")}
    speaker = turn.get("role", turn.get("from"))
    message["role"] = _ROLES.get(str(speaker).lower(), speaker)
    if "value" in turn:
        message["content"] = turn["value"]
    if speaker in _CALLS:
        message["tool_calls"] = _calls(message["content"])
        message["content"] = ""
    if isinstance(message.get("function_call"), dict):  # OpenAI's before tools
        message["tool_calls"] = [_wrapped(message.pop("function_call"))]
    flags = {key: message.pop(key) for key in _FLAGS if key in message}
    for key, flag in flags.items():
        what = f"{key!r} of a message must be 0 or 1, or true or false, found {flag!r:.40}"
        _check(flag in (None, 0, 1), what)
    weights = [int(flag) for flag in flags.values() if flag is not None]
    if weights and message["role"] == "assistant":
        message["weight"] = min(weights)
    if isinstance(message.get("content"), list):
        _split_content(message)
    return message


def _split_content(message: Message) -> None:
    """Puts the parts of a content where OpenAI has them: calls and reasoning beside the texts."""
    texts = []
    for part in message["content"]:
        part_kind = part.get("type") if isinstance(part, dict) else None
        if part_kind in _CALLS:
            message["tool_calls"] = [*(message.get("tool_calls") or []), *_calls(part["value"])]
        elif part_kind == "reasoning":
            message["reasoning_content"] = part["value"]
        elif part_kind == "text" and "value" in part:
            texts.append({"type": "text", "text": part["value"]})
        else:
            texts.append(part)
    match texts:
        case [] | [{"text": str(), "type": "text"}]:
            message["content"] = "".join(part["text"] for part in texts)
        case _:
            message["content"] = texts


def _calls(value: Any) -> list[Fields]:
    """Tool calls, of which there may be several, from an object or its JSON."""
    calls = _unpacked("a tool call", value)
    return [_wrapped(call) for call in (calls if isinstance(calls, list) else [calls])]


def _wrapped(function: Any) -> Any:
    """The description or the call of a function as ``{type, function}``."""
    is_bare = isinstance(function, dict) and "name" in function and "function" not in function
    return {"type": "function", "function": function} if is_bare else function


def _unpacked(what: str, value: Any) -> Any:
    """The value that a text holds as JSON; any other value itself."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRow("", f"{what} is not JSON: {value[:60]!r}") from error


# --- What the forms of the table compute


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(isinstance(i, str) for i in value)


def _preferred(row: Fields, keys: str, winner: int | None) -> Fields:
    """A pair of the answers under two keys, of which 0 or 1 is the better one; None is a tie."""
    if winner is None:
        raise Drop("", NO_WINNER)
    _check(winner in (0, 1), f"the better one of two answers is 0 or 1, found {winner!r}")
    answers = [row[key] for key in keys.split()]
    return {"chosen": answers[int(winner)], "rejected": answers[1 - int(winner)]}


def _stronger(strength: float) -> int | None:
    """The better one of two answers: by a positive strength the second, without any neither."""
    return int(strength > 0) if strength else None


def _post(info: Fields) -> str:
    """The query of Stiennon et al. (2020); a news article stands before ``TL;DR:`` alone."""
    if info.get("article"):
        return f"{info['article']}\n\nTL;DR:"
    titled = f"SUBREDDIT: r/{info['subreddit']}\n\nTITLE: {info['title']}"
    return f"{titled}\n\nPOST: {info['post']}\n\nTL;DR:"


def _summary(text: str) -> str:
    """With one space before it, as behind ``TL;DR:``."""
    return f" {text.lstrip()}"


def _binarised(row: Fields) -> Fields:
    """The messages are the prompt, or the prompt and the chosen answer, or the chosen ones."""
    told = [turn.get("content") for turn in row["messages"]]
    chosen = row["chosen"] if are_turns(row["chosen"]) else [says("assistant", row["chosen"])]
    answer = [turn.get("content") for turn in chosen] if is_answered(row["messages"]) else []
    before = row["messages"][: len(told) - len(answer)]
    is_same = told[len(before) :] == answer and (not before or row["prompt"] in [*told, before])
    _check(is_same, "'messages' are not those of 'prompt' and 'chosen'; leave one of the two out")
    return {"prompt": before} if before else {}


def _alternating(texts: Iterable[str]) -> Fields:
    roles = itertools.cycle(("user", "assistant"))
    return {"messages": list(map(says, roles, texts))}


def _compared_summaries(row: Fields) -> Fields:
    first, second = (_summary(summary["text"]) for summary in row["summaries"])
    pair = _preferred({"a": first, "b": second}, "a b", row["choice"])
    return {"prompt": _post(row["info"]), **pair}


def _conversation(row: Fields) -> Fields:
    """Messages, as in WildChat, or questions with their answers, as in ms-swift or Capybara."""
    turns = []
    for turn in row["conversation"]:
        if _is_turn(turn):
            turns.append(turn)
            continue
        asked, answer = ("human", "assistant") if "human" in turn else ("input", "output")
        turns += [says("system", turn["system"])] if turn.get("system") else []
        turns += [says("user", turn[asked]), says("assistant", turn[answer])]
    return {"messages": turns}


def _arena(row: Fields) -> Fields:
    """The vote is on the answers to the first ``turn`` questions, of which there may be more."""
    vote = str(row["winner"])
    if vote.startswith("tie") or vote in ("both_bad", "bothbad"):
        raise Drop("", NO_WINNER)
    votes = ("model_a", "model_b")
    _check(vote in votes, f"'winner' must be one of {', '.join(votes)}, tie, both_bad")
    judged = {}
    for key in ("conversation_a", "conversation_b"):
        turns = list(map(_message, row[key]))
        starts = [n for n, turn in enumerate(turns) if turn["role"] == "user"] + [len(turns)]
        number = _number(row.get("turn", len(starts) - 1))
        is_there = type(number) is int and 0 < number < len(starts)
        _check(is_there, f"'turn' must be that of a question in {key!r}, found {number!r:.40}")
        judged[key] = turns[: starts[number]]
    return _preferred(judged, "conversation_a conversation_b", votes.index(vote))


def _arena_votes(row: Fields) -> Fields:
    conversations: Fields = {}
    questions = _unpacked("'prompt'", row["prompt"])
    for side in ("response_a", "response_b"):
        answers = _unpacked(repr(side), row[side])
        what = f"'prompt' has {len(questions)} questions, and {side!r} {len(answers)} answers"
        _check(len(questions) == len(answers), what)
        texts = itertools.chain.from_iterable(zip(questions, answers, strict=True))
        conversations[side] = _alternating(texts)["messages"]
    has_won = [int(row["winner_model_a"]), int(row["winner_model_b"])]
    winner = has_won.index(1) if sum(has_won) == 1 else None
    return _preferred(conversations, "response_a response_b", winner)


def _samples(row: Fields) -> Fields:
    last = max(int(key[6:]) for key in row if re.fullmatch("sample[0-9]{1,2}", key))
    samples = [row.get(f"sample{number}") for number in range(last + 1)]
    given = [row[key] for key in ("query", "prompt") if key in row]
    return {"responses": samples} | ({"prompt": given[0]} if given else {})


def _right_and_wrong(row: Fields) -> Fields:
    right, wrong = row["chosen"], row["rejected"]
    if len(right) == 1:
        return {"responses": right + wrong, "best": 0}
    return {"responses": right + wrong, "ranks": [0] * len(right) + [1] * len(wrong)}


def _scored(row: Fields) -> Fields:
    scores = row.get("targets") or [answer.get("overall_score") for answer in row["completions"]]
    if not all(isinstance(score, int | float) for score in scores):
        return {"targets": scores}  # which a stage refuses that reads them
    return {"targets": scores, "ranks": [-score for score in scores]}


def _is_bare(row: Fields) -> bool:
    """Whether another text beside an answer looks like what the answer was worked out in: by its
    name, or as prose that is longer.
    """
    answer = str(row["answer"])
    for key, value in row.items():
        text = "\n".join(value) if _are_texts(value) else value
        if isinstance(text, str) and key not in ("question", "answer") and len(text) > len(answer):
            is_prose = len(text.split()) > len(answer.split()) + 5
            if is_prose or _WORKED.search(key.lower()):
                return True
    return False


def _number(value: Any) -> Any:
    """The number that a table may spell as text; any other value itself."""
    with contextlib.suppress(TypeError, ValueError):
        number = float(value) if isinstance(value, str) else value
        return int(number) if isinstance(number, float) and number.is_integer() else number
    return value


def _is_magpie(row: Fields) -> bool:
    """Whether the last of the turns is the response."""
    turns = row["conversations"]
    last = turns[-1] if are_turns(turns) else {}
    return str(last.get("value", last.get("content"))).split() == str(row["response"]).split()


def _rated_steps(row: Fields) -> Fields:
    """The chosen step at each place, and what the last one was rated, as in Lightman et al. (2023):
    -1 is wrong; 0, neutral, is right. A step that a person wrote is right.
    """
    rated = []
    for place in row["label"]["steps"]:
        by_person = place.get("human_completion")
        step = by_person or place["completions"][place.get("chosen_completion") or 0]
        rated.append((step["text"], 1 if by_person and step["rating"] is None else step["rating"]))
    rated = list(itertools.takewhile(lambda step: step[1] is not None, rated))
    if not rated:
        raise Drop("", "no step has a rating")
    return {"steps": [text for text, _ in rated], "labels": [rating >= 0 for _, rating in rated]}


def _marked_steps(row: Fields) -> Fields:
    """Each step ends with a mark, in whose place the label has + or - (Wang et al. 2024)."""
    marks = [match.start() for match in re.finditer(_MARK, row["input"])]
    label = row["label"]
    signs = [label[place - n : place - n + 1] for n, place in enumerate(marks)]
    *steps, rest = row["input"].split(_MARK)
    prompt, first, begun_step = steps[0].partition("Step 1:")
    is_whole = len(label) == len(row["input"]) - len(marks) and {*signs} <= {"+", "-"}
    _check(is_whole and first and not rest.strip(), f"each step must end with {_MARK}, + or -")
    texts = [first + begun_step, *steps[1:]]
    labels = [sign == "+" for sign in signs]
    return {"prompt": prompt.strip(), "steps": list(map(str.strip, texts)), "labels": labels}


def _up_to_first_error(row: Fields) -> Fields:
    """The label is the number of the first wrong step, behind which none is judged; -1: none is."""
    steps, wrong = row["steps"], _number(row["label"])
    _check(type(wrong) is int and -1 <= wrong < len(steps), "'label' must be -1 or that of a step")
    judged = steps if wrong < 0 else steps[: wrong + 1]
    return {"steps": judged, "labels": [number != wrong for number in range(len(judged))]}


def _alone(response: Any) -> Any:
    """The text of an answer of one turn; any other value itself."""
    match response:
        case [{"role": "assistant", "content": str() as text}]:
            return text
    return response


def _are_ranked(value: Any) -> bool:
    has_one = isinstance(value, list) and value and isinstance(value[0], dict)
    return bool(has_one and value[0].keys() >= {"answer", "rank"})


def _trees(row: Fields) -> list[Fields]:
    """A ranking for each prompter's message with two replies of known rank, where 0 is best; those
    of earlier turns first.
    """
    rankings: list[Fields] = []
    waiting: list[tuple[Any, list[Message]]] = [(row["prompt"], [])]
    while waiting:
        message, before = waiting.pop(0)
        role = "user" if message["role"] == "prompter" else "assistant"
        turns = [*before, says(role, message["text"])]
        replies = message.get("replies") or []
        answers = [reply for reply in replies if reply["role"] == "assistant"]
        ranked = [reply for reply in answers if reply.get("rank") is not None]
        if role == "user" and len(ranked) > 1:
            texts = [reply["text"] for reply in ranked]
            ranks = [reply["rank"] for reply in ranked]
            rankings.append({"prompt": turns, "responses": texts, "ranks": ranks})
        waiting += [(reply, turns) for reply in replies]
    if not rankings:
        raise Drop("", "message tree without two ranked replies to one prompt")
    return rankings


_ONLY_IN_OURS = "prompt messages response responses chosen text"
_WORKED = re.compile(
    "solution|reason|rational|expla|(^|_)cot|chain|thought|think|generat|output|completion|full_"
)
_MARK = "\N{CYRILLIC SMALL LETTER KA}\N{CYRILLIC SMALL LETTER I}"  # of Math-Shepherd

FORMS = (
    # Demonstrations
    PublicForm(
        "ShareGPT", "messages=conversations", fits=lambda row: not _are_texts(row["conversations"])
    ),
    PublicForm(
        "LIMA",
        "=conversations",
        fits=lambda row: _are_texts(row["conversations"]),
        read=lambda row: _alternating(row["conversations"]),
    ),
    PublicForm("conversation", "=conversation", without=_ONLY_IN_OURS, read=_conversation),
    PublicForm("Alpaca", "prompt=instruction+input+context response=output", also="=text"),
    PublicForm("Dolly", "prompt=instruction+input+context response"),
    PublicForm("OpenOrca", "prompt=question response", without="prompt messages"),
    PublicForm("ms-swift", "prompt=query response", without="prompt messages"),
    PublicForm(
        "input and output",
        "prompt=input response=output",
        without=f"{_ONLY_IN_OURS} instruction question",
    ),
    PublicForm("TRL prompt and completion", "prompt response=completion"),
    PublicForm("Magpie", "messages=conversations =instruction =response", fits=_is_magpie),
    PublicForm(
        "UltraChat",
        "=data",
        without=f"{_ONLY_IN_OURS} question query problem instruction conversations",
        fits=lambda row: _are_texts(row["data"]),
        read=lambda row: _alternating(row["data"]),
    ),
    PublicForm(
        "xLAM",
        "=query =answers tools",
        read=lambda row: {
            "messages": [
                says("user", row["query"]),
                says("assistant", "") | {"tool_calls": _calls(row["answers"])},
            ]
        },
    ),
    PublicForm("OpenAI functions", "messages tools=functions"),
    # Pairs
    PublicForm("ShareGPT preferences", "prompt=conversations chosen rejected"),
    PublicForm("Alpaca preferences", "prompt=instruction+input+context chosen rejected"),
    PublicForm(
        "Orca pairs",
        "prompt=question chosen rejected",
        fits=lambda row: row.get("prompt") != row["question"],
    ),
    PublicForm(
        "input and pairs",
        "prompt=input chosen rejected",
        without="prompt messages instruction question query conversations",
    ),
    PublicForm("ms-swift preferences", "prompt=query chosen=response rejected=rejected_response"),
    PublicForm(
        "ms-swift messages",
        "=messages rejected=rejected_response",
        read=lambda row: {"prompt": row["messages"][:-1], "chosen": [row["messages"][-1]]},
    ),
    PublicForm("ms-swift conversations", "chosen=messages rejected=rejected_messages"),
    PublicForm("stack-exchange-paired", "prompt=question chosen=response_j rejected=response_k"),
    PublicForm(
        "LLaMA-Factory messages",
        "chosen=chosen_messages rejected=rejected_messages",
        also="prompt=prompt_messages",
    ),
    PublicForm(
        "OpenAI preferences",
        "prompt=input.messages chosen=preferred_output rejected=non_preferred_output",
        also="tools=input.tools",
    ),
    PublicForm("UltraFeedback, binarised", "prompt chosen rejected =messages", read=_binarised),
    PublicForm(
        "SHP",
        "prompt=history =human_ref_A =human_ref_B =labels",
        read=lambda row: _preferred(row, "human_ref_A human_ref_B", 1 - int(row["labels"])),
    ),
    PublicForm(
        "OpenAI summaries, comparisons", "=info =summaries =choice", read=_compared_summaries
    ),
    PublicForm(
        "PKU-SafeRLHF",
        "prompt =response_0 =response_1 =better_response_id",
        also="=best",
        read=lambda row: _preferred(
            row, "response_0 response_1", row.get("best", row["better_response_id"])
        ),
    ),
    PublicForm(
        "HelpSteer preferences",
        "prompt =response_1 =response_2 =preference_strength",
        read=lambda row: _preferred(
            row, "response_1 response_2", _stronger(_number(row["preference_strength"]))
        ),
    ),
    PublicForm(
        "HelpSteer3",
        "prompt=context =response1 =response2 =overall_preference",
        read=lambda row: _preferred(
            row, "response1 response2", _stronger(_number(row["overall_preference"]))
        ),
    ),
    PublicForm(
        "arena conversations", "=conversation_a =conversation_b =winner", also="=turn", read=_arena
    ),
    PublicForm(
        "arena votes",
        "=prompt =response_a =response_b =winner_model_a =winner_model_b",
        also="=winner_tie",
        read=_arena_votes,
    ),
    # Rankings and scores
    PublicForm(
        "lm-human-preferences",
        "=sample0",
        also=f"=query =prompt {' '.join(f'=sample{number}' for number in range(1, 64))}",
        read=_samples,
    ),
    PublicForm("query and responses", "prompt=query responses", without="prompt"),
    PublicForm(
        "RewardBench 2",
        "prompt =chosen =rejected",
        fits=lambda row: _are_texts(row["chosen"]) and _are_texts(row["rejected"]),
        read=_right_and_wrong,
    ),
    PublicForm(
        "WebGPT comparisons",
        "prompt=question.full_text =answer_0 =answer_1 =score_0 =score_1",
        also="=quotes_0 =quotes_1 =tokens_0 =tokens_1",
        read=lambda row: {
            "responses": [row["answer_0"], row["answer_1"]],
            "ranks": [-row["score_0"], -row["score_1"]],
        },
    ),
    PublicForm(
        "UltraFeedback",
        "prompt=instruction responses=completions.response",
        also="=targets",
        read=_scored,
    ),
    PublicForm(
        "Nectar",
        "prompt responses=answers.answer ranks=answers.rank",
        fits=lambda row: _are_ranked(row["answers"]),
    ),
    PublicForm(
        "HelpSteer",
        "prompt =response =helpfulness",
        also="=targets",
        read=lambda row: {
            "responses": [row["response"]],
            "targets": [row.get("targets", row["helpfulness"])],
        },
    ),
    PublicForm(
        "prompt, response and score",
        "prompt response score",
        without="desirable messages responses chosen",
        read=lambda row: {
            "responses": [_alone(row["response"])],
            "targets": [_number(row["score"])],
        },
    ),
    PublicForm(
        "OpenAI summaries, scores",
        "=info =summary",
        read=lambda row: {
            "prompt": _post(row["info"]),
            "responses": [_summary(row["summary"]["text"])],
            "targets": [row["summary"]["axes"]["overall"]],
        },
    ),
    PublicForm(
        "OpenAI TL;DR",
        "=subreddit =title =post =summary",
        read=lambda row: {"prompt": _post(row), "response": _summary(row["summary"])},
    ),
    PublicForm(
        "Open Assistant trees",
        "=prompt",
        also="=message_tree_id =tree_state",
        fits=lambda row: isinstance(row["prompt"], dict) and "replies" in row["prompt"],
        read=_trees,
    ),
    PublicForm(
        "Open Assistant messages",
        "message_id text role",
        refused="is one message of a tree, without those before and after it; give the file of "
        "trees",
    ),
    # Feedback
    PublicForm("TRL unpaired preferences", "prompt response=completion desirable=label"),
    PublicForm("messages with label", "messages desirable=label"),
    PublicForm("ShareGPT with label", "messages=conversations desirable=label"),
    PublicForm("ShareGPT with kto_tag", "messages=conversations desirable=kto_tag"),
    PublicForm(
        "Alpaca with kto_tag", "prompt=instruction+input+context response=output desirable=kto_tag"
    ),
    PublicForm("BeaverTails", "prompt response desirable=is_safe"),
    PublicForm("ms-swift with label", "prompt=query response desirable=label"),
    PublicForm("TRL stepwise", "prompt steps=completions labels"),
    PublicForm(
        "PRM800K",
        "prompt=question.problem =label",
        also="answer=question.ground_truth_answer",
        read=_rated_steps,
    ),
    PublicForm(
        "Math-Shepherd",
        "=input =label",
        fits=lambda row: isinstance(row["input"], str) and _MARK in row["input"],
        read=_marked_steps,
    ),
    PublicForm("ProcessBench", "prompt=problem =steps =label", read=_up_to_first_error),
    # Tasks with a known answer, which is a column for the reward
    PublicForm(
        "GSM8K",
        "prompt=question response=answer answer",
        without=_ONLY_IN_OURS,
        fits=lambda row: not _is_bare(row),
    ),
    PublicForm(
        "questions and answers", "prompt=question answer", without=_ONLY_IN_OURS, fits=_is_bare
    ),
    PublicForm("LIMO", "prompt=question response=solution answer solution", without=_ONLY_IN_OURS),
    PublicForm(
        "s1K",
        "prompt=question answer=solution solution =thinking_trajectories =attempt",
        also="=text",
        fits=lambda row: _are_texts(row["thinking_trajectories"]),
        read=lambda row: {
            "response": "<think>\n{}\n</think>\n\n{}".format(
                "\n".join(row["thinking_trajectories"]), row["attempt"]
            )
        },
    ),
    PublicForm(
        "OpenMathInstruct-2", "prompt=problem response=generated_solution answer=expected_answer"
    ),
    PublicForm(
        "MATH",
        "prompt=problem response=solution answer=solution solution",
        also="answer",
        without=f"{_ONLY_IN_OURS} generated_solution",
    ),
    PublicForm(
        "problems and answers", "prompt=problem answer", without=f"{_ONLY_IN_OURS} solution"
    ),
    PublicForm(
        "MT-Bench",
        "turns",  # the others, which follow an answer, are a column
        without=_ONLY_IN_OURS,
        fits=lambda row: _are_texts(row["turns"]),
        read=lambda row: {"prompt": row["turns"][0]},
    ),
    PublicForm(
        "verl",
        "prompt =reward_model",
        fits=lambda row: (
            isinstance(row["reward_model"], dict) and "ground_truth" in row["reward_model"]
        ),
        read=lambda row: {
            "ground_truth": row["reward_model"]["ground_truth"],
            "answer": row["reward_model"]["ground_truth"],
        },
    ),
)
