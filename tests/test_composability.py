"""Models of other libraries plug in; no program holds a model's weights."""

import dataclasses
import inspect
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.tree_util import Partial
from tabular import BANDIT_OPTIMUM, BANDIT_REWARD, bandit_rollout, gpt2, largest_constant
from test_updates import CASES, KEY, MINIBATCHES, SGD

from rlhf_jax import dpo, models, ops, ppo, reward_model, rewards, sampling
from rlhf_jax.config import RLStage
from rlhf_jax.rollout import rescore
from rlhf_jax.training import phases
from rlhf_jax.types import Comparisons, TrainState


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


def network():
    """A policy, its parameters, and the network's numbers for tokens."""
    model = Network(nnx.Rngs(0))
    graph, _ = nnx.split(model)
    return *nnx_policy(model), lambda params, tokens: nnx.merge(graph, params).scalars(tokens)


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
def test_ppo_with_another_librarys_model():
    """The bandit's optimum under a KL penalty, from an outside policy with outside values."""
    policy, params, scalars = network()

    def with_values(params, tokens, attention_mask, key):
        values = jnp.pad(scalars(params, tokens)[:, :-1], ((0, 0), (1, 0)))
        return policy(params, tokens, attention_mask, key)._replace(values=values)

    def batch(params, key):
        logits = log_probs_of_arms(policy, params)
        sampled = bandit_rollout({"logits": logits, "value": jnp.zeros(())}, key)
        return rescore(sampled, params, policy_fn=with_values)

    update = partial(ppo.update, policy_fn=with_values, config=ppo.Config(num_epochs=2))
    trained = train(update, params, batch, 150, 0.05)
    probs = [np.exp(log_probs_of_arms(policy, p)) for p in (params, trained)]
    before, after = (0.5 * np.abs(p - BANDIT_OPTIMUM).sum() for p in probs)
    assert before > 0.2
    assert after < 0.02


def test_dpo_with_another_librarys_model():
    """Preferences in their exact proportions: the log-ratios are the rewards."""
    policy, params, _ = network()
    batch = dpo.with_reference(preferences(), Partial(policy, params))
    update = partial(dpo.update, policy_fn=policy, config=dpo.Config(beta=0.5))
    trained = train(update, params, lambda params, key: batch, 300, 0.05)
    implied = 0.5 * (log_probs_of_arms(policy, trained) - log_probs_of_arms(policy, params))
    np.testing.assert_allclose(implied - implied[1], BANDIT_REWARD - BANDIT_REWARD[1], atol=0.01)


def test_reward_model_of_another_library():
    _, params, scalars = network()

    def score(params, tokens, attention_mask, key):
        return scalars(params, tokens)[:, -1]

    update = partial(reward_model.update, score_fn=score, config=reward_model.Config())
    trained = train(update, params, lambda params, key: preferences(), 300, 0.05)
    scores = scalars(trained, jnp.arange(3)[None, :])[0]
    np.testing.assert_allclose(scores - scores[1], BANDIT_REWARD - BANDIT_REWARD[1], atol=0.01)


@pytest.mark.parametrize("name", ["sft", "reward_model", pytest.param("dpo", marks=pytest.mark.slow)])
def test_no_update_holds_weights(name):
    """A step on GPT-2, with the reference's log-probs for DPO: no constant above 1 MB in the program."""
    case = CASES[name]
    model, params = gpt2("score" if name == "reward_model" else None)
    fn = models.score_fn(model) if name == "reward_model" else models.policy_fn(model)

    def step(state, batch, key, ref_fn):
        batch = dpo.with_reference(batch, ref_fn) if name == "dpo" else batch
        functions = {next(iter(case.model)): fn}
        return case.module.update(state, batch, key, **functions, optimizer=SGD, config=case.config)

    ref_fn = Partial(models.policy_fn(model), params)
    state = TrainState.create(params, SGD)
    batch = case.batch()
    assert largest_constant(jax.jit(step), state, batch, KEY, ref_fn) < 1_000_000
    if name == "dpo":  # what closing over the reference does
        assert largest_constant(jax.jit(partial(step, ref_fn=ref_fn)), state, batch, KEY) > 1_000_000


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("vpg", "ppo", "rloo", "grpo")), "rloo with LoRA"]
)
def test_no_iteration_holds_weights(name):
    """Sampling, a reward model's scores, a reference and the update on GPT-2 as one program."""
    case = CASES[name.split()[0]]
    model, params = gpt2("score")
    if name == "ppo":
        params = models.add_head(KEY, params, "value")
    policy = models.policy_fn(model, prompt_length=3)
    trained, base, bound = params, None, Partial(policy)
    if "LoRA" in name:
        trained, base, bound = models.lora.init(KEY, params, rank=2), params, models.lora.bind(policy, params)
    options = sampling.SamplingConfig(max_new_tokens=4, eos_id=1, pad_id=0)
    config = dataclasses.replace(case.config, **MINIBATCHES)
    iteration = partial(phases.iteration, recipe=phases.Recipe(model, options, case.module, config, SGD, RLStage()))
    tokens = jnp.full((16, 3), 2)
    prompts = phases.Prompts(tokens, jnp.ones_like(tokens), jnp.arange(16))
    loop = phases.LoopState.create(case.module.State.create(trained, SGD), 0.1)
    reward_fn = rewards.from_model(models.score_fn(model), params)
    functions = phases.Functions(bound, reward_fn, Partial(policy, params), base)
    assert largest_constant(jax.jit(iteration), loop, prompts, KEY, KEY, functions) < 1_000_000
