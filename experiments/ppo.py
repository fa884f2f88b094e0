"""PPO with a KL penalty on prompts and a reward.

For a first look, on generated data:

    python experiments/ppo.py --config configs/tiny.yaml
"""

from rlhf_jax import cli, ppo, training
from rlhf_jax.config import RunConfig, parse


def main() -> None:
    training.rl.run(parse(RunConfig, description=__doc__), ppo)


if __name__ == "__main__":
    cli.run_script(main)
