"""Vanilla policy gradient (REINFORCE with a running-mean baseline) on prompts and a reward.

For a first look, on generated data:

    python experiments/vpg.py --config configs/tiny.yaml
"""

from rlhf_jax import cli, training, vpg

if __name__ == "__main__":
    cli.run_stage(lambda config: training.rl.run(config, vpg), __doc__)
