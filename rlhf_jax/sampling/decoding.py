"""Sampling from a language model with a KV cache: one pure function that the caller jits.

The randomness of a row is ``fold_in(fold_in(key, place), position)``; position counts response
slots from 0. So the tokens of a row depend neither on its neighbours, nor on prompt padding, nor on
the number of devices (up to ties within the rounding of the logits).

The sampler needs two functions of a model, ``init_cache`` and ``decode`` (see ``CachedModel``);
``uncached`` makes them from a forward pass.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from rlhf_jax import models, ops
from rlhf_jax.models.kernels.shared import Prompts
from rlhf_jax.parallel import blocks, sharding
from rlhf_jax.sampling import sharded
from rlhf_jax.types import EosId, Params, RewardFn, Rollout, known

# Most ids of a recorded support: 4 KiB a token.
MOST_RECORDED = 1024


@dataclass(frozen=True)
class SamplingConfig:
    """How to sample. Hashable, so it can be a static argument of jit.

    Args:
        max_new_tokens: response slots R.
        temperature: divides the logits, at least 1e-6; 0 takes the likeliest (of equals the first).
        top_k: keep the k most likely tokens, and those that tie with the k-th; None keeps all.
        top_p: of those, keep the smallest set of most likely tokens whose probability reaches p
            (nucleus sampling, Holtzman et al. 2020). The token that reaches p is kept, so at least
            one is; None or 1 keeps all.
        min_p: of those, drop the tokens less likely than min_p times the likeliest one (Nguyen et
            al. 2024); None or 0 keeps all.
        repetition_penalty: divides the positive logits, and multiplies the negative ones, of all
            tokens of the prompt and of the response so far (Keskar et al. 2019); 1 changes nothing.
        eos_id: the token that ends a response, or several any of which ends it; None lets every
            response run to ``max_new_tokens``.
        pad_id: fills the columns after the end; may lie outside the vocabulary, and may be an EOS:
            a response ends where its mask does.
        min_new_tokens: no EOS is sampled in so many first slots of a response; it then has at least
            so many tokens, none of them an EOS.
        record_support: whether rollouts say among which ids each token was drawn
            (``Rollout.support``), and their log-probs are those among these ids: what an update on
            samples of top-k, top-p, min-p or ``min_new_tokens`` needs. Their number must be
            bounded, by ``top_k`` or by the vocabulary: at most ``MOST_RECORDED``. Of tokens that
            tie with the k-th the lowest ids stay then, k in all. A repetition penalty cannot be
            recorded.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = field(default=None, kw_only=True)
    repetition_penalty: float = field(default=1.0, kw_only=True)
    eos_id: EosId | None = field(kw_only=True)
    pad_id: int = field(kw_only=True)
    record_support: bool = field(default=False, kw_only=True)
    min_new_tokens: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, jax.core.Tracer):
                raise ValueError(
                    f"{name} is traced, and a SamplingConfig is a static argument of jit: give it "
                    "numbers, one config for each; models.policy_fn takes a traced temperature"
                )
        ops.check_numbers(self, "max_new_tokens", "top_k", at_least=1)
        ops.check_temperature("temperature", self.temperature)
        ops.check_numbers(self, "repetition_penalty", at_least=1e-6, below=math.inf)
        ops.check_numbers(self, "top_p", above=0, at_most=1)
        ops.check_numbers(self, "min_p", at_least=0, at_most=1)
        ops.check_numbers(self, "pad_id", "min_new_tokens", at_least=0)
        ops.check_number("min_new_tokens", self.min_new_tokens, at_most=self.max_new_tokens)
        for eos_id in self.eos_ids:
            ops.check_number("eos_id", eos_id, at_least=0)
        if self.record_support and self.repetition_penalty != 1:
            raise ValueError(
                f"repetition_penalty {self.repetition_penalty} changes probabilities inside the "
                "support too: record_support needs 1"
            )

    @property
    def truncates(self) -> bool:
        """Whether tokens are drawn from another distribution than the whole softmax at the
        temperature. Greedy tokens are not drawn.
        """
        limits = self.top_k is not None or self.top_p not in (None, 1) or bool(self.min_p)
        limits = limits or self.min_new_tokens > 0
        return self.temperature > 0 and (limits or self.repetition_penalty != 1)

    @property
    def records(self) -> bool:
        """Whether rollouts have ``support``."""
        return self.record_support and self.truncates

    def most_possible(self, vocab_size: int) -> int:
        """K, the most ids among which a token may be drawn.

        Raises:
            ValueError: ``record_support``, and they are more than ``MOST_RECORDED``.
        """
        most = min(self.top_k or vocab_size, vocab_size)
        if self.records and most > MOST_RECORDED:
            raise ValueError(
                f"top_k must be at most {MOST_RECORDED}, got {self.top_k}: an update must know "
                f"among which of the {vocab_size} tokens each one was drawn"
            )
        return most

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end a response; empty if none does."""
        if self.eos_id is None:
            return ()
        return self.eos_id if isinstance(self.eos_id, tuple) else (self.eos_id,)


class CachedModel(Protocol):
    """What the sampler needs of a model; ``models.Model`` has it. B rows, t tokens at once, S cache
    slots.
    """

    def init_cache(self, batch: int, length: int, /) -> Any:
        """An empty cache of ``length`` slots: any pytree."""

    def decode(
        self,
        params: Params,
        tokens: Array,
        positions: Array,
        key_mask: Array,
        cache: Any,
        index: Any,
        /,
    ) -> tuple[Array, Any]:
        """Logits [B, t, V] of the next tokens, and the cache with ``tokens`` [B, t] in slots index,
        ..., index + t - 1.

        ``positions`` [B, t] count a row's real tokens from 0. A token sees the slots up to its own
        whose ``key_mask`` [B, S] is not 0.
        """


def uncached(apply_fn: Callable[..., Array]) -> CachedModel:
    """Makes a CachedModel of ``apply_fn(params, tokens, attention_mask, key) -> logits [B, T, V]``.

    The cache is the tokens so far, and each new token costs a forward pass over all T columns.
    ``attention_mask`` is 0 in columns before the prompt and after the tokens so far; ``key`` is
    None. Hashable, as ``apply_fn`` is.
    """
    return _Uncached(apply_fn)


@dataclass(frozen=True)
class _Uncached:
    apply_fn: Callable[..., Array]

    def init_cache(self, batch: int, length: int, /) -> Array:
        return jnp.zeros((batch, length), jnp.int32)

    def decode(
        self,
        params: Params,
        tokens: Array,
        positions: Array,
        key_mask: Array,
        cache: Any,
        index: Any,
        /,
    ) -> tuple[Array, Array]:
        num_new = tokens.shape[1]
        cache = jax.lax.dynamic_update_slice_in_dim(cache, tokens, index, axis=1)
        written = jnp.arange(cache.shape[1]) < index + num_new
        logits = self.apply_fn(params, cache, jnp.where(written, key_mask, 0), None)
        return jax.lax.dynamic_slice_in_dim(logits, index, num_new, axis=1), cache


def mixture(model: CachedModel, weight: float) -> CachedModel:
    """The geometric mixture of two sets of parameters of a model: a CachedModel of params
    ``(first, second)`` whose tokens have the probabilities ``first^(1 - weight) *
    second^weight``, normalised for each token. Hashable, as ``model`` is.
    """
    ops.check_number("the mixture's weight", weight, at_least=0, at_most=1)
    return _Mixture(model, weight)


@dataclass(frozen=True)
class _Mixture:
    model: Any
    weight: float

    @property
    def config(self) -> Any:
        return getattr(self.model, "config", None)

    def for_decoding(self, params: Params) -> Params:
        return tuple(map(getattr(self.model, "for_decoding", lambda params: params), params))

    def init_cache(self, batch: int, length: int, /) -> Any:
        return self.model.init_cache(batch, length), self.model.init_cache(batch, length)

    def decode(self, params: Params, *inputs: Any) -> tuple[Array, Any]:
        *before, (cache, other_cache), index = inputs
        logits, cache = self.model.decode(params[0], *before, cache, index)
        others, other_cache = self.model.decode(params[1], *before, other_cache, index)
        return (1.0 - self.weight) * logits + self.weight * others, (cache, other_cache)


class Rows(NamedTuple):
    """The state of the sampler that stays the same from token to token."""

    key_mask: Array  # [B, T]
    num_real: Array  # [B] tokens of the prompt
    keys: Array  # [B]
    used: Array  # [B]
    prompts: Prompts | None = None
    """Of the groups of rows that share them; their last column is the first of the rows' own."""


class DecodeState(NamedTuple):
    """The state of the sampler that each token changes."""

    column: Array  # [] int32, of the last token
    tokens: Array  # [B, T]
    log_probs: Array  # [B, T]
    lengths: Array  # [B] response tokens so far
    ended: Array  # [B] bool
    cache: Any
    support: Array | None = None  # [B, T, K], see ``Rollout``


def generate(
    model: CachedModel,
    params: Params,
    tokens: Array,
    attention_mask: Array,
    key: Array,
    *,
    config: SamplingConfig,
    row_ids: Array | None = None,
    places: Array | None = None,
    mesh: Mesh | None = None,
    used: Array | None = None,
    group_size: int = 1,
) -> Rollout:
    """Samples a response to each prompt; stops when every row has ended.

    Args:
        tokens, attention_mask: [B, P], prompts padded on the left, so that column P - 1 of every
            row is a real token. A row whose mask is all zero is missing: it gets an empty response,
            and no other row waits for it.
        row_ids: [B] int32, the data row of each prompt, which the rollout records; None means
            ``places``.
        places: [B] int32, all different: row i samples with the key folded with ``places[i]``,
            whatever other rows there are. None: ``row_ids``, or 0..B-1; where a data row occurs
            again, its further answers get keys of their own. Parts of a batch that are sampled
            apart, as under the caller's ``shard_map``, need places of the whole batch.
        mesh: splits the rows over its "data" and "fsdp" axes (``sharded.map_rows``); each part
            stops when its own rows have ended. The tokens are the same as on one device.
        used: [B] for conversations of several turns, whose earlier responses stand at the end of
            the prompt: how many of a row's ``max_new_tokens`` slots they take.
            The row gets at most the others, and the randomness of a token is that of its slot. P
            then counts all slots too. None: no slot is taken.
        group_size: each G adjacent rows have the same prompt, which is run once and kept in a cache
            once; the tokens are those of separate rows. Rows whose groups do not divide over the
            parts of the batch, and networks that are not a ``models.Model``, are run separately.

    Returns:
        A Rollout with tokens, attention_mask, response_mask [B, T] int32, log_probs [B, T] float32
        and row_ids, where T = P + max_new_tokens. The response mask covers the sampled tokens, EOS
        included; the rest of a row is ``pad_id`` with log-prob 0. Every id can be sampled: a
        ``pad_id`` before the end is an ordinary token. Log-probs are those of the full softmax at
        ``config.temperature``, also under top-k, top-p, min-p and a repetition penalty; for
        temperature 0 they are those of temperature 1. With ``config.record_support`` the rollout
        has ``support`` [B, T, K], and log-probs are those among its ids.

    Raises:
        ValueError: outside ``jit``, a prompt is padded on the right, or the prompts of a group
            differ; the model has fewer positions.
    """
    _check_prompts(tokens, attention_mask, group_size)
    tokens = jnp.asarray(tokens, jnp.int32)
    attention_mask = jnp.asarray(attention_mask)
    places = _places(row_ids, len(tokens)) if places is None else jnp.asarray(places, jnp.int32)
    chex.assert_shape(places, (len(tokens),))
    row_ids = places if row_ids is None else jnp.asarray(row_ids, jnp.int32)
    # With ``used``, the prompt has all slots of earlier responses too.
    length = tokens.shape[1] + (config.max_new_tokens if used is None else 0)
    max_length = getattr(getattr(model, "config", None), "max_length", length)
    if length > max_length:
        raise ValueError(
            f"prompts of {length - config.max_new_tokens} tokens + max_new_tokens "
            f"{config.max_new_tokens} are more than the model's max_length {max_length}"
        )
    used = jnp.zeros_like(places) if used is None else used
    prompts = (tokens, attention_mask, places, used)
    for_decoding = getattr(model, "for_decoding", lambda params: params)
    decoding = for_decoding(params)  # once, not for each token
    # The pass over the prompt reads the original ones, which compiles faster.
    weights = (params, decoding)
    sample_rows = partial(_sample_rows, model, config, group_size)
    if mesh is None:
        sampled = blocks.map_rows(partial(sample_rows, weights, key), prompts)
    else:
        sampled = sharded.map_rows(sample_rows, model, weights, key, prompts, mesh)
    return replace(sampled, row_ids=row_ids)


def _places(row_ids: Array | None, num_rows: int) -> Array:
    """[B] int32, all different: the data rows, and -1 - i where row i has one that occurred before;
    0..B-1 without data rows.
    """
    rows = jnp.arange(num_rows, dtype=jnp.int32)
    if row_ids is None:
        return rows
    row_ids = jnp.asarray(row_ids, jnp.int32)
    chex.assert_shape(row_ids, (num_rows,))
    order = jnp.argsort(row_ids, stable=True)
    again = jnp.diff(row_ids[order], prepend=row_ids[order][:1] - 1) == 0
    return jnp.where(jnp.zeros(num_rows, bool).at[order].set(again), -1 - rows, row_ids)


def _check_prompts(tokens: Array, attention_mask: Array, group_size: int) -> None:
    """Raises AssertionError for other shapes than [B, P], and ValueError for a prompt that does not
    end in the last column, and for groups of different prompts; under ``jit``, where no values are
    known, only shapes are checked.
    """
    chex.assert_rank(tokens, 2)
    chex.assert_axis_dimension_gt(tokens, 1, 0)
    chex.assert_equal_shape([tokens, attention_mask])
    ops.check_number("group_size", group_size, at_least=1)
    if len(tokens) % group_size:
        raise ValueError(f"{len(tokens)} prompts do not divide by group_size {group_size}")
    ids, mask = known(tokens), known(attention_mask)
    if mask is None:
        return
    mask = mask != 0
    wrong = np.flatnonzero(mask.any(axis=1) & ~mask[:, -1])
    if len(wrong):
        raise ValueError(
            "prompts must be padded on the left: attention_mask is 0 in the last column of "
            f"{len(wrong)} rows, first in row {wrong[0]}"
        )
    if group_size == 1 or ids is None:
        return
    read = np.stack([np.where(mask, ids, 0), mask], axis=1)
    by_group = read.reshape(-1, group_size, *read.shape[1:])
    unlike = np.flatnonzero((by_group != by_group[:, :1]).any(axis=(1, 2, 3)))
    if len(unlike):
        raise ValueError(
            f"the {group_size} prompts of each group must be equal; those from row "
            f"{unlike[0] * group_size} on are not"
        )


def _sample_rows(
    model: CachedModel,
    config: SamplingConfig,
    group_size: int,
    weights: tuple[Params, ...],
    key: Array,
    prompts: tuple[Array, Array, Array, Array],
) -> Rollout:
    tokens, attention_mask, places, used = prompts
    prompt_length = tokens.shape[1]
    rows, begun = start(
        model,
        weights[0],
        tokens,
        attention_mask,
        key,
        max_new_tokens=config.max_new_tokens,
        pad_id=config.pad_id,
        places=places,
        used=used,
        group_size=group_size,
    )
    if config.records:
        next_of = partial(next_logits, model, prompt_length=prompt_length)
        logits, _ = jax.eval_shape(next_of, weights[-1], rows, begun)
        shape = (*begun.tokens.shape, config.most_possible(logits.shape[-1]))
        begun = begun._replace(support=jnp.full(shape, -1, jnp.int32))
    begun = sharding.vary(begun, (weights, key, prompts))
    end = jax.lax.while_loop(
        lambda state: ~jnp.all(state.ended),
        lambda state: step(model, weights[-1], rows, state, config=config),
        begun,
    )
    response = jnp.arange(config.max_new_tokens)[None, :] < end.lengths[:, None]
    response_mask = jnp.pad(response.astype(jnp.int32), ((0, 0), (prompt_length, 0)))
    prompt_mask = rows.key_mask.at[:, prompt_length:].set(0)
    return Rollout(
        tokens=end.tokens,
        attention_mask=prompt_mask + response_mask,
        response_mask=response_mask,
        log_probs=end.log_probs,
        prompt_length=prompt_length,
        temperature=config.temperature,
        support=end.support,
        truncated=config.truncates,
    )


def start(
    model: CachedModel,
    params: Params,
    tokens: Array,
    attention_mask: Array,
    key: Array,
    *,
    max_new_tokens: int,
    pad_id: int,
    places: Array,
    used: Array,
    group_size: int = 1,
) -> tuple[Rows, DecodeState]:
    """The state before the first token of each response; the arguments are those of ``generate``.

    ``generate`` is ``start`` and then ``step`` until all rows have ended. A caller of the two gets
    each token as soon as it is sampled.
    """
    num_rows, prompt_length = tokens.shape
    response_columns = ((0, 0), (0, max_new_tokens))
    prompt_mask = (attention_mask != 0).astype(jnp.int32)
    counts = jnp.cumsum(prompt_mask, axis=1)
    num_real = counts[:, -1]
    # Slots after the end of a row may count as keys: only columns past the end see them, and those
    # are not used.
    key_mask = jnp.pad(prompt_mask, response_columns, constant_values=1)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, places)

    is_shared = group_size > 1 and num_rows % group_size == 0 and prompt_length > 1
    is_shared = is_shared and isinstance(model, models.Model) and model.takes_groups
    of_prompts, cache = cache_of(
        model,
        num_rows=num_rows,
        prompt_length=prompt_length,
        num_slots=max_new_tokens,
        group_size=group_size if is_shared else 1,
    )
    prompts = None
    # The last prompt column is left to the loop, whose first step needs its logits. These are never
    # read, so the compiler drops the projection to the vocabulary.
    before = slice(prompt_length - 1)
    inputs = (tokens[:, before], (counts - prompt_mask)[:, before])
    if is_shared:
        each = slice(None, None, group_size)
        mask = prompt_mask[each, before]
        _, of_prompts = model.decode(params, inputs[0][each], inputs[1][each], mask, of_prompts, 0)
        prompts = Prompts(of_prompts, mask)
    elif prompt_length > 1:
        _, cache = model.decode(params, *inputs, key_mask, cache, 0)
    state = DecodeState(
        column=jnp.asarray(prompt_length - 1, jnp.int32),
        tokens=jnp.pad(tokens, response_columns, constant_values=pad_id),
        log_probs=jnp.zeros(key_mask.shape, jnp.float32),
        lengths=jnp.zeros(num_rows, jnp.int32),
        ended=(num_real == 0) | (used >= max_new_tokens),
        cache=cache,
    )
    return Rows(key_mask, num_real, keys, used, prompts), state


def cache_of(
    model: CachedModel, *, num_rows: int, prompt_length: int, num_slots: int, group_size: int = 1
) -> tuple[Any, Any]:
    """The empty caches of a batch: of the prompts of groups of rows, without their last column, or
    None for ``group_size`` 1; and of the rows.
    """
    if group_size == 1:
        return None, model.init_cache(num_rows, prompt_length + num_slots)
    of_prompts = model.init_cache(num_rows // group_size, prompt_length - 1)
    return of_prompts, model.init_cache(num_rows, 1 + num_slots)


def step(
    model: CachedModel, params: Params, rows: Rows, state: DecodeState, *, config: SamplingConfig
) -> DecodeState:
    """The state after one more token in each row that has not ended; ``params`` may be those of
    ``model.for_decoding``.
    """
    # Columns are sums with constants, and none is negative: XLA simplifies the loop over tokens in
    # fewer rounds.
    write: Any = partial(jax.lax.dynamic_update_slice_in_dim, axis=1, allow_negative_indices=False)
    column = state.column
    prompt_length = state.tokens.shape[1] - config.max_new_tokens
    logits, cache = next_logits(model, params, rows, state, prompt_length)
    slot = rows.used + (column + (1 - prompt_length))
    is_past = jnp.arange(state.tokens.shape[1])[None] <= column
    seen = (state.tokens, is_past & (rows.key_mask != 0))
    sampled, log_probs, support = _sample(logits[:, 0], rows.keys, slot, seen, config)
    sampled = jnp.where(state.ended, config.pad_id, sampled)
    log_probs = jnp.where(state.ended, 0.0, log_probs)
    if support is not None:
        support = jnp.where(state.ended[:, None], -1, support)
        support = write(state.support, support[:, None], column + 1)
    ended = jnp.isin(sampled, jnp.asarray(config.eos_ids)) | (slot == config.max_new_tokens - 1)
    return DecodeState(
        column=column + 1,
        tokens=write(state.tokens, sampled[:, None], column + 1),
        log_probs=write(state.log_probs, log_probs[:, None], column + 1),
        lengths=state.lengths + jnp.where(state.ended, 0, 1),
        ended=state.ended | ended,
        cache=cache,
        support=support,
    )


def next_logits(
    model: CachedModel, params: Params, rows: Rows, state: DecodeState, prompt_length: int
) -> tuple[Array, Any]:
    """Logits [B, 1, V] of the next token of each row, and the cache with the last one."""
    column = state.column
    last = jax.lax.dynamic_slice_in_dim(  # [B, 1]
        state.tokens, column, 1, axis=1, allow_negative_indices=False
    )
    # A missing row has no real token; its position is kept inside the table.
    positions = jnp.maximum(rows.num_real + (column + -prompt_length), 0)[:, None]
    inputs = (params, last, positions)
    if rows.prompts is None:
        return model.decode(*inputs, rows.key_mask, state.cache, column)
    num_shared = rows.prompts.mask.shape[1]
    own = (rows.key_mask[:, num_shared:], state.cache, column + -num_shared)
    grouped: Any = model
    logits, cache = grouped.decode(*inputs, *own, rows.prompts)
    return logits, cache


def _sample(
    logits: Array, row_keys: Array, slots: Array, seen: tuple[Array, Array], config: SamplingConfig
) -> tuple[Array, Array, Array | None]:
    """One token for each row of logits [B, V]: ids [B] int32, log-probs [B] float32, of the whole
    softmax or among the support, and that [B, K], if the config records it. ``seen``: the tokens
    so far [B, T], and which of them count.
    """
    vocab_size = logits.shape[-1]
    if max(config.eos_ids, default=0) >= vocab_size:
        raise ValueError(
            f"eos_id {config.eos_id} is outside the model's vocabulary of {vocab_size}"
        )
    logits = logits.astype(jnp.float32)
    noisy = logits
    if config.min_new_tokens:
        is_eos = np.isin(np.arange(vocab_size), config.eos_ids)
        is_early = slots < config.min_new_tokens
        noisy = jnp.where(is_early[:, None] & is_eos[None], -jnp.inf, logits)
    if config.repetition_penalty != 1:
        tokens, counts = seen
        noisy = penalised(noisy, tokens, counts=counts, penalty=config.repetition_penalty)
    if config.temperature > 0:
        logits = logits / config.temperature
        noisy = noisy / config.temperature
        keys = jax.vmap(jax.random.fold_in)(row_keys, slots)
        # As jax.random.categorical does.
        noise = jax.vmap(partial(jax.random.gumbel, shape=(vocab_size,)))(keys)
        if config.records:
            return _sample_recorded(noisy, noise, config)
        noisy = truncate(noisy, top_k=config.top_k, top_p=config.top_p, min_p=config.min_p) + noise
    # The argmax by two reductions that XLA's CPU compiler vectorises.
    best = jnp.max(noisy, axis=-1, keepdims=True)
    sampled = jnp.min(jnp.where(noisy < best, vocab_size, jnp.arange(vocab_size)[None]), axis=-1)
    chosen = jnp.take_along_axis(logits, sampled[:, None], axis=-1)[:, 0]
    return sampled.astype(jnp.int32), chosen - jax.nn.logsumexp(logits, axis=-1), None


def _sample_recorded(
    logits: Array, noise: Array, config: SamplingConfig
) -> tuple[Array, Array, Array]:
    """``_sample`` of logits [B, V] at the temperature: ids [B], their log-probs [B] among the
    support, and that [B, K].
    """
    # Of equal logits the lowest ids come first.
    ranked, ids = jax.lax.top_k(logits, config.most_possible(logits.shape[-1]))
    possible = truncate(ranked, top_k=None, top_p=config.top_p, min_p=config.min_p)
    support = jnp.where(possible > -jnp.inf, ids, -1)
    place = jnp.argmax(possible + jnp.take_along_axis(noise, ids, axis=-1), axis=-1)[:, None]
    sampled = jnp.take_along_axis(ids, place, axis=-1)[:, 0]
    log_probs = jax.nn.log_softmax(possible, axis=-1)
    chosen = jnp.take_along_axis(log_probs, place, axis=-1)[:, 0]
    return sampled.astype(jnp.int32), chosen, support


def penalised(logits: Array, tokens: Array, *, counts: Array, penalty: float | Array) -> Array:
    """Logits [B, V], those of the ``tokens`` [B, T] that count made less likely by the repetition
    penalty.
    """
    rows = jnp.arange(len(tokens))[:, None]
    occurs = jnp.zeros(logits.shape, bool).at[rows, tokens].max(counts)
    return jnp.where(occurs, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def truncate(
    logits: Array,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Array:
    """Logits [B, V] with -inf at the tokens that top-k removes, then top-p of those that are left,
    then min-p.

    See ``SamplingConfig`` for which tokens stay. The order, top-k first and probabilities
    renormalised before top-p, is that of transformers' ``generate``.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        largest, _ = jax.lax.top_k(logits, top_k)
        logits = jnp.where(logits < largest[:, -1:], -jnp.inf, logits)
    if top_p is not None and top_p < 1:
        logits = nucleus(logits, top_p)
    if min_p:
        least = jnp.max(logits, axis=-1, keepdims=True) + math.log(min_p)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def nucleus(logits: Array, top_p: float | Array) -> Array:
    """Logits [B, V] with -inf outside the smallest set of the probability ``top_p``, a number or
    [B, 1].
    """
    ranked = jnp.sort(logits, axis=-1, descending=True)
    probs = jax.nn.softmax(ranked, axis=-1)
    count = jnp.sum(jnp.cumsum(probs, axis=-1) - probs < top_p, axis=-1, keepdims=True)
    count = jnp.maximum(count, 1)  # XLA takes a top_p below 1e-38 for 0
    last = jnp.take_along_axis(ranked, count - 1, axis=-1)
    # Of the tokens that tie with the last one as many stay as there is room for, the lowest ids
    # first.
    above = logits > last
    equal = logits == last
    room = count - jnp.sum(above, axis=-1, keepdims=True)
    return jnp.where(above | (equal & (jnp.cumsum(equal, axis=-1) <= room)), logits, -jnp.inf)


def best_of_n(
    model: CachedModel,
    params: Params,
    tokens: Array,
    attention_mask: Array,
    key: Array,
    *,
    config: SamplingConfig,
    n: int,
    reward_fn: RewardFn,
    row_ids: Array | None = None,
    mesh: Mesh | None = None,
) -> tuple[Rollout, Array]:
    """The best of n samples for each prompt (Stiennon et al. 2020), and the scores [B, n] of all of
    them.

    Sample i of a prompt is generated at place ``row_id * n + i``; the other arguments are those of
    ``generate``. A dense reward [B, T] counts as its sum over the response. Among equal scores the
    first sample wins; NaN never wins against a number. The returned Rollout [B, T] has the best
    ``scores`` and the prompts' own ``row_ids``. Its divergence from the sampled policy is at most
    ``best_of_n_kl(n)`` nats.
    """
    ops.check_number("n", n, at_least=1)
    places = _places(row_ids, len(tokens))[:, None] * n + jnp.arange(n)[None, :]
    samples = generate(
        model,
        params,
        jnp.repeat(tokens, n, axis=0),
        jnp.repeat(attention_mask, n, axis=0),
        key,
        config=config,
        row_ids=jnp.repeat(jnp.arange(len(tokens)) if row_ids is None else row_ids, n),
        places=places.reshape(-1),
        mesh=mesh,
        group_size=n,
    )
    rewards, _ = reward_fn(samples)
    if rewards.ndim == 2:
        rewards = jnp.sum(ops.masked(rewards, samples.response_mask), axis=1)
    chex.assert_shape(rewards, (places.size,))
    scores = rewards.reshape(places.shape)
    best = jnp.argmax(jnp.where(jnp.isnan(scores), -jnp.inf, scores), axis=1)
    chosen = jnp.arange(len(scores)) * n + best  # [B] of B * n
    rollout: Rollout = jax.tree.map(lambda x: x[chosen], samples)
    return replace(rollout, scores=rewards[chosen]), scores


def best_of_n_kl(n: int) -> float:
    """Upper bound in nats on KL(best-of-n || policy): ln n - (n - 1) / n.

    Exact if no two answers are equally good and none has much probability, an upper bound otherwise
    (Beirami et al. 2024).
    """
    ops.check_number("n", n, at_least=1)
    return math.log(n) - (n - 1) / n
