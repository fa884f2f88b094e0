"""What a run asks of an algorithm of one's own, and what it has by default."""

import types

import pytest

from rlhf_jax import TrainState, rloo, vpg
from rlhf_jax.errors import UserError
from rlhf_jax.training.rl.method import completed


def bare(**parts):
    """A module with a name and these parts."""
    return types.SimpleNamespace(__name__="mine", **parts)


def test_an_algorithm_is_a_config_and_an_update():
    complete = completed(bare(Config=rloo.Config, update=rloo.update))
    assert complete.State is TrainState
    assert complete.needs_values is False
    assert complete.kl_coef == 0.0
    assert complete.update is rloo.update


def test_what_an_algorithm_has_is_kept():
    complete = completed(vpg)
    assert complete.State is vpg.State
    assert complete.kl_coef == vpg.kl_coef
    assert complete.__name__ == vpg.__name__


@pytest.mark.parametrize(
    ("parts", "missing"),
    [
        ({}, "needs Config and update"),
        ({"Config": rloo.Config}, "needs update"),
        ({"update": rloo.update}, "needs Config"),
    ],
)
def test_what_is_missing_is_named(parts, missing):
    with pytest.raises(UserError, match=f"mine: an algorithm {missing}:"):
        completed(bare(**parts))
