"""A model as a NamedTuple of pure functions: the interface of a network for all other packages."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax import Array

from rlhf_jax.models import stack
from rlhf_jax.models.attention import Columns, is_start, pick
from rlhf_jax.models.config import GPT2Config, ModelConfig
from rlhf_jax.models.decoder import Decoder
from rlhf_jax.models.gpt2 import GPT2
from rlhf_jax.models.kernels import initialize
from rlhf_jax.models.kernels.shared import Groups, Prompts
from rlhf_jax.parallel import auxiliary
from rlhf_jax.types import Mean, Params


class Model(NamedTuple):
    """Functions of parameters and arrays; none holds state, all may be traced, differentiated and
    jitted.

    B rows, T tokens, t tokens decoded at once, S cache slots, D width, V vocabulary. Parameters are
    nested dicts; the functions ignore keys that are not the body's, such as the heads "value" and
    "score".

    Attributes:
        config: what the model was built from.
        init: ``(key) -> params`` in float32, without heads.
        apply: ``(params, tokens [B, T], attention_mask [B, T] = None, key=None) -> logits [B, T,
            V]`` float32. The mask is 0 on pads; packed documents are numbered 1, 2, ... and do not
            attend to each other; None means all ones. ``key`` turns dropout on.
        hidden: same arguments, and ``columns=None`` -> [B, T, D] after the final norm, in the
            compute dtype; given a ``slice`` or [B, n] indices of columns, [B, n, D]: the last block
            then computes only those. Given ``groups`` (``shared.Groups``) too, each prompt that
            adjacent rows share is computed once; with dropout, a soft cap of attention or sinks
            each row is computed by itself. Given ``num_answers`` K in their place, the mask numbers
            prompts and their answers (``attention.prompt_of``), and the answers attend to their
            prompt, behind which their positions go on. ``one_text=True`` says that each row holds
            one text, its real tokens side by side: attention on GPUs then reads no mask.
        unembed: ``(params, hidden [..., D]) -> logits [..., V]`` float32.
        init_cache: ``(batch, length) -> cache``, an opaque pytree of ``length`` empty slots.
        decode: ``(params, tokens [B, t], positions [B, t], key_mask [B, S], cache, index)`` ->
            ``(logits [B, t, V], cache)``. The tokens are written to slots index, ..., index + t -
            1; a query at slot s attends to the slots up to s whose ``key_mask`` is not 0, its own
            included. The cache of a layer with a window has slots for the window only. If ``index``
            is the number 0, not an array, the cache counts as empty. ``prompts``
            (``shared.Prompts``) of N groups of rows lie before slot 0: t is then 1. With
            ``hidden=True`` the first result is the states [B, t, D] that ``hidden`` gives, of which
            ``unembed`` makes the logits.
        for_decoding: ``(params) -> params`` for ``decode``, which then slices and casts no weight:
            call it once before a loop over tokens. ``decode`` takes both forms.
        takes_groups: whether ``hidden`` takes ``groups`` and ``one_text``, and ``decode``
            ``prompts``.
        values: ``(params, hidden [B, n, D]) -> [B, n]`` float32, a value head of the network's own
            in its parameters; None: values are those of the head "value" (``models.add_head``).
    """

    config: ModelConfig
    init: Callable[[Array], Params]
    apply: Callable[..., Array]
    hidden: Callable[..., Array]
    unembed: Callable[[Params, Array], Array]
    init_cache: Callable[[int, int], Any]
    decode: Callable[..., tuple[Array, Any]]
    for_decoding: Callable[[Params], Params]
    takes_groups: bool = False
    values: Callable[[Params, Array], Array] | None = None


def build(config: ModelConfig) -> Model:
    """Builds the functions of a model."""
    network: Any = GPT2 if isinstance(config, GPT2Config) else Decoder
    module = network(config)
    unrolled = network(dataclasses.replace(config, scan_layers=False, remat=False))

    has_experts = any(getattr(config, "sparse_layers", ()))
    # A key without a use is left out: with a key, each layer would be traced separately.
    drops = any(rate > 0 for name, rate in vars(config).items() if name.endswith("_dropout"))

    @jax.jit
    def without_weights(key: Array) -> Params:
        token = jnp.zeros((1, 1), jnp.int32)
        return module.init(key, token, jnp.ones_like(token))["params"]

    def init(key: Array) -> Params:
        return initialize.weights(without_weights(key))

    def hidden(
        params: Params,
        tokens: Array,
        attention_mask: Array | None = None,
        key: Array | None = None,
        columns: Columns = None,
        groups: Groups | None = None,
        num_answers: int = 0,
        one_text: bool = False,
    ) -> Any:
        tokens = jnp.asarray(tokens)
        mask = jnp.ones_like(tokens) if attention_mask is None else jnp.asarray(attention_mask)
        chex.assert_rank(tokens, 2)
        chex.assert_equal_shape([tokens, mask])
        rngs = {"dropout": key} if key is not None and drops else None
        if has_experts and auxiliary.is_wanted():
            # All columns: the tokens before the chosen ones choose experts in the last layer too.
            how: Any = {"rngs": rngs, "method": "hidden", "mutable": [stack.ROUTER]}
            whole = (tokens, mask, None, num_answers)
            states, chosen = module.apply({"params": params}, *whole, **how)
            auxiliary.add(balance(config, chosen[stack.ROUTER], mask))
            return pick(states, columns, axis=1)
        inputs = (tokens, mask, columns)
        if groups is not None and rngs is None and config.has_plain_softmax:
            chex.assert_is_divisible(len(tokens), groups.size)
            together = (*inputs, groups, one_text)
            return module.apply({"params": params}, *together, method="hidden_in_groups")
        arranged = (*inputs, num_answers, one_text)
        return module.apply({"params": params}, *arranged, rngs=rngs, method="hidden")

    def unembed(params: Params, hidden_states: Array) -> Any:
        return module.apply({"params": params}, hidden_states, method="unembed")

    def apply(
        params: Params,
        tokens: Array,
        attention_mask: Array | None = None,
        key: Array | None = None,
    ) -> Any:
        return unembed(params, hidden(params, tokens, attention_mask, key))

    return Model(
        config,
        init,
        apply,
        hidden,
        unembed,
        init_cache=partial(stack.init_cache, config),
        decode=partial(_decode, module, unrolled),
        for_decoding=partial(stack.for_decoding, config),
        takes_groups=config.has_plain_softmax,
    )


def balance(config: Any, routed: Params, attention_mask: Array) -> dict[str, Mean]:
    """How equally the experts share the real tokens of a pass, as the means of a loss.

    With f_e the tokens of expert e, in all layers, per token and layer, and P_e the mean of its
    share before the choice, the loss is E sum_e f_e P_e (Fedus et al. 2021, equation 4, summed over
    the k choices as transformers does): k if all are equally busy. f has no gradient.

    Args:
        routed: the collection ``ROUTER`` of the pass.
        attention_mask: [B, T], not 0 for real tokens.

    Returns:
        "router/aux_loss", and "router/max_load", the tokens of the busiest expert over those of an
        equal share. Both are functions of all rows of the pass together; means over several passes,
        such as microbatches, weigh each by its real tokens.
    """
    number = config.num_experts or 1
    real = (attention_mask != 0).reshape(-1).astype(jnp.float32)  # [N]
    tokens = jnp.sum(real)
    load = jnp.zeros(number)
    share = jnp.zeros(number)
    entries = 0
    for (*_, name), (leaf,) in flatten_dict(routed).items():
        layers = leaf.reshape(-1, len(real), leaf.shape[-1])  # stacked ones, or one
        if name == "shares":
            entries += len(layers)
            share += jnp.einsum("lne,n->e", layers, real, precision="highest")
        else:
            weights = jnp.broadcast_to(real[None, :, None], layers.shape)
            load += jnp.bincount(layers.reshape(-1), weights.reshape(-1), length=number)
    per_expert = jnp.maximum(entries * tokens, 1.0)
    load /= per_expert
    share /= per_expert
    loss = number * jnp.sum(load * share)
    busiest = number * jnp.max(load) / config.experts_per_token
    found = {"router/aux_loss": loss, "router/max_load": busiest}
    return {name: Mean(value * tokens, tokens) for name, value in found.items()}


def _decode(
    module: Any,
    unrolled: Any,
    params: Params,
    tokens: Array,
    positions: Array,
    key_mask: Array,
    cache: stack.Cache,
    index: Array | int,
    prompts: Prompts | None = None,
    *,
    hidden: bool = False,
) -> Any:
    """``Model.decode``: by the ``module`` for a prompt in stacked layers, else by ``unrolled``."""
    config = module.config
    chex.assert_rank(tokens, 2)
    chex.assert_equal_shape([tokens, positions])
    expected = jax.eval_shape(lambda: stack.init_cache(config, *key_mask.shape))
    chex.assert_trees_all_equal_shapes(cache, expected)
    network = module
    if not (is_start(index) and tokens.shape[1] > 1 and "h" in params):
        network = unrolled
        params = stack.for_decoding(config, params)
    inputs = (tokens, positions, key_mask, cache, index, prompts)
    method = "decode_hidden" if hidden else "decode"
    return network.apply({"params": params}, *inputs, method=method)


@jax.jit
def master_weights(params: Params) -> Params:
    """Float32 copies of parameters, to be trained: in bfloat16 most steps at usual learning rates
    round to nothing (Micikevicius et al. 2017, arXiv 1710.03740, section 3.1). They are arrays of
    their own, which an update may donate.
    """
    return jax.tree.map(partial(jnp.array, dtype=jnp.float32, copy=True), params)


def resize_vocabulary(model: Model, params: Params, size: int) -> tuple[Model, Params]:
    """Adds rows to the token tables, each the mean of the existing ones, for a tokenizer with new
    tokens.

    Args:
        model, params: from ``build`` or ``load``.
        size: the new vocabulary size, at least the present one.

    Returns:
        The model and parameters with ``size`` tokens; logits of the former tokens are unchanged.
    """

    def with_rows(table: Array) -> Array:
        mean = jnp.mean(table.astype(jnp.float32), axis=0, keepdims=True).astype(table.dtype)
        return jnp.concatenate([table, jnp.repeat(mean, size - len(table), axis=0)])

    params = dict(params)
    for name in ("wte", "lm_head"):
        if name in params:
            params[name] = {"embedding": with_rows(params[name]["embedding"])}
    return build(dataclasses.replace(model.config, vocab_size=size)), params
