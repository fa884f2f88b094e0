"""One step of each kind on random tokens, which ``bench.py`` times.

Models have random weights, and no response ends early: the time depends on shapes alone.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import iteration, models, rewards, sampling
from rlhf_jax.algorithms import dpo, grpo, ppo, reward_model, sft, vpg
from rlhf_jax.models.config import DecoderConfig, ModelConfig
from rlhf_jax.runs import devices
from rlhf_jax.sampling.rollout import rescore
from rlhf_jax.training.common.initial import Trainable
from rlhf_jax.training.rl import critic
from rlhf_jax.training.rl.method import completed
from rlhf_jax.types import Comparisons, Demonstrations, Params, Rollout, TrainState

Name = Literal["rollout", "iteration", "reward", "sft", "dpo", "grpo", "vpg"]
Value = Literal["shared", "separate"]


class Preset(NamedTuple):
    """Shapes of the work: a model, rows of a batch (pairs count as two), prompt and response
    columns, and the microbatches of an update.
    """

    model: ModelConfig
    batch: int
    prompt: int
    response: int
    num_microbatches: int = 1

    @property
    def num_parameters(self) -> int:
        """Of the model."""
        shapes = jax.eval_shape(models.build(self.model).init, jax.random.key(0))
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))

    def reduced(self) -> "Preset":
        """The same work on a network of the family that is small in all its sizes."""
        small: dict[str, Any] = {"vocab_size": 128, "max_length": 16, "hidden_size": 64}
        small |= {"num_layers": 2, "num_heads": 4, "compute_dtype": "float32"}
        if isinstance(self.model, DecoderConfig):
            small |= {"num_kv_heads": 2, "intermediate_size": 128}
        batch = max(8, GROUP * self.num_microbatches)
        model = replace(self.model, **small)
        return self._replace(model=model, batch=batch, prompt=8, response=8)


GROUP = 4  # answers to a prompt, of GRPO
# As the opponents have it: the defaults of TRL and of lm-human-preferences.
TRL_PPO: dict[str, Any] = {
    "num_epochs": 4,
    "gae_lambda": 0.95,
    "value_clip": 0.2,
    "value_coef": 0.1,
    "normalize_returns": False,
}
PRESETS: dict[str, Preset] = {
    "char-nano": Preset(models.GPT2Config(65, 64, 64, 2, 4), 32, 16, 16),
    "char-small": Preset(models.GPT2Config(65, 112, 128, 4, 4), 64, 64, 48),
    "char-wide": Preset(models.GPT2Config(65, 112, 384, 6, 6), 64, 64, 48),
    "gpt2": Preset(models.GPT2Config(50257, 1024, 768, 12, 12), 8, 128, 128),
    "llama-1b": Preset(
        models.LlamaConfig(128256, 4096, 2048, 16, 32, num_kv_heads=8, intermediate_size=8192),
        8,
        512,
        512,
    ),
    "qwen2.5-0.5b": Preset(
        models.Qwen2Config(
            151936,
            4096,
            896,
            24,
            14,
            num_kv_heads=2,
            intermediate_size=4864,
            rope_theta=1e6,
            tie_embeddings=True,
        ),
        8,
        512,
        512,
    ),
}
# A CPU computes them in a moment.
PRESETS |= {f"{name}-tiny": PRESETS[name].reduced() for name in ("gpt2", "llama-1b")}
PRESETS["qwen2.5-0.5b-tiny"] = PRESETS["qwen2.5-0.5b"].reduced()


class Work(NamedTuple):
    """One timed call: ``carry, metrics = step(carry, data)``, under jit with the carry donated."""

    step: Callable[[Any, Any], tuple[Any, Any]]
    carry: Any
    data: Any
    tokens: int  # that a call trains on, or samples
    num_blocks: int = 1  # of a model in its program

    def compile(self) -> Any:
        """The step as a program, as a run compiles it."""
        options = devices.compiler_options(self.num_blocks)
        return (
            jax.jit(self.step, donate_argnums=0, compiler_options=options)
            .lower(self.carry, self.data)
            .compile()
        )


def work(name: Name, preset: Preset, value: Value = "shared", temperature: float = 1.0) -> Work:
    """What ``bench.py`` times.

    Args:
        name: ``rollout`` samples; ``iteration`` is one of PPO, 4 epochs of 1 minibatch, with bodies
            of reference and reward model; ``grpo`` and ``vpg`` are their updates on a rollout that
            is there; the others are one step. A rollout's weights have the dtype of its products,
            the others' have float32, and so has Adam.
        value: for ``iteration``: the value head on the policy's body, or a whole value model.
    """
    model = models.build(preset.model)
    keys = jax.random.split(jax.random.key(0), 4)
    params = model.init(keys[0])
    optimizer = optax.adamw(1e-5)
    shape = (preset.batch, preset.prompt + preset.response)
    num_blocks = preset.model.num_blocks
    tokens = jax.random.randint(keys[1], shape, 2, preset.model.vocab_size, jnp.int32)
    mask = jnp.ones(shape, jnp.int32)
    batch = Demonstrations(tokens, mask, mask.at[:, : preset.prompt].set(0))

    def stepping(
        update: Callable[..., tuple[Any, Any]], start: Params, data: Any, **options: Any
    ) -> Work:
        def step(state: TrainState, data: Any) -> tuple[Any, Any]:
            return update(state, data, keys[2], optimizer=optimizer, **options)

        return Work(
            step,
            TrainState.create(jax.tree.map(jnp.copy, start), optimizer),
            data,
            tokens.size,
            num_blocks,
        )

    if name == "sft":
        config = sft.Config(num_microbatches=preset.num_microbatches)
        policy_fn = models.policy_fn(model, one_text=True)
        return stepping(sft.update, params, batch, policy_fn=policy_fn, config=config)
    pairs = Comparisons(*(x.reshape(-1, 2, shape[1]) for x in (tokens, mask, batch.response_mask)))
    if name == "reward":
        score_fn = models.score_fn(model, one_text=True)
        options = {"score_fn": score_fn, "config": reward_model.Config()}
        return stepping(
            reward_model.update, models.add_head(keys[3], params, "score"), pairs, **options
        )
    if name == "dpo":
        policy_fn = models.policy_fn(model, one_text=True)
        ref_fn = jax.tree_util.Partial(policy_fn)

        def update(state: Any, data: Any, key: jax.Array, **options: Any) -> tuple[Any, Any]:
            pairs, reference = data
            batch = dpo.with_reference(pairs, jax.tree_util.Partial(ref_fn, reference))
            return dpo.update(state, batch, key, **options)

        return stepping(update, params, (pairs, params), policy_fn=policy_fn, config=dpo.Config())
    return _rl_work(name, preset, value, temperature, model, params, keys, batch)


def _rl_work(
    name: Name,
    preset: Preset,
    value: Value,
    temperature: float,
    model: models.Model,
    params: Params,
    keys: Any,
    batch: Any,
) -> Work:
    how = sampling.SamplingConfig(preset.response, temperature=temperature, eos_id=None, pad_id=0)
    algorithm = completed({"grpo": grpo, "vpg": vpg}.get(name, ppo))
    settings: dict[str, dict[str, Any]] = {"grpo": {"group_size": GROUP}, "iteration": TRL_PPO}
    group = settings.get(name, {})
    group = group | {"num_microbatches": preset.num_microbatches}
    separate = name == "iteration" and value == "separate"
    own = model if separate else None
    said: dict[str, Any] = {"prompt_length": preset.prompt, "one_text": True}
    policy_fn = models.policy_fn(model, value_model=own, **said)
    with_value = models.add_head(keys[3], params, "value")
    if separate:
        with_value = critic.beside(Trainable(params), with_value).params
    start = with_value if algorithm.needs_values else params
    optimizer = optax.adamw(1e-5)
    optimizer = critic.split(optimizer, optimizer, start) if separate else optimizer
    learn = functools.partial(
        iteration.learn,
        algorithm=algorithm,
        config=algorithm.Config(**group),
        optimizer=optimizer,
        penalty=iteration.kl_penalty(0.05),
    )
    train = algorithm.State.create(jax.tree.map(jnp.copy, start), optimizer)
    loop = iteration.LoopState(train, jnp.float32(0.05))
    prompt = batch.tokens[:, : preset.prompt]
    prompts = iteration.Prompts(prompt, jnp.ones_like(prompt), jnp.arange(preset.batch))
    # The first parameters are the reference too, and a reward model stands on the same body.
    functions = iteration.Functions(
        jax.tree_util.Partial(policy_fn),
        rewards.from_model(
            models.score_fn(model, one_text=True), models.add_head(keys[3], params, "score")
        ),
        jax.tree_util.Partial(models.policy_fn(model, **said), params),
    )

    def sample(row_ids: jax.Array, data: Any) -> tuple[Any, Any]:
        policy, prompts = data
        moved = prompts._replace(row_ids=row_ids)
        sampled = iteration.respond(policy, moved, keys[2], model=model, config=how)
        return row_ids + sampled.tokens[:, -1], {"tokens": sampled.tokens}

    def iterate(loop: iteration.LoopState, data: Any) -> tuple[Any, Any]:
        functions, prompts = data
        policy = iteration.sampling_params(loop, functions.base)
        sampled = iteration.respond(policy, prompts, keys[2], model=model, config=how)
        rollout, collected = iteration.rescored(loop, sampled, functions, eos_ids=how.eos_ids)
        rollout, rewarded = iteration.reward(rollout, functions)
        loop, learned = learn(loop, rollout, keys[3], functions)
        return loop, collected | rewarded | learned

    def update(loop: iteration.LoopState, data: Any) -> tuple[Any, Any]:
        functions, collected = data
        return learn(loop, collected, keys[3], functions)

    sampled_tokens = preset.batch * preset.response
    if name == "rollout":
        policy = iteration.sampling_params(loop, functions.base)
        policy = jax.tree.map(lambda leaf: leaf.astype(preset.model.compute_dtype), policy)
        data = (policy, prompts)
        return Work(sample, prompts.row_ids, data, sampled_tokens, preset.model.num_layers)
    if name == "iteration":
        return Work(iterate, loop, (functions, prompts), sampled_tokens, preset.model.num_blocks)
    collected = _scored(batch, prompts.row_ids, loop.train.params, functions)
    return Work(update, loop, (functions, collected), batch.tokens.size, preset.model.num_blocks)


def _scored(batch: Any, row_ids: jax.Array, params: Any, functions: iteration.Functions) -> Rollout:
    """The rollout of the batch's texts, with scores from -1 to 1."""
    log_probs = jnp.zeros(batch.tokens.shape)
    given = Rollout(batch.tokens, batch.attention_mask, batch.response_mask, log_probs, row_ids)
    score = jax.jit(
        lambda params, functions: rescore(
            given, params, policy_fn=functions.policy_fn, ref_fn=functions.ref_fn
        )
    )
    scores = jnp.linspace(-1.0, 1.0, len(row_ids))
    rollout, _ = iteration.scored(score(params, functions), scores, {})
    return rollout
