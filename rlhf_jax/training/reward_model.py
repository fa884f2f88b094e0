"""Reward-model training as a run: preference pairs in, a normalised reward model with its tokenizer out."""

import functools
from collections.abc import Callable, Sequence

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


def run(config: RunConfig) -> RunResult:
    """Trains on the comparisons of ``config.reward_model.data`` or ``config.data``.

    ``--model`` is the body to start from and also taken for the base policy, over whose samples scores are normalised.

    Raises:
        UserError: for whatever is wrong with the data, the model's folder, the run folder or the settings.
    """
    settings = config.reward_model
    checks.supervised("reward_model", settings, start(config))
    pairs = inputs.read("comparisons", settings.data, config.data, config.seed, config.model)
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
            report = evaluate(
                score_pairs,
                state.params,
                encoded,
                held_out,
                batch_size=settings.batch_size,
                bucket_multiple=config.text.bucket_multiple,
                shard=stage.shard,
            )
            return Validation({f"validation/{name}": value for name, value in report.items()})

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
        if config.model is None:
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
    shard: Callable[[Comparisons], Comparisons] = lambda batch: batch,
) -> dict[str, float]:
    """``evaluation.preference_report`` of a ``pair_scorer``'s scores over the given rows: the best answer against the
    highest other one. With targets: ``loss``, the mean squared error over answers.
    """
    scores = []
    for batch_rows in loop.in_order(rows, batch_size):
        batch = shard(batches.comparison_batch(comparisons, batch_rows, bucket_multiple))
        scores.append(np.asarray(score_pairs(params, batch.tokens, batch.attention_mask))[batch_rows >= 0])
    every = np.concatenate(scores)
    lengths = np.stack([(texts.lengths - np.asarray(texts.starts))[rows] for texts in comparisons.answers], axis=1)
    present = lengths > 0
    if comparisons.targets is not None:
        return {"loss": float(np.mean((every - comparisons.targets[rows])[present] ** 2))}
    first = np.arange(len(rows))
    best = np.zeros(len(rows), np.int64) if comparisons.best is None else comparisons.best[rows]
    others = np.where(present, every, -np.inf)
    others[first, best] = -np.inf
    runner_up = others.argmax(axis=1)
    both = np.stack([lengths[first, best], lengths[first, runner_up]], axis=1)
    return evaluation.preference_report(every[first, best], every[first, runner_up], both)


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
