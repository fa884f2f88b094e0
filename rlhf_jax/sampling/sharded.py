"""Sampling on several devices: how rows and weights are sharded while ``generate`` runs."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf_jax import models
from rlhf_jax.parallel import sharding
from rlhf_jax.types import Params, Rollout

# From this many bytes of weights in a layer on, heads and mlp are sharded over "fsdp" while a batch
# is sampled: an H200 reads so many in 14 microseconds, about the time of the two sums over devices
# that the sharding needs.
LARGE_LAYER = 2**26


def map_rows(
    sample_rows: Callable[..., Rollout],
    model: Any,
    weights: tuple[Params, ...],
    key: Array,
    prompts: Any,
    mesh: Mesh,
) -> Rollout:
    """``sample_rows(weights, key, prompts)`` with rows over "data" and "fsdp" of the mesh.

    Weights that are sharded over "fsdp" are gathered before the first token, and each device reads
    all of them for each token. Those of large layers are not: their heads and mlps are sharded over
    "fsdp" as over "tensor" (``sharding.tensor_axes``), and the rows over "data" only.

    Args:
        weights: for the pass over the prompt, and for decoding; those for decoding alone, which are
            the last, serve both where they have to be gathered.
    """
    if sharding.is_cut(mesh):
        weights = weights[-1:]
    by_heads = _is_large(model, weights[-1], mesh)
    rows = NamedSharding(mesh, PartitionSpec("data")) if by_heads else sharding.rows(mesh)
    # XLA:GPU cannot partition cuDNN's attention where one axis is mapped by hand and another is
    # left to the compiler, even if that has one device.
    axes = {name for name in mesh.axis_names if name != "tensor" or mesh.shape[name] == 1}
    if by_heads:
        axes = {"data"}
        weights = jax.lax.with_sharding_constraint(weights, (_over_heads(weights[-1], mesh),))
        prompts = jax.lax.with_sharding_constraint(prompts, rows)
    sampled: Rollout = jax.shard_map(
        sample_rows,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(), rows.spec),
        out_specs=rows.spec,
        axis_names=axes,
        check_vma=False,  # it refuses a while_loop whose carry only ends different on devices
    )(weights, key, prompts)
    if by_heads:
        # In two steps: otherwise XLA shards the rows over "fsdp" inside the loop too.
        sampled = jax.lax.with_sharding_constraint(sampled, rows)
        sampled = jax.lax.with_sharding_constraint(sampled, sharding.rows(mesh))
    return sampled


def _is_large(model: Any, weights: Params, mesh: Mesh) -> bool:
    """Whether a layer is so large, and divides so, that it is sharded by heads."""
    if not isinstance(model, models.Model) or mesh.shape.get("fsdp", 1) == 1:
        return False
    layer = jax.tree.leaves(weights["h_0"])
    size = sum(leaf.size * jax.dtypes.itemsize_bits(leaf.dtype) for leaf in layer) // 8
    config = model.config
    width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    parts = mesh.shape["fsdp"] * mesh.shape["tensor"]
    return size >= LARGE_LAYER and math.gcd(config.kv_heads, width) % parts == 0


def _over_heads(weights: Params, mesh: Mesh) -> Any:
    """Shardings over "fsdp" and "tensor" together of what is sharded over "tensor"."""
    parts = mesh.shape["fsdp"] * mesh.shape["tensor"]
    alone = sharding.make_mesh(
        mesh.shape["data"], fsdp=1, tensor=parts, devices=list(mesh.devices.flat)
    )

    def join(place: NamedSharding) -> NamedSharding:
        axes = [("fsdp", "tensor") if "tensor" in (axis or ()) else None for axis in place.spec]
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree.map(join, sharding.by_path(weights, models.SHARDING, alone))
