"""What a run chooses by its data and its memory: the length of rows, shared prompts, remat."""

import dataclasses
import functools
import math

import jax
import numpy as np

from rlhf_jax.cli.planning import targets
from rlhf_jax.cli.planning.case import PAIRS, RL, Case
from rlhf_jax.cli.planning.shapes import fitting
from rlhf_jax.config import RunConfig, data_source, model_source
from rlhf_jax.data import batches
from rlhf_jax.data.rows import Kind, texts
from rlhf_jax.data.tokenizers import load_tokenizer
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.models import hf
from rlhf_jax.training.common import initial, memory, shared_prompts
from rlhf_jax.training.common.layout import row_parts
from rlhf_jax.training.common.remat import needed
from rlhf_jax.training.rl.sharing import saved
from rlhf_jax.training.supervised import batching, reading
from rlhf_jax.training.tasks import TASKS


def longest(config: RunConfig, name: str) -> int | None:
    """Columns of the widest batch of a run's data, or in RL of its longest prompt, as the run's
    tokenizer reads it: that of ``config.model`` or ``config.tokenizer.name``, or one that is
    trained on the data as the run does.

    None without data, for a text that is cut into pieces as long as the model reads, and where
    ``rl.max_prompt_length`` is given.
    """
    return with_data(config, name)[1]


def with_data(config: RunConfig, name: str) -> tuple[RunConfig, int | None]:
    """The settings with ``compute.share_prompts`` as a run on its data chooses it for comparisons,
    and ``longest``.
    """
    bounded = name in RL and config.rl.max_prompt_length is not None
    if bounded or name not in (*TASKS, *RL):
        return config, None
    if config.model is not None:
        config = dataclasses.replace(config, model=hf.model_folder(config.model))
    case = Case(config, name, None)
    settings = case.settings
    if not (settings.data or config.data):
        return config, None
    kind: Kind = "prompts" if name in RL else TASKS[name].kind
    source = model_source(config)
    rows = data_source(config)
    read = initial.stage_rows(rows, kind, settings.data).rows
    if read[0].is_plain_text:
        return config, None
    model, _ = case.model(config.model)
    if config.model is not None:
        tokenizer = load_tokenizer(config.model)
    else:
        held_out = []
        if settings.validation_data:
            held_out = initial.stage_rows(rows, kind, settings.validation_data).rows
        tokenizer = initial.new_tokenizer(source, texts([*read, *held_out]))
    if name in RL:
        language_model = LanguageModel(model, {}, tokenizer)
        prompts = initial.prompts_for(config.text, config.rl, language_model, read)
        return config, int(prompts.tokens.shape[1])
    most = reading.longest_text(config.text, model.config.max_length)
    encoded = reading.encode(config.text, read, tokenizer, most, are_pieces=False)
    every = np.arange(len(encoded))
    form = functools.partial(
        batching.form_batches,
        task=TASKS[name],
        settings=settings,
        text=config.text,
        num_parts=row_parts(case.layout, settings.num_microbatches),
        rows=every,
        key=jax.random.key(0),
        layers=model.config.num_layers,
    )
    made = batching.choose_form(config.compute.share_prompts, encoded, form)
    if encoded.num_answers > 1:
        compute = shared_prompts.recorded(config.compute, made.encoded.shares_prompts)
        config = dataclasses.replace(config, compute=compute)
    return config, batches.width_of(made.encoded, every, bucket_multiple=made.bucket_multiple)


def with_remat(
    config: RunConfig,
    name: str,
    length: int | None,
    limit: float,
    target: targets.Target | None = None,
) -> RunConfig:
    """The settings with ``compute.remat`` as a run chooses it where it is auto.

    Args:
        length: as in ``plan``.
        limit: bytes of a device; 0: nobody knows.
    """
    if config.compute.remat != "auto" or name not in (*TASKS, *RL):
        return config
    case = Case(config, name, target)
    model, params = case.model(config.model)
    network = dataclasses.replace(model.config, compute_dtype=config.compute.dtype)
    columns = length or config.rl.max_prompt_length
    if name not in RL:
        columns = fitting(model, length, case.texts_of_row)
    if columns is None:
        return config
    if name in RL:
        columns += config.rl.max_new_tokens
        rows = config.rl.batch_size // case.own.num_minibatches
        prompt = columns - config.rl.max_new_tokens
        share = saved(prompt, config.rl.max_new_tokens, case.shared_by(prompt))
        rows = math.ceil(rows * (1 - share))
    else:
        rows = (1 + (name in PAIRS and not case.num_answers)) * case.own.batch_size
    rows_at_once = rows // case.own.num_microbatches
    is_deep = network.num_layers >= initial.DEEP
    params = case.laid_out(params)
    networks = 1 + (name in RL and case.own.value == "separate")
    free = max(limit - memory.on_device(params), 1) if limit else 0
    need = needed(case.layout, config.lora, network, params, rows_at_once, columns, networks, free)
    remat = is_deep and need.wants_remat(lambda: need.stored)
    return dataclasses.replace(config, compute=dataclasses.replace(config.compute, remat=remat))
