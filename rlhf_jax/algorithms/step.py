"""One optimizer step, and many of them over shuffled minibatches. Every update is made of these two
functions.

A loss is a ``Mean`` (or a tuple of them) of the rows it is given. Its totals and their gradients
are summed over microbatches and then over devices, once, and divided by the global count: the
result does not depend on how the batch was cut. Under ``shard_map`` this works with
``check_vma=True`` and ``False``, and under ``pmap``.
"""

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax import ops
from rlhf_jax.algorithms import lengths
from rlhf_jax.errors import warn_once
from rlhf_jax.parallel import auxiliary, blocks, sharding
from rlhf_jax.types import (
    AxisName,
    DropoutKey,
    LossAndMetrics,
    LossFn,
    LossMetrics,
    Max,
    Mean,
    Metrics,
    Params,
    StepMetrics,
    TrainState,
    is_mergeable,
)

State = TypeVar("State", bound=TrainState)
Results = tuple[tuple[Mean, ...], LossMetrics]  # the terms of a loss, and its metrics
PartGradient = Callable[[Array, Any], tuple[Params, Results]]  # (number, microbatch)
BatchGradient = Callable[..., tuple[Array, StepMetrics, Params]]  # (params, batch, key)


def gradient_step(
    loss_fn: LossFn,
    state: State,
    optimizer: optax.GradientTransformation,
    *,
    batch: Any = None,
    key: DropoutKey = None,
    num_microbatches: int = 1,
    axis_name: AxisName = None,
    minibatch_sharding: Any = None,
    group_size: int = 1,
    by_length: bool = False,
) -> tuple[State, StepMetrics]:
    """One step of ``optimizer`` down the gradient of a loss; the old state if loss or gradient is
    not finite.

    The optimizer gets ``value=loss`` too (optax's extra-args protocol), which ``reduce_on_plateau``
    needs.

    Args:
      loss_fn: ``loss_fn(params[, part][, key]) -> (loss, {name: Mean or Max})``; the part is given
        if there is a ``batch``, the key if there is a ``key``. The loss is a Mean, or a tuple of
        Means, each of which is divided by its own count before they are added, such as a policy
        loss per token and an SFT loss per row.
      batch: any pytree whose leaves [B, ...] share their leading axis. None leaves are allowed.
      key: of dropout; each microbatch on each device derives its own key from it.
      num_microbatches: parts that are run one after the other to save memory; divides B. Row i is
        in part ``i % num_microbatches``, so that each device of a sharded batch has rows in every
        part; with a ``group_size`` that is group i.
      axis_name: the mapped axis (or axes) over whose devices the batch is sharded.
      minibatch_sharding: the NamedSharding of the batch's rows under plain ``jit``. If its first
        axis is the whole mesh and parameters are replicated, each device adds up the gradients of
        its microbatches, and they are summed over the devices once. Otherwise XLA sums over the
        devices in each microbatch.
      group_size: adjacent rows that stay together in a microbatch, such as the answers to a prompt
        that is computed once (``models.policy_fn``).
      by_length: the batch is a Rollout: rows of similar length share a microbatch, and its columns
        end behind the longest of them, see ``lengths``.

    Returns:
      The state, of the caller's class, and the metrics of ``loss_fn`` with ``loss``, ``grad_norm``
      (before the optimizer's clipping) and ``nonfinite``, 1 if the state was kept, else 0. A Mean
      is divided; a Max stays one, so that ``minibatch_epochs`` takes the largest (``numbers`` makes
      arrays of all). If parameters have less precision than float32, which a warning says once,
      ``params/unmoved`` is the share of their steps that rounding undid.

    Raises:
      ValueError: ``num_microbatches`` does not divide B, or there is no batch to divide; or rows
        vary over a mapped axis that ``axis_name`` does not name.
      TypeError: ``loss_fn`` returns anything but Means.
    """
    named = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    # Parameters that vary too are those of a run on each device.
    unnamed = sharding.varying(batch) - sharding.varying(state.params) - {*named}
    if unnamed:
        axes = ", ".join(unnamed)
        raise ValueError(f"rows are mapped over {axes}: give the update {axes} as axis_name")
    gradient: BatchGradient = partial(
        _gradient,
        loss_fn,
        num_microbatches=num_microbatches,
        group_size=group_size,
        by_length=by_length,
        axis_name=axis_name,
    )
    if num_microbatches > 1 and isinstance(minibatch_sharding, NamedSharding):
        part_groups = _num_rows(batch) // group_size // num_microbatches
        gradient = _sum_once(gradient, minibatch_sharding, part_groups)
    loss, metrics, grads = gradient(state.params, batch, key)
    grad_norm = optax.tree.norm(jax.tree.map(_widen, grads))
    update = optax.with_extra_args_support(optimizer).update
    updates, opt_state = update(grads, state.opt_state, state.params, value=loss)
    params = optax.apply_updates(state.params, updates)
    metrics = {**metrics, **_unmoved(state.params, updates, params)}
    new = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    state = jax.tree.map(partial(jnp.where, finite), new, state)
    nonfinite = 1.0 - finite.astype(jnp.float32)
    return state, {**metrics, "loss": loss, "grad_norm": grad_norm, "nonfinite": nonfinite}


def numbers(metrics: StepMetrics) -> Metrics:
    """The metrics as arrays, a Max as its value."""
    return {name: x.value if isinstance(x, Max) else x for name, x in metrics.items()}


def minibatch_epochs(
    step: Callable[[State, Any, Array], tuple[State, StepMetrics]],
    state: State,
    batch: Any,
    key: Array,
    *,
    num_epochs: int,
    num_minibatches: int,
    shuffle_blocks: int = 1,
    axis_name: AxisName = None,
    minibatch_sharding: Any = None,
    group_size: int = 1,
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
      axis_name: the mapped axis over whose devices the batch is sharded; each holds
        ``shuffle_blocks / axis size`` of the blocks.
      minibatch_sharding: sharding (or a tree prefix of shardings) of the minibatches under plain
        ``jit``. XLA may otherwise replicate a shuffled batch on every device.
      group_size: adjacent rows that stay together: groups are permuted in place of rows.

    Returns:
      The last state, and the metrics averaged over the steps: arrays. Of a metric that is a ``Max``
      and of ``nonfinite`` it is the largest.

    Raises:
      ValueError: the rows do not divide into blocks and minibatches, or the blocks into devices.
    """
    ops.check_number("epochs", num_epochs, at_least=1)
    ops.check_number("minibatches", num_minibatches, at_least=1)
    ops.check_number("shuffle_blocks", shuffle_blocks, at_least=1)

    def run_epoch(state: State, epoch: Array) -> tuple[State, StepMetrics]:
        # The keys of the steps start where those of the shuffles end: no key is used twice.
        step_key = jax.random.fold_in(key, num_epochs + epoch)
        if num_minibatches == 1:
            whole = _constrain(batch, minibatch_sharding)
            return step(state, whole, jax.random.fold_in(step_key, 0))

        def run_minibatch(state: State, inputs: tuple[Array, Array]) -> tuple[State, StepMetrics]:
            index, order = inputs
            minibatch = jax.tree.map(partial(_take, order, group_size), batch)
            minibatch = _constrain(minibatch, minibatch_sharding)
            return step(state, minibatch, jax.random.fold_in(step_key, index))

        epoch_key = jax.random.fold_in(key, epoch)
        numbers = jnp.arange(num_minibatches)
        orders = _shuffle(
            epoch_key, _num_rows(batch), num_minibatches, shuffle_blocks, axis_name, group_size
        )
        state, metrics = jax.lax.scan(run_minibatch, state, (numbers, orders))
        return state, _average(metrics)

    state, metrics = jax.lax.scan(run_epoch, state, jnp.arange(num_epochs))
    return state, numbers(_average(metrics))


def batch_updater(
    loss: LossFn,
    batch_metrics: Callable[[Any, AxisName], Metrics] = lambda batch, axis_name: {},
) -> Callable[..., tuple[Any, Metrics]]:
    """The ``update`` of SFT, DPO and reward models: one optimizer step on the loss of a batch.

    ``update(state, batch, key, *, policy_fn or score_fn, optimizer, config, axis_name=None,
    minibatch_sharding=None)`` returns the new state and the metrics of ``loss``, of
    ``gradient_step`` and of ``batch_metrics``. The key is of dropout, another for each microbatch;
    None turns it off. If the config has a ``router_aux_coef`` that is not None, the loss that keeps
    the experts of a network equally busy (``models.model.balance``) is a metric, and is added with
    this weight.

    Args:
      loss: ``loss(params, batch, key, *, policy_fn or score_fn, config) -> (Loss, {name: Mean or
        Max})``.
      batch_metrics: ``(batch, axis_name) -> metrics``.
    """

    def update_on_batch(
        state: State,
        batch: Any,
        key: DropoutKey,
        *,
        optimizer: optax.GradientTransformation,
        config: Any,
        axis_name: AxisName = None,
        minibatch_sharding: Any = None,
        **model: Any,
    ) -> tuple[State, Metrics]:
        """One optimizer step on a batch; see ``step.batch_updater``."""

        # None: the network's own losses are not computed.
        coefficient = getattr(config, "router_aux_coef", None)

        def loss_fn(params: Params, part: Any, part_key: DropoutKey = None) -> LossAndMetrics:
            if coefficient is None:
                return loss(params, part, part_key, config=config, **model)
            with auxiliary.collected() as terms:
                found = loss(params, part, part_key, config=config, **model)
            return auxiliary.with_terms(found, terms, coefficient)

        batch = _constrain(batch, minibatch_sharding)
        state, metrics = gradient_step(
            loss_fn,
            state,
            optimizer,
            batch=batch,
            key=key,
            num_microbatches=config.num_microbatches,
            axis_name=axis_name,
            minibatch_sharding=minibatch_sharding,
        )
        return state, {**numbers(metrics), **batch_metrics(batch, axis_name)}

    return update_on_batch


def _constrain(batch: Any, sharding: Any) -> Any:
    """The batch with this sharding (or a tree prefix) under plain ``jit``; unchanged for None."""
    return batch if sharding is None else jax.lax.with_sharding_constraint(batch, sharding)


def _sum_once(gradient: BatchGradient, sharding: NamedSharding, part_groups: int) -> BatchGradient:
    """``gradient`` under ``shard_map``, which sums over the devices after the last microbatch.

    Unchanged if the rows' first axis is not the whole mesh, or if the ``part_groups`` of a
    microbatch, rows or groups of rows, do not divide over it.
    """
    mesh = sharding.mesh
    axes = sharding.spec[0]
    axis = axes[0] if isinstance(axes, tuple) else axes
    if axis is None or not 1 < mesh.shape[axis] == mesh.size or part_groups % mesh.size:
        return gradient
    replicated = PartitionSpec()
    specs = (replicated, PartitionSpec(axis), replicated)
    mapped = partial(gradient, axis_name=axis)
    return jax.shard_map(mapped, mesh=mesh, in_specs=specs, out_specs=replicated)


def _gradient(
    loss_fn: LossFn,
    params: Params,
    batch: Any,
    key: DropoutKey,
    *,
    num_microbatches: int,
    group_size: int,
    by_length: bool,
    axis_name: AxisName,
) -> tuple[Array, StepMetrics, Params]:
    """Loss, metrics and gradient of a batch, over all microbatches and devices."""
    # Each device differentiates its own copy of the parameters: before the sum over devices its
    # gradient is that of its own rows.
    local = params if axis_name is None else jax.lax.pcast(params, axis_name, to="varying")

    def forward(params: Params, number: Array | int, part: Any) -> Results:
        """Of microbatch ``number``."""
        arguments = [] if part is None else [part]
        if key is not None:
            part_key = jax.random.fold_in(key, number)
            if axis_name is not None:
                part_key = jax.random.fold_in(part_key, jax.lax.axis_index(axis_name))
            arguments.append(part_key)
        loss, metrics = loss_fn(params, *arguments)
        terms = loss if isinstance(loss, tuple) else (loss,)
        for term in (*terms, *metrics.values()):
            if not is_mergeable(term):
                raise TypeError(
                    "a loss and its metrics are Means, such as losses.aggregate gives, got "
                    f"{type(term)}"
                )
        return jax.tree.map(_widen, terms), metrics

    def count(terms: tuple[Mean, ...]) -> list[Array]:
        return ops.psum([term.count for term in terms], axis_name)

    def backward(
        number: Array | int, part: Any, counts: list[Array] | None = None
    ) -> tuple[Params, Results]:
        """The gradient of the terms' totals divided by the ``counts`` of the whole batch on all
        devices; None: the part is the whole batch of this device.
        """

        def divided(params: Params) -> tuple[Array, Results]:
            terms, metrics = forward(params, number, part)
            whole = count(terms) if counts is None else counts
            shares = [Mean(term.total, n) for term, n in zip(terms, whole, strict=True)]
            return _add(shares), (terms, metrics)

        return jax.grad(divided, has_aux=True)(local)

    num_parts = num_microbatches if batch is None else max(num_microbatches, blocks.number())
    if num_parts == 1:
        grads, results = backward(0, batch)
    else:
        num_rows = _num_rows(batch)
        if num_parts < 1 or num_rows % (num_parts * group_size):
            groups = "" if group_size == 1 else f" in groups of {group_size}"
            raise ValueError(
                f"num_microbatches={num_parts} does not divide the {num_rows} rows of the "
                f"batch{groups}"
            )
        if by_length:
            batch = lengths.sort_rows(batch, num_parts, group_size=group_size)
        parts = (jnp.arange(num_parts), ops.split_rows(batch, num_parts, group_size=group_size))
        # The counts do not depend on the parameters: XLA leaves this forward pass out.
        terms = jax.lax.map(lambda part: forward(local, *part)[0], parts)
        of_part: PartGradient = partial(backward, counts=count(_merge(terms)))
        if by_length:
            of_part = lengths.cut_columns(of_part)
        grads, results = _accumulate(of_part, local, parts)
    grads = ops.psum(grads, axis_name)
    if axis_name is not None:
        results = jax.tree.map(lambda x: x.over(axis_name), results, is_leaf=is_mergeable)
    terms, found = results
    metrics = {name: x if isinstance(x, Max) else x.value for name, x in found.items()}
    return _add(terms), metrics, grads


def _accumulate(
    gradient: PartGradient, params: Params, parts: tuple[Array, Any]
) -> tuple[Params, Results]:
    """The sum of the gradients of all parts, and their merged results."""

    def of_part(part: Any) -> tuple[Params, Results]:
        grads, results = gradient(*part)
        return jax.tree.map(_widen, grads), results

    if blocks.number():

        def at(number: Array) -> tuple[Params, Results]:
            return of_part(jax.tree.map(lambda x: x[number], parts))

        grads, results = blocks.tree_sum(at, len(parts[0]))
    else:

        def add(total: Params, part: Any) -> tuple[Params, Results]:
            grads, results = of_part(part)
            return jax.tree.map(jnp.add, total, grads), results

        zeros = jax.tree.map(lambda p: _widen(jnp.zeros_like(p)), params)
        grads, stacked = jax.lax.scan(add, zeros, parts)
        results = _merge(stacked)
    return jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params), results


def _unmoved(params: Params, updates: Params, new: Params) -> Metrics:
    """The share of entries of low precision that an update other than 0 leaves as they are."""
    leaves = zip(*map(jax.tree.leaves, (params, updates, new)), strict=True)
    low = [(p, u, n) for p, u, n in leaves if jnp.result_type(p).itemsize < 4]
    if not low:
        return {}
    warn_once(
        f"parameters of {low[0][0].dtype} are trained, in which small steps round to nothing (see "
        "the metric params/unmoved): train float32 copies, models.master_weights(params)"
    )

    low = jax.lax.optimization_barrier(low)  # XLA may compare a sum before it is rounded
    tried = sum(jnp.sum(u != 0) for _, u, _ in low)
    lost = sum(jnp.sum((u != 0) & (p == n)) for p, u, n in low)
    return {"params/unmoved": ops.float32(lost) / jnp.maximum(tried, 1)}


def _widen(gradient: Array) -> Array:
    """In float32 at least: sums of low-precision gradients would lose the small ones."""
    return gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32))


def _add(terms: Iterable[Mean]) -> Array:
    """The loss: each term is divided by its own count."""
    return sum((term.value for term in terms), jnp.zeros(()))


def _merge(stacked: Any) -> Any:
    """One Mean or Max from those of all microbatches, stacked on axis 0."""

    def merge(x: Mean | Max) -> Mean | Max:
        return jax.tree.map(partial(jnp.sum if isinstance(x, Mean) else jnp.max, axis=0), x)

    return jax.tree.map(merge, stacked, is_leaf=is_mergeable)


def _average(metrics: StepMetrics) -> StepMetrics:
    """The metrics of several steps, stacked on axis 0, as one."""
    averages: dict[str, Array | Max] = {}
    for name, x in metrics.items():
        if isinstance(x, Max):
            averages[name] = Max(jnp.max(x.value, axis=0))
        elif name == "nonfinite":
            averages[name] = jnp.max(x, axis=0)
        else:
            averages[name] = jnp.mean(x, axis=0)
    return averages


def _shuffle(
    key: Array,
    num_rows: int,
    num_minibatches: int,
    shuffle_blocks: int,
    axis_name: AxisName,
    group_size: int,
) -> Array:
    """[minibatches, blocks, n]: positions of each minibatch's groups in this device's blocks."""
    num_devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    if shuffle_blocks % num_devices:
        raise ValueError(
            f"shuffle_blocks={shuffle_blocks} does not divide over {num_devices} devices of whole "
            "blocks"
        )
    num_blocks = shuffle_blocks // num_devices
    if num_rows % (num_blocks * num_minibatches * group_size):
        groups = "" if group_size == 1 else f" times groups of {group_size}"
        raise ValueError(
            f"a batch of {num_rows * num_devices} rows does not divide into "
            f"shuffle_blocks={shuffle_blocks} blocks times num_minibatches={num_minibatches}"
            f"{groups}: it must be a multiple of {shuffle_blocks * num_minibatches * group_size}"
        )
    numbers = jnp.arange(num_blocks)
    if axis_name is not None:
        numbers += jax.lax.axis_index(axis_name) * num_blocks

    def shuffled(number: Array) -> Array:
        block_key = jax.random.fold_in(key, number)
        return jax.random.permutation(block_key, num_rows // group_size // num_blocks)

    orders = jax.vmap(shuffled)(numbers)
    return orders.reshape(num_blocks, num_minibatches, -1).swapaxes(0, 1)


def _take(order: Array, group_size: int, x: Array) -> Array:
    """The rows of a minibatch: groups ``order`` [blocks, n] of the blocks of ``x`` [B, ...]."""
    by_block = x.reshape(len(order), -1, group_size, *x.shape[1:])
    groups = jax.vmap(lambda block, positions: block[positions])(by_block, order)
    return groups.reshape(-1, *x.shape[1:])


def _num_rows(batch: Any) -> int:
    """The leading axis of a batch."""
    sizes = sorted({x.shape[0] for x in jax.tree.leaves(batch)})
    if len(sizes) != 1:
        raise ValueError(f"a batch needs arrays that share their leading axis, got sizes {sizes}")
    return sizes[0]
