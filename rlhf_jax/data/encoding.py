"""Rows as ids. Prompt and response are tokenised separately, so that the boundary between them is
the same as in sampling.

Token ids in the data are used as they are, without an EOS after them.
"""

import functools
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rlhf_jax.data import chat
from rlhf_jax.data.rows import Message, Row, Text
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import UserError

TooLong = Literal["error", "truncate", "drop"]

CUT = "response cut, its EOS with it"
PROMPT_CUT = "prompt cut at its start"
LONGEST_PIECE = 1024  # tokens of a plain text; the default max_length of TRL's SFTConfig
DROPPED = "dropped, too long"
NO_ROOM = "dropped, the prompt leaves no room for a response"
EQUAL_CUT = "dropped, the cut responses are equal"


@dataclass(frozen=True, eq=False)
class EncodedTexts:
    """N rows of up to K texts, each a prompt and then a response with EOS at its end (unless it was
    cut). K is 1 for demonstrations; the answers of a comparison have the same prompt, and missing
    answers have no tokens.
    """

    tokens: list[list[np.ndarray]]  # [K][N] arrays [length] int32
    starts: np.ndarray  # [N, K] int64 first columns of the responses
    prompts: list[str]  # [N] for people to read
    sources: list[str]  # [N]
    pad_id: int
    max_length: int | None
    counts: dict[str, int]  # number of texts that were too long, by how they were treated
    best: np.ndarray  # [N] int32 index of the best answer
    weight: np.ndarray  # [N] float32; [N, M] for an ensemble of M members
    targets: np.ndarray | None = None  # [N, K] float32, 0 for missing answers

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """[N, K] int64 tokens of each text."""
        lengths = [[len(text) for text in texts] for texts in self.tokens]
        return np.array(lengths, np.int64).T

    @property
    def response_lengths(self) -> np.ndarray:
        """[N, K] int64 tokens of each response; 0 for a missing one."""
        return self.lengths - self.starts

    @functools.cached_property
    def shortest(self) -> np.ndarray:
        """[N] int64 total tokens of the 1, 2, ..., N shortest rows, with all texts of each row."""
        return np.cumsum(np.sort(self.lengths.sum(axis=1)))

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
    rows: Sequence[Row],
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
    prompts = prompt_ids(rows, tokenizer, template)
    responses_of = response_ids(rows, tokenizer)
    counts = Counter[str]()
    kept: list[Row] = []
    texts: list[tuple[list[int], list[list[int]]]] = []
    for row, prompt, responses in zip(rows, prompts, responses_of, strict=True):
        cut = _cut(row, prompt, responses, max_length, too_long, counts)
        if cut is not None:
            kept.append(row)
            texts.append((prompt, cut))
    _check_some_left(kept, rows, max_length)
    num_answers = max(len(cut) for _, cut in texts)
    shape = (len(kept), num_answers)
    nothing = np.zeros(0, np.int32)
    tokens = [[nothing] * len(kept) for _ in range(num_answers)]
    starts = np.zeros(shape, np.int64)
    targets = np.zeros(shape, np.float32)
    for i, (prompt, cut) in enumerate(texts):
        starts[i, : len(cut)] = len(prompt)
        targets[i, : len(cut)] = kept[i].targets or 0.0
        for k, response in enumerate(cut):
            tokens[k][i] = np.array(prompt + response, np.int32)
    frame = chat.frame(template, tokenizer) or "{prompt}"
    return EncodedTexts(
        tokens,
        starts,
        prompts=[_shown(row, frame, tokenizer) for row in kept],
        sources=[row.source for row in kept],
        pad_id=tokenizer.pad_id,
        max_length=max_length,
        counts=dict(+counts),
        best=np.array([row.best or 0 for row in kept], np.int32),
        weight=_weights(rows, kept),
        targets=targets if any(row.targets for row in kept) else None,
    )


def _cut(
    row: Row,
    prompt: list[int],
    responses: list[list[int]],
    max_length: int | None,
    too_long: TooLong,
    counts: Counter[str],
) -> list[list[int]] | None:
    """The responses cut to ``max_length``, or None if the row is dropped; counted in ``counts``."""
    room = sys.maxsize if max_length is None else max_length - len(prompt)
    longer = [len(response) for response in responses if len(response) > room]
    if longer and too_long == "error":
        parts = f"a prompt of {len(prompt)} and a response of {longer[0]} tokens (EOS included)"
        total = f"{len(prompt) + longer[0]}, more than max_length {max_length}"
        raise UserError(f"{row.source}: {parts} make {total}; {_CHOICES}")
    if longer and too_long == "drop":
        counts[DROPPED] += 1
        return None
    if longer and room < 1:
        counts[NO_ROOM] += 1
        return None
    cut = [response[:room] for response in responses]
    is_choice = len(cut) > 1 and row.targets is None
    if is_choice and all(response == cut[0] for response in cut):
        counts[EQUAL_CUT] += 1
        return None
    counts[CUT] += len(longer)
    return cut


def pieces(rows: Sequence[Row], tokenizer: Tokenizer, max_length: int) -> list[Row]:
    """Plain texts, with EOS at their end, cut into rows of token ids. A piece has as many tokens as
    the model can read, and at most `LONGEST_PIECE`.

    The prompt of a piece is one token, the last one of the previous piece, so that each token of a
    text except the first is predicted once.
    """
    length = min(max_length, LONGEST_PIECE)
    texts = [row.responses[0] for row in rows]
    sources = [row.source for row in rows]
    cut = []
    for source, ids in zip(sources, _ids(texts, tokenizer, sources), strict=True):
        ids = [*ids, tokenizer.eos_id]
        for number, start in enumerate(range(0, len(ids) - 1, length - 1), 1):
            piece = tuple(ids[start : start + length])
            cut.append(Row(piece[:1], (piece[1:],), f"{source}, piece {number}"))
    return cut


def encode_prompts(
    rows: Sequence[Row],
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
      too_long: as `encode_texts`, but ``truncate`` keeps the end of a prompt.

    Raises:
      UserError: as `encode_texts`, and if the settings leave no room for a prompt.
    """
    room = sys.maxsize if max_positions is None else max_positions - max_new_tokens
    least = length or 1
    if room < least:
        slots = f"{least} tokens (rl.max_prompt_length) in the model's {max_positions} positions"
        raise UserError(
            f"rl.max_new_tokens {max_new_tokens} leaves no room for a prompt of {slots}"
        )
    ids = prompt_ids(rows, tokenizer, template)
    width = length or min(room, max(map(len, ids), default=0))
    counts = Counter[str]()
    kept: list[Row] = []
    prompts: list[list[int]] = []
    for row, prompt in zip(rows, ids, strict=True):
        if len(prompt) > width:
            if too_long == "error":
                what = f"the prompt has {len(prompt)} tokens, more than the {width} allowed"
                raise UserError(f"{row.source}: {what}; {_CHOICES}")
            if too_long == "drop":
                counts[DROPPED] += 1
                continue
            counts[PROMPT_CUT] += 1
        kept.append(row)
        prompts.append(prompt[-width:])
    _check_some_left(kept, rows, width)
    tokens, attention_mask = left_padded(prompts, width, tokenizer.pad_id)
    names = [name for row in kept for name in row.columns]
    columns = list(dict.fromkeys(names))  # in the order of their first appearance
    return EncodedPrompts(tokens, attention_mask, kept, columns, dict(counts))


def left_padded(
    ids: Sequence[Sequence[int]],
    width: int,
    pad_id: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and attention_mask [N, width] int32 of N prompts."""
    lengths = np.array([len(prompt) for prompt in ids])
    mask = (np.arange(width) >= width - lengths[:, None]).astype(np.int32)
    tokens = np.full_like(mask, pad_id)
    tokens[mask == 1] = np.concatenate(ids)
    return tokens, mask


def prompt_ids(rows: Sequence[Row], tokenizer: Tokenizer, template: str) -> list[list[int]]:
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
    texts = [_framed(row, frame, tokenizer) for row in rows]
    encoded = _ids(texts, tokenizer, [row.source for row in rows])
    if template != chat.AUTO:
        around = [tokenizer.encode(part) for part in template.split("{prompt}")]
        for i, row in enumerate(rows):
            if isinstance(row.prompt, tuple):
                encoded[i] = _joined(around, row.prompt)
    for row, ids in zip(rows, encoded, strict=True):
        if not ids:
            what = f"the tokenizer makes no token of the prompt {row.prompt!r}"
            raise UserError(f"{row.source}: {what}")
    return encoded


def _joined(parts: Sequence[list[int]], prompt: Sequence[int]) -> list[int]:
    """The parts with the prompt between them, as ``str.join``."""
    ids = [*parts[0]]
    for part in parts[1:]:
        ids += [*prompt, *part]
    return ids


def _framed(row: Row, frame: str | None, tokenizer: Tokenizer) -> Text:
    """A text in its frame or as a user's message; token ids unchanged."""
    if not isinstance(row.prompt, str):
        return row.prompt
    if frame is None:
        message = {"role": "user", "content": row.prompt}
        return chat.template_of(tokenizer).prompt([message], row.source)
    return frame.replace("{prompt}", row.prompt)


def _shown(row: Row, frame: str, tokenizer: Tokenizer) -> str:
    """A row's prompt for people to read, in its frame if the prompt is a text."""
    text = chat.shown(row, tokenizer)
    return frame.replace("{prompt}", text) if isinstance(row.prompt, str) else text


def answered_ids(
    messages: Sequence[Message],
    response: str,
    tokenizer: Tokenizer,
    where: str,
) -> list[int]:
    """Ids of a conversation and its response, both texts, for a model of another tokenizer: in the
    chat template of its folder.

    A model that a run of this package trained on plain prompts reads one in the frame of that run
    (`chat.frame`). A folder without a chat template reads prompt, response and EOS, and nothing
    else; a conversation is then one text, by `chat.PLAIN`.

    Raises:
      BadRow: at ``where``, as `chat.ChatTemplate.prompt`.
    """
    template = chat.template_of(tokenizer, chat.AUTO)
    frame = chat.frame(chat.AUTO, tokenizer)
    is_plain = [message["role"] for message in messages] == ["user"]
    if frame is not None and is_plain:
        prompt: Text = frame.replace("{prompt}", messages[0]["content"])
    elif template.tokenizer is not None:
        return template.answered(messages, response, where)
    else:
        prompt = template.prompt(messages, where)
    before, after = _ids([prompt, response], tokenizer, [where, where])
    return [*before, *after, tokenizer.eos_id]


def response_ids(rows: Sequence[Row], tokenizer: Tokenizer) -> list[list[list[int]]]:
    """Ids of the responses of each row, with EOS after responses that are texts. Raises as
    `prompt_ids`.
    """
    texts = [text for row in rows for text in row.responses]
    sources = [row.source for row in rows for _ in row.responses]
    encoded = _ids(texts, tokenizer, sources)
    for text, ids in zip(texts, encoded, strict=True):
        if isinstance(text, str):
            ids.append(tokenizer.eos_id)
    rest = iter(encoded)
    return [[next(rest) for _ in row.responses] for row in rows]


def _ids(texts: Sequence[Text], tokenizer: Tokenizer, sources: Sequence[str]) -> list[list[int]]:
    strings = [text if isinstance(text, str) else "" for text in texts]
    encoded = tokenizer.encode_batch(strings, sources)
    for i, text in enumerate(texts):
        if isinstance(text, str):
            continue
        largest = max(text)
        if largest >= tokenizer.vocab_size:
            last = tokenizer.vocab_size - 1
            what = f"the tokenizer has ids up to {last} only; use the one that made the ids"
            raise UserError(f"{sources[i]}: holds the token id {largest}, but {what}")
        encoded[i] = list(text)
    return encoded


_CHOICES = "shorten it, or give --text.too-long (of evaluate: --too-long) truncate or drop"


def _weights(rows: Sequence[Row], left: Sequence[Row]) -> np.ndarray:
    """[N] float32 weights of the remaining rows. If some pairs of a source (a ranking) are dropped,
    its other pairs get their weight, so that the source's total does not change.
    """

    def total_by_source(rows: Sequence[Row]) -> dict[str, float]:
        total = defaultdict[str, float](float)
        for row in rows:
            total[row.source] += row.weight or 1.0
        return total

    before = total_by_source(rows)
    after = total_by_source(left)
    weights = []
    for row in left:
        own = row.weight or 1.0
        weights.append(own * before[row.source] / after[row.source])
    return np.array(weights, np.float32)


def _check_some_left(kept: Sequence[Row], rows: Sequence[Row], limit: int | None) -> None:
    if not rows:
        raise UserError("no rows to encode")
    if not kept:
        what = f"all {len(rows)} rows are longer than {limit} tokens; raise the limit"
        raise UserError(f"{rows[0].source} and {what}")
