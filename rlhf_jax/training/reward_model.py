"""Reward-model training as a run: preference pairs in, a normalised reward model or an ensemble of
them out.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import models, sharding
from rlhf_jax.algorithms import reward_model
from rlhf_jax.config import RunConfig
from rlhf_jax.data import encoding
from rlhf_jax.data.rows import Row
from rlhf_jax.errors import logger
from rlhf_jax.training import ensembles, initial, memory, scoring, supervised
from rlhf_jax.training.loop import Validation
from rlhf_jax.training.stage import RunResult
from rlhf_jax.types import Comparisons, Params, Rollout, TrainState

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
    show = ("reward_model/loss", "reward_model/accuracy", "validation/accuracy")
    return supervised.run(config, "reward_model", _task, show)


def _task(setting: supervised.Setting) -> supervised.Task:
    stage, encoded, held_out = setting.stage, setting.encoded, setting.held_out
    config, settings, (model, loaded, tokenizer) = (
        stage.config,
        stage.config.reward_model,
        setting.initial,
    )
    is_ensemble = settings.ensemble_size > 1
    starts = ensembles.starts(config, model, loaded, stage.key("init"))
    start = stage.place(starts[0])
    for member in starts:
        memory.free(member.loaded)
    score_fn = start.bind(models.score_fn(model))
    score_answers = scoring.answer_scorer(score_fn, settings.ensemble_size)

    def validate(state: TrainState) -> Validation:
        sizes = {"batch_size": settings.batch_size, "bucket_multiple": config.text.bucket_multiple}
        score = functools.partial(score_answers, state.params)
        scores = scoring.score_rows(score, encoded, held_out, shard=stage.shard, **sizes)
        values = (
            {"uncertainty": scoring.disagreement(encoded, held_out, scores)} if is_ensemble else {}
        )
        scores = scores.mean(axis=2) if is_ensemble else scores
        values |= scoring.report(encoded, held_out, scores)
        shown = scoring.evenly(len(held_out), MAX_SAMPLES)
        samples = scoring.samples(encoded, held_out[shown], scores[shown], tokenizer)
        return Validation({f"validation/{name}": value for name, value in values.items()}, samples)

    def trained(state: TrainState) -> Mapping[str, Params]:
        unstacked = enumerate(ensembles.unstack(state.params)) if is_ensemble else ()
        members = {f"member_{i}": params for i, params in unstacked} or {"": state.params}
        if settings.normalize_samples and config.model is None:
            logger.info(
                "scores are not normalised: no --model, so there is no base policy to sample from"
            )
        elif settings.normalize_samples:
            samples, score = _base_samples(setting), scoring.answer_scorer(score_fn)
            members = {
                name: _normalized(score, params, samples) for name, params in members.items()
            }
        return members

    params = [member.params for member in starts] if is_ensemble else start.params
    create = functools.partial(
        ensembles.create if is_ensemble else TrainState.create, optimizer=setting.optimizer
    )
    single = functools.partial(reward_model.update, minibatch_sharding=sharding.rows(stage.mesh))
    update = ensembles.update_members if is_ensemble else single
    configured = functools.partial(update, optimizer=setting.optimizer, config=settings)
    jitted = stage.jit_update(configured, setting.initial.model.config.num_blocks)
    bound, own_weights = (
        functools.partial(jitted, score_fn=score_fn),
        _weighted(setting) if is_ensemble else None,
    )
    return supervised.Task(
        start._replace(params=params),
        create,
        bound,
        validate,
        trained=trained,
        train_on=own_weights,
    )


def _weighted(setting: supervised.Setting) -> encoding.EncodedTexts:
    """The comparisons with a weight of each row for each member of an ensemble."""
    settings, num_rows = setting.stage.config.reward_model, len(setting.train_rows)
    key = jax.random.fold_in(
        setting.stage.key("data"), 2
    )  # 0 and 1 are the split's and the order's
    drawn = ensembles.bootstrap(key, settings.ensemble_size, num_rows)
    return ensembles.with_counts(
        setting.encoded, setting.train_rows, drawn if settings.bootstrap else np.ones_like(drawn)
    )


def _base_samples(setting: supervised.Setting) -> Rollout:
    """``normalize_samples`` responses of the base policy to prompts of the data."""
    config = setting.stage.config  # the weights that were loaded first have been freed
    language_model = initial.language_model(config, (), setting.stage.key("init"), is_policy=False)
    prompts = sorted(
        {row.prompt for row in setting.rows}, key=lambda prompt: (isinstance(prompt, tuple), prompt)
    )
    key = setting.stage.key("rollout")
    order = np.asarray(jax.random.permutation(jax.random.fold_in(key, 0), len(prompts)))
    chosen = [
        prompts[order[i % len(prompts)]] for i in range(config.reward_model.normalize_samples)
    ]
    rows = [Row(prompt, (), f"the prompt {prompt[:40]!r}") for prompt in chosen]
    encoded = initial.prompts_for(config, setting.initial, rows, " (to normalise scores)")
    how = initial.sampling_config(config.rl, language_model.tokenizer)
    return language_model.sample(
        encoded.tokens, encoded.attention_mask, jax.random.fold_in(key, 1), config=how
    )


def _normalized(
    score: Callable[[Params, Comparisons], jax.Array], params: Params, rollout: Rollout
) -> Params:
    """Gain and shift that give scores mean 0 and variance 1 over samples of the base policy
    (lm-human-preferences).
    """
    unit = params["score"] | {"gain": jnp.float32(1.0), "shift": jnp.float32(0.0)}
    tokens, mask, response = (
        x[:, None] for x in (rollout.tokens, rollout.attention_mask, rollout.response_mask)
    )
    scores = np.asarray(
        score(params | {"score": unit}, Comparisons(tokens, mask, response)), np.float64
    )  # [N, 1]
    mean, std = float(scores.mean()), float(scores.std())
    if std == 0.0:
        logger.info(
            f"scores are not normalised: all {len(scores)} samples of the base policy score {mean}"
        )
        return params
    logger.info(
        f"normalised over {len(scores)} samples of the base policy: mean {mean:.4f}, std {std:.4f}"
    )
    return params | {
        "score": unit | {"gain": jnp.float32(1.0 / std), "shift": jnp.float32(-mean / std)}
    }
