"""The optimizer of a run: Adam with clipping and a schedule, and what it does when validations stop
improving.

Both decisions of ``Judge``, to end early and to lower the learning rate, are functions of the
validations so far. A resumed run reads them from its rows of metrics and makes the same decisions.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import Array
from optax.contrib import MuonDimensionNumbers

from rlhf_jax.config import Optimizer
from rlhf_jax.config.settings import MOST
from rlhf_jax.errors import UserError
from rlhf_jax.models import HEADS
from rlhf_jax.types import Params

T = TypeVar("T")
Rows = Iterable[Mapping[str, Any]]  # of metrics.jsonl
Path = tuple[Any, ...]  # of a leaf in nested dicts
# in opt_state.hyperparams: what the schedule plateau has multiplied the rate by so far
PLATEAU_SCALE = "plateau_scale"


def make_optimizer(settings: Optimizer, num_steps: int) -> optax.GradientTransformation:
    """Adam with the schedule, clipping and decay of ``settings``; the schedule is ``num_steps``
    long.

    The learning rate lives in ``opt_state.hyperparams`` (optax.inject_hyperparams), and so does the
    factor of the schedule ``plateau``, which starts at 1 and which ``Judge`` lowers.

    Raises:
        UserError: there are more steps than its counter, an int32, can count.
    """
    if num_steps > MOST:
        raise UserError(f"{num_steps} optimizer steps are more than can be counted, {MOST}")
    peak = settings.learning_rate
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
        "step": optax.exponential_decay(
            peak, settings.decay_every or 1, settings.decay_factor, staircase=True
        ),
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
    return optax.inject_hyperparams(chain)(learning_rate=schedule, **scales)


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
    """True for matrices, adapters and embeddings of the body. Judged by name: under scan a bias has
    rank 2 too.
    """

    def decayed(path: Path, _: Array) -> bool:
        return _is_of_body(path, "kernel", "embedding", "lora_a", "lora_b")

    return jax.tree_util.tree_map_with_path(decayed, params)


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


class Judge(NamedTuple):
    """Looks at one metric of the validations, ``min:METRIC`` or ``max:METRIC``."""

    judged_by: str
    stop_after: int | None
    """Validations without improvement after which the run ends; None: it does not."""
    settings: Optimizer

    @property
    def metric(self) -> str:
        """The metric's name."""
        return self.judged_by.partition(":")[2]

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
        scale = self.settings.decay_factor ** self._times(rows, self.settings.decay_patience)
        [(_, before), *_] = optax.tree_utils.tree_get_all_with_path(state, PLATEAU_SCALE)
        # All groups of parameters have one scale, which stays on its devices.
        changed = {PLATEAU_SCALE: 0.0 * before + scale}
        return optax.tree_utils.tree_set(state, **changed)

    def metrics(self, state: Any) -> dict[str, Array]:
        """Under the schedule ``plateau``, the factor that the learning rate had in the step that
        led to this state.
        """
        scales = optax.tree_utils.tree_get_all_with_path(state, PLATEAU_SCALE)
        if not scales:
            return {}
        [(_, scale), *_] = scales
        return {"plateau_scale": jnp.max(scale)}

    def _times(self, rows: Rows, patience: int) -> int:
        sign = -1 if self.judged_by.startswith("max:") else 1
        values = [sign * row[self.metric] for row in rows if self.metric in row]
        return times_exhausted(values, patience)
