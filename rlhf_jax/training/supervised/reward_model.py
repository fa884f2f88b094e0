"""Reward-model training as a run: preference pairs in, a normalised reward model or an ensemble of
them out.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.random import fold_in, permutation

from rlhf_jax import models
from rlhf_jax.algorithms import reward_model
from rlhf_jax.config import RewardModelStage, RunConfig
from rlhf_jax.data import batches
from rlhf_jax.data.rows import Row
from rlhf_jax.errors import UserError, logger
from rlhf_jax.training.common import initial, memory
from rlhf_jax.training.common.initial import Trainable
from rlhf_jax.training.common.loop import Validation
from rlhf_jax.training.common.saving import RunResult
from rlhf_jax.training.supervised import ensembles, entry, scoring, tasks
from rlhf_jax.types import Comparisons, Params, Rollout, ScoreFn, TrainState

MAX_SAMPLES = 256  # held-out rows whose texts and scores each validation writes


def run(config: RunConfig) -> RunResult:
    """Trains on the comparisons of ``config.reward_model.data`` or ``config.data``.

    ``--model`` is the body to start from and also taken for the base policy, over whose samples
    scores are normalised. With ``ensemble_size`` above 1 the members are saved as
    ``model/member_0``, ``model/member_1``, ...; metrics and samples are of their mean score, and
    ``validation/uncertainty`` is their standard deviation.

    Raises:
        UserError: for whatever is wrong with the data, the model's folder, the run folder or the
            settings.
    """
    return entry.run(config, SPEC)


def _task(setting: tasks.Setting) -> tasks.Task:
    stage = setting.stage
    settings = _settings(setting)
    model = setting.initial.model
    begin = partial(ensembles.starts, settings.ensemble_size, setting.source, model)
    starts = stage.made(begin, setting.initial.params, stage.key("init"))
    start = stage.place(starts[0])
    for member in starts:
        memory.free(member.loaded)
    how: Any = {"num_answers": setting.num_answers, "one_text": setting.one_text}
    score_fn = start.bind(models.score_fn(model, **how))
    policy_fn = _policy_fn(setting, start)
    validate = _validation(setting, score_fn)
    create: Callable[..., TrainState] = TrainState.create
    update: Any = partial(reward_model.update, minibatch_sharding=stage.rows)
    training = setting
    if settings.ensemble_size > 1:
        start = start._replace(params=[member.params for member in starts])
        create = ensembles.create
        update = ensembles.update_members
        training = _weighted(setting)

    def trained(state: TrainState) -> Mapping[str, Params]:
        is_ensemble = settings.ensemble_size > 1
        members = ensembles.members(state.params) if is_ensemble else {"": state.params}
        return _all_normalized(setting, score_fn, members)

    configured = partial(update, optimizer=setting.optimizer, config=settings)
    jitted = stage.jit_update(configured, model.config.num_blocks)
    bound = partial(jitted, score_fn=score_fn, policy_fn=policy_fn)
    return tasks.Task(training, start, create, bound, validate, trained=trained)


def _settings(setting: tasks.Setting) -> RewardModelStage:
    settings = setting.settings
    assert isinstance(settings, RewardModelStage)
    return settings


def _policy_fn(setting: tasks.Setting, start: Trainable) -> Any:
    """The log-probabilities of the model, for ``sft_coef``; None without it.

    Raises:
        UserError: the model has no output layer, as a saved reward model.
    """
    model = setting.initial.model
    if not _settings(setting).sft_coef:
        return None
    is_tied = getattr(model.config, "tie_embeddings", True)
    if not is_tied and "lm_head" not in setting.initial.params:
        raise UserError(
            f"reward_model.sft_coef: {setting.source.model} is a reward model without an output "
            "layer, so its answers have no likelihood; start from a language model"
        )
    how: Any = {"num_answers": setting.num_answers, "one_text": setting.one_text}
    return start.bind(models.policy_fn(model, **how))


def _validation(setting: tasks.Setting, score_fn: ScoreFn) -> Callable[[TrainState], Validation]:
    """What validates the state: figures over all rows that are held out, samples of some."""
    stage = setting.stage
    encoded = setting.encoded
    held_out = setting.held_out
    num_members = _settings(setting).ensemble_size
    score_answers = scoring.answer_scorer(score_fn, num_members, stage.jit)

    def validate(state: TrainState) -> Validation:
        scores = scoring.score_rows(
            partial(score_answers, state.params),
            encoded,
            held_out,
            batch_size=setting.plan.batch_size,
            bucket_multiple=setting.bucket_multiple,
            shard=stage.shard,
        )
        figures = {}
        if num_members > 1:
            figures["uncertainty"] = scoring.disagreement(encoded, held_out, scores)
            scores = scores.mean(axis=2)
        figures |= scoring.report(encoded, held_out, scores)
        figures["rows"] = scoring.num_rows(encoded, held_out)
        shown = scoring.evenly(len(held_out), MAX_SAMPLES)
        samples = scoring.samples(
            encoded, held_out[shown], scores[shown], setting.initial.tokenizer
        )
        return Validation({f"validation/{name}": value for name, value in figures.items()}, samples)

    return validate


def _all_normalized(
    setting: tasks.Setting,
    score_fn: ScoreFn,
    members: Mapping[str, Params],
) -> Mapping[str, Params]:
    """The members with ``_normalized`` scores if there is a base policy to sample from."""
    if not _settings(setting).normalize_samples:
        return members
    if setting.source.model is None:
        logger.info(
            "scores are not normalised: no --model, so there is no base policy to sample from"
        )
        return members
    samples = _base_samples(setting)
    score = scoring.answer_scorer(score_fn, jit=setting.stage.jit)
    return {name: _normalized(score, params, samples) for name, params in members.items()}


def _weighted(setting: tasks.Setting) -> tasks.Setting:
    """With a weight of each comparison for each member of an ensemble."""
    num_members = _settings(setting).ensemble_size
    # 0 and 1 are the split's and the order's.
    key = fold_in(setting.stage.key("data"), 2)
    counts = ensembles.bootstrap(key, num_members, len(setting.train_rows))
    weighted = ensembles.with_counts(setting.encoded, setting.train_rows, counts)
    return replace(setting, encoded=weighted)


def _base_samples(setting: tasks.Setting) -> Rollout:
    """``normalize_samples`` responses of the base policy to prompts of the data."""
    stage = setting.stage
    source = setting.source
    # The weights that were loaded first have been freed.
    language_model = initial.language_model(
        source, (), stage.key("init"), is_policy=False, place=stage.placement
    )
    distinct = {row.prompt for row in setting.rows}
    prompts = sorted(distinct, key=lambda prompt: (isinstance(prompt, tuple), prompt))
    key = stage.key("rollout")
    order = np.asarray(permutation(fold_in(key, 0), len(prompts)))
    numbers = np.resize(order, _settings(setting).normalize_samples)
    rows = [Row(prompts[i], (), f"the prompt {prompts[i][:40]!r}") for i in numbers]
    how_asked = (source.text, setting.sampling, setting.initial)
    encoded = initial.prompts_for(*how_asked, rows, " (to normalise scores)")
    how = initial.sampling_config(setting.sampling, language_model.tokenizer)
    sample_key = fold_in(key, 1)
    return language_model.sample(encoded.tokens, encoded.attention_mask, sample_key, config=how)


def _normalized(
    score: Callable[[Params, Comparisons], Array],
    params: Params,
    rollout: Rollout,
) -> Params:
    """Gain and shift that give scores mean 0 and variance 1 over samples of the base policy
    (lm-human-preferences).
    """
    unit = params["score"] | {"gain": jnp.float32(1.0), "shift": jnp.float32(0.0)}
    of_texts = (rollout.tokens, rollout.attention_mask, rollout.response_mask)
    comparisons = Comparisons(*(array[:, None] for array in of_texts))  # one answer a row
    scores = np.asarray(score(params | {"score": unit}, comparisons), np.float64)  # [N, 1]
    mean = scores.mean()
    std = scores.std()
    if np.ptp(scores) == 0.0:  # the deviation of equal numbers is not always 0 in floating point
        logger.info(
            f"scores are not normalised: all {len(scores)} samples of the base policy score {mean}"
        )
        return params
    logger.info(
        f"normalised over {len(scores)} samples of the base policy: mean {mean:.4f}, std {std:.4f}"
    )
    head = unit | {"gain": jnp.float32(1.0 / std), "shift": jnp.float32(-mean / std)}
    return params | {"score": head}


SPEC = tasks.TaskSpec(
    section="reward_model",
    kind="comparisons",
    collate=batches.comparison_batch,
    pack=batches.packed_comparisons,
    make_task=_task,
    show=(
        "reward_model/loss",
        "reward_model/accuracy",
        "validation/accuracy",
        "validation/length_accuracy",
    ),
    is_policy=False,
)
