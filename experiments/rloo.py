"""RLOO, each of several answers to a prompt against the others, on prompts and a reward.

For a first look, on generated data:

    python experiments/rloo.py --config configs/tiny.yaml
"""

from rlhf_jax import cli, rloo, training

main = cli.stage(lambda config: training.rl.run(config, rloo), __doc__)

if __name__ == "__main__":
    cli.run_script(main)
