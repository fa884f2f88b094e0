"""A reward model from preference pairs {prompt, chosen, rejected}.

For a first look, on generated data:

    python experiments/reward_model.py --config configs/tiny.yaml
"""

import functools

from rlhf_jax import cli

main = functools.partial(cli.train, "reward-model")

if __name__ == "__main__":
    cli.run_script(main)
