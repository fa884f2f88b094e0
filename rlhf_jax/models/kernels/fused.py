"""Fused attention for GPU and TPU: kernels that hold no scores."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec, get_abstract_mesh

from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.parallel.sharding import tensor_axes


def platform() -> str:
    """The platform of the program that is being traced: that of the mesh of ``jax.set_mesh``, of
    ``jax.default_device``, or JAX's default.

    It is for choices of shapes and of the gradient's memory, which must be made before a program is
    lowered. Under ``jit`` nobody knows on which devices the arguments lie.
    """
    of_mesh = get_abstract_mesh().abstract_device
    # A device, the name of a platform or None.
    device = of_mesh or jax.config.jax_default_device  # type: ignore[attr-defined]
    return str(getattr(device, "platform", device) or jax.default_backend())


def takes_pallas() -> bool:
    """Whether a Pallas kernel compiles: of several devices it must know the mesh
    (``on_each_device``).
    """
    has_mesh = not get_abstract_mesh().empty
    return has_mesh or jax.device_count() == 1


def fastest(config: TransformerConfig) -> str:
    """The implementation of attention for long texts.

    A layer of GPT-2 then holds no [B, H, T, T] scores; XLA's compilers for H200 and TPU v5e show
    three kernels in place of some thirty.
    """
    if platform() == "tpu" and takes_pallas():
        return "splash"
    is_bfloat16 = config.compute_dtype == "bfloat16"
    if platform() == "gpu" and is_bfloat16 and fits_cudnn(config.head_size):
        return "cudnn"
    return "blockwise"


def fits_cudnn(head_size: int) -> bool:
    """Whether cuDNN's attention takes heads of this size: up to 256 on a Hopper or a later card,
    up to 128 on others, and where programs are compiled for a card that is not here.
    """
    largest = 128
    if jax.default_backend() == "gpu":
        [card, *_] = jax.local_devices(backend="gpu")
        major, _, _ = str(getattr(card, "compute_capability", "")).partition(".")
        largest = 256 if major.isdigit() and int(major) >= 9 else 128
    return head_size % 8 == 0 and head_size <= largest


def attention(
    query: Array,
    key: Array,
    value: Array,
    documents: Array,
    lengths: Array | None = None,
    *,
    name: str,
    window: int | None,
) -> Array:
    """Attention of a whole text with itself by a kernel that holds no scores; its softmax is in
    float32.

    Args:
        query: [B, H, G, T, Dh], times the scale; key, value: [B, H, T, Dh].
        documents: [B, T] as ``attention_mask``. A pad attends to other pads; its result has no
            meaning.
        lengths: [B] as in ``Seen``; cuDNN then reads no mask. A pad's result is 0.
        name: "splash" (Pallas, on TPU) or "cudnn" (bfloat16, on GPU; its mask is [B, 1, T, T] in
            bfloat16).
        window: as in ``seen_in_text``.
    """
    shape = query.shape
    length = shape[3]
    multiple = 128 if name == "splash" else 2
    columns = (0, -length % multiple)

    def padded(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, 0), columns, (0, 0)))

    query = padded(query.reshape(shape[0], -1, *shape[3:]))
    documents = jnp.pad(documents.astype(jnp.int32), ((0, 0), columns))
    of_rows = documents
    attend: Callable[..., Array] = _splash if name == "splash" else _cudnn
    if lengths is not None and name == "cudnn":
        of_rows = lengths
        attend = _cudnn_of_lengths
    kernel = functools.partial(attend, window=window)
    arrays = (query, padded(key), padded(value))
    mixed = on_each_device(kernel, key.shape[1], arrays, of_rows)
    return mixed[:, :, :length].reshape(shape)


@jax.custom_vjp
def turned(x: Array, by: Array) -> Array:
    """Rows [B, T, ...] turned to the left by ``by`` [B] columns: what leaves in front follows at
    the end. Its gradient is turned back, where XLA would add up numbers at computed places.
    """
    length = x.shape[1]
    columns = (jnp.arange(length)[None] + by[:, None]) % length
    further = (1,) * (x.ndim - 2)
    return jnp.take_along_axis(x, columns.reshape(*columns.shape, *further), axis=1)


def _turned_forward(x: Array, by: Array) -> tuple[Array, Array]:
    return turned(x, by), by


def _turned_backward(by: Array, grad: Array) -> tuple[Array, None]:
    return turned(grad, -by), None


turned.defvjp(_turned_forward, _turned_backward)


def on_each_device(
    kernel: Callable[..., Array],
    num_heads: int,
    of_heads: Sequence[Array],
    of_rows: Array,
    places: Sequence[int] | None = None,
) -> Array:
    """``kernel(*of_heads, of_rows)``, applied on each device to its rows and heads, on the mesh of
    ``jax.set_mesh``.

    XLA cannot partition a Pallas kernel, nor cuDNN's under ``shard_map``. Axes that are already
    mapped stay mapped. Rows or heads that are not divisible by their axes are whole on each device.

    Args:
        num_heads: of the keys.
        of_heads: arrays [B, heads, ...]; the result is one too.
        of_rows: an array [B, ...].
        places: the axis of the heads in each of ``of_heads``; None: 1.
    """
    mesh = get_abstract_mesh()
    if not mesh.auto_axes:
        return kernel(*of_heads, of_rows)

    def axes(size: int, *names: str) -> tuple[str, ...] | None:
        """Those of the axes that are not mapped yet; None if they do not divide the size."""
        left = tuple(name for name in names if name in mesh.auto_axes)
        return None if size % math.prod(mesh.shape[name] for name in left) else left

    of_tensor = tensor_axes()
    rows = axes(len(of_rows), *(name for name in ("data", "fsdp") if name not in of_tensor))
    over_heads = axes(num_heads, *of_tensor)
    between = [(None,) * (place - 1) for place in places or [1] * len(of_heads)]
    specs = [PartitionSpec(rows, *others, over_heads) for others in between]
    mapped = jax.shard_map(
        kernel,
        in_specs=(*specs, PartitionSpec(rows)),
        out_specs=PartitionSpec(rows, over_heads),
        axis_names={*mesh.auto_axes},
        check_vma=False,  # Pallas kernels do not say over which axes their results vary
    )
    mixed: Array = mapped(*of_heads, of_rows)
    return mixed


def _splash(
    query: Array,
    key: Array,
    value: Array,
    documents: Array,
    *,
    window: int | None,
) -> Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    num_heads, length = query.shape[1:3]
    square = (length, length)
    if window is None:
        mask: splash.Mask = splash.CausalMask(square)
    else:
        mask = splash.LocalMask(square, (window - 1, 0), 0)
    heads = splash.MultiHeadMask([mask] * num_heads)
    attend = splash.make_splash_mha(heads, head_shards=1, q_seq_shards=1)
    segments = splash.SegmentIds(documents, documents)
    mixed: Array = jax.vmap(attend)(query, key, value, segments)
    return mixed


def _cudnn(
    query: Array,
    key: Array,
    value: Array,
    documents: Array,
    *,
    window: int | None,
) -> Array:
    return _causal(query, key, value, window, mask=_visible(documents))


def _cudnn_of_lengths(
    query: Array,
    key: Array,
    value: Array,
    lengths: Array,
    *,
    window: int | None,
) -> Array:
    of_rows = {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths}
    return _causal(query, key, value, window, **of_rows)


def _causal(query: Array, key: Array, value: Array, window: int | None, **of_rows: Any) -> Array:
    """cuDNN's causal attention, given a mask of rows or their lengths."""
    mixed: Array = jax.nn.dot_product_attention(
        query.swapaxes(1, 2),
        key.swapaxes(1, 2),
        value.swapaxes(1, 2),
        scale=1.0,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
        **of_rows,
    )
    return mixed.swapaxes(1, 2)


def _visible(documents: Array) -> Array:
    """[B, 1, T, T] bool: whether two tokens are of one document."""
    is_own = documents[:, :, None] == documents[:, None, :]
    return (is_own & (documents != 0)[:, None, :])[:, None]
