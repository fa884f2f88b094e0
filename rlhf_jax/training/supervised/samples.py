"""Greedy answers to a few held-out prompts, beside the data's answers, at the validations of SFT,
DPO and KTO: what the loss does not show, whether anything changed.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial

from rlhf_jax import models, ops, sampling
from rlhf_jax.config import Answering
from rlhf_jax.data import encoding
from rlhf_jax.data.encoding import EncodedTexts
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import logger
from rlhf_jax.generation import generator
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.runs import devices, processes
from rlhf_jax.training.common import references
from rlhf_jax.training.common.initial import Trainable
from rlhf_jax.training.common.stage import Stage
from rlhf_jax.training.supervised.scoring import evenly
from rlhf_jax.types import Params, PolicyFn, Rollout, TrainState

BUCKET = 16  # tokens, of which the width of the prompts is a multiple
OPENING = 16  # tokens of a plain text that stand for its prompt
Sample = dict[str, Any]
"""A row of samples.jsonl."""


class Question(NamedTuple):
    """A held-out prompt."""

    ids: list[int]
    shown: Sample  # what is the same at each validation: prompt, the data's answer


class Policy(NamedTuple):
    """The policy of a run as its loss sees it."""

    begun: LanguageModel
    start: Trainable
    fn: PolicyFn
    """Of the parameters of a plain model."""
    reference: Any
    """A bound policy, or a function of the state's reference; None if the loss needs none."""
    num_answers: int
    """As in ``models.policy_fn``, for ``fn`` and ``reference``."""


def questions(
    encoded: EncodedTexts,
    held_out: np.ndarray,
    tokenizer: Tokenizer,
    settings: Answering,
    room: int,
    are_pieces: bool = False,
) -> list[Question]:
    """At most ``settings.validation_prompts`` of the held-out rows, evenly spread, with different
    prompts. In a conversation the answer is the first turn that is learned.

    Args:
        room: the most tokens of a prompt.
        are_pieces: the rows are parts of plain texts, whose first ``OPENING`` tokens are asked.
    """
    found: dict[tuple[int, ...], tuple[int, int, int]] = {}
    for number in map(int, held_out):
        answer = int(encoded.best[number])
        ids = encoded.tokens[answer][number]
        first, last = _learned(encoded, number, answer)
        if are_pieces:
            first = min(OPENING, len(ids) // 2)
            last = min(first + settings.max_new_tokens, len(ids))
        if 0 < first <= room:
            found.setdefault(tuple(ids[:first].tolist()), (number, answer, last))
    if settings.validation_prompts and len(held_out) and not found:
        logger.info(
            f"no held-out prompt of at most {room} tokens, which leave room for max_new_tokens "
            f"{settings.max_new_tokens}: validations write no answers"
        )
    places = list(found.items())
    chosen = []
    for place in evenly(len(places), settings.validation_prompts):
        prompt, (number, answer, last) = places[place]
        is_whole = len(prompt) == encoded.starts[number, answer]
        ids = encoded.tokens[answer][number]
        shown: Sample = {
            "prompt": encoded.prompts[number] if is_whole else tokenizer.decode(prompt),
            "answer": tokenizer.decode(ids[len(prompt) : last]),
        }
        if encoded.targets is not None:
            shown["desirable"] = bool(encoded.targets[number, answer] > 0.5)
        chosen.append(Question(list(prompt), shown))
    return chosen


def _learned(encoded: EncodedTexts, number: int, answer: int) -> tuple[int, int]:
    """Where in a text its first learned turn begins and ends."""
    begin = int(encoded.starts[number, answer])
    mask = encoded.learned.get((answer, number))
    if mask is None:
        return begin, len(encoded.tokens[answer][number])
    first = int(np.argmax(mask))
    unlearned = np.flatnonzero(~mask[first:])
    length = unlearned[0] if len(unlearned) else len(mask) - first
    return begin + first, begin + first + int(length)


def answerer(
    stage: Stage, settings: Answering, asked: Sequence[Question], policy: Policy
) -> Callable[[TrainState], list[Sample]]:
    """What answers the questions: the rows of samples.jsonl for a state. With a reference each has
    ``log_ratio``, log p(response) - log p_reference(response) in nats, which is 0 before training.
    """
    if not asked:
        return lambda state: []
    tokenizer = policy.begun.tokenizer
    missing = -len(asked) % stage.num_parts
    ids = [*(question.ids for question in asked), *[[]] * missing]
    longest = max(map(len, ids))
    room = policy.begun.model.config.max_length - settings.max_new_tokens
    width = min(-(-longest // BUCKET) * BUCKET, room)
    prompts = stage.shard(encoding.left_padded(ids, width=width, pad_id=tokenizer.pad_id))
    program = answering(stage, settings, policy)
    key = stage.key("eval")

    def answer(state: TrainState) -> list[Sample]:
        rollout, log_ratios = processes.fetch(program(state, prompts, key))
        texts = generator.responses(rollout, tokenizer)[: len(asked)]
        rows = []
        for number, (question, text) in enumerate(zip(asked, texts, strict=True)):
            row = question.shown | {"response": text}
            if log_ratios is not None:
                row["log_ratio"] = round(float(log_ratios[number]), 4) + 0.0  # no -0.0
            rows.append(row)
        return rows

    return answer


def answering(stage: Stage, settings: Answering, policy: Policy) -> partial[Any]:
    """The program of the answers, ``(state, prompts ([B, P] tokens, mask), key) -> (responses,
    log-ratios [B] if there is a reference)``, with its other arrays bound.
    """
    model = policy.begun.model
    tokenizer = policy.begun.tokenizer
    how = sampling.SamplingConfig(
        max_new_tokens=settings.max_new_tokens,
        temperature=0.0,
        eos_id=tokenizer.eos_ids,
        pad_id=tokenizer.pad_id,
    )
    generate = partial(sampling.generate, model, config=how, mesh=stage.row_mesh)
    shares_prompts = policy.num_answers > 0

    def answered(*inputs: Any, **arrays: Any) -> tuple[Rollout, Array | None]:
        return _answered(generate, *inputs, shares_prompts=shares_prompts, **arrays)

    options = devices.compiler_options(model.config.num_layers)
    # They travel through jit as arguments.
    arrays = {"base": policy.start.base, "ref_fn": policy.reference}
    arrays["policy_fn"] = policy.start.bind(policy.fn)
    return partial(stage.jit(answered, compiler_options=options), **arrays)


def _answered(
    generate: Callable[..., Rollout],
    state: TrainState,
    prompts: tuple[Array, Array],
    key: Array,
    *,
    base: Params | None,
    policy_fn: Any,
    ref_fn: Any,
    shares_prompts: bool,
) -> tuple[Rollout, Array | None]:
    """The responses to prompts ([B, P] tokens, mask), and their log-ratios [B] if there is a
    reference.
    """
    params = state.params if base is None else models.lora.attach(base, state.params)
    rollout = generate(params, *prompts, key)
    if ref_fn is None:
        return rollout, None
    if isinstance(state, references.Followed):
        ref_fn = Partial(ref_fn, state.reference)
    numbers = rollout.attention_mask
    if shares_prompts:  # the prompt is document 1, its answer document 2
        numbers = numbers + rollout.response_mask
    text = (rollout.tokens, numbers, None)
    gap = policy_fn(state.params, *text).log_probs - ref_fn(*text).log_probs
    return rollout, jnp.sum(ops.masked(gap, rollout.response_mask), axis=1)
