"""Vanilla policy gradient (REINFORCE with a running-mean baseline) on prompts and a reward.

For a first look, on generated data:

    python experiments/vpg.py --config configs/tiny.yaml
"""

from rlhf_jax import flags, training, vpg
from rlhf_jax.config import RunConfig


def main() -> None:
    training.rl.run(flags.parse(RunConfig, description=__doc__), vpg)


if __name__ == "__main__":
    flags.run_script(main)
