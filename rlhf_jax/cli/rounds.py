"""``rlhf-jax rounds``: feedback and training in turns."""

from collections.abc import Sequence

from rlhf_jax.cli.stages import RL
from rlhf_jax.errors import logger

SECTIONS = (*RL, "reward_model", "ppo", "rounds")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs all rounds with the settings of a command line (``sys.argv[1:]`` by default)."""
    from rlhf_jax import config
    from rlhf_jax.inference import rounds
    from rlhf_jax.report import verdict

    settings = config.parse(
        config.RunConfig,
        argv,
        prog="rlhf-jax rounds",
        description="Compare answers, train a reward model on them, train the policy on it, again.",
        sections=SECTIONS,
    )
    result = rounds.run(settings)
    commands = verdict.next_commands("policy", result.rounds[-1].rl)
    logger.info("\n    ".join([f"The page: {result.folder}/report.html", "Next:", *commands]))
