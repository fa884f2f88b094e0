"""Rows to ids: prompt and response are tokenised apart, so that the boundary is where the sampler
puts it.

Texts that are token ids already are taken as they are, without an EOS after them.
"""

import functools
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rlhf_jax.data import chat
from rlhf_jax.data.rows import Row, Text
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
    cut). K is 1 for demonstrations; the answers of a comparison have the same prompt, and absent
    ones have no token at all.
    """

    tokens: list[list[np.ndarray]]  # [K][N] arrays [length] int32
    starts: np.ndarray  # [N, K] int64 first columns of the responses
    prompts: list[str]  # [N] for people to read
    sources: list[str]  # [N]
    pad_id: int
    max_length: int | None
    counts: dict[str, int]  # texts that were too long, by what was done to them
    best: np.ndarray  # [N] int32 number of the best answer
    weight: np.ndarray  # [N] float32; [N, M] for an ensemble of M members
    targets: np.ndarray | None = None  # [N, K] float32, 0 for absent answers

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """[N, K] int64 tokens of each text."""
        return np.array([list(map(len, texts)) for texts in self.tokens], np.int64).T

    @property
    def response_lengths(self) -> np.ndarray:
        """[N, K] int64 tokens of each response; 0 where there is none."""
        return self.lengths - self.starts

    @functools.cached_property
    def shortest(self) -> np.ndarray:
        """[N] int64 tokens of the 1, 2, ..., N shortest rows together, all texts of a row counted."""
        return np.cumsum(np.sort(self.lengths.sum(axis=1)))

    def __len__(self) -> int:
        return len(self.sources)


@dataclass(frozen=True, eq=False)
class EncodedPrompts:
    """N left-padded prompts of width P. Their row ids are 0 .. N-1."""

    tokens: np.ndarray  # [N, P] int32
    attention_mask: np.ndarray  # [N, P] int32
    rows: list[Row]
    columns: Sequence[str]  # names of all that rows have, beside prompts
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

    A row that loses an answer goes, and so does one whose answers, after cuts, are all equal,
    unless it has targets. Either all rows have targets or none.

    Args:
      max_length: tokens a text may have, EOS included; None for no limit.
      too_long: ``error`` names the row; ``drop`` leaves it out; ``truncate`` cuts the response (its
        EOS goes too) and leaves rows out whose prompt alone fills ``max_length``. What was done is
        counted in ``counts``.

    Raises:
      UserError: for a text that is too long, a template without ``{prompt}``, and when no row is
        left.
    """
    prompts = prompt_ids(rows, tokenizer, template)
    responses_of = response_ids(rows, tokenizer)
    counts = Counter[str]()
    kept = list[tuple[Row, list[int], list[list[int]]]]()
    for row, prompt, responses in zip(rows, prompts, responses_of, strict=True):
        room = sys.maxsize if max_length is None else max_length - len(prompt)
        longer = [len(response) for response in responses if len(response) > room]
        if longer and too_long == "error":
            what = (
                f"a prompt of {len(prompt)} and a response of {longer[0]} tokens (EOS included) "
                "make"
            )
            total = f"{len(prompt) + longer[0]}, more than max_length {max_length}"
            raise UserError(f"{row.source}: {what} {total}; {_CHOICES}")
        cut = [response[:room] for response in responses]
        is_choice = len(cut) > 1 and row.targets is None
        if longer and (too_long == "drop" or room < 1):
            counts[DROPPED if too_long == "drop" else NO_ROOM] += 1
        elif is_choice and all(response == cut[0] for response in cut):
            counts[EQUAL_CUT] += 1
        else:
            kept.append((row, prompt, cut))
            counts[CUT] += len(longer)
    _check_some_left(kept, rows, max_length)
    left = [row for row, _, _ in kept]
    shape = len(kept), max(len(cut) for _, _, cut in kept)
    tokens = [[np.zeros(0, np.int32)] * shape[0] for _ in range(shape[1])]
    starts, targets = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    for i, (row, prompt, cut) in enumerate(kept):
        starts[i, : len(cut)] = len(prompt)
        targets[i, : len(cut)] = row.targets or 0.0
        for k, response in enumerate(cut):
            tokens[k][i] = np.array(prompt + response, np.int32)
    frame = chat.frame(template, tokenizer) or "{prompt}"
    return EncodedTexts(
        tokens,
        starts,
        prompts=[_shown(row, frame, tokenizer) for row in left],
        sources=[row.source for row in left],
        pad_id=tokenizer.pad_id,
        max_length=max_length,
        counts=dict(+counts),
        best=np.array([row.best or 0 for row in left], np.int32),
        weight=_weights(rows, left),
        targets=targets if any(row.targets for row in left) else None,
    )


def pieces(rows: Sequence[Row], tokenizer: Tokenizer, max_length: int) -> list[Row]:
    """Plain texts, with EOS at their end, cut into rows of token ids that are as long as the model
    reads, at most `LONGEST_PIECE`.

    A piece's prompt is one token, the last one of the piece before it, so that each token of a text
    but its first is predicted once.
    """
    length = min(max_length, LONGEST_PIECE)
    texts = [row.responses[0] for row in rows]
    cut = []
    for row, ids in zip(rows, _ids(texts, tokenizer, [row.source for row in rows]), strict=True):
        ids = [*ids, tokenizer.eos_id]
        for number, start in enumerate(range(0, len(ids) - 1, length - 1), 1):
            piece = tuple(ids[start : start + length])
            cut.append(Row(piece[:1], (piece[1:],), f"{row.source}, piece {number}"))
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
      max_positions: of the model, None for no limit: a prompt and ``max_new_tokens`` after it must
        fit.
      too_long: as `encode_texts`, but ``truncate`` keeps the end of a prompt.

    Raises:
      UserError: as `encode_texts`, and if the settings leave no room for a prompt.
    """
    room = sys.maxsize if max_positions is None else max_positions - max_new_tokens
    if room < (length or 1):
        slots = (
            f"{length or 1} tokens (rl.max_prompt_length) in the model's {max_positions} positions"
        )
        raise UserError(
            f"rl.max_new_tokens {max_new_tokens} leaves no room for a prompt of {slots}"
        )
    ids = prompt_ids(rows, tokenizer, template)
    width = length or min(room, max(map(len, ids), default=0))
    counts, kept = Counter[str](), list[tuple[Row, list[int]]]()
    for row, prompt in zip(rows, ids, strict=True):
        if len(prompt) > width and too_long == "error":
            what = f"the prompt has {len(prompt)} tokens, more than the {width} allowed"
            raise UserError(f"{row.source}: {what}; {_CHOICES}")
        if len(prompt) > width:
            counts[DROPPED if too_long == "drop" else PROMPT_CUT] += 1
        if len(prompt) <= width or too_long == "truncate":
            kept.append((row, prompt[-width:]))
    _check_some_left(kept, rows, width)
    arrays = left_padded([prompt for _, prompt in kept], width, tokenizer.pad_id)
    left = [row for row, _ in kept]
    columns = dict.fromkeys(
        name for row in left for name in row.columns
    )  # in the order of their first appearance
    return EncodedPrompts(*arrays, left, list(columns), dict(counts))


def left_padded(
    ids: Sequence[Sequence[int]], width: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and attention_mask [N, width] int32 of N prompts."""
    mask = np.array([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in ids], np.int32)
    tokens = np.full_like(mask, pad_id)
    tokens[mask == 1] = np.concatenate(ids)
    return tokens, mask


def prompt_ids(rows: Sequence[Row], tokenizer: Tokenizer, template: str) -> list[list[int]]:
    """Ids of each prompt as the model reads it under the template, a ``text.template``.

    A text stands in `chat.frame`, or is a user's message of the tokenizer's chat template. Token
    ids, of which messages were made too, are the whole prompt under ``auto``; any other template
    stands around them.

    Raises:
      UserError: for a template without ``{prompt}``; naming the row, for a prompt without any
        token, for a character that the tokenizer lacks, for a token id that it does not have, and
        for a user's message that spells a special token.
    """
    frame = chat.frame(template, tokenizer)
    if frame is not None and "{prompt}" not in frame:
        raise UserError(f"the template {template!r} has no {{prompt}} in it")
    framed = list[Text]()
    for row in rows:
        prompt = row.prompt
        if isinstance(prompt, str):
            framed.append(_framed(prompt, frame, tokenizer, row.source))
        else:
            framed.append(prompt)
    encoded = _ids(framed, tokenizer, [row.source for row in rows])
    if template != chat.AUTO:
        around = [tokenizer.encode(part) for part in template.split("{prompt}")]
        for i, row in enumerate(rows):
            if isinstance(row.prompt, tuple):
                encoded[i] = functools.reduce(
                    lambda before, after: [*before, *row.prompt, *after], around
                )
    for row, ids in zip(rows, encoded, strict=True):
        if not ids:
            what = f"the tokenizer makes no token of the prompt {row.prompt!r}"
            raise UserError(f"{row.source}: {what}")
    return encoded


def _framed(prompt: str, frame: str | None, tokenizer: Tokenizer, source: str) -> Text:
    if frame is None:
        return chat.template_of(tokenizer).user(prompt, source)
    return frame.replace("{prompt}", prompt)


def _shown(row: Row, frame: str, tokenizer: Tokenizer) -> str:
    """A row's prompt as text, in its frame if it was one."""
    text = chat.shown(row, tokenizer)
    return frame.replace("{prompt}", text) if isinstance(row.prompt, str) else text


def response_ids(rows: Sequence[Row], tokenizer: Tokenizer) -> list[list[list[int]]]:
    """Ids of the responses of each row, with EOS after those that were text. Raises as
    `prompt_ids`.
    """
    texts = [(text, row.source) for row in rows for text in row.responses]
    encoded = iter(_ids([text for text, _ in texts], tokenizer, [source for _, source in texts]))
    end = lambda text: [tokenizer.eos_id] if isinstance(text, str) else []  # noqa: E731
    return [[next(encoded) + end(text) for text in row.responses] for row in rows]


def _ids(texts: Sequence[Text], tokenizer: Tokenizer, sources: Sequence[str]) -> list[list[int]]:
    encoded = tokenizer.encode_batch(
        [text if isinstance(text, str) else "" for text in texts], sources
    )
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            if max(text) >= tokenizer.vocab_size:
                what = f"the tokenizer has ids up to {tokenizer.vocab_size - 1} only; use the one that made the ids"
                raise UserError(f"{sources[i]}: holds the token id {max(text)}, but {what}")
            encoded[i] = list(text)
    return encoded


_CHOICES = "shorten it, or give --text.too-long (of evaluate: --too-long) truncate or drop"


def _weights(rows: Sequence[Row], left: Sequence[Row]) -> np.ndarray:
    """[N] float32 weights of the rows that are left. The pairs of one source (a ranking) that are
    left together weigh what all its pairs did.
    """
    before, after = defaultdict[str, float](float), defaultdict[str, float](float)
    for total, of in ((before, rows), (after, left)):
        for row in of:
            total[row.source] += row.weight or 1.0
    return np.array(
        [(row.weight or 1.0) * before[row.source] / after[row.source] for row in left], np.float32
    )


def _check_some_left(kept: Sequence[Any], rows: Sequence[Any], limit: int | None) -> None:
    if not rows:
        raise UserError("no rows to encode")
    if not kept:
        raise UserError(
            f"{rows[0].source} and all {len(rows)} rows are longer than {limit} tokens; raise the limit"
        )
