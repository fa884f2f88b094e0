"""DPO: a policy from preference pairs, without a reward model and without sampling.

For a first look, on generated data:

    python experiments/dpo.py --config configs/tiny.yaml
"""

from rlhf_jax import cli, training

main = cli.stage(training.dpo.run, __doc__)

if __name__ == "__main__":
    cli.run_script(main)
