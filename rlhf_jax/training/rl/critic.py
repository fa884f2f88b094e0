"""The value function of an actor-critic run, a head or a separate model: its first parameters and
its optimizer.
"""

from collections.abc import Sequence
from dataclasses import replace

import jax
from optax import GradientTransformation as Optimizer
from optax import conditionally_mask, partition

from rlhf_jax import models
from rlhf_jax.config import Compute, RLStage
from rlhf_jax.errors import UserError, logger
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.graders import spec
from rlhf_jax.models.hf import model_folder
from rlhf_jax.training.common import initial, layout, optimizer
from rlhf_jax.training.common.initial import Trainable
from rlhf_jax.training.common.opening import OpenRun
from rlhf_jax.types import AlgorithmConfig, Params


def source_of(reward: Sequence[str], critic: AlgorithmConfig) -> str | None:
    """The folder (or Hugging Face name) of ``value_from``; None: the policy.

    reward: ``reward`` of the settings.

    Raises:
        UserError: it is "reward", and the run's reward is not one reward model.
    """
    if critic.value_from == "policy":
        return None
    if critic.value_from != "reward":
        return critic.value_from
    folders = [path for entry in reward for path in spec.sources(entry).values()]
    if len(folders) != 1 or not folders[0].is_dir():
        raise UserError(
            "value_from reward: the run's reward is not one reward model's folder; name the "
            "folder to start from, or give policy"
        )
    return str(folders[0])


def load(
    source: str, compute: Compute, policy: LanguageModel, length: int, place: layout.Place = None
) -> LanguageModel:
    """The model of ``value_from`` with a value head, for a value model that starts from it.

    A reward model's score head becomes the value head, its gain and shift included: the first
    values are the scores that it gives to the texts so far. Other models get a head of zeros.

    Args:
        source: as ``source_of`` gives it.
        length: of the longest prompt with its response, in tokens.
        place: as ``layout.placement`` gives it.

    Raises:
        UserError: the folder cannot be read, or has another tokenizer than the policy or fewer
            positions than ``length``.
    """
    loaded = initial.load_language_model(model_folder(source), compute, place)
    if loaded.tokenizer.fingerprint != policy.tokenizer.fingerprint:
        raise UserError(
            f"value_from {source}: its tokenizer is not the policy's, and a value model reads "
            "the policy's tokens; give a model with the same tokenizer"
        )
    initial.check_positions(f"value_from {source}: it", loaded.model, length)
    params = dict(loaded.params)
    head = params.pop("score", None)
    begins = "a head of zeros"
    if head is not None:
        begins = "its score head"
        params["value"] = as_value_head(head)
    logger.info(f"value model: {source}, with {begins}")
    return loaded._replace(params=params)


def as_value_head(score: Params) -> Params:
    """A value head with the values of a score head, ``gain * (w . h + bias) + shift``."""
    shifted = score["gain"] * score["bias"] + score["shift"]
    return {"kernel": score["gain"] * score["kernel"], "bias": shifted}


def start(
    run: OpenRun,
    policy: Trainable,
    params: Params,
    width: int | None = None,
    source: Params | None = None,
    *,
    has_head: bool = False,
) -> Trainable:
    """The initial parameters of a policy and its separate value model, on the devices: {"policy",
    "value"}.

    Args:
        params: of the policy, from which the value model starts if there is no ``source``.
        width: of the states that a head reads, as in ``models.add_head``.
        source: of another model that it starts from, with or without a value head.
        has_head: whether the policy's network has a value head of its own.
    """
    key = run.key("init")
    with_head = params if source is None else source
    if source is None and not has_head:
        with_head = models.add_head(key, params, "value", width)
    elif source is not None and "value" not in source:
        with_head = models.add_head(key, source, "value")
    critic = initial.trainable(run.config.lora, with_head, jax.random.fold_in(key, 3))
    body = policy.base if source is None else critic.put(run.layout).base
    return beside(policy, critic.params, body)


def beside(policy: Trainable, value: Params, body: Params | None = None) -> Trainable:
    """Policy and value model as one: {"policy", "value"}. Under LoRA ``body`` is the frozen part of
    the value model; where it is the policy's, nothing is copied.
    """
    base = policy.base and {"policy": policy.base, "value": body}
    return Trainable({"policy": policy.params, "value": value}, base)


def make_optimizer(
    settings: RLStage, own: AlgorithmConfig, updates: int, params: Params, policy: Optimizer | None
) -> Optimizer:
    """The optimizer of a policy and of a value model, or a value head with its own learning rate or
    warm-up, each with its own (``split``). The policy's schedule begins after the warm-up.

    Args:
        own: the algorithm's settings.
        updates: optimizer steps of an iteration.
        policy: of the policy; None: ``rl.optimizer``.
    """
    adam = settings.optimizer
    if policy is None:
        steps = (settings.num_iterations - own.value_warmup) * updates
        policy = optimizer.make_optimizer(adam, steps)
    if own.value_learning_rate is not None:
        adam = replace(adam, learning_rate=own.value_learning_rate)
    value = optimizer.make_optimizer(adam, settings.num_iterations * updates)
    return split(policy, value, params, own.value_warmup * updates)


def split(
    policy: Optimizer,
    value: Optimizer,
    params: Params,
    frozen_steps: int = 0,
) -> Optimizer:
    """``value`` for ``params["value"]``, a head or a model, and ``policy`` for the rest; each clips
    its own gradients.

    In the first ``frozen_steps`` steps the rest and the state of ``policy`` do not change.
    """
    if frozen_steps:
        policy = conditionally_mask(policy, lambda step: step >= frozen_steps)
    labels = {name: "value" if name == "value" else "policy" for name in params}
    return partition({"policy": policy, "value": value}, labels)
