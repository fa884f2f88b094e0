"""The teacher of a distillation run: a model of the policy's vocabulary."""

import jax
import jax.numpy as jnp

from rlhf_jax import models, ops
from rlhf_jax.config import RLStage
from rlhf_jax.errors import UserError
from rlhf_jax.generator import LanguageModel
from rlhf_jax.models.hf import model_folder
from rlhf_jax.training import initial
from rlhf_jax.training.stage import Stage
from rlhf_jax.types import AlgorithmConfig, Params, Rollout, Scores


def load(
    stage: Stage, method_config: AlgorithmConfig, policy: LanguageModel, length: int
) -> LanguageModel | None:
    """The model of the settings' ``teacher``, on the devices; None for a method without one.

    Args:
        length: of the longest prompt with its response, in tokens.

    Raises:
        UserError: none is given, the folder cannot be read, the vocabulary is another one, or the
            model reads shorter texts.
    """
    if not method_config.needs_teacher:
        return None
    source = method_config.teacher
    if source is None:
        raise UserError("no teacher: give --distill.teacher the folder of a model, or of its run")
    source = model_folder(source)
    place = initial.placement(stage.config)
    loaded = initial.load_language_model(source, stage.config.compute, place)
    _check_vocabulary(source, loaded, policy)
    if "score" in loaded.params:
        raise UserError(f"distill.teacher {source}: this is a reward model, which says nothing")
    reads = loaded.model.config.max_length
    if reads < length:
        raise UserError(
            f"distill.teacher {source}: it reads {reads} tokens; shorten prompt and response, now "
            f"{length}"
        )
    return loaded._replace(params=stage.lay_out(loaded.params))


def _check_vocabulary(source: str, teacher: LanguageModel, policy: LanguageModel) -> None:
    """Raises UserError unless each id is the same text for both."""
    theirs = teacher.tokenizer.backend.get_vocab()
    ours = policy.tokenizer.backend.get_vocab()
    if theirs == ours:
        return
    other = [text for text, number in ours.items() if theirs.get(text) != number]
    other += [text for text in theirs if text not in ours]
    raise UserError(
        f"distill.teacher {source}: its vocabulary is another one: {len(other)} of "
        f"{len(theirs.keys() | ours.keys())} entries differ, such as {other[0]!r}. Probabilities "
        "of the next token are compared, so policy and teacher need the same tokens"
    )


def log_ratio(
    teacher: LanguageModel, settings: RLStage, score_rows: int | None
) -> jax.tree_util.Partial:
    """A RewardFn for runs without a reward: ``log q - log p`` of each response, q the teacher and p
    the policy. Its mean is minus the KL of responses from the teacher, at most 0 but for noise.

    Args:
        score_rows: rows that the teacher scores at once, see ``ops.by_rows``.
    """

    def score(params: Params, rollout: Rollout) -> Scores:
        prompt_length = rollout.tokens.shape[1] - settings.max_new_tokens
        policy_fn = models.policy_fn(teacher.model, settings.temperature, prompt_length)
        by_rows = ops.by_rows(policy_fn, score_rows)
        log_probs = ops.evaluate(by_rows, params, rollout).log_probs
        gap = jnp.where(rollout.mask, log_probs - rollout.log_probs, 0.0)
        return jnp.sum(gap, axis=1), {}

    return jax.tree_util.Partial(score, teacher.params)
