"""The one place where attention is computed: who sees whom, the cache of keys and values, and four
implementations.

Heads come before slots ([B, H, S, Dh]): a cache in that layout is read in order by every head while
decoding.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

Number = Array | float
Drop = tuple[Array, float] | None
# Finite, so that a query that sees nothing (a pad) gets a uniform distribution instead of NaN.
MASKED = -1e30
# "auto" computes the scores of that many keys and more in blocks, or by a fused kernel.
LONG = 512
# Queries of a text from which the first half of them leaves out the keys of the second.
HALF = 32
# Layers from which the scores of one query are a product and a sum on a CPU.
DEEP = 12
# Scores of one head that "blockwise" holds at once: queries of a block x keys.
BLOCK_SCORES = 2**16


class Seen(NamedTuple):
    """What decides who sees whom: a query sees the keys of its document up to its own slot and
    within the window.
    """

    slots: Array  # [B, t] of the queries
    documents: Array  # [B, t] of the queries, 0 on pads
    key_slots: Array  # [S]
    key_documents: Array  # [B, S], 0 on pads and empty slots
    window: Array | int  # tokens seen, oneself included
    mask: Array | None = (
        None  # [B, 1, t, S] bool: all of this in one array, made once for all layers
    )


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
    last_real = jax.lax.cummax(jnp.where(real, columns, 0), axis=1)
    # The document of the last real token up to each column, and up to the column before.
    document = jnp.take_along_axis(attention_mask, last_real, axis=1)
    before = jnp.concatenate([document[:, :1], document[:, :-1]], axis=1)
    starts = jax.lax.cummax(jnp.where(real & (document != before), counts, 0), axis=1)
    return counts - starts


def seen_in_text(attention_mask: Array, window: int | None = None) -> Seen:
    """Who sees whom in a full forward: earlier real tokens of the same document, and oneself.

    Args:
        attention_mask: [B, T], 0 on pads; packed documents carry different numbers.
        window: tokens seen, oneself included; None: all.
    """
    slots = jnp.arange(attention_mask.shape[1])
    rows = jnp.broadcast_to(slots, attention_mask.shape)
    return Seen(rows, attention_mask, slots, attention_mask, window or len(slots))


def seen_in_cache(
    key_mask: Array, index: Array | int, queries: int, window: int | None = None
) -> Seen:
    """Who sees whom while decoding: the query at slot s sees slots up to s whose ``key_mask`` is
    non-zero.

    Args:
        key_mask: [B, S], 0 on empty and padded slots.
        index: [] slot of the first query. The number 0 says that the cache is empty: the queries
            see one another alone.
        queries: their number t.
        window: as in ``seen_in_text``. The cache of a layer with one holds the last ``window``
            slots, slot s at place s % window. One query sees it with its own token written; several
            see it as it was, and one another.
    """
    if isinstance(index, int) and index == 0 and queries > 1:
        return seen_in_text((key_mask[:, :queries] != 0).astype(jnp.int32), window)
    batch, length = key_mask.shape
    size, slots = min(window or length, length), index + jnp.arange(queries)
    newest = index if queries == 1 else index - 1  # slot in the cache when it is read
    key_slots, real = jnp.arange(length), key_mask != 0
    if size < length:
        key_slots = newest - jax.lax.rem(newest + size - jnp.arange(size), size)
        key_slots = key_slots if queries == 1 else jnp.concatenate([key_slots, slots])
        real = jnp.take(real, key_slots, axis=1, mode="clip") & (key_slots >= 0)[None, :]
    rows = jnp.broadcast_to(slots, (batch, queries))
    return Seen(
        rows, jnp.ones_like(rows, jnp.int32), key_slots, real.astype(jnp.int32), window or length
    )


def visible(seen: Seen) -> Array:
    """[B, 1, t, S] bool: whether the query sees the key."""
    distance = seen.slots[:, :, None] - seen.key_slots[None, None, :]
    same = (seen.documents[:, :, None] == seen.key_documents[:, None, :]) & (
        seen.key_documents != 0
    )[:, None, :]
    return ((distance >= 0) & (distance < seen.window) & same)[:, None]


def written(cache: Array, new: Array, axis: int, index: Array | int) -> Array:
    """A cache with new keys or values at slots index, index + 1, ..., each modulo S; slots lie
    along ``axis``.
    """
    size, first = cache.shape[axis], max(new.shape[axis] - cache.shape[axis], 0)
    new, index = (
        jax.lax.slice_in_dim(new, first, None, axis=axis).astype(cache.dtype),
        index + first,
    )
    start, count = (
        index % size if isinstance(index, int) else jax.lax.rem(index, size),
        new.shape[axis],
    )
    if count == 1 or (isinstance(start, int) and start + count <= size):
        return jax.lax.dynamic_update_slice_in_dim(
            cache, new, start, axis=axis, allow_negative_indices=False
        )
    return cache.at[(slice(None),) * axis + ((start + jnp.arange(count)) % size,)].set(new)


def implementation(config: Any, queries: int, keys: int, drops: bool) -> str:
    """Which implementation computes attention: ``config.attention``, or what "auto" and the shapes
    make of it.

    One query, as in decoding, is always computed plainly, and the fused kernels neither drop
    weights nor see a cache: there "blockwise" stands in for them.
    """
    name: str = config.attention
    if name == "xla" or queries == 1 or (name == "auto" and keys < LONG):
        return "xla"
    if name == "auto":
        is_cudnn_s = (
            config.compute_dtype == "bfloat16"
            and config.head_size % 8 == 0
            and config.head_size <= 128
        )
        # A Pallas kernel is not divided among devices by the compiler, as cuDNN's is.
        fitting = {
            "gpu": "cudnn" if is_cudnn_s else "",
            "tpu": "splash" if jax.device_count() == 1 else "",
        }
        name = fitting.get(jax.default_backend()) or "blockwise"
    return "blockwise" if drops or queries != keys else name


def attention(
    query: Array,
    key: Array,
    value: Array,
    seen: Seen,
    drop: Drop = None,
    first: int | None = None,
    summed: bool = False,
) -> Array:
    """Scaled dot-product attention; scores and softmax in float32 whatever the inputs' dtype.

    Args:
        query: [B, H, G, t, Dh], times the scale: G queries share a head of keys (Ainslie et al.
            2023), which is never repeated.
        key, value: [B, H, S, Dh].
        seen: who sees whom.
        drop: PRNG key and rate at which attention weights are dropped, or None.
        first: place among the keys of the first query's own, if the others' follow it: the first
            half of the queries then leaves out the keys that come later. None: not known.
        summed: whether a CPU computes the scores of one query by a product and a sum: XLA then
            compiles no kernel for each layer, but what it runs is slower.

    Returns:
        [B, H, G, t, Dh] in the dtype of ``value``; finite also for a query that sees nothing.
    """
    mask = visible(seen) if seen.mask is None else seen.mask
    half = query.shape[3] // 2
    if first is not None and half >= HALF and drop is None:
        end = first + half
        early = seen._replace(mask=mask[:, :, :half, :end])
        first_half, second_half = jnp.split(
            query, [half], axis=3
        )  # whose gradient is one copy: slices' are padded
        earlier = attention(first_half, key[:, :, :end], value[:, :, :end], early)
        later = attention(second_half, key, value, seen._replace(mask=mask[:, :, half:]))
        return jnp.concatenate([earlier, later], axis=3)
    # The mask is added and the sum divided by at the end: XLA then touches the scores half as often
    # as by softmax. It copies them for an axis of one group.
    shape = query.shape
    rows = query.reshape(*shape[:2], -1, shape[4])  # [B, H, G t, Dh]
    is_one = rows.shape[2] == 1 and jax.default_backend() == "cpu"
    if is_one and summed:
        scores = jnp.sum(rows.mT.astype(jnp.float32) * key.mT, axis=2, keepdims=True)
    else:
        scores = jnp.einsum("bhtd,bhsd->bhts", rows, key, preferred_element_type=jnp.float32)
    scores += jnp.tile(jnp.where(mask, 0.0, MASKED), (1, 1, shape[2], 1))
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    if drop is not None:
        keep = jax.random.bernoulli(drop[0], 1.0 - drop[1], weights.shape)
        weights = jnp.where(keep, weights / (1.0 - drop[1]), 0.0)
    if is_one:
        # As two equal rows: of one, XLA would compile a kernel for each layer, and a slower one.
        weights = jnp.repeat(weights, 2, axis=2)
    mixed = jnp.einsum(
        "bhts,bhsd->bhtd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32
    )
    return (mixed[:, :, : rows.shape[2]] / total).astype(value.dtype).reshape(shape)


def blockwise(query: Array, key: Array, value: Array, seen: Seen, drop: Drop = None) -> Array:
    """``attention``, one block of queries after another: the scores of one block lie in memory, in
    the backward too.

    Each block is computed again in the backward pass (Rabe and Staats 2021). Other weights are
    dropped than by ``attention`` with the same key.
    """
    length = query.shape[3]
    size = min(max(BLOCK_SCORES // key.shape[2], 1), length)
    count = -(-length // size)

    def cut(x: Array, axis: int) -> Array:  # [..., t, ...] -> [count, ..., size, ...]
        pads = [(0, count * size - length) if i == axis else (0, 0) for i in range(x.ndim)]
        return jnp.moveaxis(
            jnp.pad(x, pads).reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0
        )

    def block(part: tuple[Array, Array, Array, Array]) -> Array:
        number, query, slots, documents = part
        ours = None if drop is None else (jax.random.fold_in(drop[0], number), drop[1])
        return attention(query, key, value, seen._replace(slots=slots, documents=documents), ours)

    parts = (jnp.arange(count), cut(query, 3), cut(seen.slots, 1), cut(seen.documents, 1))
    mixed = jnp.moveaxis(jax.lax.map(jax.checkpoint(block, prevent_cse=False), parts), 0, 3)
    return mixed.reshape(*query.shape[:3], count * size, -1)[:, :, :, :length]


def fused(
    query: Array, key: Array, value: Array, documents: Array, *, name: str, window: int | None
) -> Array:
    """Attention of a whole text with itself by a kernel that holds no scores; its softmax is in
    float32.

    Args:
        query: [B, H, G, T, Dh], times the scale; key, value: [B, H, T, Dh].
        documents: [B, T] as ``attention_mask``. A pad sees other pads; nobody reads what it gets.
        name: "splash" (Pallas, on TPU) or "cudnn" (bfloat16, on GPU; its mask is [B, 1, T, T] in
            bfloat16).
        window: as in ``seen_in_text``.
    """
    shape, length = query.shape, query.shape[3]
    extra = -length % {"splash": 128, "cudnn": 2}[name]
    pads = ((0, 0), (0, 0), (0, extra), (0, 0))
    query, key, value = (
        jnp.pad(x, pads) for x in (query.reshape(shape[0], -1, *shape[3:]), key, value)
    )
    documents = jnp.pad(documents.astype(jnp.int32), pads[1:3])
    compute = _splash if name == "splash" else _cudnn
    return compute(query, key, value, documents, window)[:, :, :length].reshape(shape)


def _splash(query: Array, key: Array, value: Array, documents: Array, window: int | None) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    square = (query.shape[2], query.shape[2])
    mask = (
        masks.CausalMask(square) if window is None else masks.LocalMask(square, (window - 1, 0), 0)
    )
    attend = kernel.make_splash_mha(
        masks.MultiHeadMask([mask] * query.shape[1]), head_shards=1, q_seq_shards=1
    )

    mixed: Array = jax.vmap(attend)(query, key, value, kernel.SegmentIds(documents, documents))
    return mixed


def _cudnn(query: Array, key: Array, value: Array, documents: Array, window: int | None) -> Array:
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    mask, local = (
        visible(seen_in_text(documents, window)),
        None if window is None else (window - 1, 0),
    )
    mixed: Array = jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        scale=1.0,
        is_causal=True,
        local_window_size=local,
        implementation="cudnn",
    )
    return mixed.swapaxes(1, 2)
