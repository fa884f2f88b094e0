"""Models of other libraries plug in; no program holds a model's weights."""

from dataclasses import replace
from functools import partial

import builders
import jax
import jax.numpy as jnp
import pytest
from cases import CASES, KEY, SGD
from jax.tree_util import Partial
from programs import largest_constant
from tabular import gpt2

from rlhf_jax import iteration, models, rewards, sampling


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("ppo", "grpo")),
        "rloo with LoRA",
    ],
)
def test_no_iteration_holds_weights(name):
    """Sampling, a reward model's scores, a reference and the update on GPT-2 as one program."""
    case = CASES[name.split()[0]]
    model, params = gpt2("score")
    if name == "ppo":
        params = models.add_head(KEY, params, "value")
    policy = models.policy_fn(model, prompt_length=3)
    trained = params
    base = None
    bound = Partial(policy)
    if "LoRA" in name:
        trained = models.lora.init(KEY, params, rank=2)
        base = params
        bound = models.lora.bind(policy, params)
    options = sampling.SamplingConfig(max_new_tokens=4, eos_id=1, pad_id=0)
    config = replace(case.config, num_epochs=1)
    learn = partial(
        iteration.learn,
        algorithm=case.module,
        config=config,
        optimizer=SGD,
        penalty=iteration.kl_penalty(0.1),
    )
    collect = partial(builders.collected, model=model, config=options)
    program = builders.one_program(collect, learn)
    tokens = jnp.full((16, 3), 2)
    prompts = iteration.Prompts(tokens, jnp.ones_like(tokens), jnp.arange(16))
    loop = iteration.LoopState(case.module.State.create(trained, SGD), 0.1)
    reward_fn = rewards.from_model(models.score_fn(model), params)
    functions = iteration.Functions(bound, reward_fn, Partial(policy, params), base)
    assert largest_constant(jax.jit(program), loop, prompts, KEY, KEY, functions) < 1_000_000
