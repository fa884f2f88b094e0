"""Rewards from functions of texts: what a function is given, by the names of its parameters, and
where its rewards stand.
"""

import asyncio
import bisect
import functools
import inspect
import traceback
from collections.abc import Awaitable, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np

from rlhf_jax.errors import TrainingFault, UserError
from rlhf_jax.rewards import host
from rlhf_jax.rewards.host import MISSING, Columns, Components, HostReward, HostScores, Score
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
)
"""Parameters that a function of texts may have, beside the columns of the prompts' rows."""

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

    A function that names ``completions`` is one of TRL: they are the responses, and where the data
    has messages, prompts and completions are lists of messages. If the names are others, the first
    two parameters are prompts and responses.

    Args:
      fn: may be ``async``. It returns a list, tuple, array or tensor with an entry for each row: a
        number; None or ``Unscored(reason)`` for a row that cannot be scored; one number for each
        token of the response; or pairs (position of a character in the response, number), each of
        which stands at the token that completes the character. Or it returns a pair of these and
        {name of a component: numbers}.
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
        args, named = _binding(name, fn, shown.keys()).of(shown)
        result = _result(name, fn, args, named)
        if not host.has_components(result):
            result = (result, {})
        place = functools.partial(_place, rollout, rows, labels, tokenizer, name)
        present = [True] * len(rows)
        try:
            scores, components = host.checked(name, result, labels, present, place)
        except (UserError, FloatingPointError) as error:
            raise type(error)(f"{error}{line}") from None

        def in_all_rows(values: list[Score]) -> list[Score]:
            whole: list[Score] = [MISSING] * len(rollout.tokens)
            for row, value in zip(rows, values, strict=True):
                whole[row] = value
            return whole

        whole: Components = {}
        for component, values in components.items():
            whole[component] = in_all_rows(values)
        return in_all_rows(scores), whole

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


def check_function(where: str, fn: Function, columns: Collection[str]) -> None:
    """Raises UserError, beginning with ``where``, if the function has a parameter that nothing
    fills, or one that both a text of the run and a column could.
    """
    binding = _binding(where, fn, [*TEXTS, *columns])
    for name in {*binding.named} & {*TEXTS} & {*columns} - {"messages"}:
        raise UserError(
            f"{where}: {name} is a column of the prompts and what the run gives the function by "
            f"that name; rename the column in the data{_line_of(fn)}"
        )


def on_texts(fn: Function, prompts: list[str], responses: list[str], columns: Columns) -> Any:
    """What a function of texts returns for texts that have no token ids, such as those of a file.

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
    args, named = _binding(name, fn, shown.keys()).of(shown)
    return _result(name, fn, args, named)


def _shown(
    rollout: Rollout, columns: Columns, rows: list[int], tokenizer: Decoder, spell: Spell
) -> Texts:
    """What a function may ask for, of the rows that are not missing."""
    in_response = rollout.mask
    is_before = np.cumsum(in_response, axis=1) == 0
    in_prompt = is_before & (rollout.attention_mask != 0)
    shown: Texts = {}
    for key, column in columns.items():
        shown[key] = [column[row] for row in rows]
    for name in ("messages", "opponents"):
        shown.setdefault(name, [None] * len(rows))
    ids = np.arange(len(rollout.tokens)) if rollout.group_ids is None else rollout.group_ids
    shown["group_ids"] = ids[rows].tolist()
    shown["group_sizes"] = np.sum(ids[rows, None] == ids, axis=1).tolist()
    shown["prompts"] = [spell(rollout.tokens[row, in_prompt[row]].tolist()) for row in rows]
    shown["completion_ids"] = [rollout.tokens[row, in_response[row]].tolist() for row in rows]
    shown["responses"] = [tokenizer.decode(ids) for ids in shown["completion_ids"]]
    shown["completions"] = shown["responses"]
    return shown


class _Binding(NamedTuple):
    """Which texts and columns a function gets."""

    positional: tuple[str, ...]
    named: tuple[str, ...]
    takes_all: bool  # whether it has a ** parameter
    is_trl: bool

    def of(self, shown: Texts) -> tuple[list[Any], Texts]:
        """The arguments of a call."""
        shown = dict(shown)
        is_chat = shown.pop(IS_CHAT, [])
        shown.pop(SOURCE, None)
        if self.is_trl and any(is_chat):
            shown["prompts"] = shown["messages"]
            shown["completions"] = [
                [{"role": "assistant", "content": text}] for text in shown["responses"]
            ]
        named = {name: shown[name] for name in self.named}
        if self.takes_all:
            more = ("prompts", "completions", "completion_ids") if self.is_trl else ()
            given = {*TEXTS} - {"messages", *more} | {*self.positional} | {*named}
            for name, value in shown.items():
                if name not in given:
                    named[name] = value
        return [shown[name] for name in self.positional], named


def _binding(where: str, fn: Function, offered: Collection[str]) -> _Binding:
    """How a function is called, by its parameters.

    Raises:
      UserError: it has a parameter without a default that is neither a text nor a column.
    """
    two = ("prompts", "responses")
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # of a function in C
        return _Binding(two, (), takes_all=False, is_trl=False)
    takes_all = False
    by_name = []
    for parameter in signature.parameters.values():
        takes_all |= parameter.kind is parameter.VAR_KEYWORD
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            by_name.append(parameter.name)
    fault: TypeError | None = None
    for positional in ((), two):
        if positional and any(name in TEXTS for name in by_name[:2]):
            continue
        rest = by_name if not positional else by_name[2:]
        named = tuple(name for name in rest if name in offered and name not in positional)
        is_trl = "completions" in named or not (positional or by_name)
        if not positional and by_name and not any(name in TEXTS for name in named):
            continue  # their names say nothing: the first two are the texts
        try:
            signature.bind(*positional, **dict.fromkeys(named))
        except TypeError as error:
            fault = fault or error
            continue
        return _Binding(positional, named, takes_all, is_trl)
    others = [name for name in offered if name not in (*TEXTS, IS_CHAT, SOURCE)]
    columns = ", ".join(others)
    raise UserError(
        f"{where}: {fault}; the prompts' columns are {columns or 'none'}, and other parameters are "
        f"{', '.join(TEXTS)}{_line_of(fn)}"
    )


def _result(name: str, fn: Function, args: list[Any], named: Texts) -> Any:
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
