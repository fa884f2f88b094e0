"""Distillation: a policy learns on its own samples what a teacher says, with or without a reward.

For a first look, with the model of another run as the teacher:

    python experiments/sft.py --config configs/tiny.yaml --output-dir runs/sft
    python experiments/distill.py --config configs/tiny.yaml --model runs/sft \\
        --distill.teacher runs/sft
"""

import functools

from rlhf_jax import cli

main = functools.partial(cli.train, "distill")

if __name__ == "__main__":
    cli.run_script(main)
