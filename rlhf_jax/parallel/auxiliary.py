"""Losses that a network has of its own, such as the balance of its experts, beside the loss of an
algorithm. Algorithms do not know of them.

While the loss of an update is traced inside ``collected``, networks ``add`` their terms, which the
update then adds to the algorithm's. Nobody collects elsewhere: networks compute no such terms in
sampling, scoring and validation. What is collected belongs to the trace of the loss: a PolicyFn or
ScoreFn of a network with such terms that is jitted by itself inside it is refused.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
from jax.extend.core import get_opaque_trace_state

from rlhf_jax.types import LossAndMetrics, Mean

Terms = dict[str, Mean]
LOSS = "router/aux_loss"  # the term that is weighed and added; the others are metrics

# In jit's cache key: a network that was traced without its terms is traced again where they count.
_is_wanted = jax.make_user_context(False)
_collected: ContextVar[tuple[Terms, Any] | None] = ContextVar("auxiliary", default=None)


@contextmanager
def collected() -> Iterator[Terms]:
    """The terms that networks add to the loss that is traced inside, by their metrics' names."""
    terms: Terms = {}
    token = _collected.set((terms, get_opaque_trace_state()))
    try:
        with _is_wanted(True):
            yield terms
    finally:
        _collected.reset(token)


def is_wanted() -> bool:
    """Whether terms are collected."""
    return bool(_is_wanted.value)


def add(terms: Terms) -> None:
    """Adds the terms of a network's pass over some rows. Several passes give one mean. ValueError
    if nobody collects, or the pass has a trace of its own, which would keep its terms."""
    collector = _collected.get()
    if collector is None:
        raise ValueError("no loss collects auxiliary terms: see auxiliary.collected")
    held, trace_of_loss = collector
    if trace_of_loss != get_opaque_trace_state():
        raise ValueError(
            "router_aux_coef: the network is jitted, or runs in parts, inside the loss, which "
            "would lose its terms; give the update a policy_fn or score_fn that is not jitted"
        )
    for name, term in terms.items():
        held[name] = held[name].merge(term) if name in held else term


def with_terms(found: LossAndMetrics, terms: Terms, coefficient: float) -> LossAndMetrics:
    """An algorithm's loss and metrics with the terms: ``LOSS`` is added as a mean of its own.

    Raises:
        ValueError: there is none, because the network has no experts.
    """
    if LOSS not in terms:
        raise ValueError("router_aux_coef: this model has no experts; leave it out")
    loss, metrics = found
    if not (isinstance(coefficient, int | float) and coefficient == 0):
        loss = (*(loss if isinstance(loss, tuple) else (loss,)), coefficient * terms[LOSS])
    return loss, {**metrics, **terms}
