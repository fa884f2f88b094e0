"""A policy as a value: a function of parameters and texts that carries its settings, so that they
can be compared with what was sampled; and functions of rows, applied to some rows at a time.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import chex
import flax.struct
import jax
import numpy as np
from jax import Array
from jax.tree_util import Partial

from rlhf_jax import types
from rlhf_jax.errors import warn_once
from rlhf_jax.parallel import blocks
from rlhf_jax.types import Demonstrations, DropoutKey, Params, PolicyFn, PolicyOutput, Rollout


@flax.struct.dataclass
class Policy:
    """A PolicyFn with its settings: ``policy(params, tokens, attention_mask, key)`` calls ``fn``.

    It is a pytree of what it carries, which ``jit`` then takes as arguments. A policy that carries
    no arrays is hashable and may be in a closure.
    """

    fn: Callable[..., PolicyOutput] = flax.struct.field(pytree_node=False)
    bound: tuple[Any, ...] = ()
    """Pytrees: the first arguments of ``fn``, which callers do not give."""
    temperature: float | None = flax.struct.field(pytree_node=False, default=None)
    """By which it divides logits; None: unknown."""
    prompt_length: int = flax.struct.field(pytree_node=False, default=0)
    """Log-probabilities of columns before this one are not computed, and 0."""
    takes_response_mask: bool = flax.struct.field(pytree_node=False, default=False)
    """As a keyword, [B, n] of the last n columns: columns before or outside it may be left out, and
    are 0 then."""
    takes_statistic: bool = flax.struct.field(pytree_node=False, default=False)
    """As a keyword, with its ``arrays``: a function of the logits; see ``evaluate``."""

    __name__ = "policy"  # of the program of ``jax.jit(policy)``

    def __call__(self, *arguments: Any, **more: Any) -> PolicyOutput:
        return self.fn(*self.bound, *arguments, **more)

    def bind(self, *first: Any) -> "Policy":
        """The policy that carries its first arguments, such as its parameters."""
        return replace(self, bound=(*self.bound, *first))

    def evaluate(
        self,
        batch: Rollout | Demonstrations,
        key: DropoutKey = None,
        *,
        name: str = "policy_fn",
        statistic: Callable[..., Any] | None = None,
        arrays: Sequence[Array | None] = (),
    ) -> PolicyOutput:
        """The output on the rows of a batch, for a policy that carries its parameters. Raises as
        the function ``evaluate`` does.
        """
        chex.assert_rank(batch.tokens, 2)
        self.check(batch, name)
        more: dict[str, Any] = {}
        if statistic is not None:
            if not self.takes_statistic:
                raise ValueError(
                    f"{name} gives no statistic of its logits: it is no policy of models.policy_fn "
                    "or ops.policy_fn, which policies.wrap keeps one"
                )
            # As a Partial it passes through jit.
            given = tuple(x for x in arrays if x is not None)
            more = {"statistic": Partial(statistic), "arrays": given}
        support = getattr(batch, "support", None)
        if support is not None:
            more["support"] = support
        if self.takes_response_mask:
            first = getattr(batch, "prompt_length", None) or 0
            more["response_mask"] = batch.response_mask[:, first:]
        output = self(batch.tokens, batch.attention_mask, key, **more)
        chex.assert_equal_shape([batch.tokens, *jax.tree.leaves(output._replace(statistic=None))])
        chex.assert_equal_shape_prefix([batch.tokens, *jax.tree.leaves(output.statistic)], 2)
        return output

    def check(self, rollout: Any, name: str = "policy_fn") -> None:
        """Raises ValueError if the policy has another temperature than the rollout, or was made for
        longer prompts, whose columns it does not compute. What one of the two does not know is not
        compared, and neither is the temperature of greedy responses. Raises it too for samples of a
        truncated distribution that do not say among which ids they were drawn.
        """
        if getattr(rollout, "truncated", False) and rollout.support is None:
            raise ValueError(
                "the responses do not come from the whole softmax (top_k, top_p, min_p or "
                "repetition_penalty), and the rollout does not say among which tokens they were "
                "drawn: sample with SamplingConfig(record_support=True), as rollout.collect does"
            )
        temperature = getattr(rollout, "temperature", None)
        if temperature and self.temperature is not None and self.temperature != temperature:
            raise ValueError(
                f"{name} has temperature {self.temperature}, but the responses were sampled at "
                f"{temperature}: give both the same"
            )
        first = self.prompt_length
        prompt_length = getattr(rollout, "prompt_length", None)
        mask = types.known(rollout.response_mask)
        if prompt_length is not None:
            is_left_out = first > prompt_length
            where = f", which follow prompts of {prompt_length} slots"
            if mask is not None and np.any(mask[..., :prompt_length] != 0):
                raise ValueError(
                    f"the rollout has prompt_length {prompt_length}, and a response that begins "
                    "before: set its prompts' own number of slots, or None"
                )
        else:
            is_left_out = mask is not None and bool(np.any(mask[..., :first] != 0))
            where = ""
        if is_left_out:
            raise ValueError(
                f"{name} has prompt_length {first}, so it computes no log-probability of the first "
                f"response tokens{where}: give it the prompts' own number of slots, or 0"
            )


def find_policy(fn: Any) -> Policy | None:
    """``fn`` as a Policy: itself, or the one that is jitted or in a partial, with what was bound;
    None for any other function, of which nothing is known.
    """
    if isinstance(fn, Policy):
        return fn
    is_jitted = isinstance(fn, jax.stages.Wrapped)
    if not is_jitted and not isinstance(fn, functools.partial):
        return None
    inner = find_policy(fn.__wrapped__ if is_jitted else fn.func)
    if inner is None:
        return None
    if is_jitted or fn.keywords:
        return replace(inner, fn=fn, bound=())
    return inner.bind(*fn.args)


def as_policy(fn: PolicyFn) -> Policy:
    """``fn`` as ``find_policy`` gives it, or a plain function as a Policy without settings."""
    return find_policy(fn) or Policy(fn)


def wrap(outer: Callable[..., Any], fn: Callable[..., Any], *first: Any) -> Any:
    """``outer(fn, *first, ...)`` as a function of the other arguments: a Policy with the settings
    of ``fn`` if that is one, else a ``Partial``. What it carries travels through ``jit`` with it.
    """
    policy = find_policy(fn)
    if policy is None:
        # A Partial of a Partial would hide the arrays of the inner one from jit.
        return Partial(outer, fn if isinstance(fn, Partial) else Partial(fn), *first)
    return replace(policy, fn=outer, bound=(policy, *first))


def evaluate(
    policy_fn: PolicyFn,
    params: Params,
    batch: Rollout | Demonstrations,
    key: DropoutKey = None,
    *,
    name: str = "policy_fn",
    statistic: Callable[..., Any] | None = None,
    arrays: Sequence[Array | None] = (),
) -> PolicyOutput:
    """The policy's output on the rows of a batch, of use where the ``response_mask`` is not 0: a
    policy of ``models.policy_fn`` may leave out other columns, which are 0 then. Raises
    AssertionError unless its shape is that of the tokens, [B, T], and ValueError, with the ``name``
    of the function, if its settings do not fit the batch (``Policy.check``); a plain function has
    none, which a warning says once of samples whose temperature is known.

    Args:
        statistic: of the next-token distributions: ``statistic(logits, *arrays)``, of logits [...,
            V] over the whole vocabulary, float32 and divided by the temperature, returns a tree of
            [...] or [..., K], which ``output.statistic`` has as [B, T, ...]. Column t comes from
            the logits at t - 1 and column t of the arrays. The logits of a whole text need not
            exist at once, and gradients flow through it. ValueError for a plain function.
        arrays: [B, T, ...] each; None is left out, as the ``support`` of whole softmaxes is.
    """
    policy, temperature = find_policy(policy_fn), getattr(batch, "temperature", None)
    if policy is None and temperature is not None:
        warn_once(
            f"{name} is a plain function: whether its temperature is that of the samples, "
            f"{temperature}, is not checked, nor its prompt_length, and it computes columns that "
            "no loss reads; policies.wrap keeps the settings of the policy that it calls"
        )
    how: Any = {"name": name, "statistic": statistic, "arrays": arrays}
    return (policy or Policy(policy_fn)).bind(params).evaluate(batch, key, **how)


def by_rows(fn: Callable[..., Any], rows: int | None, *, group_size: int = 1) -> Callable[..., Any]:
    """``fn(params, tokens [B, T], attention_mask [B, T], None)``, a PolicyFn or ScoreFn without a
    gradient, applied to at most ``rows`` rows at a time, so that its activations do not grow with
    B. With ``rows`` None it is applied to all rows at once. Further arrays [B, ...] go to ``fn``
    too, also those with a keyword, such as ``support``, and a ``statistic``.

    The parts are those of ``split_rows``, of each block in ``blocks.replicated``. They hold whole
    groups of ``group_size`` adjacent rows.
    """

    def in_parts(
        fn: Callable[..., Any],
        params: Params,
        tokens: Array,
        attention_mask: Array,
        key: None = None,
        *further: Array,
        statistic: Callable[..., Any] | None = None,
        **of_rows: Any,
    ) -> Any:
        fn = fn if statistic is None else functools.partial(fn, statistic=statistic)
        at_once = rows and max(rows // max(blocks.number(), 1), 1)

        def apply(part: Any) -> Any:
            (tokens, mask, *others), keywords = part
            return fn(params, tokens, mask, key, *others, **keywords)

        def apply_in_parts(batch: Any) -> Any:
            num_rows = len(batch[0][0])
            num_groups = num_rows // group_size
            groups_at_once = max((at_once or num_rows) // group_size, 1)
            parts = -(-num_groups // groups_at_once)
            while num_groups % parts:
                parts += 1
            if parts == 1:
                return apply(batch)
            results = jax.lax.map(apply, split_rows(batch, parts, group_size=group_size))

            def in_order(x: Array) -> Array:
                """The inverse of ``split_rows``."""
                of_groups = x.reshape(parts, -1, group_size, *x.shape[2:])
                return of_groups.swapaxes(0, 1).reshape(-1, *x.shape[2:])

            return jax.tree.map(in_order, results)

        return blocks.map_rows(apply_in_parts, ((tokens, attention_mask, *further), of_rows))

    return wrap(in_parts, fn)


def split_rows(batch: Any, parts: int, *, group_size: int = 1) -> Any:
    """Each leaf [B, ...] of a batch as [parts, B / parts, ...]. Group i of ``group_size`` adjacent
    rows is in part ``i % parts``, so that each device of a sharded batch has rows in every part.
    """

    def split(x: Array) -> Array:
        by_group = x.reshape(-1, parts, group_size, *x.shape[1:]).swapaxes(0, 1)
        return by_group.reshape(parts, -1, *x.shape[1:])

    return jax.tree.map(split, batch)
