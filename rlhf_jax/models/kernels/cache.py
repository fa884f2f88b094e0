"""The cache of a layer's keys and values in the layout that a platform reads fastest, and the
attention of one query to it.

[B, H, S, Dh] keys and values are held as
    cpu: [B, H, Dh, S] and [B, H, S, Dh], as the two products of one query read them;
    gpu: [B, H, S, Dh], as the products of a GPU read them;
    cudnn: [B, S, H, Dh], as cuDNN's attention reads them, on GPUs in bfloat16: no token copies them
        into its order;
    tpu: [B, S, H Dh]: heads of 64 would fill half of a tile's 128 lanes, and the cache of a GPT-2
        took 8.0 GiB in place of 2.4 (XLA:TPU for v5e, 64 rows, 1,024 slots).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import get_abstract_mesh

from rlhf_jax.models import kernels
from rlhf_jax.models.attention import MASKED
from rlhf_jax.models.kernels import fused

LayerCache = tuple[Array, Array]
# Axes of the slots in keys and values.
SLOTS = {"cpu": (3, 2), "gpu": (2, 2), "cudnn": (1, 1), "tpu": (1, 1)}


def layout(dtype: Any) -> str:
    """The layout of a cache of this dtype in the program that is being traced."""
    platform = fused.platform()
    return "cudnn" if platform == "gpu" and dtype == jnp.bfloat16 else platform


def held(key: Array, value: Array) -> LayerCache:
    """[B, H, S, Dh] keys and values in the platform's layout."""
    form = layout(value.dtype)
    if form == "cpu":
        return key.mT, value
    if form == "tpu":
        return _merged(key), _merged(value)
    if form == "cudnn":
        return _swapped(key), _swapped(value)
    return key, value


def read(cache: LayerCache, num_heads: int) -> tuple[Array, Array]:
    """A cache as [B, H, S, Dh] keys and values."""
    keys, values = cache
    form = layout(values.dtype)
    if form == "cpu":
        return keys.mT, values
    if form == "tpu":
        return _apart(keys, num_heads), _apart(values, num_heads)
    if form == "cudnn":
        return _swapped(keys), _swapped(values)
    return keys, values


def _swapped(x: Array) -> Array:
    """[B, H, S, Dh] -> [B, S, H, Dh], and back."""
    return x.swapaxes(1, 2)


def _merged(x: Array) -> Array:
    """[B, H, S, Dh] -> [B, S, H Dh]."""
    by_slot = _swapped(x)
    return by_slot.reshape(*by_slot.shape[:2], -1)


def _apart(x: Array, num_heads: int) -> Array:
    """[B, S, H Dh] -> [B, H, S, Dh]."""
    by_slot = x.reshape(*x.shape[:2], num_heads, -1)
    return _swapped(by_slot)


def write(cache: LayerCache, new: LayerCache, index: Array | int) -> LayerCache:
    """The cache with new keys and values at slots index, index + 1, ..., each modulo S."""
    keys, values = cache
    of_keys, of_values = SLOTS[layout(values.dtype)]
    new_keys, new_values = new
    keys = _written(keys, new_keys, of_keys, index)
    values = _written(values, new_values, of_values, index)
    return keys, values


def _written(cache: Array, new: Array, axis: int, index: Array | int) -> Array:
    """Keys or values with new ones; ``axis`` is the axis of the slots."""
    size = cache.shape[axis]
    dropped = max(new.shape[axis] - size, 0)  # the cache holds the last S of more
    new = lax.slice_in_dim(new, dropped, None, axis=axis)
    new = new.astype(cache.dtype)
    index = index + dropped
    count = new.shape[axis]
    start = index % size if isinstance(index, int) else lax.rem(index, size)
    if count == 1 or (isinstance(start, int) and start + count <= size):
        return lax.dynamic_update_slice_in_dim(
            cache, new, start, axis=axis, allow_negative_indices=False
        )
    places = (start + jnp.arange(count)) % size
    before = (slice(None),) * axis
    return cache.at[(*before, places)].set(new)


def extend(
    cache: LayerCache,
    key: Array,
    value: Array,
    index: Array | None,
    num_keys: int,
) -> tuple[Array, Array, LayerCache]:
    """Writes ``key`` and ``value`` [B, H, t, Dh] of tokens to slots index, index + 1, ...; without
    an index the cache is empty.

    Returns:
        The ``num_keys`` keys and values that the tokens attend to, [B, H, S, Dh] each, and the
        cache.
    """
    heads = key.shape[1]
    start = 0 if index is None else index
    new = write(cache, held(key, value), start)
    held_keys, held_values = read(cache, heads)
    if num_keys == held_values.shape[2]:
        return *read(new, heads), new
    if num_keys > key.shape[2]:
        # A window's cache: writing drops keys that the first of these queries attend to.
        key = jnp.concatenate([held_keys, key], axis=2)
        value = jnp.concatenate([held_values, value], axis=2)
    return key, value, new


def attention(
    query: Array,
    cache: LayerCache,
    mask: Array,
) -> Array | None:
    """``attention.attention`` of one query to a cache, by a form for this platform; None if the
    caller must compute the plain formula.

    Args:
        query: [B, H, G, 1, Dh], times the scale.
        mask: [B, 1, 1, S] bool: the slots that it attends to.
    """
    mesh = get_abstract_mesh()
    is_cut = any(mesh.shape[axis] > 1 for axis in mesh.auto_axes)
    form = layout(cache[1].dtype)
    if form == "tpu" and not is_cut:  # or else XLA would sum scores over "tensor"
        return _all_heads(query, cache, mask)
    *_, width = query.shape
    if form == "cudnn" and fused.fits_cudnn(width):
        heads = query.shape[1]
        places = (1, 2, 2)
        return fused.on_each_device(_cudnn, heads, (query, *cache), mask, places)
    return None


def _all_heads(query: Array, cache: LayerCache, mask: Array) -> Array:
    """Every head's query times all heads' keys, of which the other heads' are multiplied by zeros:
    two products that read a merged cache in its layout. Reading the cache takes longer than these
    products.
    """
    keys, values = cache
    batch, heads, groups, _, width = query.shape
    own = jnp.eye(heads, dtype=query.dtype)
    spread = jnp.einsum("bhgtd,hk->bhgtkd", query, own)
    spread = spread.reshape(batch, heads * groups, -1)
    scores = jnp.einsum("bqe,bse->bqs", spread, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, 0], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    mixed = kernels.weighted_sum(weights[:, None], values[:, None])
    by_head = mixed.reshape(batch, heads, groups, 1, heads, width)
    own_mixed = jnp.einsum("bhgthd->bhgtd", by_head)
    return own_mixed.astype(values.dtype)


def _cudnn(query: Array, keys: Array, values: Array, mask: Array) -> Array:
    """cuDNN's attention, which does not read the slots after a row's last. Its mask is one number a
    slot, as there is one query.
    """
    batch, *_, width = query.shape
    num_slots = keys.shape[1]
    is_seen = mask[:, 0, 0]
    from_the_end = is_seen[:, ::-1]
    end = num_slots - jnp.argmax(from_the_end, axis=1)
    ones = jnp.ones(batch, jnp.int32)
    rows = query.reshape(batch, 1, -1, width)
    mixed = jax.nn.dot_product_attention(
        rows.astype(keys.dtype),
        keys,
        values,
        mask=mask,
        scale=1.0,
        query_seq_lengths=ones,
        key_value_seq_lengths=end.astype(jnp.int32),
        implementation="cudnn",
    )
    return mixed.reshape(query.shape)
