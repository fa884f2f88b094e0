"""What the loop of an RL run uses: checked settings, loaded data and models, programs."""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax

from rlhf_jax import models
from rlhf_jax.config import (
    ALGORITHMS,
    RunConfig,
    data_source,
    for_algorithm,
    model_source,
    section_name,
)
from rlhf_jax.data import batches, encoding, formats
from rlhf_jax.data.formats import ReadResult
from rlhf_jax.errors import UserError
from rlhf_jax.generation.environment import function_of
from rlhf_jax.graders import spec
from rlhf_jax.parallel import sharding
from rlhf_jax.runs.reading import RowCounts
from rlhf_jax.sampling import decoding
from rlhf_jax.training.common import initial, memory, references, remat
from rlhf_jax.training.common.layout import layout_of
from rlhf_jax.training.common.opening import OpenRun, open_run, run_folder
from rlhf_jax.training.common.progress import pad_rows
from rlhf_jax.training.common.setup import set_up
from rlhf_jax.training.rl.inputs import Inputs, Sources, files, load
from rlhf_jax.training.rl.method import (
    Given,
    Method,
    check_sampling,
    check_settings,
    check_value_settings,
    choose_rate,
    completed,
    count_iterations,
    method_of,
)
from rlhf_jax.training.rl.programs import Networks, Programs, compiled, networks_of
from rlhf_jax.training.rl.schedule import Batch, Schedule
from rlhf_jax.types import Algorithm, AlgorithmConfig, Params

if TYPE_CHECKING:
    from rlhf_jax.training.rl.ahead import Ahead
    from rlhf_jax.training.rl.engine import Client


@dataclass(frozen=True)
class Job:
    """An RL run that is open."""

    run: OpenRun
    sources: Sources
    given: Given  # by Python, in place of settings
    method: Method  # the algorithm, and how it learns
    inputs: Inputs  # data, models and rewards
    schedule: Schedule  # the prompts of each step
    held_out: Batch | None  # the prompts of validations
    networks: Networks  # on the devices
    programs: Programs
    sampling_base: Params | None  # the frozen weights under LoRA, where the policy samples
    move_reference: Any = None  # of a reference that moves, see ``references.mover``
    client: "Client | None" = None  # of an engine, which samples
    ahead: "Ahead | None" = None  # samples one step ahead
    told: set[str] = field(default_factory=set)  # why responses had no score
    opponents: list[str] = field(default_factory=list)  # with which validations compare responses

    def rehearsal(self) -> "Job":
        """The job of a check of memory. Its programs are compiled and compared with the free
        memory, and return zeros; no server and none of the user's Python is called.
        """
        programs = {
            phase: memory.rehearsed(phase, program)
            for phase, program in self.programs._asdict().items()
            if phase != "choose"
        }
        if self.client is not None or self.run.layout.sampling_mesh is not None:
            for phase in ("respond", "respond_greedily"):  # they run elsewhere
                programs[phase] = memory.unchecked(getattr(self.programs, phase))
        return replace(
            self,
            programs=Programs(**programs, choose=None),
            inputs=self.inputs.without_python(self.method.algorithm_config.extras),
            client=None,
            ahead=None,
        )


@contextlib.contextmanager
def open_job(
    config: RunConfig,
    algorithm: Algorithm,
    algorithm_config: AlgorithmConfig | None,
    reward: Any = None,
    optimizer: optax.GradientTransformation | None = None,
    policy: models.Model | None = None,
    data: initial.Rows = None,
    validation_data: initial.Rows = None,
) -> Iterator[Job]:
    """Opens the folder of a run and loads what its loop uses; the arguments are those of
    ``run.run``.

    Raises:
        UserError: for whatever is wrong with the data, the models' folders, the run folder or the
            settings.
    """
    complete = completed(algorithm)
    name = section_name(algorithm)
    config, own = for_algorithm(config, algorithm, algorithm_config)
    check_value_settings(name, own, complete.needs_values)
    given = Given(
        None if name in ALGORITHMS else algorithm,
        None if reward is None else spec.given(reward),
        optimizer,
        policy,
    )
    config = _without_given(config, given)
    config = set_up(config, [run_folder(config, name)])
    settings = config.rl
    helping_sizes = check_settings(name, settings, own, layout_of(config))
    check_sampling(complete, settings, config.compute, layout_of(config))
    method = method_of(config, complete, own, given)
    reply = function_of(settings.environment, "rl.environment")
    parts, of_python = initial.stage_data(config.data, settings, data, validation_data)
    read_by = data_source(config)
    prompts = [initial.stage_rows(read_by, "prompts", part) for part in parts]
    config, prompts = _check_answers(config, prompts)
    fingerprints = dict(item for part in prompts for item in part.fingerprints.items())
    sources = sources_of(config)
    read = files(sources, settings, own)
    of_python |= given._asdict()
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(
            open_run(config, name, fingerprints, helping_sizes, read, of_python)
        )
        engine = None
        if settings.engine is not None:
            from rlhf_jax import engines

            opened = engines.opened(settings.engine, config.engine, run.folder.weights)
            engine = stack.enter_context(opened)
        rows = [part.rows for part in prompts]
        inputs = load(run, method, sources, given, rows, reply)
        run.count_rows(_account(prompts, inputs))
        run, method = _share_prompts(run, method, inputs)
        run, inputs = _choose_remat(run, method, inputs)
        schedule, held_out = prompts_of(run, method, inputs)
        run, method = choose_rate(run, method, inputs.initial.params)
        run, method = count_iterations(run, method, len(schedule.train_rows))
        settings = method.settings
        if optimizer is None:
            num_steps = settings.num_iterations * method.num_updates
            initial.warn_of_warmup("rl", settings.optimizer, num_steps)
        source = None
        if method.value_source is not None:
            from rlhf_jax.training.rl import critic

            length = inputs.prompts.tokens.shape[1] + settings.max_new_tokens
            where = (config.compute, inputs.initial, length, run.layout.placement)
            source = critic.load(method.value_source, *where)
        networks = networks_of(run, inputs.initial, method, source, inputs.teacher)
        del source  # what the value model starts from is not kept
        client = None
        if engine is not None:
            from rlhf_jax.training.rl.engine import Client

            client = Client(engine, run, settings, inputs.initial, networks.start)
        apart = run.layout.sampling_mesh
        ahead = None
        if settings.rollouts_ahead:
            from rlhf_jax.training.rl.ahead import Ahead

            samples_apart = client is not None or apart is not None
            thread = stack.enter_context(ThreadPoolExecutor(1)) if samples_apart else None
            ahead = Ahead(thread)
        if client is None and apart is None:
            _hold_cache(run, method, inputs, schedule)
        base = networks.start.base
        yield Job(
            run=run,
            sources=sources,
            given=given,
            method=method,
            inputs=inputs,
            schedule=schedule,
            held_out=held_out,
            networks=networks,
            programs=compiled(run, inputs.initial, method, networks.optimizer),
            sampling_base=base
            if apart is None or base is None
            else sharding.replicate(apart, base),
            move_reference=references.mover(settings) if settings.reference_moves else None,
            client=client,
            ahead=ahead,
        )


def _without_given(config: RunConfig, given: Given) -> RunConfig:
    """The settings without those that ``given`` replaces.

    Raises:
        UserError: the settings name what a policy or an optimizer from Python does not read.
    """
    settings = config.rl
    if given.policy is not None:
        from rlhf_jax.training.common import own

        own.check_settings(model_source(config), config.mesh)
        if settings.engine is not None:
            raise UserError("rl.engine: a server loads no network that Python gives; leave it out")
    if given.optimizer is not None and settings.optimizer.schedule == "plateau":
        raise UserError(
            "rl.optimizer.schedule: plateau cannot lower the rate of an optimizer that Python "
            "gives; choose another schedule"
        )
    return config if given.reward is None else replace(config, reward=())


def _check_answers(
    config: RunConfig, prompts: Sequence[ReadResult]
) -> tuple[RunConfig, list[ReadResult]]:
    """The settings and the prompts after the self-test of rewards that a rule verifies."""
    has_math, patterns = spec.verified(config.reward)
    if not (has_math or patterns):
        return config, list(prompts)
    from rlhf_jax.training.rl import answers

    drops = config.on_bad_row == "drop"
    mathematics, data = answers.tested(config.reward, config.math, prompts, drops=drops)
    return replace(config, math=mathematics), data


def _account(data: Sequence[ReadResult], inputs: Inputs) -> RowCounts:
    """What became of the prompts."""
    dropped = Counter[str]()
    cut = Counter[str]()
    for part, encoded in zip(data, (inputs.prompts, inputs.to_validate), strict=False):
        too_long, own_cut = encoding.dropped_and_cut(encoded.counts)
        unsafe = len(part.rows) - sum(too_long.values()) - len(encoded)
        dropped.update({**too_long, "unsafe": unsafe})
        cut.update(own_cut)
    return formats.account(data, +dropped, cut)


def sources_of(config: RunConfig) -> Sources:
    """What a run loads beside its prompts."""
    return Sources(model_source(config), config.reward, config.safety, config.judge, config.math)


def _share_prompts(run: OpenRun, method: Method, inputs: Inputs) -> tuple[OpenRun, Method]:
    """Run and method with ``compute.share_prompts`` chosen by the work that it saves."""
    wanted = run.config.compute.share_prompts
    if method.algorithm_config.group_size == 1 and wanted is not True:  # nothing to share
        return run.decide(compute=replace(run.config.compute, share_prompts=False)), method
    from rlhf_jax.training.rl import sharing

    answers = sharing.Answers(
        run.name,
        method.algorithm_config,
        method.settings,
        wanted,
        prompt=inputs.prompts.tokens.shape[1],
        takes_groups=inputs.initial.model.takes_groups,
        on=run.layout,
    )
    compute, size = sharing.decided(run.config.compute, answers)
    return run.decide(compute=compute), method._replace(shared_by=size)


def _choose_remat(run: OpenRun, method: Method, inputs: Inputs) -> tuple[OpenRun, Inputs]:
    """Run and inputs with ``compute.remat`` chosen by the memory that an update needs."""
    prompt = inputs.prompts.tokens.shape[1]
    length = prompt + method.settings.max_new_tokens
    rows = rows_at_once(method, prompt)
    networks = 1 + (method.algorithm_config.value == "separate")
    run, policy = remat.choose(run, inputs.initial, rows, length, networks)
    return run, inputs._replace(initial=policy)


def rows_at_once(method: Method, prompt: int) -> int:
    """How many rows an update computes at once, those of a group that computes its prompt of so
    many columns once by the tokens that are left.
    """
    own = method.algorithm_config
    rows = method.settings.batch_size // (own.num_minibatches * own.num_microbatches)
    if method.shared_by > 1:
        from rlhf_jax.training.rl import sharing

        share = sharing.saved(prompt, method.settings.max_new_tokens, method.shared_by)
        rows = math.ceil(rows * (1 - share))
    return rows


def prompts_of(run: OpenRun, method: Method, inputs: Inputs) -> tuple[Schedule, Batch | None]:
    """The prompts of each step, and those of validations or None if none are held out."""
    settings = method.settings
    layers = inputs.initial.model.config.num_layers
    longest = inputs.prompts.tokens.shape[1]
    multiple = initial.bucket_multiple(run.config.text, layers=layers, longest=longest)
    split_key, order_key = jax.random.split(run.key("data"))
    has_own = inputs.to_validate.rows is not inputs.prompts.rows
    fraction = 0.0 if has_own else settings.validation_fraction
    texts = list(map(encoding.group, inputs.prompts.rows))
    train_rows, held_out = initial.hold_out("prompts", texts, fraction, split_key)
    if has_own:
        held_out = np.arange(len(inputs.to_validate))
    schedule = Schedule(
        inputs.prompts,
        train_rows,
        num_prompts=settings.batch_size // method.algorithm_config.group_size,
        group_size=method.algorithm_config.group_size,
        samplings=1 + settings.dynamic_sampling,
        order_key=order_key,
        rollout_key=run.key("rollout"),
        multiple=multiple,
        shared_by=method.shared_by,
    )
    if not len(held_out):
        return schedule, None
    chosen = held_out[: settings.validation_prompts]
    prompts = batches.narrowed(inputs.to_validate, chosen, multiple)
    each = np.repeat(chosen, settings.validation_samples)
    padded = pad_rows(each, settings.batch_size)
    key = run.key("eval")
    return schedule, Batch(prompts, padded, key, group_size=settings.validation_samples)


def _hold_cache(run: OpenRun, method: Method, inputs: Inputs, schedule: Schedule) -> None:
    """Records the sizes of reward models and of the sampler's cache, for errors of full memory."""
    settings = method.settings
    # In a conversation each response is written behind the slots of the one before.
    slots = settings.max_new_tokens * (2 if inputs.environment else 1)
    prompt = schedule.widest().prompts.tokens.shape[1]
    rows = settings.batch_size // run.layout.num_parts
    shared_by = 1 if inputs.environment else schedule.shared_by
    model = inputs.initial.model
    cache = jax.eval_shape(
        lambda: decoding.cache_of(
            model, num_rows=rows, prompt_length=prompt, num_slots=slots, group_size=shared_by
        )
    )
    run.hold({"rewards": inputs.reward.fn, "cache while it samples": cache})
