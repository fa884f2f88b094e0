"""Supervised fine-tuning of GPT-2 on demonstrations {prompt, response}.

For a first look, on generated data:

    python experiments/sft.py --config configs/tiny.yaml
"""

from rlhf_jax import cli, training

main = cli.stage(training.sft.run, __doc__)

if __name__ == "__main__":
    cli.run_script(main)
