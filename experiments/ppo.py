"""PPO with a KL penalty on prompts and a reward.

For a first look, on generated data:

    python experiments/ppo.py --config configs/tiny.yaml
"""

import functools

from rlhf_jax import cli

main = functools.partial(cli.train, "ppo")

if __name__ == "__main__":
    cli.run_script(main)
