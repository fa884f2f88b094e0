"""A reward model from preference pairs {prompt, chosen, rejected}.

For a first look, on generated data:

    python experiments/reward_model.py --config configs/tiny.yaml
"""

from rlhf_jax import flags, training
from rlhf_jax.config import RunConfig


def main() -> None:
    training.reward_model.run(flags.parse(RunConfig, description=__doc__))


if __name__ == "__main__":
    flags.run_script(main)
