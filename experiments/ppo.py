"""PPO with a KL penalty on prompts and a reward.

For a first look, on generated data:

    python experiments/ppo.py --config configs/tiny.yaml
"""

from rlhf_jax import cli, ppo, training

if __name__ == "__main__":
    cli.run_stage(lambda config: training.rl.run(config, ppo), __doc__)
