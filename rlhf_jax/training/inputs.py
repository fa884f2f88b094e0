"""The rows of a stage's data and its prompts as ids, by the run's settings."""

from collections.abc import Sequence
from typing import Any

from rlhf_jax import models
from rlhf_jax.config import RunConfig
from rlhf_jax.data import chat, encoding, formats
from rlhf_jax.data.rows import Prompt
from rlhf_jax.data.tokenizers import Tokenizer, load_tokenizer


def read(
    kind: formats.Kind, stage_data: tuple[str, ...], run_data: tuple[str, ...], seed: int, model: str | None = None
) -> formats.ReadResult[Any]:
    """`data.formats.read` of the stage's own ``data`` or else the run's; prints how many rows were kept and dropped.

    model: the folder whose tokenizer's chat template renders messages; None: the plain one.
    """
    template = chat.template_of(load_tokenizer(model) if model is not None else None)
    result = formats.read(kind, stage_data or run_data, seed=seed, template=template)
    print(f"{kind}: {result.describe()}", flush=True)
    return result


def encode_prompts(
    rows: Sequence[Prompt], tokenizer: Tokenizer, model: models.Model, config: RunConfig
) -> encoding.EncodedPrompts:
    """`data.encoding.encode_prompts` by the run's settings."""
    return encoding.encode_prompts(
        rows,
        tokenizer,
        template=config.text.template,
        length=config.rl.max_prompt_length,
        max_positions=model.config.max_length,
        max_new_tokens=config.rl.max_new_tokens,
        too_long=config.text.too_long,
    )
