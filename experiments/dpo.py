"""DPO: a policy from preference pairs, without a reward model and without sampling.

For a first look, on generated data:

    python experiments/dpo.py --config configs/tiny.yaml
"""

import functools

from rlhf_jax import cli

main = functools.partial(cli.train, "dpo")

if __name__ == "__main__":
    cli.run_script(main)
