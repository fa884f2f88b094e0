"""One optimizer step, and many of them over shuffled minibatches. Every update is made of these two
functions.

A loss is a ``Mean`` (or a tuple of them) of the rows it is given. Its totals and their gradients
are summed over microbatches and then over devices, once, and divided by the global count: the
result does not depend on how the batch was cut. Under ``shard_map`` this works with
``check_vma=True`` and ``False``, and under ``pmap``.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax import ops
from rlhf_jax.sharding import cut
from rlhf_jax.types import AxisName, Loss, Max, Mean, Metrics, Params, Parts, Rollout, TrainState

State = TypeVar("State", bound=TrainState)

# Microbatches of rollouts with so many response slots are of rows of like length, and as wide as
# these need.
LONG = 128


def gradient_step(
    loss_fn: Callable[..., tuple[Loss, Parts]],
    state: State,
    optimizer: optax.GradientTransformation,
    *,
    batch: Any = None,
    key: jax.Array | None = None,
    num_microbatches: int = 1,
    axis_name: AxisName | None = None,
    minibatch_sharding: Any = None,
) -> tuple[State, Metrics]:
    """One step of ``optimizer`` down the gradient of a loss; the old state if loss or gradient is
    not finite.

    The optimizer gets ``value=loss`` too (optax's extra-args protocol), which ``reduce_on_plateau``
    needs.

    Args:
      loss_fn: ``loss_fn(params[, part][, key]) -> (loss, {name: Mean or Max})``; the part is given
        if there is a ``batch``, the key if there is a ``key``. The loss is a Mean, or a tuple of
        Means, each of which is divided by
        its own count before they are added, such as a policy loss per token and an SFT loss per
        row.
      batch: any pytree whose leaves [B, ...] share their leading axis. None leaves are allowed.
      key: of dropout; each microbatch on each device gets another one derived from it.
      num_microbatches: parts that are run one after the other to save memory; divides B. Row i is
        in part ``i % num_microbatches``, so that each device of a sharded batch has rows in every
        part. The rows of a Rollout
        with `LONG` response slots and a ``prompt_length`` are put in the order of their length
        first, and a part whose
        responses fill at most a quarter or a half of the slots is computed without the others: that
            costs a compiled
        copy of the loss for each width, and rounding.
      axis_name: the mapped axis (or axes) over whose devices the batch is spread.
      minibatch_sharding: the NamedSharding of the batch's rows under plain ``jit``. With it the
        gradients of the microbatches are added up on each device and summed over the devices once,
        where its first axis is the whole
        mesh and parameters are copies. Else XLA sums over the devices in each microbatch.

    Returns:
      The state, of the caller's class, and the metrics of ``loss_fn`` with ``loss``, ``grad_norm``
      (before the optimizer's clipping) and ``nonfinite``, 1 if the state was kept, else 0.

    Raises:
      ValueError: ``num_microbatches`` does not divide B, or there is no batch to divide.
      TypeError: ``loss_fn`` returns something else than Means.
    """
    gradient: Callable[..., Any] = partial(
        _global_gradient, loss_fn, num_microbatches=num_microbatches, axis_name=axis_name
    )
    if num_microbatches > 1 and isinstance(minibatch_sharding, NamedSharding):
        gradient = _reduced_once(gradient, minibatch_sharding, _num_rows(batch) // num_microbatches)
    loss, metrics, grads = gradient(state.params, batch, key)
    squares = [jnp.sum(jnp.square(jnp.abs(g.astype(jnp.float32)))) for g in jax.tree.leaves(grads)]
    grad_norm = jnp.sqrt(sum(squares, jnp.zeros(())))
    update = optax.with_extra_args_support(optimizer).update
    updates, opt_state = update(grads, state.opt_state, state.params, value=loss)
    params = optax.apply_updates(state.params, updates)
    new = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state)
    finite = jnp.all(jnp.isfinite(jnp.stack([loss, grad_norm])))
    state = jax.tree.map(
        lambda new_leaf, old_leaf: jnp.where(finite, new_leaf, old_leaf), new, state
    )
    nonfinite = 1.0 - finite.astype(jnp.float32)
    return state, {**metrics, "loss": loss, "grad_norm": grad_norm, "nonfinite": nonfinite}


def minibatch_epochs(
    step: Callable[[State, Any, jax.Array], tuple[State, Metrics]],
    state: State,
    batch: Any,
    key: jax.Array,
    *,
    num_epochs: int,
    num_minibatches: int,
    shuffle_blocks: int = 1,
    axis_name: AxisName | None = None,
    minibatch_sharding: Any = None,
) -> tuple[State, Metrics]:
    """Runs ``step`` on every minibatch of every epoch: ``num_epochs * num_minibatches`` steps,
    compiled once.

    The B rows of the global batch form ``shuffle_blocks`` equal contiguous blocks. Each epoch
    permutes the rows inside each block with a fresh key (``fold_in(fold_in(key, epoch), block)``),
    and each minibatch takes an equal slice of each block. When ``shuffle_blocks`` is a multiple of
    the number of devices no row moves between devices, and one device, ``jit`` over a sharded batch
    and ``shard_map`` form the same minibatches in the same row order. A single minibatch is the
    batch as it is.

    Args:
      step: ``step(state, minibatch, key) -> (state, metrics)`` with a key of its own for each call.
      batch: any pytree whose leaves [B, ...] share their leading axis, on each device its shard.
        None leaves are allowed.
      num_minibatches: minibatches of an epoch.
      shuffle_blocks: blocks of the global batch, whatever the number of devices.
      axis_name: the mapped axis over whose devices the batch is spread; each holds ``shuffle_blocks
        / axis size`` of the blocks.
      minibatch_sharding: sharding (or a tree prefix of shardings) of the minibatches under plain
        ``jit``. XLA may otherwise replicate a shuffled batch on every device.

    Returns:
      The last state, and the metrics averaged over the steps (``nonfinite`` and ``_max`` metrics:
      their maximum).

    Raises:
      ValueError: the rows do not divide into blocks and minibatches, or the blocks into devices.
    """
    for name, number in (
        ("epochs", num_epochs),
        ("minibatches", num_minibatches),
        ("shuffle_blocks", shuffle_blocks),
    ):
        ops.check_number(name, number, at_least=1)
    num_rows = _num_rows(batch)
    local = (
        _local_blocks(num_rows, num_minibatches, shuffle_blocks, axis_name)
        if num_minibatches > 1
        else (0, 1)
    )
    first_block, num_blocks = local
    block_size = num_rows // num_blocks
    blocks = jax.tree.map(lambda x: x.reshape(num_blocks, block_size, *x.shape[1:]), batch)

    def run_epoch(state: State, epoch: jax.Array) -> tuple[State, Metrics]:
        # The keys of the steps start where those of the shuffles end: no key is used twice.
        step_key = jax.random.fold_in(key, num_epochs + epoch)
        if num_minibatches == 1:
            return step(
                state, _constrained(batch, minibatch_sharding), jax.random.fold_in(step_key, 0)
            )

        epoch_key = jax.random.fold_in(key, epoch)
        block_keys = jax.vmap(lambda block: jax.random.fold_in(epoch_key, block))(
            first_block + jnp.arange(num_blocks)
        )
        orders = jax.vmap(lambda block_key: jax.random.permutation(block_key, block_size))(
            block_keys
        )
        orders = orders.reshape(
            num_blocks, num_minibatches, block_size // num_minibatches
        ).swapaxes(0, 1)

        def run_minibatch(
            state: State, inputs: tuple[jax.Array, jax.Array]
        ) -> tuple[State, Metrics]:
            index, order = inputs  # order: [blocks, rows of the minibatch in each block]

            def take(x: jax.Array) -> jax.Array:
                rows = jax.vmap(lambda block, rows: block[rows])(x, order)
                return rows.reshape(num_rows // num_minibatches, *x.shape[2:])

            minibatch = _constrained(jax.tree.map(take, blocks), minibatch_sharding)
            return step(state, minibatch, jax.random.fold_in(step_key, index))

        state, metrics = jax.lax.scan(run_minibatch, state, (jnp.arange(num_minibatches), orders))
        return state, _average(metrics)

    state, metrics = jax.lax.scan(run_epoch, state, jnp.arange(num_epochs))
    return state, _average(metrics)


def batch_updater(
    loss: Callable[..., tuple[Loss, Parts]],
    batch_metrics: Callable[[Any, AxisName | None], Metrics] = lambda batch, axis_name: {},
) -> Callable[..., tuple[Any, Metrics]]:
    """The ``update`` of SFT, DPO and reward models: one optimizer step on the loss of a batch.

    ``update(state, batch, key, *, policy_fn or score_fn, optimizer, config, axis_name=None,
    minibatch_sharding=None)`` returns the new state and the metrics of ``loss``, of
    ``gradient_step`` and of ``batch_metrics``. The key is of dropout, another for each microbatch;
    None turns it off.

    Args:
      loss: ``loss(params, batch, key, *, policy_fn or score_fn, config) -> (Loss, {name: Mean or
        Max})``.
      batch_metrics: ``(batch, axis_name) -> metrics``.
    """

    def update_on_batch(
        state: State,
        batch: Any,
        key: jax.Array | None,
        *,
        optimizer: optax.GradientTransformation,
        config: Any,
        axis_name: AxisName | None = None,
        minibatch_sharding: Any = None,
        **model: Any,
    ) -> tuple[State, Metrics]:
        """One optimizer step on a batch; see ``step.batch_updater``."""

        def loss_fn(
            params: Params, part: Any, part_key: jax.Array | None = None
        ) -> tuple[Loss, Parts]:
            return loss(params, part, part_key, config=config, **model)

        batch = _constrained(batch, minibatch_sharding)
        options = {"num_microbatches": config.num_microbatches, "axis_name": axis_name}
        options["minibatch_sharding"] = minibatch_sharding
        state, metrics = gradient_step(loss_fn, state, optimizer, batch=batch, key=key, **options)
        return state, {**metrics, **batch_metrics(batch, axis_name)}

    return update_on_batch


def _constrained(batch: Any, sharding: Any) -> Any:
    """The batch with this sharding (or tree prefix of shardings) under plain ``jit``; as it is if
    that is None.
    """
    return batch if sharding is None else jax.lax.with_sharding_constraint(batch, sharding)


def _reduced_once(
    gradient: Callable[..., Any], sharding: NamedSharding, part_rows: int
) -> Callable[..., Any]:
    """``gradient`` by ``shard_map``, which sums over the devices after the last microbatch; as it
    is if the rows' first axis is not the whole mesh, or a microbatch of ``part_rows`` does not
    divide over it."""
    axes, mesh = sharding.spec[0], sharding.mesh
    axis = axes[0] if isinstance(axes, tuple) else axes
    if axis is None or not 1 < mesh.shape[axis] == mesh.size or part_rows % mesh.size:
        return gradient
    specs = PartitionSpec(), PartitionSpec(axis), PartitionSpec()
    return jax.shard_map(
        partial(gradient, axis_name=axis), mesh=mesh, in_specs=specs, out_specs=PartitionSpec()
    )


def _global_gradient(
    loss_fn: Callable[..., tuple[Loss, Parts]],
    params: Params,
    batch: Any,
    key: jax.Array | None,
    *,
    num_microbatches: int,
    axis_name: AxisName | None,
) -> tuple[jax.Array, Metrics, Params]:
    """Loss, metrics and gradient over all microbatches and devices."""
    # Each device differentiates its own copy of the parameters: its gradient is of its own rows
    # until it is summed.
    local = params if axis_name is None else jax.lax.pcast(params, axis_name, to="varying")

    def forward(
        params: Params, number: jax.Array | int, part: Any
    ) -> tuple[tuple[jax.Array, ...], Any]:
        """The totals, which are differentiated, and (their counts, metrics)."""
        loss, metrics = loss_fn(
            params, *([] if batch is None else [part]), *_part_key(key, number, axis_name)
        )
        terms = loss if isinstance(loss, tuple) else (loss,)
        for term in (*terms, *metrics.values()):
            if not isinstance(term, Mean | Max):
                raise TypeError(
                    "a loss and its metrics are Means, such as losses.aggregate gives, got "
                    f"{type(term)}"
                )
        counts = tuple(term.count for term in terms)
        return tuple(jnp.asarray(term.total, jnp.float32) for term in terms), (counts, metrics)

    def backward(
        number: jax.Array | int, part: Any, counts: tuple[jax.Array, ...] | None
    ) -> tuple[Params, tuple[jax.Array, ...], tuple[jax.Array, ...], Parts]:
        totals, pull_back, (own_counts, metrics) = jax.vjp(
            lambda p: forward(p, number, part), local, has_aux=True
        )
        counts = ops.psum(own_counts, axis_name) if counts is None else counts
        scales = (
            Mean(jnp.ones_like(total), count).value
            for total, count in zip(totals, counts, strict=True)
        )
        (grads,) = pull_back(tuple(scales))
        return grads, totals, counts, metrics

    if num_microbatches == 1:
        grads, totals, counts, metrics = backward(0, batch, None)
    else:
        batch, widths = _by_length(batch, num_microbatches)
        parts = jnp.arange(num_microbatches), _split(batch, num_microbatches)
        # The counts of the whole batch first. They do not depend on the parameters: XLA leaves the
        # forward pass out.
        _, own_counts = jax.lax.scan(
            lambda _, part: (None, forward(local, *part)[1][0]), None, parts
        )
        counts = ops.psum(tuple(jnp.sum(count) for count in own_counts), axis_name)

        def narrowed(width: int | None, number: jax.Array, part: Any) -> Any:
            return backward(
                number, jax.tree.map(lambda x: x[:, :width] if x.ndim == 2 else x, part), counts
            )

        def add(total: Params, part: tuple[jax.Array, Any]) -> tuple[Params, Any]:
            index = (
                jnp.searchsorted(jnp.array(widths), jnp.max(_used(part[1])))
                if len(widths) > 1
                else 0
            )
            grads, totals, _, metrics = jax.lax.switch(
                index, [partial(narrowed, width) for width in widths], *part
            )
            return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads), (totals, metrics)

        # Sums of low-precision gradients would lose the small ones.
        zeros = jax.tree.map(
            lambda p: jnp.zeros_like(p, jnp.promote_types(p.dtype, jnp.float32)), local
        )
        grads, (totals, metrics) = jax.lax.scan(add, zeros, parts)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
        totals = tuple(jnp.sum(total) for total in totals)
        sums = {
            name: jnp.sum if isinstance(part, Mean) else jnp.max for name, part in metrics.items()
        }
        metrics = {
            name: jax.tree.map(partial(sums[name], axis=0), part) for name, part in metrics.items()
        }
    grads, totals = ops.psum((grads, totals), axis_name)
    if axis_name is not None:
        metrics = {name: part.over(axis_name) for name, part in metrics.items()}
    loss = sum((Mean(*term).value for term in zip(totals, counts, strict=True)), jnp.zeros(()))
    return loss, {name: part.value for name, part in metrics.items()}, grads


def _by_length(batch: Any, num_microbatches: int) -> tuple[Any, tuple[int | None, ...]]:
    """The rows in such an order that `_split` makes parts of like length, and the widths that a
    part may have.
    """
    prompt = batch.prompt_length if isinstance(batch, Rollout) else None
    if prompt is None or batch.tokens.shape[1] - prompt < LONG:
        return batch, (None,)
    slots = batch.tokens.shape[1] - prompt
    order = jnp.argsort(_used(batch)).reshape(num_microbatches, -1).T.reshape(-1)
    batch = jax.tree.map(lambda x: cut(x[order], "data", "fsdp"), batch)
    return batch, (prompt + slots // 4, prompt + slots // 2, prompt + slots)


def _used(rollout: Rollout) -> jax.Array:
    """[B] columns up to the last response token of each row."""
    columns = jnp.arange(1, 1 + rollout.tokens.shape[1])[None]
    return jnp.max(jnp.where(rollout.response_mask != 0, columns, 0), axis=1)


def _part_key(
    key: jax.Array | None, number: jax.Array | int, axis_name: AxisName | None
) -> list[jax.Array]:
    if key is None:
        return []
    key = jax.random.fold_in(key, number)
    return [key if axis_name is None else jax.random.fold_in(key, jax.lax.axis_index(axis_name))]


def _split(batch: Any, num_microbatches: int) -> Any:
    if batch is None:
        raise ValueError(
            f"num_microbatches={num_microbatches} needs a batch to divide, got batch=None"
        )
    num_rows = _num_rows(batch)
    if num_microbatches < 1 or num_rows % num_microbatches:
        raise ValueError(
            f"num_microbatches={num_microbatches} does not divide the {num_rows} rows of the batch"
        )
    return jax.tree.map(
        lambda x: x.reshape(num_rows // num_microbatches, num_microbatches, *x.shape[1:]).swapaxes(
            0, 1
        ),
        batch,
    )


def _average(metrics: Metrics) -> Metrics:
    """Metrics of several steps, stacked on axis 0, made one."""
    return {
        name: jnp.max(x, axis=0)
        if name == "nonfinite" or name.endswith("_max")
        else jnp.mean(x, axis=0)
        for name, x in metrics.items()
    }


def _num_rows(batch: Any) -> int:
    sizes = sorted({x.shape[0] for x in jax.tree.leaves(batch)})
    if len(sizes) != 1:
        raise ValueError(f"the leaves of a batch must share their leading axis, got sizes {sizes}")
    return sizes[0]


def _local_blocks(
    num_rows: int, num_minibatches: int, shuffle_blocks: int, axis_name: AxisName | None
) -> tuple[jax.Array | int, int]:
    """The number of this device's first block, and how many blocks it holds."""
    num_devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    if shuffle_blocks % num_devices:
        raise ValueError(
            f"shuffle_blocks={shuffle_blocks} does not divide over {num_devices} devices of whole "
            "blocks"
        )
    num_blocks = shuffle_blocks // num_devices
    if num_rows % (num_blocks * num_minibatches):
        raise ValueError(
            f"a batch of {num_rows * num_devices} rows does not divide into "
            f"shuffle_blocks={shuffle_blocks} blocks "
            f"times num_minibatches={num_minibatches}: it must be a multiple of "
            f"{shuffle_blocks * num_minibatches}"
        )
    return 0 if axis_name is None else jax.lax.axis_index(axis_name) * num_blocks, num_blocks
