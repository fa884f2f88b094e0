"""Rows to ids: prompt and response are tokenised apart, so that the boundary is where the sampler puts it.

Texts that are token ids already are taken as they are, without an EOS after them.
"""

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from rlhf_jax.data.rows import Comparison, Demonstration, Pair, Prompt, Text
from rlhf_jax.data.token_ids import prompt_ids, response_ids
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import UserError

TooLong = Literal["error", "truncate", "drop"]

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

    @property
    def rejected(self) -> EncodedTexts:
        """The second answers."""
        return self.answers[1]

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

    @property
    def row_ids(self) -> np.ndarray:
        """[N] int32."""
        return np.arange(len(self.rows), dtype=np.int32)

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
    _check(rows, too_long)
    prompts = prompt_ids(rows, tokenizer, template)
    responses = response_ids([row.response for row in rows], tokenizer, [row.source for row in rows])
    counts: Counter[str] = Counter()
    kept = []
    for row, prompt, response in zip(rows, prompts, responses, strict=True):
        fitted, what = _fit(prompt, response, max_length, too_long, row.source)
        counts.update([what] if what else [])
        if fitted is not None:
            kept.append((prompt, fitted, row.source))
    _check_some_left(kept, rows, max_length)
    return _texts(kept, tokenizer, max_length, train_on_prompt, dict(counts))


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
    _check(rows, too_long)
    prompts = prompt_ids(rows, tokenizer, template)
    texts = [(text, row.source) for row in rows for text in _answers(row)]
    answers = iter(response_ids([text for text, _ in texts], tokenizer, [source for _, source in texts]))
    counts: Counter[str] = Counter()
    kept = []
    for row, prompt in zip(rows, prompts, strict=True):
        ids = [next(answers) for _ in _answers(row)]
        fitted, whats = zip(*(_fit(prompt, answer, max_length, too_long, row.source) for answer in ids), strict=True)
        dropped = next((what for answer, what in zip(fitted, whats, strict=True) if answer is None), None)
        if dropped is None and _targets(row) is None and all(answer == fitted[0] for answer in fitted):
            dropped = EQUAL_CUT
        if dropped:
            counts[dropped] += 1
            continue
        counts.update(what for what in whats if what)
        kept.append((prompt, fitted, row))
    _check_some_left(kept, rows, max_length)
    num_answers = max(len(fitted) for _, fitted, _ in kept)
    columns = [
        # An absent answer has no token at all, not even its prompt's.
        [(prompt, fitted[k], row.source) if k < len(fitted) else ([], [], row.source) for prompt, fitted, row in kept]
        for k in range(num_answers)
    ]
    return EncodedComparisons(
        answers=tuple(_texts(column, tokenizer, max_length, False, {}) for column in columns),
        **_labels([row for _, _, row in kept], num_answers),
        counts=dict(counts),
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
    too_long: TooLong = "error",
) -> EncodedPrompts:
    """Prompts in their template, left-padded to ``length`` (P), or to the longest.

    ``truncate`` keeps the end of a prompt that is longer than ``length``. Raises as `encode_demonstrations`.
    """
    _check(rows, too_long)
    counts: Counter[str] = Counter()
    kept: list[tuple[Prompt, list[int]]] = []
    for row, ids in zip(rows, prompt_ids(rows, tokenizer, template), strict=True):
        if length is not None and len(ids) > length:
            if too_long == "error":
                raise UserError(
                    f"{row.source}: the prompt has {len(ids)} tokens, more than the {length} allowed; {_CHOICES}"
                )
            counts[DROPPED if too_long == "drop" else PROMPT_CUT] += 1
            if too_long == "drop":
                continue
        kept.append((row, ids if length is None else ids[-length:]))
    _check_some_left(kept, rows, length)
    width = max(len(ids) for _, ids in kept) if length is None else length
    tokens = np.full((len(kept), width), tokenizer.pad_id, np.int32)
    attention_mask = np.zeros_like(tokens)
    for i, (_, ids) in enumerate(kept):
        tokens[i, width - len(ids) :] = ids
        attention_mask[i, width - len(ids) :] = 1
    left = [row for row, _ in kept]
    names = dict.fromkeys(name for row in left for name in row.columns)  # in the order of their first appearance
    columns = {name: [row.columns.get(name) for row in left] for name in names}
    return EncodedPrompts(tokens, attention_mask, left, columns, dict(counts))


_CHOICES = "shorten it, or set too_long to 'truncate' or 'drop'"


def _fit(
    prompt: list[int], response: list[int], max_length: int | None, too_long: TooLong, source: str
) -> tuple[list[int] | None, str | None]:
    """The response as it fits behind the prompt (None: left out), and what was done, if anything."""
    total = len(prompt) + len(response)
    if max_length is None or total <= max_length:
        return response, None
    if too_long == "error":
        raise UserError(
            f"{source}: a prompt of {len(prompt)} and a response of {len(response)} tokens (EOS included) make "
            f"{total}, more than max_length {max_length}; {_CHOICES}"
        )
    if too_long == "drop":
        return None, DROPPED
    if len(prompt) >= max_length:
        return None, NO_ROOM
    return response[: max_length - len(prompt)], CUT


def _answers(row: Pair | Comparison) -> tuple[Text, ...]:
    return (row.chosen, row.rejected) if isinstance(row, Pair) else row.responses


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
    train_on_prompt: bool,
    counts: dict[str, int],
) -> EncodedTexts:
    return EncodedTexts(
        tokens=[np.array(prompt + response, np.int32) for prompt, response, _ in kept],
        # Column 0 is never learned: no logits come before it.
        starts=[1 if train_on_prompt else len(prompt) for prompt, _, _ in kept],
        sources=[source for _, _, source in kept],
        pad_id=tokenizer.pad_id,
        max_length=max_length,
        counts=counts,
    )


def _check(rows: Sequence[Any], too_long: str) -> None:
    if too_long not in get_args(TooLong):
        raise ValueError(f"too_long must be one of {', '.join(get_args(TooLong))}, got {too_long!r}")
    if not rows:
        raise UserError("no rows to encode")


def _check_some_left(kept: Sequence[Any], rows: Sequence[Any], limit: int | None) -> None:
    if not kept:
        raise UserError(f"{rows[0].source} and all {len(rows)} rows are longer than {limit} tokens; raise the limit")
