"""Reward-model training as a run: preference pairs in, a normalised reward model or an ensemble of them out."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import generator, models, sampling
from rlhf_jax.algorithms import reward_model
from rlhf_jax.config import RunConfig
from rlhf_jax.data import batches, encoding
from rlhf_jax.data.rows import Prompt
from rlhf_jax.training import ensembles, scoring, supervised
from rlhf_jax.training.loop import Validation
from rlhf_jax.training.scoring import evaluate as evaluate
from rlhf_jax.training.scoring import pair_scorer as pair_scorer
from rlhf_jax.training.stage import RunResult
from rlhf_jax.types import Params, Rollout, TrainState

MAX_SAMPLES = 256  # held-out rows whose texts and scores each validation writes


def run(config: RunConfig) -> RunResult:
    """Trains on the comparisons of ``config.reward_model.data`` or ``config.data``.

    ``--model`` is the body to start from and also taken for the base policy, over whose samples scores are normalised.
    With ``ensemble_size`` above 1 the members are saved as ``model/member_0``, ``model/member_1``, ...; metrics and
    samples are of their mean score, and ``validation/uncertainty`` is their standard deviation.

    Raises:
        UserError: for whatever is wrong with the data, the model's folder, the run folder or the settings.
    """
    return supervised.run(config, config.reward_model, KIND)


def _task(setting: supervised.Setting) -> supervised.Task:
    stage, encoded, held_out = setting.stage, setting.encoded, setting.held_out
    config, settings = stage.config, stage.config.reward_model
    num_members = settings.ensemble_size
    starts = ensembles.starts(config, setting.initial.model, setting.initial.params, stage.key("init"))
    start = stage.place(starts[0])
    score_fn = start.bind(models.score_fn(setting.initial.model))
    update_fn = reward_model.update if num_members == 1 else ensembles.update
    update = stage.jit_update(functools.partial(update_fn, optimizer=setting.optimizer, config=settings))
    score_pairs = scoring.scorer(score_fn, num_members)

    def validate(state: TrainState) -> Validation:
        scores = scoring.score_rows(
            score_pairs,
            state.params,
            encoded,
            held_out,
            batch_size=settings.batch_size,
            bucket_multiple=config.text.bucket_multiple,
            shard=stage.shard,
        )
        values = {}
        if num_members > 1:
            values = {"uncertainty": scoring.uncertainty(encoded, held_out, scores)}
            scores = scores.mean(axis=2)
        values |= scoring.report(encoded, held_out, scores)
        shown = scoring.evenly(len(held_out), MAX_SAMPLES)
        return Validation(
            {f"validation/{name}": value for name, value in values.items()},
            scoring.samples(encoded, held_out[shown], scores[shown], setting.initial.tokenizer),
        )

    def trained(state: TrainState) -> Mapping[str, Params]:
        members = {"": state.params}
        if num_members > 1:
            members = {f"member_{i}": params for i, params in enumerate(ensembles.unstack(state.params))}
        if settings.normalize_samples and config.model is None:
            print("scores are not normalised: no --model, so there is no base policy to sample from", flush=True)
        elif settings.normalize_samples:
            samples, score = _base_samples(setting), scoring.scorer(score_fn)
            members = {name: _normalized(score, params, samples) for name, params in members.items()}
        return members

    state = (
        TrainState.create(start.params, setting.optimizer)
        if num_members == 1
        else ensembles.create([member.params for member in starts], setting.optimizer)
    )
    update = functools.partial(update, score_fn=score_fn)
    held = {"frozen weights": start.base}
    return supervised.Task(start, state, update, validate, trained, held, _ensemble_batch(setting))


def _ensemble_batch(setting: supervised.Setting) -> Callable[[np.ndarray], object] | None:
    """Batches with a weight of each row for each member; None for a single model."""
    stage = setting.stage
    settings, num_rows = stage.config.reward_model, len(setting.train_rows)
    if settings.ensemble_size == 1:
        return None
    counts = np.ones((num_rows, settings.ensemble_size), np.int64)
    if settings.bootstrap:  # keys 0 and 1 are the split's and the order's
        counts = ensembles.bootstrap(jax.random.fold_in(stage.key("data"), 2), settings.ensemble_size, num_rows)
    counted = ensembles.with_counts(setting.encoded, setting.train_rows, counts)
    multiple = stage.config.text.bucket_multiple
    return lambda numbers: stage.shard(batches.comparison_batch(counted, numbers, multiple))


def _base_samples(setting: supervised.Setting) -> Rollout:
    """``normalize_samples`` responses of the base policy to prompts of the data."""
    config, (model, params, tokenizer) = setting.stage.config, setting.initial
    prompts = sorted({row.prompt for row in setting.rows}, key=lambda prompt: (isinstance(prompt, tuple), prompt))
    key = setting.stage.key("rollout")
    order = np.asarray(jax.random.permutation(jax.random.fold_in(key, 0), len(prompts)))
    chosen = [prompts[order[i % len(prompts)]] for i in range(config.reward_model.normalize_samples)]
    encoded = encoding.encode_prompts(
        [Prompt(prompt, f"the prompt {prompt[:40]!r}") for prompt in chosen],
        tokenizer,
        template=config.text.template,
        too_long=config.text.too_long,
        length=config.rl.max_prompt_length,
        max_positions=model.config.max_length,
        max_new_tokens=config.rl.max_new_tokens,
    )
    sampling_config = sampling.SamplingConfig(
        max_new_tokens=config.rl.max_new_tokens,
        temperature=config.rl.temperature,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
    )
    inputs = (encoded.tokens, encoded.attention_mask, jax.random.fold_in(key, 1))
    return generator.sample_in_batches(model, params, *inputs, config=sampling_config)


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


KIND = supervised.Kind(
    name="reward_model",
    rows="comparisons",
    encode=encoding.encode_comparisons,
    batch=batches.comparison_batch,
    show=("reward_model/loss", "reward_model/accuracy", "validation/accuracy"),
    sources=lambda encoded: encoded.answers[0].sources,
    task=_task,
)
