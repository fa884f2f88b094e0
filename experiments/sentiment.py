"""Continuations of stories grow more positive: score against KL for every algorithm, on two CPU cores.

    python experiments/sentiment.py --model PATH --lexicon vader_lexicon.txt

The first experiment of "Fine-Tuning Language Models from Human Preferences" (Ziegler et al. 2019) in miniature. PATH is
a Hugging Face folder, or holds stories260K.bin and tok512.bin, the small Llama trained on TinyStories. The reward is
the sentiment of the continuation by the words of the VADER lexicon. PPO with a fixed and with an adaptive KL
coefficient, RLOO, GRPO and DPO are trained at several strengths and measured on held-out prompts, with best-of-n beside
them; runs/sentiment/report.html shows all of it.
"""

import dataclasses
import sys
import tempfile
from pathlib import Path

import sentiment_reward
import stories260k

from rlhf_jax import cli
from rlhf_jax.config import parse
from rlhf_jax.errors import UserError
from rlhf_jax.training import sentiment

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "sentiment.yaml"


@dataclasses.dataclass(frozen=True)
class Config(sentiment.SentimentConfig):
    """The experiment's settings and its reward."""

    lexicon: str | None = None
    """File of words and their valences, tab separated, such as VADER's vader_lexicon.txt."""


def main() -> None:
    config = parse(Config, ["--config", str(CONFIG), *sys.argv[1:]], description=__doc__)
    if config.lexicon is None:
        raise UserError("no reward: give --lexicon vader_lexicon.txt")
    reward = sentiment_reward.reward(config.lexicon)
    with tempfile.TemporaryDirectory() as converted:
        if config.model is not None and (Path(config.model) / stories260k.WEIGHTS).is_file():
            stories260k.convert(config.model, converted)
            config = dataclasses.replace(config, model=converted)
        sentiment.run(config, reward)


if __name__ == "__main__":
    cli.run_script(main)
