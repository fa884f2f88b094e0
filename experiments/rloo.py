"""RLOO, each of several answers to a prompt against the others, on prompts and a reward.

For a first look, on generated data:

    python experiments/rloo.py --config configs/tiny.yaml
"""

import functools

from rlhf_jax import cli

main = functools.partial(cli.train, "rloo")

if __name__ == "__main__":
    cli.run_script(main)
