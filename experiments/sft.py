"""Supervised fine-tuning of GPT-2 on demonstrations {prompt, response}.

For a first look, on generated data:

    python experiments/sft.py --config configs/tiny.yaml
"""

from rlhf_jax import flags, training
from rlhf_jax.config import RunConfig


def main() -> None:
    training.sft.run(flags.parse(RunConfig, description=__doc__))


if __name__ == "__main__":
    flags.run_script(main)
