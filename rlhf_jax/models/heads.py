"""Scalar heads, and models as the algorithms see them: a PolicyFn or a ScoreFn. Nothing here
depends on the family.

Token log-probabilities are ``logit - logsumexp`` over chunks of columns under ``jax.checkpoint``: a
[B, T, V] float32 array is never built for a large vocabulary, and nothing is computed for prompt
columns.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.models.model import Model
from rlhf_jax.types import Params, PolicyFn, PolicyOutput, ScoreFn

# Logits of one row held at once (columns x V). It does not count rows, so that a shard forms the
# chunks of the whole.
_CHUNK_LOGITS = 2**20
HEADS = ("value", "score")  # their keys in a model's parameters


def add_head(key: Array, params: Params, kind: str) -> Params:
    """Adds a scalar head on the final hidden states.

    Args:
        key: PRNG key of the score head's weights; the value head starts at 0.
        params: of a model; not changed.
        kind: "value", {"kernel" [D], "bias" []}: zeros; or "score", {"kernel" [D], "bias", "gain",
            "shift"}: weights normal with standard deviation 1 / sqrt(D + 1) (Stiennon et al. 2020),
            bias 0, gain 1, shift 0.

    Returns:
        A new dict with the head under ``kind``.

    Raises:
        ValueError: for another kind.
    """
    if kind not in HEADS:
        raise ValueError(f"unknown head {kind!r}; choose from {', '.join(HEADS)}")
    width, zero = params["ln_f"]["scale"].shape[-1], jnp.zeros((), jnp.float32)
    if kind == "value":
        return {**params, kind: {"kernel": jnp.zeros(width, jnp.float32), "bias": zero}}
    kernel = jax.random.normal(key, (width,), jnp.float32) / math.sqrt(width + 1)
    return {
        **params,
        kind: {"kernel": kernel, "bias": zero, "gain": jnp.ones_like(zero), "shift": zero},
    }


def policy_params(params: Params) -> Params:
    """The policy's own parameters: ``params``, or their "policy" part where a whole value model
    goes with it.
    """
    return params["policy"] if isinstance(params, Mapping) and "policy" in params else params


def policy_fn(
    model: Model, temperature: float = 1.0, prompt_length: int = 0, value_model: Model | None = None
) -> PolicyFn:
    """Turns a language model into a PolicyFn.

    Args:
        model: the policy.
        temperature: logits are divided by it, as in sampling; above 0.
        prompt_length: columns before it are not computed and stay 0, as does column 0.
        value_model: a whole model for the values; params are then {"policy": ..., "value": ...},
            the latter with its own "value" head. Without it values come from ``params["value"]``,
            and are None where that is missing.

    Returns:
        ``(params, tokens, attention_mask, key) -> PolicyOutput``. Log-probabilities and entropies
        of column t come from the logits at t - 1 (equal to ``ops.token_log_probs`` and
        ``ops.entropy``), and so do values from the head.

    Raises:
        ValueError: if ``temperature`` is not positive.
    """
    if not temperature > 0:
        raise ValueError(
            f"temperature must be positive, got {temperature!r}; greedy choices have no "
            "log-probabilities"
        )
    first = max(prompt_length, 1)

    def policy(
        params: Params, tokens: Array, attention_mask: Array, key: Array | None = None
    ) -> PolicyOutput:
        if first > tokens.shape[1]:
            raise ValueError(
                f"prompt_length {prompt_length} is longer than the {tokens.shape[1]} columns of "
                "tokens"
            )
        policy_key, value_key = (None, None) if key is None else jax.random.split(key)
        body = policy_params(params)
        read = slice(
            first - 1, tokens.shape[1] - 1
        )  # the states that speak of columns first, ..., T - 1
        before = model.hidden(body, tokens, attention_mask, policy_key, read)  # [B, T - first, D]
        log_probs, entropy = _log_probs_and_entropy(
            model, body, before, tokens[:, first:], temperature
        )
        if value_model is not None:
            value_hidden = value_model.hidden(
                params["value"], tokens, attention_mask, value_key, read
            )
            values: Array | None = _scalar(params["value"], "value", value_hidden)
        else:
            values = _scalar(params, "value", before) if "value" in params else None
        pad = ((0, 0), (first, 0))
        return jax.tree.map(
            lambda columns: jnp.pad(columns, pad), PolicyOutput(log_probs, entropy, values)
        )

    return policy


def score_fn(model: Model) -> ScoreFn:
    """Turns a model with a "score" head into a ScoreFn.

    Args:
        model: the reward model's body.

    Returns:
        ``(params, tokens, attention_mask, key) -> [B]`` float32, ``gain * (w . h + bias) + shift``
        with h the hidden state at the row's last real token. ``gain`` and ``shift`` get no
        gradient. A row without a real token scores 0. A further argument ``documents`` [B, n],
        numbers of packed texts in ``attention_mask``, asks for each text's score [B, n] in place of
        the row's; 0 where there is no such text.
    """

    def score(
        params: Params,
        tokens: Array,
        attention_mask: Array,
        key: Array | None = None,
        documents: Array | None = None,
    ) -> Array:
        mask = attention_mask[:, None]
        real = (
            mask != 0 if documents is None else mask == documents[..., None]
        )  # [B, n, T]; n = 1 for whole rows
        last = jnp.max(
            jnp.where(real, jnp.arange(tokens.shape[1])[None, None], 0), axis=2
        )  # [B, n]
        scores = _scalar(params, "score", model.hidden(params, tokens, attention_mask, key, last))
        gain, shift = jax.lax.stop_gradient((params["score"]["gain"], params["score"]["shift"]))
        scores = jnp.where(jnp.any(real, axis=2), gain * scores + shift, 0.0)
        return scores[:, 0] if documents is None else scores

    return score


def _scalar(params: Params, kind: str, hidden: Array) -> Array:
    """The head ``kind`` of [B, T, D] states: [B, T] in float32."""
    if kind not in params:
        raise ValueError(f'the model has no {kind} head: params = add_head(key, params, "{kind}")')
    head: Params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params[kind])
    return jnp.einsum("btd,d->bt", hidden.astype(jnp.float32), head["kernel"]) + head["bias"]


def _log_probs_and_entropy(
    model: Model, params: Params, hidden: Array, targets: Array, temperature: float
) -> tuple[Array, Array]:
    """hidden [B, N, D] and targets [B, N] -> log-probabilities and entropies [B, N], float32."""

    def chunk(params: Params, hidden: Array, targets: Array) -> tuple[Array, Array]:
        logits = model.unembed(params, hidden).astype(jnp.float32) / temperature
        # A pad's id may lie outside the vocabulary; its column is masked later but must stay
        # finite.
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1, mode="clip")[..., 0]
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        probs = jnp.exp(logits - normalizer[..., None])
        return chosen - normalizer, normalizer - jnp.sum(probs * logits, axis=-1)

    batch, columns, width = hidden.shape
    chunks = math.ceil(columns * model.config.vocab_size / _CHUNK_LOGITS)
    if chunks <= 1:
        return chunk(params, hidden, targets)
    size = math.ceil(columns / chunks)
    chunks = math.ceil(columns / size)
    extra = chunks * size - columns
    hidden = (
        jnp.pad(hidden, ((0, 0), (0, extra), (0, 0)))
        .reshape(batch, chunks, size, width)
        .swapaxes(0, 1)
    )
    targets = jnp.pad(targets, ((0, 0), (0, extra))).reshape(batch, chunks, size).swapaxes(0, 1)
    outputs = jax.lax.map(lambda part: jax.checkpoint(chunk)(params, *part), (hidden, targets))
    log_probs, entropy = (
        x.swapaxes(0, 1).reshape(batch, chunks * size)[:, :columns] for x in outputs
    )
    return log_probs, entropy
