"""Reward-model training as a run: preference pairs in, a normalised reward model or an ensemble of
them out.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from jax import Array
from jax.random import fold_in

from rlhf_jax import models
from rlhf_jax.algorithms import reward_model
from rlhf_jax.config import ModelSource, RewardModelStage, RunConfig
from rlhf_jax.data import batches
from rlhf_jax.errors import UserError
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.models import hf
from rlhf_jax.runs import reading
from rlhf_jax.training.common import memory
from rlhf_jax.training.common.initial import Rows, Trainable, trainable
from rlhf_jax.training.common.optimizer import check_frozen
from rlhf_jax.training.common.progress import TRAIN, Validation
from rlhf_jax.training.common.saving import RunResult
from rlhf_jax.training.supervised import scoring
from rlhf_jax.training.supervised.job import Job, Learner, Task
from rlhf_jax.training.supervised.run import run as run_task
from rlhf_jax.types import Params, TrainState

Sample = Mapping[str, Any]  # a row of samples.jsonl
MAX_SAMPLES = 256  # held-out rows whose texts and scores each validation writes
FEW_SAMPLES = 16  # training rows, if nothing is held out


def run(config: RunConfig, *, data: Rows = None, validation_data: Rows = None) -> RunResult:
    """Trains on the comparisons of ``config.reward_model.data`` or ``config.data``, or on
    given rows as ``sft.run``.

    ``--model`` is the body to start from and also taken for the base policy, over whose samples
    scores are normalised. With ``ensemble_size`` above 1 the members are saved as
    ``model/member_0``, ``model/member_1``, ...; metrics and samples are of their mean score, and
    ``validation/uncertainty`` is their standard deviation.

    Raises:
        UserError: as ``supervised.run``.
    """
    task = TASK
    if config.reward_model.steps:
        from rlhf_jax.training.supervised import process_reward

        task = process_reward.TASK
    return run_task(config, task, data=data, validation_data=validation_data)


def start_of_member(
    source: ModelSource, model: models.Model, member: int, params: Params, key: Array
) -> Trainable:
    """The initial parameters of a member of an ensemble, 0 of a single model: its own score head,
    and without ``--model`` its own body, which of member 0 is that of ``params``.
    """
    head_key = fold_in(key, 1 + member)
    if member > 0 and source.model is None:
        params = model.init(fold_in(head_key, 0))
    if "score" not in params:
        params = models.add_head(head_key, params, "score")
    return trainable(source.lora, params, fold_in(head_key, 1))


def _prepare(job: Job) -> Learner:
    settings = job.settings
    assert isinstance(settings, RewardModelStage)
    on = job.run.layout
    model, params, _ = job.language_model
    begin = partial(start_of_member, job.source, model)
    key = job.run.key("init")
    starts = [on.make(partial(begin, i), params, key) for i in range(job.num_members)]
    for member in starts:
        memory.free(member.loaded)
    start = starts[0].put(on)
    check_frozen(job.run.name, settings.optimizer, start.params)
    score_fn = models.score_fn(
        model, num_answers=job.num_answers, one_text=job.one_text, at_tokens=settings.steps
    )
    policy_fn = None
    if settings.sft_coef:
        if not getattr(model.config, "tie_embeddings", True) and "lm_head" not in params:
            raise UserError(
                f"reward_model.sft_coef: {job.source.model} is a reward model without an output "
                "layer, so its answers have no likelihood; start from a language model"
            )
        policy_fn = start.bind(
            models.policy_fn(model, num_answers=job.num_answers, one_text=job.one_text)
        )
    create: Callable[..., TrainState] = TrainState.create
    update: Any = partial(reward_model.update, minibatch_sharding=on.rows)
    if job.num_members > 1:
        from rlhf_jax.training.supervised import ensembles

        start = start._replace(params=[member.params for member in starts])
        create, update = ensembles.create, ensembles.update_members
    update = partial(update, optimizer=job.optimizer, config=settings)
    bound = start.bind(score_fn)
    measure = scoring.answer_scorer(bound, job.num_members, on.jit)
    return Learner(
        start,
        create,
        partial(
            on.jit_update(update, model.config.num_blocks), score_fn=bound, policy_fn=policy_fn
        ),
        measure,
        score_fn,
        answer=partial(_training_samples, job, measure),
    )


def _score(job: Job, measure: Callable[..., Any], state: TrainState, rows: np.ndarray) -> Any:
    """Scores [N, K] of N rows, [N, K, M] of an ensemble."""
    return scoring.score_rows(
        partial(measure, state.params),
        job.encoded,
        rows,
        batch_size=job.settings.batch_size,
        bucket_multiple=job.bucket_multiple,
        shard=job.run.layout.shard,
    )


def _training_samples(
    job: Job, measure: Callable[..., Any], state: TrainState
) -> list[dict[str, Any]]:
    """A few of the rows that are trained on, with their scores."""
    rows = job.train_rows[scoring.evenly(len(job.train_rows), FEW_SAMPLES)]
    scores = _score(job, measure, state, rows)
    if job.num_members > 1:
        scores = scores.mean(axis=2)
    found = scoring.samples(job.encoded, rows, scores, job.language_model.tokenizer)
    return [sample | TRAIN for sample in found]


def _validate(job: Job, learner: Learner, state: TrainState) -> Validation:
    """Figures over all rows that are held out, samples of some."""
    scores = _score(job, learner.measure, state, job.held_out)
    figures = {}
    if job.num_members > 1:
        figures["uncertainty"] = scoring.disagreement(job.encoded, job.held_out, scores)
        scores = scores.mean(axis=2)
    figures |= scoring.report(job.encoded, job.held_out, scores)
    figures["rows"] = scoring.num_rows(job.encoded, job.held_out)
    shown = scoring.evenly(len(job.held_out), MAX_SAMPLES)
    samples = scoring.samples(
        job.encoded, job.held_out[shown], scores[shown], job.language_model.tokenizer
    )
    if job.encoded.targets is None:
        figures["moved"] = moved(reading.read_rows(job.run.folder.samples), samples)
        figures["planned_steps"] = job.num_steps
    return Validation({f"validation/{name}": value for name, value in figures.items()}, samples)


def moved(before: Sequence[Sample], samples: Sequence[Sample]) -> float:
    """How far the margins of the comparisons have moved since the first validation: the mean of
    the absolute differences, in score (log-odds in nats).

    Args:
        before: samples.jsonl, with the ``samples`` of the earlier validations.
    """
    before = [row for row in before if "split" not in row]
    first = [row for row in before if row["step"] == before[0]["step"]] or samples
    both = zip(first, samples, strict=False)  # data that was allowed to change may have other rows
    changes = [
        now["score_chosen"] - now["score_rejected"] - row["score_chosen"] + row["score_rejected"]
        for row, now in both
    ]
    return float(np.abs(changes).mean())


def _finish(job: Job, learner: Learner, state: TrainState) -> Mapping[str, Params]:
    """The members, their scores normalised if there is a base policy to sample from."""
    settings = job.settings
    assert isinstance(settings, RewardModelStage)
    members: Mapping[str, Params] = {"": state.params}
    if job.num_members > 1:
        from rlhf_jax.training.supervised import ensembles

        members = ensembles.members(state.params)
    if not settings.normalize_samples:
        return members
    from rlhf_jax.training.supervised import normalization

    reads_end = score_position(job) == hf.END_OF_TURN
    return normalization.normalize_members(
        job, learner, members, settings.normalize_samples, reads_end
    )


def score_position(job: Job) -> str:
    """Where a score stands: at the end of the turn, unless most answers that are trained on have no
    such end, as token ids may.
    """
    ends = np.array(job.language_model.tokenizer.eos_ids)
    answers = (texts[row] for texts in job.encoded.tokens for row in job.train_rows)
    last = [text[-1] for text in answers if len(text)]
    return hf.END_OF_TURN if np.isin(last, ends).mean() >= 0.5 else hf.LAST_TOKEN


TASK = Task(
    section="reward_model",
    kind="comparisons",
    collate=batches.comparison_batch,
    pack=batches.packed_comparisons,
    prepare=_prepare,
    validate=_validate,
    finish=_finish,
    save=lambda job: partial(LanguageModel.save, score_position=score_position(job)),
    show=(
        "reward_model/loss",
        "reward_model/accuracy",
        "validation/accuracy",
        "validation/length_accuracy",
        "validation/margin",
        "validation/moved",
    ),
    is_policy=False,
)
