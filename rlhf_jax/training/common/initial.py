"""What a run starts from: the model and its tokenizer, and which of its parameters are trained."""

import dataclasses
import functools
import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax import Array
from jax.tree_util import Partial

from rlhf_jax import models, sampling
from rlhf_jax.config import (
    Compute,
    DataSource,
    LoRA,
    ModelSource,
    Network,
    Optimizer,
    RLStage,
    Text,
)
from rlhf_jax.config.settings import Supervised
from rlhf_jax.data import batches, chat, encoding, files, formats, tokenizers
from rlhf_jax.data.rows import Kind, OnBadRow, Row
from rlhf_jax.errors import UserError, logger
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.models import hf, lora
from rlhf_jax.policies import Policy, as_policy
from rlhf_jax.training.common import layout, memory
from rlhf_jax.types import EosId, Params, PolicyFn

Rows = Iterable[Any] | None
"""A list of dicts, a ``datasets.Dataset``, or what else yields dicts; None: none are given."""
DEEP = 8  # a model of so many layers takes long to compile if each layer is compiled by itself
FEWEST_WIDTHS = 4  # a deep model gets programs for at least so many row widths


def num_layers(source: ModelSource) -> int:
    """The number of layers of the run's model, from the settings or its config.json."""
    if source.model is None:
        return source.network.num_layers
    return hf.read_config(hf.find_folder(source.model)).num_layers


def by_depth(compute: Compute, layers: int) -> Compute:
    """The settings with ``scan_layers`` true or false in place of auto, by the number of layers."""
    if compute.scan_layers != "auto":
        return compute
    return dataclasses.replace(compute, scan_layers=layers >= DEEP)


def check_positions(what: str, model: models.Model, length: int, closing: int = 0) -> None:
    """Raises UserError if a model, ``what``, reads fewer tokens than ``length`` and ``closing``."""
    reads = model.config.max_length - closing
    if reads < length:
        raise UserError(
            f"{what} reads {reads} tokens; shorten prompt and response (rl.max_prompt_length, "
            f"rl.max_new_tokens), now {length}"
        )


def bucket_multiple(text: Text, *, layers: int, longest: int, num_steps: int = 0) -> int:
    """The multiple to which rows are padded: ``text.bucket_multiple``, or more for a deep model.

    A deep model takes long to compile for each width, so its rows have only max(4, sqrt(number of
    steps)) widths, or up to two more if that pads the longest row less.

    Args:
        layers: of the model.
        longest: columns of a row.
        num_steps: of an epoch; 0 if unknown.
    """
    multiple = text.bucket_multiple
    if layers < DEEP:
        return multiple
    fewest = max(FEWEST_WIDTHS, math.isqrt(num_steps))
    apart = [-(-longest // (8 * widths)) * 8 for widths in range(fewest, fewest + 3)]
    return max(multiple, min(apart, key=lambda columns: -longest % columns))


class Trainable(NamedTuple):
    """The parameters of a run, in two parts."""

    params: Params
    """The trained part, float32, in arrays of its own: all parameters, or adapters and heads."""
    base: Params | None = None
    """The frozen part, in its file's dtype. None if all parameters are trained."""
    loaded: Params | None = None
    """The parameters as they were loaded, in their file's dtype, if all are trained."""

    def bind(self, fn: Any) -> Any:
        """``fn(params, ...)`` as a function of the trained part, which travels through ``jit`` as
        an argument.
        """
        if self.base is not None:
            return lora.bind(fn, self.base)
        return fn if isinstance(fn, Policy) else Partial(fn)

    def merged(self, trained: Params) -> Params:
        """The parameters of a plain model, to be saved."""
        return trained if self.base is None else lora.merge(self.base, trained)

    def put(self, on: layout.Layout) -> "Trainable":
        """With its frozen part on the devices, not copied: no update donates it."""
        return self if self.base is None else self._replace(base=on.put(self.base))


def reference_of(
    on: layout.Layout, compute: Compute, start: Trainable, policy_fn: PolicyFn, moves: bool = False
) -> Any:
    """The policy before training, with its parameters as they were loaded, in their file's dtype:
    no copy. If it ``moves``, a function of the trained part, which is in the state.

    Raises:
        UserError: ``compute.offload`` names it, and under LoRA it is the frozen weights.
    """
    if moves:
        memory.free(start.loaded)
        return start.bind(policy_fn)
    if start.base is None:
        fn = as_policy(policy_fn).bind(start.loaded)
        return frozen(on, fn, is_offloaded="reference" in compute.offload)
    if "reference" in compute.offload:
        raise UserError(
            "compute.offload: under LoRA the reference is the frozen weights, which stay; leave it "
            "out"
        )
    return as_policy(policy_fn).bind(start.base)


def frozen(on: layout.Layout, fn: Any, *, is_offloaded: bool) -> Any:
    """The arrays of a model that is not trained, on the devices, or in the host's memory while it
    is not called.
    """
    placed = on.put(fn)
    if not is_offloaded:
        return placed
    on_host = memory.offloaded(placed)
    memory.free((fn, placed))
    return on_host


def trainable(settings: LoRA, params: Params, key: Array) -> Trainable:
    """Splits parameters, heads included, into trained and frozen ones. ``key`` is for the adapters'
    random weights.

    Raises:
        UserError: ``lora.match`` matches no kernel.
    """
    body = {name: part for name, part in params.items() if name not in lora.HEADS}
    if not settings.rank:
        return Trainable(models.master_weights(params), loaded=body)
    heads = {name: part for name, part in params.items() if name in lora.HEADS}
    try:
        adapters = lora.init(key, body, settings.rank, settings.match, alpha=settings.alpha)
    except ValueError as error:
        raise UserError(f"lora: {error}") from error
    return Trainable(adapters | models.master_weights(heads), base=body)


def base_of(settings: LoRA, params: Params) -> Params:
    """A model's parameters as ``lora.base`` says, to be frozen."""
    return params if settings.base is None else lora.quantized(params, settings.base)


def trained_shapes(settings: LoRA, params: Params) -> Params:
    """The shapes of the trained parameters, for shapes of all."""
    split = functools.partial(trainable, settings)
    return jax.eval_shape(lambda params, key: split(params, key).params, params, jax.random.key(0))


def tokenizer_of(source: ModelSource) -> tokenizers.Tokenizer | None:
    """The tokenizer that the settings name, reading texts as ``text`` says; None if it is to be
    made from the data.
    """
    name = source.model or source.tokenizer.name
    if not name:
        return None
    text = source.text
    tokenizer = tokenizers.load_tokenizer(name)
    return chat.reading(tokenizer, text.template_options, text.special_tokens)


def read_rows(
    source: DataSource, kind: Kind, names: formats.Names, on_bad_row: OnBadRow
) -> formats.ReadResult:
    """The rows of files, messages rendered by the chat template of the model's tokenizer.

    Raises:
        UserError: there is no data, or a row is wrong.
    """
    model = source.read_by
    template = chat.template_of(tokenizer_of(model), model.text.template)
    how: Any = {"columns": source.columns, "on_bad_row": on_bad_row, "turns": source.turns}
    return formats.read(kind, names, seed=source.seed, template=template, **how)


def stage_rows(
    source: DataSource, kind: Kind, names: formats.Names, note: str = ""
) -> formats.ReadResult:
    """The rows of a stage; prints their number, and the columns that it does not read.

    Args:
        names: the section's own data; empty: the run's ``--data``.
        note: what the rows are for, in the lines that are printed.

    Raises:
        UserError: as ``read_rows``.
    """
    data = read_rows(source, kind, names or source.data, source.on_bad_row)
    logger.info(f"{kind}{note}: {data.describe()}")
    unread = data.describe_unread(kind)
    if unread:
        logger.info(f"{kind}{note}: {unread}")
    return data


def stage_data(
    shared: Sequence[str], own: Supervised | RLStage, data: Rows, validation_data: Rows
) -> tuple[list[formats.Names], dict[str, Any]]:
    """What a stage trains on, and validates on if that is no share of it: rows of Python, {name:
    source}, or files, its own or those ``shared`` by all; and what the manifest says of the rows.

    Raises:
        UserError: there are both, or the rows cannot be read at all.
    """
    parts: dict[str, Any] = {"data": own.data or shared, "validation_data": own.validation_data}
    given: dict[str, Any] = {}
    for name, rows in (("data", data), ("validation_data", validation_data)):
        if rows is None:
            continue
        if parts[name]:
            both = f"Python gives rows, and the settings name {' '.join(parts[name])}"
            raise UserError(f"{name}: {both}; leave one of them out")
        source = files.from_python(rows, name)
        parts[name] = {name: source}
        given[name] = f"{len(source.records)} rows"
    return [part for name, part in parts.items() if part or name == "data"], given


def warn_of_warmup(section: str, optimizer: Optimizer, num_steps: int) -> None:
    """Prints a warning if the run ends before its warm-up does."""
    warmup = optimizer.warmup_steps
    steps = int(warmup) if warmup >= 1 else math.ceil(warmup * num_steps)
    if not 0 < num_steps <= steps:
        return
    key = f"{section}.optimizer.warmup_steps {warmup:g} covers all steps of the run ({num_steps})"
    end = f"the rate rises from 0 to {(num_steps - 1) / steps:.0%} of its peak"
    if num_steps == 1:
        end = "the rate of the only step is 0, which changes nothing"
    logger.info(f"warning: {key}: {end}")


def hold_out(
    what: str, prompts: Sequence[Hashable], fraction: float, key: Array
) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers for training and for validation, by ``batches.split``; prints how many are held
    out.

    Rows with equal prompts stay together, since training on one answer to a prompt tells about the
    other answers. If there is only one prompt, no row is held out.

    Args:
        what: the rows' kind, for the console.
        prompts: of each row, as ``encoding.group`` gives it.
    """
    if fraction and len(set(prompts)) == 1:
        logger.info(f"{what}: there is only one prompt, so none is held out for validation")
        fraction = 0.0
    train_rows, held_out = batches.split(prompts, fraction, key)
    say_held_out(what, prompts, train_rows, held_out)
    return train_rows, held_out


def say_held_out(
    what: str, prompts: Sequence[Hashable], train_rows: np.ndarray, held_out: np.ndarray
) -> None:
    """Prints how many rows and prompts are held out, and how many of the prompts are also trained
    on.
    """
    if not len(held_out):
        return
    validated = {prompts[row] for row in held_out}
    shared = validated & {prompts[row] for row in train_rows}
    line = f"{what}: {len(held_out)} rows of {len(validated)} prompts held out"
    logger.info(line + (f", {len(shared)} of which are trained on too" if shared else ""))


def language_model(
    source: ModelSource,
    texts: Iterable[str],
    key: Array,
    *,
    is_policy: bool = True,
    policy: models.Model | None = None,
    place: layout.Place = None,
) -> LanguageModel:
    """The model of ``--model``, or a GPT-2 with random weights and the tokenizer of
    ``--tokenizer.name``, or one that is trained on ``texts``; or with such a tokenizer ``policy``,
    if it is given. Prints which it is, and how many parameters it has.

    place: of the parameters on the devices, as ``layout.placement`` gives.

    Raises:
        UserError: the model or tokenizer cannot be read, the network's sizes do not fit, or
            ``is_policy`` and the model is a reward model.
    """
    found = _language_model(source, texts, key, is_policy, policy, place)
    origin = source.model
    if origin is None:
        is_random = policy is None
        origin = "random weights (no --model)" if is_random else "the policy that Python gives"
    number = sum(leaf.size for leaf in jax.tree.leaves(found.params))
    logger.info(f"model: {origin}, {number:,} parameters")
    if source.lora.base is None:
        return found
    base = jax.jit(functools.partial(base_of, source.lora))(found.params)
    held = flatten_dict(base)
    for path, leaf in flatten_dict(found.params).items():
        if held[path].dtype != leaf.dtype:
            leaf.delete()  # or else the device would hold both forms
    return found._replace(params=base)


def _language_model(
    source: ModelSource,
    texts: Iterable[str],
    key: Array,
    is_policy: bool,
    policy: models.Model | None,
    place: layout.Place,
) -> LanguageModel:
    options = compute_options(source.compute, num_layers(source))
    if source.model is not None:
        loaded = LanguageModel.load(source.model, **options, shardings=place)
        if is_policy and "score" in loaded.params:
            raise UserError(
                f"--model {source.model}: this is a reward model, which writes no text; give a "
                "policy"
            )
        loaded = loaded._replace(model=_with_dropout(loaded.model, source.network, source.lora))
        return loaded.reading(source.text.template_options, source.text.special_tokens)
    tokenizer = new_tokenizer(source, texts)
    if policy is not None:
        from rlhf_jax.training.common import own

        return own.start(policy, tokenizer, key)
    network = dataclasses.asdict(source.network)
    rate = network.pop("dropout") or 0.0
    network |= {f"{where}_dropout": rate for where in ("embedding", "attention", "residual")}
    network |= {
        "vocab_size": tokenizer.vocab_size,
        "pad_token_id": tokenizer.pad_id,
        "eos_token_id": tokenizer.eos_id,
    }
    try:
        model_config = models.GPT2Config(**network, **options)
    except ValueError as error:
        raise UserError(f"network: {error}") from error
    model = models.build(model_config)
    init = (
        model.init
        if place is None
        else jax.jit(model.init, out_shardings=place(jax.eval_shape(model.init, key)))
    )
    return LanguageModel(model, init(key), tokenizer)


def _with_dropout(model: models.Model, network: Network, adapters: LoRA) -> models.Model:
    """The model with ``network.dropout`` (None: its family's rates) and ``lora.dropout``."""
    names = [field.name for field in dataclasses.fields(model.config)]
    rate = network.dropout
    rates: Any = {}
    if rate is not None:
        rates = {name: rate for name in names if name.endswith("_dropout")}
    if "lora_dropout" in names:  # a user's own network may have none
        rates["lora_dropout"] = adapters.dropout
    changed = dataclasses.replace(model.config, **rates)
    return model if changed == model.config else models.build(changed)


def say_template(source: ModelSource, tokenizer: tokenizers.Tokenizer) -> None:
    """Prints which template renders the prompts."""
    template = source.text.template
    logger.info(chat.describe(template, tokenizer, source.model or source.tokenizer.name))
    logger.info(chat.boundaries(template, tokenizer))


def prompts_for(
    text: Text,
    settings: RLStage,
    language_model: LanguageModel,
    rows: Sequence[Row],
    note: str = "",
) -> encoding.EncodedPrompts:
    """Prompts as RL samples from them; prints how many were cut or left out."""
    longest = language_model.model.config.max_length
    encoded = encode_prompts(text, settings, rows, language_model.tokenizer, longest)
    for what, count in encoded.counts.items():
        logger.info(f"{count} prompts: {what}{note}")
    say_spelled(rows, language_model.tokenizer, text.template)
    return encoded


def encode_prompts(
    text: Text,
    settings: RLStage,
    rows: Sequence[Row],
    tokenizer: tokenizers.Tokenizer,
    max_length: int | None,
) -> encoding.EncodedPrompts:
    """Prompts as RL samples from them, for a model of that many positions."""
    how: Any = {"template": text.template, "too_long": text.too_long}
    how |= {"length": settings.max_prompt_length, "max_new_tokens": settings.max_new_tokens}
    return encoding.encode_prompts(rows, tokenizer, max_positions=max_length, **how)


def say_spelled(rows: Sequence[Row], tokenizer: tokenizers.Tokenizer, template: str) -> None:
    """Prints which plain texts spell special tokens, which a chat template refuses, have a frame
    that a chat template would put into its own, or stand beside conversations in another frame.
    """
    is_chat = chat.frame(template, tokenizer) is None
    of_frame = formats.mixed(rows), encoding.spelled(rows, tokenizer, template)
    for sentence in filter(None, [formats.framed(rows)] if is_chat else of_frame):
        logger.info(f"warning: {sentence}")


def sampling_config(settings: RLStage, tokenizer: tokenizers.Tokenizer) -> sampling.SamplingConfig:
    """The sampling settings of RL, with the special tokens of the tokenizer."""
    return drawn(settings, tokenizer.eos_ids, tokenizer.pad_id)


def drawn(settings: RLStage, eos_id: EosId, pad_id: int) -> sampling.SamplingConfig:
    """The sampling settings of RL with these special tokens."""
    names = "max_new_tokens", "min_new_tokens", "temperature", "top_k", "top_p", "min_p"
    how: Any = {name: getattr(settings, name) for name in names}
    return sampling.SamplingConfig(**how, eos_id=eos_id, pad_id=pad_id)


def recorded(how: sampling.SamplingConfig, vocab_size: int) -> sampling.SamplingConfig:
    """The sampling settings of rollouts that are learned from: those of a truncated distribution
    have their ``support``.

    Raises:
        UserError: there may be more ids in it than are recorded.
    """
    how = dataclasses.replace(how, record_support=how.truncates)
    try:
        how.most_possible(vocab_size)
    except ValueError as error:
        raise UserError(f"rl.{error}") from error
    return how


def validation_config(
    settings: RLStage, tokenizer: tokenizers.Tokenizer
) -> sampling.SamplingConfig:
    """The sampling settings of RL's validations."""
    how = sampling_config(settings, tokenizer)
    if settings.validation_temperature is None:
        return how
    return dataclasses.replace(how, temperature=settings.validation_temperature)


def new_tokenizer(source: ModelSource, texts: Iterable[str]) -> tokenizers.Tokenizer:
    """The tokenizer of a model with random weights: ``tokenizer.name``, or one trained on texts."""
    settings = source.tokenizer
    if settings.name is not None:
        tokenizer = tokenizers.load_tokenizer(settings.name)
        text = source.text
        return chat.reading(tokenizer, text.template_options, text.special_tokens)
    if settings.kind == "bpe":
        return tokenizers.train_bpe(texts, settings.vocab_size)
    return tokenizers.characters(texts)


def load_language_model(source: str, compute: Compute, place: layout.Place = None) -> LanguageModel:
    """Loads a Hugging Face folder (or name) with its tokenizer; the vocabulary grows if the
    tokenizer gained a pad. ``place``: as ``layout.placement`` gives.

    Raises:
        UserError: the folder lacks a file, or the tokenizer has more entries than the model.
    """
    layers = hf.read_config(hf.find_folder(source)).num_layers
    return LanguageModel.load(source, **compute_options(compute, layers), shardings=place)


def compute_options(compute: Compute, layers: int) -> dict[str, Any]:
    """The options of ``models.load`` for a model with this number of layers."""
    dtype = "bfloat16" if compute.dtype == "float16" else compute.dtype
    name = compute.attention
    here = (jax.default_backend(), dtype)
    wanted = {"cudnn": ("gpu", "bfloat16"), "splash": ("tpu", dtype)}
    if wanted.get(name, here) != here:
        raise UserError(
            f"compute.attention: {name} does not run on this {' in '.join(here)}; use auto"
        )
    return {
        "compute_dtype": dtype,
        "remat": compute.remat is True,  # auto is decided later, when the trained part is known
        "scan_layers": by_depth(compute, layers).scan_layers,
        "attention": name,
    }
