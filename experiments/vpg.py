"""Vanilla policy gradient (REINFORCE with a running-mean baseline) on prompts and a reward.

For a first look, on generated data:

    python experiments/vpg.py --config configs/tiny.yaml
"""

from rlhf_jax import cli, training, vpg

main = cli.stage(lambda config: training.rl.run(config, vpg), __doc__)

if __name__ == "__main__":
    cli.run_script(main)
