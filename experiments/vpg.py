"""Vanilla policy gradient (REINFORCE with a running-mean baseline) on prompts and a reward.

For a first look, on generated data:

    python experiments/vpg.py --config configs/tiny.yaml
"""

import functools

from rlhf_jax import cli

main = functools.partial(cli.train, "vpg")

if __name__ == "__main__":
    cli.run_script(main)
