"""A reward model from preference pairs {prompt, chosen, rejected}.

For a first look, on generated data:

    python experiments/reward_model.py --config configs/tiny.yaml
"""

from rlhf_jax import cli, training
from rlhf_jax.config import RunConfig, parse


def main() -> None:
    training.reward_model.run(parse(RunConfig, description=__doc__))


if __name__ == "__main__":
    cli.run_script(main)
