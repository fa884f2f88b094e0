"""Where a stage's rows come from: files, a folder of the pipeline's files, a dataset's name, or a generated corpus."""

import difflib
import functools
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from rlhf_jax import models
from rlhf_jax.config import RunConfig
from rlhf_jax.data import chat, demo, encoding, readers
from rlhf_jax.data.tokenizers import Tokenizer, load_tokenizer
from rlhf_jax.errors import UserError

Kind = Literal["demonstrations", "pairs", "comparisons", "prompts"]
FILES: dict[Kind, str] = {
    "demonstrations": "sft_data.json",
    "pairs": "preference_data.json",
    "comparisons": "preference_data.json",
    "prompts": "prompts.json",
}
READERS: dict[Kind, Callable[..., readers.ReadResult[Any]]] = {
    "demonstrations": readers.read_demonstrations,
    "pairs": readers.read_pairs,
    "comparisons": readers.read_comparisons,
    "prompts": readers.read_prompts,
}
_WITHOUT_PAIRS = functools.partial(demo.write, num_pairs=0, num_heldout_pairs=0)  # they take the longest
# What `--data NAME` generates instead of reading it: the corpus's write(folder, seed) for each of the kinds it has.
GENERATED: dict[str, dict[Kind, Callable[..., None]]] = {
    "demo": {"demonstrations": _WITHOUT_PAIRS, "comparisons": demo.write, "prompts": _WITHOUT_PAIRS},
}


def read(
    kind: Kind, stage_data: tuple[str, ...], run_data: tuple[str, ...], seed: int, model: str | None = None
) -> readers.ReadResult[Any]:
    """Reads the rows of a stage and prints how many were kept and dropped.

    stage_data: the section's own ``data``, which wins over run_data, the run's ``--data``. A folder stands for its
        sft_data.json, preference_data.json or prompts.json; ``demo`` for the corpus generated from ``seed``.
    model: the folder whose tokenizer's chat template renders messages; None: the plain one.

    Raises:
        UserError: no data given, or what the readers find wrong in it.
    """
    data = stage_data or run_data
    if not data:
        raise UserError(
            f"no data: give --data FILE with {kind}, a folder that holds {FILES[kind]}, or `--data demo` for the "
            "generated demo corpus"
        )
    corpus = next((name for name in data if name in GENERATED), None)
    if corpus is not None:
        result = _generated(corpus, kind, data, seed)
    else:
        template = chat.template_of(load_tokenizer(model) if model is not None else None)
        result = READERS[kind]([_file(name, kind) for name in data], template)
    print(f"{kind}: {result.describe()}", flush=True)
    return result


def _generated(name: str, kind: Kind, data: tuple[str, ...], seed: int) -> readers.ReadResult[Any]:
    kinds = GENERATED[name]
    if len(data) > 1:
        raise UserError(f"--data {' '.join(data)}: `{name}` cannot be mixed with files")
    if kind not in kinds:
        raise UserError(f"--data {name}: this generated corpus has {' and '.join(kinds)} alone, and {kind} are needed")
    with tempfile.TemporaryDirectory() as folder:
        kinds[kind](folder, seed=seed)
        result = READERS[kind](str(Path(folder) / FILES[kind]))
    # The temporary folder's name must reach neither the manifest nor a comparison on resume.
    fingerprint = next(iter(result.fingerprints.values()))
    return readers.ReadResult(result.rows, result.dropped, {f"{name}/{FILES[kind]}": fingerprint})


def _file(name: str, kind: Kind) -> str:
    if not os.path.exists(name) and (near := difflib.get_close_matches(name, GENERATED, n=1)):
        raise UserError(f"--data {name}: no such file; did you mean {near[0]}, which is generated?")
    if not os.path.isdir(name):
        return name
    file = Path(name) / FILES[kind]
    if not file.is_file():
        raise UserError(f"{name}: this folder has no {FILES[kind]}, which holds the {kind}; name the file itself")
    return str(file)


def encode_prompts(
    rows: Sequence[readers.Prompt], tokenizer: Tokenizer, model: models.Model, config: RunConfig
) -> encoding.EncodedPrompts:
    """The prompts, left-padded to ``rl.max_prompt_length`` or the longest, with room for ``rl.max_new_tokens`` after.

    Raises:
        UserError: a prompt is too long and ``text.too_long`` is ``error``, or the model has no such room at all.
    """
    settings, positions = config.rl, model.config.max_length
    length, room = settings.max_prompt_length, positions - settings.max_new_tokens
    if room < 1:
        raise UserError(
            f"rl.max_new_tokens {settings.max_new_tokens} leaves no room for a prompt in the model's {positions} "
            "positions"
        )
    if length is not None and length > room:
        raise UserError(
            f"rl.max_prompt_length {length} + rl.max_new_tokens {settings.max_new_tokens} is more than the model's "
            f"{positions} positions"
        )
    encode = functools.partial(
        encoding.encode_prompts, rows, tokenizer, template=config.text.template, too_long=config.text.too_long
    )
    encoded = encode(length=length)
    return encoded if encoded.tokens.shape[1] <= room else encode(length=room)
