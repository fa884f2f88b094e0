"""One optimizer step, and many of them over shuffled minibatches. Every update is made of these two functions.

Under ``shard_map(..., check_vma=False)`` and ``pmap`` a ``psum`` transposes to a ``psum``: when the loss psums its
numerators and denominators, so that every device holds the global loss, each device's gradient is N times its own
share of the global gradient. Their mean, ``pmean``, is therefore the gradient that one device would compute; ``psum``
would be N times too large, which Adam hides.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.ops import AxisName
from rlhf_jax.types import Metrics, Params, TrainState


class Step(Protocol):
    """What ``minibatch_epochs`` repeats: an update of one minibatch."""

    def __call__(self, state: TrainState, minibatch: Any, key: jax.Array, /) -> tuple[TrainState, Metrics]: ...


def gradient_step(
    loss_fn: Callable[..., tuple[jax.Array, Metrics]],
    state: TrainState,
    optimizer: optax.GradientTransformation,
    *,
    batch: Any = None,
    num_microbatches: int = 1,
    axis_name: AxisName | None = None,
) -> tuple[TrainState, Metrics]:
    """One step of ``optimizer`` down the gradient of a loss; the old state where the loss or gradient is not finite.

    Args:
      loss_fn: ``loss_fn(params, part) -> (loss, metrics)``, or ``loss_fn(params)`` if ``batch`` is None. With several
        microbatches it returns the part's *share*: its numerators divided by the denominators of the whole batch, so
        that the shares of loss and metrics add up to those of the whole. With ``axis_name`` it returns global numbers.
      batch: any pytree whose leaves [B, ...] share their leading axis. None leaves are allowed.
      num_microbatches: parts that are run one after the other to save memory; divides B. Row i is in part
        ``i % num_microbatches``, so that each device of a sharded batch has rows in every part.
      axis_name: the mapped axis (or axes) over whose devices the batch is spread.

    Returns:
      The state and the metrics of ``loss_fn`` (summed over the parts; ``_max`` metrics: their maximum) with ``loss``,
      ``grad_norm`` (before the optimizer's clipping) and ``nonfinite``, 1 if the state was kept, else 0.

    Raises:
      ValueError: ``num_microbatches`` does not divide B, or there is no batch to divide.
    """
    if num_microbatches == 1:
        args = () if batch is None else (batch,)
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, *args)
    else:
        loss, metrics, grads = _accumulate(loss_fn, state.params, batch, num_microbatches)
    if axis_name is not None:
        grads = jax.lax.pmean(grads, axis_name)

    squares = [jnp.sum(jnp.square(jnp.abs(g.astype(jnp.float32)))) for g in jax.tree.leaves(grads)]
    grad_norm = jnp.sqrt(sum(squares, jnp.zeros(())))
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    new = TrainState(step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    state = jax.tree.map(lambda new_leaf, old_leaf: jnp.where(finite, new_leaf, old_leaf), new, state)
    nonfinite = 1.0 - finite.astype(jnp.float32)
    return state, {**metrics, "loss": loss, "grad_norm": grad_norm, "nonfinite": nonfinite}


def minibatch_epochs(
    step: Step,
    state: TrainState,
    batch: Any,
    key: jax.Array,
    *,
    num_epochs: int,
    num_minibatches: int,
    shuffle_blocks: int = 1,
    axis_name: AxisName | None = None,
    minibatch_sharding: Any = None,
) -> tuple[TrainState, Metrics]:
    """Runs ``step`` on every minibatch of every epoch: ``num_epochs * num_minibatches`` steps, compiled once.

    The B rows of the global batch form ``shuffle_blocks`` equal contiguous blocks. Each epoch permutes the rows inside
    each block with a fresh key (``fold_in(fold_in(key, epoch), block)``), and each minibatch takes an equal slice of
    each block. When ``shuffle_blocks`` is a multiple of the number of devices no row moves between devices, and one
    device, ``jit`` over a sharded batch and ``shard_map`` form the same minibatches in the same row order. A single
    minibatch is the batch as it is.

    Args:
      step: ``step(state, minibatch, key) -> (state, metrics)`` with a key of its own for each call.
      batch: any pytree whose leaves [B, ...] share their leading axis, on each device its shard. None leaves are
        allowed.
      num_minibatches: minibatches of an epoch.
      shuffle_blocks: blocks of the global batch, whatever the number of devices.
      axis_name: the mapped axis over whose devices the batch is spread; each holds ``shuffle_blocks / axis size`` of
        the blocks.
      minibatch_sharding: sharding (or a tree prefix of shardings) of the minibatches under plain ``jit``. XLA may
        otherwise replicate a shuffled batch on every device.

    Returns:
      The last state, and the metrics averaged over the steps (``nonfinite`` and ``_max`` metrics: their maximum).

    Raises:
      ValueError: the rows do not divide into blocks and minibatches, or the blocks into devices.
    """
    if num_epochs < 1 or num_minibatches < 1 or shuffle_blocks < 1:
        raise ValueError(
            f"num_epochs, num_minibatches and shuffle_blocks must be at least 1, got {num_epochs}, {num_minibatches} "
            f"and {shuffle_blocks}"
        )
    num_rows = _num_rows(batch)
    first_block: jax.Array | int = 0
    num_blocks = 1
    if num_minibatches > 1:
        first_block, num_blocks = _local_blocks(num_rows, num_minibatches, shuffle_blocks, axis_name)
    block_size = num_rows // num_blocks
    blocks = jax.tree.map(lambda x: x.reshape(num_blocks, block_size, *x.shape[1:]), batch)

    def constrain(minibatch: Any) -> Any:
        if minibatch_sharding is None:
            return minibatch
        return jax.lax.with_sharding_constraint(minibatch, minibatch_sharding)

    def run_epoch(state: TrainState, epoch: jax.Array) -> tuple[TrainState, Metrics]:
        # The keys of the steps start where those of the shuffles end: no key is used twice.
        step_key = jax.random.fold_in(key, num_epochs + epoch)
        if num_minibatches == 1:
            return step(state, constrain(batch), jax.random.fold_in(step_key, 0))

        epoch_key = jax.random.fold_in(key, epoch)
        block_keys = jax.vmap(lambda block: jax.random.fold_in(epoch_key, block))(first_block + jnp.arange(num_blocks))
        orders = jax.vmap(lambda block_key: jax.random.permutation(block_key, block_size))(block_keys)
        orders = orders.reshape(num_blocks, num_minibatches, block_size // num_minibatches).swapaxes(0, 1)

        def run_minibatch(state: TrainState, inputs: tuple[jax.Array, jax.Array]) -> tuple[TrainState, Metrics]:
            index, order = inputs  # order: [blocks, rows of the minibatch in each block]

            def take(x: jax.Array) -> jax.Array:
                rows = jax.vmap(lambda block, rows: block[rows])(x, order)
                return rows.reshape(num_rows // num_minibatches, *x.shape[2:])

            return step(state, constrain(jax.tree.map(take, blocks)), jax.random.fold_in(step_key, index))

        state, metrics = jax.lax.scan(run_minibatch, state, (jnp.arange(num_minibatches), orders))
        return state, _combine(metrics, jnp.mean)

    state, metrics = jax.lax.scan(run_epoch, state, jnp.arange(num_epochs))
    return state, _combine(metrics, jnp.mean)


def part_key(key: jax.Array | None, row_numbers: jax.Array, axis_name: AxisName | None) -> jax.Array | None:
    """The dropout key of a microbatch with these ``row_numbers`` [B]: another for each first one and each device.
    None stays None."""
    if key is None:
        return None
    key = jax.random.fold_in(key, row_numbers[0])
    return key if axis_name is None else jax.random.fold_in(key, jax.lax.axis_index(axis_name))


def _accumulate(
    loss_fn: Callable[..., tuple[jax.Array, Metrics]], params: Params, batch: Any, num_microbatches: int
) -> tuple[jax.Array, Metrics, Params]:
    if batch is None:
        raise ValueError(f"num_microbatches={num_microbatches} needs a batch to divide, got batch=None")
    num_rows = _num_rows(batch)
    if num_microbatches < 1 or num_rows % num_microbatches:
        raise ValueError(f"num_microbatches={num_microbatches} does not divide the {num_rows} rows of the batch")

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(num_rows // num_microbatches, num_microbatches, *x.shape[1:]).swapaxes(0, 1)

    def add(total: Params, part: Any) -> tuple[Params, tuple[jax.Array, Metrics]]:
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, part)
        return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads), (loss, metrics)

    # Sums of low-precision gradients would lose the small ones.
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), params)
    total, (losses, metrics) = jax.lax.scan(add, zeros, jax.tree.map(split, batch))
    grads = jax.tree.map(lambda t, p: t.astype(p.dtype), total, params)
    return jnp.sum(losses), _combine(metrics, jnp.sum), grads


def _combine(metrics: Metrics, combine: Callable[..., jax.Array]) -> Metrics:
    """Metrics of several steps or parts, stacked on axis 0, made one."""
    return {
        name: jnp.max(x, axis=0) if name == "nonfinite" or name.endswith("_max") else combine(x, axis=0)
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
            f"shuffle_blocks={shuffle_blocks} does not divide over {num_devices} devices: with several minibatches "
            f"each device must hold whole blocks, so shuffle_blocks must be a multiple of {num_devices}"
        )
    num_blocks = shuffle_blocks // num_devices
    if num_rows % (num_blocks * num_minibatches):
        raise ValueError(
            f"a batch of {num_rows * num_devices} rows does not divide into shuffle_blocks={shuffle_blocks} blocks "
            f"times num_minibatches={num_minibatches}: it must be a multiple of {shuffle_blocks * num_minibatches}"
        )
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * num_blocks
    return first, num_blocks
