"""The steps of an RL iteration on the host, small functions that compose.

A ``Sampler`` makes responses, a ``Scorer`` scores them, a ``Draw`` is both. Others take one of
these and return one that does more (``greedy_baseline``, ``replace_uninformative``).
The programs that they call are the pure functions of ``iteration``.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from rlhf_jax import iteration
from rlhf_jax.data import batches
from rlhf_jax.errors import TrainingFault, logger
from rlhf_jax.graders import filter as filters
from rlhf_jax.graders import spec
from rlhf_jax.iteration import Functions, LoopState
from rlhf_jax.parallel import sharding
from rlhf_jax.rewards.host import Columns, row_scores, with_scores
from rlhf_jax.runs import processes
from rlhf_jax.training.common import memory
from rlhf_jax.training.common.stage import Stage
from rlhf_jax.training.rl.programs import Networks
from rlhf_jax.training.rl.schedule import Batch, Schedule
from rlhf_jax.types import Metrics, Params, Rollout

OnStep = Callable[[int, LoopState, Mapping[str, float], Rollout], object]

MOST_REASONS = 20  # why responses have no score, of those that are printed


class Scored(NamedTuple):
    """A rollout with ``scores``, metrics of the reward, and the filter's verdict on each row."""

    rollout: Rollout
    metrics: Metrics
    verdicts: list[filters.Verdict] | None = None
    reasons: Sequence[str | None] | None = None  # why rows have no score


Recorded = tuple[Rollout, Metrics]
"""A rollout, and metrics of how it was made."""

Talk = Callable[..., tuple[Rollout, dict[str, np.ndarray]]]
"""``environment.converse`` with an environment, or with None: one response to each prompt."""

Respond = Callable[[iteration.Prompts, Array], Rollout]
"""(prompts, key) -> responses, with the log-probs of the program or server that sampled them."""

Responder = Callable[[LoopState], Respond]
"""The source of responses for the policy of a state: the run's own sampler (``on_devices``,
``apart``) or an engine (``training.engine``)."""

Sampler = Callable[[LoopState, Batch], Recorded]
"""Responses without scores, with the log-probs of the sampler."""

Scorer = Callable[[Rollout, Batch], Scored]

Rescorer = Callable[[LoopState, Rollout], Recorded]

Learner = Callable[[LoopState, Rollout, Array], tuple[LoopState, Metrics]]

Verdicts = list[filters.Verdict] | None

Guarded = Callable[..., tuple[Rollout, Metrics, Verdicts]]
"""(rollout, *, scored, columns) -> the scored rollout after the filter, metrics, verdicts."""

Draw = Callable[[LoopState, Batch], Recorded]
"""Responses with scores and the log-probs of the update's own forward pass."""

DrawStep = Callable[[LoopState, Sequence[Batch]], Recorded]
"""A ``Draw`` from all batches of a step: the first, and the reserve of dynamic sampling."""

Advance = Callable[[LoopState, int], tuple[LoopState, Metrics]]
"""The step of the loop: (state, number of the step) -> (state, metrics)."""


def on_devices(stage: Stage, program: Callable[..., Rollout], networks: Networks) -> Responder:
    """Samples by the program ``iteration.respond`` on the devices that learn."""

    def at(state: LoopState) -> Respond:
        policy = iteration.sampling_params(state, networks.start.base)
        return lambda prompts, key: program(policy, stage.shard(prompts), key)

    return at


def apart(mesh: Mesh, program: Callable[..., Rollout], base: Params | None) -> Responder:
    """Samples by ``iteration.respond`` on other devices; the responses are NumPy arrays.

    base: the frozen parameters under LoRA, on the mesh.
    """

    def at(state: LoopState) -> Respond:
        placed_state = replace(state, train=sharding.replicate(mesh, state.train))
        policy = iteration.sampling_params(placed_state, base)

        def respond(prompts: iteration.Prompts, key: Array) -> Rollout:
            there = sharding.shard_rows(mesh, prompts)
            return jax.device_get(program(policy, there, sharding.replicate(mesh, key)))

        return respond

    return at


def sampler(stage: Stage, responder: Responder, talk: Talk, size: int) -> Sampler:
    """The sampler of a run. It samples ``size`` rows at a time, ``rl.batch_size``."""

    def sample(state: LoopState, batch: Batch) -> Recorded:
        respond = responder(state)

        def respond_at(places: Any, *prompts: Any) -> Rollout:
            inputs = iteration.Prompts(*prompts)
            return respond(inputs._replace(places=places), batch.key)

        sampled: list[Any] = []
        all_places = np.arange(len(batch.rows), dtype=np.int32)
        for places in all_places.reshape(-1, size):
            at_places = functools.partial(respond_at, places)
            sampled.append(talk(at_places, batch.prompts, batch.rows[places]))
        rollout, talks = sampled[0]
        if len(sampled) > 1:
            rollout, talks = jax.tree.map(lambda *parts: jnp.concatenate(parts), *sampled)
        present = batch.rows >= 0
        metrics = {}
        for name, values in talks.items():
            mean = np.mean(values[present])
            metrics[f"environment/{name}"] = jnp.float32(mean)
        rollout = replace(rollout, group_size=batch.shared_by)
        return stage.shard(rollout), metrics

    return sample


def scorer(
    stage: Stage, program: Callable[..., Any], reward: spec.Reward, guard: Guarded | None = None
) -> Scorer:
    """Scores by the program ``iteration.reward`` on the devices, or on the host with the filter."""
    if reward.host is not None:
        return on_host(stage, reward, guard or unguarded)
    functions = Functions(None, reward.fn)
    return lambda rollout, batch: Scored(*program(rollout, functions))


def on_host(stage: Stage, reward: spec.Reward, guard: Guarded) -> Scorer:
    """Each process scores its own rows. Every process filters all rows, so that all agree which
    rows are missing.

    Raises:
        TrainingFault: a score is not finite.
    """
    host_reward = spec.as_host(reward)
    told: set[str] = set()

    def score(rollout: Rollout, batch: Batch) -> Scored:
        before: Any = processes.fetch(rollout)
        own_rollout: Any = processes.own_rows(before)
        own_columns = batches.columns_at(batch.prompts, processes.own_rows(batch.rows))
        columns = batches.columns_at(batch.prompts, batch.rows)
        own_reasons: list[str | None] = []

        def score_own() -> tuple[Rollout, dict[str, np.ndarray]]:
            said = row_scores(host_reward, own_rollout, own_columns)
            own_reasons.extend(said.reasons())
            return with_scores(own_rollout, said)

        try:
            after: Any
            after, components = processes.gather_rows(processes.agree(score_own))
            unscored = np.sum(before.present) - np.sum(after.present)
            of_processes = processes.gather(lambda: own_reasons)
            reasons = list(itertools.chain(*of_processes))
            say_reasons(reasons, told)
            after, guard_metrics, verdicts = guard(before, scored=after, columns=columns)
        except FloatingPointError as error:
            raise TrainingFault(str(error)) from error
        if not np.array_equal(after.row_ids, before.row_ids):
            raise TrainingFault("the scores of the processes are not in the order of their rows")
        scores, components = jax.tree.map(jnp.asarray, (after.scores, components))
        has_score = {}
        for name, values in components.items():
            has_score[name] = ~jnp.isnan(values)
        scored, metrics = iteration.scored(after, scores, components, has_score)
        metrics["reward/unscored"] = jnp.float32(unscored)
        for name, is_own in has_score.items():
            number = jnp.sum(is_own & scored.present)
            metrics[f"reward/rows/{name}"] = number.astype(jnp.float32)
        metrics |= guard_metrics
        if reward.take_unparsed is not None:
            counts = processes.gather(reward.take_unparsed)
            metrics["reward/unparsed"] = jnp.float32(sum(counts))
        return Scored(stage.shard(jax.device_get(scored)), metrics, verdicts, reasons)

    return score


def say_reasons(reasons: Sequence[str | None], told: set[str]) -> None:
    """Prints why responses have no score, each reason once; ``told`` gets those that were new."""
    for reason in dict.fromkeys(reasons):
        if reason is not None and reason not in told and len(told) < MOST_REASONS:
            count = reasons.count(reason)
            number = len(reasons)
            logger.info(f"reward: no score for {count} of {number} responses: {reason} (said once)")
            told.add(reason)


def unguarded(before: Rollout, scored: Rollout, columns: Columns) -> tuple[Rollout, Metrics, None]:
    """The filter that changes nothing."""
    return scored, {}, None


def rescorer(program: Callable[..., Recorded], networks: Networks) -> Rescorer:
    """Adds the log-probs of the update's own forward pass and those of the reference."""
    return lambda state, sampled: program(
        state, sampled, networks.functions(sampled.tokens.shape[1])
    )


def learner(
    program: Callable[..., tuple[LoopState, Metrics]],
    networks: Networks,
    needs_components: bool = False,
) -> Learner:
    """The update, by the program ``iteration.learn``. It reads components of the reward only if it
    needs them, so that others have one program whatever the reward is made of.
    """

    def learn(state: LoopState, rollout: Rollout, key: Array) -> tuple[LoopState, Metrics]:
        if not needs_components:
            rollout = replace(rollout, components=None)
        return program(state, rollout, key, networks.functions(rollout.tokens.shape[1]))

    return learn


def drawn(
    sample: Sampler,
    rescore: Rescorer,
    score: Scorer,
) -> Draw:
    """Samples, puts the log-probs of the update's own forward pass in place of the sampler's, and
    scores.
    """

    def draw(state: LoopState, batch: Batch) -> Recorded:
        sampled, talk_metrics = sample(state, batch)
        rollout, metrics = rescore(state, sampled)
        scored = score(rollout, batch)
        return scored.rollout, metrics | talk_metrics | scored.metrics

    return draw


def greedy_baseline(
    draw: Draw, sample_greedily: Sampler, score: Scorer, join: Callable[..., Rollout]
) -> Draw:
    """ReMax (Li et al. 2023): a greedy response to each prompt is scored too, and
    ``join(rollout, greedy=greedy rollout)`` puts its score into the rollout as the baseline.
    """

    def draw_with_baseline(state: LoopState, batch: Batch) -> Recorded:
        rollout, metrics = draw(state, batch)
        sampled, _ = sample_greedily(state, batch)
        greedy = score(sampled, batch)
        greedy_metrics = {"objective/greedy_score": greedy.metrics["objective/score"]}
        return join(rollout, greedy=greedy.rollout), metrics | greedy_metrics

    return draw_with_baseline


def first_of(draw: Draw) -> DrawStep:
    """Draws the first batch of a step only."""
    return lambda state, spares: draw(state, spares[0])


def replace_uninformative(
    draw: Draw,
    num_groups: int,
    num_equal: Callable[[Rollout], Array],
    refill: Callable[..., Rollout],
) -> DrawStep:
    """Dynamic sampling (Yu et al. 2025, DAPO, section 3.2): while groups of the first batch are
    equal in score, it draws the next batch and takes groups of it in their place.

    Each round draws a whole batch, so that nothing is compiled anew. The metrics of scores and
    responses are those of the first draw: of the policy, not of the groups that were chosen.
    """

    def draw_rounds(state: LoopState, spares: Sequence[Batch]) -> Recorded:
        first, *others = spares
        rollout, metrics = draw(state, first)
        left = float(num_equal(rollout))
        equal = [left]
        for batch in others:
            if not left:
                break
            fresh, _ = draw(state, batch)
            equal.append(float(num_equal(fresh)))
            rollout = refill(rollout, fresh=fresh)
            left = float(num_equal(rollout))
        metrics["sampling/rounds"] = jnp.float32(len(equal) - 1)
        metrics["sampling/uninformative"] = jnp.float32(sum(equal) / (len(equal) * num_groups))
        return rollout, metrics

    return draw_rounds


def observed(draw_step: DrawStep, on_step: OnStep) -> tuple[DrawStep, Callable[..., object]]:
    """The draw, and a function that calls ``on_step`` with the rollout that was drawn last."""
    drawn: list[Rollout] = []

    def draw(state: LoopState, spares: Sequence[Batch]) -> Recorded:
        drawn.clear()
        rollout, metrics = draw_step(state, spares)
        drawn.append(rollout)
        return rollout, metrics

    def observe(step: int, state: LoopState, row: Mapping[str, float]) -> object:
        return on_step(step, state, row, drawn[0])

    return draw, observe


def advancing(draw_step: DrawStep, learn: Learner, schedule: Schedule, key: Array) -> Advance:
    """The step of the loop: draws a rollout from the schedule's batches and learns from it."""

    def advance(state: LoopState, step: int) -> tuple[LoopState, Metrics]:
        rollout, metrics = draw_step(state, schedule.batches(step))
        state, learn_metrics = learn(state, rollout, jax.random.fold_in(key, step))
        return state, metrics | learn_metrics

    return advance


def counting(advance: Advance, updates: int) -> Advance:
    """``advance``; after the first iteration it prints a line if the update took other than
    ``updates`` optimizer steps, those that a schedule of the learning rate counts with.
    """
    is_first = True

    def advance_counting(state: LoopState, step: int) -> tuple[LoopState, Metrics]:
        nonlocal is_first
        if not is_first:
            return advance(state, step)
        is_first = False
        before = _optimizer_steps(state)
        state, metrics = advance(state, step)
        taken = _optimizer_steps(state) - before
        if taken != updates and not float(metrics["nonfinite"]) > 0:
            logger.info(
                f"warning: an iteration took {taken} optimizer steps, and the schedule of "
                f"rl.optimizer counts with {updates}, the algorithm's num_epochs * num_minibatches:"
                f" it ends too {'early' if taken > updates else 'late'}. Give the config these "
                "attributes, or choose the schedule constant"
            )
        return state, metrics

    return advance_counting


def _optimizer_steps(state: LoopState) -> int:
    """The steps that the optimizer's schedules have counted so far."""
    counts = optax.tree_utils.tree_get_all_with_path(state.train.opt_state, "count")
    return max((int(count) for _, count in counts), default=0)


def checking(
    draw: Draw,
    program: Callable[..., Any],
    networks: Networks,
    schedule: Schedule,
    key: Array,
    needs_components: bool = False,
) -> Callable[[LoopState], None]:
    """Checks that a step on the widest batch fits into memory.

    draw: of ``memory.rehearsed`` programs; ``program`` is the update's, and ``needs_components`` is
        as in ``learner``.
    """

    def check_memory(state: LoopState) -> None:
        rollout, _ = draw(state, schedule.widest())
        if not needs_components:
            rollout = replace(rollout, components=None)
        elif rollout.components is None:
            return  # their names are not known before the user's Python has scored
        functions = networks.functions(rollout.tokens.shape[1])
        memory.check("learn", program, state, rollout, key, functions)

    return check_memory
