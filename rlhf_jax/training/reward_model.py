"""Reward-model training as a run: preference pairs in, a normalised reward model or an ensemble of them out."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import generator, metrics, models, sampling
from rlhf_jax.algorithms import reward_model
from rlhf_jax.config import RunConfig
from rlhf_jax.data import batches, encoding
from rlhf_jax.data import rows as data_rows
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.runs import processes
from rlhf_jax.training import checks, ensembles, inputs, loop, setup
from rlhf_jax.training.loop import Validation
from rlhf_jax.training.stage import RunResult, Stage, open_stage, start
from rlhf_jax.types import Comparisons, Metrics, Params, Rollout, ScoreFn, TrainState

MAX_SAMPLES = 256  # held-out rows whose texts and scores each validation writes


def run(config: RunConfig) -> RunResult:
    """Trains on the comparisons of ``config.reward_model.data`` or ``config.data``.

    ``--model`` is the body to start from and also taken for the base policy, over whose samples scores are normalised.
    With ``ensemble_size`` above 1 the members are saved as ``model/member_0``, ``model/member_1``, ...; metrics and
    samples are of their mean score, and ``validation/uncertainty`` says how far they differ.

    Raises:
        UserError: for whatever is wrong with the data, the model's folder, the run folder or the settings.
    """
    settings, num_members = config.reward_model, config.reward_model.ensemble_size
    checks.supervised("reward_model", settings, start(config))
    pairs = inputs.read("comparisons", settings.data, config.data, config.seed, setup.tokenizer_source(config))
    with open_stage(config, "reward_model", pairs.fingerprints) as stage:
        model, base_params, tokenizer = setup.language_model(config, data_rows.texts(pairs.rows), stage.key("init"))
        starts = ensembles.starts(config, model, base_params, stage.key("init"))
        encoded = encoding.encode_comparisons(
            pairs.rows,
            tokenizer,
            template=config.text.template,
            max_length=model.config.max_length,
            too_long=config.text.too_long,
        )
        stage.say_counts(encoded.counts)
        split_key, order_key = jax.random.split(stage.key("data"))
        train_rows, held_out = batches.split(
            len(encoded), settings.validation_fraction, split_key, encoded.answers[0].sources
        )
        plan = batches.Plan(encoded.lengths[train_rows], settings.batch_size, order_key, config.text.bucket_multiple)
        num_steps = settings.num_epochs * plan.steps_per_epoch
        optimizer = setup.make_optimizer(settings.optimizer, num_steps)
        trainable = stage.trainable(starts[0])
        score_fn = trainable.bind(models.score_fn(model))
        update_fn: Callable[..., tuple[TrainState, Metrics]] = reward_model.update
        to_train = encoded
        if num_members > 1:
            update_fn = ensembles.update
            counts = np.ones((len(train_rows), num_members), np.int64)
            if settings.bootstrap:  # keys 0 and 1 are the split's and the order's
                counts = ensembles.bootstrap(jax.random.fold_in(stage.key("data"), 2), num_members, len(train_rows))
            to_train = ensembles.with_counts(encoded, train_rows, counts)
        update = stage.jit_update(functools.partial(update_fn, optimizer=optimizer, config=settings))
        score_pairs = _scorer(score_fn, num_members)
        update_key = stage.key("update")

        def rows_of(step: int) -> np.ndarray:
            return loop.select(train_rows, plan.rows(step))

        def advance(state: TrainState, step: int) -> tuple[TrainState, Metrics]:
            batch = stage.shard(batches.comparison_batch(to_train, rows_of(step), config.text.bucket_multiple))
            return update(state, batch, jax.random.fold_in(update_key, step), score_fn=score_fn)

        def validate(state: TrainState) -> Validation:
            scores = score_rows(
                score_pairs,
                state.params,
                encoded,
                held_out,
                batch_size=settings.batch_size,
                bucket_multiple=config.text.bucket_multiple,
                shard=stage.shard,
            )
            found = {}
            if num_members > 1:
                found = {"uncertainty": uncertainty(encoded, held_out, scores)}
                scores = scores.mean(axis=2)
            found |= report(encoded, held_out, scores)
            shown = evenly(len(held_out), MAX_SAMPLES)
            return Validation(
                {f"validation/{name}": value for name, value in found.items()},
                samples(encoded, held_out[shown], scores[shown], tokenizer),
            )

        state, row = loop.train(
            stage,
            stage.replicate(
                TrainState.create(trainable.params, optimizer)
                if num_members == 1
                else ensembles.create([start.params for start in starts], optimizer)
            ),
            advance,
            num_steps=num_steps,
            validate=validate if len(held_out) else None,
            validation_interval=settings.validation_interval,
            show=("reward_model/loss", "reward_model/accuracy", "validation/accuracy"),
            sources=lambda step: [encoded.answers[0].sources[row] for row in rows_of(step) if row >= 0],
            beside={"frozen weights": trainable.base},
        )
        members = [state.params] if num_members == 1 else ensembles.unstack(state.params)
        if settings.normalize_samples and config.model is None:
            print("scores are not normalised: no --model, so there is no base policy to sample from", flush=True)
        elif settings.normalize_samples:
            prompts = sorted({row.prompt for row in pairs.rows}, key=lambda prompt: (isinstance(prompt, tuple), prompt))
            rollout = _base_samples(stage, model, base_params, prompts, tokenizer, config)
            score = _scorer(score_fn)
            members = [_normalized(score, params, rollout) for params in members]
        return stage.finish(model, trainable, members if num_members > 1 else members[0], tokenizer, row)


def pair_scorer(model: models.Model) -> Callable[..., jax.Array]:
    """Jitted ``(params, tokens [B, K, T], attention_mask [B, K, T]) -> scores [B, K]``."""
    return _scorer(jax.tree_util.Partial(models.score_fn(model)))


def _scorer(score_fn: jax.tree_util.Partial, num_members: int = 1) -> Callable[..., jax.Array]:
    """As ``pair_scorer``; of an ensemble's parameters [M, ...] the scores [B, K, M]."""
    score = _pair_scores if num_members == 1 else jax.vmap(_pair_scores, in_axes=(None, 0, None, None), out_axes=2)
    return functools.partial(jax.jit(score), score_fn)


def _pair_scores(score_fn: ScoreFn, params: Params, tokens: jax.Array, attention_mask: jax.Array) -> jax.Array:
    rows = (tokens.shape[0] * tokens.shape[1], tokens.shape[2])
    return score_fn(params, tokens.reshape(rows), attention_mask.reshape(rows), None).reshape(tokens.shape[:2])


def evaluate(
    score_pairs: Callable[..., jax.Array],
    params: Params,
    comparisons: encoding.EncodedComparisons,
    rows: np.ndarray,
    *,
    batch_size: int,
    bucket_multiple: int,
) -> dict[str, float]:
    """``report`` of a ``pair_scorer``'s scores of the given rows."""
    scores = score_rows(score_pairs, params, comparisons, rows, batch_size=batch_size, bucket_multiple=bucket_multiple)
    return report(comparisons, rows, scores)


def score_rows(
    score_pairs: Callable[..., jax.Array],
    params: Params,
    comparisons: encoding.EncodedComparisons,
    rows: np.ndarray,
    *,
    batch_size: int,
    bucket_multiple: int,
    shard: Callable[[Comparisons], Comparisons] = lambda batch: batch,
) -> np.ndarray:
    """[N, K] a ``pair_scorer``'s scores of the answers of the given N rows, [N, K, M] those of an ensemble; those of
    absent answers mean nothing.
    """
    scores = []
    for batch_rows in loop.in_order(rows, batch_size):
        batch = shard(batches.comparison_batch(comparisons, batch_rows, bucket_multiple))
        scores.append(processes.fetch(score_pairs(params, batch.tokens, batch.attention_mask))[batch_rows >= 0])
    return np.concatenate(scores)


def report(comparisons: encoding.EncodedComparisons, rows: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """``evaluation.choice_report`` of scores [N, K] of the given rows, weighted as the rows are; with targets,
    ``evaluation.target_report``.
    """
    weights = None if comparisons.weight is None else comparisons.weight[rows]
    lengths = _response_lengths(comparisons, rows)
    if comparisons.targets is not None:
        return metrics.target_report(scores, comparisons.targets[rows], lengths, weights)
    return metrics.choice_report(scores, _best(comparisons, rows), lengths, weights)


def uncertainty(comparisons: encoding.EncodedComparisons, rows: np.ndarray, scores: np.ndarray) -> float:
    """How far members differ: the standard deviation over them (population) of the margin, or with targets of the
    score, as a mean over the given rows, weighted as they are.

    The margin is the best answer's score minus that of the highest other one by the mean score: what a member adds to
    all its scores does not count, since comparisons do not determine it.

    scores: [N, K, M] of the given N rows.
    """
    weights = np.ones(len(rows)) if comparisons.weight is None else comparisons.weight[rows]
    lengths = _response_lengths(comparisons, rows)
    if comparisons.targets is not None:
        weights = np.where(lengths > 0, weights[:, None], 0.0)
        return float(np.average(scores.std(axis=2), weights=weights))
    row, best = np.arange(len(rows)), _best(comparisons, rows)
    margins = scores[row, best] - scores[row, metrics.rival(scores.mean(axis=2), best, lengths)]
    return float(np.average(margins.std(axis=1), weights=weights))


def evenly(num_rows: int, most: int) -> np.ndarray:
    """[min(num_rows, most)] numbers of rows from the first to the last of ``num_rows``, evenly spaced."""
    return np.linspace(0, num_rows - 1, min(num_rows, most)).round().astype(int)


def samples(
    comparisons: encoding.EncodedComparisons, rows: np.ndarray, scores: np.ndarray, tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """The given rows with their scores [N, K] as texts: for each the best answer and the highest-scored other one, or,
    with targets, every answer. Lengths are response tokens.
    """
    lengths = _response_lengths(comparisons, rows)

    def texts(row: int, answer: int) -> tuple[str, str]:
        of_answer = comparisons.answers[answer]
        tokens, start = of_answer.tokens[row], of_answer.starts[row]
        return tokenizer.decode(tokens[:start]), tokenizer.decode(tokens[start:])

    found: list[dict[str, Any]] = []
    if comparisons.targets is not None:
        for i, k in np.argwhere(lengths > 0):
            prompt, response = texts(rows[i], k)
            labels = {"score": float(scores[i, k]), "target": float(comparisons.targets[rows[i], k])}
            found.append({"prompt": prompt, "response": response, **labels, "length": int(lengths[i, k])})
        return found
    best = _best(comparisons, rows)
    for i, (chosen, rejected) in enumerate(zip(best, metrics.rival(scores, best, lengths), strict=True)):
        prompt, response = texts(rows[i], chosen)
        found.append(
            {
                "prompt": prompt,
                "chosen": response,
                "rejected": texts(rows[i], rejected)[1],
                "score_chosen": float(scores[i, chosen]),
                "score_rejected": float(scores[i, rejected]),
                "length_chosen": int(lengths[i, chosen]),
                "length_rejected": int(lengths[i, rejected]),
            }
        )
    return found


def _response_lengths(comparisons: encoding.EncodedComparisons, rows: np.ndarray) -> np.ndarray:
    """[N, K] response tokens of the given rows' answers; 0 where there is none."""
    return np.stack([(texts.lengths - np.asarray(texts.starts))[rows] for texts in comparisons.answers], axis=1)


def _best(comparisons: encoding.EncodedComparisons, rows: np.ndarray) -> np.ndarray:
    """[N] number of the best answer of the given rows."""
    return np.zeros(len(rows), np.int64) if comparisons.best is None else comparisons.best[rows]


def _base_samples(
    stage: Stage,
    model: models.Model,
    base_params: Params,
    prompts: Sequence[data_rows.Text],
    tokenizer: Tokenizer,
    config: RunConfig,
) -> Rollout:
    """``normalize_samples`` responses of the base policy to prompts of the data."""
    key = stage.key("rollout")
    count = config.reward_model.normalize_samples
    order = np.asarray(jax.random.permutation(jax.random.fold_in(key, 0), len(prompts)))
    chosen = [prompts[order[i % len(prompts)]] for i in range(count)]
    rows = [data_rows.Prompt(prompt, f"the prompt {prompt[:40]!r}") for prompt in chosen]
    encoded = inputs.encode_prompts(rows, tokenizer, model, config)
    sampling_config = sampling.SamplingConfig(
        max_new_tokens=config.rl.max_new_tokens,
        temperature=config.rl.temperature,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
    )
    return generator.generate(
        model, base_params, encoded.tokens, encoded.attention_mask, jax.random.fold_in(key, 1), sampling_config
    )


def _normalized(score: Callable[..., jax.Array], params: Params, rollout: Rollout) -> Params:
    """Gain and shift that give scores mean 0 and variance 1 over samples of the base policy (lm-human-preferences)."""
    unit = params["score"] | {"gain": jnp.float32(1.0), "shift": jnp.float32(0.0)}
    as_answers = score(params | {"score": unit}, rollout.tokens[:, None], rollout.attention_mask[:, None])  # [N, 1]
    scores = np.asarray(as_answers, np.float64)
    mean, std = float(scores.mean()), float(scores.std())
    if std == 0.0:
        print(f"scores are not normalised: all {len(scores)} samples of the base policy score {mean}", flush=True)
        return params
    print(f"normalised over {len(scores)} samples of the base policy: mean {mean:.4f}, std {std:.4f}", flush=True)
    return params | {"score": unit | {"gain": jnp.float32(1.0 / std), "shift": jnp.float32(-mean / std)}}
