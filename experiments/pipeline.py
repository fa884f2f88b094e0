"""All three stages from one YAML: SFT, a reward model, PPO.

    python experiments/pipeline.py --config configs/pipeline.yaml --data FOLDER

FOLDER holds sft_data.json, preference_data.json and prompts.json.
"""

import functools

from rlhf_jax import cli

main = functools.partial(cli.train, "pipeline")

if __name__ == "__main__":
    cli.run_script(main)
