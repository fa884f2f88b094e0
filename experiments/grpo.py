"""GRPO, rewards normalised among several answers to a prompt, on prompts and a reward.

For a first look, on generated data:

    python experiments/grpo.py --config configs/tiny.yaml
"""

from rlhf_jax import cli, grpo, training
from rlhf_jax.config import RunConfig, parse


def main() -> None:
    training.rl.run(parse(RunConfig, description=__doc__), grpo)


if __name__ == "__main__":
    cli.run_script(main)
