"""Rewards from functions of texts: what a function is given, by the names of its parameters, and
where its rewards stand.
"""

import asyncio
import bisect
import functools
import inspect
import traceback
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from numbers import Number
from typing import Any, Protocol

import numpy as np

from rlhf_jax.errors import TrainingFault, UserError
from rlhf_jax.rewards import host
from rlhf_jax.rewards.host import MISSING, Columns, HostReward, HostScores, Score
from rlhf_jax.types import Rollout

TextScorer = Callable[[Sequence[Any], Sequence[str]], np.ndarray]
"""(conversations, responses) -> scores [N]; a conversation is a list of messages."""

TEXTS = (
    "prompts",
    "responses",
    "completions",
    "completion_ids",
    "messages",
    "opponents",
    "group_ids",
    "group_sizes",
    "queries",
)
"""Parameters that a function of texts may have, beside the columns of the prompts' rows."""

ALIASES = dict.fromkeys(["solution_str", "solution_strs"], "responses")  # verl
ALIASES |= dict.fromkeys(["response", "completion", "output", "outputs", "text"], "responses")
ALIASES |= dict.fromkeys(["texts", "generation", "generations", "prediction"], "responses")
ALIASES |= {"predictions": "responses", "prompt": "prompts", "labels": "label"}
_OF_VERL = ("data_source", "ground_truth", "extra_info")
ALIASES |= {f"{name}s": name for name in _OF_VERL}
"""{other name of a parameter: the text or column that it gets}. A column of that name comes first,
and a parameter with a default gets no responses by another name."""

ALL = "all columns"  # what a ** parameter gets
_ANSWERS = {"responses", "completions", "completion_ids", "queries", "first", "second"}

IS_CHAT = "is chat"
"""Key of columns that no parameter can have: whether the data gives each prompt as messages."""
SOURCE = "source of a row"
"""Another one: the file and the place in it that each prompt is from, for messages."""


class Decoder(Protocol):
    """What a tokenizer must have for rewards that read texts: a text without pads and EOS."""

    def decode(self, ids: list[int], /) -> str: ...


Function = Callable[..., Any]
Texts = dict[str, list[Any]]
"""{parameter: what it has for each row}."""

Spell = Callable[[list[int]], str]
"""Token ids as text, with the special tokens among them."""


def from_text(fn: Function, tokenizer: Decoder, spell: Spell | None = None) -> HostReward:
    """A HostReward from a function of texts, which takes any of these by the name of its
    parameters, lists with one entry for each row that is not missing:

    - ``prompts``: texts, as the model reads them: all real tokens before the first response token,
    - ``responses``: texts of the tokens that the policy wrote, without the holes of
      ``response_mask``, pads and EOS; ``completion_ids``: these tokens, EOS included,
    - ``messages``: the prompts as messages, before any template,
    - ``opponents``: of a judge of pairs, the responses that are compared with these at validations,
    - ``group_ids``: rows with the same number answer the same prompt, and no other call has rows of
      this group; ``group_sizes``: how many rows the group has, missing ones too,
    - the columns of the prompts' data rows; a ``**`` parameter gets all.

    Without a default it may have another name of ``ALIASES``. TRL's functions are told by
    ``completions``: they are the responses, and where the data has messages, prompts and
    completions are lists of messages; verl's by ``solution_str``: they are called for each row by
    itself; ``queries`` of OpenRLHF are texts of prompt and response.

    Args:
      fn: may be ``async``. It returns a list, tuple, array or tensor with an entry for each row: a
        number; None or ``Unscored(reason)`` for a row that cannot be scored; one number for each
        token of the response; pairs (position of a character in the response, number), each of
        which stands at the token that completes the character; or a dict with the number
        ``score``, whose other numbers are components. Or it returns a pair of these and {name of a
        component: numbers}, or a dict with ``rewards`` and the components ``scores`` and
        ``extra_logs``.
      spell: of prompts; None: without pads and EOS.

    Returns:
      HostReward with the errors of ``on_host``, which name the function, its line and the prompts
      too.
    """
    name = f"the reward function {getattr(fn, '__name__', type(fn).__name__)}"
    line = _line_of(fn)

    def score(rollout: Rollout, columns: Columns) -> HostScores:
        rows = np.flatnonzero(rollout.present).tolist()
        if not rows:
            return [MISSING] * len(rollout.tokens), {}
        shown = _shown(rollout, columns, rows, tokenizer, spell or tokenizer.decode)
        labels = _labels(rows, shown)  # first: the function may change what it gets
        result = _called(name, fn, shown)
        place = functools.partial(_place, rollout, rows, labels, tokenizer, name)
        present = [True] * len(rows)
        try:
            scores, components = host.checked(name, result, labels, present, place)
        except (UserError, FloatingPointError) as error:
            raise type(error)(f"{error}{line}") from None

        numbers = {row: number for number, row in enumerate(rows)}

        def in_all_rows(values: list[Score]) -> list[Score]:
            places = map(numbers.get, range(len(rollout.tokens)))
            return [MISSING if place is None else values[place] for place in places]

        return in_all_rows(scores), {name: in_all_rows(x) for name, x in components.items()}

    return score


def teacher_prompts(encode: Callable[[Any], Sequence[int]], column: str) -> HostReward:
    """A HostReward for ``algorithms.self_distill``: scores of 0, and the components
    ``teacher_tokens`` and ``teacher_mask`` [B, T] with other prompts before the same responses.

    Args:
      encode: ``tokenizer.encode``: the tokens of an entry of the column, the whole prompt.

    Raises:
      UserError: when it is called: a prompt has more tokens than the policy's has slots.
    """

    def score(rollout: Rollout, columns: Columns) -> HostScores:
        tokens, mask = (np.array(x) for x in (rollout.tokens, rollout.attention_mask))
        for row in np.flatnonzero(rollout.present).tolist():
            ids = encode(columns[column][row])
            slots = int(np.argmax(rollout.mask[row]))
            if len(ids) > slots:
                raise UserError(
                    f"{column}: a prompt of {len(ids)} tokens, and the policy's has {slots} slots; "
                    "give a larger text.bucket_multiple"
                )
            mask[row, :slots] = np.arange(slots) >= slots - len(ids)
            tokens[row, slots - len(ids) : slots] = ids
        return np.zeros(len(tokens)), {"teacher_tokens": tokens, "teacher_mask": mask}

    score.reads = (column,)  # type: ignore[attr-defined]
    return score


def _labels(rows: Sequence[int], shown: Texts) -> list[str]:
    """What messages call the rows of a function: its texts, and where the prompt is from."""
    sources = shown.get(SOURCE, [None] * len(rows))
    labels = []
    for row, prompt, response, source in zip(
        rows, shown["prompts"], shown["responses"], sources, strict=True
    ):
        place = "" if source is None else f" of {source}"
        labels.append(f"row {row}, prompt {prompt!r:.200}{place}, response {response!r:.200}")
    return labels


def check_function(where: str, fn: Function, columns: Collection[str]) -> frozenset[str]:
    """The columns that the function reads by their names. UserError as of ``binding_of``, or if
    both a text of the run and a column could fill a parameter.
    """
    if isinstance(fn, type):
        raise UserError(f"{where}: a class is no reward; give a function, or an object of it")
    binding = binding_of(where, fn, TEXTS, columns)
    for name in {*binding} & {*TEXTS} & {*columns} - {"messages"}:
        raise UserError(
            f"{where}: {name} is a column of the prompts and what the run gives the function by "
            f"that name; rename the column in the data{_line_of(fn)}"
        )
    return frozenset(binding.values()) & frozenset(columns)


def on_texts(
    fn: Function, prompts: list[str], responses: list[str], columns: Columns
) -> HostScores:
    """What a function of texts says of texts that have no token ids, such as those of a file.

    Args:
      columns: as those of ``from_text``, ``messages`` too if there are any.
    """
    number = len(prompts)
    shown: Texts = {name: [None] * number for name in ("messages", "opponents")}
    shown["group_ids"] = [prompts.index(prompt) for prompt in prompts]
    shown["group_sizes"] = [prompts.count(prompt) for prompt in prompts]
    shown |= host.copied(columns)
    shown |= {"prompts": prompts, "responses": responses, "completions": responses}
    shown["completion_ids"] = [[] for _ in responses]
    name = f"the reward function {getattr(fn, '__name__', type(fn).__name__)}"
    return _called(name, fn, shown)


def _shown(
    rollout: Rollout, columns: Columns, rows: list[int], tokenizer: Decoder, spell: Spell
) -> Texts:
    """What a function may ask for, of the rows that are not missing."""
    in_response = rollout.mask
    is_before = np.cumsum(in_response, axis=1) == 0
    in_prompt = is_before & (rollout.attention_mask != 0)
    shown: Texts = {name: [None] * len(rows) for name in ("messages", "opponents")}
    shown |= {key: [column[row] for row in rows] for key, column in columns.items()}
    ids = np.arange(len(rollout.tokens)) if rollout.group_ids is None else rollout.group_ids
    shown["group_ids"] = ids[rows].tolist()
    shown["group_sizes"] = np.sum(ids[rows, None] == ids, axis=1).tolist()
    shown["prompts"] = [spell(rollout.tokens[row, in_prompt[row]].tolist()) for row in rows]
    shown["completion_ids"] = [rollout.tokens[row, in_response[row]].tolist() for row in rows]
    shown["responses"] = [tokenizer.decode(ids) for ids in shown["completion_ids"]]
    shown["completions"] = shown["responses"]
    return shown


def _called(name: str, fn: Function, shown: Texts) -> HostScores:
    """Scores and components that the function returns, in the form of any library."""
    values = {key: value for key, value in shown.items() if key not in (IS_CHAT, SOURCE)}
    binding = binding_of(name, fn, TEXTS, values)
    keys = {*binding.values()}
    is_trl = "completions" in keys or keys.isdisjoint(_ANSWERS.intersection(TEXTS))
    texts = zip(shown["prompts"], shown["responses"], strict=True)
    values["queries"] = [prompt + response for prompt, response in texts]
    if is_trl and any(shown.get(IS_CHAT, [])):
        values["prompts"] = shown["messages"]
        values["completions"] = [
            [{"role": "assistant", "content": text}] for text in shown["responses"]
        ]
    others = {*values} - {*TEXTS} | {"messages"}
    if is_trl:
        others |= {"prompts", "completions", "completion_ids"}

    def result(values: Mapping[str, Any]) -> Any:
        more = {key: values[key] for key in values if key in others - keys}
        bound = bound_to(fn, binding, {**values, ALL: more})
        return _result(name, fn, bound.args, bound.kwargs)

    if binding.get("solution_str") != "responses":
        return _scores(result(values))
    rows = zip(*values.values(), strict=True)  # verl
    return _scores([result(dict(zip(values, row, strict=True))) for row in rows])


def _signature(fn: Function) -> inspect.Signature:
    try:
        return inspect.signature(fn)
    except (TypeError, ValueError):  # of a function in C
        return inspect.signature(lambda prompts, responses, /: None)


def binding_of(
    where: str, fn: Function, texts: Collection[str], columns: Collection[str]
) -> dict[str, str]:
    """{parameter: the text, column or ``ALL`` that it gets}. UserError, beginning with ``where``:
    nothing fills a parameter, or none of them gets responses.
    """
    binding = {}
    faults = []
    parameters = _signature(fn).parameters
    for name, parameter in parameters.items():
        is_needed = parameter.default is parameter.empty
        key = name if name in columns else ALIASES.get(name, name)
        is_setting = name in getattr(fn, "keywords", ())  # of a partial
        is_setting |= "solution_str" in parameters and name not in (*ALIASES, *_OF_VERL)
        if not is_needed and (is_setting or (key == "responses" and key != name)):
            continue
        if parameter.kind is parameter.VAR_KEYWORD:
            binding[name] = ALL
        elif parameter.kind is not parameter.VAR_POSITIONAL and key in (*texts, *columns):
            binding[name] = key
        elif is_needed:
            faults.append(f"nothing fills the parameter {name}")
    gets = [name for name, key in binding.items() if key in ("responses", "completions")]
    by_alias = [name for name in gets if name in ALIASES]
    of_data = [name for name in binding if ALIASES.get(name) == "responses" and name not in gets]
    ends = "".join(f"; {name} is a column of the prompts" for name in of_data)
    if {*binding.values()}.isdisjoint(
        {*_ANSWERS.intersection(texts), *(() if of_data else (ALL,))}
    ):
        faults.append(f"no parameter gets the responses{ends}")
    elif by_alias and len(gets + of_data) > 1:
        faults.append(f"{' and '.join(gets)} get the responses{ends}: call one parameter responses")
    if faults:
        own = [name for name in columns if name not in (*texts, IS_CHAT, SOURCE)]
        names = [*texts, *(name for name in ALIASES if ALIASES[name] in texts)]
        raise UserError(
            f"{where}: {faults[0]}; the prompts' columns are {', '.join(own) or 'none'}, and other "
            f"parameters are {', '.join(names)}{_line_of(fn)}"
        )
    return binding


def bound_to(
    fn: Function, binding: Mapping[str, str], values: Mapping[str, Any]
) -> inspect.BoundArguments:
    """The arguments of a call: {text, column or ``ALL``: value}, by their parameters."""
    bound = _signature(fn).bind_partial()
    bound.arguments.update({name: values[key] for name, key in binding.items()})
    bound.apply_defaults()
    return bound


def _scores(result: Any) -> HostScores:
    """The result of a function as scores and components."""
    if host.has_components(result):
        scores: HostScores = result
        return scores
    if isinstance(result, Mapping) and "rewards" in result:  # OpenRLHF
        parts = {"scores": result["scores"]} if "scores" in result else {}
        return result["rewards"], parts | dict(result.get("extra_logs") or {})
    is_list = isinstance(result, list | tuple)
    if not is_list or not any(isinstance(row, Mapping) and "score" in row for row in result):
        return result, {}
    rows = [row if isinstance(row, Mapping) else {"score": row} for row in result]  # verl
    found = {name: [host.plain(row.get(name)) for row in rows] for row in rows for name in row}
    scored = found.pop("score")
    return scored, {
        name: values
        for name, values in found.items()
        if all(value is None or isinstance(value, Number) for value in values)
    }


def _result(name: str, fn: Function, args: tuple[Any, ...], named: Texts) -> Any:
    """What the function returns, awaited if it is ``async``.

    Raises:
      UserError: it raised an exception; the message has the line.
    """
    try:
        result = host.called(name, fn, *args, **named)
        if not inspect.isawaitable(result):
            return result
        # In a thread of its own: a notebook has a running loop in this one.
        with ThreadPoolExecutor(1) as thread:
            return host.called(name, thread.submit(asyncio.run, _awaited(result)).result)
    except (UserError, TrainingFault, FloatingPointError):
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        file = getattr(_code_of(fn), "co_filename", None)
        own = [frame for frame in frames if frame.filename == file]
        frame = (own or frames)[-1]
        line = f"{frame.filename}:{frame.lineno}: {frame.line}"
        kind = type(error).__name__
        raise UserError(f"{name}: {kind}: {error} ({line})") from error


async def _awaited(result: Awaitable[Any]) -> Any:
    return await result


def _place(
    rollout: Rollout,
    rows: list[int],
    labels: list[str],
    tokenizer: Decoder,
    name: str,
    number: int,
    rewards: list[Any],
) -> np.ndarray:
    """Dense rewards [T] of the row with this number among those shown."""
    row = rows[number]
    where = f"{name}, {labels[number]}"
    columns = np.flatnonzero(rollout.mask[row])
    ids = rollout.tokens[row, columns].tolist()
    dense = np.zeros(rollout.tokens.shape[1])
    are_pairs = [isinstance(entry, list | tuple) and len(entry) == 2 for entry in rewards]
    if all(are_pairs):
        text = tokenizer.decode(ids)
        for position, entry in rewards:
            is_place = type(position) is int and 0 <= position < len(text)
            if not is_place:
                raise UserError(
                    f"{where}: a reward stands at a character from 0 to {len(text) - 1} of the "
                    f"response, {host.got(position)}"
                )
            token = _completing(position, ids, text, tokenizer)
            dense[columns[token]] += _number(entry, where)
        return dense
    if len(rewards) != len(ids):
        raise UserError(
            f"{where}: {len(rewards)} numbers for a response of {len(ids)} tokens, its end token "
            "included; give one for each (completion_ids has the tokens), or pairs (position of a "
            "character, number)"
        )
    dense[columns] = [_number(entry, where) for entry in rewards]
    return dense


def _number(entry: Any, where: str) -> float:
    value = host.number(entry, where)
    if value is None:
        raise UserError(f"{where}: a reward at a token is a number, got None")
    return value


def _completing(position: int, ids: list[int], text: str, tokenizer: Decoder) -> int:
    """The number of the token with which the character at this position is complete. A character
    may need several tokens, of some of its bytes each.
    """

    def num_complete(count: int) -> int:
        """Characters of the text that the first tokens make."""
        begun = tokenizer.decode(ids[:count])
        most = min(len(begun), len(text))
        different = (i for i in range(most) if begun[i] != text[i])
        return next(different, most)

    return bisect.bisect_right(range(1, len(ids)), position, key=num_complete)


def _code_of(fn: Function) -> Any:
    return getattr(inspect.unwrap(fn), "__code__", None)


def _line_of(fn: Function) -> str:
    """Where a function is written, for the end of a message."""
    code = _code_of(fn)
    if code is None:
        return ""
    return f" ({code.co_filename}:{code.co_firstlineno})"


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

    def score(responses: list[str], messages: list[Any]) -> np.ndarray:
        if None in messages:
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
