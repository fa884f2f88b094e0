"""The optimizer of a run: Adam with clipping and a schedule, and what it does when validations stop
improving.

Both decisions of ``Patience``, to end early and to lower the learning rate, are functions of the
validations so far. A resumed run reads them from its rows of metrics and makes the same decisions.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from optax.contrib import MuonDimensionNumbers

from rlhf_jax.config import Optimizer
from rlhf_jax.config.settings import MOST
from rlhf_jax.errors import UserError, logger
from rlhf_jax.models import HEADS
from rlhf_jax.types import Params

T = TypeVar("T")
Rows = Iterable[Mapping[str, Any]]  # of metrics.jsonl
Path = tuple[Any, ...]  # of a leaf in nested dicts
# in opt_state.hyperparams: what the schedule plateau has multiplied the rate by so far
PLATEAU_SCALE = "plateau_scale"
PLATEAU_FACTOR = 0.1
PLATEAU_PATIENCE = 5  # validations


def make_optimizer(settings: Optimizer, num_steps: int) -> optax.GradientTransformation:
    """Adam with the schedule, clipping and decay of ``settings``; the schedule is ``num_steps``
    long.

    The learning rate lives in ``opt_state.hyperparams`` (optax.inject_hyperparams), and so does the
    factor of the schedule ``plateau``, which starts at 1 and which ``Patience`` lowers.

    Raises:
        UserError: there are more steps than its counter, an int32, can count.
        ValueError: the settings have no learning rate.
    """
    if num_steps > MOST:
        raise UserError(f"{num_steps} optimizer steps are more than can be counted, {MOST}")
    peak = settings.learning_rate
    if peak is None:
        raise ValueError("learning_rate is null: rates.with_rate gives the default of a size")
    warmup_steps = int(settings.warmup_steps)
    if settings.warmup_steps < 1:
        warmup_steps = math.ceil(settings.warmup_steps * num_steps)
    decay_steps = max(num_steps - warmup_steps, 1)
    floor = settings.min_lr_ratio
    decays: dict[str, optax.Schedule] = {
        "constant": optax.constant_schedule(peak),
        "plateau": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, floor * peak, decay_steps),
        "cosine": optax.cosine_decay_schedule(peak, decay_steps, alpha=floor),
    }
    schedule = decays[settings.schedule]
    if warmup_steps:
        warmup = optax.linear_schedule(0.0, peak, warmup_steps)
        schedule = optax.join_schedules([warmup, schedule], [warmup_steps])

    def chain(learning_rate: Any, plateau_scale: Any = None) -> optax.GradientTransformation:
        parts = []
        if settings.max_grad_norm is not None:
            parts.append(optax.clip_by_global_norm(settings.max_grad_norm))
        parts.append(optax.scale_by_adam(settings.b1, settings.b2, settings.eps))
        if settings.weight_decay:
            parts.append(optax.add_decayed_weights(settings.weight_decay, mask=_decayed))
        parts.append(optax.scale_by_learning_rate(learning_rate))
        if plateau_scale is not None:
            parts.append(optax.scale(plateau_scale))
        return optax.chain(*parts)

    scales = {PLATEAU_SCALE: 1.0} if settings.schedule == "plateau" else {}
    optimizer = optax.inject_hyperparams(chain)(learning_rate=schedule, **scales)
    return optimizer if settings.frozen is None else freezing(optimizer, settings.frozen)


def freezing(
    optimizer: optax.GradientTransformation, pattern: str
) -> optax.GradientTransformationExtraArgs:
    """``optimizer``, but parameters in whose names the ``pattern`` is found keep their bits.

    They have no moments, except for some layers of a stack (``compute.scan_layers``), and their
    gradients do not count when the others are clipped.
    """

    def is_trained(params: Params) -> Any:
        return jax.tree.map(lambda rows: not np.all(rows), frozen_rows(params, pattern))

    def without(rows: np.ndarray, leaf: Array, nothing: float) -> Array:
        by_layer = rows.reshape(rows.shape + (1,) * (leaf.ndim - rows.ndim))
        return jnp.where(by_layer, jnp.asarray(nothing, leaf.dtype), leaf) if rows.any() else leaf

    masked = optax.with_extra_args_support(optax.masked(optimizer, is_trained))

    def update(
        grads: Params, state: optax.OptState, params: Params | None = None, **extra: Any
    ) -> tuple[Params, optax.OptState]:
        rows = frozen_rows(grads, pattern)
        of_trained = jax.tree.map(partial(without, nothing=0.0), rows, grads)
        updates, state = masked.update(of_trained, state, params, **extra)
        # x + -0.0 is x, bit for bit, also where x is -0.0.
        return jax.tree.map(partial(without, nothing=-0.0), rows, updates), state

    return optax.GradientTransformationExtraArgs(masked.init, update)


def frozen_rows(params: Params, pattern: str) -> Any:
    """For each leaf whether the ``pattern`` is found in its name, such as h_0/attn/c_attn/kernel: a
    bool, or [L - 1] bools for the layers of a stack, "h".
    """

    def found(path: Path, leaf: Array) -> np.ndarray:
        names = [str(getattr(entry, "key", entry)) for entry in path]
        stacked = names.index("h") if "h" in names else None
        if stacked is None:
            return np.array(bool(re.search(pattern, "/".join(names))))
        before = names[:stacked]
        after = names[stacked + 1 :]
        places = ["/".join([*before, f"h_{i}", *after]) for i in range(len(leaf))]
        return np.array([bool(re.search(pattern, place)) for place in places])

    return jax.tree_util.tree_map_with_path(found, params)


def check_frozen(section: str, settings: Optimizer, params: Params) -> None:
    """Prints how many of the parameters that a stage trains ``optimizer.frozen`` freezes.

    Raises:
        UserError: it freezes none of them, or all.
    """
    if settings.frozen is None:
        return
    rows = frozen_rows(params, settings.frozen)
    sizes = jax.tree.map(lambda leaf, found: leaf.size * found.mean(), params, rows)
    number = round(sum(jax.tree.leaves(sizes)))
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    key = f"{section}.optimizer.frozen {settings.frozen}"
    if number in (0, total):
        names = sorted(params)
        raise UserError(
            f"{key}: it is found in {'all names' if number else 'no name'} of parameters, which "
            f"begin with {', '.join(names)}"
        )
    logger.info(f"{key}: {number:,} of {total:,} parameters keep their values")


def without_routers(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """``optimizer``, which leaves the routers of experts as they are: it gets no gradient of
    theirs, and neither its weight decay nor anything else changes them.
    """

    def zeroed(tree: Params) -> Any:
        def of_leaf(path: Path, leaf: Array) -> Array:
            is_router = any(getattr(entry, "key", None) == "router" for entry in path)
            return jnp.zeros_like(leaf) if is_router else leaf

        return jax.tree_util.tree_map_with_path(of_leaf, tree)

    inner = optax.with_extra_args_support(optimizer)

    def update(
        grads: Params, state: Any, params: Params | None = None, **more: Any
    ) -> tuple[Any, Any]:
        updates, state = inner.update(zeroed(grads), state, params, **more)
        return zeroed(updates), state

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def muon_dimensions(params: Params) -> Any:
    """The matrices of a model or of LoRA's adapters, for ``optax.contrib.muon``:

        optax.contrib.muon(rate, muon_weight_dimension_numbers=muon_dimensions)

    Some kernels are several matrices in one array: of stacked layers (``compute.scan_layers``)
    [L, in, out], of experts [E, in, out], the query, key and value of GPT-2 [in, 3, out]. Each is
    orthogonalized by itself.
    Embeddings, heads, biases and scales are left to Adam (None).
    """

    def dimensions(path: Path, _: Array) -> Any:
        if not _is_of_body(path, "kernel", "lora_a", "lora_b"):
            return None
        several = [entry for entry in path if entry.key in ("h", "experts")]
        return MuonDimensionNumbers(len(several), -1)

    return jax.tree_util.tree_map_with_path(dimensions, params)


def _decayed(params: Params) -> Any:
    """True for matrices, adapters, embeddings of the body, by name: scanned biases have rank 2."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: _is_of_body(path, "kernel", "embedding", "lora_a", "lora_b"), params
    )


def _is_of_body(path: Path, *names: str) -> bool:
    """Whether a leaf has one of the names and belongs to no head."""
    *_, module, leaf = path
    return leaf.key in names and module.key not in HEADS


def times_exhausted(values: Sequence[float], patience: int) -> int:
    """How many times ``patience`` values in a row brought no new minimum; the count restarts each
    time.

    ``optax.contrib.reduce_on_plateau`` without tolerance lowers the rate at each of these times;
    PyTorch's ReduceLROnPlateau waits for one value more than its patience. NaN is no minimum.
    """
    lowest = float("inf")
    waited = 0
    times = 0
    for value in values:
        waited += 1
        if value < lowest:
            lowest = value
            waited = 0
        if waited == patience:
            times += 1
            waited = 0
    return times


def learning_rates(state: Any) -> dict[str, Array]:
    """``lr``, the learning rate of the last optimizer step that led to this state, ``value/lr``,
    that of a value function with an optimizer of its own, and under the schedule ``plateau`` its
    factor ``plateau_scale``. Nothing is known of an optimizer that hides its rate.
    """
    found: dict[str, Array] = {}
    for hidden, name in (("learning_rate", "lr"), (PLATEAU_SCALE, PLATEAU_SCALE)):
        numbers = optax.tree_utils.tree_get_all_with_path(
            state, hidden, filtering=lambda path, x: hasattr(x, "dtype")
        )
        for path, number in numbers:
            is_value = any(getattr(entry, "key", None) == "value" for entry in path)
            found["value/" * is_value + name] = jnp.max(number)  # all members of an ensemble agree
    scale = found.pop(f"value/{PLATEAU_SCALE}", None)
    scale = found.get(PLATEAU_SCALE, scale)
    if scale is None:
        return found
    rates = {name: rate * scale for name, rate in found.items() if name != PLATEAU_SCALE}
    return rates | {PLATEAU_SCALE: scale}


class Patience(NamedTuple):
    """Looks at one metric of the validations, ``min:METRIC`` or ``max:METRIC``."""

    monitor: str
    stop_after: int | None
    """Validations without improvement after which the run ends; None: it does not."""
    settings: Optimizer

    @property
    def metric(self) -> str:
        """The metric's name."""
        return self.monitor.partition(":")[2]

    @property
    def lowers(self) -> bool:
        """Whether it lowers the learning rate."""
        return self.settings.schedule == "plateau"

    @property
    def used(self) -> bool:
        """Whether the run ends early or lowers its learning rate by the metric."""
        return self.stop_after is not None or self.lowers

    def stops(self, rows: Rows) -> bool:
        """Whether the run ends early after these rows of metrics."""
        return self.stop_after is not None and self._times(rows, self.stop_after) > 0

    def lowered(self, state: T, rows: Rows) -> T:
        """The loop's state with the learning rate that the schedule ``plateau`` has come to after
        these rows.
        """
        if not self.lowers:
            return state
        scale = PLATEAU_FACTOR ** self._times(rows, PLATEAU_PATIENCE)
        [(_, before), *_] = optax.tree_utils.tree_get_all_with_path(state, PLATEAU_SCALE)
        # All groups of parameters have one scale, which stays on its devices.
        changed = {PLATEAU_SCALE: 0.0 * before + scale}
        return optax.tree_utils.tree_set(state, **changed)

    def _times(self, rows: Rows, patience: int) -> int:
        sign = -1 if self.monitor.startswith("max:") else 1
        values = [sign * row[self.metric] for row in rows if self.metric in row]
        return times_exhausted(values, patience)
