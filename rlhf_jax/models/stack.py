"""Layers that the model families share: linear layers, norms, attention with a cache, residual
blocks, and the model around them.

A family gives a ``Transformer`` its embedding, blocks and final norm; see gpt2.py, decoder.py.
Parameters are {"wte", "h_0", ..., "ln_f", ...}; under ``scan_layers`` one "h" with a leading [L -
1] axis stands for all layers but the last. Dropout is on if there is a "dropout" key. The cache is
an argument and a result: no mutable collections.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array, lax

from rlhf_jax.models import attention, kernels
from rlhf_jax.models.attention import Columns, Number, Seen, Softmax, pick
from rlhf_jax.models.config import ModelConfig, TransformerConfig
from rlhf_jax.models.kernels import cache as caches
from rlhf_jax.models.kernels import fused, initialize, quantization, shared
from rlhf_jax.models.kernels.cache import LayerCache
from rlhf_jax.models.kernels.norms import norm
from rlhf_jax.models.kernels.shared import Beside, Groups, Prompts, SeenInGroups
from rlhf_jax.parallel.sharding import cut, tensor_axes, tensor_parts
from rlhf_jax.types import Params

# Cosines, then sines, of the rotary angles: [2, B, 1, T, Dr / 2] float32, for the first Dr columns
# of a head.
Rotation = Array


class View(NamedTuple):
    """What the positions of tokens mean in a layer."""

    seen: Seen | SeenInGroups  # the attention mask
    rotation: Rotation | None = None  # of queries and keys
    query_scale: Array | None = None  # [B, 1, T, 1] factors of the queries


# One view for all layers; or one for the layers without a window, and one for the layers with a
# window.
Views = tuple[View, ...]
Cache = tuple[LayerCache, ...]
# Factor of a layer's attention scores, and whether the layer takes the second view.
Layer = tuple[Number, Array | bool]

ROUTER = "router"  # the collection of what routers of experts choose

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    # The backward pass computes it again: its tanh would take longer to write and read.
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh"), jax.checkpoint(jax.nn.gelu)),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def _dot(x: Array, kernel: Array) -> Array:
    """x [..., D] times kernel [D, ...]; its last axes become one unless ``tensor`` cuts them."""
    if tensor_parts() > 1:
        return jnp.tensordot(x, kernel, 1)
    matrix = kernel.reshape(len(kernel), -1)
    out = kernels.product(x, matrix)
    return out.reshape(*x.shape[:-1], *kernel.shape[1:])


@jax.checkpoint
def _dot_of_few_bits(x: Array, held: Params) -> Array:
    """x [..., D] times a kernel [D, ...] of few bits, but for the scales of its columns. The
    weights are computed again in the backward pass: kept, they would take several times the memory
    of the kernel in each layer.
    """
    return _dot(x, quantization.weights(held, 0, x.dtype))


def scaled(out: Array, scale: Array) -> Array:
    """The products of a kernel of 8 bits times the scales of its columns, which have more digits
    than bfloat16.
    """
    columns = jnp.broadcast_to(scale, out.shape)
    return (out.astype(jnp.float32) * columns).astype(out.dtype)


class Given(nn.Module):
    """A module that compares the shapes of given parameters with tuples.

    Flax would compare them with the shapes of its initializers and trace these: a quarter of all
    tracing.
    """

    @nn.nowrap
    def param(self, name: str, *initial: Any, **options: Any) -> Any:
        if not self.has_variable("params", name):
            return super().param(name, *initial, **options)
        value: Any = self.get_variable("params", name)
        expected = tuple(initial[1])
        if value.shape != expected:
            path = "/".join((*self.path, name))
            raise ValueError(f"parameter {path} is {value.shape}, this model's is {expected}")
        return value


class Dense(Given):
    """x [..., D] times "kernel" [D, *features], plus "bias" [*features], in the compute dtype.

    Plus ``lora_scale * (x @ lora_a) @ lora_b`` if these are given (``lora.attach``); ``x`` of this
    term alone has ``lora_dropout``. A frozen kernel of few bits has scales beside it
    (``lora.quantized``). ``std`` is the standard deviation of the initial kernel, by default the
    config's.
    """

    config: TransformerConfig
    features: tuple[int, ...]
    use_bias: bool = True
    std: float | None = None

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        initial = initialize.normal(self.std or self.config.initializer_range)
        kernel = self.param("kernel", initial, (inputs.shape[-1], *self.features))
        bias = self.param("bias", nn.initializers.zeros, self.features) if self.use_bias else None
        held = quantization.held(self.variables["params"])
        if held:
            x, bias = promote_dtype(inputs, bias, dtype=self.config.compute_dtype)
            out = _dot_of_few_bits(x, held)
            if quantization.COLUMNS in held:
                out = scaled(out, held[quantization.COLUMNS])
        else:
            x, kernel, bias = promote_dtype(inputs, kernel, bias, dtype=self.config.compute_dtype)
            out = _dot(x, kernel)
        if bias is not None:
            out += jnp.broadcast_to(bias, out.shape)  # one operation, by numpy's rules four
        if self.has_variable("params", "lora_a"):
            out += self.adapted(x)
        return out

    @nn.nowrap
    def adapted(self, x: Array) -> Array:
        """The adapter's term; with a dropout key, of inputs some of which are dropped."""
        rate = self.config.lora_dropout
        if rate and self.has_rng("dropout"):
            x = nn.Dropout(rate, deterministic=False)(x)
        adapter = self.variables["params"]
        a, b = promote_dtype(adapter["lora_a"], adapter["lora_b"], dtype=x.dtype)
        scale = lax.stop_gradient(adapter["lora_scale"]).astype(x.dtype)
        return scale * _dot(cut(x @ a, "data", "fsdp"), b)


class Norm(Given):
    """Layer norm with parameters "scale" and "bias", or RMSNorm with "scale" only."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config = self.config
        shape = x.shape[-1:]
        if config.layer_norm:
            bias = self.param("bias", nn.initializers.zeros, shape)
            scale = self.param("scale", nn.initializers.ones, shape)
            return norm(x, scale, bias, config.norm_epsilon)
        offset = config.norm_offset
        initial = nn.initializers.constant(1.0 - offset)
        scale = self.param("scale", initial, shape).astype(jnp.float32)
        if offset:
            scale = offset + scale
        return norm(x, scale, None, config.norm_epsilon)


def rotate(x: Array, rotation: Rotation) -> Array:
    """[B, H, T, Dh] whose first columns are turned by its positions (Su et al. 2021), in float32;
    the dtype is kept.
    """
    half = rotation.shape[-1]
    bounds = [half] if 2 * half == x.shape[-1] else [half, 2 * half]
    first, second, *others = jnp.split(x.astype(jnp.float32), bounds, axis=-1)
    cosine, sine = rotation
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    joined = jnp.concatenate([*turned, *others], axis=-1)
    return joined.astype(x.dtype)


class Attention(nn.Module):
    """Self-attention over the given tokens, or over a cache to which it first writes them at slots
    index, index + 1, ...

    Without an index the cache is empty. H / H_kv neighbouring query heads share a key head. A
    family's subclass defines ``project``, [B, T, D] -> queries [B, H, T, Dh], keys and values [B,
    H_kv, T, Dh], and ``output``, [B, T, H Dh] -> [B, T, D].
    """

    config: Any

    def __call__(
        self,
        x: Array,
        view: View,
        layer: Layer,
        cache: Any,
        index: Array | None,
        columns: Columns,
    ) -> tuple[Array, LayerCache | None]:
        seen = view.seen
        scale, is_local = layer
        query, key, value = self.project(x)
        scaled = query.astype(jnp.float32) * scale
        if view.rotation is not None:
            scaled = rotate(scaled, view.rotation)
            key = rotate(key, view.rotation)
        if view.query_scale is not None:
            scaled = scaled * view.query_scale
        query = scaled.astype(query.dtype)
        batch, heads, length, width = query.shape
        grouped = query.reshape(batch, key.shape[1], -1, length, width)
        arrays = (grouped, key, value)
        if isinstance(seen, SeenInGroups):
            mixed = shared.mix(self.config, *arrays, seen, is_local, columns)
        else:
            mixed, cache = self.mixed(arrays, seen, cache, index, is_local, columns)
        by_head = mixed.reshape(batch, heads, -1, width)
        by_token = by_head.swapaxes(1, 2).reshape(batch, -1, heads * width)
        return self.output(by_token), cache

    def mixed(
        self,
        arrays: tuple[Array, Array, Array],
        seen: Seen,
        cache: LayerCache | Beside | None,
        index: Array | None,
        is_local: Array | bool,
        columns: Columns,
    ) -> tuple[Array, LayerCache | None]:
        """Attention of queries [B, H, G, t, Dh] to keys and values of their own rows, after those
        of the cache if there is one: [B, H, G, n, Dh], and the cache with both.
        """
        query, key, value = arrays
        prompt = None
        if isinstance(cache, Beside):
            prompt = cache
            cache = prompt.own
        if cache is not None:
            key, value, cache = caches.extend(cache, key, value, index, len(seen.key_slots))
        if prompt is not None:
            return shared.after_prompts(query, key, value, prompt, seen), cache
        mixed = None
        if cache is not None and query.shape[3] == 1 and self.config.has_plain_softmax:
            mixed = caches.attention(query, cache, attention.visible(seen))
        if mixed is None:
            drop = None
            if self.has_rng("dropout") and self.config.attention_dropout > 0:
                drop = (self.make_rng("dropout"), self.config.attention_dropout)
            whole = (query, key, value)
            sinks = self.sink_scores(key.shape[1])
            softmax = Softmax(self.config.attention_softcap, sinks)
            mixed = attention.mix(self.config, *whole, seen, drop, is_local, columns, softmax)
        return mixed, cache

    def sink_scores(self, kv_heads: int) -> Array | None:
        """[H_kv, G] scores of the sinks; None without them."""
        return None


class Block(nn.Module):
    """Residual block: x + attention(norm(x)), then x + mlp(norm(x)).

    A family's subclass makes "attn" and "mlp" in ``setup``, then calls ``add_norms``. The config
    says which norms there are, and whether the MLP reads the same x as the attention.
    """

    config: Any

    def add_norms(self, dropout: float) -> None:
        """Makes the norms, and the dropout of the given rate."""
        if self.config.pre_norms:
            self.ln_1 = Norm(self.config)
            self.ln_2 = Norm(self.config)
        self.dropout = nn.Dropout(dropout, deterministic=not self.has_rng("dropout"))
        if self.config.post_norms:
            self.ln_1_post = Norm(self.config)
            self.ln_2_post = Norm(self.config)

    def __call__(
        self,
        x: Array,
        views: Views,
        layer: Layer,
        cache: LayerCache | None,
        index: Array | None,
        columns: Columns,
    ) -> tuple[Array, LayerCache | None]:
        config = self.config
        view = views[0]
        if len(views) > 1:
            _, is_local = layer
            view = jax.tree.map(lambda whole, local: jnp.where(is_local, local, whole), *views)
        normed = self.ln_1(x) if config.pre_norms else x
        added, cache = self.attn(normed, view, layer, cache, index, columns)
        if config.post_norms:
            added = self.ln_1_post(added)
        before = pick(x, columns, axis=1)
        x = before + self.weighed(added)
        x = cut(x, "data", "fsdp")

        read = before if config.parallel_residual else x
        added = self.mlp(self.ln_2(read) if config.pre_norms else read)
        if config.post_norms:
            added = self.ln_2_post(added)
        x = x + self.weighed(added)
        return cut(x, "data", "fsdp"), cache

    def weighed(self, added: Array) -> Array:
        """What is added to x."""
        dropped = self.dropout(added)
        multiplier = self.config.residual_multiplier
        return dropped if multiplier == 1.0 else dropped * multiplier


class Transformer(nn.Module):
    """Embedding, blocks, final norm and output table.

    A family's subclass makes "ln_f" and its tables in ``setup``, calls ``add_layers`` there, and
    defines ``scales``, [L] factors of the layers' attention scores, and ``embed``: [B, T] tokens,
    positions and whether a token is real -> [B, T, D] in the compute dtype.
    """

    config: Any

    def layer_options(self, number: int) -> dict[str, Any]:
        """Attributes of a layer's block beside the config. Stacked layers have those of layer 0."""
        return {}

    def add_layers(self, block: Callable[..., nn.Module]) -> None:
        """Makes the layers, of the family's class: "h" for the stacked ones, and "h_i" for each of
        the others.
        """
        config = self.config
        stacked = config.num_stacked
        inner = block
        if config.remat:
            # Inside a scan nothing can be merged with the forward pass: no barrier is needed.
            inner = nn.remat(block, prevent_cse=not stacked)
        if stacked:
            shared = nn.broadcast  # views, index and columns; each layer has its scale and cache
            scanned = nn.scan(
                inner,
                variable_axes={"params": 0, ROUTER: 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(shared, 0, 0, shared, shared),
                length=stacked,
            )
            self.h = scanned(config, **self.layer_options(0))
        elif not (self.is_initializing() or self.has_rng("dropout")):
            # Traced once for all layers of one scale and view. nn.jit would change random numbers.
            inner = nn.jit(inner, static_argnums=3)
        for i in range(stacked, config.num_layers):
            # The backward pass begins with the last block: it would be recomputed at once.
            is_last = i + 1 == config.num_layers
            kind = block if is_last else inner
            layer = kind(config, **self.layer_options(i))
            setattr(self, f"h_{i}", layer)

    def rotation(self, positions: Array, is_local: bool) -> Rotation | None:
        """The rotation of queries and keys at [B, T] positions; None without rotary positions."""
        return None

    def query_scale(self, positions: Array) -> Array | None:
        """[B, 1, T, 1] factors of queries at [B, T] positions; None: they are all 1."""
        return None

    def views(self, positions: Array, seen: Callable[..., Seen | SeenInGroups]) -> Views:
        """A view for each of ``config.windows``; ``seen(window=...)`` makes its attention mask."""
        views = []
        for number, window in enumerate(self.config.windows):
            own = seen(window=window)
            if isinstance(own, Seen):
                own = attention.prepared(self.config, own)
            rotation = self.rotation(positions, number > 0)
            views.append(View(own, rotation, self.query_scale(positions)))
        return tuple(views)

    def token_rows(self, tokens: Array, real: Array) -> Array:
        """[B, T] tokens -> [B, T, D] rows of the token table."""
        table = _padded(self.wte.embedding)
        # A pad may have any id, also one outside the table; a real token outside it gives NaN
        # rather than a wrong row.
        ids = jnp.where(real, tokens, 0)
        ids = jnp.where(ids < self.config.vocab_size, ids, len(table))
        rows = jnp.take(table, ids, axis=0)
        return cut(rows, "data", "fsdp")

    def hidden(
        self,
        tokens: Array,
        attention_mask: Array,
        columns: Columns = None,
        num_answers: int = 0,
        one_text: bool = False,
    ) -> Array:
        """[B, T] tokens and mask -> [B, T, D] after the final norm, in the compute dtype; only the
        given columns. With ``num_answers`` the mask numbers prompts and their answers; with
        ``one_text`` each row holds one text without gaps.
        """
        if one_text and attention.takes_lengths(self.config, tokens.shape[1]):
            return self.hidden_of_lengths(tokens, attention_mask, columns)
        seen: Callable[..., Seen] = partial(attention.seen_in_text, attention_mask)
        if num_answers:
            positions = shared.answers(attention_mask, num_answers).positions
            numbered = (attention_mask, positions, num_answers)
            seen = partial(shared.seen_by_answers, *numbered)
        else:
            positions = attention.positions(attention_mask)
        return self.hidden_at(tokens, attention_mask != 0, positions, seen, columns)

    def hidden_of_lengths(self, tokens: Array, attention_mask: Array, columns: Columns) -> Array:
        """``hidden`` of rows that hold one text each, which are turned until it begins in column 0:
        attention then needs their lengths alone.
        """
        length = tokens.shape[1]
        starts = jnp.argmax(attention_mask != 0, axis=1)
        seen = partial(attention.seen_of_lengths, attention_mask)
        real = fused.turned(attention_mask, starts) != 0
        rows = (fused.turned(tokens, starts), real, attention.positions(real), seen)
        if isinstance(columns, Array):
            return self.hidden_at(*rows, (columns - starts[:, None]) % length)
        states = self.hidden_at(*rows, None)
        return pick(fused.turned(states, -starts), columns, axis=1)

    def hidden_at(
        self,
        tokens: Array,
        real: Array,
        positions: Array,
        seen: Callable[..., Seen],
        columns: Columns,
    ) -> Array:
        """``hidden`` of tokens at [B, T] positions, under the masks of ``seen(window=...)``.

        The last block computes keys and values of all columns and the rest for the given ones. For
        more than seven eighths of the columns it computes all: one kernel then serves all layers.
        """
        x = self.embed(tokens, positions, real)
        views = self.views(positions, seen)
        number = 0
        if isinstance(columns, slice):
            number = columns.stop - columns.start
        elif columns is not None:
            number = columns.shape[1]
        is_wide = 8 * number > 7 * x.shape[1]
        x, _ = self.through_layers(x, views, None, None, None if is_wide else columns)
        x = self.ln_f(x)
        return pick(x, columns, axis=1) if is_wide else x

    def hidden_in_groups(
        self,
        tokens: Array,
        attention_mask: Array,
        columns: Columns,
        groups: Groups,
        one_text: bool = False,
    ) -> Array:
        """``hidden`` of rows [N G, T] that share their prompts: N prompts and N G responses."""
        positions = groups.packed(attention.positions(attention_mask))
        is_real = groups.packed(attention_mask) != 0
        x = self.embed(groups.packed(tokens), positions, is_real)
        seen = partial(shared.seen, self.config, attention_mask, groups, one_text)
        views = self.views(positions, seen)
        if isinstance(columns, Array):
            places = groups.places(columns, tokens.shape[1])
            x, _ = self.through_layers(x, views, None, None, places)
            states = self.ln_f(x)
            return states.reshape(*columns.shape, -1)
        # Of the prompts, only the columns that are asked for.
        first = 0 if columns is None else min(columns.start, groups.prompt_length - 1)
        x, _ = self.through_layers(x, views, None, None, slice(first, x.shape[1]))
        states = groups.unpacked(self.ln_f(x), groups.prompt_length - first)
        if columns is None:
            return states
        return states[:, columns.start - first : columns.stop - first]

    def through_layers(
        self,
        x: Array,
        views: Views,
        cache: Cache | None,
        index: Array | None,
        columns: Columns,
    ) -> tuple[Array, Any]:
        """[B, T, D] -> the given columns after the last layer, and the cache with the keys and
        values of all columns.
        """
        scales = self.scales()
        local = self.config.local_layers
        stacked = self.config.num_stacked
        written: list[Any] = []
        if stacked:
            layers = (jnp.array(scales[:stacked], jnp.float32), jnp.array(local[:stacked]))
            x, written = self.through_stack(x, views, layers, cache, index)
        last = len(scales) - 1
        for i in range(stacked, len(scales)):
            block = getattr(self, f"h_{i}")
            own_views = (views[local[i]],)
            held = None if cache is None else cache[i]
            own_columns = columns if i == last else None
            x, held = block(x, own_views, (scales[i], local[i]), held, index, own_columns)
            written.append(held)
        return x, tuple(written)

    def through_stack(
        self,
        x: Array,
        views: Views,
        layers: Layer,
        cache: Cache | None,
        index: Array | None,
    ) -> tuple[Array, list[LayerCache]]:
        """[B, T, D] after the stacked layers, and their caches with the keys and values of x."""
        if cache is None:
            x, _ = self.h(x, views, layers, None, index, None)
            return x, []
        config = self.config
        batch, length, _ = x.shape
        shape = (config.num_stacked, batch, config.kv_heads, length, config.head_size)
        new = jnp.zeros(shape, x.dtype)
        empty = jax.vmap(caches.held)(new, new)
        x, filled = self.h(x, views, layers, empty, index, None)
        held = cache[: config.num_stacked]
        return x, [caches.write(*pair, 0) for pair in zip(held, apart(filled), strict=True)]

    def unembed(self, hidden: Array) -> Array:
        """[..., D] -> [..., V] float32, inputs in the compute dtype."""
        config = self.config
        if self.has_variable("params", "unembedding"):
            table: Any = self.get_variable("params", "unembedding")
        else:
            table = (self.wte if config.tie_embeddings else self.lm_head).embedding
        logits = jnp.einsum(
            "...d,vd->...v",
            hidden.astype(config.compute_dtype),
            _padded(table).astype(config.compute_dtype),
            preferred_element_type=jnp.float32,
        )
        if config.logits_divisor != 1.0:
            logits = logits / config.logits_divisor
        cap = config.logit_softcap
        if cap is not None:
            logits = cap * jnp.tanh(logits / cap)
        return logits[..., : config.vocab_size]

    def decode(
        self,
        tokens: Array,
        positions: Array,
        key_mask: Array,
        cache: Cache,
        index: Array | int,
        prompts: Prompts | None = None,
    ) -> tuple[Array, Cache]:
        """Writes [B, t] tokens to slots index, ..., index + t - 1 and returns their logits [B, t,
        V]. With ``prompts`` t is 1, and each group of rows attends to its prompt too.
        """
        states, written = self.decode_hidden(tokens, positions, key_mask, cache, index, prompts)
        return self.unembed(states), written

    def decode_hidden(
        self,
        tokens: Array,
        positions: Array,
        key_mask: Array,
        cache: Cache,
        index: Array | int,
        prompts: Prompts | None = None,
    ) -> tuple[Array, Cache]:
        """``decode``, but the hidden states [B, t, D] of the tokens, after the final norm."""
        length = tokens.shape[1]
        seen = partial(attention.seen_in_cache, key_mask, index, length)
        views = self.views(positions, seen)
        own_mask = lax.dynamic_slice_in_dim(
            key_mask, index, length, axis=1, allow_negative_indices=False
        )
        x = self.embed(tokens, positions, own_mask != 0)
        start = None if attention.is_start(index) else jnp.asarray(index)
        held: Any = cache
        if prompts is not None:
            held = shared.beside(self.config, prompts, cache, jnp.asarray(index))
        x, written = self.through_layers(x, views, held, start, None)
        return self.ln_f(x), written

    def __call__(self, tokens: Array, attention_mask: Array) -> Array:
        return self.unembed(self.hidden(tokens, attention_mask))


class Table(Given):
    """A table of tokens or positions: "embedding" [rows, D]."""

    config: ModelConfig
    rows: int

    def setup(self) -> None:
        initial = initialize.normal(self.config.initializer_range)
        shape = (self.rows, self.config.hidden_size)
        self.embedding = self.param("embedding", initial, shape)


def table(config: ModelConfig, rows: int) -> Table:
    """A table of tokens or positions, [rows, D]."""
    return Table(config, rows)


def _padded(rows: Array) -> Array:
    """A token table sharded over ``tensor``, padded with zeros, whose logits are cut off."""
    rows = jnp.pad(rows, ((0, -len(rows) % tensor_parts()), (0, 0)))
    axes = tensor_axes()
    if "fsdp" not in axes:
        rows = cut(rows, "tensor", width="fsdp")  # or else XLA sends the whole table
    return cut(rows, *axes)


def apart(stacked: Any) -> tuple[Any, ...]:
    """The layers of a tree of arrays [L, ...], each by an index that XLA does not know.

    With constant indices XLA would compile a slice of each array of each layer by itself: for 24
    layers nine tenths of the time of a sampler.
    """
    smallest = min(jax.tree.leaves(stacked), key=jnp.size)
    first = smallest[(slice(2), *[0] * (smallest.ndim - 1))]
    # Zeros made of data, so that XLA cannot compute the maximum of them plus i.
    zeros = jnp.minimum(jnp.abs(first), 0).astype(jnp.int32)
    rows = tuple(zeros + i for i in range(len(smallest)))
    start = (jnp.int32(0),) * len(rows)
    numbers = lax.reduce(rows, start, partial(jax.tree.map, jnp.maximum), (0,))
    slice_at = partial(lax.dynamic_index_in_dim, keepdims=False, allow_negative_indices=False)

    def layer(number: Array) -> Any:
        return jax.tree.map(lambda leaf: slice_at(leaf, number), stacked)

    return tuple(map(layer, numbers))


def for_decoding(config: ModelConfig, params: Params) -> Params:
    """Parameters in the form that ``decode`` needs, so that it neither slices nor casts a weight
    for each token.

    The stacked layers of ``scan_layers``, "h" [L - 1, ...], become "h_0", "h_1", ...; kernels,
    their biases and adapters, and the output table (a second time, under "unembedding") get the
    compute dtype where it is smaller than their own. Such parameters are returned as they are.
    """
    if "unembedding" in params:
        return params
    params = dict(params)
    if "h" in params:
        layers = apart(params.pop("h"))
        params |= {f"h_{i}": layer for i, layer in enumerate(layers)}
    params["unembedding"] = params.get("lm_head", params["wte"])["embedding"]
    leaves = flatten_dict(params)
    dtype = jnp.dtype(config.compute_dtype)
    for path, leaf in leaves.items():
        is_linear = path[0].startswith("h_") and (*path[:-1], "kernel") in leaves
        is_linear = is_linear and path[-1] not in (quantization.COLUMNS, quantization.BLOCKS)
        is_cast = is_linear or path == ("unembedding",)
        if is_cast and leaf.dtype.itemsize > dtype.itemsize:
            leaves[path] = leaf.astype(dtype)
    return unflatten_dict(leaves)


def init_cache(config: ModelConfig, batch: int, length: int) -> Cache:
    """An empty cache: keys and values of each layer, as ``LayerCache``, in the compute dtype; a
    layer with a window has slots for the window only.
    """
    cache = []
    for is_local in config.local_layers:
        window = config.windows[is_local]
        slots = min(window or length, length)
        values = jnp.zeros((batch, config.kv_heads, slots, config.head_size), config.compute_dtype)
        cache.append(caches.held(jnp.zeros_like(values), values))
    return tuple(cache)
