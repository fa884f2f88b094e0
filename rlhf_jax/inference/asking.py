"""Opens the policy of a run, with its template and its sampling settings, and reads prompts for
it.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rlhf_jax.config import Compute, Json, recorded
from rlhf_jax.data import chat, formats
from rlhf_jax.data.rows import Message, Row
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import bench
from rlhf_jax.generation.generator import Generator, default_slots
from rlhf_jax.graders import spec
from rlhf_jax.models import hf
from rlhf_jax.runs import devices, manifest
from rlhf_jax.training.common import initial, reward_models
from rlhf_jax.training.common.setup import enable_compilation_cache

SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the model samples. A null setting is taken from the run's config.yaml."""

    max_new_tokens: int | None = None
    """Response slots; null: the run's rl.max_new_tokens. For a model's folder 256, or half of its
    positions if they are fewer."""
    temperature: float | None = None
    """Sampling temperature, 0 takes the most likely token; null: the run's, 1 for a model's folder.
    """
    top_k: int | None = None
    """Sample among the k likeliest tokens; null: as the run."""
    top_p: float | None = None
    """Sample from the smallest set of this probability; null: as the run."""
    min_p: float | None = None
    """Sample among the tokens at least so likely, as a share of the likeliest; null: as the run."""
    repetition_penalty: float | None = None
    """Above 1, tokens that occurred are less likely; null: 1, as every run samples."""
    stop: tuple[str, ...] = ()
    """Texts that end a response, such as $'\\n\\nHuman:' in a shell; they are left out of it. By
    default the run's rl.stop."""
    template: str | None = None
    """What the model reads for a prompt; null: the run's text.template (auto for a model's folder).
    """
    template_options: Json | None = None
    """Variables of the chat template as a JSON object, such as {"enable_thinking": false}; null:
    the run's."""
    seed: int = 0
    """A response is a function of it, of the prompt, and of the sample's number."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of activations and cache; null: as the run, float32 for a model's folder."""
    device: Literal["cpu", "gpu", "cuda", "tpu"] | None = None
    """Where to run; null: JAX's choice."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts to ask, from files."""

    prompts: tuple[str, ...]
    """Files of prompts in any format of data/, or `demo`."""
    columns: tuple[str, ...] = ()
    """Keys of the data under other names, each OURS=THEIRS: prompt=question."""
    on_bad_row: Literal["error", "drop"] = "error"
    """A row that cannot be used: error names all of them and stops; drop leaves them out and counts
    them."""
    batch_size: int = 64
    """Responses at once. Another one may round differently."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromFiles(Settings, Prompts):
    """Prompts from files, and how the model samples."""


def start(settings: Settings) -> None:
    """Chooses the device; to be called before anything else touches JAX."""
    devices.choose(settings.device)
    enable_compilation_cache()


def open_policy(
    folder: str, settings: Settings, *, reward: Sequence[str] = (), batch_size: int = 64
) -> Generator:
    """The policy of a run's or model's folder, or of a Hugging Face name.

    Prompt and response fit into the reward models of the ``reward`` entries too.

    Raises:
        UserError: as ``Generator``.
    """
    trained = recorded(folder)
    source = hf.model_folder(folder)
    network = hf.read_config(hf.find_folder(source))
    dtype = settings.dtype or trained.get("compute.dtype", "float32")

    def chosen(name: str, default: Any = None) -> Any:
        """What was asked for, or else the run's."""
        given = (getattr(settings, name), trained.get(f"rl.{name}"), default)
        return next((value for value in given if value is not None), None)

    return Generator(
        source,
        max_new_tokens=chosen("max_new_tokens", default_slots(network.max_length)),
        temperature=chosen("temperature", 1.0),
        top_k=chosen("top_k"),
        top_p=chosen("top_p"),
        min_p=chosen("min_p"),
        repetition_penalty=chosen("repetition_penalty", 1.0),
        template=settings.template or trained.get("text.template"),
        template_options=settings.template_options,
        special_tokens=trained.get("text.special_tokens"),
        batch_size=batch_size,
        stop=settings.stop or tuple(trained.get("rl.stop", ())),
        max_length=min([network.max_length, *map(bench.judge_positions, reward)]),
        **initial.compute_options(Compute(dtype=dtype), network.num_layers),
    )


def read(generator: Generator, prompts: Prompts, seed: int) -> formats.ReadResult:
    """The rows of the prompts, messages rendered as the model reads them."""
    return formats.read(
        "prompts",
        prompts.prompts,
        seed=seed,
        template=chat.template_of(generator.tokenizer, generator.template),
        columns=prompts.columns,
        on_bad_row=prompts.on_bad_row,
    )


def as_given(row: Row, tokenizer: Tokenizer) -> str | list[Message]:
    """The prompt of a row as its data file has it; token ids as text."""
    return list(row.messages) or chat.shown(row, tokenizer)


def reward_of(entries: Sequence[str], policy: Generator, columns: Collection[str]) -> spec.Reward:
    """The reward of ``--reward`` entries. ``columns``: those of the prompts."""
    length = policy.room + policy.config.max_new_tokens
    load = reward_models.for_texts_of(policy.tokenizer, policy.template, length)
    return spec.build_reward(entries, tokenizer=policy.tokenizer, load=load, columns=columns)


def described(
    folder: str, policy: Generator, config: FromFiles, data: formats.ReadResult
) -> dict[str, Any]:
    """Everything that determines the responses, as JSON: fingerprints of the files, and the
    settings.
    """
    sampling = policy.config
    return {
        "model": manifest.fingerprint(hf.find_folder(hf.model_folder(folder))),
        "prompts": data.fingerprints,
        "seed": config.seed,
        **{name: getattr(sampling, name) for name in SAMPLING},
        "stop": list(policy.stop),
        "template": policy.template,
        "template_options": policy.template_options,
        "dtype": policy.model.config.compute_dtype,
        "columns": list(config.columns),
        "on_bad_row": config.on_bad_row,
    }


def check_unchanged(out: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises UserError, which names the first difference, if a file was begun with other
    settings.
    """
    for key, value in now.items():
        if before.get(key) != value:
            raise UserError(
                f"{out}: was begun with {key} {before.get(key)!r}, and now it is {value!r}; choose "
                "another --out, or delete the file"
            )
