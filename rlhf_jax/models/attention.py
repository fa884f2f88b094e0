"""The one place where attention is computed: which keys a query attends to, the cache of keys and
values, and four implementations.

Heads come before slots ([B, H, S, Dh]): a cache in that layout is read in order by every head while
decoding.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from rlhf_jax.models import kernels
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.kernels import fused

Number = Array | float
# Columns of [B, T] to compute: the same slice of each row, [B, n] indices, or None for all.
Columns = slice | Array | None
Drop = tuple[Array, float] | None  # PRNG key and rate at which attention weights are dropped
# Finite, so that a query without a key (a pad) gets a uniform distribution instead of NaN.
MASKED = -1e30
# "auto" computes the scores of that many keys and more in blocks, or by a fused kernel.
LONG = 512
# Half the queries of a text; with that many, the first half skips the keys of the second.
HALF = 32
# Scores of one head that "blockwise" holds at once: queries of a block x keys.
BLOCK_SCORES = 2**16


class Seen(NamedTuple):
    """A causal mask in parts: a query attends to the keys of its own document that lie in its
    window, which ends with its own slot.
    """

    slots: Array  # [B, t] of the queries
    documents: Array  # [B, t] of the queries, 0 on pads
    key_slots: Array  # [S], or [B, S]
    key_documents: Array  # [B, S], 0 on pads and empty slots
    window: Array | int  # keys that a query attends to, its own included
    mask: Array | None = None
    """[B, 1, t, S] bool: ``visible`` of the rest, made once for all layers."""
    lengths: Array | None = None
    """[B] real tokens of rows that hold one text each from column 0 on. None: documents say it."""
    num_answers: Array | int | None = None
    """The answers to each prompt, which attend to it too (``prompt_of``); slots are then positions.
    None: documents are by themselves."""


class Softmax(NamedTuple):
    """What turns scores into weights beside the mask."""

    softcap: float | None = None  # scores become softcap * tanh(scores / softcap)
    sinks: Array | None = None
    """[H, G] a score of each query head that takes a share of the weight and has no value."""


PLAIN = Softmax()


def prompt_of(
    documents: Array,
    num_answers: Array | int,
) -> Array:
    """The number of the document that is the prompt of each document: of K answers, prompts have
    the numbers 1, K + 2, 2 K + 3, ..., and the K numbers that follow are their answers. A prompt's
    is its own.
    """
    place = (documents - 1) % (num_answers + 1)
    return documents - place


def positions(attention_mask: Array) -> Array:
    """Position of each token within its document: ``cumsum(mask) - mask``, restarting at every
    packed document.

    Args:
        attention_mask: [B, T], 0 on pads; packed documents carry different numbers and are
            contiguous.

    Returns:
        [B, T] int32. Left pads get 0, trailing pads the length of the last document.
    """
    real = attention_mask != 0
    counts = jnp.cumsum(real, axis=1, dtype=jnp.int32) - real  # real tokens before this one
    columns = jnp.broadcast_to(jnp.arange(real.shape[1]), real.shape)
    last_real = lax.cummax(jnp.where(real, columns, 0), axis=1)
    # The document of the last real token up to each column, and up to the column before.
    document = jnp.take_along_axis(attention_mask, last_real, axis=1)
    before = jnp.concatenate([document[:, :1], document[:, :-1]], axis=1)
    is_start = real & (document != before)
    starts = lax.cummax(jnp.where(is_start, counts, 0), axis=1)
    return counts - starts


def seen_in_text(attention_mask: Array, window: int | None = None) -> Seen:
    """The causal mask of a full forward pass: each token attends to itself and to earlier tokens of
    its document.

    Args:
        attention_mask: [B, T], 0 on pads; packed documents carry different numbers.
        window: the number of keys that a query attends to, its own included; None: no limit.
    """
    slots = jnp.arange(attention_mask.shape[1])
    rows = jnp.broadcast_to(slots, attention_mask.shape)
    return Seen(rows, attention_mask, slots, attention_mask, window or len(slots))


def seen_of_lengths(attention_mask: Array, window: int | None = None) -> Seen:
    """``seen_in_text`` of rows that hold one text each, turned until it begins in column 0."""
    # A row without a token attends to one pad: a softmax of nothing is not a number.
    lengths = jnp.maximum(jnp.sum(attention_mask != 0, axis=1, dtype=jnp.int32), 1)
    columns = jnp.arange(attention_mask.shape[1])
    mask = (columns[None] < lengths[:, None]).astype(jnp.int32)
    return seen_in_text(mask, window)._replace(lengths=lengths)


def is_start(index: Array | int) -> bool:
    """Whether a cache is known to be empty: its next slot is the number 0, and not an array."""
    return isinstance(index, int) and index == 0


def seen_in_cache(
    key_mask: Array,
    index: Array | int,
    queries: int,
    window: int | None = None,
) -> Seen:
    """The causal mask while decoding: the query at slot s attends to the slots up to s whose
    ``key_mask`` is not 0.

    Args:
        key_mask: [B, S], 0 on empty and padded slots.
        index: [] slot of the first query. If ``is_start``, the queries attend only to one another.
        queries: the number t of query positions.
        window: as in ``seen_in_text``. The cache of a layer with a window holds the last ``window``
            slots, slot s at place s % window. A single query attends to the cache after its token
            is written. Several queries attend to the cache before their tokens are written, and to
            one another.
    """
    if is_start(index) and queries > 1:
        prompt = (key_mask[:, :queries] != 0).astype(jnp.int32)
        return seen_in_text(prompt, window)

    batch, length = key_mask.shape
    size = min(window or length, length)
    slots = index + jnp.arange(queries)
    key_slots = jnp.arange(length)
    real = key_mask != 0
    if size < length:
        newest = index if queries == 1 else index - 1  # slot in the cache
        key_slots = newest - lax.rem(newest + size - jnp.arange(size), size)
        if queries > 1:
            key_slots = jnp.concatenate([key_slots, slots])
        is_written = (key_slots >= 0)[None, :]
        real = jnp.take(real, key_slots, axis=1, mode="clip") & is_written
    rows = jnp.broadcast_to(slots, (batch, queries))
    documents = jnp.ones_like(rows, jnp.int32)
    return Seen(rows, documents, key_slots, real.astype(jnp.int32), window or length)


def visible(seen: Seen) -> Array:
    """[B, 1, t, S] bool: whether the query attends to the key."""
    if seen.mask is not None:
        return seen.mask
    key_slots = jnp.atleast_2d(seen.key_slots)
    distance = seen.slots[:, :, None] - key_slots[:, None]
    is_near = (distance >= 0) & (distance < seen.window)
    key_documents = seen.key_documents[:, None, :]
    is_own = seen.documents[:, :, None] == key_documents
    if seen.num_answers is not None:
        prompts = prompt_of(seen.documents, seen.num_answers)
        reads_prompt = prompts[:, :, None] == key_documents
        is_own |= reads_prompt
    is_visible = is_near & (is_own & (key_documents != 0))
    return is_visible[:, None]


def prepared(config: TransformerConfig, seen: Seen) -> Seen:
    """The mask with its array, made once for all layers, if "xla" computes attention."""
    num_queries = seen.slots.shape[1]
    name = implementation(config, num_queries, seen.key_slots.shape[-1], False)
    return seen._replace(mask=visible(seen)) if name == "xla" else seen


def takes_lengths(config: TransformerConfig, length: int) -> bool:
    """Whether a kernel computes the attention of texts with ``length`` columns that need not read a
    mask if rows hold one text each from column 0 on (``Seen.lengths``).
    """
    return implementation(config, length, length, False) == "cudnn"


def pick(x: Array, columns: Columns, axis: int) -> Array:
    """The given columns of x [B, ...]; ``axis`` is the axis of the columns."""
    if columns is None:
        return x
    if isinstance(columns, slice):
        return lax.slice_in_dim(x, columns.start, columns.stop, axis=axis)
    shape = [1] * x.ndim
    shape[0], shape[axis] = columns.shape
    return jnp.take_along_axis(x, columns.reshape(shape), axis=axis)


def seen_at(seen: Seen, columns: Columns) -> Seen:
    """The attention mask of the queries in the given columns."""
    slots = pick(seen.slots, columns, axis=1)
    documents = pick(seen.documents, columns, axis=1)
    mask = None if seen.mask is None else pick(seen.mask, columns, axis=2)
    return seen._replace(slots=slots, documents=documents, mask=mask)


def implementation(
    config: TransformerConfig,
    queries: int,
    keys: int,
    needs_formula: bool,
) -> str:
    """The name of the implementation that computes attention: ``config.attention``, or for "auto"
    one that fits the shapes and the device.

    One query, as in decoding, always takes "xla". The fused kernels neither drop weights nor read a
    cache, and know no answers that attend to a prompt (``needs_formula``): "blockwise" then
    replaces them.
    """
    name = config.attention
    if name == "xla" or queries == 1:
        return "xla"
    if name == "auto" and keys < LONG:
        return "xla"
    if needs_formula or queries != keys or not config.has_plain_softmax:
        return "blockwise"
    return fused.fastest(config) if name == "auto" else name


def mix(
    config: TransformerConfig,
    query: Array,
    key: Array,
    value: Array,
    seen: Seen,
    drop: Drop,
    is_local: Array | bool,
    columns: Columns,
    softmax: Softmax = PLAIN,
) -> Array:
    """``attention`` by the implementation that the config names or that fits: [B, H, G, n, Dh] for
    the given columns of the queries.
    """
    num_queries = query.shape[3]
    num_keys = key.shape[2]
    needs_formula = drop is not None or seen.num_answers is not None
    name = implementation(config, num_queries, num_keys, needs_formula)
    if name in ("cudnn", "splash"):
        by_window = [
            partial(fused.attention, name=name, window=window) for window in config.windows
        ]
        arrays = (query, key, value, seen.key_documents, seen.lengths)
        whole = lax.switch(jnp.int32(is_local), by_window, *arrays)
        return pick(whole, columns, axis=3)

    query = pick(query, columns, axis=3)
    seen = seen_at(seen, columns)
    if name == "blockwise":
        return blockwise(query, key, value, seen, drop, softmax)
    first = None
    if num_keys == num_queries and not isinstance(columns, Array):
        first = 0 if columns is None else columns.start
    return attention(query, key, value, seen, drop, first, softmax)


def attention(
    query: Array,
    key: Array,
    value: Array,
    seen: Seen,
    drop: Drop = None,
    first: int | None = None,
    softmax: Softmax = PLAIN,
) -> Array:
    """Scaled dot-product attention; scores and softmax in float32 whatever the inputs' dtype.

    Args:
        query: [B, H, G, t, Dh], times the scale: G queries share a head of keys (Ainslie et al.
            2023), which is never repeated.
        key, value: [B, H, S, Dh].
        seen: the attention mask.
        drop: PRNG key and rate at which attention weights are dropped, or None.
        first: index of the key at the first query's position, if the other queries' keys follow it
            in order: the first half of the queries then skips the keys after it. None if the
            queries are at other positions.
        softmax: a soft cap of the scores, and sinks.

    Returns:
        [B, H, G, t, Dh] in the dtype of ``value``; finite also for a query without a key.
    """
    mask = visible(seen)
    half = query.shape[3] // 2
    if first is None or half < HALF or drop is not None:
        return _attend(query, key, value, mask, drop, softmax)
    end = first + half
    # The gradient of a split is one copy; the gradient of slices would pad each of them.
    early, late = jnp.split(query, [half], axis=3)
    early_key = key[:, :, :end]
    early_value = value[:, :, :end]
    early = _attend(early, early_key, early_value, mask[:, :, :half, :end], None, softmax)
    late = _attend(late, key, value, mask[:, :, half:], None, softmax)
    return jnp.concatenate([early, late], axis=3)


def _attend(
    query: Array,
    key: Array,
    value: Array,
    mask: Array,
    drop: Drop,
    softmax: Softmax,
) -> Array:
    """``attention`` under a mask [B, 1, t, S]."""
    shape = query.shape
    rows = query.reshape(*shape[:2], -1, shape[4])  # [B, H, G t, Dh]: XLA copies an axis of one
    scores = jnp.einsum("bhtd,bhsd->bhts", rows, key, preferred_element_type=jnp.float32)
    if softmax.softcap is not None:
        scores = softmax.softcap * jnp.tanh(scores / softmax.softcap)
    # The mask is added, and the sum divided by at the end: XLA then touches the scores half as
    # often as by softmax.
    masked = jnp.where(mask, 0.0, MASKED)
    scores += jnp.tile(masked, (1, 1, shape[2], 1))
    highest = scores.max(axis=-1, keepdims=True)
    if softmax.sinks is not None:
        sinks = jnp.repeat(softmax.sinks.astype(jnp.float32), shape[3], axis=1)[None, :, :, None]
        highest = jnp.maximum(highest, sinks)
    highest = lax.stop_gradient(highest)
    weights = jnp.exp(scores - highest)
    total = weights.sum(axis=-1, keepdims=True)
    if softmax.sinks is not None:
        total += jnp.exp(sinks - highest)
    if drop is not None:
        drop_key, rate = drop
        keep = jax.random.bernoulli(drop_key, 1.0 - rate, weights.shape)
        weights = jnp.where(keep, weights / (1.0 - rate), 0.0)
    # A product, since XLA divides where a program is cut over devices and multiplies elsewhere.
    weighted = kernels.weighted_sum(weights.astype(value.dtype), value)
    mixed = weighted * (1.0 / total)
    return mixed.astype(value.dtype).reshape(shape)


def blockwise(
    query: Array,
    key: Array,
    value: Array,
    seen: Seen,
    drop: Drop = None,
    softmax: Softmax = PLAIN,
) -> Array:
    """``attention``, one block of queries after another: memory holds the scores of one block only,
    in the backward pass too.

    The backward pass computes each block again (Rabe and Staats 2021). The same key drops other
    weights than in ``attention``.
    """
    size = max(BLOCK_SCORES // key.shape[2], 1)

    def of_block(number: Array, query: Array, slots: Array, documents: Array) -> Array:
        block_drop = None
        if drop is not None:
            drop_key, rate = drop
            block_drop = (jax.random.fold_in(drop_key, number), rate)
        block_seen = seen._replace(slots=slots, documents=documents)
        return attention(query, key, value, block_seen, block_drop, None, softmax)

    return by_blocks(of_block, size, (query, 3), (seen.slots, 1), (seen.documents, 1))


def by_blocks(fn: Callable[..., Any], size: int, *columns: tuple[Array, int]) -> Any:
    """Applies ``fn`` to one block of columns after another, so that memory holds the intermediate
    results of one block only. The backward pass computes each block again.

    Args:
        fn: ``(number of the block, *blocks)`` -> a tree of arrays, whose columns have the same axis
            as those of the first array.
        size: columns of a block; the last block is padded.
        columns: arrays, each with the axis of its columns.

    Returns:
        The trees of all blocks, joined along that axis.
    """
    whole, axis = columns[0]
    length = whole.shape[axis]
    size = min(size, length)
    count = -(-length // size)

    def blocks(x: Array, axis: int) -> Array:
        """[..., t, ...] -> [count, ..., size, ...], padded at the end."""
        pads = [(0, 0)] * x.ndim
        pads[axis] = (0, count * size - length)
        shape = list(x.shape)
        shape[axis : axis + 1] = [count, size]
        return jnp.moveaxis(jnp.pad(x, pads).reshape(shape), axis, 0)

    def joined(x: Array) -> Array:
        in_order = jnp.moveaxis(x, 0, axis)
        shape = list(in_order.shape)
        shape[axis : axis + 2] = [count * size]
        return lax.slice_in_dim(in_order.reshape(shape), 0, length, axis=axis)

    of_block = jax.checkpoint(fn, prevent_cse=False)
    parts = (jnp.arange(count), *(blocks(*array) for array in columns))
    results = lax.map(lambda part: of_block(*part), parts)
    return jax.tree.map(joined, results)
