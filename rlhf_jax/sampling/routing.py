"""Whether sampling and learning send a token to the same experts, in a mixture of experts."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax import Array

from rlhf_jax import models, ops
from rlhf_jax.models.attention import positions
from rlhf_jax.models.decoder import Decoder
from rlhf_jax.models.stack import ROUTER
from rlhf_jax.types import Params, Rollout


def has_experts(model: models.Model) -> bool:
    """Whether some layers of the model are mixtures of experts."""
    return any(getattr(model.config, "sparse_layers", ()))


def expert_gap(
    model: models.Model, params: Params, rollout: Rollout, rows: int | None = None
) -> Array:
    """The share [] of the choices of experts, one for each response token in each layer that has
    experts, that are others in decoding with a cache than in the full forward pass of an update; 0
    if there are no response tokens.

    The two round differently, so a choice differs where two experts are nearly equal. A token's
    choice is that of its input, the token before it. The rollout's tokens are decoded again, as
    ``generate`` did, which takes about as long as to sample them.

    Args:
        model: with experts.
        params: of the model, without adapters or with attached ones.
        rows: rows at once, see ``ops.by_rows``.

    Raises:
        ValueError: the model has no experts.
    """
    if not has_experts(model):
        raise ValueError("this model has no experts")
    differing = ops.by_rows(partial(_differing, model, rollout.prompt_length or 0), rows)
    shares = differing(params, rollout.tokens, rollout.attention_mask)
    return ops.masked_mean(shares, rollout.response_mask)


def _differing(
    model: models.Model,
    prompt_length: int,
    params: Params,
    tokens: Array,
    attention_mask: Array,
    key: None = None,
) -> Array:
    """[B, T]: the share of layers whose experts of a token's input differ; 0 in prompts."""
    config: Any = model.config
    routed: Any = {"mutable": [ROUTER]}
    inputs = ({"params": params}, tokens, attention_mask)
    _, found = Decoder(config).apply(*inputs, method="hidden", **routed)
    first = max(prompt_length, 1) - 1  # the column of the first input that is decoded
    last = tokens.shape[1] - 1
    expected = jnp.moveaxis(_chosen(found, tokens.shape)[:, :, first:last], 2, 0)
    places = positions(attention_mask)
    cache = model.init_cache(*tokens.shape)
    if first:
        prompt = (tokens[:, :first], places[:, :first])
        _, cache = model.decode(params, *prompt, attention_mask, cache, 0)
    decoder = Decoder(dataclasses.replace(config, scan_layers=False, remat=False))
    weights = {"params": model.for_decoding(params)}

    def step(cache: Any, of_column: tuple[Array, Array, Array, Array]) -> tuple[Any, Array]:
        column, token, place, expected = of_column
        arrays = (token[:, None], place[:, None], attention_mask, cache, column)
        (_, cache), found = decoder.apply(weights, *arrays, method="decode_hidden", **routed)
        differs = jnp.any(_chosen(found, (len(token), 1))[:, :, 0] != expected, axis=-1)
        return cache, jnp.mean(differs, axis=0)

    columns = (jnp.arange(first, last), tokens[:, first:last].T, places[:, first:last].T, expected)
    _, differing = jax.lax.scan(step, cache, columns)
    return jnp.pad(differing.T, ((0, 0), (first + 1, 0)))


def _chosen(found: Params, shape: tuple[int, ...]) -> Array:
    """[L, B, T, k] experts of each token in ascending order, of the layers that have experts."""
    layers: dict[int, Array] = {}  # by their numbers; the stacked ones are the first
    for (layer, *_, name), (leaf,) in flatten_dict(found[ROUTER]).items():
        if name == "chosen":
            layers[int(layer[2:] or 0)] = leaf.reshape(-1, *shape, leaf.shape[-1])
    return jnp.sort(jnp.concatenate([layers[number] for number in sorted(layers)]), axis=-1)
