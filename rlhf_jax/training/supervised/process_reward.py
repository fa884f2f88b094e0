"""Process reward models as a run: labelled steps of solutions in, a model that scores steps out."""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from rlhf_jax.data import batches
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.models import hf
from rlhf_jax.runs import processes
from rlhf_jax.training.common.progress import Validation, in_order
from rlhf_jax.training.supervised import reward_model
from rlhf_jax.training.supervised.job import Job, Learner
from rlhf_jax.training.supervised.scoring import evenly
from rlhf_jax.types import TrainState


def _validate(job: Job, learner: Learner, state: TrainState) -> Validation:
    """Figures over all steps that are held out. Samples of some solutions: the ``scores`` of their
    steps (log-odds) with the ``labels``, and as ``score`` the probability that all are right.
    """
    data = job.encoded
    samples: list[dict[str, Any]] = []
    for rows in in_order(job.held_out, job.settings.batch_size):
        batch = batches.demonstration_batch(data, rows, job.bucket_multiple)
        scores = processes.fetch(learner.measure(state.params, job.run.layout.shard(batch)))
        for i in np.flatnonzero(rows != batches.ABSENT):
            marks = np.asarray(batch.response_mask)[i]
            of_steps, right = scores[i][marks != 0], marks[marks != 0] == 2
            response = data.tokens[0][rows[i]][data.starts[rows[i], 0] :]
            sample = {
                "prompt": data.prompts[rows[i]],
                "response": job.language_model.tokenizer.decode(response),
                "score": float(np.exp(-np.logaddexp(0, -of_steps).sum())),
                "target": float(right.all()),
            }
            of_step = {"scores": of_steps.tolist(), "labels": right.tolist()}
            samples.append(sample | of_step | {"source": data.sources[rows[i]]})
    right = np.concatenate([sample["labels"] for sample in samples])
    signed = np.concatenate([sample["scores"] for sample in samples]) * np.where(right, 1, -1)
    figures = {
        "validation/loss": np.logaddexp(0, -signed).mean(),
        "validation/accuracy": np.heaviside(signed, 0.5).mean(),
        "validation/majority_accuracy": max(right.mean(), 1 - right.mean()),
        "validation/rows": len(samples),
    }
    shown = [samples[place] for place in evenly(len(samples), reward_model.MAX_SAMPLES)]
    return Validation({name: float(value) for name, value in figures.items()}, shown)


TASK = replace(
    reward_model.TASK,
    kind="solutions",
    collate=batches.demonstration_batch,
    pack=batches.packed_batch,
    prepare=lambda job: reward_model.TASK.prepare(job)._replace(answer=None),
    validate=_validate,
    finish=lambda job, learner, state: {"": state.params},  # log-odds: not normalised
    show=("reward_model/loss", "reward_model/accuracy", "validation/accuracy"),
    save=lambda job: partial(LanguageModel.save, score_position=hf.STEP_ENDS),
)
