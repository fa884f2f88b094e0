"""GRPO, rewards normalised among several answers to a prompt, on prompts and a reward.

For a first look, on generated data:

    python experiments/grpo.py --config configs/tiny.yaml
"""

import functools

from rlhf_jax import cli

main = functools.partial(cli.train, "grpo")

if __name__ == "__main__":
    cli.run_script(main)
