"""What a stage has on its devices, and its programs, with shapes in place of arrays: the run's own
builders compose them.
"""

import contextlib
import dataclasses
import functools
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from rlhf_jax import iteration, models, sampling
from rlhf_jax.algorithms import distill, grpo, ppo, rloo, vpg
from rlhf_jax.config import RLStage, RunConfig, model_source
from rlhf_jax.data import batches
from rlhf_jax.data.encoding import EncodedTexts
from rlhf_jax.errors import UserError
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.graders import spec
from rlhf_jax.models import hf
from rlhf_jax.parallel import sharding
from rlhf_jax.training.common import initial, layout, rates, reward_models
from rlhf_jax.training.common.layout import Layout, laid_out_shapes
from rlhf_jax.training.common.opening import OpenRun
from rlhf_jax.training.common.optimizer import make_optimizer
from rlhf_jax.training.rl import teacher as teachers
from rlhf_jax.training.rl.method import Method, choose_rate, completed, method_of
from rlhf_jax.training.rl.programs import Sizes, compiled, networks_of
from rlhf_jax.training.rl.programs import first_state as first_state_of_rl
from rlhf_jax.training.rl.sharing import Answers
from rlhf_jax.training.supervised import samples
from rlhf_jax.training.supervised.job import Job, Learner
from rlhf_jax.training.supervised.run import first_state
from rlhf_jax.training.tasks import TASKS
from rlhf_jax.types import Comparisons, Demonstrations, Feedback, Params, TrainState

RL = {module.__name__.rpartition(".")[2]: completed(module) for module in (ppo, vpg, rloo, grpo)}
RL["distill"] = completed(distill)
DTYPES = ("float32", "bfloat16", "float16", "float64")  # of files of weights
PAIRS = ("reward_model", "dpo")  # two answers in each row
# The phases with a loop over tokens.
SAMPLING = "sample and score"
ANSWERING = "answer at validations"
COMPARING = "compare answers"  # the phase of their log-ratios
Program = tuple[Any, ...]  # a function, its arguments


class Shapes(NamedTuple):
    """What a stage has on its devices, with shapes in place of arrays."""

    held: dict[str, Any]  # {name: tree}
    programs: dict[str, Program]  # by phase
    known: dict[str, Any]  # {name: tree} of arrays inside the programs


class ShapesLayout(Layout):
    """A layout that makes shapes, with their shardings, in place of parameters. Its programs are
    not jitted, so that they can be compiled for other devices.
    """

    def jit(
        self, program: Callable[..., Any], num_blocks: int = 0, **options: Any
    ) -> Callable[..., Any]:
        return program

    def jit_update(self, update: Callable[..., Any], num_blocks: int) -> Callable[..., Any]:
        # A function of its own, whose arguments are not mixed with those that ``update`` binds.
        return lambda *args, **options: update(*args, **options)

    def put(self, tree: Any) -> Any:
        return laid_out_shapes(self.mesh, tree)

    def copy(self, tree: Any) -> Any:
        return tree

    def make(self, make: Callable[..., Any], *trees: Any) -> Any:
        return self.put(jax.eval_shape(make, *trees))

    def create(self, create: Callable[..., Any], params: Params) -> Any:
        return self.make(create, params)


class PlannedRun(OpenRun):
    """A run without a folder."""

    def decide(self, **sections: Any) -> OpenRun:
        return self.change(**sections)


@dataclasses.dataclass(frozen=True)
class Case:
    """A stage that is planned for JAX's CPU devices in float32, or for other ``devices``, such as
    accelerators that are not here, as a run on them computes.
    """

    config: RunConfig
    name: str
    devices: Sequence[jax.Device] | None = None

    @property
    def own(self) -> Any:
        """The section of the stage."""
        return getattr(self.config, self.name)

    @property
    def settings(self) -> Any:
        """The section with its data and its batch size."""
        return self.config.rl if self.name in RL else self.own

    @functools.cached_property
    def mesh(self) -> Mesh:
        if self.devices is None:
            return layout.mesh_of(self.config.mesh)
        return sharding.make_mesh(**self.config.mesh.axes, devices=self.devices)

    @property
    def num_answers(self) -> int:
        """The answers of a comparison that compute their prompt once; 0: none do."""
        return 2 * (self.name in PAIRS and self.config.compute.share_prompts is True)

    @functools.cached_property
    def run(self) -> PlannedRun:
        """The run that makes shapes in place of arrays. What lies in the host's memory is counted
        by ``plan.plan``.
        """
        compute = dataclasses.replace(self.config.compute, offload=())
        config = dataclasses.replace(self.config, compute=compute)
        folder: Any = None
        return PlannedRun(self.name, folder, config, ShapesLayout(self.mesh))

    def in_mesh(self) -> contextlib.AbstractContextManager[Any]:
        """Sets the mesh, by which networks know what platform they are for."""
        is_needed = self.devices is not None or sharding.is_set(self.mesh)
        return jax.set_mesh(self.mesh) if is_needed else contextlib.nullcontext()

    def inputs(self, tree: Any) -> Any:
        """The shapes as a program gets them: on a CPU with float32 in place of shorter floats."""

        def widened(x: Any) -> Any:
            if getattr(x, "dtype", None) not in (jnp.bfloat16, jnp.float16):
                return x
            return jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding)

        return jax.tree.map(widened, tree) if self.devices is None else tree

    def batch(self, shape: tuple[int, ...], dtype: Any = jnp.int32) -> Any:
        """An array of a batch, its rows over the devices."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.rows(self.mesh))

    def spread(self, tree: Any) -> Any:
        """The shapes of a batch, its rows over the devices."""
        return jax.tree.map(lambda x: self.batch(x.shape, x.dtype), tree)

    def columns(self, model: models.Model, length: int | None) -> int:
        """The columns of a row of texts, by default the most that the model reads."""
        most = (self.num_answers or 1) * model.config.max_length
        if (length or most) > most:
            raise UserError(
                f"rlhf-jax plan: rows of {length} tokens are longer than the {most} that the model "
                "reads"
            )
        return length or most

    def method(self, prompt: int) -> Method:
        """How the policy learns from responses to prompts of so many columns."""
        config = self.config
        wanted = config.compute.share_prompts
        on = Layout(self.mesh)
        answers = Answers(self.name, self.own, config.rl, wanted, prompt, True, on)
        method = method_of(config, RL[self.name], self.own)
        return method._replace(shared_by=answers.group_size())

    def policy(self) -> LanguageModel:
        """The model that is trained, the shapes of its parameters as ``lora.base`` says."""
        begun = self.language_model(self.config.model)
        base = functools.partial(initial.base_of, self.config.lora)
        return begun._replace(params=jax.eval_shape(base, begun.params))

    def language_model(self, source: str | None) -> LanguageModel:
        """A model with a tokenizer that knows nothing but its special tokens, and the shapes of its
        parameters in the dtype that config.json names.
        """
        dtype = "float32"
        if source is None:
            network = dataclasses.asdict(self.config.network)
            del network["dropout"]
            config: Any = models.GPT2Config(self.config.tokenizer.vocab_size, **network)
        else:
            folder = hf.find_folder(hf.model_folder(source))
            config = hf.read_config(folder)
            keys = hf.read_json(folder / hf.CONFIG)
            dtype = keys.get("dtype") or keys.get("torch_dtype") or dtype
            if dtype not in DTYPES:
                raise UserError(
                    f"{folder / hf.CONFIG}: dtype is {dtype!r}, expected {', '.join(DTYPES)}"
                )
        compute = initial.by_depth(self.config.compute, config.num_layers)
        attention = compute.attention
        if self.devices is None and attention not in ("auto", "xla"):
            attention = "blockwise"  # the others do not run on a CPU
        config = dataclasses.replace(
            config,
            attention=attention,
            remat=compute.remat is True,
            scan_layers=compute.scan_layers,
            compute_dtype="float32" if self.devices is None else compute.dtype,
        )
        model = models.build(config)
        params = jax.eval_shape(model.init, jax.random.key(0))
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), params)
        tokenizer: Any = types.SimpleNamespace(eos_ids=0, pad_id=1)
        return LanguageModel(model, params, tokenizer)


def shapes_of(
    config: RunConfig,
    name: str,
    length: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Shapes:
    """The arrays on the devices and the programs of a stage.

    Args:
        length: tokens of a row, or of a prompt in RL; None: the most that the model reads, or
            ``rl.max_prompt_length``.
        devices: as in ``Case``.

    Raises:
        UserError: no such stage, no length of prompts, an ensemble to be trained, a length that the
            model cannot read, a mesh or microbatches that do not fit; or as the run itself.
    """
    stages = (*TASKS, *RL)
    if name not in stages:
        raise UserError(f"rlhf-jax plan: no stage {name!r}; there are {', '.join(stages)}")
    own = config.reward_model
    if name == "reward_model" and (own.ensemble_size > 1 or own.steps):
        raise UserError(
            "rlhf-jax plan: reward_model.ensemble_size must be 1 and steps false; members take as "
            "much each, save the base"
        )
    if config.compute.blocks or config.mesh.sampling:
        raise UserError(
            "rlhf-jax plan: compute.blocks and mesh.sampling are not planned; leave them out"
        )
    case = Case(config, name, devices)
    layout.check(model_source(config), case.mesh)
    layout.check_divides(
        "rl.batch_size" if name in RL else f"{name}.batch_size",
        case.settings.batch_size,
        {"devices": sharding.num_parts(case.mesh)},
        {
            f"{name}.{key}": getattr(case.own, key, 1)
            for key in ("num_minibatches", "num_microbatches")
        },
    )
    return _reinforcement(case, length) if name in RL else _supervised(case, length)


def _supervised(case: Case, length: int | None) -> Shapes:
    job = _job(case)
    learner = TASKS[case.name].prepare(job)
    state = first_state(job, learner)
    update = learner.update  # with the functions of the model bound

    def learn(state: Any, batch: Any, key: Array, functions: dict[str, Any]) -> Any:
        return update.func(state, batch, key, **functions)

    columns = case.columns(job.language_model.model, length)
    key = jax.eval_shape(jax.random.key, 0)
    programs: dict[str, Program] = {
        "learn": (learn, state, _texts(case, columns), key, update.keywords)
    }
    if TASKS[case.name].is_policy:
        programs |= _answering(case, job, learner, columns, state, key)
    return Shapes(_held(case.run, state), programs, {})


def _job(case: Case) -> Job:
    """The job of a run whose data has no rows yet."""
    none = np.zeros(0, np.int64)
    answers = 2 if case.name in PAIRS else 1
    starts = np.zeros((0, answers), np.int64)
    texts: list[list[np.ndarray]] = [[] for _ in range(answers)]
    shares = case.num_answers > 0
    policy = case.policy()
    size = rates.size_of(case.config.lora, policy.params)
    return Job(
        run=case.run,
        settings=case.own,
        source=model_source(case.config),
        language_model=policy,
        rows=[],
        encoded=EncodedTexts(
            texts, starts, [], [], 0, None, {}, none, none, targets=starts, shares_prompts=shares
        ),
        train_rows=none,
        held_out=none,
        plan=batches.Plan(np.ones(1), case.own.batch_size, jax.random.key(0)),
        collate=lambda encoded, rows: None,
        bucket_multiple=1,
        num_steps=1,
        optimizer=make_optimizer(rates.with_rate(case.name, case.own.optimizer, size), 1),
    )


def _texts(case: Case, length: int) -> Any:
    """A batch of texts."""
    rows = case.own.batch_size
    is_pair = case.name in PAIRS
    tokens = case.batch((rows, 2, length) if is_pair and not case.num_answers else (rows, length))
    if is_pair:
        documents = case.batch((rows, 1, case.num_answers)) if case.num_answers else None
        return Comparisons(tokens, tokens, tokens, documents=documents)
    if case.name == "sft":
        return Demonstrations(tokens, tokens, tokens)
    return Feedback(tokens, tokens, tokens, case.batch((rows,)))


def _answering(
    case: Case, job: Job, learner: Learner, columns: int, state: TrainState, key: Array
) -> dict[str, Program]:
    """The programs of the answers in samples.jsonl, if there are any. A prompt may be as long as a
    row, or as the model leaves room for.
    """
    settings = case.own
    width = min(columns, job.language_model.model.config.max_length - settings.max_new_tokens)
    if not (settings.validation_prompts and width > 0):
        return {}
    policy = samples.Policy(
        job.language_model, learner.start, learner.fn, learner.reference, job.num_answers
    )
    config = samples.greedy_config(settings, policy.begun.tokenizer)

    def answer(state: Any, prompts: Any, key: Array, base: Any) -> Any:
        inputs = (samples.sampling_params(state, base), *prompts, key)
        return sampling.generate(policy.begun.model, *inputs, config=config, mesh=case.mesh)

    parts = sharding.num_parts(case.mesh)
    rows = -(-settings.validation_prompts // parts) * parts
    prompts = (case.batch((rows, width)),) * 2
    programs: dict[str, Program] = {ANSWERING: (answer, state, prompts, key, policy.start.base)}
    ratios: Any = samples.compile_log_ratios(job.run.layout, policy)
    if ratios is not None:

        def compare(state: Any, text: Any, functions: dict[str, Any]) -> Any:
            return ratios.func(state, text, **functions)

        text = (case.batch((rows, width + settings.max_new_tokens)),) * 3
        programs[COMPARING] = (compare, state, text, ratios.keywords)
    return programs


def _reinforcement(case: Case, length: int | None) -> Shapes:
    settings = case.config.rl
    begun = case.policy()
    prompt = prompt_columns(settings, length)
    columns = prompt + settings.max_new_tokens
    case.columns(begun.model, columns)  # or an error
    method = case.method(prompt)
    teacher = _teacher(case)
    source = None if method.value_source is None else case.language_model(method.value_source)
    _, method = choose_rate(case.run, method, begun.params)
    networks = networks_of(case.run, begun, method, source, teacher)
    sizes = Sizes(settings.batch_size, columns, prompts=settings.batch_size)  # or more
    state = first_state_of_rl(case.run, method, networks, sizes)
    run = compiled(case.run, begun, method, networks.optimizer)
    functions = networks.functions

    def collect(
        state: Any, prompts: Any, key: Array, functions: iteration.Functions, base: Any
    ) -> Any:
        sampled = run.respond(iteration.sampling_params(state, base), prompts, key)
        sampled = dataclasses.replace(sampled, group_size=method.shared_by)
        return run.rescored(state, sampled, functions)

    tokens = case.batch((settings.batch_size, prompt))
    prompts = iteration.Prompts(tokens, tokens, case.batch((settings.batch_size,)))
    key = jax.eval_shape(jax.random.key, 0)
    inputs = (state, prompts, key, functions, networks.start.base)
    with case.in_mesh():
        collected, _ = jax.eval_shape(collect, *case.inputs(inputs))
    rollout = case.spread(collected)
    if case.own.needs_teacher and teacher is None:
        rollout = dataclasses.replace(rollout, teacher_log_probs=rollout.log_probs)
    programs: dict[str, Program] = {SAMPLING: (collect, *inputs)}
    reward = laid_out_shapes(case.mesh, _reward(case, method, teacher))
    if reward is not None:
        rewarded = iteration.Functions(None, reward_fn=reward)
        programs["reward"] = (run.reward, rollout, rewarded)
    scores = case.batch((settings.batch_size,), jnp.float32)
    of_kind = {"row": scores, "token": rollout.log_probs}
    scored = dataclasses.replace(
        rollout,
        scores=scores,
        extras={name: of_kind[kind] for name, kind in case.own.extras.items()} or None,
        greedy_rewards=scores if case.own.baseline == "greedy" else None,
    )
    programs["learn"] = (run.learn, state, scored, key, functions)
    held = _held(case.run, state.train)
    held["teacher"] = case.run.held["teacher"]
    held["reward models"] = reward if case.config.reward else None
    held["policy that samples"] = case.run.held["policy that samples"]
    cache = jax.eval_shape(
        lambda: sampling.decoding.cache_of(
            begun.model,
            num_rows=settings.batch_size,
            prompt_length=prompt,
            num_slots=settings.max_new_tokens,
            group_size=method.shared_by,
        )
    )
    return Shapes(held, programs, {"cache": case.spread(cache)})


def _held(run: OpenRun, state: TrainState) -> dict[str, Any]:
    """What the models and the optimizer hold."""
    return {
        "parameters": state.params,
        "optimizer": state.opt_state,
        "frozen weights": run.held["frozen weights"],
        "reference": run.held["moving reference"] or run.held["reference"],
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

    def load(source: str) -> spec.RewardModel:
        model, params, _ = case.language_model(source)
        score_fn, in_groups = reward_models.scorers(model, rows, closing=(0,), ends=(0,))
        key = jax.random.key(0)
        shapes = jax.eval_shape(lambda params: models.add_head(key, params, "score"), params)
        return spec.RewardModel(score_fn, shapes, "", in_groups=in_groups)

    tokenizer: Any = types.SimpleNamespace(fingerprint="", encode=lambda text: [0], decode_raw=repr)
    columns = ("answer", "gym")  # that ``math`` and ``gym:TASK`` ask of the data
    return spec.build_reward(entries, tokenizer=tokenizer, load=load, columns=columns).fn


def _teacher(case: Case) -> LanguageModel | None:
    """The teacher of a distillation with its parameters as shapes; None if there is none, or if it
    is on a server.
    """
    if not case.own.needs_teacher or case.own.teacher_server is not None:
        return None
    if case.own.teacher is None:
        raise UserError("rlhf-jax plan: no teacher; give --distill.teacher")
    teacher = case.language_model(case.own.teacher)
    return teacher._replace(params=laid_out_shapes(case.mesh, teacher.params))


def prompt_columns(settings: RLStage, length: int | None) -> int:
    """The columns of the longest prompt.

    Raises:
        UserError: nobody knows.
    """
    prompt = length or settings.max_prompt_length
    if prompt is None:
        raise UserError(
            "rlhf-jax plan: nobody knows the longest prompt; give --data FILE, --length or "
            "--rl.max-prompt-length"
        )
    return prompt
