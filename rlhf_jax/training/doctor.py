"""``rlhf-jax doctor``: what is installed, which devices there are, and one step of every phase on a tiny model."""

import importlib.metadata
import platform
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax import models, rewards, sampling
from rlhf_jax.algorithms import ppo, reward_model, sft, vpg
from rlhf_jax.config import RLStage
from rlhf_jax.runs import devices
from rlhf_jax.runs.checkpoint import Checkpoints
from rlhf_jax.training import phases
from rlhf_jax.types import Algorithm, Comparisons, Demonstrations, Metrics, TrainState

PACKAGES = ("rlhf-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "numpy")
ROWS, PROMPT, RESPONSE, VOCABULARY = 4, 3, 4, 11
NETWORK = models.GPT2Config(vocab_size=VOCABULARY, max_length=16, hidden_size=16, num_layers=1, num_heads=2)
SAMPLING = sampling.SamplingConfig(max_new_tokens=RESPONSE, eos_id=1, pad_id=0)


class Check(NamedTuple):
    """One line of the doctor's report."""

    name: str
    passed: bool
    detail: str


def machine() -> list[Check]:
    """Versions, devices with their memory, and an accelerator that JAX does not use (not passed)."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    checks = [Check("versions", True, f"Python {platform.python_version()}, {versions}")]
    for device in jax.devices():
        limit = (device.memory_stats() or {}).get("bytes_limit")
        memory = f", {limit / 2**30:.1f} GiB for JAX" if limit else ""
        checks.append(Check(f"device {device.id}", True, f"{device.platform}: {device.device_kind}{memory}"))
    idle = devices.idle_accelerator()
    return checks if idle is None else [*checks, Check("accelerator", False, idle)]


def self_test() -> list[Check]:
    """One step of every phase; each must give finite numbers."""
    model, optimizer, key = models.build(NETWORK), optax.adam(1e-3), jax.random.key(2)
    params = model.init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (ROWS, PROMPT + RESPONSE), 2, VOCABULARY)
    mask = jnp.ones_like(tokens)
    batch = Demonstrations(tokens, mask, mask.at[:, :PROMPT].set(0))

    def run_sft() -> Metrics:
        state, policy_fn = TrainState.create(params, optimizer), models.policy_fn(model)
        return sft.update(state, batch, key, policy_fn=policy_fn, optimizer=optimizer, config=sft.Config())[1]

    def run_reward_model() -> Metrics:
        state = TrainState.create(models.add_head(key, params, "score"), optimizer)
        pairs = Comparisons(*(jnp.stack([x, x[::-1]], axis=1) for x in (tokens, mask, batch.response_mask)))
        score_fn, config = models.score_fn(model), reward_model.Config()
        return reward_model.update(state, pairs, key, score_fn=score_fn, optimizer=optimizer, config=config)[1]

    def run_rl(algorithm: Algorithm) -> Metrics:
        policy_fn = jax.tree_util.Partial(models.policy_fn(model, prompt_length=PROMPT))
        ref_fn = jax.tree_util.Partial(policy_fn, params)
        state = algorithm.State.create(models.add_head(key, params, "value"), optimizer)
        recipe = phases.Recipe(model, SAMPLING, algorithm, algorithm.Config(), optimizer, RLStage())
        prompts = phases.Prompts(tokens[:, :PROMPT], mask[:, :PROMPT], jnp.arange(ROWS))
        functions = phases.Functions(policy_fn, rewards.token_count(3), ref_fn)
        return phases.iteration(phases.LoopState.create(state, 0.1), prompts, key, key, functions, recipe=recipe)[2]

    def run_checkpoint() -> Metrics:
        with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
            checkpoints.save(0, params, {})
            restored, _ = checkpoints.restore(params)
        return {"identical": jnp.where(jax.tree.all(jax.tree.map(jnp.array_equal, params, restored)), 1.0, jnp.nan)}

    steps: dict[str, Callable[[], Metrics]] = {
        "sft": jax.jit(run_sft),
        "reward model": jax.jit(run_reward_model),
        "vpg: sample, reward, update": jax.jit(lambda: run_rl(vpg)),
        "ppo: sample, reward, update": jax.jit(lambda: run_rl(ppo)),
        "checkpoint": run_checkpoint,
    }
    return [timed(name, step) for name, step in steps.items()]


def timed(name: str, step: Callable[[], Metrics]) -> Check:
    """Runs a step and says how long it took, which of its metrics are not finite, or what it raised."""
    started = time.perf_counter()
    try:
        metrics = {metric: np.asarray(value) for metric, value in step().items()}
    except Exception as error:  # a broken installation may raise anything
        return Check(name, False, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}")
    bad = [metric for metric, value in metrics.items() if not np.isfinite(value)]
    seconds = time.perf_counter() - started
    return Check(name, not bad, f"not finite: {', '.join(bad)}" if bad else f"{seconds:.1f} s, compiling included")
