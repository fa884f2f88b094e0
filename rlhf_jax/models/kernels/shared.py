"""Rows that share their prompts: each prompt is computed once for its group of G adjacent rows.

A forward pass packs a group into one row, [prompt (P) | response 0 (R) | ... | response G - 1 (R)],
so that linear layers and norms see P + G R tokens in place of G (P + R). In attention a response's
queries attend to two parts, the group's prompt and their own response, whose results are joined by
their normalizers: the prompt's keys are never copied G times (Juravsky et al. 2024, arXiv
2402.05099; Prefix Grouper, arXiv 2506.05433). While decoding, the prompts' cache [N, P] lies beside
the cache of the responses [N G, R].

Comparisons, whose answers are given, lie in one row of a batch already, behind their prompt:
``answers`` says where, and ``attention.visible`` what they see.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from rlhf_jax.models import attention
from rlhf_jax.models.attention import MASKED, Columns, Seen, pick
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.kernels import cache as caches
from rlhf_jax.models.kernels import fused
from rlhf_jax.models.kernels.cache import LayerCache


class Groups(NamedTuple):
    """How rows [N G, T] share prompts: the first ``prompt_length`` columns, tokens and mask, are
    equal in each ``size`` adjacent rows.
    """

    prompt_length: int  # P, at least 1
    size: int  # G

    def packed(self, x: Array) -> Array:
        """[N G, T, ...] -> [N, P + G R, ...]: the first row's prompt, then the responses."""
        length, *further = x.shape[1:]
        rows = x.reshape(-1, self.size, length, *further)
        first = rows[:, 0]
        prompt = lax.slice_in_dim(first, 0, self.prompt_length, axis=1)
        responses = lax.slice_in_dim(rows, self.prompt_length, length, axis=2)
        flat = responses.reshape(len(rows), -1, *further)
        return jnp.concatenate([prompt, flat], axis=1)

    def unpacked(self, x: Array, num_prompt: int) -> Array:
        """[N, num_prompt + G R, ...] -> [N G, num_prompt + R, ...], the inverse of ``packed`` for
        the last ``num_prompt`` columns of the prompt.
        """
        prompt, flat = jnp.split(x, [num_prompt], axis=1)
        further = x.shape[2:]
        responses = flat.reshape(len(x), self.size, -1, *further)
        copies = (len(x), self.size, num_prompt, *further)
        prompts = jnp.broadcast_to(prompt[:, None], copies)
        rows = jnp.concatenate([prompts, responses], axis=2)
        return rows.reshape(-1, *rows.shape[2:])

    def places(self, columns: Array, length: int) -> Array:
        """[N G, n] columns of rows of ``length`` -> [N, G n] columns of the packed rows."""
        num_columns = columns.shape[1]
        by_group = columns.reshape(-1, self.size, num_columns)
        size = length - self.prompt_length
        starts = size * jnp.arange(self.size)
        moved = by_group + starts[None, :, None]
        in_prompt = by_group < self.prompt_length
        places = jnp.where(in_prompt, by_group, moved)
        return places.reshape(len(by_group), -1)


class SeenInGroups(NamedTuple):
    """The causal mask of packed groups: a response attends to its own tokens and to its prompt."""

    prompt: Seen  # of the prompts alone
    real: Array  # [N, G, R] bool, of the responses
    window: Array | int  # keys that a query attends to, its own included
    masks: tuple[Array, Array] | None = None
    """``masks_at`` of all columns of the responses, made once for all layers."""
    by_row: tuple[Seen, Array] | None = None
    """What the rows [N G, P + R] see by their lengths, and where in them their texts begin."""


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


class Answers(NamedTuple):
    """Where packed answers stand that follow a prompt which is packed once, before them."""

    is_first: Array  # [B, T] bool: the first token of an answer
    prompt_end: Array  # [B, T] the column of the last prompt token up to each column
    positions: Array  # [B, T] of the tokens; an answer's go on behind its prompt's

    @property
    def previous(self) -> Array:
        """[B, T] the column whose state predicts the token of a column."""
        columns = jnp.arange(self.is_first.shape[1])[None]
        return jnp.where(self.is_first, self.prompt_end, columns - 1)


def answers(attention_mask: Array, num_answers: int) -> Answers:
    """Where the answers of a packed batch stand.

    Args:
        attention_mask: [B, T], 0 on pads; prompts and answers are numbered as in
            ``attention.prompt_of``, and the answers of a prompt follow it.
    """
    alone = attention.positions(attention_mask)
    columns = jnp.broadcast_to(jnp.arange(alone.shape[1]), alone.shape)
    real = attention_mask != 0
    in_prompt = attention.prompt_of(attention_mask, num_answers) == attention_mask
    last = jnp.where(real & in_prompt, columns, 0)
    prompt_end = lax.cummax(last, axis=1)
    in_answer = real & ~in_prompt
    before = jnp.take_along_axis(alone, prompt_end, axis=1) + 1
    behind = alone + jnp.where(in_answer, before, 0)
    return Answers(in_answer & (alone == 0), prompt_end, behind)


def seen_by_answers(
    attention_mask: Array, positions: Array, num_answers: int, window: int | None = None
) -> Seen:
    """The causal mask of packed prompts and answers: a token attends to earlier tokens of its
    document, and an answer's to all of its prompt.

    Args:
        attention_mask, num_answers: as in ``answers``, and its ``positions``.
        window: as in ``attention.seen_in_text``.
    """
    size = window or attention_mask.shape[1]
    of_keys = (positions, attention_mask)
    return Seen(positions, attention_mask, *of_keys, size, num_answers=num_answers)


def seen(
    config: TransformerConfig,
    attention_mask: Array,
    groups: Groups,
    one_text: bool = False,
    window: int | None = None,
) -> SeenInGroups:
    """The mask of rows [N G, T] with this ``attention_mask``, 0 on pads. ``one_text``: the real
    tokens of each row lie side by side.
    """
    length = attention_mask.shape[1]
    by_group = attention_mask.reshape(-1, groups.size, length)
    prompt, response = jnp.split(by_group != 0, [groups.prompt_length], axis=2)
    first = prompt[:, 0]
    alone = attention.seen_in_text(first.astype(jnp.int32), window)
    of_prompt = attention.prepared(config, alone)
    whole = SeenInGroups(of_prompt, response, window or length)
    if one_text and attention.takes_lengths(config, length):
        starts = jnp.argmax(attention_mask != 0, axis=1)
        return whole._replace(by_row=(attention.seen_of_lengths(attention_mask, window), starts))
    if not is_plain(config, length):
        return whole
    columns = jnp.arange(response.shape[2])
    return whole._replace(masks=masks_at(whole, columns))


def is_plain(config: TransformerConfig, length: int) -> bool:
    """Whether a product gives all scores of the responses at once; else one block after another."""
    name = config.attention
    return name == "xla" or (name == "auto" and length < attention.LONG)


def masks_at(seen: SeenInGroups, columns: Array) -> tuple[Array, Array]:
    """Whether the queries in the given columns [r] of the responses attend to a prompt's keys, [N,
    1, 1, r, P], and to those of their own response, [N, 1, G, 1, r, R].
    """
    slots = columns[:, None]
    keys = seen.prompt.key_slots[None]
    distance = keys.size + slots - keys
    is_near = distance < seen.window
    is_real = seen.prompt.key_documents != 0
    to_prompt = is_near[None] & is_real[:, None]

    own_keys = jnp.arange(seen.real.shape[2])
    distance = slots - own_keys[None]
    is_before = (distance >= 0) & (distance < seen.window)
    to_own = is_before[None, None] & seen.real[:, :, None]
    return to_prompt[:, None, None], to_own[:, None, :, None]


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
    if seen.by_row is not None:
        groups = Groups(num_prompt, seen.real.shape[1])
        mixed = row_by_row(config, groups, query, key, value, *seen.by_row, is_local)
        return pick(mixed, columns, axis=3)

    of_prompt = None
    if isinstance(columns, slice):
        of_prompt = slice(columns.start, num_prompt)
    query, own_query = jnp.split(query, [num_prompt], axis=3)
    key, own_key = jnp.split(key, [num_prompt], axis=2)
    value, own_value = jnp.split(value, [num_prompt], axis=2)
    arrays = (query, key, value)
    prompt = attention.mix(config, *arrays, seen.prompt, None, is_local, of_prompt)

    by_row = of_each(own_query, seen)
    rows = by_row.swapaxes(2, 3)  # [N, H, G, g, R, Dh]
    own = (of_each(own_key, seen), of_each(own_value, seen))
    responses = of_responses(rows, (key, value), own, seen)
    flat = responses.swapaxes(2, 3).reshape(own_query.shape)
    mixed = jnp.concatenate([prompt, flat], axis=3)
    return pick(mixed, columns, axis=3) if isinstance(columns, Array) else mixed


def row_by_row(
    config: TransformerConfig,
    groups: Groups,
    query: Array,
    key: Array,
    value: Array,
    seen: Seen,
    starts: Array,
    is_local: Array | bool,
) -> Array:
    """``mix`` of rows that hold one text each, by a causal kernel that reads lengths and no mask.
    Each response has a copy of its prompt's queries, keys and values.
    """

    def rows(x: Array) -> Array:
        """[N, ..., P + G R, Dh] -> [N G, ..., P + R, Dh], the texts from column 0 on."""
        by_column = jnp.moveaxis(x, -2, 1)
        own = groups.unpacked(by_column, groups.prompt_length)
        return jnp.moveaxis(fused.turned(own, starts), 1, -2)

    arrays = (rows(query), rows(key), rows(value))
    mixed = attention.mix(config, *arrays, seen, None, is_local, None)
    by_column = jnp.moveaxis(mixed, -2, 1)
    packed = groups.packed(fused.turned(by_column, -starts))
    return jnp.moveaxis(packed, 1, -2)


def of_each(x: Array, seen: SeenInGroups) -> Array:
    """[..., G R, Dh] -> [..., G, R, Dh]."""
    *leading, _, width = x.shape
    _, size, length = seen.real.shape
    return x.reshape(*leading, size, length, width)


def of_responses(
    query: Array,
    prompt: LayerCache,
    own: LayerCache,
    seen: SeenInGroups,
) -> Array:
    """Attention of the responses, all at once or one block of their columns after another.

    Args:
        query: [N, H, G, g, R, Dh].
        prompt: keys and values of the prompts, [N, H, P, Dh] each.
        own: keys and values of the responses, [N, H, G, R, Dh] each.

    Returns:
        [N, H, G, g, R, Dh].
    """

    def attend(query: Array, masks: tuple[Array, Array]) -> Array:
        to_prompt, to_own = masks
        *leading, size, shared, length, width = query.shape
        of_prompt = query.reshape(*leading, size * shared, length, width)
        forms = ("bhgrd,bhsd->bhgrs", "bhgrs,bhsd->bhgrd")
        first = part(forms, of_prompt, prompt, to_prompt)
        forms = ("bhgqrd,bhgsd->bhgqrs", "bhgqrs,bhgsd->bhgqrd")
        second = part(forms, query, own, to_own)
        like_second = Part(*map(jnp.reshape, first, (x.shape for x in second)))
        mixed = joined(like_second, second)
        return mixed.astype(query.dtype)

    if seen.masks is not None:
        return attend(query, seen.masks)

    def of_block(_: Array, query: Array, columns: Array) -> Array:
        return attend(query, masks_at(seen, columns))

    length = query.shape[4]
    num_keys = length + len(seen.prompt.key_slots)
    size = max(attention.BLOCK_SCORES // num_keys, 1)
    columns = jnp.arange(length)
    mixed: Array = attention.by_blocks(of_block, size, (query, 4), (columns, 0))
    return mixed


def part(
    forms: tuple[str, str],
    query: Array,
    held: LayerCache,
    mask: Array,
) -> Part:
    """Attention to some of the keys.

    Args:
        forms: of the products of queries and keys, and of weights and values, for ``einsum``.
        held: the keys and values.
        mask: whether a query attends to a key; broadcasts against the scores.
    """
    to_scores, to_values = forms
    key, value = held
    scores = jnp.einsum(to_scores, query, key, preferred_element_type=jnp.float32)
    scores += jnp.where(mask, 0.0, MASKED)
    highest = scores.max(axis=-1, keepdims=True)
    highest = lax.stop_gradient(highest)
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
    weighted = of_first * first.weighted
    weighted += of_second * second.weighted
    total = of_first * first.total
    total += of_second * second.total
    return weighted * (1.0 / total)


def beside(
    config: TransformerConfig,
    prompts: Prompts,
    cache: tuple[LayerCache, ...],
    index: Array,
) -> tuple[Beside, ...]:
    """The caches of each layer for a token in slot ``index`` of the responses."""
    length = prompts.mask.shape[1]
    newest = length - 1
    masks = []
    for window in config.windows:
        # A window's cache holds slot s at place s % size.
        size = min(window or length, length)
        places = jnp.arange(size)
        slots = newest - (newest - places) % size
        is_real = prompts.mask[:, slots] != 0
        if window is not None:
            distance = length + index - slots
            is_near = distance < window
            is_real &= is_near[None]
        masks.append(is_real)
    of_layers = [masks[is_local] for is_local in config.local_layers]
    return tuple(map(Beside, prompts.cache, cache, of_layers))


def after_prompts(
    query: Array,
    key: Array,
    value: Array,
    prompt: Beside,
    seen: Seen,
) -> Array:
    """Attention of one token in each row to its response so far and to its group's prompt.

    Args:
        query: [N G, H, g, 1, Dh], times the scale.
        key, value: [N G, H, S, Dh], of the response so far.

    Returns:
        [N G, H, g, 1, Dh].
    """
    batch, heads, shared, _, width = query.shape
    num_prompts = len(prompt.mask)
    by_row = query.reshape(num_prompts, -1, heads, shared, width)
    by_head = by_row.swapaxes(1, 2)
    flat = by_head.reshape(num_prompts, heads, -1, width)  # [N, H, G g, Dh]
    forms = ("bhtd,bhsd->bhts", "bhts,bhsd->bhtd")
    held = caches.read(prompt.prompt, heads)
    of_group = part(forms, flat, held, prompt.mask[:, None, None])

    def of_rows(x: Array) -> Array:
        """[N, H, G g, n] -> [N G, H, g, n]."""
        last = x.shape[-1]
        by_head = x.reshape(num_prompts, heads, -1, shared, last)
        by_row = by_head.swapaxes(1, 2)
        return by_row.reshape(batch, heads, shared, last)

    rows = query.reshape(batch, heads, shared, width)
    own = part(forms, rows, (key, value), attention.visible(seen))
    mixed = joined(Part(*map(of_rows, of_group)), own)
    return mixed.reshape(query.shape).astype(value.dtype)
