"""Sampling from a language model with a KV cache: one pure function that the caller jits.

A row's randomness is ``fold_in(fold_in(key, row_id), position)``, position counting response tokens from 0. So the
tokens of a row depend neither on the rows beside it, nor on prompt padding, nor on the number of devices (up to ties
within the rounding of the logits).

B rows, P prompt slots, R = max_new_tokens response slots, T = P + R, V vocabulary.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from rlhf_jax.models import Model
from rlhf_jax.types import Params, RewardFn, Rollout


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How to sample. Hashable, so it can be a static argument of jit.

    Args:
        max_new_tokens: response slots R.
        temperature: divides the logits; 0 takes the most likely token (the lowest id among equals).
        top_k: keep the k most likely tokens, and those that tie with the k-th; None keeps all.
        top_p: of those, keep the smallest set of most likely tokens whose probability reaches p (nucleus sampling,
            Holtzman et al. 2020): the token that crosses p is kept, and so is always at least one; None or 1 keeps all.
        eos_id: the token that ends a response; None lets every response run to ``max_new_tokens``.
        pad_id: fills the columns after the end; may lie outside the vocabulary, must differ from ``eos_id``.

    Raises:
        ValueError: for a value out of range.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    eos_id: int | None = dataclasses.field(kw_only=True)
    pad_id: int = dataclasses.field(kw_only=True)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be finite and at least 0 (0 is greedy), got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, or None for off, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], or None for off, got {self.top_p}")
        if self.eos_id is not None and self.eos_id < 0:
            raise ValueError(f"eos_id must be a token id, or None for no end token, got {self.eos_id}")
        if self.pad_id < 0:
            raise ValueError(f"pad_id must be a token id, got {self.pad_id}")
        if self.pad_id == self.eos_id:
            raise ValueError(f"pad_id and eos_id must differ, both are {self.pad_id}")

    @property
    def truncated(self) -> bool:
        """Whether samples come from another distribution than the log-probs speak of (greedy, top-k, top-p)."""
        return self.temperature == 0 or self.top_k is not None or (self.top_p is not None and self.top_p < 1)


class _Loop(NamedTuple):
    """What one token changes."""

    position: jax.Array  # [] int32, the response position to be sampled next
    tokens: jax.Array  # [B, T]
    log_probs: jax.Array  # [B, T]
    lengths: jax.Array  # [B] response tokens so far
    ended: jax.Array  # [B] bool
    cache: Any


def generate(
    model: Model,
    params: Params,
    tokens: jax.Array,
    attention_mask: jax.Array,
    key: jax.Array,
    config: SamplingConfig,
    row_ids: jax.Array | None = None,
    mesh: Mesh | None = None,
) -> Rollout:
    """Samples a response to each prompt; stops when every row has ended.

    Args:
        tokens, attention_mask: [B, P], prompts padded on the left, so that column P - 1 of every row is a real token. A
            row whose mask is all zero is absent: it gets an empty response and holds up nobody.
        row_ids: [B] int32, the data row of each prompt, which names its random stream; None means 0..B-1.
        mesh: with it the rows are split over its "data" axis (``shard_map``, parameters replicated), and each device
            stops when its own rows have ended. The tokens are those of one device.

    Returns:
        A Rollout with tokens, attention_mask, response_mask [B, T] int32, log_probs [B, T] float32 and row_ids. The
        response mask covers the sampled tokens, EOS included; the rest of a row is ``pad_id`` with log-prob 0. No id is
        masked out: a ``pad_id`` sampled before the end is an ordinary token. Log-probs are those of the full softmax at
        ``config.temperature``, also under top-k and top-p; for temperature 0 they are those of temperature 1.

    Raises:
        ValueError: a shape is wrong, P + max_new_tokens exceeds the model's ``max_length``, ``eos_id`` is outside the
            vocabulary, or the mesh cannot split the rows evenly.
    """
    if tokens.ndim != 2 or tokens.shape[1] < 1:
        raise ValueError(f"tokens must be [B, P] with at least one prompt column, got {tokens.shape}")
    if attention_mask.shape != tokens.shape:
        raise ValueError(f"attention_mask must have the shape of tokens, {tokens.shape}, got {attention_mask.shape}")
    num_rows, prompt_length = tokens.shape
    if row_ids is None:
        row_ids = jnp.arange(num_rows, dtype=jnp.int32)
    if row_ids.shape != (num_rows,):
        raise ValueError(f"row_ids must be [{num_rows}], one for each row of tokens, got {row_ids.shape}")
    max_length = getattr(model.config, "max_length", None)
    if max_length is not None and prompt_length + config.max_new_tokens > max_length:
        raise ValueError(
            f"prompt length {prompt_length} + max_new_tokens {config.max_new_tokens} = "
            f"{prompt_length + config.max_new_tokens} is more than the model's max_length {max_length}"
        )

    def sample_rows(
        params: Params, key: jax.Array, tokens: jax.Array, attention_mask: jax.Array, row_ids: jax.Array
    ) -> Rollout:
        return _generate(model, params, key, tokens, attention_mask, row_ids, config)

    if mesh is not None:
        if "data" not in mesh.shape:
            raise ValueError(f'the mesh must have an axis "data", it has {tuple(mesh.shape)}')
        if num_rows % mesh.shape["data"]:
            raise ValueError(f'{num_rows} rows do not divide by the {mesh.shape["data"]} devices of the axis "data"')
        rows, replicated = PartitionSpec("data"), PartitionSpec()
        # check_vma refuses the while_loop, whose carry starts equal on all devices and ends different.
        sample_rows = jax.shard_map(
            sample_rows,
            mesh=mesh,
            in_specs=(replicated, replicated, rows, rows, rows),
            out_specs=rows,
            axis_names={"data"},
            check_vma=False,
        )
    return sample_rows(params, key, jnp.asarray(tokens, jnp.int32), jnp.asarray(attention_mask), jnp.asarray(row_ids))


def _generate(
    model: Model,
    params: Params,
    key: jax.Array,
    tokens: jax.Array,
    attention_mask: jax.Array,
    row_ids: jax.Array,
    config: SamplingConfig,
) -> Rollout:
    num_rows, prompt_length = tokens.shape
    length = prompt_length + config.max_new_tokens
    prompt_mask = (attention_mask != 0).astype(jnp.int32)
    num_real = jnp.sum(prompt_mask, axis=1)
    # Slots after the end of a row may count as keys: only columns past the end see them, and those are not used.
    key_mask = jnp.pad(prompt_mask, ((0, 0), (0, config.max_new_tokens)), constant_values=1)
    row_keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, row_ids)

    cache = model.init_cache(num_rows, length)
    if prompt_length > 1:
        # The last prompt column is left to the loop, whose first step needs its logits. These are never read, so the
        # compiler drops the projection to the vocabulary.
        positions = jnp.cumsum(prompt_mask, axis=1) - prompt_mask
        _, cache = model.decode(params, tokens[:, :-1], positions[:, :-1], key_mask, cache, 0)

    def step(loop: _Loop) -> _Loop:
        index = prompt_length - 1 + loop.position
        last = jax.lax.dynamic_slice_in_dim(loop.tokens, index, 1, axis=1)  # [B, 1]
        # An absent row has no real token; its position is kept inside the table.
        positions = jnp.maximum(num_real - 1 + loop.position, 0)[:, None]
        logits, cache = model.decode(params, last, positions, key_mask, loop.cache, index)
        sampled, log_probs = _sample(logits[:, 0], row_keys, loop.position, config)
        sampled = jnp.where(loop.ended, config.pad_id, sampled)
        log_probs = jnp.where(loop.ended, 0.0, log_probs)
        return _Loop(
            position=loop.position + 1,
            tokens=jax.lax.dynamic_update_slice_in_dim(loop.tokens, sampled[:, None], index + 1, axis=1),
            log_probs=jax.lax.dynamic_update_slice_in_dim(loop.log_probs, log_probs[:, None], index + 1, axis=1),
            lengths=loop.lengths + jnp.where(loop.ended, 0, 1),
            ended=loop.ended if config.eos_id is None else loop.ended | (sampled == config.eos_id),
            cache=cache,
        )

    start = _Loop(
        position=jnp.zeros((), jnp.int32),
        tokens=jnp.pad(tokens, ((0, 0), (0, config.max_new_tokens)), constant_values=config.pad_id),
        log_probs=jnp.zeros((num_rows, length), jnp.float32),
        lengths=jnp.zeros((num_rows,), jnp.int32),
        ended=num_real == 0,
        cache=cache,
    )
    end = jax.lax.while_loop(lambda loop: (loop.position < config.max_new_tokens) & ~jnp.all(loop.ended), step, start)
    response = jnp.arange(config.max_new_tokens)[None, :] < end.lengths[:, None]
    response_mask = jnp.pad(response.astype(jnp.int32), ((0, 0), (prompt_length, 0)))
    return Rollout(
        tokens=end.tokens,
        attention_mask=jnp.pad(prompt_mask, ((0, 0), (0, config.max_new_tokens))) + response_mask,
        response_mask=response_mask,
        log_probs=end.log_probs,
        row_ids=row_ids,
    )


def _sample(
    logits: jax.Array, row_keys: jax.Array, position: jax.Array, config: SamplingConfig
) -> tuple[jax.Array, jax.Array]:
    """One token for each row of logits [B, V]: ids [B] int32 and full-softmax log-probs [B] float32."""
    vocab_size = logits.shape[-1]
    if config.eos_id is not None and config.eos_id >= vocab_size:
        raise ValueError(f"eos_id {config.eos_id} is outside the model's vocabulary of {vocab_size}")
    logits = logits.astype(jnp.float32)
    if config.temperature == 0:
        sampled = jnp.argmax(logits, axis=-1)
    else:
        logits = logits / config.temperature
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(row_keys, position)
        sampled = jax.vmap(jax.random.categorical)(keys, truncate(logits, config.top_k, config.top_p))
    chosen = jnp.take_along_axis(logits, sampled[:, None], axis=-1)[:, 0]
    return sampled.astype(jnp.int32), chosen - jax.nn.logsumexp(logits, axis=-1)


def truncate(logits: jax.Array, top_k: int | None = None, top_p: float | None = None) -> jax.Array:
    """Logits [B, V] with -inf at the tokens that top-k, and then top-p on what is left, take away.

    See ``SamplingConfig`` for which tokens stay. The order, top-k first and probabilities renormalised before top-p, is
    that of transformers' ``generate``.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if top_p is not None and top_p < 1:
        order = jnp.argsort(logits, axis=-1, descending=True)
        probs = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs
        # Ranks instead of a threshold on the logit: equal logits at the border must not all stay.
        keep = jnp.take_along_axis(before < top_p, jnp.argsort(order, axis=-1), axis=-1)
        logits = jnp.where(keep, logits, -jnp.inf)
    return logits


def best_of_n(
    model: Model,
    params: Params,
    tokens: jax.Array,
    attention_mask: jax.Array,
    key: jax.Array,
    config: SamplingConfig,
    *,
    n: int,
    reward_fn: RewardFn,
    row_ids: jax.Array | None = None,
    mesh: Mesh | None = None,
) -> tuple[Rollout, jax.Array]:
    """The best of n samples for each prompt (Stiennon et al. 2020), and the scores [B, n] of all of them.

    Sample i of a prompt is generated as row ``row_id * n + i``; other arguments and errors are those of ``generate``. A
    dense reward [B, T] counts as its sum over the response. Equal scores: the first sample wins; NaN never wins against
    a number. The returned Rollout [B, T] carries the best ``scores`` and the prompts' own ``row_ids``. The divergence
    from the sampled policy is at most ``best_of_n_kl(n)`` nats.

    Raises:
        ValueError: as ``generate``; n below 1; or a reward that is neither [B * n] nor [B * n, T].
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    num_rows = tokens.shape[0]
    if row_ids is None:
        row_ids = jnp.arange(num_rows, dtype=jnp.int32)
    sample_ids = (jnp.asarray(row_ids)[:, None] * n + jnp.arange(n, dtype=jnp.int32)[None, :]).reshape(-1)
    samples = generate(
        model,
        params,
        jnp.repeat(jnp.asarray(tokens), n, axis=0),
        jnp.repeat(jnp.asarray(attention_mask), n, axis=0),
        key,
        config,
        sample_ids,
        mesh,
    )
    reward = reward_fn(samples)
    scores = reward[0] if isinstance(reward, tuple) else reward
    if scores.ndim == 2:
        scores = jnp.sum(jnp.where(samples.response_mask != 0, scores, 0.0), axis=1)
    if scores.shape != (num_rows * n,):
        raise ValueError(f"reward_fn must return [{num_rows * n}] scores or [B, T] rewards, got {scores.shape}")
    scores = scores.reshape(num_rows, n)
    best = jnp.argmax(jnp.where(jnp.isnan(scores), -jnp.inf, scores), axis=1)

    def take_best(x: jax.Array) -> jax.Array:  # [B * n, ...] -> [B, ...]
        grouped = x.reshape(num_rows, n, *x.shape[1:])
        return jax.vmap(lambda group, i: group[i])(grouped, best)

    rollout = jax.tree.map(take_best, samples).replace(row_ids=row_ids, scores=take_best(scores.reshape(-1)))
    return rollout, scores


def best_of_n_kl(n: int) -> float:
    """Upper bound in nats on KL(best-of-n || policy): ln n - (n - 1) / n.

    Exact when no two answers are equally good and none has much probability, an upper bound otherwise (Beirami et al.
    2024). Raises ValueError if n < 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    return math.log(n) - (n - 1) / n
