"""The validations of an RL run: responses to held-out prompts, their scores and win rate, and the
rows of samples.jsonl; without held-out prompts those of training rollouts.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data import chat
from rlhf_jax.errors import logger
from rlhf_jax.generation import generator
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.iteration import LoopState
from rlhf_jax.metrics import best_at_k, majority_at_k, share_interval, student
from rlhf_jax.runs import processes, reading
from rlhf_jax.training.common.progress import TRAIN, Validation
from rlhf_jax.training.rl.sample import sample
from rlhf_jax.training.rl.schedule import Batch
from rlhf_jax.training.rl.score import Scored, score
from rlhf_jax.types import Metrics, Rollout

if TYPE_CHECKING:
    from rlhf_jax.training.rl.job import Job

VALIDATED = ("reward/", "safety/", "environment/")
"""Metrics with these prefixes are recorded at validations too, as ``validation/NAME``."""


def validate(job: "Job", state: LoopState) -> Validation:
    """Samples a response to each held-out prompt, always with the same key; the reward and the
    judge score them. Which of them compares pairs does so with the responses of the first
    validation.

    It samples in batches of ``rl.batch_size``, which take the memory of a step's and, if as wide,
    its program.
    """
    batch = job.held_out
    assert batch is not None
    policy = job.inputs.initial
    pairs = job.inputs.pairs
    sampled, talk_metrics = sample(job, state, batch, "respond_to_each")
    compared = batch
    if pairs is not None:
        if not job.opponents:
            texts = generator.responses(processes.fetch(sampled), policy.tokenizer)
            job.opponents.extend(first_responses(job.run.folder.samples, batch) or texts)
        compared = with_opponents(batch, job.opponents)
    judged: Metrics = {}
    verdict = None
    if job.inputs.judge is not None:
        # Without the rewards of the environment.
        verdict = score(job, replace(sampled, rewards=None), compared, job.inputs.judge)
        judged = {"validation/judge": verdict.metrics["objective/score"]}
    scored = score(job, sampled, compared)
    metrics = {"validation/score": scored.metrics["objective/score"]} | judged
    for name, value in (scored.metrics | talk_metrics).items():
        if name.startswith(VALIDATED):
            metrics[f"validation/{name}"] = value
    of_pairs = verdict if pairs == "judge" else scored
    if pairs is not None and of_pairs is not None:
        metrics |= win_rate(of_pairs.rollout, batch.rows)
    if job.method.settings.validation_samples > 1:
        metrics |= of_several(job, sampled, processes.fetch(scored.rollout), batch)
    samples = _samples(policy, sampled, scored, batch, verdict)
    shown = [row for row in samples if row["score"] is not None]
    for row in shown[: job.method.settings.show_examples]:
        logger.info(
            f"Prompt:    {row['prompt']}\nGenerated: {row['response']}\n"
            f"Reward:    {row['score']:.4g}\n"
        )
    return Validation({name: float(value) for name, value in metrics.items()}, samples)


def first_responses(file: Path, batch: Batch) -> list[str]:
    """[B] the responses of the run's first validation, which a run that goes on finds in
    samples.jsonl, the ``file``; empty if it has none there.
    """
    rows = [row for row in reading.read_rows(file) if "split" not in row]
    first = [row for row in rows if row["step"] == rows[0]["step"]]
    texts = iter(first)
    found = []
    for number in batch.rows:
        row = next(texts, None) if number >= 0 else {"response": ""}
        if row is None:
            return []
        found.append(row["response"])
    return found


def with_opponents(batch: Batch, opponents: Sequence[str]) -> Batch:
    """The batch, whose rows have the response that theirs is compared with in a column."""
    rows = list(batch.prompts.rows)
    for number, text in zip(batch.rows, opponents, strict=True):
        if number < 0:
            continue
        columns = rows[number].columns | {"opponents": text}
        rows[number] = replace(rows[number], columns=columns)
    names = [*batch.prompts.columns, "opponents"]
    return batch._replace(prompts=replace(batch.prompts, rows=rows, columns=names))


def win_rate(scored: Rollout, prompts: np.ndarray) -> Metrics:
    """The mean of scores in [0, 1] over present rows, with its 95% interval over prompts.

    prompts: [B] the number of each row's prompt; the samples of one prompt are not independent.
    """
    rollout = processes.fetch(scored)
    present = np.asarray(rollout.present)
    shares = np.asarray(rollout.scores)[present]
    if not len(shares):
        return {}
    numbers = prompts[present]
    by_prompt = [np.mean(shares[numbers == number]) for number in dict.fromkeys(numbers)]
    low, high = share_interval(np.array(by_prompt))
    return {
        "validation/win_rate": jnp.float32(np.mean(shares)),
        "validation/win_rate_low": jnp.float32(low),
        "validation/win_rate_high": jnp.float32(high),
    }


def of_several(job: "Job", sampled: Rollout, rollout: Any, batch: Batch) -> Metrics:
    """Of several answers to a prompt ``best@k`` for k = 1, 2, 4, ... and all, also as ``pass@k`` if
    all scores are 0 or 1, and with the reward ``math`` from k = 3 on ``maj@k``: the mean over the
    prompts that have k answers with a score, and its 95% interval.

    rollout: the scored one, as NumPy arrays.
    """
    num = job.method.settings.validation_samples
    rows = batch.rows[batch.rows >= 0]  # padding stands behind them
    by_prompt = lambda values: np.asarray(values)[: len(rows)].reshape(-1, num)  # noqa: E731
    scores, present = by_prompt(rollout.scores), by_prompt(rollout.present)
    are_shares = bool(np.isin(scores[present], (0, 1)).all())
    votes = None
    if "math" in (rollout.extras or {}) and "answer" in batch.prompts.columns:
        from rlhf_jax.graders import answers

        right = by_prompt(np.where(rollout.present, rollout.extras["math"], np.nan))
        texts = generator.responses(processes.fetch(sampled), job.inputs.initial.tokenizer)
        place = job.run.config.math.place
        votes = ["right"] * len(rows)  # all that equal the answer of the data row are one
        for i in np.flatnonzero(right == 0):
            entry = batch.prompts.rows[rows[i]].columns["answer"]
            votes[i] = answers.vote(entry, texts[i], place)
    metrics: Metrics = {}
    for k in sorted({*(2**i for i in range(num.bit_length())), num}):
        values = {"best": best_at_k(scores, k, present)}
        if are_shares:
            values["pass"] = values["best"]
        if votes is not None and k > 2:
            of_prompts = zip(by_prompt(votes), right, strict=True)
            values["maj"] = np.array([majority_at_k(*of_one, k) for of_one in of_prompts])
        for name, of_each in values.items():
            known = of_each[~np.isnan(of_each)]
            if len(known):
                interval = share_interval if are_shares or name == "maj" else student
                numbers = (known.mean(), *interval(known))
                for edge, number in zip(("", "_low", "_high"), numbers, strict=True):
                    if not math.isnan(number):  # of one prompt
                        metrics[f"validation/{name}@{k}{edge}"] = jnp.float32(number)
    return metrics


def _samples(
    policy: LanguageModel, sampled: Rollout, scored: Scored, batch: Batch, verdict: Scored | None
) -> list[dict[str, Any]]:
    """The rows of samples.jsonl, one for each row that is not missing, nor taken out by the filter;
    the score of an unscored one, and the judge's of one that it left unscored, is None.
    """
    before = processes.fetch(sampled)
    rollout = processes.fetch(scored.rollout)
    texts = generator.responses(before, policy.tokenizer, with_replies=True)
    scores = np.asarray(rollout.scores)
    judged: Any = None if verdict is None else processes.fetch(verdict.rollout)
    lengths = np.sum(before.mask, axis=1)
    samples = []
    for i in np.flatnonzero(before.present):
        reason = scored.reasons[int(i)] if scored.reasons else None
        unsafe = None
        if scored.verdicts is not None:
            from rlhf_jax.graders import filter as filters

            unsafe = filters.sentence(scored.verdicts[i])
        is_unscored = reason is not None and unsafe is None
        if not (rollout.present[i] or is_unscored):
            continue
        number = batch.rows[i]
        prompt = batch.prompts.rows[number]
        row: dict[str, Any] = {
            "prompt": chat.shown(prompt, policy.tokenizer),
            "response": texts[i],
            "score": float(scores[i]),
            "length": int(lengths[i]),
        }
        if reason is not None:
            row["score"] = None
            row["unscored"] = reason
        if judged is not None:
            row["judge"] = float(judged.scores[i]) if judged.present[i] else None
        row |= _components(rollout, int(i))
        if scored.verdicts is not None:
            row["unsafe"] = unsafe
        samples.append(row)
    return samples


def training_samples(job: "Job", rollout: Rollout) -> list[dict[str, Any]]:
    """Rows of samples.jsonl for a run that holds nothing out: of a scored training rollout all
    answers to the first two prompts, or if each prompt has one answer the first eight. Answers
    without a score, and those that the filter took out, are left out.
    """
    tokenizer = job.inputs.initial.tokenizer
    group_size = job.method.algorithm_config.group_size
    rollout = processes.fetch(replace(rollout, support=None))
    present = np.flatnonzero(rollout.present)
    groups = np.unique(present // group_size)[: 2 if group_size > 1 else 8]
    places = present[np.isin(present // group_size, groups)]
    few = jax.tree.map(lambda values: values[places], rollout)
    texts = generator.responses(few, tokenizer, with_replies=True)
    return [
        {
            "prompt": chat.shown(job.schedule.prompts.rows[few.row_ids[i]], tokenizer),
            "response": text,
            "score": float(few.scores[i]),
            "length": int(np.sum(few.mask[i])),
            **_components(few, i),
            **TRAIN,
        }
        for i, text in enumerate(texts)
    ]


def _components(rollout: Any, i: int) -> dict[str, float | None]:
    """What the reward of a row is made of; None where it has no score of a component."""
    found = {}
    for name, values in (rollout.extras or {}).items():
        if values.ndim > 1:  # of tokens
            continue
        value = float(values[i])
        found[f"reward/{name}"] = None if math.isnan(value) else value
    return found
