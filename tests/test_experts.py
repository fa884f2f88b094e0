"""Mixtures of experts in training: the loss that balances them, routers that RL leaves alone, and
adapters of experts.
"""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from builders import LLAMA, MORE, slow, some_params
from flax.traverse_util import flatten_dict, unflatten_dict
from numpy.testing import assert_allclose, assert_array_equal
from programs import mesh_of
from safetensors.numpy import load_file

from rlhf_jax import models, ppo, sampling, sharding
from rlhf_jax.algorithms import sft
from rlhf_jax.config import Optimizer, PPOStage, RLStage
from rlhf_jax.errors import UserError
from rlhf_jax.iteration import NO_PENALTY
from rlhf_jax.models import lora, mlp
from rlhf_jax.models.kernels import grouped
from rlhf_jax.models.model import balance
from rlhf_jax.parallel import auxiliary
from rlhf_jax.training.rl import programs
from rlhf_jax.training.rl.method import Method
from rlhf_jax.types import Demonstrations, Mean, Rollout, TrainState

CONFIG = replace(MORE["mixtral"], scan_layers=True)  # one layer is in a stack, one by itself
SINGLE = replace(MORE["mixtral"], num_layers=1)
MASK = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]] * 2)
TOKENS = np.array([[1, 2, 3, 4, 0, 0], [5, 6, 7, 8, 9, 10], [2, 2, 4, 4, 0, 0], [9, 7, 5, 3, 1, 2]])
BATCH = Demonstrations(*map(jnp.asarray, (TOKENS, MASK, MASK)))
SGD = optax.sgd(0.1)


def test_balance_is_that_of_the_chosen_experts_and_their_shares():
    """Two layers, three tokens of which the last is a pad; one expert of two for each token."""
    config = replace(CONFIG, num_experts=2, experts_per_token=1)
    shares = np.array([[[0.9, 0.1], [0.6, 0.4], [0.0, 1.0]], [[0.7, 0.3], [0.2, 0.8], [0.0, 1.0]]])
    routed = {"h": {"shares": (shares,), "chosen": (shares.argmax(-1, keepdims=True),)}}
    found = jax.jit(partial(balance, config))(routed, np.array([[1, 1, 0]]))
    # f = (3/4, 1/4), P = (0.6, 0.4)
    assert_allclose(found["router/aux_loss"].value, 2 * (0.75 * 0.6 + 0.25 * 0.4), rtol=1e-6)
    assert_allclose(found["router/max_load"].value, 2 * 0.75, rtol=1e-6)
    assert found["router/aux_loss"].count == 2


def test_blocks_hold_the_tokens_of_one_expert_each():
    """Four tokens of two of four experts, who have 2, 1, 4 and 1 tokens: blocks of two rows."""
    blocks_of = jax.jit(grouped.blocks_of, static_argnums=1)
    blocks = blocks_of(np.array([[[0, 2], [2, 1], [2, 0], [2, 3]]]), 4)
    assert_array_equal(blocks.experts, [[0, 1, 2, 2, 3, 3, 3, 3]])
    assert_array_equal(blocks.places, [[0, 4, 5, 2, 6, 1, 7, 8]])
    assert_array_equal(blocks.sources[:, :10], [[0, 2, 1, 0, 0, 1, 2, 3, 3, 0]])
    assert_array_equal(blocks_of(np.zeros((1, 4, 2), int), 4).experts[0, :4], 0)


def dense(params, x):
    """A mixture's output: all experts of each token, those that are not chosen times 0."""
    tokens = x.reshape(-1, 8)
    shares = jax.nn.softmax(tokens @ params["router"]["kernel"])
    kept = jnp.where(shares < jnp.sort(shares)[:, -2:-1], 0, shares)
    weights = kept / kept.sum(axis=1, keepdims=True)
    experts = {name: part["kernel"] for name, part in params["experts"].items()}
    gate, up = (jnp.einsum("nd,edf->nef", tokens, experts[f"{name}_proj"]) for name in GATED)
    each = jnp.einsum("nef,efd->ned", jax.nn.silu(gate) * up, experts["down_proj"])
    return jnp.einsum("ne,ned->nd", weights, each).reshape(x.shape)


GATED = ("gate", "up")


@pytest.mark.parametrize("sizes", [(1, 2, 2), slow((4, 1, 1))])
def test_a_mixture_computes_the_chosen_experts_alone_and_each_device_its_own_rows(sizes):
    """Outputs and gradients are those of all experts, masked; on four devices each computes a
    quarter of the products.
    """
    config = replace(CONFIG, num_experts=16, num_layers=1)
    mixture = mlp.MixtureOfExperts(config)
    x = np.random.default_rng(0).normal(size=(4, 40, 8)).astype(np.float32)
    params = some_params(config)["h_0"]["mlp"]

    def with_gradient(fn):
        def loss(params, x):
            out = fn(params, x)
            return jnp.sum(out**2), out

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))

    blocks = with_gradient(lambda params, x: mixture.apply({"params": params}, x))
    expected = with_gradient(dense)(params, x)
    compiled = blocks.lower(params, x).compile()
    jax.tree.map(partial(assert_allclose, rtol=1e-4, atol=1e-4), compiled(params, x), expected)
    flops = compiled.cost_analysis()["flops"]
    of_all = 160 * 16 * 3 * 3 * 2 * 8 * 12  # each token with each expert: three products, gradients
    assert flops < 0.35 * of_all  # 36 blocks of 16 rows are 0.23 of it
    mesh = mesh_of(*sizes)
    cut = jax.device_put(params, sharding.by_path({"mlp": params}, models.SHARDING, mesh)["mlp"])
    rows = jax.device_put(x, sharding.rows(mesh))
    with jax.set_mesh(mesh):
        own = blocks.lower(cut, rows).compile()
    found = own(cut, rows)
    jax.tree.map(partial(assert_allclose, rtol=1e-4, atol=1e-4), found, expected)
    assert own.cost_analysis()["flops"] < 0.35 * flops


@partial(jax.jit, static_argnames="config")
def losses_of(params, batch, config=CONFIG):
    """The algorithm's loss, and the terms of the network, of a batch as a whole."""
    with auxiliary.collected() as terms:
        policy_fn = models.policy_fn(models.build(config))
        loss, _ = sft.loss(params, batch, None, policy_fn=policy_fn, config=sft.Config())
    return loss.value, terms


def updated(config, batch=BATCH, run=lambda fn, *args: jax.jit(fn)(*args), **settings):
    model = models.build(config)
    state = TrainState.create(some_params(config), SGD)
    update = partial(sft.update, policy_fn=models.policy_fn(model), optimizer=SGD)
    return run(partial(update, key=None, config=sft.Config(**settings)), state, batch)


@pytest.mark.slow
def test_the_term_is_added_to_an_algorithm_that_does_not_know_it():
    """Microbatches balance apart and weigh by their tokens: rows 0 and 2 are one, of 8 tokens, and
    rows 1 and 3 another, of 12.
    """
    params = some_params(CONFIG)

    def total(params):
        loss, _ = losses_of(params, BATCH)
        parts = [jax.tree.map(lambda x, i=i: x[i::2], BATCH) for i in (0, 1)]
        first, second = (losses_of(params, part)[1][auxiliary.LOSS].value for part in parts)
        return loss + 0.5 * (8 * first + 12 * second) / 20, (loss, first, second)

    (value, (loss, first, second)), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    assert abs(first - second) > 1e-3
    state, metrics = updated(CONFIG, num_microbatches=2, router_aux_coef=0.5)
    assert_allclose(metrics["loss"], value, rtol=1e-6)
    assert_allclose(metrics["sft/loss"], loss, rtol=1e-6)
    assert_allclose(metrics[auxiliary.LOSS], (8 * first + 12 * second) / 20, rtol=1e-6)
    assert metrics["router/max_load"] >= 1
    expected = optax.apply_updates(params, jax.tree.map(lambda g: -0.1 * g, grads))
    jax.tree.map(partial(assert_allclose, rtol=1e-5, atol=1e-6), state.params, expected)


def test_a_weight_of_0_gives_the_metric_alone_and_none_gives_nothing():
    _, without = updated(SINGLE, run=jax.eval_shape)
    _, metrics = updated(SINGLE, run=jax.eval_shape, router_aux_coef=0.0)
    assert metrics.keys() - without.keys() == {"router/aux_loss", "router/max_load"}
    loss = Mean(jnp.float32(3.0), jnp.float32(2.0))
    terms = {auxiliary.LOSS: Mean(jnp.float32(8.0), jnp.float32(4.0))}
    assert auxiliary.with_terms((loss, {"a": loss}), terms, 0.0) == (loss, {"a": loss, **terms})
    traced = jax.eval_shape(lambda coef: auxiliary.with_terms((loss, {}), terms, coef)[0], 0.5)
    assert len(traced) == 2  # its value is not known, which may not drop the term
    (first, second), _ = auxiliary.with_terms((loss, {}), terms, 0.5)
    assert first is loss
    assert second.value == 1.0


@pytest.mark.slow
def test_rows_on_several_devices_balance_together():
    mesh = sharding.make_mesh(2, fsdp=1, tensor=1)
    batch = jax.device_put(BATCH, sharding.rows(mesh))
    _, terms = losses_of(some_params(CONFIG), batch)
    _, alone = losses_of(some_params(CONFIG), BATCH)
    assert_allclose(terms[auxiliary.LOSS].value, alone[auxiliary.LOSS].value, rtol=1e-5)
    assert terms[auxiliary.LOSS].count == 20


@pytest.mark.slow
def test_a_reward_model_balances_all_tokens_in_its_last_layer_too():
    """Its last layer computes one column of each answer otherwise."""
    model = models.build(SINGLE)
    head = {name: np.float32(number) for name, number in (("gain", 1), ("shift", 0), ("bias", 0))}
    params = some_params(SINGLE) | {"score": head | {"kernel": np.linspace(-1, 1, 8, dtype="f4")}}

    @jax.jit
    def scored(params):
        with auxiliary.collected() as terms:
            scores = models.score_fn(model)(params, TOKENS, MASK)
        return scores, terms

    scores, terms = scored(params)
    _, expected = losses_of(params, BATCH, SINGLE)
    assert_allclose(terms[auxiliary.LOSS].value, expected[auxiliary.LOSS].value, rtol=1e-5)
    plain = jax.jit(models.score_fn(model))(params, TOKENS, MASK)
    assert_allclose(scores, plain, rtol=1e-4, atol=1e-5)


def test_a_model_without_experts_has_no_such_term():
    with pytest.raises(ValueError, match="router_aux_coef: this model has no experts"):
        updated(replace(LLAMA, num_layers=1), run=jax.eval_shape, router_aux_coef=0.1)
    with pytest.raises(ValueError, match="router_aux_coef must be at least 0"):
        sft.Config(router_aux_coef=-1.0)


def test_answers_that_share_a_prompt_see_it_while_experts_are_balanced():
    params = some_params(SINGLE)
    tokens = np.array([[5, 6, 7, 8, 9, 10, 2, 3, 4, 1]])
    numbers = np.array([[1, 1, 1, 1, 2, 2, 2, 3, 3, 3]])  # a prompt and two answers
    policy = models.policy_fn(models.build(SINGLE), num_answers=2)

    @partial(jax.jit, static_argnums=0)
    def log_probs(collects):
        with auxiliary.collected() if collects else nullcontext():
            return policy(params, tokens, numbers).log_probs

    assert_allclose(log_probs(True), log_probs(False), atol=1e-6)


def test_nothing_is_collected_outside_of_an_update():
    assert not auxiliary.is_wanted()
    with pytest.raises(ValueError, match="no loss collects"):
        auxiliary.add({})


def test_a_jitted_policy_never_loses_the_terms_of_its_experts():
    """Whether or not it was traced where nobody collects them, and each time."""
    plain = models.policy_fn(models.build(SINGLE))
    jitted = jax.jit(plain)
    params = some_params(SINGLE)
    state = TrainState.create(params, SGD)
    update = partial(sft.update, optimizer=SGD, config=sft.Config(router_aux_coef=0.1))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"router_aux_coef: .*jitted"):
            jax.eval_shape(partial(update, policy_fn=jitted), state, BATCH, None)
        jax.eval_shape(jitted, params, BATCH.tokens, BATCH.attention_mask, None)
    jax.eval_shape(partial(update, policy_fn=plain), state, BATCH, None)


@pytest.mark.parametrize("trained", [False, True])
def test_rl_leaves_routers_as_they_are_unless_asked(trained):
    """Weight decay too, and a value head with an optimizer of its own."""
    adam = Optimizer(weight_decay=0.1, learning_rate=0.1)
    settings = RLStage(optimizer=adam, train_routers=trained)
    ones = {"kernel": np.ones(2, np.float32)}
    params = {"h": {"mlp": {"router": ones, "experts": ones}}, "value": ones}
    own = PPOStage(value_learning_rate=0.1)
    optimizer = programs.make_optimizer(Method(ppo, own, settings, NO_PENALTY, None), params)

    @jax.jit
    def updated(params):
        return optimizer.update(params, optimizer.init(params), params, value=1.0)[0]

    moved = jax.tree.map(lambda update: bool(np.all(update)), updated(params))
    assert moved["h"]["mlp"] == {"router": {"kernel": trained}, "experts": {"kernel": True}}
    assert moved["value"]["kernel"]


def test_the_gap_of_experts_is_the_share_of_layers_and_response_tokens_that_differ():
    """Two layers of five experts, two of each token: with a router's kernel negated they are two
    others. Tokens 3 to 5 of the rows are responses, some of them pads.
    """
    config = replace(CONFIG, scan_layers=False)
    model = models.build(config)
    responses = MASK * (np.arange(6) >= 3)
    sampled = Rollout(TOKENS, MASK, responses, None, prompt_length=3)

    @jax.jit
    def gap(params, decoding):
        decoder = model._replace(for_decoding=lambda _: decoding)
        return sampling.expert_gap(decoder, params, sampled, rows=2)

    params = some_params(config)
    decoding = jax.jit(model.for_decoding)(params)
    assert gap(params, decoding) == 0
    negated = {"router": {"kernel": -np.asarray(decoding["h_1"]["mlp"]["router"]["kernel"])}}
    layer = decoding["h_1"] | {"mlp": decoding["h_1"]["mlp"] | negated}
    assert gap(params, decoding | {"h_1": layer}) == 0.5


def test_the_gap_of_experts_needs_experts_and_the_run_s_own_sampler():
    asked = RLStage(expert_gap=True)
    mixture = models.build(CONFIG)
    assert programs.expert_gap_of(RLStage(), mixture, None) is None
    assert programs.expert_gap_of(asked, mixture, None) is not None
    with pytest.raises(UserError, match="expert_gap: this model has no experts"):
        programs.expert_gap_of(asked, models.build(LLAMA), None)
    with pytest.raises(UserError, match="expert_gap: an engine samples"):
        programs.expert_gap_of(replace(asked, engine="stored:runs/one"), mixture, None)


def adapted_experts(config, match="attn|experts"):
    """A model's parameters and adapters that change something."""
    params = some_params(config)
    adapters = lora.init(jax.random.key(0), params, 2, match, alpha=3)
    noise = np.random.default_rng(0)
    leaves = {
        path: leaf if path[-1] == "lora_scale" else noise.normal(size=leaf.shape) / 4
        for path, leaf in flatten_dict(adapters).items()
    }
    return params, unflatten_dict({path: leaf.astype("float32") for path, leaf in leaves.items()})


@pytest.mark.slow
def test_adapters_of_experts_are_each_expert_s_own():
    """Attached they give what the merged model gives."""
    params, adapters = adapted_experts(CONFIG)
    leaves = flatten_dict(adapters)
    shapes = {path[-2:]: leaf.shape for path, leaf in leaves.items() if path[0] == "h"}
    assert shapes["down_proj", "lora_a"] == (1, 5, 12, 2)
    assert shapes["down_proj", "lora_b"] == (1, 5, 2, 8)
    assert shapes["down_proj", "lora_scale"] == (1, 5)
    assert {path[-2] for path in leaves} >= {"q_proj", "gate_proj", "up_proj"}
    assert not any("router" in path for path in leaves)
    merged = lora.merge(params, adapters)
    apply = jax.jit(models.build(CONFIG).apply)
    plain = apply(params, TOKENS)
    expected = apply(merged, TOKENS)
    assert np.abs(plain - expected).max() > 0.1
    assert_allclose(apply(lora.attach(params, adapters), TOKENS), expected, rtol=1e-3, atol=1e-4)
    held = lora.quantized(params)  # each expert has scales of its own
    assert flatten_dict(held)["h", "mlp", "experts", "up_proj", "kernel_scale"].shape == (1, 5, 12)
    assert "kernel_scale" not in held["h"]["mlp"]["router"]
    found = apply(lora.attach(held, adapters), TOKENS)
    assert_allclose(found, apply(lora.merge(held, adapters), TOKENS), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["mixtral", "olmoe"])
def test_adapters_of_experts_are_written_by_the_names_of_their_tensors(name, tmp_path):
    params, adapters = adapted_experts(MORE[name], "experts")
    lora.save(tmp_path, params, adapters)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    module = {"mixtral": "block_sparse_moe.experts.4.w2", "olmoe": "mlp.experts.4.down_proj"}[name]
    stored = tensors[f"base_model.model.model.layers.1.{module}.lora_A.weight"]
    own = flatten_dict(adapters)["h_1", "mlp", "experts", "down_proj", "lora_a"]
    assert_array_equal(stored, own[4].T)
    jax.tree.map(assert_array_equal, lora.load(tmp_path, params), adapters)


def test_experts_that_are_one_tensor_take_no_adapters():
    params = some_params(MORE["gpt_oss"])
    with pytest.raises(ValueError, match="one tensor in its files"):
        lora.init(jax.random.key(0), params, 2, "attn|experts")
    assert lora.init(jax.random.key(0), params, 2)["h_0"].keys() == {"attn"}
