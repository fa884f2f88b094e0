"""PPO with a KL penalty on prompts and a reward.

For a first look, on generated data:

    python experiments/ppo.py --config configs/tiny.yaml
"""

from rlhf_jax import cli, ppo, training

main = cli.stage(lambda config: training.rl.run(config, ppo), __doc__)

if __name__ == "__main__":
    cli.run_script(main)
