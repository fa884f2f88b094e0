"""Rows to arrays, and batches that depend only on (key, step).

Encoded rows are ragged; a batch is padded to its own longest row, rounded up to
``bucket_multiple``, so that few shapes are compiled. Which rows form batch number ``step`` is
computed from the key alone: a resumed run continues anywhere without replaying, and the number of
devices plays no part. Everything is NumPy on the host.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from rlhf_jax.data.encoding import EncodedPrompts, EncodedTexts
from rlhf_jax.errors import UserError
from rlhf_jax.types import Comparisons, Demonstrations, Feedback

ABSENT = (
    -1
)  # in place of a row number: completes the last batch of an epoch and counts in no statistic
# Answer ``answer`` of data row ``row`` begins in column ``start`` of row ``place`` of the arrays,
# as text ``number``.
Place = tuple[int, int, int, int, int]  # row, answer, place, start, number


def split(
    n: int, fraction: float, key: jax.Array, groups: Sequence | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers for training and for validation, each ascending; round(n * fraction) of them, at
    least 1, validate.

    A fraction of 0 gives an empty validation part. Raises UserError if no row would be left to
    train on.

    Args:
      groups: of each row; rows of one group, such as the answers to one prompt, stay together, so
        that a few more may validate. Groups larger than the part that validates are taken last.
        None: each row is a group of its own.
    """
    num_held_out = max(1, round(n * fraction)) if fraction else 0
    names = list(range(n) if groups is None else groups)
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    group_of = np.array([number[name] for name in names], np.int64)
    sizes = np.bincount(group_of)
    order = _permutation(key, len(number))
    order = order[np.argsort(sizes[order] > num_held_out, kind="stable")]
    num_groups = 0
    if num_held_out:
        num_groups = int(np.searchsorted(np.cumsum(sizes[order]), num_held_out)) + 1
    if num_groups >= len(number):
        advice = "give more data or a smaller validation_fraction (0 holds none out)"
        raise UserError(
            f"{n} rows leave none to train on after {num_held_out} for validation; {advice}"
        )
    validates = np.isin(group_of, order[:num_groups])
    return np.flatnonzero(~validates), np.flatnonzero(validates)


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The row numbers of any step: ``plan.rows(step)`` is a pure function of the fields and the
    step.
    """

    lengths: np.ndarray  # [N]
    batch_size: int
    key: jax.Array
    bucket_multiple: int = 16

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def epoch(self, number: int) -> list[np.ndarray]:
        """Batches of one pass over the rows, as row numbers [batch_size] int64 each; every row
        appears once.

        The rows are shuffled by ``fold_in(key, number)`` and grouped by length rounded up to
        ``bucket_multiple``. What is left over in a group joins the next longer one; the very last
        batch is completed with -1 (absent). Then the order of the batches is shuffled.
        """
        epoch_key = jax.random.fold_in(self.key, number)
        order = _permutation(jax.random.fold_in(epoch_key, 0), len(self.lengths))
        buckets = _round_up(np.asarray(self.lengths)[order], self.bucket_multiple)
        # Stable: rows keep their random order inside a bucket, and leftovers are the last rows of
        # the shorter bucket, so cutting the sorted rows into equal slices is the same as passing
        # leftovers on.
        by_length = order[np.argsort(buckets, kind="stable")]
        filled = np.pad(by_length, (0, -len(order) % self.batch_size), constant_values=ABSENT)
        batches = filled.reshape(-1, self.batch_size)
        return list(batches[_permutation(jax.random.fold_in(epoch_key, 1), len(batches))])

    @functools.cached_property
    def _recent(self) -> Callable[[int], list[np.ndarray]]:
        return functools.lru_cache(maxsize=2)(self.epoch)  # of consecutive steps

    def rows(self, step: int) -> np.ndarray:
        """[batch_size] row numbers of batch ``step`` (counted over all epochs), -1 for absent ones."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return self._recent(epoch)[index]

    def extent(self, step: int) -> tuple[int, int]:
        """Of batch ``step``: the longest text, rounded up, and the sum of all texts."""
        lengths = np.asarray(self.lengths)[[row for row in self.rows(step) if row != ABSENT]]
        return int(_round_up(lengths.max(), self.bucket_multiple)), int(lengths.sum())


def prompt_rows(n: int, batch_size: int, key: jax.Array, step: int) -> np.ndarray:
    """[batch_size] int64 row numbers of prompt batch ``step``: always full, running on into the
    next epoch's shuffle.

    Epoch e visits the n prompts in the order of ``fold_in(key, e)``. The batch that crosses an
    epoch's end may hold a prompt twice, so a sampler must take a row's randomness from its place in
    the batch, not from this number.
    """
    position = step * batch_size + np.arange(batch_size)
    epochs = range(int(position[0]) // n, int(position[-1]) // n + 1)
    orders = np.concatenate([_permutation(jax.random.fold_in(key, epoch), n) for epoch in epochs])
    return orders[position - epochs[0] * n]


def prompt_width(attention_mask: np.ndarray, multiple: int) -> int:
    """Columns that left-padded prompts [B, P] need: the least of ``multiple``, twice, four times,
    ... that which holds the longest, or P where that is above 3/4 P. So at most log2(P / multiple)
    + 2 widths occur, whatever batches hold.
    """
    columns = attention_mask.shape[1]
    longest = int(np.max(np.any(attention_mask, axis=0) * np.arange(columns, 0, -1), initial=1))
    width = multiple << (-(-longest // multiple) - 1).bit_length()
    return width if width <= 0.75 * columns else columns


def narrowed(data: EncodedPrompts, rows: np.ndarray, multiple: int) -> EncodedPrompts:
    """Prompts from which to take the given rows, in the columns that these need; other rows may
    lose their start.
    """
    width = prompt_width(data.attention_mask[rows], multiple)
    return dataclasses.replace(
        data, tokens=data.tokens[:, -width:], attention_mask=data.attention_mask[:, -width:]
    )


def demonstration_batch(
    data: EncodedTexts, rows: np.ndarray, bucket_multiple: int = 16
) -> Demonstrations:
    """The given rows, right-padded: fields [B, T] int32. An absent row (-1) is padding with an
    empty response_mask.
    """
    return Demonstrations(*(array[:, 0] for array in _padded(data, rows, bucket_multiple)))


def first_fit(lengths: np.ndarray, width: int) -> list[tuple[int, int, int]]:
    """(text, row, first column) of each text, the longest first: it goes to the first row [width]
    that has room.
    """
    filled, places = list[int](), []
    for text in np.argsort(-lengths, kind="stable").tolist():
        row = next(
            (row for row, used in enumerate(filled) if used + lengths[text] <= width), len(filled)
        )
        filled += [0] * (row == len(filled))
        places.append((text, row, filled[row]))
        filled[row] += int(lengths[text])
    return places


def packed_batch(
    data: EncodedTexts, rows: np.ndarray, width: int, multiple: int = 1
) -> Demonstrations:
    """The given rows as documents 1, 2, ... of packed rows [N, width], which ``attention_mask``
    numbers.

    N is what they need, rounded up to a ``multiple``, so that few shapes are compiled and devices
    have equal parts.
    """
    texts, held = _packed(data, rows, width, multiple)
    return Demonstrations(*_placed(data, texts, (len(held), width)))


def packed_comparisons(
    data: EncodedTexts, rows: np.ndarray, width: int, multiple: int = 1
) -> Comparisons:
    """The given comparisons in packed rows [N, width], all K answers of one in the same row, so
    that rows may be cut over devices and microbatches: answer k of a row's comparison number c is
    document ``c * K + k + 1``.

    N is as of `packed_batch`; C, which the labels [N, C] have room for, is the same for all batches
    of as many rows.
    """
    texts, held = _packed(data, rows, width, multiple)
    num_rows, num_answers = len(held), data.lengths.shape[1]
    numbers = np.tile(np.arange(1, 1 + held[0].size * num_answers, dtype=np.int32), num_rows)
    labels = _labels_of(data, held) | {"documents": numbers.reshape(num_rows, -1, num_answers)}
    return Comparisons(*_placed(data, texts, (len(held), width)), **labels)


def packing(
    data: EncodedTexts, rows: np.ndarray, plan: Plan, multiple: int
) -> tuple[Plan, int, int, float, float]:
    """How the training ``rows`` of a plan are packed: as many a batch as before, of any lengths;
    the width of packed rows, which is the longest of all rows of data, all its answers in it; and
    what their number is rounded up to: an eighth of what the batches of the first epoch need, a
    ``multiple``.

    Also the share of padding in that epoch without packing and with it.
    """
    num_answers, totals = data.lengths.shape[1], data.lengths.sum(axis=1)
    width = min(
        _round_up(int(totals.max()), plan.bucket_multiple),
        num_answers * (data.max_length or sys.maxsize),
    )
    mixed = dataclasses.replace(plan, bucket_multiple=width)  # one bucket holds all
    steps = [[of.rows(step) for step in range(of.steps_per_epoch)] for of in (plan, mixed)]
    padded, packed = ([rows[numbers[numbers != ABSENT]] for numbers in of] for of in steps)
    widths = [width_of(data, numbers, plan.bucket_multiple) for numbers in padded]
    needed = np.array(
        [1 + max(row for _, row, _ in first_fit(totals[numbers], width)) for numbers in packed]
    )
    multiple *= max(1, needed.max() // (8 * multiple))
    before, after = (
        plan.batch_size * num_answers * sum(widths),
        width * _round_up(needed, multiple).sum(),
    )
    return mixed, width, multiple, 1 - totals[rows].sum() / before, 1 - totals[rows].sum() / after


def comparison_batch(
    data: EncodedTexts, rows: np.ndarray, bucket_multiple: int = 16
) -> Comparisons:
    """The given comparisons, right-padded: tokens and masks [B, K, T] int32; best, targets, weight
    where they have any.

    An absent row (-1) or answer is padding with an empty response_mask. ``best`` None means answer
    0, the chosen one.
    """
    return Comparisons(*_padded(data, rows, bucket_multiple), **_labels_of(data, rows))


def feedback_batch(data: EncodedTexts, rows: np.ndarray, bucket_multiple: int = 16) -> Feedback:
    """The given comparisons of one answer as [B, T]: a target of 1 says desirable, 0 undesirable.

    The rows are padded so far that each response fits behind the prompt of the row before it, up to
    ``max_length``.
    """
    needed = int((data.starts[rows] + np.roll(data.response_lengths[rows], -1, axis=0)).max())
    least = min(_round_up(needed, bucket_multiple), data.max_length or sys.maxsize)
    tokens, attention_mask, response_mask = (
        array[:, 0] for array in _padded(data, rows, bucket_multiple, least)
    )
    desirable, weight = _labels(data.targets, rows)[:, 0] > 0.5, _labels(data.weight, rows)
    return Feedback(tokens, attention_mask, response_mask, desirable, weight)


def _labels_of(data: EncodedTexts, rows: np.ndarray) -> dict[str, Any]:
    """Those of comparisons; None where all have the same."""
    best = data.best if data.best.any() and data.targets is None else None
    weight = data.weight if data.weight.ndim > 1 or (data.weight != 1).any() else None
    return {
        "best": _labels(best, rows),
        "targets": _labels(data.targets, rows),
        "weight": _labels(weight, rows),
    }


def _labels(values: np.ndarray | None, rows: np.ndarray) -> Any:
    """Those of the given rows, of any shape; 0 for absent ones."""
    if values is None:
        return None
    present = (rows != ABSENT).reshape(*rows.shape, *[1] * (values.ndim - 1))
    return np.where(present, values[rows], np.zeros((), values.dtype))


def columns_at(data: EncodedPrompts, row_ids: np.ndarray) -> dict[str, list[Any]]:
    """The data columns of the given rows, for a reward that reads them; None where a row lacks one."""
    return {name: [data.rows[row].columns.get(name) for row in row_ids] for name in data.columns}


def _padded(
    data: EncodedTexts, rows: np.ndarray, bucket_multiple: int, least: int = 0
) -> tuple[Any, Any, Any]:
    """[B, K, T] int32, each text a row of its own: tokens and both masks. T is at least ``least``."""
    num_answers = data.lengths.shape[1]
    width = max(width_of(data, rows, bucket_multiple), least)
    texts = [
        (row, k, i * num_answers + k, 0, 1)
        for i, row in enumerate(rows)
        for k in range(num_answers)
        if row >= 0
    ]
    arrays = _placed(data, texts, (len(rows) * num_answers, width))
    return tuple(array.reshape(len(rows), num_answers, width) for array in arrays)


def width_of(data: EncodedTexts, rows: np.ndarray, bucket_multiple: int) -> int:
    """Columns that the longest text of the given rows takes."""
    longest = (data.lengths[rows] * (rows != ABSENT)[:, None]).max()
    return min(_round_up(int(longest), bucket_multiple), data.max_length or sys.maxsize)


def _packed(
    data: EncodedTexts, rows: np.ndarray, width: int, multiple: int
) -> tuple[list[Place], np.ndarray]:
    """Where each text of the given rows goes, first-fit by rows, and [N, C] which rows each packed
    row holds, -1 for none. C is as many as fit of the shortest rows of all, but no more than are
    given."""
    present, num_answers = rows[rows != ABSENT], data.lengths.shape[1]
    places = first_fit(data.lengths[present].sum(axis=1), width)
    count = _round_up(1 + max((place for _, place, _ in places), default=0), multiple)
    most = min(int(np.searchsorted(data.shortest, width, side="right")), len(rows))
    held, texts = np.full((count, most), ABSENT), list[Place]()
    for i, place, start in places:
        row, number = present[i], np.count_nonzero(held[place] != ABSENT)
        held[place, number] = row
        starts = start + np.cumsum(data.lengths[row]) - data.lengths[row]
        texts += [
            (row, k, place, starts[k], number * num_answers + k + 1) for k in range(num_answers)
        ]
    return texts, held


def _placed(data: EncodedTexts, texts: Sequence[Place], shape: tuple[int, int]) -> tuple[Any, ...]:
    """NumPy arrays of a shape [N, T], int32 (Any, as the fields they fill are declared for the
    device): tokens, the number of the text in each column, 0 for none, and response_mask."""
    tokens, documents, responses = (
        np.full(shape, data.pad_id, np.int32),
        *np.zeros((2, *shape), np.int32),
    )
    for row, answer, place, start, number in texts:
        ids = data.tokens[answer][row]
        end = start + len(ids)
        tokens[place, start:end] = ids
        documents[place, start:end] = number
        responses[place, start + data.starts[row, answer] : end] = 1
    return tokens, documents, responses


def _round_up(lengths: Any, multiple: int) -> Any:
    return -(-lengths // multiple) * multiple


def _permutation(key: jax.Array, n: int) -> np.ndarray:
    return np.asarray(jax.jit(jax.random.permutation, static_argnums=1)(key, n)).astype(np.int64)
