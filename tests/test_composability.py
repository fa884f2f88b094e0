"""Every update gives the same numbers by hand, under jit, over sharded arrays, under shard_map, and under vmap over
seeds of a scan; models of other libraries and plain functions plug in; no program holds a model's weights."""

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.tree_util import Partial
from tabular import (
    BANDIT_REWARD,
    assert_identical,
    bandit_rollout,
    comparisons,
    gpt2,
    largest_constant,
    numbers,
    policy_fn,
    policy_params,
    rollout,
    score_fn,
    total_variation,
)

from rlhf_jax import dpo, grpo, models, ops, ppo, reward_model, rewards, rloo, sampling, sft, sharding, vpg
from rlhf_jax.algorithms.step import minibatch_epochs
from rlhf_jax.config import RLStage
from rlhf_jax.rollout import rescore
from rlhf_jax.training import phases
from rlhf_jax.types import Comparisons, Demonstrations, TrainState

KEY = jax.random.key(7)
LEARNING_RATE = 0.3
SGD = optax.sgd(LEARNING_RATE)
# Groups of four rows, one group on each device: 7, 3, 0 and 8 tokens; absent rows beside present ones.
LENGTHS = [4, 1, 2, 0, 3, 0, 0, 0, 0, 0, 0, 0, 2, 4, 1, 1]
# Two blocks on each device.
MINIBATCHES = {"num_minibatches": 2, "shuffle_blocks": 8}


class Algorithm(NamedTuple):
    """One line of the table. The config is that of a step on the whole batch."""

    module: Any
    config: Any
    batch: Callable[[], Any]
    num_epochs: int = 2

    @property
    def model(self):
        return {"score_fn": score_fn} if self.module is reward_model else {"policy_fn": policy_fn}

    @property
    def params(self):
        return {"scores": jnp.sin(jnp.arange(5.0))} if self.module is reward_model else policy_params(0)

    def update(self, config=None, **kwargs):
        return partial(self.module.update, **self.model, optimizer=SGD, config=config or self.config, **kwargs)

    def prepare(self, batch, axis_name=None):
        if not hasattr(self.module, "prepare"):
            return batch
        return self.module.prepare(batch, config=self.config, axis_name=axis_name)

    def steps(self, state, batch, key, **kwargs):
        """Epochs of shuffled minibatches: those of the update, or ``minibatch_epochs`` around one that has none."""
        if hasattr(self.config, "num_minibatches"):
            epochs = {} if self.module is vpg else {"num_epochs": self.num_epochs}
            return self.update(dataclasses.replace(self.config, **MINIBATCHES, **epochs), **kwargs)(state, batch, key)
        step = self.update(**kwargs)
        return minibatch_epochs(step, state, batch, key, num_epochs=self.num_epochs, **MINIBATCHES, **kwargs)


def slow_but(fast, values):
    """Parameters of a test, of which those in ``fast`` run in the default tier."""
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]


def demonstrations():
    batch = rollout(0, LENGTHS)
    return Demonstrations(batch.tokens, batch.attention_mask, batch.response_mask)


def answers(num_answers, **fields):
    """Comparisons without a third device, and without two of the other answers."""
    absent = [(1, 1), (2, 0), *((row, answer) for row in range(8, 12) for answer in range(num_answers))]
    batch = comparisons(0, 16, num_answers, absent=absent)
    return batch.replace(best=jnp.arange(16) % num_answers, weight=jnp.linspace(0.5, 2.0, 16), **fields)


def pairs():
    return dpo.with_reference(answers(2), Partial(policy_fn, policy_params(1)))


def weighted_rollout():
    batch = rollout(0, LENGTHS)
    return batch.replace(importance_weights=jnp.exp(0.3 * batch.advantages))


TWO = {"num_microbatches": 2}
ALGORITHMS = {
    "sft": Algorithm(sft, sft.Config(**TWO), demonstrations),
    "reward_model": Algorithm(reward_model, reward_model.Config(**TWO), partial(answers, 4)),
    "regression": Algorithm(
        reward_model,
        reward_model.Config(**TWO),
        lambda: answers(3, targets=jnp.sin(jnp.arange(48.0)).reshape(16, 3)),
    ),
    "vpg": Algorithm(
        vpg, vpg.Config(entropy_coef=0.1, aggregate="fixed", length=4, **TWO), weighted_rollout, num_epochs=1
    ),
    "ppo": Algorithm(
        ppo,
        ppo.Config(num_epochs=1, entropy_coef=0.1, kl_loss_coef=0.1, whiten_rewards=True, dual_clip=1.2, **TWO),
        weighted_rollout,
    ),
    "rloo": Algorithm(rloo, rloo.Config(kl_loss_coef=0.1, **TWO), weighted_rollout),
    "grpo": Algorithm(grpo, grpo.Config(group_size=4, **TWO), weighted_rollout),
    "dpo": Algorithm(dpo, dpo.Config(beta=0.5, label_smoothing=0.1, **TWO), pairs),
}


def on_each_device(algorithm, state, batch, key):
    results = algorithm.steps(state, batch, key, axis_name="data")
    return jax.tree.map(lambda x: jax.lax.all_gather(x, "data"), results)


# Programs that run once: compiled in half the time, and run slower.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@jit
def shuffled(key, num_epochs):
    """Rows of each minibatch [epochs, minibatches, rows], as ``minibatch_epochs`` documents them."""
    num_blocks, num_minibatches = MINIBATCHES["shuffle_blocks"], MINIBATCHES["num_minibatches"]
    blocks = jnp.arange(len(LENGTHS)).reshape(num_blocks, -1)

    def epoch(number):
        fold = partial(jax.random.fold_in, jax.random.fold_in(key, number))
        orders = jax.vmap(lambda i, block: jax.random.permutation(fold(i), block))(jnp.arange(num_blocks), blocks)
        return jnp.stack([part.ravel() for part in jnp.split(orders, num_minibatches, axis=1)])

    return jax.vmap(epoch)(num_epochs)


def by_hand(algorithm, params, batch, key):
    """Parameters and mean metrics after a Python loop of plain gradient descent over the minibatches."""
    loss = partial(numbers(algorithm.module.loss), **algorithm.model, config=algorithm.config)
    loss_and_gradient = jit(jax.value_and_grad(loss, has_aux=True))
    batch = jax.tree.map(np.asarray, jit(algorithm.prepare)(batch))
    params, steps = jax.tree.map(np.asarray, params), []
    for rows in np.concatenate(shuffled(key, jnp.arange(algorithm.num_epochs))):
        (value, metrics), gradient = loss_and_gradient(params, jax.tree.map(lambda x, rows=rows: x[rows], batch), key)
        params = jax.tree.map(lambda p, g: p - LEARNING_RATE * np.asarray(g), params, gradient)
        norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(gradient)))
        steps.append({**metrics, "loss": value, "grad_norm": norm})
    metrics = {name: (np.max if name.endswith("_max") else np.mean)([s[name] for s in steps]) for name in steps[0]}
    return params, metrics


def assert_close(actual, expected):
    """Within 1e-6, relative to numbers above 1."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6, err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_update_gives_the_same_numbers_everywhere(name):
    algorithm, mesh = ALGORITHMS[name], sharding.make_mesh(4)
    state, batch = TrainState.create(algorithm.params, SGD), algorithm.batch()
    one = jit(algorithm.steps)
    after, metrics = expected = one(state, batch, KEY)
    params, mean_metrics = by_hand(algorithm, state.params, batch, KEY)
    assert metrics["grad_norm"] > 0.01
    assert after.step == 2 * algorithm.num_epochs
    assert_close(after.params, params)
    assert_close({key: metrics[key] for key in mean_metrics}, mean_metrics)

    # Arrays sharded over devices: no row moves.
    spread = sharding.replicate(mesh, state), sharding.shard_rows(mesh, batch), sharding.replicate(mesh, KEY)
    program = jit(partial(algorithm.steps, minibatch_sharding=sharding.rows(mesh))).lower(*spread).compile()
    assert not any(move in program.as_text() for move in ("all-gather", "all-to-all", "collective-permute"))
    assert_close(program(*spread), expected)

    # shard_map: all devices have the same bits.
    specs = {"in_specs": (P(), P("data"), P()), "out_specs": P(), "check_vma": False}
    mapped = jax.shard_map(partial(on_each_device, algorithm), mesh=mesh, **specs)
    first, *others = (jax.tree.map(lambda x, d=d: x[d], found) for found in [jit(mapped)(*spread)] for d in range(4))
    assert_close(first, expected)
    for other in others:
        assert_identical(other, first)

    # Two seeds with parameters, data and keys of their own under vmap, two updates each under scan.
    states = [state, TrainState.create(jax.tree.map(lambda x: 0.5 * x, algorithm.params), SGD)]
    batches = [batch, jax.tree.map(lambda x: x[::-1], batch)]
    keys = jax.random.split(KEY, (2, 2))

    @jit
    @jax.vmap
    def train(state, batch, keys):
        return jax.lax.scan(lambda state, key: algorithm.steps(state, batch, key), state, keys)

    stacked = jax.tree.map(lambda *seeds: jnp.stack(seeds), *zip(states, batches, strict=True))
    trained, metrics = train(*stacked, keys)
    for seed in range(2):
        state = states[seed]
        for step in range(2):
            state, expected = one(state, batches[seed], keys[seed, step])
            assert_close({key: x[seed, step] for key, x in metrics.items()}, expected)
        assert_close(jax.tree.map(lambda x, seed=seed: x[seed], trained), state)


class Network(nnx.Module):
    """Logits of the next token, and a number for each token, from the token alone."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(3, 8, rngs=rngs)
        self.out = nnx.Linear(8, 3, rngs=rngs)
        self.scalar = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, tokens):
        return self.out(self.embed(tokens))

    def scalars(self, tokens):
        return self.scalar(self.embed(tokens))[..., 0]


def nnx_policy(model):
    graph, params = nnx.split(model)
    policy_fn = ops.policy_fn(lambda params, tokens, attention_mask, key: nnx.merge(graph, params)(tokens))
    return policy_fn, params


def nnx_model():
    model = Network(nnx.Rngs(0))
    graph, _ = nnx.split(model)
    return *nnx_policy(model), lambda params, tokens: nnx.merge(graph, params).scalars(tokens)


def plain_function():
    def hidden(params, tokens):
        return jnp.tanh(params["embed"][tokens])

    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"embed": (3, 8), "out": (8, 3), "scalar": (8,)}
    params = {
        name: 0.3 * jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    apply_fn = ops.policy_fn(lambda params, tokens, attention_mask, key: hidden(params, tokens) @ params["out"])
    return apply_fn, params, lambda params, tokens: hidden(params, tokens) @ params["scalar"]


KINDS = pytest.mark.parametrize("kind", slow_but([nnx_model], [nnx_model, plain_function]))


def test_the_adapter_in_the_docs_is_the_one_tested_here():
    page = Path(__file__).resolve().parent.parent / "docs" / "updates.md"
    assert inspect.getsource(nnx_policy) in page.read_text("utf-8")


def test_the_adapter_is_the_model():
    model = Network(nnx.Rngs(0))
    adapted, params = nnx_policy(model)
    tokens = jnp.array([[0, 2, 1, 1], [2, 0, 0, 1]])
    output = adapted(params, tokens, jnp.ones_like(tokens), None)
    np.testing.assert_allclose(output.log_probs, ops.token_log_probs(model(tokens), tokens), rtol=1e-6)
    np.testing.assert_allclose(output.entropy, ops.entropy(model(tokens)), rtol=1e-6)


def preferences():
    """All ordered pairs of three answers, weighted by the probability that the first is preferred (Bradley-Terry)."""
    arms = jnp.array([(a, b) for a in range(3) for b in range(3) if a != b])
    tokens = jnp.stack([jnp.zeros_like(arms), arms], axis=2)
    ones = jnp.ones_like(tokens)
    weight = jax.nn.sigmoid(BANDIT_REWARD[arms[:, 0]] - BANDIT_REWARD[arms[:, 1]])
    return Comparisons(tokens, ones, ones.at[:, :, 0].set(0), weight=weight)


def train(update, params, batch, num_steps, learning_rate):
    """``update(state, batch, key, optimizer=...)`` repeated under scan; ``batch(params, key)`` may be drawn anew."""
    optimizer = optax.adam(optax.linear_schedule(learning_rate, 0.0, num_steps))

    def step(state, key):
        batch_key, update_key = jax.random.split(key)
        return update(state, batch(state.params, batch_key), update_key, optimizer=optimizer)

    state = TrainState.create(params, optimizer)
    state, metrics = jax.jit(partial(jax.lax.scan, step))(state, jax.random.split(KEY, num_steps))
    assert not metrics["nonfinite"].any()
    return state.params


def log_probs_of_arms(policy, params):
    arms = jnp.stack([jnp.zeros(3, jnp.int32), jnp.arange(3)], axis=1)
    return policy(params, arms, jnp.ones_like(arms), None).log_probs[:, 1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [nnx_model, plain_function])
def test_ppo_with_other_models(kind):
    """The bandit's optimum under a KL penalty, from an outside policy with outside values."""
    policy, params, scalars = kind()

    def with_values(params, tokens, attention_mask, key):
        values = jnp.pad(scalars(params, tokens)[:, :-1], ((0, 0), (1, 0)))
        return policy(params, tokens, attention_mask, key)._replace(values=values)

    def batch(params, key):
        logits = log_probs_of_arms(policy, params)
        sampled = bandit_rollout({"logits": logits, "value": jnp.zeros(())}, key)
        return rescore(sampled, params, policy_fn=with_values)

    update = partial(ppo.update, policy_fn=with_values, config=ppo.Config(num_epochs=2))
    trained = train(update, params, batch, 150, 0.05)
    assert total_variation({"logits": log_probs_of_arms(policy, params)}) > 0.2
    assert total_variation({"logits": log_probs_of_arms(policy, trained)}) < 0.02


@KINDS
def test_dpo_with_other_models(kind):
    """Preferences in their exact proportions: the log-ratios are the rewards."""
    policy, params, _ = kind()
    batch = dpo.with_reference(preferences(), Partial(policy, params))
    update = partial(dpo.update, policy_fn=policy, config=dpo.Config(beta=0.5))
    trained = train(update, params, lambda params, key: batch, 300, 0.05)
    implied = 0.5 * (log_probs_of_arms(policy, trained) - log_probs_of_arms(policy, params))
    np.testing.assert_allclose(implied - implied[1], BANDIT_REWARD - BANDIT_REWARD[1], atol=0.01)


@KINDS
def test_reward_models_of_other_kinds(kind):
    _, params, scalars = kind()

    def score(params, tokens, attention_mask, key):
        return scalars(params, tokens)[:, -1]

    update = partial(reward_model.update, score_fn=score, config=reward_model.Config())
    trained = train(update, params, lambda params, key: preferences(), 300, 0.05)
    scores = scalars(trained, jnp.arange(3)[None, :])[0]
    np.testing.assert_allclose(scores - scores[1], BANDIT_REWARD - BANDIT_REWARD[1], atol=0.01)


@pytest.mark.parametrize("name", slow_but(["sft", "reward_model"], ["sft", "reward_model", "dpo"]))
def test_no_update_holds_weights(name):
    """A step on GPT-2, with the reference's log-probs for DPO: no constant above 1 MB in the program."""
    algorithm = ALGORITHMS[name]
    model, params = gpt2("score" if name == "reward_model" else None)
    fn = models.score_fn(model) if name == "reward_model" else models.policy_fn(model)

    def step(state, batch, key, ref_fn):
        batch = dpo.with_reference(batch, ref_fn) if name == "dpo" else batch
        functions = {next(iter(algorithm.model)): fn}
        return algorithm.module.update(state, batch, key, **functions, optimizer=SGD, config=algorithm.config)

    ref_fn = Partial(models.policy_fn(model), params)
    state = TrainState.create(params, SGD)
    batch = algorithm.batch()
    assert largest_constant(jax.jit(step), state, batch, KEY, ref_fn) < 1_000_000
    if name == "dpo":  # what closing over the reference does
        assert largest_constant(jax.jit(partial(step, ref_fn=ref_fn)), state, batch, KEY) > 1_000_000


@pytest.mark.parametrize("name", slow_but(["rloo with LoRA"], ["vpg", "ppo", "rloo", "grpo", "rloo with LoRA"]))
def test_no_iteration_holds_weights(name):
    """Sampling, a reward model's scores, a reference and the update on GPT-2 as one program."""
    algorithm = ALGORITHMS[name.split()[0]]
    model, params = gpt2("score")
    if name == "ppo":
        params = models.add_head(KEY, params, "value")
    policy = models.policy_fn(model, prompt_length=3)
    trained, base, bound = params, None, Partial(policy)
    if "LoRA" in name:
        trained, base, bound = models.lora.init(KEY, params, rank=2), params, models.lora.bind(policy, params)
    iteration = partial(
        phases.iteration,
        model=model,
        sampling_config=sampling.SamplingConfig(max_new_tokens=4, eos_id=1, pad_id=0),
        algorithm=algorithm.module,
        algorithm_config=dataclasses.replace(algorithm.config, **MINIBATCHES),
        optimizer=SGD,
        config=RLStage(),
    )
    tokens = jnp.full((16, 3), 2)
    prompts = phases.Prompts(tokens, jnp.ones_like(tokens), jnp.arange(16))
    loop = phases.LoopState.create(TrainState.create(trained, SGD), 0.1)
    carried = Partial(policy, params), rewards.from_model(models.score_fn(model), params), bound, base
    assert largest_constant(jax.jit(iteration), loop, prompts, KEY, KEY, *carried) < 1_000_000
