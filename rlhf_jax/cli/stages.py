"""The commands that train, with the settings of a command line; and what they can be given."""

import importlib
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf_jax.errors import logger

if TYPE_CHECKING:  # it needs JAX
    from rlhf_jax.types import Algorithm

MODEL = ("network", "compute", "mesh", "lora", "tokenizer", "text")
SAMPLES = ("rl.max_prompt_length", "rl.max_new_tokens", "rl.temperature")
RL = (*MODEL, "rl", "safety", "judge", "engine")
REWARD = (*RL, "reward")


RL_LENGTHS = (
    "rl.num_iterations",
    "rl.batch_size",
    "rl.max_new_tokens",
    "rl.optimizer.learning_rate",
)
FOLDERS = ("data", "model", "output_dir")
RL_FIRST = (*FOLDERS, "reward", *RL_LENGTHS)
PIPELINE_FIRST = ("sft.num_epochs", "reward_model.num_epochs", *RL_LENGTHS)


class TrainingCommand(NamedTuple):
    """A command that trains."""

    summary: str
    reads: tuple[str, ...]
    """What it reads of a RunConfig beside the section of its own name."""
    first: tuple[str, ...]
    """What matters most beside --config, for ``--help``."""
    given: str
    """The flags of a run on data of one's own, beside the folders of the model and of the run."""


def _supervised_first(section: str) -> tuple[str, ...]:
    of_stage = (
        f"{section}.{key}" for key in ("num_epochs", "batch_size", "optimizer.learning_rate")
    )
    return (*FOLDERS, *of_stage, "text.max_length", "lora.rank", "resume")


PROMPTS = "--data prompts.jsonl --reward rewards.py:score"
STAGES = {
    "sft": TrainingCommand(
        "a language model on demonstrations {prompt, response}",
        MODEL,
        _supervised_first("sft"),
        "--data rows.jsonl",
    ),
    "reward-model": TrainingCommand(
        "a reward model on preferences",
        (*MODEL, *SAMPLES),
        _supervised_first("reward_model"),
        "--data pairs.jsonl",
    ),
    "ppo": TrainingCommand(
        "a policy by PPO, on prompts and a reward", REWARD, (*RL_FIRST, "rl.kl_coef"), PROMPTS
    ),
    "grpo": TrainingCommand(
        "by GRPO: rewards normalised among answers to a prompt",
        REWARD,
        (*RL_FIRST, "grpo.group_size"),
        PROMPTS,
    ),
    "rloo": TrainingCommand(
        "by RLOO: each answer to a prompt against the others",
        REWARD,
        (*RL_FIRST, "rloo.group_size"),
        PROMPTS,
    ),
    "vpg": TrainingCommand(
        "by REINFORCE with a running-mean baseline", REWARD, (*RL_FIRST, "rl.kl_coef"), PROMPTS
    ),
    "distill": TrainingCommand(
        "to say on its own samples what a teacher says",
        REWARD,
        (*RL_FIRST, "distill.teacher"),
        "--data prompts.jsonl --distill.teacher LARGE",
    ),
    "dpo": TrainingCommand(
        "a policy on preferences, without samples",
        MODEL,
        _supervised_first("dpo"),
        "--data pairs.jsonl",
    ),
    "kto": TrainingCommand(
        "a policy on answers called desirable or not",
        MODEL,
        _supervised_first("kto"),
        "--data rows.jsonl",
    ),
    "pipeline": TrainingCommand(
        "SFT, a reward model and PPO, one after the other",
        (*RL, "sft", "reward_model", "ppo"),
        (*FOLDERS, *PIPELINE_FIRST),
        "--data FOLDER",
    ),
}


def train(name: str, argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Runs the stage of that name with the settings of a command line (``sys.argv[1:]`` by
    default).
    """
    from rlhf_jax import config, training

    stage = STAGES[name]
    kind = name.replace("-", "_")
    settings = config.parse(
        config.RunConfig,
        argv,
        prog=prog,
        description=f"Train {stage.summary}.",
        examples=(
            f"rlhf-jax {name} --config tiny --output-dir runs/{name}",
            f"rlhf-jax {name} --model MODEL {stage.given} --output-dir runs/mine",
        ),
        first=stage.first,
        sections=(*stage.reads, kind),
    )
    result: Any
    if (algorithm := find_algorithm(name)) is not None:
        kind = "policy"
        result = training.rl.run(settings, algorithm)
    else:
        result = getattr(training, kind).run(settings)
    if name == "pipeline":
        kind = "policy"
        result = result.ppo
    from rlhf_jax.report import verdict

    commands = verdict.next_commands(kind, result.folder)
    logger.info("\n    ".join(["Next, for example:", *commands]))


def find_method(name: str) -> "Algorithm | None":
    """The module of ``rlhf_jax.algorithms`` with this name that learns from rollouts and is no
    stage, such as ``maxrl``; None if there is none.
    """
    module_name = f"rlhf_jax.algorithms.{name.replace('-', '_')}"
    is_name = re.fullmatch(r"[a-z][a-z0-9_-]*", name) and name.replace("_", "-") not in STAGES
    if not is_name or importlib.util.find_spec(module_name) is None:
        return None
    module: Any = importlib.import_module(module_name)
    return module if hasattr(module, "Config") and hasattr(module, "update") else None


def find_algorithm(stage: str) -> "Algorithm | None":
    """The module of this package with the algorithm of an RL run, by its stage, or None."""
    from rlhf_jax import config

    if stage in config.ALGORITHMS:
        return importlib.import_module(f"rlhf_jax.algorithms.{stage}")
    return find_method(stage)


def method_names() -> list[str]:
    """The names that ``find_method`` knows."""
    files = sorted(Path(__file__).parents[1].glob("algorithms/*.py"))
    return [file.stem for file in files if find_method(file.stem) is not None]


def train_algorithm(
    algorithm: "Algorithm",
    argv: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    **parts: Any,
) -> None:
    """Runs your own algorithm, a module, with the settings of a command line: those of any RL
    stage, and its ``Config`` as flags (``--vapo.alpha 0.1``) or as a section of a YAML file.

    Args:
        argv: ``sys.argv[1:]`` by default.
        prog: the name of the command in messages.
        parts: what else ``training.rl.run`` takes, such as ``reward``.
    """
    from rlhf_jax import config, training

    settings = config.parse(
        config.RunConfig,
        argv,
        prog=prog,
        description=summary(algorithm),
        first=RL_FIRST,
        sections=(*REWARD, config.section_name(algorithm)),
        algorithm=algorithm,
    )
    training.rl.run(settings, algorithm, **parts)


def summary(documented: object) -> str:
    """The first paragraph of a docstring."""
    return (documented.__doc__ or "").partition("\n\n")[0]
