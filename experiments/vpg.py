"""Vanilla policy gradient (REINFORCE with a running-mean baseline) on prompts and a reward.

For a first look, on generated data:

    python experiments/vpg.py --config configs/tiny.yaml
"""

from rlhf_jax import cli, training, vpg
from rlhf_jax.config import RunConfig, parse


def main() -> None:
    training.rl.run(parse(RunConfig, description=__doc__), vpg)


if __name__ == "__main__":
    cli.run_script(main)
