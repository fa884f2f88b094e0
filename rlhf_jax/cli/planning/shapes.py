"""What a stage has on its devices, and its programs, with shapes in place of arrays: the run's own
builders compose them.
"""

import dataclasses
import functools
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rlhf_jax import iteration, models, ops, sampling
from rlhf_jax.cli.planning import targets
from rlhf_jax.cli.planning.case import PAIRS, RL, Case
from rlhf_jax.config import RLStage, RunConfig, model_source
from rlhf_jax.data import batches
from rlhf_jax.data.encoding import EncodedTexts
from rlhf_jax.errors import UserError
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.graders import spec
from rlhf_jax.parallel import sharding
from rlhf_jax.training.common import layout, reward_models
from rlhf_jax.training.common.opening import OpenRun
from rlhf_jax.training.common.optimizer import make_optimizer
from rlhf_jax.training.rl import teacher as teachers
from rlhf_jax.training.rl.method import Method, method_of
from rlhf_jax.training.rl.programs import Programs, Sizes, compiled, networks_of
from rlhf_jax.training.rl.programs import first_state as first_state_of_rl
from rlhf_jax.training.supervised import samples
from rlhf_jax.training.supervised.job import Job, Learner
from rlhf_jax.training.supervised.run import first_state
from rlhf_jax.training.tasks import TASKS
from rlhf_jax.types import Comparisons, Demonstrations, Feedback, Params, TrainState

# The phases with a loop over tokens.
SAMPLING = "sample and score"
ANSWERING = "answer at validations"
COMPARING = "compare answers"  # the phase of their log-ratios
ANSWERS = ("answer",)  # the column that ``--reward math`` asks the data for
Program = tuple[Any, ...]  # a function, its arguments


class Shapes(NamedTuple):
    """What a stage has on its devices, with shapes in place of arrays."""

    held: dict[str, Any]  # {name: tree}
    programs: dict[str, Program]  # by phase
    known: dict[str, Any]  # {name: tree} of arrays inside the programs


def shapes_of(
    config: RunConfig,
    name: str,
    length: int | None = None,
    target: targets.Target | None = None,
) -> Shapes:
    """The arrays on the devices and the programs of a stage; see ``plan``."""
    stages = (*TASKS, *RL)
    if name not in stages:
        raise UserError(f"rlhf-jax plan: no stage {name!r}; there are {', '.join(stages)}")
    if name == "reward_model" and config.reward_model.ensemble_size > 1:
        raise UserError(
            "rlhf-jax plan: reward_model.ensemble_size must be 1; members take as much each, save "
            "the base"
        )
    if config.compute.blocks or config.mesh.sampling:
        raise UserError(
            "rlhf-jax plan: compute.blocks and mesh.sampling are not planned; leave them out"
        )
    case = Case(config, name, target)
    layout.check(model_source(config), case.mesh)
    cuts = ("num_minibatches", "num_microbatches")
    section = "rl" if name in RL else name
    layout.check_divides(
        f"{section}.batch_size",
        case.settings.batch_size,
        {"devices": sharding.num_parts(case.mesh)},
        {f"{name}.{key}": getattr(case.own, key, 1) for key in cuts},
    )
    return _reinforcement(case, length) if name in RL else _supervised(case, length)


def fitting(model: models.Model, length: int | None, texts: int = 1) -> int:
    """The length of a row of so many texts, by default the most that the model reads."""
    most = texts * model.config.max_length
    if (length or most) > most:
        raise UserError(
            f"rlhf-jax plan: rows of {length} tokens are longer than the {most} that the model "
            "reads"
        )
    return length or most


def _supervised(case: Case, length: int | None) -> Shapes:
    job = _job(case)
    learner = TASKS[case.name].prepare(job)
    state = first_state(job, learner)
    update = learner.update  # with the functions of the model bound

    def learn(state: Any, batch: Any, key: Array, functions: dict[str, Any]) -> Any:
        return update.func(state, batch, key, **functions)

    columns = fitting(job.language_model.model, length, case.texts_of_row)
    key = jax.eval_shape(jax.random.key, 0)
    batch = case.spread(_batch(case, columns))
    programs: dict[str, Program] = {"learn": (learn, state, batch, key, update.keywords)}
    if TASKS[case.name].is_policy:
        programs |= _answering(case, job, learner, columns, state, key)
    return Shapes(_held(case.planned, state), programs, {})


def _answering(
    case: Case, job: Job, learner: Learner, columns: int, state: TrainState, key: Array
) -> dict[str, Program]:
    """The programs of the answers at validations, if there are any. A prompt may be as long as a
    row, or as the model leaves room for.
    """
    settings = case.own
    width = min(columns, job.language_model.model.config.max_length - settings.max_new_tokens)
    validates = settings.validation_fraction > 0 or settings.validation_data
    if not (validates and settings.validation_prompts and width > 0):
        return {}
    policy = samples.Policy(
        job.language_model, learner.start, learner.fn, learner.reference, job.num_answers
    )
    program: Any = samples.compile_log_ratios(job.run.layout, policy)
    config = samples.greedy_config(settings, policy.begun.tokenizer)

    def answer(state: Any, prompts: Any, key: Array, base: Any) -> Any:
        inputs = (samples.sampling_params(state, base), *prompts, key)
        return sampling.generate(policy.begun.model, *inputs, config=config, mesh=case.mesh)

    def compare(state: Any, text: Any, functions: dict[str, Any]) -> Any:
        return program.func(state, text, **functions)

    parts = sharding.num_parts(case.mesh)
    rows = -(-settings.validation_prompts // parts) * parts

    def arrays(columns: int, count: int) -> Any:
        return case.spread((jax.ShapeDtypeStruct((rows, columns), jnp.int32),) * count)

    programs: dict[str, Program] = {
        ANSWERING: (answer, state, arrays(width, 2), key, policy.start.base)
    }
    if program is not None:
        text = arrays(width + settings.max_new_tokens, 3)
        programs[COMPARING] = (compare, state, text, program.keywords)
    return programs


def _job(case: Case) -> Job:
    """The job of a run whose data has no rows yet."""
    settings = case.own
    none = np.zeros(0, np.int64)
    answers = 2 if case.name in PAIRS else 1
    starts = np.zeros((0, answers), np.int64)
    texts: list[list[np.ndarray]] = [[] for _ in range(answers)]
    is_shared = case.num_answers > 0
    encoded = EncodedTexts(
        texts, starts, [], [], 0, None, {}, none, none, targets=starts, shares_prompts=is_shared
    )
    return Job(
        run=case.planned,
        settings=settings,
        source=model_source(case.config),
        language_model=case.policy(),
        rows=[],
        encoded=encoded,
        train_rows=none,
        held_out=none,
        plan=batches.Plan(np.ones(1), settings.batch_size, jax.random.key(0)),
        collate=lambda encoded, rows: None,
        bucket_multiple=1,
        num_steps=1,
        optimizer=make_optimizer(settings.optimizer, 1),
    )


def _batch(case: Case, length: int) -> Any:
    """A batch of texts, as shapes."""
    shape: tuple[int, ...] = (case.own.batch_size, length)
    if case.name in PAIRS and not case.num_answers:
        shape = (case.own.batch_size, 2, length)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    if case.num_answers:
        numbers: Any = jax.ShapeDtypeStruct((shape[0], 1, case.num_answers), jnp.int32)
        return Comparisons(tokens, tokens, tokens, documents=numbers)  # type: ignore[arg-type]
    if case.name in PAIRS:
        return Comparisons(tokens, tokens, tokens)  # type: ignore[arg-type]
    if case.name == "sft":
        return Demonstrations(tokens, tokens, tokens)  # type: ignore[arg-type]
    flags: Any = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    return Feedback(tokens, tokens, tokens, flags)  # type: ignore[arg-type]


def _reinforcement(case: Case, length: int | None) -> Shapes:
    settings = case.config.rl
    stage = case.planned
    begun = case.policy()
    prompt = _prompt_columns(settings, length)
    columns = prompt + settings.max_new_tokens
    fitting(begun.model, columns)  # or an error
    method = method_of(case.config, RL[case.name], case.own)
    method = method._replace(shared_by=case.shared_by(prompt))
    teacher = _teacher(case)
    source = None if method.value_source is None else case.language_model(method.value_source)
    networks = networks_of(stage, begun, method, source, teacher)
    state = first_state_of_rl(stage, method, networks, Sizes(settings.batch_size, columns, 0))
    run = compiled(stage, begun, method, networks.optimizer)
    functions = networks.functions
    inputs = (state, _prompts(case, prompt), jax.eval_shape(jax.random.key, 0))
    base = networks.start.base
    collect = functools.partial(_collected, run, method.shared_by)
    with case.in_mesh():
        collected, _ = jax.eval_shape(collect, *case.computed((*inputs, functions, base)))
    rollout = case.spread(collected)
    if case.own.needs_teacher and teacher is None:
        rollout = dataclasses.replace(rollout, teacher_log_probs=rollout.log_probs)
    scores = case.spread(jax.ShapeDtypeStruct((settings.batch_size,), jnp.float32))
    scored = dataclasses.replace(rollout, scores=scores)
    programs: dict[str, Program] = {SAMPLING: (collect, *inputs, functions, base)}
    reward = case.laid_out(_reward(case, method, teacher))
    if reward is not None:
        rewarded = iteration.Functions(None, reward_fn=reward)
        programs["reward"] = (run.reward, rollout, rewarded)
    programs["learn"] = (run.learn, state, scored, inputs[-1], functions)
    held = _held(stage, state.train)
    held["teacher"] = stage.held["teacher"]
    held["reward models"] = reward if case.config.reward else None
    held["policy that samples"] = stage.held["policy that samples"]
    sizes = {
        "num_rows": settings.batch_size,
        "prompt_length": prompt,
        "num_slots": settings.max_new_tokens,
        "group_size": method.shared_by,
    }
    cache = jax.eval_shape(lambda: sampling.decoding.cache_of(begun.model, **sizes))
    return Shapes(held, programs, {"cache": case.spread(cache)})


def _collected(
    run: Programs,
    shared_by: int,
    state: iteration.LoopState,
    prompts: iteration.Prompts,
    key: Array,
    functions: iteration.Functions,
    base: Params | None,
) -> Any:
    """A run's sampling and rescoring, as one program."""
    sampled = run.respond(iteration.sampling_params(state, base), prompts, key)
    sampled = dataclasses.replace(sampled, group_size=shared_by)
    return run.rescored(state, sampled, functions)


def _held(run: OpenRun, state: TrainState) -> dict[str, Any]:
    """What the models and the optimizer hold."""
    held = run.held
    return {
        "parameters": state.params,
        "optimizer": state.opt_state,
        "frozen weights": held["frozen weights"],
        "reference": held["moving reference"] or held["reference"],
    }


def _reward(case: Case, method: Method, teacher: LanguageModel | None) -> Any:
    """The part of a run's reward that runs on the devices, with the models' parameters as shapes;
    None if there is no such part.
    """
    rows = method.score_rows
    if not method.is_rewarded:
        return teachers.log_ratio(teacher, method.settings, rows)
    entries = [entry for entry in case.config.reward if ".py:" not in entry]
    if not entries:
        return None

    def with_score(params: Params) -> Params:
        return models.add_head(jax.random.key(0), params, "score")

    def load(source: str) -> spec.RewardModel:
        model, params = case.model(source)
        score_fn = ops.by_rows(models.score_fn(model, one_text=True), rows)
        in_groups = functools.partial(reward_models.scorer_of_groups, model, score_rows=rows)
        shapes = jax.eval_shape(with_score, params)
        return spec.RewardModel(score_fn, shapes, "", in_groups=in_groups)

    tokenizer: Any = types.SimpleNamespace(fingerprint="", encode=lambda text: [0], decode_raw=repr)
    return spec.build_reward(entries, tokenizer=tokenizer, load=load, columns=ANSWERS).fn


def _teacher(case: Case) -> LanguageModel | None:
    """The teacher of a distillation with its parameters as shapes; None if there is none, or if it
    is on a server.
    """
    if not case.own.needs_teacher or case.own.teacher_server is not None:
        return None
    if case.own.teacher is None:
        raise UserError("rlhf-jax plan: no teacher; give --distill.teacher")
    teacher = case.language_model(case.own.teacher)
    return teacher._replace(params=case.laid_out(teacher.params))


def _prompts(case: Case, columns: int) -> iteration.Prompts:
    """Prompts, as shapes."""
    rows = case.config.rl.batch_size
    tokens: Any = jax.ShapeDtypeStruct((rows, columns), jnp.int32)
    numbers: Any = jax.ShapeDtypeStruct((rows,), jnp.int32)
    prompts: iteration.Prompts = case.spread(iteration.Prompts(tokens, tokens, numbers))
    return prompts


def _prompt_columns(settings: RLStage, length: int | None) -> int:
    prompt = length or settings.max_prompt_length
    if prompt is None:
        raise UserError(
            "rlhf-jax plan: nobody knows the longest prompt; give --data FILE, --length or "
            "--rl.max-prompt-length"
        )
    return prompt
