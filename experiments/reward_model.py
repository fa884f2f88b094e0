"""A reward model from preference pairs {prompt, chosen, rejected}.

For a first look, on generated data:

    python experiments/reward_model.py --config configs/tiny.yaml
"""

from rlhf_jax import cli, training

main = cli.stage(training.reward_model.run, __doc__)

if __name__ == "__main__":
    cli.run_script(main)
