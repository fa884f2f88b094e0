"""A reward model of a folder, as rewards call it."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from rlhf_jax import models, policies, rewards
from rlhf_jax.config import Compute
from rlhf_jax.data import chat, encoding, formats, tokenizers
from rlhf_jax.data.rows import Messages
from rlhf_jax.errors import UserError
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.graders import spec
from rlhf_jax.models import hf
from rlhf_jax.parallel import sharding
from rlhf_jax.training.common import layout
from rlhf_jax.training.common.initial import check_positions, compute_options
from rlhf_jax.types import ScoreFn

TEXTS_AT_ONCE = 64  # batch size of a reward model that reads texts, without compute.score_rows


def load_reward_model(
    source: str,
    compute: Compute,
    place: layout.Place = None,
    *,
    score_rows: int | None = None,
    length: int = 0,
    policy: str | None = None,
    in_chat: bool = False,
    longest: Messages | None = None,
) -> spec.RewardModel:
    """A reward model's folder (or Hugging Face name), as ``graders.spec`` takes it; ``place``: as
    ``layout.placement`` gives; it scores ``score_rows`` rows at once, of ``length`` tokens.

    ``policy`` is the fingerprint of the policy's tokenizer. A model of another one reads texts, on
    the first device of each process; its own length is checked with each text, and here with the
    ``longest`` prompt alone. ``in_chat``: the policy's prompts are in a chat template
    (``LanguageModel.closing``).

    Raises:
        UserError: the folder cannot be read, or the model has no score head or fewer positions than
            ``length`` or the longest prompt.
    """
    layers = hf.read_config(hf.find_folder(source)).num_layers
    options = compute_options(compute, layers)
    own = tokenizers.load_tokenizer(source).fingerprint
    reads_texts = policy is not None and own != policy
    apart = sharding.without_mesh if reads_texts else contextlib.nullcontext
    with apart():
        loaded = LanguageModel.load(source, **options, shardings=None if reads_texts else place)
    model, params, tokenizer = loaded
    if "score" not in params:
        raise UserError(
            f"{source}: this model has no score head; train one with `rlhf-jax reward-model`"
        )
    scores_steps = model.config.other_keys.get("score_position") == hf.STEP_ENDS
    if scores_steps and reads_texts:
        raise UserError(
            f"{source}: a model that scores steps needs the tokenizer of the policy, not another"
        )
    closing = loaded.closing(in_chat)
    what = f"{source}: this reward model"
    if not reads_texts:
        check_positions(what, model, length, len(closing))
    elif longest:
        prompt = encoding.answered_ids(longest, "", tokenizer, f"{source}: the longest prompt")
        check_positions(f"{what} has another tokenizer and", model, len(prompt) + 1)
    at_once = score_rows or TEXTS_AT_ONCE
    is_local = all(x.is_fully_addressable or x.is_fully_replicated for x in jax.tree.leaves(params))

    def score_texts(conversations: Any, responses: Any) -> np.ndarray:
        with apart():
            return loaded.score_texts(conversations, responses, at_once, length)

    if scores_steps:
        at_tokens = models.score_fn(model, one_text=True, at_tokens=True)
        texts = (tokenizer.decode([token]) for token in range(tokenizer.vocab_size))
        ends = np.array([formats.STEP_END in text for text in texts])
        ends[list(tokenizer.eos_ids)] = True
        return spec.RewardModel(policies.by_rows(at_tokens, score_rows), params, own, ends=ends)
    score_fn, in_groups = scorers(model, score_rows, closing, tokenizer.eos_ids)
    # Of a model that is cut over processes each has other texts.
    return spec.RewardModel(score_fn, params, own, score_texts if is_local else None, in_groups)


def for_texts_of(tokenizer: tokenizers.Tokenizer, template: str, length: int) -> spec.Load:
    """``load_reward_model`` for prompts and responses of at most ``length`` tokens of a policy."""
    in_chat = chat.frame(template, tokenizer) is None
    load = functools.partial(load_reward_model, compute=Compute(), length=length)
    return functools.partial(load, policy=tokenizer.fingerprint, in_chat=in_chat)


def scorers(
    model: models.Model,
    score_rows: int | None,
    closing: Sequence[int] = (),
    ends: Sequence[int] = (),
) -> tuple[ScoreFn, Callable[..., ScoreFn]]:
    """The ScoreFn of texts, ``score_rows`` at once, and ``(*, prompt_length, group_size)`` -> that
    of rows that share their prompts. Both read ``closing`` behind an answer, or in the place of
    one of ``ends`` (``rewards.behind_turns``).
    """

    def of_groups(*, prompt_length: int = 0, group_size: int = 1) -> ScoreFn:
        score_fn = models.score_fn(
            model, prompt_length=prompt_length, group_size=group_size, one_text=True
        )
        if closing:
            score_fn = rewards.behind_turns(
                score_fn, closing=closing, ends=ends, prompt_length=prompt_length
            )
        return policies.by_rows(score_fn, score_rows, group_size=group_size)

    return of_groups(), of_groups
