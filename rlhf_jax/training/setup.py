"""What every stage needs before its first step: the device, the keys, the optimizer, the model and its tokenizer."""

import os
import random
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax

from rlhf_jax import config as settings
from rlhf_jax import generator, models
from rlhf_jax.data import tokenizers
from rlhf_jax.errors import UserError
from rlhf_jax.generator import LanguageModel
from rlhf_jax.types import Params

Stream = Literal["init", "data", "rollout", "update", "eval"]
PLATEAU_SCALE = "plateau_scale"  # in opt_state.hyperparams: what the schedule plateau has multiplied the rate by so far


def enable_compilation_cache() -> None:
    """Keeps compiled programs between runs, in ``JAX_COMPILATION_CACHE_DIR`` or the user's cache folder."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(base / "rlhf_jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def devices_line(compute: settings.Compute) -> str:
    """Backend, devices and dtype: the first line that a run prints."""
    devices = jax.devices()
    dtype: str = compute.dtype
    if dtype == "float16":
        dtype = "bfloat16 in place of float16, whose range overflows in training without loss scaling"
    return f"{jax.default_backend()}: {len(devices)} x {devices[0].device_kind}, {dtype}"


def stream(seed: int, stage: str, name: Stream) -> jax.Array:
    """The key of one named stream: the run's root key, folded with the stage and the stream's name."""
    root = jax.random.key(seed)
    return jax.random.fold_in(jax.random.fold_in(root, zlib.crc32(stage.encode())), zlib.crc32(name.encode()))


def seed_libraries(seed: int, step: int) -> None:
    """Seeds Python's and NumPy's global generators, which a reward or judge in Python may draw from.

    By the step, so that a run that goes on from a checkpoint draws what it would have drawn without the stop.
    """
    number = zlib.crc32(f"{seed} {step}".encode())
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002 (what others draw from is the legacy one)


def make_optimizer(config: settings.Optimizer, num_steps: int) -> optax.GradientTransformation:
    """Adam with the schedule, clipping and decay of ``config``; ``num_steps`` is the length of the schedule.

    The learning rate lives in ``opt_state.hyperparams`` (optax.inject_hyperparams). Under the schedule ``plateau`` so
    does its factor ``PLATEAU_SCALE``, which starts at 1 and which ``patience.Judge`` lowers.
    """
    decay_steps = max(num_steps - config.warmup_steps, 1)
    peak = config.learning_rate
    decay: optax.Schedule
    if config.schedule in ("constant", "plateau"):
        decay = optax.constant_schedule(peak)
    elif config.schedule == "linear":
        decay = optax.linear_schedule(peak, 0.0, decay_steps)
    elif config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, decay_steps)
    else:
        assert config.decay_every is not None
        decay = optax.exponential_decay(peak, config.decay_every, config.decay_factor, staircase=True)
    warmup = optax.linear_schedule(0.0, peak, max(config.warmup_steps, 1))
    schedule = optax.join_schedules([warmup, decay], [config.warmup_steps]) if config.warmup_steps else decay

    def chain(learning_rate: Any, plateau_scale: Any = None) -> optax.GradientTransformation:
        parts = []
        if config.max_grad_norm is not None:
            parts.append(optax.clip_by_global_norm(config.max_grad_norm))
        parts.append(optax.scale_by_adam(config.b1, config.b2, config.eps))
        if config.weight_decay:
            parts.append(optax.add_decayed_weights(config.weight_decay, mask=_decayed))
        parts.append(optax.scale_by_learning_rate(learning_rate))
        if plateau_scale is not None:
            parts.append(optax.scale(plateau_scale))
        return optax.chain(*parts)

    scales = {PLATEAU_SCALE: 1.0} if config.schedule == "plateau" else {}
    return optax.inject_hyperparams(chain)(learning_rate=schedule, **scales)


def _decayed(params: Params) -> Any:
    """True for matrices, adapters and embeddings of the body. Judged by name: under scan a bias has rank 2 too."""

    def decayed(path: tuple[Any, ...], _: jax.Array) -> bool:
        names = [entry.key for entry in path]
        return names[-1] in ("kernel", "embedding", "lora_a", "lora_b") and names[0] not in ("value", "score")

    return jax.tree_util.tree_map_with_path(decayed, params)


def tokenizer_source(config: settings.RunConfig) -> str | None:
    """The folder or Hugging Face name that the tokenizer and its chat template come from; None: trained on the data.

    Raises:
        UserError: ``--model`` and ``--tokenizer.name`` are both given.
    """
    if config.model is None:
        return config.tokenizer.name
    if config.tokenizer.name is not None:
        raise UserError(
            f"--tokenizer.name {config.tokenizer.name}: the model {config.model} brings its own tokenizer; leave out "
            "one of the two"
        )
    return config.model


def language_model(config: settings.RunConfig, texts: Iterable[str], key: jax.Array) -> LanguageModel:
    """The model of ``--model``, or a GPT-2 with random weights and the tokenizer of ``--tokenizer.name``, or one that
    is trained on ``texts``.

    Raises:
        UserError: the model or tokenizer cannot be read, both are given, or the network's sizes do not fit.
    """
    source = tokenizer_source(config)
    if config.model is not None:
        return load_language_model(config.model, config.compute)
    if source is not None:
        tokenizer = tokenizers.load_tokenizer(source)
    elif config.tokenizer.kind == "bpe":
        tokenizer = tokenizers.train_bpe(texts, config.tokenizer.vocab_size)
    else:
        tokenizer = tokenizers.characters(texts)
    network = config.network
    try:
        model_config = models.GPT2Config(
            vocab_size=tokenizer.vocab_size,
            max_length=network.max_length,
            hidden_size=network.hidden_size,
            num_layers=network.num_layers,
            num_heads=network.num_heads,
            embedding_dropout=network.dropout,
            attention_dropout=network.dropout,
            residual_dropout=network.dropout,
            initializer_range=network.initializer_range,
            pad_token_id=tokenizer.pad_id,
            eos_token_id=tokenizer.eos_id,
            **_compute(config.compute),
        )
    except ValueError as error:
        raise UserError(f"network: {error}") from error
    model = models.build(model_config)
    return LanguageModel(model, model.init(key), tokenizer)


def load_language_model(source: str, compute: settings.Compute) -> LanguageModel:
    """Loads a Hugging Face folder (or name) with its tokenizer; the vocabulary grows if the tokenizer gained a pad.

    Raises:
        UserError: the folder lacks a file, or the tokenizer has more entries than the model.
    """
    return generator.load(source, **_compute(compute))


def _compute(compute: settings.Compute) -> dict[str, Any]:
    dtype = "bfloat16" if compute.dtype == "float16" else compute.dtype
    return {"compute_dtype": dtype, "remat": compute.remat, "scan_layers": compute.scan_layers}
