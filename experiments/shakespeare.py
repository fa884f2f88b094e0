"""A policy learns to say nothing but 'h', as in jRLHF's Shakespeare job, in under ten minutes on two CPU cores.

    python experiments/shakespeare.py                     # fetches the text, 1.1 MB
    python experiments/shakespeare.py --data input.txt    # any text of yours

Pretrains a character GPT-2, trains a reward model that counts, runs policy gradient against the exact count and against
the reward model; prints a table and writes runs/shakespeare/.
"""

import sys
from pathlib import Path

from rlhf_jax import cli
from rlhf_jax.config import parse
from rlhf_jax.training import shakespeare

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "shakespeare.yaml"


def main() -> None:
    argv = ["--config", str(CONFIG), *sys.argv[1:]]
    shakespeare.run(parse(shakespeare.ShakespeareConfig, argv, description=__doc__))


if __name__ == "__main__":
    cli.run_script(main)
