"""``rlhf-jax doctor``: what is installed, which devices there are, and one step of every phase on a
tiny model.
"""

import functools
import importlib.metadata
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from rlhf_jax import models, rewards
from rlhf_jax.algorithms import dpo, grpo, ppo, reward_model, sft, vpg
from rlhf_jax.cli.console import show
from rlhf_jax.runs import devices, manifest
from rlhf_jax.runs.checkpoint import Checkpoints
from rlhf_jax.sampling import SamplingConfig, rollout
from rlhf_jax.types import Comparisons, Demonstrations, Metrics, TrainState

PHASES: dict[str, Any] = {
    "sft": sft,
    "reward-model": reward_model,
    "dpo": dpo,
    "vpg": vpg,
    "grpo": grpo,
    "ppo": ppo,
}


def take_step(phase: str) -> Metrics:
    """The metrics of one step of a phase on random tokens; those of RL sample first."""
    algorithm = PHASES[phase]
    model = models.build(models.GPT2Config(11, 8, 16, 1, 2))
    key = jax.random.key(0)
    params = model.init(key)
    tokens = jax.random.randint(key, (8, 7), 2, 11, jnp.int32)
    mask = jnp.ones_like(tokens)
    response_mask = mask.at[:, :3].set(0)
    pairs = Comparisons(*(x.reshape(4, 2, 7) for x in (tokens, mask, response_mask)))
    policy_fn = models.policy_fn(model)
    ref_fn = Partial(policy_fn, params)
    score_fn = models.score_fn(model)
    heads = {name: models.add_head(key, params, name) for name in ("score", "value")}
    starts = {"reward-model": heads["score"], "ppo": heads["value"]}
    optimizer = optax.adamw(1e-3)

    def learn(state: TrainState) -> Metrics:
        learner: dict[str, Any] = {"policy_fn": policy_fn}
        batch: Any
        if phase == "sft":
            batch = Demonstrations(tokens, mask, response_mask)
        elif phase == "reward-model":
            learner = {"score_fn": score_fn}
            batch = pairs
        elif phase == "dpo":
            batch = dpo.with_reference(pairs, ref_fn)
        else:
            batch = rollout.collect(
                model,
                state.params,
                tokens[:, :3],
                mask[:, :3],
                key,
                sampling=SamplingConfig(4, eos_id=None, pad_id=0),
                policy_fn=policy_fn,
                ref_fn=ref_fn,
            )
            scores = score_fn(heads["score"], batch.tokens, batch.attention_mask, None)
            batch = replace(batch, scores=scores)
            batch = replace(batch, rewards=rewards.kl_shaped(batch, 0.05))
        config = algorithm.Config()
        _, metrics = algorithm.update(
            state, batch, key, optimizer=optimizer, config=config, **learner
        )
        return metrics

    kind = vpg.State if phase == "vpg" else TrainState
    return jax.jit(learn)(kind.create(starts.get(phase, params), optimizer))


def restore_checkpoint() -> Metrics:
    """Saves and restores a checkpoint, which must be equal."""
    saved = {"x": jnp.arange(3.0)}
    with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
        checkpoints.save(0, saved, {})
        restored, _ = checkpoints.restore(saved)
    np.testing.assert_array_equal(restored["x"], saved["x"])
    return {}


STEPS: dict[str, Callable[[], Metrics]] = {
    phase: functools.partial(take_step, phase) for phase in PHASES
} | {"checkpoint": restore_checkpoint}


def timed(step: Callable[[], Metrics]) -> tuple[bool, str]:
    """Whether a step passes; and its time, the metrics that are not finite, or its error."""
    started = time.perf_counter()
    try:
        metrics = jax.device_get(step())
    except Exception as error:  # a broken installation may raise anything
        first_line, _, _ = str(error).strip().partition("\n")
        return False, f"{type(error).__name__}: {first_line[:200]}"
    bad = [metric for metric, value in metrics.items() if not np.isfinite(value)]
    if bad:
        return False, f"not finite: {', '.join(bad)}"
    return True, f"{time.perf_counter() - started:.1f} s, compiling included"


def examine() -> int:
    """Print versions and devices, and try one step of every phase. Exits with 1 if anything is
    wrong.
    """
    names = (*manifest.PACKAGES, "datasets")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    facts = {"Python": platform.python_version(), "versions": versions}
    for device in jax.devices():
        memory = device.memory_stats()
        size = f", {memory['bytes_limit'] / 2**30:.1f} GiB for JAX" if memory else ""
        facts[f"device {device.id}"] = f"{device.platform}: {device.device_kind}{size}"
    for name, fact in facts.items():
        show(f"{name:<12} ok    {fact}")
    idle = devices.idle_accelerator()  # that JAX does not use
    passed = idle is None
    if idle is not None:
        show(f"{'accelerator':<12} FAIL  {idle}")
    for name, step in STEPS.items():
        show(f"{name:<12} ", end="", flush=True)  # a step compiles for seconds
        fine, detail = timed(step)
        show(f"{'ok' if fine else 'FAIL':<5} {detail}", flush=True)
        passed = passed and fine
    return 0 if passed else 1
