"""The settings of an evaluation."""

import dataclasses
from typing import Literal

from rlhf_jax.config import Json
from rlhf_jax.data import chat
from rlhf_jax.errors import UserError


def check_at_least(config: object, **bounds: float) -> None:
    """Raises UserError, which names the flag, for a setting below its bound; null passes."""
    for name, bound in bounds.items():
        value = getattr(config, name)
        if value is not None and not value >= bound:
            raise UserError(f"--{name.replace('_', '-')} must be at least {bound}, got {value}")


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run is judged by. What is not given is named as not run."""

    prompts: tuple[str, ...] = ()
    """Held-out prompts, for helpfulness, uncertainty, diversity and the win rate."""
    safety: tuple[str, ...] = ()
    """Prompts with a key `label`, safe or unsafe, such as XSTest's CSV: which are refused?"""
    preferences: tuple[str, ...] = ()
    """Preference data of any format: do the reward model and the policy's log-probabilities agree
    with it?
    """
    annotated: str | None = None
    """Pairs of responses with several annotators' votes, as in PandaLM's test set."""
    reward_model: str | None = None
    """A reward model's run or model folder, or another SPEC of --reward such as mean:A,B; null: the
    reward model that the run was trained with, if that is its only reward."""
    against: str | None = None
    """Another run or model folder, for the win rate under the reward model."""
    categories: str | None = None
    """YAML file of categories of your own."""
    trust_config: bool = False
    """Use the Python files, servers and places that this YAML file, or the run's config, names,
    though they may not be yours."""
    template: str | None = None
    """What the models read for a prompt; null: the run's text.template (auto for a model's folder).
    """
    template_options: Json | None = None
    """Variables of the chat template as a JSON object, such as {"enable_thinking": false}; null:
    the run's."""
    max_new_tokens: int | None = None
    """Response slots; null: the run's rl.max_new_tokens. For a model's folder 256, or half of its
    positions if they are fewer."""
    environment: str | None = None
    """FILE.py:FUNCTION, which replies to each response, as rl.environment does in a run."""
    max_turns: int | None = None
    """Responses of a row at most; null: the run's rl.max_turns."""
    temperature: float = 1.0
    """Sampling temperature; 0 takes the most likely token."""
    num_samples: int = 1
    """Responses to each prompt; with two or more, diversity within a prompt too."""
    batch_size: int = 64
    """Texts at once. Another one may round differently."""
    too_long: Literal["error", "truncate", "drop"] = "error"
    """What to do with a text that does not fit into the model. Truncated and dropped rows are
    counted and reported.
    """
    columns: tuple[str, ...] = ()
    """Keys of the data under other names, each OURS=THEIRS: prompt=question response=answer."""
    on_bad_row: Literal["error", "drop"] = "error"
    """A row that cannot be used, such as one with an empty answer: error names all of them and
    stops; drop leaves them out and counts them."""
    judge_url: str | None = None
    """Of judge:RUBRIC.yaml as reward model, as judge.url in a run."""
    judge_model: str | None = None
    """The name of the judge's model there."""
    seed: int = 0
    """Root of the samples and of the intervals' draws."""
    device: Literal["cpu", "gpu", "cuda", "tpu"] | None = None
    """Where to run; null: JAX's choice."""
    output: str | None = None
    """Folder for evaluation.json; null: the run's."""

    def __post_init__(self) -> None:
        least = 1e-6 if self.temperature else 0  # as SamplingConfig has it
        check_at_least(self, num_samples=1, batch_size=1, max_new_tokens=1, temperature=least)
        if self.template not in (None, chat.AUTO) and "{prompt}" not in str(self.template):
            raise UserError(f"--template must be auto or contain {{prompt}}, got {self.template!r}")
        if self.against is not None and not self.prompts:
            raise UserError("--against: a win rate needs --prompts")
