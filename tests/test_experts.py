"""Mixtures of experts in training: the loss that balances them, routers that RL leaves alone, and
adapters of experts.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from builders import MORE, some_params
from numpy.testing import assert_allclose

from rlhf_jax import auxiliary, models, sharding
from rlhf_jax.algorithms import reward_model, sft
from rlhf_jax.models import mlp
from rlhf_jax.types import Comparisons, Demonstrations, TrainState

CONFIG = replace(MORE["mixtral"], num_layers=3, scan_layers=True)  # two stacked, one by itself
MASK = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]] * 2)
TOKENS = np.array([[1, 2, 3, 4, 0, 0], [5, 6, 7, 8, 9, 10], [2, 2, 4, 4, 0, 0], [9, 7, 5, 3, 1, 2]])
BATCH = Demonstrations(*map(jnp.asarray, (TOKENS, MASK, MASK)))
SGD = optax.sgd(0.1)


def test_balance_is_that_of_the_chosen_experts_and_their_shares():
    """Two layers, three tokens of which the last is a pad; one expert of two for each token."""
    config = replace(CONFIG, num_experts=2, experts_per_token=1)
    shares = jnp.array([[[0.9, 0.1], [0.6, 0.4], [0.0, 1.0]], [[0.7, 0.3], [0.2, 0.8], [0.0, 1.0]]])
    routed = {"h": {"shares": (shares,), "chosen": (shares.argmax(-1, keepdims=True),)}}
    found = mlp.balance(config, routed, jnp.array([[1, 1, 0]]))
    # f = (3/4, 1/4), P = (0.6, 0.4)
    assert_allclose(found["router/aux_loss"].value, 2 * (0.75 * 0.6 + 0.25 * 0.4), rtol=1e-6)
    assert_allclose(found["router/max_load"].value, 2 * 0.75, rtol=1e-6)
    assert found["router/aux_loss"].count == 2


@jax.jit
def losses_of(params, batch):
    """The algorithm's loss, and the terms of the network, of a batch as a whole."""
    with auxiliary.collected() as terms:
        policy_fn = models.policy_fn(models.build(CONFIG))
        loss, _ = sft.loss(params, batch, None, policy_fn=policy_fn, config=sft.Config())
    return loss.value, terms


def updated(config, batch=BATCH, **settings):
    model = models.build(config)
    state = TrainState.create(some_params(config), SGD)
    update = partial(sft.update, policy_fn=models.policy_fn(model), optimizer=SGD)
    return jax.jit(partial(update, key=None, config=sft.Config(**settings)))(state, batch)


def test_the_term_is_added_to_an_algorithm_that_does_not_know_it():
    params = some_params(CONFIG)

    def total(params):
        loss, terms = losses_of(params, BATCH)
        return loss + 0.5 * terms[auxiliary.LOSS].value

    value, grads = jax.jit(jax.value_and_grad(total))(params)
    state, metrics = updated(CONFIG, router_aux_coef=0.5)
    assert_allclose(metrics["loss"], value, rtol=1e-6)
    assert_allclose(metrics["loss"], metrics["sft/loss"] + 0.5 * metrics[auxiliary.LOSS], rtol=1e-6)
    expected = optax.apply_updates(params, jax.tree.map(lambda g: -0.1 * g, grads))
    jax.tree.map(partial(assert_allclose, rtol=1e-5, atol=1e-6), state.params, expected)


def test_a_weight_of_0_gives_the_metric_alone_and_none_gives_nothing():
    plain, without = updated(CONFIG)
    measured, metrics = updated(CONFIG, router_aux_coef=0.0)
    assert metrics.keys() - without.keys() == {"router/aux_loss", "router/max_load"}
    assert_allclose(metrics["loss"], without["loss"], rtol=1e-6)
    jax.tree.map(partial(assert_allclose, rtol=1e-5, atol=1e-6), plain.params, measured.params)
    assert metrics["router/max_load"] >= 1


def test_microbatches_balance_apart_and_weigh_by_their_tokens():
    """Rows 0 and 2 are one microbatch, of 8 tokens, and rows 1 and 3 another, of 12."""
    _, metrics = updated(CONFIG, num_microbatches=2, router_aux_coef=0.5)
    parts = [jax.tree.map(lambda x, i=i: x[i::2], BATCH) for i in (0, 1)]
    terms = [losses_of(some_params(CONFIG), part)[1] for part in parts]
    first, second = (term[auxiliary.LOSS].value for term in terms)
    assert abs(first - second) > 1e-3
    assert_allclose(metrics[auxiliary.LOSS], (8 * first + 12 * second) / 20, rtol=1e-5)
    assert_allclose(metrics["loss"], metrics["sft/loss"] + 0.5 * metrics[auxiliary.LOSS], rtol=1e-6)


def test_rows_on_several_devices_balance_together():
    mesh = sharding.make_mesh(2, 1, 1)
    batch = jax.device_put(BATCH, sharding.rows(mesh))
    _, terms = losses_of(some_params(CONFIG), batch)
    _, alone = losses_of(some_params(CONFIG), BATCH)
    assert_allclose(terms[auxiliary.LOSS].value, alone[auxiliary.LOSS].value, rtol=1e-5)
    assert terms[auxiliary.LOSS].count == 20


def test_a_reward_model_balances_all_tokens_in_its_last_layer_too():
    """Its last layer computes one column of each answer otherwise."""
    model = models.build(CONFIG)
    params = models.add_head(jax.random.key(0), some_params(CONFIG), "score")
    pairs = [jnp.asarray(x).reshape(2, 2, -1) for x in (TOKENS, MASK, MASK)]
    settings = reward_model.Config(router_aux_coef=0.1)
    how = {"score_fn": models.score_fn(model), "optimizer": SGD, "config": settings}
    state = TrainState.create(params, SGD)
    _, metrics = jax.jit(partial(reward_model.update, **how))(state, Comparisons(*pairs), None)
    _, terms = losses_of(params, BATCH)
    assert_allclose(metrics[auxiliary.LOSS], terms[auxiliary.LOSS].value, rtol=1e-5)


def test_a_model_without_experts_has_no_such_term():
    with pytest.raises(ValueError, match="router_aux_coef: this model has no experts"):
        updated(MORE["olmo2"], router_aux_coef=0.1)
    with pytest.raises(ValueError, match="router_aux_coef must be at least 0"):
        sft.Config(router_aux_coef=-1.0)


def test_nothing_is_collected_outside_of_an_update():
    assert not auxiliary.is_wanted()
    with pytest.raises(ValueError, match="no loss collects"):
        auxiliary.add({})
