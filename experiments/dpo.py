"""DPO: a policy from preference pairs, without a reward model and without sampling.

For a first look, on generated data:

    python experiments/dpo.py --config configs/tiny.yaml
"""

from rlhf_jax import cli, training
from rlhf_jax.config import RunConfig, parse


def main() -> None:
    training.dpo.run(parse(RunConfig, description=__doc__))


if __name__ == "__main__":
    cli.run_script(main)
