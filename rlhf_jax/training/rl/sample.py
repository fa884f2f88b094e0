"""Responses to the prompts of a batch: of the run's own program, of devices that only sample, or of
an engine; in conversations with an environment if there is one.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rlhf_jax import iteration
from rlhf_jax.generation import stops
from rlhf_jax.generation.environment import converse
from rlhf_jax.iteration import LoopState, Prompts
from rlhf_jax.parallel import sharding
from rlhf_jax.runs import processes
from rlhf_jax.training.rl.schedule import Batch
from rlhf_jax.types import Metrics, Rollout

if TYPE_CHECKING:
    from rlhf_jax.training.rl.job import Job

Respond = Callable[[Prompts, Array], Rollout]
"""(prompts, key) -> responses, with the log-probs of the program or server that sampled them."""
Kind = Literal["respond", "respond_to_each", "respond_greedily"]
"""A field of ``programs.Programs``: for training, for validations, for the greedy baseline."""


def sample(
    job: "Job", state: LoopState, batch: Batch, kind: Kind = "respond"
) -> tuple[Rollout, Metrics]:
    """Responses without scores, with the log-probs of the sampler, and the environment's metrics.
    It samples ``rl.batch_size`` rows at a time.
    """
    settings = job.method.settings
    tokenizer = job.inputs.initial.tokenizer
    respond = _responder(job, state, kind)
    parts: list[Any] = []
    all_places = np.arange(len(batch.rows), dtype=np.int32)
    for places in all_places.reshape(-1, settings.batch_size):

        def respond_here(*prompts: Any, places: Any = places) -> Rollout:
            return respond(Prompts(*prompts)._replace(places=places), batch.key)

        respond_until_stop = stops.stopping(
            respond_here, tokenizer, settings.stop, settings.stop_after
        )
        own = (batch.prompts, batch.rows[places])
        parts.append(converse(job.inputs.environment, respond_until_stop, *own))
    rollout, talks = parts[0]
    if len(parts) > 1:  # of validations, which read no extras
        parts = [(replace(own, extras=None), own_talks) for own, own_talks in parts]
        rollout, talks = jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts)
    present = batch.rows >= 0
    metrics = {
        f"environment/{name}": jnp.float32(np.mean(values[present]))
        for name, values in talks.items()
    }
    groups = np.arange(len(batch.rows), dtype=np.int32) // batch.group_size
    rollout = replace(rollout, group_size=batch.shared_by, group_ids=groups)
    rollout = job.run.layout.shard(rollout)
    ask_teacher = job.inputs.ask_teacher
    if ask_teacher is not None and kind != "respond_greedily":  # a teacher on a server
        rows = processes.fetch(rollout)
        rollout = job.run.layout.shard(replace(rows, teacher_log_probs=ask_teacher(rows)))
    return rollout, metrics


def _responder(job: "Job", state: LoopState, kind: Kind) -> Respond:
    """Where the responses of the state's policy come from."""
    layout = job.run.layout
    mesh = layout.sampling_mesh
    if job.client is not None:
        respond = job.client.responder(state, kind)
    elif mesh is not None:
        state = replace(state, train=sharding.replicate(mesh, state.train))
        policy = iteration.sampling_params(state, job.sampling_base)

        def respond(prompts: Prompts, key: Array) -> Rollout:
            there = sharding.shard_rows(mesh, prompts)
            program = getattr(job.programs, kind)
            return jax.device_get(program(policy, there, sharding.replicate(mesh, key)))
    else:
        program = getattr(job.programs, kind)
        policy = iteration.sampling_params(state, job.sampling_base)
        if kind == "respond" and job.method.algorithm.respond is not None:
            functions = job.networks.functions
            reference = iteration.reference_params(state, functions, job.sampling_base)
            policy = (policy, reference)
        return lambda prompts, key: program(policy, layout.shard(prompts), key)
    # The thread of the next rollout and a validation must not sample at the same time.
    return respond if job.ahead is None else job.ahead.alone(respond)
