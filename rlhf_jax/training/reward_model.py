"""Reward-model training as a run: preference pairs in, a normalised reward model with its tokenizer out."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import evaluation, inference, models, sampling
from rlhf_jax.algorithms import reward_model
from rlhf_jax.config import RunConfig
from rlhf_jax.data import batches, encoding, readers
from rlhf_jax.data import rows as data_rows
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.training import checks, inputs, loop, setup
from rlhf_jax.training.loop import Validation
from rlhf_jax.training.stage import RunResult, Stage, open_stage, start
from rlhf_jax.types import Comparisons, Metrics, Params, TrainState

MAX_SAMPLES = 256  # held-out rows whose texts and scores each validation writes


def run(config: RunConfig) -> RunResult:
    """Trains on the comparisons of ``config.reward_model.data`` or ``config.data``.

    ``--model`` is the body to start from and also taken for the base policy, over whose samples scores are normalised.

    Raises:
        UserError: for whatever is wrong with the data, the model's folder, the run folder or the settings.
    """
    settings = config.reward_model
    checks.supervised("reward_model", settings, start(config))
    pairs = inputs.read("comparisons", settings.data, config.data, config.seed, setup.tokenizer_source(config))
    with open_stage(config, "reward_model", pairs.fingerprints) as stage:
        model, base_params, tokenizer = setup.language_model(config, data_rows.texts(pairs.rows), stage.key("init"))
        params = base_params
        if "score" not in params:
            params = models.add_head(jax.random.fold_in(stage.key("init"), 1), params, "score")
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
        score_fn = models.score_fn(model)
        update = stage.jit_update(
            functools.partial(reward_model.update, score_fn=score_fn, optimizer=optimizer, config=settings)
        )
        score_pairs = pair_scorer(model)
        update_key = stage.key("update")

        def advance(state: TrainState, step: int) -> tuple[TrainState, Metrics]:
            rows = loop.select(train_rows, plan.rows(step))
            batch = stage.shard(batches.comparison_batch(encoded, rows, config.text.bucket_multiple))
            return update(state, batch, jax.random.fold_in(update_key, step))

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
            metrics = {f"validation/{name}": value for name, value in report(encoded, held_out, scores).items()}
            return Validation(metrics, samples(encoded, held_out[:MAX_SAMPLES], scores[:MAX_SAMPLES], tokenizer))

        state, row = loop.train(
            stage,
            stage.replicate(TrainState.create(params, optimizer)),
            advance,
            num_steps=num_steps,
            validate=validate if len(held_out) else None,
            validation_interval=settings.validation_interval,
            show=("reward_model/loss", "reward_model/accuracy", "validation/accuracy"),
        )
        params = state.params
        if settings.normalize_samples and config.model is None:
            print("scores are not normalised: no --model, so there is no base policy to sample from", flush=True)
        elif settings.normalize_samples:
            prompts = sorted({row.prompt for row in pairs.rows}, key=lambda prompt: (isinstance(prompt, tuple), prompt))
            params = _normalized(stage, model, params, base_params, prompts, tokenizer, config)
        return stage.finish(model, params, tokenizer, row)


def pair_scorer(model: models.Model) -> Callable[..., jax.Array]:
    """Jitted ``(params, tokens [B, K, T], attention_mask [B, K, T]) -> scores [B, K]``."""
    score_fn = models.score_fn(model)

    def score(params: Params, tokens: jax.Array, attention_mask: jax.Array) -> jax.Array:
        rows = (tokens.shape[0] * tokens.shape[1], tokens.shape[2])
        return score_fn(params, tokens.reshape(rows), attention_mask.reshape(rows), None).reshape(tokens.shape[:2])

    return jax.jit(score)


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
    """[N, K] a ``pair_scorer``'s scores of the answers of the given N rows; those of absent answers mean nothing."""
    scores = []
    for batch_rows in loop.in_order(rows, batch_size):
        batch = shard(batches.comparison_batch(comparisons, batch_rows, bucket_multiple))
        scores.append(np.asarray(score_pairs(params, batch.tokens, batch.attention_mask))[batch_rows >= 0])
    return np.concatenate(scores)


def report(comparisons: encoding.EncodedComparisons, rows: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """``evaluation.choice_report`` of scores [N, K] of the given rows, weighted as the rows are; with targets,
    ``evaluation.target_report``.
    """
    weights = None if comparisons.weight is None else comparisons.weight[rows]
    lengths = _response_lengths(comparisons, rows)
    if comparisons.targets is not None:
        return evaluation.target_report(scores, comparisons.targets[rows], lengths, weights)
    return evaluation.choice_report(scores, _best(comparisons, rows), lengths, weights)


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
    for i, (chosen, rejected) in enumerate(zip(best, evaluation.rival(scores, best, lengths), strict=True)):
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


def _normalized(
    stage: Stage,
    model: models.Model,
    params: Params,
    base_params: Params,
    prompts: Sequence[data_rows.Text],
    tokenizer: Tokenizer,
    config: RunConfig,
) -> Params:
    """Gain and shift that give scores mean 0 and variance 1 over samples of the base policy (lm-human-preferences)."""
    key = stage.key("rollout")
    count = config.reward_model.normalize_samples
    order = np.asarray(jax.random.permutation(jax.random.fold_in(key, 0), len(prompts)))
    chosen = [prompts[order[i % len(prompts)]] for i in range(count)]
    rows = [readers.Prompt(prompt, f"the prompt {prompt[:40]!r}") for prompt in chosen]
    encoded = inputs.encode_prompts(rows, tokenizer, model, config)
    sampling_config = sampling.SamplingConfig(
        max_new_tokens=config.rl.max_new_tokens,
        temperature=config.rl.temperature,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
    )
    rollout = inference.generate(
        model, base_params, encoded.tokens, encoded.attention_mask, jax.random.fold_in(key, 1), sampling_config
    )
    unit = params["score"] | {"gain": jnp.float32(1.0), "shift": jnp.float32(0.0)}
    score = jax.jit(models.score_fn(model))
    scores = np.asarray(score(params | {"score": unit}, rollout.tokens, rollout.attention_mask, None), np.float64)
    mean, std = float(scores.mean()), float(scores.std())
    if std == 0.0:
        print(f"scores are not normalised: all {len(scores)} samples of the base policy score {mean}", flush=True)
        return params
    print(f"normalised over {len(scores)} samples of the base policy: mean {mean:.4f}, std {std:.4f}", flush=True)
    return params | {"score": unit | {"gain": jnp.float32(1.0 / std), "shift": jnp.float32(-mean / std)}}
