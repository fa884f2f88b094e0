"""Scores of mean 0 and variance 1 over samples of the base policy (lm-human-preferences)."""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.random import fold_in, permutation

from rlhf_jax.data import chat
from rlhf_jax.data.rows import Row
from rlhf_jax.errors import logger
from rlhf_jax.rewards.functions import close_turns
from rlhf_jax.runs import processes
from rlhf_jax.runs.log import Pulse
from rlhf_jax.training.common import initial
from rlhf_jax.training.supervised import scoring
from rlhf_jax.training.supervised.job import Job, Learner
from rlhf_jax.types import Comparisons, Params, Rollout


def normalize_members(
    job: Job, learner: Learner, members: Mapping[str, Params], number: int, reads_end: bool
) -> Mapping[str, Params]:
    """The members of an ensemble with normalised scores, over so many samples; as they are if there
    is no base policy.

    reads_end: samples that were cut get the end of a turn, as the answers that were trained on.
    """
    if job.source.model is None:
        logger.info(
            "scores are not normalised: no --model, so there is no base policy to sample from"
        )
        return members
    doing = f"sampling {number} answers of the base policy to normalise scores"
    with Pulse() as pulse, pulse.during(doing):
        samples = base_samples(job, number)
        texts = (samples.tokens, samples.attention_mask)
        if reads_end:
            tokenizer = job.language_model.tokenizer
            end = chat.end_of_response(job.source.text.template, tokenizer)
            texts = close_turns(*texts, closing=(end,), ends=tokenizer.eos_ids)
        score = scoring.answer_scorer(learner.start.bind(learner.fn), jit=job.run.layout.jit)
        return {name: normalize(score, params, *texts) for name, params in members.items()}


def base_samples(job: Job, number: int) -> Rollout:
    """So many responses of the base policy to prompts of the data."""
    key = job.run.key("rollout")
    # The weights that were loaded first have been freed.
    language_model = initial.language_model(
        job.source, (), job.run.key("init"), is_policy=False, place=job.run.layout.placement
    )
    distinct = {row.prompt for row in job.rows}
    prompts = sorted(distinct, key=lambda prompt: (isinstance(prompt, tuple), prompt))
    order = np.asarray(permutation(fold_in(key, 0), len(prompts)))
    rows = [
        Row(prompts[i], (), f"the prompt {prompts[i][:40]!r}") for i in np.resize(order, number)
    ]
    settings = job.run.config.rl
    encoded = initial.prompts_for(
        job.source.text, settings, job.language_model, rows, " (to normalise scores)"
    )
    how = initial.sampling_config(settings, language_model.tokenizer)
    rollout, _ = language_model.respond(encoded, fold_in(key, 1), config=how)
    return rollout


def normalize(
    score: Callable[[Params, Comparisons], Array],
    params: Params,
    tokens: Array,
    attention_mask: Array,
) -> Params:
    """The parameters with the gain and shift that normalise the scores of the samples [N, T]."""
    unit = params["score"] | {"gain": jnp.float32(1.0), "shift": jnp.float32(0.0)}
    mask = attention_mask[:, None]  # one answer a row
    comparisons = Comparisons(tokens[:, None], mask, mask)
    found = processes.fetch(score(params | {"score": unit}, comparisons))  # [N, 1]
    scores = np.asarray(found, np.float64)
    mean = scores.mean()
    if np.ptp(scores) == 0.0:  # the deviation of equal numbers is not always 0 in floating point
        logger.info(
            f"scores are not normalised: all {len(scores)} samples of the base policy score {mean}"
        )
        return params
    std = scores.std()
    logger.info(
        f"normalised over {len(scores)} samples of the base policy: mean {mean:.4f}, std {std:.4f}"
    )
    head = unit | {"gain": jnp.float32(1.0 / std), "shift": jnp.float32(-mean / std)}
    return params | {"score": head}
