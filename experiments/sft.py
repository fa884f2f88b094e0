"""Supervised fine-tuning of GPT-2 on demonstrations {prompt, response}.

For a first look, on generated data:

    python experiments/sft.py --config configs/tiny.yaml
"""

import functools

from rlhf_jax import cli

main = functools.partial(cli.train, "sft")

if __name__ == "__main__":
    cli.run_script(main)
