"""Three small runs, each made once in a process, that several test files look at: what their
programs were called with, what each step left behind, what was said, and their files. And a job of
an RL run, of the parts that a test gives it.
"""

import functools
import json
import logging
import tempfile
import types
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import letters_run, with_rl

from rlhf_jax import grpo, iteration, training, vpg
from rlhf_jax.algorithms import ppo
from rlhf_jax.config import Optimizer, PPOStage, RLStage, RunConfig
from rlhf_jax.errors import logger
from rlhf_jax.graders import spec
from rlhf_jax.runs import devices
from rlhf_jax.training.common.saving import RunResult
from rlhf_jax.training.rl import job
from rlhf_jax.training.rl.inputs import Inputs
from rlhf_jax.training.rl.method import Given, Method, completed
from rlhf_jax.types import TrainState

STOP = ("ya", "s", "oo")  # that end responses of the first two runs


def rl_job(*, settings=None, own=None, inputs=None, programs=None, folder=None, **fields):
    """What the functions of a step read of a ``Job``, with these parts: on one device, without
    models, filter, judge, environment or engine.

    folder: of the run.
    """
    return SimpleNamespace(
        **{
            "run": SimpleNamespace(
                layout=SimpleNamespace(
                    shard=lambda batch: batch, copy=lambda tree: tree, sampling_mesh=None
                ),
                folder=SimpleNamespace(samples=folder and folder / "samples.jsonl"),
                name="vpg",
                key=lambda name: jax.random.key(7),
                config=RunConfig(),
            ),
            "method": Method(
                completed(vpg),
                own or vpg.Config(),
                settings or RLStage(),
                iteration.NO_PENALTY,
                None,
            ),
            "given": Given(),
            "inputs": rl_inputs(**inputs or {}),
            "programs": SimpleNamespace(**programs or {}),
            "networks": SimpleNamespace(functions=None),
            "sampling_base": None,
            "client": None,
            "ahead": None,
            "told": set(),
            "opponents": [],
        }
        | fields
    )


def rl_inputs(**given):
    """The inputs of an RL run of which only these are there."""
    return Inputs(**dict.fromkeys(Inputs._fields) | {"reward": spec.Reward()} | given)


class Step(NamedTuple):
    """What ``on_step`` got, copied."""

    number: int
    state: Any
    row: dict[str, float]
    rollout: Any


class Record(NamedTuple):
    config: RunConfig
    result: RunResult
    calls: list[tuple[str, tuple]]  # of programs and of ``sampling_params``, with their inputs
    programs: Any
    steps: list[Step]
    blocks: dict[str, list[int]]  # {function: the blocks that each of its programs is compiled for}
    said: str
    place: Any  # a temporary folder, which goes with the record

    def called(self, *names):
        """The inputs of these programs, in the order of the calls."""
        return [inputs for name, inputs in self.calls if name in names]


class Recording:
    """A program that notes its calls, but not those that only find its shapes."""

    def __init__(self, name, program, calls):
        self.name, self.program, self.calls = name, program, calls

    def __call__(self, *inputs, **named):
        leaves = jax.tree.leaves((inputs, named))
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            self.calls.append((self.name, (*inputs, *named.values())))
        return self.program(*inputs, **named)

    def __getattr__(self, name):
        return getattr(self.program, name)


def record(place, config, algorithm, algorithm_config=None, *, ends_at=None, **given):
    """The run, which ends after the step ``ends_at``."""
    calls, programs, steps, blocks, said = [], [], [], {}, []
    compiled, sampling_params, jit = job.compiled, iteration.sampling_params, jax.jit

    def recording(*how):
        programs.append(compiled(*how))
        made = zip(programs[0]._fields, programs[0], strict=True)
        return programs[0]._make(
            program and Recording(name, program, calls) for name, program in made
        )

    def noting(fn, **options):
        of_blocks = options.pop("compiler_options", None)
        if of_blocks:
            blocks.setdefault(getattr(fn, "func", fn).__name__, []).append(of_blocks["blocks"])
        return jit(fn, **options)

    def keep(step, state, row, rollout):
        copied, drawn = jax.tree.map(np.array, (state, rollout))
        steps.append(Step(step, copied, dict(row), drawn))
        return step == ends_at or None

    handler = logging.Handler()
    handler.emit = lambda message: said.append(message.getMessage())
    logger.addHandler(handler)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(job, "compiled", recording)
            patch.setattr(
                iteration, "sampling_params", Recording("sampling_params", sampling_params, calls)
            )
            patch.setattr(devices, "compiler_options", lambda count: {"blocks": count})
            patch.setattr(jax, "jit", noting)
            result = training.rl.run(config, algorithm, algorithm_config, on_step=keep, **given)
    finally:
        logger.removeHandler(handler)
    return Record(config, result, calls, programs[0], steps, blocks, "\n".join(said), place)


@functools.cache
def vpg_run():
    """VPG with the greedy baseline: three steps of four rows, and validations before and behind
    them. A reward is the number of the prompt's letter.
    """
    place = tempfile.TemporaryDirectory()
    config = with_rl(letters_run(Path(place.name)), stop=STOP)
    return record(place, config, vpg, vpg.Config(baseline="greedy"))


SIZE = """
def size(prompts, responses, **columns):
    return [float(len(response)) for response in responses]
"""


@functools.cache
def ppo_run():
    """PPO with a value model: two steps of twelve rows that move the policy far. A reward is the
    length of the response's text; a row that was cut gets -9.
    """
    place = tempfile.TemporaryDirectory()
    folder = Path(place.name)
    (folder / "size.py").write_text(SIZE)
    config = replace(letters_run(folder), reward=(f"{folder / 'size.py'}:size",))
    config = replace(config, network=replace(config.network, max_length=24))
    config = with_rl(
        config,
        num_iterations=2,
        batch_size=12,
        max_new_tokens=8,
        stop=STOP,
        missing_eos_score=-9.0,
        optimizer=Optimizer(learning_rate=0.2),
    )
    return record(place, config, ppo, PPOStage(value="separate", num_epochs=1))


JUDGE = """
def two(prompts, responses):
    return [2.0] * len(responses)
"""


def first_is_worse(prompts, responses):
    return [1.0 + 0.5 * (i % 2) for i in range(len(responses))]


def with_state(module, create):
    """An algorithm as a module of one's own, whose state makes ``create(params)`` of the
    parameters.
    """
    algorithm = types.ModuleType("tempered")
    vars(algorithm).update({name: part for name, part in vars(module).items() if name[:2] != "__"})

    class State(TrainState):
        @classmethod
        def create(cls, params, optimizer):
            return TrainState.create(create(params), optimizer)

    algorithm.State = State
    algorithm.__doc__ = "As the module."
    return algorithm


@functools.cache
def grpo_run():
    """GRPO in pairs, as an algorithm of one's own with a parameter more. The policy moves far at
    each of its four steps, and every two steps it becomes the reference; ``on_step`` ends the run.
    A function of texts rewards, a judge looks at validations: five equal prompts in batches of
    four.
    """
    place = tempfile.TemporaryDirectory()
    folder = Path(place.name)
    (folder / "judge.py").write_text(JUDGE)
    others = [{"prompt": "say a", "letter": "a"}] * 5
    (folder / "others.json").write_text(json.dumps(others))
    config = with_rl(
        letters_run(folder),
        num_iterations=9,
        max_new_tokens=3,
        kl_coef=0.5,
        reference_refresh=2,
        temperature=0.5,
        judge=(f"{folder / 'judge.py'}:two",),
        validation_data=(str(folder / "others.json"),),
        validation_interval=2,
        optimizer=Optimizer(learning_rate=0.3, schedule="constant"),
    )
    algorithm = with_state(grpo, lambda params: params | {"log_temperature": jnp.zeros(())})
    settings = grpo.Config(group_size=2, kl_loss_coef=0.0)
    return record(place, config, algorithm, settings, ends_at=4, reward=first_is_worse)
