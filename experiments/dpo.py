"""DPO: a policy from preference pairs, without a reward model and without sampling.

For a first look, on generated data:

    python experiments/dpo.py --config configs/tiny.yaml
"""

from rlhf_jax import flags, training
from rlhf_jax.config import RunConfig


def main() -> None:
    training.dpo.run(flags.parse(RunConfig, description=__doc__))


if __name__ == "__main__":
    flags.run_script(main)
