"""Rows to ids: prompt and response are tokenised apart, so that the boundary is where the sampler puts it.

Texts that are token ids already are taken as they are, without an EOS after them.
"""

import functools
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np

from rlhf_jax.data.rows import Comparison, Demonstration, Pair, Prompt, Row, Text, parts
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import UserError

TooLong = Literal["error", "truncate", "drop"]
R = TypeVar("R", Demonstration, Pair | Comparison)

CUT = "response cut, its EOS with it"
PROMPT_CUT = "prompt cut at its start"
DROPPED = "dropped, too long"
NO_ROOM = "dropped, the prompt leaves no room for a response"
EQUAL_CUT = "dropped, the cut responses are equal"


@dataclass(frozen=True, eq=False)
class EncodedTexts:
    """N texts, each a prompt and then a response with EOS at its end (unless it was cut)."""

    tokens: list[np.ndarray]  # N arrays [length] int32
    starts: list[int]  # N first columns of what is learned: the response, or 1 with train_on_prompt
    sources: list[str]
    pad_id: int
    max_length: int | None
    counts: dict[str, int] = field(default_factory=dict)  # texts that were too long, by what was done to them

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """[N] int64 tokens of each text."""
        return np.array([len(tokens) for tokens in self.tokens], np.int64)

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, eq=False)
class EncodedComparisons:
    """N comparisons of up to K answers: row i of each of the ``answers`` has the same prompt, or is empty: absent."""

    answers: tuple[EncodedTexts, ...]
    best: np.ndarray | None  # [N] int32; None: answer 0 everywhere, or targets
    targets: np.ndarray | None  # [N, K] float32, 0 for absent answers
    weight: np.ndarray | None  # [N] float32; None: 1 everywhere
    counts: dict[str, int]

    @property
    def chosen(self) -> EncodedTexts:
        """The first answers, which in pairs are preferred."""
        return self.answers[0]

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """[N] int64 tokens of the longest text of each comparison."""
        return np.max([texts.lengths for texts in self.answers], axis=0)

    def __len__(self) -> int:
        return len(self.answers[0])


@dataclass(frozen=True, eq=False)
class EncodedPrompts:
    """N left-padded prompts of width P. Their row ids are 0 .. N-1; column values stand in the same order."""

    tokens: np.ndarray  # [N, P] int32
    attention_mask: np.ndarray  # [N, P] int32
    rows: list[Prompt]
    columns: dict[str, list[Any]]  # name -> N values, None where a row lacks the column
    counts: dict[str, int]

    def __len__(self) -> int:
        return len(self.rows)


def encode_demonstrations(
    rows: Sequence[Demonstration],
    tokenizer: Tokenizer,
    *,
    template: str = "{prompt}",
    max_length: int | None = None,
    too_long: TooLong = "error",
    train_on_prompt: bool = False,
) -> EncodedTexts:
    """Prompts in their template and responses with EOS; the loss is on the response, or on all but the first token.

    Args:
      max_length: tokens a text may have, EOS included; None for no limit.
      too_long: ``error`` names the row; ``drop`` leaves it out; ``truncate`` cuts the response (its EOS goes too) and
        leaves rows out whose prompt alone fills ``max_length``. What was done is counted in ``counts``.

    Raises:
      UserError: for a text that is too long, a template without ``{prompt}``, and when no row is left.
    """
    kept, counts = _fitted(rows, tokenizer, template, max_length, too_long)
    texts = [(prompt, responses[0], row.source) for row, prompt, responses in kept]
    return _texts(texts, tokenizer, max_length, train_on_prompt, counts)


def encode_comparisons(
    rows: Sequence[Pair | Comparison],
    tokenizer: Tokenizer,
    *,
    template: str = "{prompt}",
    max_length: int | None = None,
    too_long: TooLong = "error",
) -> EncodedComparisons:
    """As `encode_demonstrations` for all answers of a row, K being the most of any row.

    A row that loses an answer goes, and so does one whose answers, after cuts, are all equal, unless it has targets.
    Either all rows have targets or none (ValueError).
    """
    kept, counts = _fitted(rows, tokenizer, template, max_length, too_long)
    num_answers = max(len(answers) for _, _, answers in kept)
    columns = [
        # An absent answer has no token at all, not even its prompt's.
        [
            (prompt, answers[k], row.source) if k < len(answers) else ([], [], row.source)
            for row, prompt, answers in kept
        ]
        for k in range(num_answers)
    ]
    return EncodedComparisons(
        answers=tuple(_texts(column, tokenizer, max_length) for column in columns),
        **_labels([row for row, _, _ in kept], num_answers),
        counts=counts,
    )


def encode_pairs(
    rows: Sequence[Pair],
    tokenizer: Tokenizer,
    *,
    template: str = "{prompt}",
    max_length: int | None = None,
    too_long: TooLong = "error",
) -> EncodedComparisons:
    """`encode_comparisons` of pairs: answer 0 is the chosen one."""
    return encode_comparisons(rows, tokenizer, template=template, max_length=max_length, too_long=too_long)


def encode_prompts(
    rows: Sequence[Prompt],
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
      max_positions: of the model, None for no limit: a prompt and ``max_new_tokens`` after it must fit.
      too_long: as `encode_demonstrations`, but ``truncate`` keeps the end of a prompt.

    Raises:
      UserError: as `encode_demonstrations`, and if the settings leave no room for a prompt.
    """
    room = None if max_positions is None else _room(length, max_positions, max_new_tokens)
    ids = prompt_ids(rows, tokenizer, template)
    longest = max(map(len, ids), default=0)
    width = length if length is not None else room if room is not None and longest > room else None
    counts: Counter[str] = Counter()
    kept: list[tuple[Prompt, list[int]]] = []
    for row, prompt in zip(rows, ids, strict=True):
        if width is not None and len(prompt) > width:
            if too_long == "error":
                raise UserError(
                    f"{row.source}: the prompt has {len(prompt)} tokens, more than the {width} allowed; {_CHOICES}"
                )
            counts[DROPPED if too_long == "drop" else PROMPT_CUT] += 1
            if too_long == "drop":
                continue
        kept.append((row, prompt if width is None else prompt[-width:]))
    _check_some_left(kept, rows, width)
    width = longest if width is None else width
    tokens = np.full((len(kept), width), tokenizer.pad_id, np.int32)
    attention_mask = np.zeros_like(tokens)
    for i, (_, prompt) in enumerate(kept):
        tokens[i, width - len(prompt) :] = prompt
        attention_mask[i, width - len(prompt) :] = 1
    left = [row for row, _ in kept]
    names = dict.fromkeys(name for row in left for name in row.columns)  # in the order of their first appearance
    columns = {name: [row.columns.get(name) for row in left] for name in names}
    return EncodedPrompts(tokens, attention_mask, left, columns, dict(counts))


def _room(length: int | None, max_positions: int, max_new_tokens: int) -> int:
    """The tokens that a prompt may have."""
    room = max_positions - max_new_tokens
    if room < 1:
        raise UserError(
            f"rl.max_new_tokens {max_new_tokens} leaves no room for a prompt in the model's {max_positions} positions"
        )
    if length is not None and length > room:
        raise UserError(
            f"rl.max_prompt_length {length} + rl.max_new_tokens {max_new_tokens} is more than the model's "
            f"{max_positions} positions"
        )
    return room


def prompt_ids(rows: Sequence[Row], tokenizer: Tokenizer, template: str) -> list[list[int]]:
    """Ids of each prompt in the template, whose text stands around prompts of token ids too.

    Raises:
      UserError: for a template without ``{prompt}``; naming the row, for a prompt without any token, for a character
        that the tokenizer lacks and for a token id that it does not have.
    """
    if "{prompt}" not in template:
        raise UserError(f"the template {template!r} has no {{prompt}} in it")
    prompts = [row.prompt for row in rows]
    framed = [template.replace("{prompt}", prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    encoded = _ids(framed, tokenizer, [row.source for row in rows])
    around = [tokenizer.encode(part) for part in template.split("{prompt}")]
    for i, row in enumerate(rows):
        if isinstance(row.prompt, tuple):
            encoded[i] = functools.reduce(lambda before, after: [*before, *row.prompt, *after], around)
        if not encoded[i]:
            raise UserError(f"{row.source}: the tokenizer makes no token of the prompt {row.prompt!r}")
    return encoded


def response_ids(responses: Sequence[Text], tokenizer: Tokenizer, sources: Sequence[str]) -> list[list[int]]:
    """Ids of each response, with EOS after those that were text. Raises as `prompt_ids`."""
    encoded = _ids(responses, tokenizer, sources)
    return [
        ids if isinstance(response, tuple) else [*ids, tokenizer.eos_id]
        for response, ids in zip(responses, encoded, strict=True)
    ]


def _ids(texts: Sequence[Text], tokenizer: Tokenizer, sources: Sequence[str]) -> list[list[int]]:
    strings = [i for i, text in enumerate(texts) if isinstance(text, str)]
    encoded = tokenizer.encode_batch([texts[i] for i in strings], [sources[i] for i in strings])  # type: ignore[misc]
    ids = [list(text) if isinstance(text, tuple) else [] for text in texts]
    for i, text_ids in zip(strings, encoded, strict=True):
        ids[i] = text_ids
    for text, source in zip(texts, sources, strict=True):
        if isinstance(text, tuple) and max(text) >= tokenizer.vocab_size:
            raise UserError(
                f"{source}: holds the token id {max(text)}, but the tokenizer has ids up to {tokenizer.vocab_size - 1} "
                "only; use the tokenizer that made the ids"
            )
    return ids


_CHOICES = "shorten it, or set too_long to 'truncate' or 'drop'"


def _fitted(
    rows: Sequence[R], tokenizer: Tokenizer, template: str, max_length: int | None, too_long: TooLong
) -> tuple[list[tuple[R, list[int], list[list[int]]]], dict[str, int]]:
    """The rows that stay, each with the ids of its prompt and of its responses, and counts of what was too long."""
    prompts = prompt_ids(rows, tokenizer, template)
    texts = [(text, row.source) for row in rows for text in parts(row)[1:]]
    encoded = iter(response_ids([text for text, _ in texts], tokenizer, [source for _, source in texts]))
    counts: Counter[str] = Counter()
    kept = []
    for row, prompt in zip(rows, prompts, strict=True):
        responses = [next(encoded) for _ in parts(row)[1:]]
        room = sys.maxsize if max_length is None else max_length - len(prompt)
        cut = [response for response in responses if len(response) > room]
        if cut and too_long == "error":
            raise UserError(
                f"{row.source}: a prompt of {len(prompt)} and a response of {len(cut[0])} tokens (EOS included) make "
                f"{len(prompt) + len(cut[0])}, more than max_length {max_length}; {_CHOICES}"
            )
        if cut and (too_long == "drop" or room < 1):
            counts[DROPPED if too_long == "drop" else NO_ROOM] += 1
            continue
        responses = [response[:room] for response in responses]
        if not isinstance(row, Demonstration) and _targets(row) is None and len(set(map(tuple, responses))) == 1:
            counts[EQUAL_CUT] += 1
            continue
        if cut:
            counts[CUT] += len(cut)
        kept.append((row, prompt, responses))
    _check_some_left(kept, rows, max_length)
    return kept, dict(counts)


def _targets(row: Pair | Comparison) -> tuple[float, ...] | None:
    return None if isinstance(row, Pair) else row.targets


def _labels(rows: Sequence[Pair | Comparison], num_answers: int) -> dict[str, Any]:
    """Fields of `EncodedComparisons`: best, targets, weight, each None where it would say nothing."""
    targets = [_targets(row) for row in rows]
    with_targets = sum(target is not None for target in targets)
    if with_targets not in (0, len(rows)):
        raise ValueError(f"all comparisons must have targets or none, got {with_targets} of {len(rows)} with targets")
    best = np.array([0 if isinstance(row, Pair) else row.best or 0 for row in rows], np.int32)
    weights = [row.weight for row in rows]
    padded = [[*(target or ()), *[0.0] * (num_answers - len(target or ()))] for target in targets]
    return {
        "best": None if with_targets or not best.any() else best,
        "targets": np.array(padded, np.float32) if with_targets else None,
        "weight": None if set(weights) == {None} else np.array([1 if w is None else w for w in weights], np.float32),
    }


def _texts(
    kept: list[tuple[list[int], list[int], str]],
    tokenizer: Tokenizer,
    max_length: int | None,
    train_on_prompt: bool = False,
    counts: dict[str, int] | None = None,
) -> EncodedTexts:
    return EncodedTexts(
        tokens=[np.array(prompt + response, np.int32) for prompt, response, _ in kept],
        # Column 0 is never learned: no logits come before it.
        starts=[1 if train_on_prompt else len(prompt) for prompt, _, _ in kept],
        sources=[source for _, _, source in kept],
        pad_id=tokenizer.pad_id,
        max_length=max_length,
        counts=counts or {},
    )


def _check_some_left(kept: Sequence[Any], rows: Sequence[Any], limit: int | None) -> None:
    if not rows:
        raise UserError("no rows to encode")
    if not kept:
        raise UserError(f"{rows[0].source} and all {len(rows)} rows are longer than {limit} tokens; raise the limit")
