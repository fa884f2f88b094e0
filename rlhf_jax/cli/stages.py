"""The commands that train, with the settings of a command line; and what they can be given."""

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf_jax.errors import logger

if TYPE_CHECKING:  # it needs JAX
    from rlhf_jax.types import Algorithm

MODEL = ("network", "compute", "mesh", "lora", "tokenizer", "text")
SAMPLES = ("rl.max_prompt_length", "rl.max_new_tokens", "rl.temperature")
RL = (*MODEL, "rl", "safety", "judge", "engine")
REWARD = (*RL, "reward")


class TrainingCommand(NamedTuple):
    """A command that trains."""

    summary: str
    reads: tuple[str, ...]
    """What it reads of a RunConfig beside the section of its own name."""


STAGES = {
    "sft": TrainingCommand("a language model on demonstrations {prompt, response}", MODEL),
    "reward-model": TrainingCommand("a reward model on preferences", (*MODEL, *SAMPLES)),
    "ppo": TrainingCommand("a policy by PPO, on prompts and a reward", REWARD),
    "grpo": TrainingCommand("by GRPO: rewards normalised among answers to a prompt", REWARD),
    "rloo": TrainingCommand("by RLOO: each answer to a prompt against the others", REWARD),
    "vpg": TrainingCommand("by REINFORCE with a running-mean baseline", REWARD),
    "distill": TrainingCommand("to say on its own samples what a teacher says", REWARD),
    "dpo": TrainingCommand("a policy on preferences, without samples", MODEL),
    "kto": TrainingCommand("a policy on answers called desirable or not", MODEL),
    "pipeline": TrainingCommand(
        "SFT, a reward model and PPO, one after the other", (*RL, "sft", "reward_model", "ppo")
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
        sections=(*stage.reads, kind),
    )
    result: Any
    if name in config.ALGORITHMS:
        kind = "policy"
        result = training.rl.run(settings, importlib.import_module(f"rlhf_jax.algorithms.{name}"))
    else:
        result = getattr(training, kind).run(settings)
    if name == "pipeline":
        kind = "policy"
        result = result.ppo
    from rlhf_jax.report import verdict

    commands = verdict.next_commands(kind, result.folder)
    logger.info("\n    ".join(["Next, for example:", *commands]))


def train_algorithm(
    algorithm: "Algorithm", argv: Sequence[str] | None = None, **parts: Any
) -> None:
    """Runs your own algorithm, a module, with the settings of a command line: those of any RL
    stage, and its ``Config`` as flags (``--vapo.alpha 0.1``) or as a section of a YAML file.

    Args:
        argv: ``sys.argv[1:]`` by default.
        parts: what else ``training.rl.run`` takes, such as ``reward``.
    """
    from rlhf_jax import config, training

    settings = config.parse(
        config.RunConfig,
        argv,
        description=summary(algorithm),
        sections=(*REWARD, config.section_name(algorithm)),
        algorithm=algorithm,
    )
    training.rl.run(settings, algorithm, **parts)


def summary(documented: object) -> str:
    """The first paragraph of a docstring."""
    return (documented.__doc__ or "").partition("\n\n")[0]
