"""RLOO, each of several answers to a prompt against the others, on prompts and a reward.

For a first look, on generated data:

    python experiments/rloo.py --config configs/tiny.yaml
"""

from rlhf_jax import flags, rloo, training
from rlhf_jax.config import RunConfig


def main() -> None:
    training.rl.run(flags.parse(RunConfig, description=__doc__), rloo)


if __name__ == "__main__":
    flags.run_script(main)
