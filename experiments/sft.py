"""Supervised fine-tuning of GPT-2 on demonstrations {prompt, response}.

For a first look, on generated data:

    python experiments/sft.py --config configs/tiny.yaml
"""

from rlhf_jax import cli, training
from rlhf_jax.config import RunConfig, parse


def main() -> None:
    training.sft.run(parse(RunConfig, description=__doc__))


if __name__ == "__main__":
    cli.run_script(main)
