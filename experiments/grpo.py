"""GRPO, rewards normalised among several answers to a prompt, on prompts and a reward.

For a first look, on generated data:

    python experiments/grpo.py --config configs/tiny.yaml
"""

from rlhf_jax import cli, grpo, training

main = cli.stage(lambda config: training.rl.run(config, grpo), __doc__)

if __name__ == "__main__":
    cli.run_script(main)
