"""The parts of a run's settings that say where its model and its data come from."""

from typing import Literal, NamedTuple

from rlhf_jax.config.settings import Compute, LoRA, Network, RunConfig, Text, Texts, Tokenizer


class ModelSource(NamedTuple):
    """Where a run's model and tokenizer come from, how the model computes and the tokenizer reads.
    The fields are those of ``RunConfig``.
    """

    model: str | None
    network: Network
    tokenizer: Tokenizer
    lora: LoRA
    compute: Compute
    text: Text


class DataSource(NamedTuple):
    """Which rows a run reads, and how; the fields are those of ``RunConfig``, but for the last."""

    data: Texts
    columns: Texts
    on_bad_row: Literal["error", "drop"]
    seed: int
    turns: Literal["all", "last"]  # of ``sft``
    read_by: ModelSource  # whose chat template renders messages


def model_source(config: RunConfig) -> ModelSource:
    """Where the model of a run comes from."""
    values = {name: getattr(config, name) for name in ModelSource._fields}
    return ModelSource(**values)


def data_source(config: RunConfig) -> DataSource:
    """Where the rows of a run come from."""
    return DataSource(
        config.data,
        config.columns,
        config.on_bad_row,
        config.seed,
        config.sft.turns,
        model_source(config),
    )
