"""The one place where attention is computed, and the masks that say who sees whom.

Heads come before slots ([B, H, S, Dh]): a cache in that layout is read in order by every head while decoding.
"""

import jax
import jax.numpy as jnp

# Finite, so that a query that sees nothing (a pad) gets a uniform distribution instead of NaN.
MASKED = -1e30


def positions(attention_mask: jax.Array) -> jax.Array:
    """Position of each token within its document: ``cumsum(mask) - mask``, restarting at every packed document.

    Args:
        attention_mask: [B, T], 0 on pads; packed documents carry different numbers and are contiguous.

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


def causal_mask(attention_mask: jax.Array, window: int | None = None) -> jax.Array:
    """Who sees whom in a full forward: earlier real tokens of the same document, and oneself.

    Args:
        attention_mask: [B, T], 0 on pads; packed documents carry different numbers.
        window: tokens seen, oneself included; None: all.

    Returns:
        [B, 1, T, T] bool, queries before keys.
    """
    length = attention_mask.shape[1]
    earlier = _earlier(jnp.arange(length), length, window)
    same = attention_mask[:, :, None] == attention_mask[:, None, :]
    return (earlier & same & (attention_mask != 0)[:, None, :])[:, None]


def _earlier(queries: jax.Array, slots: int, window: int | None) -> jax.Array:
    """[1, queries, slots] bool: whether each slot is the query's own or one before it, within the window."""
    distance = queries[:, None] - jnp.arange(slots)[None, :]
    return ((distance >= 0) & (distance < (slots if window is None else window)))[None]


def cache_mask(key_mask: jax.Array, index: jax.Array | int, queries: int, window: int | None = None) -> jax.Array:
    """Who sees whom while decoding: the query at slot s sees slots up to s whose ``key_mask`` is non-zero.

    Args:
        key_mask: [B, S], 0 on empty and padded slots.
        index: [] slot of the first query.
        queries: their number.
        window: as in ``causal_mask``.

    Returns:
        [B, 1, queries, S] bool.
    """
    earlier = _earlier(index + jnp.arange(queries), key_mask.shape[1], window)
    return (earlier & (key_mask != 0)[:, None, :])[:, None]


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    scale: jax.Array | float,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Scaled dot-product attention; scores and softmax in float32 whatever the inputs' dtype.

    Args:
        query: [B, H, T, Dh].
        key, value: [B, H, S, Dh].
        mask: [B, 1, T, S] bool, true where the query sees the key.
        scale: [] factor of the scores.
        dropout: rate at which attention weights are dropped, where ``dropout_key`` is given.
        dropout_key: PRNG key, or None.

    Returns:
        [B, H, T, Dh] in the dtype of ``value``; finite also for a query that sees nothing.
    """
    scores = jnp.einsum("bhtd,bhsd->bhts", query, key, preferred_element_type=jnp.float32) * scale
    weights = jax.nn.softmax(jnp.where(mask, scores, MASKED), axis=-1)
    if dropout_key is not None and dropout > 0.0:
        keep = jax.random.bernoulli(dropout_key, 1.0 - dropout, weights.shape)
        weights = jnp.where(keep, weights / (1.0 - dropout), 0.0)
    return jnp.einsum("bhts,bhsd->bhtd", weights.astype(value.dtype), value)
