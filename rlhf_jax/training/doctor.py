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
from rlhf_jax.types import Comparisons, Demonstrations, Metrics, TrainState

PACKAGES = ("rlhf-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "numpy")
_ROWS, _PROMPT, _RESPONSE, _VOCABULARY = 4, 3, 4, 11


class Check(NamedTuple):
    """One line of the doctor's findings."""

    name: str
    passed: bool
    detail: str


def machine() -> list[Check]:
    """Versions, devices with their memory, and an accelerator that lies idle (not passed)."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    checks = [Check("versions", True, f"Python {platform.python_version()}, {versions}")]
    for device in jax.devices():
        stats = device.memory_stats() or {}
        limit = stats.get("bytes_limit")
        memory = f", {limit / 2**30:.1f} GiB for JAX" if limit else ""
        checks.append(Check(f"device {device.id}", True, f"{device.platform}: {device.device_kind}{memory}"))
    idle = devices.idle_accelerator()
    if idle is not None:
        checks.append(Check("accelerator", False, idle))
    return checks


def self_test() -> list[Check]:
    """One step of every phase; each must give finite numbers."""
    model = models.build(
        models.GPT2Config(vocab_size=_VOCABULARY, max_length=16, hidden_size=16, num_layers=1, num_heads=2)
    )
    params = model.init(jax.random.key(0))
    optimizer = optax.adam(1e-3)
    tokens = jax.random.randint(jax.random.key(1), (_ROWS, _PROMPT + _RESPONSE), 2, _VOCABULARY)
    mask = jnp.ones_like(tokens)
    response_mask = mask.at[:, :_PROMPT].set(0)
    key = jax.random.key(2)

    def run_sft() -> Metrics:
        batch = Demonstrations(tokens, mask, response_mask)
        state = TrainState.create(params, optimizer)
        policy_fn = models.policy_fn(model)
        return sft.update(state, batch, key, policy_fn=policy_fn, optimizer=optimizer, config=sft.Config())[1]

    def run_reward_model() -> Metrics:
        def pair(x: jax.Array) -> jax.Array:
            return jnp.stack([x, x[::-1]], axis=1)

        state = TrainState.create(models.add_head(key, params, "score"), optimizer)
        return reward_model.update(
            state,
            Comparisons(pair(tokens), pair(mask), pair(response_mask)),
            key,
            score_fn=models.score_fn(model),
            optimizer=optimizer,
            config=reward_model.Config(),
        )[1]

    def run_rl(algorithm: Callable[[], phases.AlgorithmConfig]) -> Metrics:
        policy_fn = models.policy_fn(model, prompt_length=_PROMPT)
        state = TrainState.create(models.add_head(key, params, "value"), optimizer)
        return phases.iteration(
            phases.LoopState.create(state, 0.1),
            phases.Prompts(tokens[:, :_PROMPT], mask[:, :_PROMPT], jnp.arange(_ROWS)),
            key,
            key,
            jax.tree_util.Partial(policy_fn, params),
            rewards.token_count(3),
            model=model,
            sampling_config=sampling.SamplingConfig(max_new_tokens=_RESPONSE, eos_id=1, pad_id=0),
            policy_fn=policy_fn,
            algorithm=vpg if algorithm is vpg.Config else ppo,
            algorithm_config=algorithm(),
            optimizer=optimizer,
            config=RLStage(),
        )[2]

    def run_checkpoint() -> Metrics:
        with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
            checkpoints.save(0, params, {})
            restored, _ = checkpoints.restore(params)
        same = jax.tree.map(lambda a, b: jnp.array_equal(a, b), params, restored)
        return {"identical": jnp.where(jnp.all(jnp.stack(jax.tree.leaves(same))), 1.0, jnp.nan)}

    return [
        _timed("sft", jax.jit(run_sft)),
        _timed("reward model", jax.jit(run_reward_model)),
        _timed("vpg: sample, reward, update", jax.jit(lambda: run_rl(vpg.Config))),
        _timed("ppo: sample, reward, update", jax.jit(lambda: run_rl(ppo.Config))),
        _timed("checkpoint", run_checkpoint),
    ]


def _timed(name: str, step: Callable[[], Metrics]) -> Check:
    started = time.perf_counter()
    try:
        metrics = {metric: np.asarray(value) for metric, value in step().items()}
    except Exception as error:  # whatever a broken installation raises is the finding
        return Check(name, False, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}")
    seconds = time.perf_counter() - started
    bad = [metric for metric, value in metrics.items() if not np.isfinite(value)]
    return Check(name, not bad, f"not finite: {', '.join(bad)}" if bad else f"{seconds:.1f} s, compiling included")
