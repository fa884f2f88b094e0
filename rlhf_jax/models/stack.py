"""What the families share: linear layers, norms, attention with a cache, residual blocks, and the
model around them.

A family gives a ``Transformer`` its embedding, blocks and final norm; see gpt2.py, decoder.py.
Parameters are {"wte", "h_0", ..., "ln_f", ...}; under ``scan_layers`` one "h" with a leading [L -
1] axis stands for all layers but the last. Dropout acts where a "dropout" key is given. The cache
is an argument and a result: no mutable collections.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from rlhf_jax.models import attention
from rlhf_jax.models.attention import Number, Seen
from rlhf_jax.models.config import GPT2Config, ModelConfig
from rlhf_jax.models.norms import norm
from rlhf_jax.sharding import cut, parts
from rlhf_jax.types import Params

Rotation = Array  # cosines, then sines, of the angles: [2, B, 1, T, Dh / 2] float32
View = tuple[Seen, Rotation | None]  # who sees whom, and how queries and keys are turned
Views = tuple[View, ...]  # of all layers, or of those that see all and those with a window
LayerCache = tuple[
    Array, Array
]  # keys [B, H, Dh, S], as one query's product reads them, and values [B, H, S, Dh]
Cache = tuple[LayerCache, ...]
Columns = (
    slice | Array | None
)  # which columns of [B, T] are read: the same of each row, [B, n] numbers, or None: all
Layer = tuple[
    Number, Array | bool
]  # factor of a layer's attention scores, and whether it takes the second view

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    # The backward pass computes it again: its tanh would take longer to write and read.
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh"), jax.checkpoint(jax.nn.gelu)),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


@jax.custom_vjp
def product(x: Array, kernel: Array) -> Array:
    """x [..., D] @ kernel [D, F]; on a CPU the kernel's gradient is computed of two halves of the
    rows.

    XLA's faster CPU kernel takes them as they lie, where it would transpose the whole for its
    slower one. All products of a training step are then of halves, for XLA would compute what two
    shapes share twice, once for each.
    """
    return x @ kernel


def _halves(x: Array) -> Array:
    """The rows of x [..., D]: [2, N / 2, D] on a CPU, else [1, N, D]."""
    is_apart = jax.default_backend() == "cpu" and (x.size // x.shape[-1]) % 2 == 0
    return x.reshape(
        1 + (is_apart and not jax.sharding.get_abstract_mesh().auto_axes), -1, x.shape[-1]
    )


def _times(x: Array, kernel: Array, axis: int, is_trained: bool) -> Array:
    """x [..., D] times a kernel, whose given axis is D; of halves, with a copy of the kernel each,
    if it is trained.
    """
    halves = _halves(x)
    if not is_trained or len(halves) == 1 or halves.shape[1] < 2 * max(kernel.shape):
        return jnp.tensordot(x, kernel, ((-1,), (axis,)))
    twice, numbers = (
        jnp.broadcast_to(kernel, (2, *kernel.shape)),
        (((2,), (1 + axis,)), ((0,), (0,))),
    )
    return jax.lax.dot_general(halves, twice, numbers).reshape(*x.shape[:-1], -1)


def _product_forward(x: Any, kernel: Any) -> tuple[Array, tuple[Array | None, Array | None]]:
    # What a gradient needs is kept where one is asked for: not a frozen kernel's under adapters.
    kept = (x.value if kernel.perturbed else None, kernel.value if x.perturbed else None)
    return _times(x.value, kernel.value, 0, kernel.perturbed), kept


def _product_backward(
    saved: tuple[Array | None, Array | None], grad: Array
) -> tuple[Array | None, Array | None]:
    x, kernel = saved
    x_grad, kernel_grad = None if kernel is None else _times(grad, kernel, 1, x is not None), None
    if x is not None:
        narrow, wide = sorted(
            (x, grad), key=lambda rows: rows.shape[-1]
        )  # faster than the other way round
        parts = jnp.einsum("gna,gnb->gab", _halves(narrow), _halves(wide))
        kernel_grad = functools.reduce(jnp.add, parts if narrow is x else parts.mT)
    return x_grad, kernel_grad


product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)


def _dot(x: Array, kernel: Array) -> Array:
    """x [..., D] times kernel [D, ...], whose last axes become one where no device holds a part of
    them.
    """
    if parts("tensor") > 1:
        return jnp.tensordot(x, kernel, 1)
    return product(x, kernel.reshape(len(kernel), -1)).reshape(*x.shape[:-1], *kernel.shape[1:])


class Given(nn.Module):
    """A module that compares the shapes of the parameters it is given with numbers.

    Flax would compare them with its initializers', which it traces for that: a quarter of all
    tracing.
    """

    @nn.nowrap
    def param(self, name: str, *initial: Any, **how: Any) -> Any:
        if not self.has_variable("params", name):
            return super().param(name, *initial, **how)
        given: Any = self.get_variable("params", name)
        if given.shape != (shape := tuple(initial[1])):
            raise ValueError(
                f"parameter {'/'.join((*self.path, name))} is {given.shape}, this model's is "
                f"{shape}"
            )
        return given


class Dense(Given):
    """x [..., D] times "kernel" [D, *features], plus "bias" [*features], in ``dtype``.

    Plus ``lora_scale * (x @ lora_a) @ lora_b`` if these are given (``lora.attach``).
    """

    features: int | tuple[int, ...]
    dtype: Any
    kernel_init: Any
    use_bias: bool = True

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        features = self.features if isinstance(self.features, tuple) else (self.features,)
        kernel = self.param("kernel", self.kernel_init, (inputs.shape[-1], *features))
        bias = self.param("bias", nn.initializers.zeros, features) if self.use_bias else None
        x, kernel, bias = promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        out = _dot(x, kernel)
        out = (
            out if bias is None else out + jnp.broadcast_to(bias, out.shape)
        )  # one operation, by numpy's rules four
        if not self.has_variable("params", "lora_a"):
            return out
        adapter: list[Any] = [
            self.get_variable("params", name) for name in ("lora_a", "lora_b", "lora_scale")
        ]
        a, b = promote_dtype(*adapter[:2], dtype=self.dtype)
        return out + jax.lax.stop_gradient(adapter[2]).astype(out.dtype) * _dot(
            cut(x @ a, "data", "fsdp"), b
        )


class Norm(Given):
    """GPT-2's layer norm, with parameters "scale" and "bias", or the decoders' RMSNorm, with
    "scale" alone.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config, initial, shape = self.config, nn.initializers.constant, x.shape[-1:]
        if isinstance(config, GPT2Config):
            bias = self.param("bias", initial(0.0), shape)
            return norm(
                x, self.param("scale", initial(1.0), shape), bias, config.layer_norm_epsilon
            )
        scale = self.param("scale", initial(1.0 - config.norm_offset), shape).astype(jnp.float32)
        return norm(
            x,
            config.norm_offset + scale if config.norm_offset else scale,
            None,
            config.rms_norm_epsilon,
        )


def rotate(x: Array, rotation: Rotation) -> Array:
    """[B, H, T, Dh] turned by its positions (Su et al. 2021), in float32; the dtype is kept."""
    (first, second), (cosine, sine) = jnp.split(x.astype(jnp.float32), 2, axis=-1), rotation
    return jnp.concatenate(
        [first * cosine - second * sine, second * cosine + first * sine], axis=-1
    ).astype(x.dtype)


def pick(x: Array, columns: Columns, axis: int) -> Array:
    """The given columns of x [B, ...], which lie along ``axis``."""
    if columns is None:
        return x
    if isinstance(columns, slice):
        return jax.lax.slice_in_dim(x, columns.start, columns.stop, axis=axis)
    shape = [
        columns.shape[1] if i == axis else columns.shape[0] if i == 0 else 1 for i in range(x.ndim)
    ]
    return jnp.take_along_axis(x, columns.reshape(shape), axis=axis)


def seen_at(seen: Seen, columns: Columns) -> Seen:
    """Whom the queries in the given columns see."""
    slots, documents = (pick(x, columns, axis=1) for x in (seen.slots, seen.documents))
    mask = None if seen.mask is None else pick(seen.mask, columns, axis=2)
    return seen._replace(slots=slots, documents=documents, mask=mask)


class Attention(nn.Module):
    """Self-attention over the tokens given, or over a cache that they are first written to at slots
    index, ...

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
        cache: LayerCache | None,
        index: Array | None,
        columns: Columns,
    ) -> tuple[Array, LayerCache | None]:
        (seen, rotation), (scale, is_local), config = view, layer, self.config
        query, key, value = self.project(x)
        dtype, query = query.dtype, query.astype(jnp.float32) * scale
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        query = query.astype(dtype)
        batch, heads, length, width = query.shape
        if cache is not None:
            start = 0 if index is None else index
            held, new = (cache[0].mT, cache[1]), (key, value)
            cache = (
                attention.written(cache[0], key.mT, 3, start),
                attention.written(cache[1], value, 2, start),
            )
            if len(seen.key_slots) == cache[1].shape[2]:
                key, value = cache[0].mT, cache[1]
            elif (
                len(seen.key_slots) > length
            ):  # a window's cache, which would lose what the first of these queries see
                key, value = (
                    jnp.concatenate(parts, axis=2) for parts in zip(held, new, strict=True)
                )
        query = query.reshape(batch, key.shape[1], -1, length, width)
        drops = self.has_rng("dropout") and config.attention_dropout > 0
        drop = (self.make_rng("dropout"), config.attention_dropout) if drops else None
        name = attention.implementation(config, length, key.shape[2], drops)
        if name in ("xla", "blockwise"):
            compute = attention.blockwise
            if name == "xla":
                first = (
                    (columns.start if isinstance(columns, slice) else 0)
                    if key.shape[2] == length
                    else None
                )
                first = None if isinstance(columns, Array) else first
                compute = functools.partial(
                    attention.attention, first=first, summed=config.num_layers >= attention.DEEP
                )
            query, seen = pick(query, columns, axis=3), seen_at(seen, columns)
            mixed = compute(query, key, value, seen, drop)
        else:
            kernels = [
                functools.partial(attention.fused, name=name, window=window)
                for window in config.windows
            ]
            whole = jax.lax.switch(
                jnp.int32(is_local), kernels, query, key, value, seen.key_documents
            )
            mixed = pick(whole, columns, axis=3)
        mixed = mixed.reshape(batch, heads, -1, width).transpose(0, 2, 1, 3)
        return self.output(mixed.reshape(batch, -1, heads * width)), cache


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x)).

    A family's subclass makes "attn" and "mlp" in ``setup``, then calls ``add_norms``; what is added
    is normed too where its config has ``post_norms``.
    """

    config: Any

    def add_norms(self, dropout: float) -> None:
        """Makes the other parts, of the family's rate."""
        self.ln_1, self.ln_2, self.dropout = (
            Norm(self.config),
            Norm(self.config),
            nn.Dropout(dropout),
        )
        if self.config.post_norms:
            self.ln_1_post, self.ln_2_post = Norm(self.config), Norm(self.config)

    def __call__(
        self,
        x: Array,
        views: Views,
        layer: Layer,
        cache: LayerCache | None,
        index: Array | None,
        columns: Columns,
    ) -> tuple[Array, LayerCache | None]:
        deterministic, view = not self.has_rng("dropout"), views[0]
        if len(views) > 1:
            view = jax.tree.map(lambda whole, local: jnp.where(layer[1], local, whole), *views)
        attended, cache = self.attn(self.ln_1(x), view, layer, cache, index, columns)
        attended = self.ln_1_post(attended) if self.config.post_norms else attended
        x = cut(
            pick(x, columns, axis=1) + self.dropout(attended, deterministic=deterministic),
            "data",
            "fsdp",
        )
        written = self.mlp(self.ln_2(x))
        written = self.ln_2_post(written) if self.config.post_norms else written
        return cut(x + self.dropout(written, deterministic=deterministic), "data", "fsdp"), cache


class Transformer(nn.Module):
    """Embedding, blocks, final norm and output table.

    A family's subclass makes "ln_f" and its tables in ``setup``, calls ``add_layers`` there, and
    defines ``scales``, [L] factors of the layers' attention scores, and ``embed``: [B, T] tokens,
    positions and whether a token is no pad -> [B, T, D] in the compute dtype.
    """

    config: Any

    def add_layers(self, block: Any) -> None:
        """Makes the layers, of the family's class: "h" for the stacked ones, and "h_i" for each of
        the others.
        """
        config, stacked = self.config, self.config.num_stacked
        # Inside a scan nothing can be merged with the forward pass, so the barrier against that is
        # not needed.
        again = nn.remat(block, prevent_cse=not stacked) if config.remat else block
        if stacked:
            self.h = nn.scan(
                again,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(
                    nn.broadcast,
                    0,
                    0,
                    *[nn.broadcast] * 2,
                ),  # each layer has its own scale, view and cache
                length=stacked,
            )(config)
        elif not (self.is_initializing() or self.has_rng("dropout")):
            # Traced once for all layers of one scale and view; where numbers are drawn, nn.jit
            # would draw others.
            again = nn.jit(again, static_argnums=3)
        for i in range(stacked, config.num_layers):
            # The backward pass begins with the last block: it would be recomputed at once.
            setattr(self, f"h_{i}", (again if i + 1 < config.num_layers else block)(config))

    def rotation(self, positions: Array, is_local: bool) -> Rotation | None:
        """How queries and keys are turned at [B, T] positions; None without rotary positions."""
        return None

    def views(self, positions: Array, seen: Callable[..., Seen]) -> Views:
        """The layers' views: one, or one of the layers that see all and one of those with a window."""

        def view(window: int | None, is_local: bool) -> View:
            it = seen(window=window)
            name = attention.implementation(
                self.config, it.slots.shape[1], len(it.key_slots), False
            )
            it = it._replace(mask=attention.visible(it)) if name == "xla" else it
            return it, self.rotation(positions, is_local)

        return tuple(view(window, i > 0) for i, window in enumerate(self.config.windows))

    def token_rows(self, tokens: Array, real: Array) -> Array:
        """[B, T] tokens -> [B, T, D] rows of the token table."""
        # A pad may carry any id, also one outside the table; a real token outside it gives NaN
        # rather than a wrong row.
        table, ids = _padded(self.wte.embedding), jnp.where(real, tokens, 0)
        rows = jnp.take(table, jnp.where(ids < self.config.vocab_size, ids, len(table)), axis=0)
        return cut(rows, "data", "fsdp")

    def hidden(self, tokens: Array, attention_mask: Array, columns: Columns = None) -> Array:
        """[B, T] tokens and mask -> [B, T, D] after the final norm, in the compute dtype; of the
        given columns alone.

        The last block computes keys and values of all columns, and the rest where it is read; all
        of it where less than an eighth would be left out: one kernel then serves all layers.
        """
        places = attention.positions(attention_mask)
        x = self.embed(tokens, places, attention_mask != 0)
        views = self.views(places, functools.partial(attention.seen_in_text, attention_mask))
        early = (
            None
            if isinstance(columns, slice) and 8 * (columns.stop - columns.start) > 7 * x.shape[1]
            else columns
        )
        x, _ = self.through_layers(x, views, None, None, early)
        return self.ln_f(x) if early is columns else pick(self.ln_f(x), columns, axis=1)

    def through_layers(
        self, x: Array, views: Views, cache: Cache | None, index: Array | None, columns: Columns
    ) -> tuple[Array, Any]:
        """[B, T, D] after the last layer, of the given columns alone, and the cache with keys and
        values of all.
        """
        scales, local, stacked = self.scales(), self.config.local_layers, self.config.num_stacked
        written: list[Any] = []
        if stacked:
            shape = stacked, x.shape[0], self.config.kv_heads, x.shape[1], self.config.head_size
            empty = cache and (jnp.zeros(shape, x.dtype).mT, jnp.zeros(shape, x.dtype))
            layers = jnp.array(scales[:stacked], jnp.float32), jnp.array(local[:stacked])
            x, new = self.h(x, views, layers, empty, index, None)
            axes = ((3, 2),) * stacked  # of the slots of keys and of values
            write = functools.partial(attention.written, index=0)
            written += jax.tree.map(write, cache[:stacked], apart(new), axes) if cache else ()
        for i in range(stacked, len(scales)):
            block, held, read = (
                getattr(self, f"h_{i}"),
                cache and cache[i],
                columns if i + 1 == len(scales) else None,
            )
            x, held = block(x, (views[local[i]],), (scales[i], local[i]), held, index, read)
            written.append(held)
        return x, tuple(written)

    def unembed(self, hidden: Array) -> Array:
        """[..., D] -> [..., V] float32, inputs in the compute dtype."""
        dtype, is_given = self.config.compute_dtype, self.has_variable("params", "unembedding")
        tied = self.wte if getattr(self.config, "tie_embeddings", True) else self.lm_head
        table = _padded(
            self.get_variable("params", "unembedding") if is_given else tied.embedding
        ).astype(dtype)
        logits = jnp.einsum(
            "...d,vd->...v", hidden.astype(dtype), table, preferred_element_type=jnp.float32
        )
        return logits[..., : self.config.vocab_size]

    def decode(
        self, tokens: Array, positions: Array, key_mask: Array, cache: Cache, index: Array | int
    ) -> tuple[Array, Cache]:
        """Writes [B, t] tokens to slots index, ..., index + t - 1 and returns their logits [B, t,
        V].
        """
        views = self.views(
            positions, functools.partial(attention.seen_in_cache, key_mask, index, tokens.shape[1])
        )
        real = (
            jax.lax.dynamic_slice_in_dim(
                key_mask, index, tokens.shape[1], axis=1, allow_negative_indices=False
            )
            != 0
        )
        x = self.embed(tokens, positions, real)
        start = None if isinstance(index, int) and index == 0 else jnp.asarray(index)
        x, written = self.through_layers(x, views, cache, start, None)
        return self.unembed(self.ln_f(x)), written

    def __call__(self, tokens: Array, attention_mask: Array) -> Array:
        return self.unembed(self.hidden(tokens, attention_mask))


def table(config: ModelConfig, rows: int) -> nn.Embed:
    """A table of tokens or positions, [rows, D]."""
    return nn.Embed(
        rows, config.hidden_size, embedding_init=nn.initializers.normal(config.initializer_range)
    )


def _padded(rows: Array) -> Array:
    """A token table cut over ``tensor``; where that does not divide V, zeros follow, whose logits
    nobody sees.
    """
    rows = jnp.pad(rows, ((0, -len(rows) % parts("tensor")), (0, 0)))
    return cut(
        cut(rows, "tensor", width="fsdp"), "tensor"
    )  # XLA sends a table in two steps, or else all of it


def apart(stacked: Any) -> tuple[Any, ...]:
    """The layers of a tree of arrays [L, ...].

    Their numbers are data: for constants XLA would compile a slice of each array of each layer by
    itself, for 24 layers nine tenths of the time of a sampler.
    """
    smallest = min(jax.tree.leaves(stacked), key=jnp.size)
    # Zeros made of numbers that XLA does not know, so that it cannot compute the maximum of them
    # plus i.
    zeros = jnp.minimum(jnp.abs(smallest[(slice(2), *[0] * (smallest.ndim - 1))]), 0).astype(
        jnp.int32
    )
    rows = tuple(zeros + i for i in range(len(smallest)))
    numbers = jax.lax.reduce(
        rows, (jnp.int32(0),) * len(rows), functools.partial(jax.tree.map, jnp.maximum), (0,)
    )
    slice_at = functools.partial(
        jax.lax.dynamic_index_in_dim, keepdims=False, allow_negative_indices=False
    )
    return tuple(jax.tree.map(lambda leaf, i=i: slice_at(leaf, i), stacked) for i in numbers)


def for_decoding(config: ModelConfig, params: Params) -> Params:
    """Parameters as ``decode`` reads them, so that it neither slices nor casts a weight for each
    token.

    The stacked layers of ``scan_layers``, "h" [L - 1, ...], become "h_0", "h_1", ...; kernels,
    their biases and adapters, and the output table (a second time, under "unembedding") get the
    compute dtype where it is smaller than their own. Such parameters are returned as they are.
    """
    if "unembedding" in params:
        return params
    if "h" in params:
        layers = {f"h_{i}": layer for i, layer in enumerate(apart(params["h"]))}
        params = {name: leaf for name, leaf in params.items() if name != "h"} | layers
    leaves = flatten_dict(
        {**params, "unembedding": params.get("lm_head", params["wte"])["embedding"]}
    )
    for path, leaf in leaves.items():
        is_linear = path[0].startswith("h_") and (*path[:-1], "kernel") in leaves
        if (is_linear or path == ("unembedding",)) and leaf.dtype.itemsize > jnp.dtype(
            config.compute_dtype
        ).itemsize:
            leaves[path] = leaf.astype(config.compute_dtype)
    return unflatten_dict(leaves)


def init_cache(config: ModelConfig, batch: int, length: int) -> Cache:
    """An empty cache: keys and values of each layer, as ``LayerCache``, in the compute dtype; of
    its window alone.
    """

    def layer(is_local: bool) -> LayerCache:
        shape = (
            batch,
            config.kv_heads,
            min(config.windows[is_local] or length, length),
            config.head_size,
        )
        return jnp.zeros(shape, config.compute_dtype).mT, jnp.zeros(shape, config.compute_dtype)

    return tuple(layer(is_local) for is_local in config.local_layers)
