"""Rows as ids. A prompt is tokenised alone, as sampling reads it, and a response such that the ids
of both decode to their join.

A plain text begins with the tokens that transformers puts there, such as BOS. A response that is a
text ends with EOS, or in a chat template with the token that ends a turn. Token ids in the data are
used as they are.
"""

import bisect
import itertools
import sys
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Literal

import numpy as np

from rlhf_jax.data import chat
from rlhf_jax.data.conversation import text_of
from rlhf_jax.data.rows import BadRow, Messages, Row, Rows, Text, places
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import UserError, logger

Ids = list[int]
TooLong = Literal["error", "truncate", "drop"]

CUT = "response cut, its EOS with it"
TURNS_CUT = "conversation cut behind its last turn that fits"
STEPS_CUT = "solution cut behind its last step that fits"
PROMPT_CUT = "prompt cut at its start"
PROMPT_TURNS_CUT = "earliest turns of the prompt left out"
LONGEST_PIECE = 1024  # tokens of a plain text; the default max_length of TRL's SFTConfig
_DROPPED = "dropped, "
DROPPED = f"{_DROPPED}too long"
NO_ROOM = f"{_DROPPED}the prompt leaves no room for a response"
NO_TURN = f"{_DROPPED}the last turn of the prompt is too long"
EQUAL_CUT = f"{_DROPPED}the cut responses are equal"


ROWS_AT_ONCE = 2048  # as Python lists ids take far more memory than as arrays
_SAID_EVERY = 10.0  # seconds
_CHOICES = "shorten it, or give --text.too-long (of evaluate: --too-long) truncate or drop"


def dropped_and_cut(counts: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """``counts`` of encoded rows: {reason: number} of those that were dropped, {how: number} of
    texts that were cut.
    """
    dropped = {what.removeprefix(_DROPPED): n for what, n in counts.items() if _DROPPED in what}
    return dropped, {what: n for what, n in counts.items() if _DROPPED not in what}


@dataclass(frozen=True, eq=False)
class EncodedTexts:
    """N rows of up to K texts, each a prompt and then a response with its end (unless it was cut).
    K is 1 for demonstrations; the answers of a comparison have the same prompt, and missing answers
    have no tokens.
    """

    tokens: list[list[np.ndarray]]  # [K][N] arrays [length] int32
    starts: np.ndarray  # [N, K] int64 first columns of the responses; 0 for missing ones
    prompts: list[str]  # [N] for people to read
    sources: list[str]  # [N]
    pad_id: int
    max_length: int | None
    counts: dict[str, int]  # number of texts that were too long, by how they were treated
    best: np.ndarray  # [N] int32 index of the best answer
    weight: np.ndarray  # [N] float32; [N, M] for an ensemble of M members
    targets: np.ndarray | None = None  # [N, K] float32, 0 for missing answers
    margin: np.ndarray | None = None  # [N] float32; None if all are 0
    learned: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    """{(k, n): [response length] bool}, which tokens of the response ``tokens[k][n]`` count, for
    those responses of which some do not; of a solution the integers of `rows.Mask`."""
    shares_prompts: bool = False
    """Whether batches hold the prompt of a comparison once, before all its answers."""

    @cached_property
    def lengths(self) -> np.ndarray:
        """[N, K] int64 tokens of each text."""
        lengths = [[len(text) for text in texts] for texts in self.tokens]
        return np.array(lengths, np.int64).T

    @property
    def num_answers(self) -> int:
        """K."""
        return len(self.tokens)

    @property
    def response_lengths(self) -> np.ndarray:
        """[N, K] int64 tokens of each response; 0 for a missing one."""
        return self.lengths - self.starts

    @cached_property
    def whole(self) -> np.ndarray:
        """[N] int64 tokens of a row: its prompt and all its responses. By these rows meet in
        batches, whatever form the batches have.
        """
        return self.starts.max(axis=1) + self.response_lengths.sum(axis=1)

    @cached_property
    def totals(self) -> np.ndarray:
        """[N] int64 tokens of a row with all its texts, as batches hold them."""
        return self.whole if self.shares_prompts else self.lengths.sum(axis=1)

    @cached_property
    def shortest(self) -> np.ndarray:
        """[N] int64 total tokens of the 1, 2, ..., N shortest rows, with all texts of each row."""
        return np.cumsum(np.sort(self.totals))

    @property
    def longest(self) -> np.ndarray:
        """[N] int64 tokens of a row's longest part that lies in one row of a batch's arrays: a
        text, or with shared prompts the whole row.
        """
        return self.totals if self.shares_prompts else self.lengths.max(axis=1)

    @property
    def rows_of_arrays(self) -> int:
        """How many rows of a batch's arrays hold one row of the data, unless they are packed."""
        return 1 if self.shares_prompts else self.num_answers

    @property
    def most(self) -> int:
        """The most columns that a row of a batch's arrays needs, unless it is packed."""
        texts = self.num_answers if self.shares_prompts else 1
        return texts * (self.max_length or sys.maxsize)

    def __len__(self) -> int:
        return len(self.sources)


@dataclass(frozen=True, eq=False)
class EncodedPrompts:
    """N left-padded prompts of width P. Their row ids are 0 .. N-1."""

    tokens: np.ndarray  # [N, P] int32
    attention_mask: np.ndarray  # [N, P] int32
    rows: list[Row]
    columns: Sequence[str]  # names of all columns that rows have, besides prompts
    counts: dict[str, int]

    def __len__(self) -> int:
        return len(self.rows)


def encode_texts(
    rows: Rows,
    tokenizer: Tokenizer,
    *,
    template: str = "{prompt}",
    max_length: int | None = None,
    too_long: TooLong = "error",
) -> EncodedTexts:
    """Demonstrations, pairs or comparisons: prompts in their template and responses with EOS.

    A row that loses an answer is dropped. So is a row without targets whose answers are all equal
    after cuts. Either all rows have targets or none.

    Args:
      max_length: tokens a text may have, EOS included; None for no limit.
      too_long: ``error`` names the row; ``drop`` leaves it out; ``truncate`` cuts the response (its
        EOS goes too) and leaves out rows whose prompt already fills ``max_length``. ``counts`` has
        the number of texts that were cut or dropped.

    Raises:
      UserError: for a text that is too long, a template without ``{prompt}``, and when no row is
        left.
    """
    counts = Counter[str]()
    kept: list[Row] = []
    texts: list[list[np.ndarray]] = []  # of each row
    begins: list[int] = []  # of the responses of each row
    learned: dict[tuple[int, int], np.ndarray] = {}
    start = said = time.monotonic()
    for first in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[first : first + ROWS_AT_ONCE]
        read = as_read(part, tokenizer, template)
        read = [_joined(row, tokenizer, template) if row.steps else row for row in read]
        prompts = prompt_ids(read, tokenizer, template)
        responses = response_ids(read, tokenizer, template)
        for row, own, prompt, answers in zip(part, read, prompts, responses, strict=True):
            cut = _cut(own, prompt, answers, max_length, too_long, counts)
            if cut is not None:
                for k, mask in enumerate(own.learned):
                    learned[k, len(kept)] = np.array(mask[: len(cut[k])])
                kept.append(row)
                begins.append(len(prompt))
                texts.append([np.array(prompt + ids, np.int32) for ids in cut])
        if time.monotonic() - said > _SAID_EVERY:
            said = time.monotonic()
            done = first + len(part)
            logger.info(f"{done:,} of {len(rows):,} rows are token ids, after {said - start:.0f} s")
    _check_some_left(kept, rows, max_length)
    frame = chat.frame(template, tokenizer) or "{prompt}"
    missing = np.zeros(0, np.int32)
    num_answers = np.array([[len(own)] for own in texts])
    is_there = np.arange(num_answers.max()) < num_answers
    targets = itertools.zip_longest(*(row.targets or () for row in kept), fillvalue=0.0)
    margin = np.array([row.margin for row in kept], np.float32)
    return EncodedTexts(
        tokens=[list(column) for column in itertools.zip_longest(*texts, fillvalue=missing)],
        starts=np.where(is_there, np.array(begins)[:, None], 0),
        prompts=[_shown(row, frame, tokenizer) for row in kept],
        sources=[row.source for row in kept],
        pad_id=tokenizer.pad_id,
        max_length=max_length,
        counts=dict(+counts),
        best=np.array([row.best or 0 for row in kept], np.int32),
        weight=_weights(rows, kept),
        targets=np.array(list(targets), np.float32).T if kept[0].targets else None,
        margin=margin if margin.any() else None,
        learned=learned,
    )


def _cut(
    row: Row,
    prompt: Ids,
    responses: list[Ids],
    max_length: int | None,
    too_long: TooLong,
    counts: Counter[str],
) -> list[Ids] | None:
    """The responses cut to ``max_length``, or None if the row is dropped; counted in ``counts``."""
    room = sys.maxsize if max_length is None else max_length - len(prompt)
    longer = [len(response) for response in responses if len(response) > room]
    if longer and too_long == "error":
        parts = f"a prompt of {len(prompt)} and a response of {longer[0]} tokens (EOS included)"
        raise BadRow(row.source, f"{parts} are more than max_length {max_length}; {_CHOICES}")
    cut = [response[: max(room, 0)] for response in responses]
    is_choice = len(cut) > 1 and row.targets is None
    reason = None
    if longer and too_long == "drop":
        reason = DROPPED
    elif longer and (room < 1 or not all(any(mask[:room]) for mask in row.learned)):
        reason = NO_ROOM
    elif is_choice and cut.count(cut[0]) == len(cut):
        reason = EQUAL_CUT
    if reason is not None:
        counts[reason] += 1
        return None
    if row.learned and longer:
        cut = [_whole_turns(ids, mask) for ids, mask in zip(cut, row.learned, strict=True)]
        counts[STEPS_CUT if row.steps else TURNS_CUT] += len(longer)
    else:
        counts[CUT] += len(longer)
    return cut


def _joined(row: Row, tokenizer: Tokenizer, template: str) -> Row:
    """The steps of a solution as one response with its end. Each is encoded by itself, so that no
    token belongs to two, and is marked at its last token.
    """
    num_steps = len(row.steps)
    steps = tokenizer.continue_batch(["\n"] * num_steps, row.steps, [row.source] * num_steps)
    steps[-1].append(chat.end_of_response(template, tokenizer))
    labelled = zip(steps, row.labels, strict=True)
    marks = [[0] * (len(ids) - 1) + [1 + right] for ids, right in labelled]
    ids, mask = (tuple(itertools.chain.from_iterable(parts)) for parts in (steps, marks))
    return replace(row, responses=(ids,), learned=(mask,))


def _whole_turns(ids: Ids, learned: Sequence[int]) -> Ids:
    """The ids up to the end of the last learned turn that they hold whole, or all of them."""
    numbers = range(1, len(ids) + 1)
    ends = [end for end in numbers if learned[end - 1] and not any(learned[end : end + 1])]
    return ids[: ends[-1]] if ends else ids


def pieces(rows: Rows, tokenizer: Tokenizer, max_length: int) -> list[Row]:
    """Plain texts, with EOS at their end, cut into rows of token ids. A piece has as many tokens as
    the model can read, and at most `LONGEST_PIECE`.

    The prompt of a piece is one token, the last one of the previous piece, so that each token of a
    text except the first is predicted once.
    """
    length = min(max_length, LONGEST_PIECE)
    cut = []
    for row, [text] in zip(rows, response_ids(rows, tokenizer), strict=True):
        ids = [*tokenizer.beginning, *text]
        for number, start in enumerate(range(0, len(ids) - 1, length - 1), 1):
            first, *others = ids[start : start + length]
            source = f"{row.source}, piece {number}"
            cut.append(Row((first,), (tuple(others),), source))
    return cut


def encode_prompts(
    rows: Rows,
    tokenizer: Tokenizer,
    *,
    template: str = "{prompt}",
    length: int | None = None,
    max_positions: int | None = None,
    max_new_tokens: int = 0,
    too_long: TooLong = "error",
) -> EncodedPrompts:
    """Prompts in their template, left-padded to ``length`` (P), or to the longest.

    Args:
      max_positions: positions of the model, None for no limit: a prompt and ``max_new_tokens``
        after it must fit.
      too_long: as `encode_texts`, but ``truncate`` keeps the end of a prompt: of messages the
        system's and the last turns that fit, of a text its last tokens behind those that begin a
        text. A conversation whose last turn does not fit is left out.

    Raises:
      UserError: as `encode_texts`, and if the settings leave no room for a prompt.
    """
    room = sys.maxsize if max_positions is None else max_positions - max_new_tokens
    least = length or 1
    if room < least:
        raise UserError(
            f"rl.max_new_tokens {max_new_tokens} leaves no room for a prompt of {least} tokens "
            f"(rl.max_prompt_length) in the model's {max_positions} positions"
        )
    ids = prompt_ids(rows, tokenizer, template)
    width = length or min(room, max(map(len, ids), default=0))
    counts = Counter[str]()
    kept: list[Row] = []
    prompts: list[Ids] = []
    for row, prompt in zip(rows, ids, strict=True):
        cut: Ids | None = prompt
        if len(prompt) > width:
            if too_long == "error":
                what = f"the prompt has {len(prompt)} tokens, more than the {width} allowed"
                raise BadRow(row.source, f"{what}; {_CHOICES}")
            how, cut = DROPPED, None
            if too_long == "truncate":
                how, cut = _shortened(row, prompt, tokenizer, template, width)
            counts[how] += 1
        if cut is not None:
            kept.append(row)
            prompts.append(cut)
    _check_some_left(kept, rows, width)
    tokens, attention_mask = left_padded(prompts, width=width, pad_id=tokenizer.pad_id)
    # In the order of their first appearance.
    columns = list(dict.fromkeys(itertools.chain.from_iterable(row.columns for row in kept)))
    return EncodedPrompts(tokens, attention_mask, kept, columns, dict(counts))


def _shortened(
    row: Row, prompt: Ids, tokenizer: Tokenizer, template: str, width: int
) -> tuple[str, Ids | None]:
    """How a long prompt is cut, and its ids; None if its last turn does not fit."""
    [row] = as_read([row], tokenizer, template)
    if not row.messages:
        begun = tokenizer.beginning if isinstance(row.prompt, str) else []
        end = width - len(begun)
        return PROMPT_CUT, [*begun, *prompt[-end:]] if end > 0 else prompt[-width:]
    of_system = [message for message in row.messages if message["role"] in ("system", "developer")]
    of_chat = chat.template_of(tokenizer, template)

    @cache
    def kept(start: int) -> Ids:
        text = of_chat.prompt_of(replace(row, messages=[*of_system, *row.messages[start:]]))
        [ids] = prompt_ids([replace(row, prompt=text)], tokenizer, template)
        return ids

    starts = [i for i, message in enumerate(row.messages) if message["role"] == "user" and i]
    place = bisect.bisect_left(starts, True, key=lambda start: len(kept(start)) <= width)
    return (PROMPT_TURNS_CUT, kept(starts[place])) if place < len(starts) else (NO_TURN, None)


def left_padded(
    ids: Sequence[Sequence[int]], *, width: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and attention_mask [N, width] int32 of N prompts."""
    lengths = np.array([len(prompt) for prompt in ids])
    is_real = np.arange(width) >= width - lengths[:, None]
    tokens = np.full(is_real.shape, pad_id, np.int32)
    tokens[is_real] = np.concatenate(ids)
    return tokens, is_real.astype(np.int32)


def prompt_ids(rows: Rows, tokenizer: Tokenizer, template: str) -> list[Ids]:
    """Ids of each prompt as the model reads it under the template, a ``text.template``.

    A text is put into `chat.frame`, or becomes a user's message of the tokenizer's chat template.
    Messages are turned into token ids. Token ids are the whole prompt under ``auto``; any other
    template is put around them.

    Raises:
      UserError: for a template without ``{prompt}``; naming the row, for a prompt without any
        token, for a character that the tokenizer lacks, for a token id that it does not have, and
        for a user's message that spells a special token.
    """
    frame = chat.frame(template, tokenizer)
    if frame is not None and "{prompt}" not in frame:
        raise UserError(f"the template {template!r} has no {{prompt}} in it")
    rows = as_read(rows, tokenizer, template)
    texts: list[Text] = []
    for row in rows:
        if isinstance(row.prompt, str):
            texts.append((frame or "{prompt}").replace("{prompt}", row.prompt))
        elif template == chat.AUTO:
            texts.append(row.prompt)
        else:
            first, *others = map(tokenizer.encode, template.split("{prompt}"))
            around = itertools.chain.from_iterable((*row.prompt, *part) for part in others)
            texts.append((*first, *around))
    encoded = _ids(texts, tokenizer, [row.source for row in rows])
    begun = tokenizer.beginning
    for row, text, ids in zip(rows, texts, encoded, strict=True):
        if not ids:
            raise BadRow(row.source, f"the tokenizer makes no token of the prompt {row.prompt!r}")
        # A text may spell its beginning itself, where the spelling counts.
        is_begun = tokenizer.spelled_as == "tokens" and ids[: len(begun)] == begun
        if isinstance(text, str) and not is_begun:
            ids[:0] = begun
    return encoded


def spelled(rows: Rows, tokenizer: Tokenizer, template: str = "{prompt}") -> str:
    """A sentence on the rows whose texts spell a special token of the tokenizer, and how they are
    read; "" if none does, if ``text.special_tokens`` says it, or under a chat template, which
    refuses them.
    """
    if tokenizer.spelled_as is not None or chat.frame(template, tokenizer) is None:
        return ""
    sources: dict[str, list[str]] = {}
    for row in rows:
        texts = [text for text in row.texts if isinstance(text, str)]
        tokens = [token for text in texts for token in tokenizer.spelled_in(text)]
        for token in dict.fromkeys(tokens):
            sources.setdefault(token, []).append(row.source)
    if not sources:
        return ""
    found = [f"{token!r} ({len(of)} rows: {places(of, 2)})" for token, of in sources.items()]
    how = "as ordinary characters; text.special_tokens: tokens reads the tokens themselves, text "
    how += "keeps this and says no more"
    return f"texts spell special tokens, {', '.join(found)}; they are read {how}"


def as_read(rows: Rows, tokenizer: Tokenizer, template: str) -> list[Row]:
    """The rows with plain prompts as messages of the tokenizer's chat template, where the template
    in force is that one (`chat.frame`); all other rows as they are.
    """
    if chat.frame(template, tokenizer) is not None:
        return list(rows)
    of_chat = chat.template_of(tokenizer)
    read = []
    for row in rows:
        if isinstance(row.prompt, str):
            messages = [{"role": "user", "content": row.prompt}]
            [row] = chat.rendered(replace(row, messages=messages), of_chat)
        read.append(row)
    return read


def group(row: Row) -> Hashable:
    """What rows have in common that belong on one side of a split: their prompt, whatever its
    case, spaces and Unicode normal form. The turns of a conversation are one group.
    """
    messages = row.first or row.messages
    prompt = chat.plain(messages) if messages else row.prompt
    if not isinstance(prompt, str):
        return prompt
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())


def _shown(row: Row, frame: str, tokenizer: Tokenizer) -> str:
    """A row's prompt for people to read, in its frame if the prompt is a text."""
    text = chat.shown(row, tokenizer)
    return frame.replace("{prompt}", text) if isinstance(row.prompt, str) else text


def answered_ids(
    messages: Messages, response: str, tokenizer: Tokenizer, where: str, ends: bool = False
) -> Ids:
    """Ids of a conversation and its response, both texts, for a model of another tokenizer: in the
    chat template of its folder.

    A model that a run of this package trained on plain prompts reads one in the frame of that run
    (`chat.frame`). A folder without a chat template reads prompt, response and EOS, and nothing
    else; a conversation is then one text, by `chat.PLAIN`. ``ends``: nothing follows the token
    that ends the response.

    Raises:
      BadRow: at ``where``, as `chat.ChatTemplate.prompt`.
    """
    template = chat.template_of(tokenizer, chat.AUTO)
    frame = chat.frame(chat.AUTO, tokenizer)
    is_plain = [message["role"] for message in messages] == ["user"]
    if frame is not None and is_plain:
        prompt: Text = frame.replace("{prompt}", text_of(messages[0]))
    elif template.tokenizer is not None:
        return template.answered(messages, response, where, ends)
    else:
        prompt = template.prompt(messages, where)
    row = Row(prompt, (response,), where)
    [before] = prompt_ids([row], tokenizer, "{prompt}")
    [[after]] = response_ids([row], tokenizer)
    return before + after


def response_ids(rows: Rows, tokenizer: Tokenizer, template: str = "{prompt}") -> list[list[Ids]]:
    """Ids of the responses of each row behind its prompt in the template, with EOS after responses
    that are texts. Raises as `prompt_ids`.
    """
    frame = chat.frame(template, tokenizer) or "{prompt}"
    texts: list[Text] = []
    sources: list[str] = []
    befores: list[str] = []
    for row in rows:
        is_text = isinstance(row.prompt, str) and row.prompt
        before = frame.replace("{prompt}", str(row.prompt)) if is_text else ""
        texts += row.responses
        sources += [row.source] * len(row.responses)
        befores += [before] * len(row.responses)
    encoded = _ids(texts, tokenizer, sources, befores)
    for text, ids in zip(texts, encoded, strict=True):
        is_ended = tokenizer.spelled_as == "tokens" and ids[-1:] == [tokenizer.eos_id]
        if isinstance(text, str) and not is_ended:
            ids.append(tokenizer.eos_id)
    rest = iter(encoded)
    return [list(itertools.islice(rest, len(row.responses))) for row in rows]


def _ids(
    texts: Sequence[Text],
    tokenizer: Tokenizer,
    sources: Sequence[str],
    befores: Sequence[str] | None = None,
) -> list[Ids]:
    """Ids of each text, behind the text before it."""
    strings = [text if isinstance(text, str) else "" for text in texts]
    encoded = tokenizer.continue_batch(befores or [""] * len(texts), strings, sources)
    last = tokenizer.vocab_size - 1
    for i, text in enumerate(texts):
        if isinstance(text, str):
            continue
        if max(text) > last:
            what = f"the tokenizer has ids up to {last} only; use the one that made the ids"
            raise BadRow(sources[i], f"holds the token id {max(text)}, but {what}")
        encoded[i] = list(text)
    return encoded


def _weights(rows: Rows, kept: Rows) -> np.ndarray:
    """[N] float32 weights of the rows that are kept. If some pairs of a source (a ranking) are
    dropped, its other pairs get their weight, so that the source's total does not change.
    """
    before, after = defaultdict[str, float](float), defaultdict[str, float](float)
    for totals, some in ((before, rows), (after, kept)):
        for row in some:
            totals[row.source] += row.weight or 1.0
    own = [(row.weight or 1.0) * before[row.source] / after[row.source] for row in kept]
    return np.array(own, np.float32)


def _check_some_left(kept: Rows, rows: Rows, limit: int | None) -> None:
    if not kept:
        what = f"none of {len(rows)} rows is left to encode: all are longer than {limit} tokens"
        raise UserError(f"{what}; raise the limit")
