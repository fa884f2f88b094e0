"""RLOO, each of several answers to a prompt against the others, on prompts and a reward.

For a first look, on generated data:

    python experiments/rloo.py --config configs/tiny.yaml
"""

from rlhf_jax import cli, rloo, training
from rlhf_jax.config import RunConfig, parse


def main() -> None:
    training.rl.run(parse(RunConfig, description=__doc__), rloo)


if __name__ == "__main__":
    cli.run_script(main)
