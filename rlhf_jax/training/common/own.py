"""A policy of the user's own: its functions as a ``Model``, and its parameters in a file.

Such a policy is not a Hugging Face model: ``save`` writes its parameters, a note that says so, and
the tokenizer. With the functions, ``load`` reads them back.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax import Array
from safetensors.numpy import load_file

from rlhf_jax import models, sampling
from rlhf_jax.config import Compute, Mesh, ModelSource, Network
from rlhf_jax.data import chat
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.models.hf import OWN_NOTE, read_json, write_tensors
from rlhf_jax.models.stack import pick
from rlhf_jax.types import Params

PARAMETERS = "params.safetensors"


@dataclass(frozen=True)
class OwnConfig:
    """What a run reads of a model's config."""

    vocab_size: int
    max_length: int  # positions of prompt and response
    num_layers: int = 1
    num_blocks: int = 1


def from_functions(
    init: Callable[[Array], Params],
    apply: Callable[..., Array],
    *,
    vocab_size: int,
    max_length: int,
    unembed: Callable[[Params, Array], Array] = lambda params, logits: logits,
    init_cache: Callable[[int, int], Any] | None = None,
    decode: Callable[..., tuple[Array, Any]] | None = None,
    values: Callable[[Params, Array], Array] | None = None,
) -> models.Model:
    """A ``models.Model`` of the user's own network, for ``training.rl.run(policy=...)``.

    B rows, T tokens, D width, V vocabulary.

    Args:
        init: ``(key) -> params``, nested dicts of arrays, whose keys are texts or whole numbers:
            random ones, or those of a file.
        apply: ``(params, tokens [B, T], attention_mask [B, T], key) -> logits [B, T, V]``. The mask
            is 0 on the pads before a prompt and after a response: positions count real tokens, and
            no token sees a pad. ``key`` is None.
        max_length: the most tokens of prompt and response.
        unembed: ``(params, states [..., D]) -> logits [..., V]`` if ``apply`` returns states [B, T,
            D] in place of logits: no logits of the prompt are then computed, and a value head
            reads the states.
        init_cache, decode: as in ``models.Model``; None: each new token takes a pass over all
            columns (``sampling.uncached``).
        values: ``(params, states [B, n, D]) -> [B, n]``, a value head among the network's own
            parameters; the states are what ``apply`` returns. None: an algorithm with values adds a
            linear head.
    """

    def logits(
        params: Params,
        tokens: Array,
        attention_mask: Any = None,
        key: Any = None,
    ) -> Array:
        return unembed(params, hidden(params, tokens, attention_mask, key))

    def hidden(
        params: Params,
        tokens: Array,
        attention_mask: Any = None,
        key: Any = None,
        columns: Any = None,
    ) -> Array:
        mask = jnp.ones_like(tokens) if attention_mask is None else attention_mask
        return pick(apply(params, tokens, mask, key), columns, axis=1)

    def own_values(params: Params, states: Array) -> Array:
        assert values is not None
        found = values(params, states)
        if found.shape != states.shape[:2]:
            raise UserError(
                f"policy: values must return [B, n], a number for each of {states.shape[:2]} "
                f"states; got {found.shape}"
            )
        return found.astype(jnp.float32)

    cached = sampling.uncached(logits)
    config: Any = OwnConfig(vocab_size, max_length)
    return models.Model(
        config=config,
        init=init,
        apply=logits,
        hidden=hidden,
        unembed=unembed,
        init_cache=init_cache or cached.init_cache,
        decode=decode or cached.decode,
        for_decoding=lambda params: params,
        values=None if values is None else own_values,
    )


def check_settings(source: ModelSource, mesh: Mesh) -> None:
    """Raises UserError for settings that a policy from Python does not read."""
    compute = replace(source.compute, score_rows=None, offload=())
    unread = {
        "model": source.model is not None,
        "network": source.network != Network(),
        "lora.rank": source.lora.rank > 0,
        "compute (dtype, remat, scan_layers, attention)": compute != Compute(),
        "mesh (fsdp, tensor)": mesh.fsdp != 1 or mesh.tensor != 1,
    }
    named = [setting for setting, is_set in unread.items() if is_set]
    if named:
        raise UserError(
            f"{', '.join(named)}: a policy that Python gives does not read them; leave them out"
        )


def start(policy: models.Model, tokenizer: Tokenizer, key: Array) -> LanguageModel:
    """The policy with its first parameters.

    Raises:
        UserError: the tokenizer has more entries than the policy, or the parameters are no nested
            dicts of arrays, with texts or whole numbers as keys.
    """
    size = policy.config.vocab_size
    if tokenizer.vocab_size > size:
        raise UserError(
            f"policy: the tokenizer has {tokenizer.vocab_size} entries but the policy only {size}; "
            "give a tokenizer by tokenizer.name, or a larger vocab_size"
        )
    params = policy.init(key)
    taken = {"policy", *models.HEADS}
    if not isinstance(params, dict) or taken & params.keys():
        raise UserError(
            "policy: init must return a dict of parameters, none of which is called "
            f"{' or '.join(sorted(taken))}"
        )
    _keys_of(params)
    return LanguageModel(policy, jax.tree.map(jnp.asarray, params), tokenizer)


def _keys_of(params: Params) -> dict[str, tuple[list[str | int], Any]]:
    """{name: (its keys, the parameter)}; a name is the keys joined by ``/``."""
    advice = "it must return nested dicts of arrays whose keys are texts or whole numbers"
    try:
        leaves = jax.tree.leaves_with_path(params)
    except (TypeError, ValueError) as error:  # keys of two types in one dict cannot be sorted
        raise UserError(f"policy: init: {advice} ({error!s:.200})") from error
    found: dict[str, tuple[list[str | int], Any]] = {}
    for path, leaf in leaves:
        keys: list[Any] = [getattr(part, "key", None) for part in path]
        if any(type(key) not in (str, int) for key in keys):
            raise UserError(f"policy: init: {jax.tree_util.keystr(path)}: {advice}")
        name = "/".join(map(str, keys))
        if name in found:
            raise UserError(f"policy: init: two parameters are called {name}; rename one")
        found[name] = (keys, leaf)
    return found


def width(policy: LanguageModel) -> int:
    """D, of the states that a value head reads."""
    config: Any = policy.model.config
    if hasattr(config, "hidden_size"):
        return int(config.hidden_size)
    token = jnp.zeros((1, 1), jnp.int32)
    states = jax.eval_shape(policy.model.hidden, policy.params, token)
    return int(states.shape[-1])


def save(
    policy: LanguageModel,
    folder: str | Path,
    *,
    template: str,
    config: sampling.SamplingConfig,
) -> None:
    """Writes params.safetensors, whose names are the keys joined by ``/``, the note policy.json
    with the keys of each name, and the tokenizer.

    Args:
        template, config: as in ``LanguageModel.save``.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    found = _keys_of(policy.params)
    arrays = {name: np.asarray(leaf) for name, (_, leaf) in found.items()}
    write_tensors(path / PARAMETERS, arrays)
    chat.with_text_template(policy.tokenizer, template).save(path)
    note = {
        "what": "parameters of a policy that Python gave to a run; this is no Hugging Face model",
        "read by": "rlhf_jax.training.common.own.load",
        "vocab_size": policy.model.config.vocab_size,
        "max_length": policy.model.config.max_length,
        "keys": {name: keys for name, (keys, _) in found.items()},
    }
    (path / OWN_NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def load(folder: str | Path) -> Params:
    """The parameters that ``save`` wrote, as nested dicts of NumPy arrays."""
    path = Path(folder)
    keys = read_json(path / OWN_NOTE).get("keys", {})
    arrays = load_file(path / PARAMETERS)
    return unflatten_dict({tuple(keys[name]): array for name, array in arrays.items()})
