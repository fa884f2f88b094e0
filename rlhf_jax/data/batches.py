"""Rows as arrays, in batches that depend only on (key, step).

Encoded rows have different lengths. A batch is padded to its longest row, rounded up to
``bucket_multiple``, so that few shapes are compiled. The key alone decides which rows form batch
number ``step``: a resumed run continues at any step without going through the earlier ones, and the
number of devices does not matter. Everything is NumPy on the host.
"""

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from rlhf_jax.data.encoding import EncodedPrompts, EncodedTexts
from rlhf_jax.errors import UserError
from rlhf_jax.rewards.texts import IS_CHAT, SOURCE
from rlhf_jax.types import Comparisons, Demonstrations, Feedback

# The row number of a missing row, which completes the last batch of an epoch and counts in no
# statistic.
ABSENT = -1


class Place(NamedTuple):
    """Where a text of the data, or a part of it, stands in the arrays of a batch."""

    row: int  # of the data
    answer: int
    place: int  # row of the arrays
    start: int  # column of its first token
    number: int  # in the attention mask
    first: int = 0  # token of the text, those before it are left out
    end: int | None = None  # token of the text from which on it is left out


def split(
    groups: Sequence[Hashable],
    fraction: float,
    key: Array,
) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers for training and for validation, each ascending. The validation part has
    round(N * fraction) rows, at least 1; with a fraction of 0 it is empty.

    Args:
      groups: [N] the group of each row. The rows of a group, such as the answers to one prompt,
        stay together, so that the validation part may have a few more rows. Groups that are larger
        than the validation part are taken last.

    Raises:
      UserError: no row would be left to train on.
    """
    num_rows = len(groups)
    if not fraction:
        return np.arange(num_rows), np.arange(0)
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    group_of = np.array([numbers[group] for group in groups], np.int64)
    num_held_out = max(1, round(num_rows * fraction))
    sizes = np.bincount(group_of)
    order = _permutation(key, len(sizes))
    order = order[np.argsort(sizes[order] > num_held_out, kind="stable")]
    num_groups = int(np.searchsorted(np.cumsum(sizes[order]), num_held_out)) + 1
    if num_groups >= len(sizes):
        raise UserError(
            f"{num_rows} rows leave none to train on after {num_held_out} for validation; give "
            "more data or a smaller validation_fraction (0 holds none out)"
        )
    validates = np.isin(group_of, order[:num_groups])
    return np.flatnonzero(~validates), np.flatnonzero(validates)


@dataclass(frozen=True, eq=False)
class Plan:
    """The row numbers of any step: ``plan.rows(step)`` is a pure function of the fields and the
    step.
    """

    lengths: np.ndarray  # [N]
    batch_size: int
    key: Array
    bucket_multiple: int = 16

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def epoch(self, number: int) -> list[np.ndarray]:
        """The batches of one pass over the rows, each as row numbers [batch_size] int64. Every row
        appears once.

        The rows are shuffled by ``fold_in(key, number)`` and grouped by length rounded up to
        ``bucket_multiple``. The rows that do not fill a group's last batch join the next longer
        group; the very last batch is completed with -1. Then the order of the batches is shuffled.
        """
        epoch_key = jax.random.fold_in(self.key, number)
        order = _permutation(jax.random.fold_in(epoch_key, 0), len(self.lengths))
        buckets = _round_up(self.lengths[order], self.bucket_multiple)
        # A stable sort keeps the random order inside a bucket, so that the last rows of a bucket
        # join the next one where the sorted rows are cut into equal slices.
        by_length = order[np.argsort(buckets, kind="stable")]
        num_missing = -len(order) % self.batch_size
        filled = np.pad(by_length, (0, num_missing), constant_values=ABSENT)
        batches = filled.reshape(-1, self.batch_size)
        batch_order = _permutation(jax.random.fold_in(epoch_key, 1), len(batches))
        return list(batches[batch_order])

    @cached_property
    def _recent(self) -> Callable[[int], list[np.ndarray]]:
        return lru_cache(maxsize=2)(self.epoch)  # of consecutive steps

    def rows(self, step: int) -> np.ndarray:
        """[batch_size] row numbers of batch ``step`` (counted over all epochs), -1 for no row."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return self._recent(epoch)[index]


def prompt_rows(
    n: int,
    *,
    batch_size: int,
    key: Array,
    step: int,
) -> np.ndarray:
    """[batch_size] int64 row numbers of prompt batch ``step``. The batch is always full: at the end
    of an epoch it takes its other rows from the next epoch's shuffle.

    Epoch e visits the n prompts in the order of ``fold_in(key, e)``. The batch at an epoch's end
    may hold a prompt twice, so a sampler must take a row's randomness from its place in the batch,
    not from this number.
    """
    positions = step * batch_size + np.arange(batch_size)
    epochs, places = np.divmod(positions, n)
    orders = {
        epoch: _permutation(jax.random.fold_in(key, epoch), n)
        for epoch in np.unique(epochs).tolist()
    }
    return np.array([orders[epoch][place] for epoch, place in zip(epochs, places, strict=True)])


def run_length(numbers: np.ndarray) -> int:
    """The length of the runs of equal neighbours among [N] numbers, if all are equally long and
    there is more than one number; else 1.
    """
    lengths = {len(list(run)) for _, run in itertools.groupby(numbers.tolist())}
    return lengths.pop() if len(lengths) == 1 else 1


def prompt_width(attention_mask: np.ndarray, multiple: int) -> int:
    """The number of columns for left-padded prompts [B, P]: the smallest of ``multiple``, 2
    ``multiple``, 4 ``multiple``, ... that holds the longest prompt, or P if that is more than 3/4
    P. So at most log2(P / multiple) + 2 different widths are compiled.
    """
    columns = attention_mask.shape[1]
    widths = np.arange(columns, 0, -1)
    longest = int(np.max(np.any(attention_mask, axis=0) * widths, initial=1))
    width = multiple << (-(-longest // multiple) - 1).bit_length()
    return width if width <= 0.75 * columns else columns


def narrowed(
    data: EncodedPrompts,
    rows: np.ndarray,
    multiple: int,
) -> EncodedPrompts:
    """The prompts without the columns that are padding in all of the given rows. Other rows may
    lose their first tokens.
    """
    width = prompt_width(data.attention_mask[rows], multiple)
    return replace(
        data, tokens=data.tokens[:, -width:], attention_mask=data.attention_mask[:, -width:]
    )


def demonstration_batch(
    data: EncodedTexts,
    rows: np.ndarray,
    bucket_multiple: int = 16,
) -> Demonstrations:
    """The given rows, right-padded: fields [B, T] int32. A missing row (-1) has only padding and an
    empty response_mask.
    """
    arrays = _padded(data, rows, bucket_multiple)
    return Demonstrations(*(array[:, 0] for array in arrays))


def first_fit(lengths: np.ndarray, width: int) -> list[tuple[int, int, int]]:
    """(text, row, first column) of each text, the longest first: each goes to the first row [width]
    that has room for it.
    """
    room: list[int] = []  # free columns of each row
    places = []
    for text in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[text])
        roomy = (row for row, columns in enumerate(room) if columns >= length)
        row = next(roomy, len(room))
        if row == len(room):
            room.append(width)
        places.append((text, row, width - room[row]))
        room[row] -= length
    return places


def packed_batch(
    data: EncodedTexts,
    rows: np.ndarray,
    *,
    width: int,
    multiple: int = 1,
) -> Demonstrations:
    """The given rows as documents 1, 2, ... of packed rows [N, width]. The attention mask holds the
    documents' numbers.

    N is the number of packed rows that the texts fill, rounded up to a ``multiple``, so that few
    shapes are compiled and devices have equal parts.
    """
    texts, held = _packed(data, rows, width, multiple)
    return Demonstrations(*_placed(data, texts, (len(held), width)))


def packed_comparisons(
    data: EncodedTexts,
    rows: np.ndarray,
    *,
    width: int,
    multiple: int = 1,
) -> Comparisons:
    """The given comparisons in packed rows [N, width]. All K answers of a comparison are in the
    same row, so that rows may be sharded and cut into microbatches. In a row, answer k of
    comparison number c is document ``c * K + k + 1``; with shared prompts document ``c * (K + 1) +
    k + 2``, and its prompt is document ``c * (K + 1) + 1``.

    N is as in `packed_batch`. The labels have shape [N, C]; C is the same for all batches with the
    same number of rows.
    """
    texts, held = _packed(data, rows, width, multiple)
    return _comparisons(data, texts, held, width)


def _comparisons(
    data: EncodedTexts, texts: Sequence[Place], held: np.ndarray, width: int
) -> Comparisons:
    """Packed comparisons: where their texts stand, and their numbers [N, C] in each row."""
    firsts = [_first_document(data, number) for number in range(held.shape[1])]
    documents = np.array(firsts, np.int32)[:, None] + np.arange(data.num_answers, dtype=np.int32)
    labels = _labels_of(data, held)
    labels["documents"] = np.broadcast_to(documents, (len(held), *documents.shape))
    return Comparisons(*_placed(data, texts, (len(held), width)), **labels)


class Packing(NamedTuple):
    """How to pack the rows of a plan."""

    plan: Plan  # batches of the same number of rows, with mixed lengths
    width: int  # of packed rows: as the longest row of the data with all its answers
    multiple: int
    """To which the number of packed rows is rounded up: about an eighth of those in the largest
    batch of the first epoch, and a multiple of the given one."""
    padding_alone: float  # the share of padding in that epoch without packing
    padding: float  # and with it
    columns: int  # of all packed rows in that epoch


def widths(data: EncodedTexts, rows: np.ndarray, plan: Plan, bucket_multiple: int) -> np.ndarray:
    """[steps] the columns of the padded batches in the first epoch of a plan of these ``rows``."""
    steps = range(plan.steps_per_epoch)
    batches = (rows[_present(plan.rows(step))] for step in steps)
    return np.array([width_of(data, own, bucket_multiple=bucket_multiple) for own in batches])


def packing(
    data: EncodedTexts,
    rows: np.ndarray,
    plan: Plan,
    multiple: int,
) -> Packing:
    """How to pack the training ``rows`` of a plan, in numbers of rows that are a multiple."""
    totals = data.totals
    width = _round_up(int(totals.max()), plan.bucket_multiple)
    width = min(width, data.num_answers * (data.max_length or width))
    mixed = replace(plan, bucket_multiple=width)  # one bucket holds all
    needed = []
    for step in range(plan.steps_per_epoch):
        places = first_fit(totals[rows[_present(mixed.rows(step))]], width)
        needed.append(len({row for _, row, _ in places}))
    multiple *= max(1, max(needed) // (8 * multiple))
    num_tokens = totals[rows].sum()
    in_rows = plan.batch_size * data.rows_of_arrays
    alone = in_rows * int(widths(data, rows, plan, plan.bucket_multiple).sum())
    columns = width * int(_round_up(np.array(needed), multiple).sum())
    return Packing(
        mixed, width, multiple, 1 - num_tokens / alone, 1 - num_tokens / columns, columns
    )


def comparison_batch(
    data: EncodedTexts,
    rows: np.ndarray,
    bucket_multiple: int = 16,
) -> Comparisons:
    """The given comparisons, right-padded: tokens and masks [B, K, T] int32, and best, targets and
    weight if the data has them. With shared prompts they are packed, one in each row.

    A missing row (-1) or answer has only padding and an empty response_mask. ``best`` None means
    that answer 0 is the chosen one.
    """
    if data.shares_prompts:
        width = width_of(data, rows, bucket_multiple=bucket_multiple)
        places = np.flatnonzero(rows != ABSENT).tolist()
        own = [_texts_of(data, rows[place], place, 0, 0) for place in places]
        return _comparisons(data, list(itertools.chain(*own)), rows[:, None], width)
    return Comparisons(*_padded(data, rows, bucket_multiple), **_labels_of(data, rows))


def feedback_batch(
    data: EncodedTexts,
    rows: np.ndarray,
    bucket_multiple: int = 16,
) -> Feedback:
    """The given comparisons of one answer as [B, T]. A target of 1 means desirable, 0 undesirable.

    The rows are padded so that each response fits after the prompt of the previous row, up to
    ``max_length``.
    """
    next_responses = np.roll(data.response_lengths[rows], -1, axis=0)
    needed = int((data.starts[rows] + next_responses).max())
    arrays = _padded(data, rows, bucket_multiple, needed)
    tokens, attention_mask, response_mask = (array[:, 0] for array in arrays)
    desirable = _labels(data.targets, rows)[:, 0] > 0.5
    weight = _labels(data.weight, rows)
    return Feedback(tokens, attention_mask, response_mask, desirable, weight)


def _labels_of(data: EncodedTexts, rows: np.ndarray) -> dict[str, Any]:
    """The labels of comparisons. A label that has its default in all rows is None."""
    has_best = data.targets is None and data.best.any()
    has_weight = data.weight.ndim > 1 or (data.weight != 1).any()  # an ensemble has them
    return {
        "best": _labels(data.best, rows) if has_best else None,
        "targets": _labels(data.targets, rows),
        "margin": _labels(data.margin, rows),
        "weight": _labels(data.weight, rows) if has_weight else None,
    }


def _labels(values: np.ndarray | None, rows: np.ndarray) -> Any:
    """The labels of the given rows, an array of any shape. Missing rows have the label 0."""
    if values is None:
        return None
    labels = values[rows]
    labels[rows == ABSENT] = 0
    return labels


def _present(rows: np.ndarray) -> np.ndarray:
    return rows[rows != ABSENT]


def columns_at(data: EncodedPrompts, row_ids: np.ndarray) -> dict[str, list[Any]]:
    """The data columns of the given rows, for a reward that reads them, and the column ``messages``
    of the rows' `Row.conversation`. A value that a row lacks is None. ``IS_CHAT`` says which
    prompts the data gives as messages, and ``SOURCE`` where each is from.
    """
    rows = [data.rows[row] for row in row_ids]
    return {
        **{name: [row.columns.get(name) for row in rows] for name in data.columns},
        "messages": [row.conversation for row in rows],
        IS_CHAT: [bool(row.messages) for row in rows],
        SOURCE: [row.source for row in rows],
    }


def _padded(
    data: EncodedTexts,
    rows: np.ndarray,
    bucket_multiple: int,
    least: int = 0,
) -> tuple[Any, ...]:
    """[B, K, T] int32, T at least ``least``: tokens and both masks, each text in its own row."""
    num_answers = data.num_answers
    width = width_of(data, rows, bucket_multiple=bucket_multiple, least=least)
    present = np.flatnonzero(rows != ABSENT).tolist()
    texts = [
        Place(rows[i], answer, i * num_answers + answer, 0, 1)
        for i, answer in itertools.product(present, range(num_answers))
    ]
    arrays = _placed(data, texts, (len(rows) * num_answers, width))
    return tuple(array.reshape(len(rows), num_answers, width) for array in arrays)


def width_of(
    data: EncodedTexts,
    rows: np.ndarray,
    *,
    bucket_multiple: int,
    least: int = 0,
) -> int:
    """The number of columns for the longest text of the given rows, and at least for ``least``; a
    batch without a row has columns too.
    """
    longest = int(data.longest[_present(rows)].max(initial=max(least, 1)))
    return min(_round_up(longest, bucket_multiple), data.most)


def _packed(
    data: EncodedTexts,
    rows: np.ndarray,
    width: int,
    multiple: int,
) -> tuple[list[Place], np.ndarray]:
    """The place of each text of the given rows, which are packed first-fit, and [N, C] the rows
    that each packed row holds, -1 for none. C is the number of the data's shortest rows that fit
    into a packed row, and at most the number of given rows.
    """
    present = _present(rows)
    places = first_fit(data.totals[present], width)
    num_packed = len({place for _, place, _ in places}) or 1
    num_shortest = int(np.searchsorted(data.shortest, width, side="right"))
    held = np.full((_round_up(num_packed, multiple), min(num_shortest, len(rows))), ABSENT)
    texts: list[Place] = []
    for i, place, start in places:
        number = len(_present(held[place]))
        held[place, number] = present[i]
        texts += _texts_of(data, present[i], place, start, number)
    return texts, held


def _first_document(data: EncodedTexts, number: int) -> int:
    """Of the first answer of a row's comparison; a prompt that stands alone is the one before."""
    return number * (data.num_answers + data.shares_prompts) + 1 + data.shares_prompts


def _texts_of(data: EncodedTexts, row: int, place: int, start: int, number: int) -> list[Place]:
    """The places of a row's texts from column ``start`` on, as comparison ``number`` there."""
    texts = []
    document = _first_document(data, number)
    end = 0
    if data.shares_prompts:
        end = int(data.starts[row].max())
        answer = int(data.lengths[row].argmax())  # one that is not missing
        texts.append(Place(row, answer, place, start, document - 1, end=end))
        start += end
    for answer in range(data.num_answers):
        texts.append(Place(row, answer, place, start, document + answer, first=end))
        start += max(int(data.lengths[row, answer]) - end, 0)
    return texts


def _placed(
    data: EncodedTexts,
    texts: Sequence[Place],
    shape: tuple[int, int],
) -> tuple[Any, ...]:
    """[N, T] int32: tokens, the text's number in each column (0: none), and response_mask."""
    tokens = np.full(shape, data.pad_id, np.int32)
    documents = np.zeros(shape, np.int32)
    responses = np.zeros(shape, np.int32)
    for row, answer, place, start, number, first, last in texts:
        ids = data.tokens[answer][row][first:last]
        end = start + len(ids)
        response_start = start + max(data.starts[row, answer] - first, 0)
        tokens[place, start:end] = ids
        documents[place, start:end] = number
        if response_start < end:
            learned = data.learned.get((answer, row), 1)
            responses[place, response_start:end] = learned
    return tokens, documents, responses


def _round_up(lengths: Any, multiple: int) -> Any:
    return -(-lengths // multiple) * multiple


def _permutation(key: Array, n: int) -> np.ndarray:
    permute = jax.jit(jax.random.permutation, static_argnums=1)
    return np.asarray(permute(key, n)).astype(np.int64)
