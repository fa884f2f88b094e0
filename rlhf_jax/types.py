"""The arrays that the parts of the package exchange, and the types of the functions that users
supply.

Column t of every [B, T] field belongs to ``tokens[:, t]``. Letters everywhere: B rows, P prompt
slots, R response slots, T = P + R, K answers of a comparison, G answers of a prompt, V vocabulary,
D width, L layers, H heads, S cache length.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, NoReturn, Protocol, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from rlhf_jax.errors import UserError

Params = Any
Metrics = dict[str, Array]  # scalars
DropoutKey = Array | None  # None: no dropout
AxisName = str | tuple[str, ...] | None
"""The mapped axis, or axes, over whose devices rows are sharded. None: rows are not mapped."""

EosId = int | tuple[int, ...]  # what ends a response: one id, or any of several


@flax.struct.dataclass
class Mean:
    """A mean that is not divided yet: the result of a loss and of its metrics.

    The parts of a batch (microbatches, devices) are merged, ``a.merge(b)``; ``value`` divides once
    at the end, so that the mean and its gradient do not depend on how the batch was cut. Two losses
    are not merged but added, and their sum is a tuple of Means: ``(a, 0.1 * b)``, see ``Loss``.
    """

    total: Array  # [] float32, weighted sum
    count: Array  # [] float32, sum of the weights; carries no gradient

    @classmethod
    def of(cls, x: Array | float) -> Self:
        """The plain mean of all entries of ``x``; of a scalar, the scalar itself."""
        x = jnp.asarray(x, jnp.float32)
        return cls(jnp.sum(x), jnp.float32(x.size))

    @property
    def value(self) -> Array:
        """``total / count``; 0 if the count is 0."""
        counted = self.count != 0
        return jnp.where(counted, self.total / jnp.where(counted, self.count, 1.0), 0.0)

    def merge(self, other: "Mean") -> "Mean":
        """The mean over the entries of both, of one loss on two parts of a batch."""
        return Mean(self.total + other.total, self.count + other.count)

    def __add__(self, other: object) -> NoReturn:
        """Refused: it could be the sum of two losses or the mean over two parts of a batch."""
        raise TypeError(
            "a Mean does not add: the sum of two losses is a tuple of Means, (a, 0.1 * b), each of "
            "which is divided by its own count; the mean over two parts of a batch is a.merge(b)"
        )

    __radd__ = __add__
    __sub__ = __add__
    __rsub__ = __add__

    def __rmul__(self, weight: Array | float) -> "Mean":
        """``weight * mean``, as for one of several losses."""
        return Mean(weight * self.total, self.count)

    def over(self, axis_name: AxisName) -> "Mean":
        """The mean over all devices of the mapped axis."""
        return Mean(*jax.lax.psum((self.total, self.count), axis_name))


@flax.struct.dataclass
class Max:
    """A metric that is the largest of its parts, as a Mean is their mean."""

    value: Array  # []

    def merge(self, other: "Max") -> "Max":
        """The larger of both."""
        return Max(jnp.maximum(self.value, other.value))

    def __float__(self) -> float:
        return float(self.value)

    def over(self, axis_name: AxisName) -> "Max":
        """The largest over all devices of the mapped axis."""
        return Max(jax.lax.pmax(self.value, axis_name))


def is_mergeable(x: object) -> bool:
    """Whether x is a Mean or a Max, as a leaf of a tree."""
    return isinstance(x, Mean | Max)


LossMetrics = dict[str, Mean | Max]
StepMetrics = Mapping[str, Array | Max]
"""Metrics of one optimizer step: scalars, and a ``Max`` of which the largest of several steps is
taken and not the mean."""

Loss = Mean | tuple[Mean, ...]
"""A loss, or several that are added: each is divided by its own count."""

LossAndMetrics = tuple[Loss, LossMetrics]
LossFn = Callable[..., LossAndMetrics]


@flax.struct.dataclass
class TrainState:
    """The state that an update changes: only arrays, so that it can be checkpointed and donated."""

    step: Array  # [] int32, optimizer steps taken
    params: Params
    opt_state: optax.OptState

    @classmethod
    def create(cls, params: Params, optimizer: optax.GradientTransformation) -> Self:
        """Starts at step 0 with a fresh optimizer state for ``params``."""
        return cls(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params))


def known(x: Any) -> np.ndarray | None:
    """The values of an array, by NumPy, since ``jax.numpy`` traces constants too. None under
    ``jit``, and of an array that other processes hold too."""
    is_known = not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)
    return np.asarray(x) if is_known and x is not None else None


class _Rows:
    """Rows of a prompt and a response."""

    response_mask: Array

    @property
    def mask(self) -> Array:
        """[B, T] bool: the tokens of the response."""
        return self.response_mask != 0

    @property
    def present(self) -> Array:
        """[B] bool: the rows with a response. Other rows are missing: they count in no loss and no
        metric.
        """
        return self.mask.any(axis=1)


PER_TOKEN: dict[str, Any] = {"per_token": True}
"""Metadata of the fields of a Rollout whose second axis is the columns of ``tokens``, [B, T] or [B,
T, ...], such as one of a subclass of your own:

    @flax.struct.dataclass
    class WithCosts(Rollout):
        costs: Array | None = flax.struct.field(metadata=PER_TOKEN, default=None)  # [B, T, K]

Long rollouts are cut to the columns that a microbatch needs, and these fields with them. Fields
without it belong to whole rows, whatever their shape.
"""


@flax.struct.dataclass
class Rollout(_Rows):
    """Responses of a policy and the quantities computed from them. A field that has not been
    computed yet is None.
    """

    tokens: Array = flax.struct.field(metadata=PER_TOKEN)
    """[B, T] int32: left-padded prompt, then the response, then pads."""
    attention_mask: Array = flax.struct.field(metadata=PER_TOKEN)
    """[B, T]: 1 on real tokens. Packed documents are numbered 1, 2, ...; each reads only itself."""
    response_mask: Array = flax.struct.field(metadata=PER_TOKEN)
    """[B, T]: 1 on the policy's tokens, EOS included. It may have holes. Empty: a missing row."""
    log_probs: Array = flax.struct.field(metadata=PER_TOKEN)
    """[B, T]: log p(tokens[:, t] | before) of the policy that sampled; 0 outside the response."""
    row_ids: Array | None = None  # [B] data row of the prompt
    scores: Array | None = None  # [B] from the reward function, before any penalty
    ref_log_probs: Array | None = flax.struct.field(metadata=PER_TOKEN, default=None)  # [B, T]
    values: Array | None = flax.struct.field(metadata=PER_TOKEN, default=None)
    """[B, T]: V of the state before tokens[:, t] (the value head at t - 1)."""
    rewards: Array | None = flax.struct.field(metadata=PER_TOKEN, default=None)  # [B, T]
    advantages: Array | None = flax.struct.field(metadata=PER_TOKEN, default=None)
    """[B, T]; [B] of VPG, one for each row."""
    returns: Array | None = flax.struct.field(metadata=PER_TOKEN, default=None)  # [B, T]
    importance_weights: Array | None = flax.struct.field(metadata=PER_TOKEN, default=None)
    """[B, T]: factor of each token's policy loss; 0 outside the response."""
    prompt_length: int | None = flax.struct.field(pytree_node=False, default=None, kw_only=True)
    """P."""
    group_size: int = flax.struct.field(pytree_node=False, default=1, kw_only=True)
    """Adjacent rows whose prompt is computed once: they stay together in minibatches and
    microbatches. 1: each row is by itself."""
    temperature: float | None = flax.struct.field(pytree_node=False, default=None, kw_only=True)
    """By which the sampler divided the logits; 0 if it was greedy, None if unknown. A policy
    function of another temperature is refused."""
    support: Array | None = flax.struct.field(metadata=PER_TOKEN, default=None, kw_only=True)
    """[B, T, K] int32: the ids among which the sampler drew tokens[:, t], in any order, then -1;
    all -1 outside the response. Every log-prob of the rollout is one among these ids. None: the
    sampler drew from the whole vocabulary."""
    truncated: bool = flax.struct.field(pytree_node=False, default=False, kw_only=True)
    """Whether the sampler drew from another distribution than the whole softmax, by top-k, top-p,
    min-p or a repetition penalty. Without ``support`` no policy function fits such samples."""
    greedy_rewards: Array | None = None
    """[B]: reward of the policy's greedy response to the same prompt, without KL."""
    teacher_log_probs: Array | None = flax.struct.field(metadata=PER_TOKEN, default=None)
    """[B, T]: of a teacher that is asked for these tokens alone."""
    stopped: Array | None = None
    """[B] bool: a stop string ended the last response, so that it needs no EOS. None: none did."""
    extras: dict[str, Array] | None = flax.struct.field(
        metadata=PER_TOKEN, default=None, kw_only=True
    )
    """{name: [B] or [B, T]}: what else the reward, the environment or the engine says of rows and
    tokens. The components of a reward are here, before weights; NaN [B]: no score of this one."""
    group_ids: Array | None = flax.struct.field(default=None, kw_only=True)
    """[B] int32: rows with the same number are answers to one prompt."""
    sampler_log_probs: Array | None = flax.struct.field(
        metadata=PER_TOKEN, default=None, kw_only=True
    )
    """[B, T]: the ``log_probs`` of what sampled, where ``rescore`` has put others into their place.
    Importance weights are made of these."""
    dense: bool = flax.struct.field(pytree_node=False, default=False, kw_only=True)
    """Whether the reward function gave ``rewards`` at tokens, whose places advantages keep."""

    @property
    def components(self) -> NoReturn:
        """It was removed."""
        raise AttributeError("Rollout.components was removed: they are in rollout.extras")


def map_columns(fn: Callable[[Array], Any], rollout: Rollout) -> Rollout:
    """The rollout with ``fn`` of each array that has a column for each token; other fields are as
    they were, ``prompt_length`` too, which is to be set where ``fn`` drops columns in front.
    """
    changed = {}
    for field in dataclasses.fields(rollout):
        value = getattr(rollout, field.name)
        if field.metadata.get("per_token"):
            changed[field.name] = jax.tree.map(lambda x: fn(x) if x.ndim > 1 else x, value)
    return dataclasses.replace(rollout, **changed)


@flax.struct.dataclass
class Comparisons:
    """K answers to one prompt; K = 2: chosen and rejected. An answer with an empty response_mask is
    missing.

    When packed, up to C comparisons share a row: tokens and masks are [B, T], ``attention_mask``
    numbers the answers, and all other fields have an axis C after B. If each prompt is packed once,
    before its K answers, it has a number too: 1, K + 2, 2 K + 3, ...; models are then functions
    with ``num_answers`` K.
    """

    tokens: Array  # [B, K, T] int32
    attention_mask: Array  # [B, K, T]
    response_mask: Array  # [B, K, T]
    best: Array | None = None  # [B] int32, the human's choice; None means 0: (chosen, rejected)
    targets: Array | None = None  # [B, K] for regression (K = 1 usual)
    margin: Array | None = None  # [B]
    weight: Array | None = None  # [B]; [B, M] for an ensemble of M members
    ref_log_probs: Array | None = None  # [B, K] summed over the response (DPO)
    documents: Array | None = None
    """[B, C, K] int32, only when packed: the number of each answer in attention_mask."""


@flax.struct.dataclass
class Demonstrations(_Rows):
    """Texts to imitate: a prompt and a response in each row. The loss covers only the response."""

    tokens: Array  # [B, T] int32
    attention_mask: Array  # [B, T]; packed documents are numbered 1, 2, ...
    response_mask: Array  # [B, T]; an empty row is missing


@flax.struct.dataclass
class Feedback(Demonstrations):
    """Single answers, each with a label: desirable or not."""

    desirable: Array  # [B] bool
    weight: Array | None = None  # [B]
    ref_log_probs: Array | None = None  # [B] summed over the response
    mismatched: "Feedback | None" = None
    """Each row's prompt with the next row's response, for KTO's reference point."""
    reference_point: Array | None = None  # [B] nats, the same number in each row


class PolicyOutput(NamedTuple):
    """Per-token results of one forward pass, [B, T] float32 each; column 0 is 0."""

    log_probs: Array
    entropy: Array
    values: Array | None = None
    teacher_log_probs: Array | None = None  # of the same tokens, with a teacher
    divergence: Array | None = None  # from the teacher, over the whole vocabulary
    statistic: Any = None
    """Of the next-token distributions, where one is asked for: a tree of [B, T, ...]."""


PolicyFn = Callable[..., PolicyOutput]
"""Any language model as the algorithms see it: a function of (params, tokens, attention_mask, key).
``key=None`` turns dropout off, as RL, DPO and all scoring do. Of a rollout with ``support`` it gets
that too, as a keyword: log-probs and entropies are then those of the distribution among these ids.
Where a loss asks for one it gets ``statistic`` and its ``arrays``, see ``ops.evaluate``.
A ``policies.Policy`` carries settings, which ``ops.evaluate`` compares with the rollout's; of a
plain function nothing is checked."""

BoundPolicyFn = Callable[..., PolicyOutput]
"""A policy that carries its parameters (``policy.bind(params)``, or ``jax.tree_util.Partial(
policy_fn, params)``), such as the reference: a function of (tokens, attention_mask, key)."""

ScoreFn = Callable[[Params, Array, Array, DropoutKey], Array]
"""Any model that gives a text one number: of (params, tokens, attention_mask, key) it returns [B].
"""

Scores = tuple[Array, dict[str, Array]]
RewardFn = Callable[[Rollout], Scores]
"""A jittable reward: (scores [B] or dense rewards [B, T], {name of a component: [B] or [B, T]}). No
components: an empty dict.
"""


class AlgorithmConfig:
    """What a run reads of an algorithm's settings, with the value of each that a ``Config`` leaves
    out. A ``Config`` has what it changes as fields, or as plain attributes of the class.
    ``algorithms.policy.Batching`` and ``policy.Config`` are such classes; a dataclass of your own
    need not extend any.
    """

    group_size: int = 1
    """Answers to each prompt, in adjacent rows."""
    num_epochs: int = 1
    """Passes over each rollout."""
    num_minibatches: int = 1
    """Optimizer steps of a pass."""
    num_microbatches: int = 1
    """Parts of a minibatch, which are run one after the other."""
    shuffle_blocks: int = 1
    """Blocks of the global batch inside which rows are shuffled."""
    baseline: str = "none"
    """"greedy": the update reads ``rollout.greedy_rewards``."""
    whole_groups: bool = False
    """Whether the answers to a prompt stay together in minibatches and microbatches, as a loss of
    pairs needs."""
    extras: Mapping[str, Literal["row", "token"]] = MappingProxyType({})
    """The names that the update reads of ``rollout.extras``: [B] of rows, [B, T] of tokens. The run
    fills ``sampler_log_probs`` [B, T], those of what sampled; all others the reward, as components,
    or the environment."""

    unrewarded: tuple[str, ...] = ()
    """Which of these may be no entry of the reward with a weight other than 0, such as a cost."""

    # Read if the algorithm has ``needs_values``.
    value: str = "shared"
    """shared: a value head on the policy's body; separate: a value model."""
    value_from: str = "policy"
    """With separate, what the value model starts from: policy, reward, or a folder."""
    value_learning_rate: float | None = None
    """Peak learning rate of what only the value function has; None: that of ``rl.optimizer``."""
    value_warmup: int = 0
    """Iterations at the start in which only the value function learns."""

    score_range: tuple[float, float] = (-1e15, 1e15)
    """Scores outside of it make an update that is not finite."""
    needs_teacher: bool = False
    """Whether the loss reads the policy's ``divergence`` from a teacher."""
    teacher: str | None = None
    """The folder of the teacher, or its URL."""
    teacher_model: str | None = None
    """The name of the model on the teacher's server; None: the only one."""

    @property
    def kl_in_loss(self) -> bool:
        """Whether the loss reads ``rollout.ref_log_probs``."""
        return False

    @property
    def teacher_server(self) -> str | None:
        """The URL of the teacher; None if it is a folder."""
        return None

    def measure(self, logits: Array, *, teacher_logits: Array) -> Array:
        """[...] the divergence of a teacher's logits [..., V]."""
        raise NotImplementedError("a Config with needs_teacher has its own measure")


def complete(config: Any, name: str = "the algorithm") -> None:
    """Gives the class of a Config what ``AlgorithmConfig`` names and it does not have. UserError if
    it is no frozen dataclass, or has a name that nothing reads any more."""
    kind = type(config)
    if hasattr(kind, "needs_components"):
        raise UserError(
            f"{name}: Config.needs_components was removed; Config.extras says what of "
            "rollout.extras is read, {name: 'row' or 'token'}"
        )
    settings = getattr(kind, "__dataclass_params__", None)
    if settings is None or not settings.frozen:
        raise UserError(f"{name}: its Config must be a frozen dataclass, @dataclass(frozen=True)")
    for key, value in vars(AlgorithmConfig).items():
        if not key.startswith("_") and not hasattr(kind, key):
            setattr(kind, key, value)


class Algorithm(Protocol):
    """Policy optimisation from rollouts, as a module: ``vpg``, ``ppo``, ``rloo``, ``grpo`` or one
    of your own. These names are what a run needs. It also reads, if they are there,

    - ``State``: ``TrainState``, or a subclass with further arrays that updates carry on,
    - ``needs_values``: whether the update reads ``rollout.values``; False if it is left out,
    - ``kl_coef``: weight of the KL penalty in the reward where a run sets none; 0 if left out,
    - ``respond(sample, prompts, key, *, model, policy, reference, config) -> Rollout``: what
      samples in training, see ``iteration.respond_by``,
    - ``choose(state, key, *, rows, number, config) -> [number] int32``: the data rows of the next
      step's prompts, among ``rows`` [N]; without it they are drawn in epochs,
    - ``prepare(rollout, *, config, axis_name=None) -> Rollout`` with ``advantages``: by these
      ``rl.dynamic_sampling`` knows which groups teach; it may have parameters ``state``, ``key``
      and ``policy_fn``, of the update,
    - ``observe(state, rollout, *, config, axis_name=None) -> state``: after an update, is told of
      the scored groups that dynamic sampling has left out.

    ``loss(params, rollout, key, *, policy_fn, config)`` of this package's algorithms is for those
    who compose them: no run calls it.
    """

    @property
    def __name__(self) -> str: ...
    @property
    def Config(self) -> type[Any]:
        """A frozen dataclass whose fields all have defaults; see ``AlgorithmConfig``."""

    def update(
        self,
        state: Any,
        rollout: Rollout,
        key: Array,
        *,
        policy_fn: PolicyFn,
        optimizer: optax.GradientTransformation,
        config: Any,
        axis_name: AxisName = None,
        minibatch_sharding: Any = None,
    ) -> tuple[Any, Metrics]:
        """The state after the update, and metrics averaged over its optimizer steps."""
