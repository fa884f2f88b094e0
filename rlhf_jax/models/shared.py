"""Rows that share their prompts: each prompt is computed once for its group of G adjacent rows.

A forward pass packs a group into one row, [prompt (P) | response 0 (R) | ... | response G - 1 (R)],
so that linear layers and norms see P + G R tokens in place of G (P + R). In attention a response's
queries attend to two parts, the group's prompt and their own response, whose results are joined by
their normalizers: the prompt's keys are never copied G times (Juravsky et al. 2024, arXiv
2402.05099; Prefix Grouper, arXiv 2506.05433). While decoding, the prompts' cache [N, P] lies beside
the cache of the responses [N G, R]. Packed documents cannot share prompts.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from rlhf_jax.models import attention
from rlhf_jax.models.attention import MASKED, Columns, Seen, pick
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.kernels import cache as caches
from rlhf_jax.models.kernels.cache import LayerCache


class Groups(NamedTuple):
    """How rows [N G, T] share prompts: the first ``prompt_length`` columns, tokens and mask, are
    equal in each ``size`` adjacent rows.
    """

    prompt_length: int  # P, at least 1
    size: int  # G

    def packed(self, x: Array) -> Array:
        """[N G, T, ...] -> [N, P + G R, ...]: the first row's prompt, then the responses."""
        rows = x.reshape(-1, self.size, *x.shape[1:])
        prompt = rows[:, 0, : self.prompt_length]
        responses = rows[:, :, self.prompt_length :]
        flat = responses.reshape(len(rows), -1, *x.shape[2:])
        return jnp.concatenate([prompt, flat], axis=1)

    def unpacked(self, x: Array, num_prompt: int) -> Array:
        """[N, num_prompt + G R, ...] -> [N G, num_prompt + R, ...], the inverse of ``packed`` for
        the last ``num_prompt`` columns of the prompt.
        """
        prompt, flat = jnp.split(x, [num_prompt], axis=1)
        responses = flat.reshape(len(x), self.size, -1, *x.shape[2:])
        shape = (len(x), self.size, *prompt.shape[1:])
        prompts = jnp.broadcast_to(prompt[:, None], shape)
        rows = jnp.concatenate([prompts, responses], axis=2)
        return rows.reshape(-1, *rows.shape[2:])

    def places(self, columns: Array, length: int) -> Array:
        """[N G, n] columns of rows of ``length`` -> [N, G n] columns of the packed rows."""
        size = length - self.prompt_length
        by_group = columns.reshape(-1, self.size, columns.shape[1])
        moved = by_group + size * jnp.arange(self.size)[None, :, None]
        places = jnp.where(by_group < self.prompt_length, by_group, moved)
        return places.reshape(len(by_group), -1)


class SeenInGroups(NamedTuple):
    """The causal mask of packed groups: a response attends to its own tokens and to its prompt."""

    prompt: Seen  # of the prompts alone
    real: Array  # [N, G, R] bool, of the responses
    window: Array | int  # keys that a query attends to, its own included
    masks: tuple[Array, Array] | None = None
    """``masks_at`` of all columns of the responses, made once for all layers."""


class Part(NamedTuple):
    """Attention to a part of the keys; ``joined`` gives the attention to all of them."""

    weighted: Array  # [..., Dh] float32, the sum of the values times exp(score - highest)
    highest: Array  # [..., 1], the largest score
    total: Array  # [..., 1], the sum of exp(score - highest)


class Prompts(NamedTuple):
    """The prompts of a batch while it is decoded, written by ``Model.decode``."""

    cache: tuple[LayerCache, ...]  # of N prompts
    mask: Array  # [N, P], 0 on pads


class Beside(NamedTuple):
    """The caches of a layer, and which of the prompt's slots the next token attends to."""

    prompt: LayerCache  # [N, ...]
    own: LayerCache  # [N G, ...]
    mask: Array  # [N, slots of the prompt] bool


def seen(
    config: TransformerConfig, attention_mask: Array, groups: Groups, window: int | None = None
) -> SeenInGroups:
    """The mask of rows [N G, T] with this ``attention_mask``, 0 on pads."""
    by_group = attention_mask.reshape(-1, groups.size, attention_mask.shape[1])
    real = by_group != 0
    prompt = real[:, 0, : groups.prompt_length].astype(jnp.int32)
    of_prompt = attention.prepared(config, attention.seen_in_text(prompt, window))
    length = attention_mask.shape[1]
    whole = SeenInGroups(of_prompt, real[:, :, groups.prompt_length :], window or length)
    if implementation(config, length) == "blockwise":
        return whole
    return whole._replace(masks=masks_at(whole, jnp.arange(whole.real.shape[2])))


def implementation(config: TransformerConfig, length: int) -> str:
    """How responses attend: "xla", or "blockwise" where the config names any other form, or for
    "auto" where rows are long.
    """
    if config.attention == "auto":
        return "xla" if length < attention.LONG else "blockwise"
    return "xla" if config.attention == "xla" else "blockwise"


def masks_at(seen: SeenInGroups, columns: Array) -> tuple[Array, Array]:
    """Whether the queries in the given columns [r] of the responses attend to a prompt's keys, [N,
    1, 1, r, P], and to those of their own response, [N, 1, G, 1, r, R].
    """
    num_prompt = len(seen.prompt.key_slots)
    to_prompt = num_prompt + columns[:, None] - seen.prompt.key_slots[None]
    is_near = (to_prompt < seen.window)[None] & (seen.prompt.key_documents != 0)[:, None]
    distance = columns[:, None] - jnp.arange(seen.real.shape[2])[None]
    is_before = (distance >= 0) & (distance < seen.window)
    of_own = is_before[None, None] & seen.real[:, :, None]
    return is_near[:, None, None], of_own[:, None, :, None]


def mix(
    config: TransformerConfig,
    query: Array,
    key: Array,
    value: Array,
    seen: SeenInGroups,
    is_local: Array | bool,
    columns: Columns,
) -> Array:
    """Attention of packed groups, in the given columns: None, a slice that ends with the row, or
    indices.

    Args:
        query: [N, H, g, P + G R, Dh], times the scale: g queries share a head of keys.
        key, value: [N, H, P + G R, Dh].

    Returns:
        [N, H, g, n, Dh].
    """
    num_prompt = len(seen.prompt.key_slots)
    of_prompt = None
    if isinstance(columns, slice):
        of_prompt = slice(columns.start, num_prompt)
    query, own_query = jnp.split(query, [num_prompt], axis=3)
    key, own_key = jnp.split(key, [num_prompt], axis=2)
    value, own_value = jnp.split(value, [num_prompt], axis=2)
    prompt = attention.mix(config, query, key, value, seen.prompt, None, is_local, of_prompt)

    batch, heads, shared, _, width = own_query.shape
    size = seen.real.shape[1]

    def by_group(x: Array) -> Array:
        """[N, H, ..., G R, Dh] -> [N, H, ..., G, R, Dh]."""
        return x.reshape(*x.shape[:-2], size, -1, width)

    arrays = (key, value, by_group(own_key), by_group(own_value), seen)
    rows = by_group(own_query).swapaxes(2, 3)  # [N, H, G, g, R, Dh]
    own = _responses(rows, *arrays).swapaxes(2, 3).reshape(batch, heads, shared, -1, width)
    mixed = jnp.concatenate([prompt, own], axis=3)
    return pick(mixed, columns, axis=3) if isinstance(columns, Array) else mixed


def _responses(
    query: Array, key: Array, value: Array, own_key: Array, own_value: Array, seen: SeenInGroups
) -> Array:
    """[N, H, G, g, R, Dh] queries of the responses, prompts' keys and values [N, H, P, Dh] and own
    ones [N, H, G, R, Dh] -> [N, H, G, g, R, Dh].
    """

    def attend(query: Array, masks: tuple[Array, Array]) -> Array:
        to_prompt, to_own = masks
        num_groups = query.shape[2] * query.shape[3]
        flat = query.reshape(*query.shape[:2], num_groups, *query.shape[4:])
        parts = [
            _part("bhgrd,bhsd->bhgrs", "bhgrs,bhsd->bhgrd", flat, key, value, to_prompt),
            _part(
                "bhgqrd,bhgsd->bhgqrs", "bhgqrs,bhgsd->bhgqrd", query, own_key, own_value, to_own
            ),
        ]
        own = parts[1]
        prompt = Part(*(x.reshape(y.shape) for x, y in zip(parts[0], own, strict=True)))
        return joined(prompt, own).astype(value.dtype)

    if seen.masks is not None:
        return attend(query, seen.masks)

    def of_block(_: Array, query: Array, columns: Array) -> Array:
        return attend(query, masks_at(seen, columns))

    num_keys = key.shape[2] + own_key.shape[3]
    size = max(attention.BLOCK_SCORES // num_keys, 1)
    columns = jnp.arange(own_key.shape[3])
    mixed: Array = attention.by_blocks(of_block, size, (query, 4), (columns, 0))
    return mixed


def _part(
    to_scores: str, to_values: str, query: Array, key: Array, value: Array, mask: Array
) -> Part:
    """Attention to some of the keys by two products; the mask broadcasts against the scores."""
    scores = jnp.einsum(to_scores, query, key, preferred_element_type=jnp.float32)
    scores += jnp.where(mask, 0.0, MASKED)
    highest = lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores - highest)
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights.astype(value.dtype)
    weighted = jnp.einsum(to_values, weights, value, preferred_element_type=jnp.float32)
    return Part(weighted, highest, total)


def joined(first: Part, second: Part) -> Array:
    """The attention to the keys of both parts, in float32."""
    highest = jnp.maximum(first.highest, second.highest)
    of_first = jnp.exp(first.highest - highest)
    of_second = jnp.exp(second.highest - highest)
    weighted = of_first * first.weighted + of_second * second.weighted
    total = of_first * first.total + of_second * second.total
    return weighted * (1.0 / total)


def beside(
    config: TransformerConfig, prompts: Prompts, cache: tuple[LayerCache, ...], index: Array
) -> tuple[Beside, ...]:
    """The caches of each layer for a token in slot ``index`` of the responses."""
    length = prompts.mask.shape[1]
    masks = []
    for window in config.windows:
        size = min(window or length, length)
        # A window's cache holds slot s at place s % size.
        newest = length - 1
        slots = newest - (newest - jnp.arange(size)) % size
        is_near = length + index - slots < (window or length + index + 1)
        is_near = jnp.broadcast_to(is_near, (len(prompts.mask), size))
        masks.append((prompts.mask[:, slots] != 0) & is_near)
    layers = zip(prompts.cache, cache, config.local_layers, strict=True)
    return tuple(Beside(prompt, own, masks[is_local]) for prompt, own, is_local in layers)


def after_prompts(query: Array, key: Array, value: Array, prompt: Beside, seen: Seen) -> Array:
    """Attention of one token in each row to its response so far and to its group's prompt.

    Args:
        query: [N G, H, g, 1, Dh], times the scale.
        key, value: [N G, H, S, Dh], of the response so far.

    Returns:
        [N G, H, g, 1, Dh].
    """
    batch, heads, shared, _, width = query.shape
    prompt_key, prompt_value = caches.read(prompt.prompt, heads)
    num_prompts = len(prompt.mask)
    by_prompt = query.reshape(num_prompts, -1, heads, shared, width).swapaxes(1, 2)
    flat = by_prompt.reshape(num_prompts, heads, -1, width)  # [N, H, G g, Dh]
    mask = prompt.mask[:, None, None]
    of_group = _part("bhtd,bhsd->bhts", "bhts,bhsd->bhtd", flat, prompt_key, prompt_value, mask)

    def of_rows(x: Array) -> Array:
        """[N, H, G g, ...] -> [N G, H, g, ...]."""
        by_row = x.reshape(num_prompts, heads, -1, shared, x.shape[-1]).swapaxes(1, 2)
        return by_row.reshape(batch, heads, shared, -1)

    rows = query[:, :, :, 0]
    own_mask = attention.visible(seen)
    own = _part("bhtd,bhsd->bhts", "bhts,bhsd->bhtd", rows, key, value, own_mask)
    mixed = joined(Part(*map(of_rows, of_group)), own)
    return mixed[:, :, :, None].astype(value.dtype)
