"""Models of other libraries plug in; no program holds a model's weights."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.tree_util import Partial
from tabular import gpt2, largest_constant
from test_updates import CASES, KEY, MINIBATCHES, SGD

from rlhf_jax import dpo, models, rewards, sampling
from rlhf_jax.config import RLStage
from rlhf_jax.training import phases
from rlhf_jax.types import TrainState


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
