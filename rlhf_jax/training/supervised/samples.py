"""Greedy answers to a few held-out prompts, beside the data's answers, at the validations of SFT,
DPO and KTO: what the loss does not show, whether anything changed. If nothing is held out, the
prompts are training prompts.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from rlhf_jax import models, ops, sampling
from rlhf_jax.config import Answering
from rlhf_jax.data.encoding import EncodedTexts
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import logger
from rlhf_jax.generation import generator
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.policies import as_policy
from rlhf_jax.runs import processes
from rlhf_jax.training.common import references
from rlhf_jax.training.common.initial import Trainable
from rlhf_jax.training.common.layout import Layout
from rlhf_jax.training.common.opening import OpenRun
from rlhf_jax.training.supervised.scoring import evenly
from rlhf_jax.types import Params, PolicyFn, TrainState

OPENING = 16  # tokens of a plain text that stand for its prompt
Sample = dict[str, Any]
"""A row of samples.jsonl."""


class Question(NamedTuple):
    """A prompt."""

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
    rows: np.ndarray,
    tokenizer: Tokenizer,
    settings: Answering,
    room: int,
    are_pieces: bool = False,
) -> list[Question]:
    """At most ``settings.validation_prompts`` of these rows, evenly spread, with different prompts.
    In a conversation the answer is the first turn that is learned.

    Args:
        room: the most tokens of a prompt.
        are_pieces: the rows are parts of plain texts, whose first ``OPENING`` tokens are asked.
    """
    found: dict[tuple[int, ...], tuple[int, int, int]] = {}
    for number in map(int, rows):
        answer = int(encoded.best[number])
        ids = encoded.tokens[answer][number]
        first, last = _learned(encoded, number, answer)
        if are_pieces:
            first = min(OPENING, len(ids) // 2)
            last = min(first + settings.max_new_tokens, len(ids))
        if 0 < first <= room:
            found.setdefault(tuple(ids[:first].tolist()), (number, answer, last))
    if settings.validation_prompts and len(rows) and not found:
        logger.info(
            f"no prompt of at most {room} tokens, which leave room for max_new_tokens "
            f"{settings.max_new_tokens}: samples.jsonl gets no answers"
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
    run: OpenRun, settings: Answering, asked: Sequence[Question], policy: Policy
) -> Callable[[TrainState], list[Sample]]:
    """What answers the questions: the rows of samples.jsonl for a state. With a reference each has
    ``log_ratio``, log p(response) - log p_reference(response) in nats, which is 0 before training.
    """
    if not asked:
        return lambda state: []
    model, _, tokenizer = policy.begun
    ids = [*(question.ids for question in asked), *[[]] * (-len(asked) % run.layout.num_parts)]
    room = model.config.max_length - settings.max_new_tokens
    prompts = generator.pad_prompts(ids, room, tokenizer.pad_id)
    config = greedy_config(settings, tokenizer)
    compare = compile_log_ratios(run.layout, policy)
    key = run.key("eval")

    def answer(state: TrainState) -> list[Sample]:
        begun = policy.begun._replace(params=sampling_params(state, policy.start.base))
        rollout, _ = begun.respond(prompts, key, config=config, mesh=run.layout.row_mesh)
        texts = generator.responses(rollout, tokenizer)
        rows = [question.shown | {"response": texts[i]} for i, question in enumerate(asked)]
        if compare is not None:
            text = (rollout.tokens, rollout.attention_mask, rollout.response_mask)
            ratios = processes.fetch(compare(state, run.layout.shard(text)))
            for row, ratio in zip(rows, ratios, strict=False):  # the last rows are missing ones
                row["log_ratio"] = round(float(ratio), 4) + 0.0  # no -0.0
        return rows

    return answer


def greedy_config(settings: Answering, tokenizer: Tokenizer) -> sampling.SamplingConfig:
    """How the answers are sampled."""
    return sampling.SamplingConfig(
        max_new_tokens=settings.max_new_tokens,
        temperature=0.0,
        eos_id=tokenizer.eos_ids,
        pad_id=tokenizer.pad_id,
    )


def sampling_params(state: TrainState, base: Params | None) -> Params:
    """The parameters of a plain model, with adapters beside their kernels."""
    return state.params if base is None else models.lora.attach(base, state.params)


def compile_log_ratios(on: Layout, policy: Policy) -> partial[Any] | None:
    """The program of the log-ratios, ``(state, text ([B, T] tokens, masks of attention and of the
    response)) -> [B]``, with its other arrays bound; None without a reference.
    """
    if policy.reference is None:
        return None

    def compare(
        state: TrainState, text: tuple[Array, Array, Array], *, policy_fn: Any, ref_fn: Any
    ) -> Array:
        if isinstance(state, references.Followed):
            ref_fn = as_policy(ref_fn).bind(state.reference)
        tokens, numbers, response = text
        if policy.num_answers:  # the prompt is document 1, its answer document 2
            numbers = numbers + response
        log_probs = policy_fn(state.params, tokens, numbers, None).log_probs
        gap = log_probs - ref_fn(tokens, numbers, None).log_probs
        return jnp.sum(ops.masked(gap, response), axis=1)

    # They travel through jit as arguments.
    arrays = {"policy_fn": policy.start.bind(policy.fn), "ref_fn": policy.reference}
    return partial(on.jit(compare, policy.begun.model.config.num_layers), **arrays)
