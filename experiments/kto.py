"""KTO: a policy from single answers called desirable or not, without a reward model and without
sampling.

For a first look, on generated data:

    python experiments/kto.py --config configs/tiny.yaml
"""

import functools

from rlhf_jax import cli

main = functools.partial(cli.train, "kto")

if __name__ == "__main__":
    cli.run_script(main)
