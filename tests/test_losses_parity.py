"""Reward-model, DPO, SimPO, ORPO and KTO losses against torch as TRL computes them, with every
parameter's gradient, on random tiny GPT-2 and Llama models of transformers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.tree_util import Partial
from numpy.testing import assert_allclose
from tabular import numbers
from torch_models import torch_model

from rlhf_jax import dpo, kto, models, reward_model
from rlhf_jax.models import families
from rlhf_jax.types import Comparisons, Feedback

pytestmark = pytest.mark.parity

FAMILIES = {
    "gpt2": ("GPT2", {}),
    "llama": ("Llama", {"num_key_value_heads": 2, "attention_bias": True}),
}
PROMPT_LENGTH = 5
LENGTH = 12
PAD = 0


def pairs(**fields):
    """Three pairs: prompts padded on the left, answers of 1 to 7 tokens padded on the right."""
    rng = np.random.default_rng(0)
    column = np.arange(LENGTH)
    real = np.zeros((3, 2, LENGTH), bool)
    for row, (prompt, lengths) in enumerate([(5, (7, 4)), (2, (1, 6)), (3, (3, 3))]):
        for answer, length in enumerate(lengths):
            real[row, answer] = (column >= PROMPT_LENGTH - prompt) & (
                column < PROMPT_LENGTH + length
            )
    tokens = np.where(real, rng.integers(3, 31, real.shape), PAD)
    tokens[:, 1, :PROMPT_LENGTH] = tokens[:, 0, :PROMPT_LENGTH]
    response = real & (column >= PROMPT_LENGTH)
    return Comparisons(
        *(jnp.asarray(x, jnp.int32) for x in (tokens, real, response)),
        **fields,
    )


def rows(x):
    import torch

    return torch.tensor(
        np.asarray(x).reshape(6, LENGTH),
        dtype=torch.long,
    )


def torch_outputs(model, batch):
    """Scores [6, 1] or logits [6, T, V] of all answers, chosen and rejected in turn."""
    mask = rows(batch.attention_mask)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return model(input_ids=rows(batch.tokens), attention_mask=mask, position_ids=positions).logits


def torch_log_probs(model, batch):
    """Log-probs of the responses, summed: [3, 2]."""
    log_probs = torch_outputs(model, batch)[:, :-1].log_softmax(-1)
    chosen = log_probs.gather(2, rows(batch.tokens)[:, 1:, None])[..., 0]
    return (
        (chosen * rows(batch.response_mask)[:, 1:])
        .sum(1)
        .reshape(
            3,
            2,
        )
    )


def load(name, kind, folder, scale=1.0):
    """Our model and parameters from the folder of a torch model with large random weights, and that
    in float64.
    """
    import torch

    family, changes = FAMILIES[name]
    reference = torch_model(
        family, kind, **changes, **({"num_labels": 1} if kind == "classifier" else {})
    )
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(scale)
    reference.save_pretrained(folder)
    return *models.load(folder), reference.double()


def assert_gradients_equal(model, ours, reference):
    """Every parameter of the torch model has our gradient, and no gradient of ours is left out."""
    family = families.family_of(model.config)
    found = {}
    ours = dict(ours)
    if "score" in ours:  # a classifier's head has no bias, and gain and shift are not trained
        score = ours.pop("score")
        assert score["gain"] == score["shift"] == 0
        found[families.SCORE] = score["kernel"][None, :]
    for path, leaf in flatten_dict(ours).items():
        (name,) = family.tensors(path, leaf.shape)
        stored = leaf.T if family.transposed and path[-1] == "kernel" else leaf
        found[name] = stored.reshape(family.stored(path, leaf.shape))
    assert len(found) == len(jax.tree.leaves(ours)) + (families.SCORE in found)
    expected = {name: parameter.grad.numpy() for name, parameter in reference.named_parameters()}
    assert found.keys() == expected.keys()
    largest = max(np.abs(gradient).max() for gradient in expected.values())
    for name, gradient in found.items():
        # A difference of two scores leaves nothing to the bias of the last norm but rounding.
        atol = 1e-5 * np.abs(expected[name]).max() + 1e-7 * largest
        assert_allclose(
            gradient,
            expected[name],
            rtol=1e-4,
            atol=atol,
            err_msg=name,
        )


def assert_equal(model, reference, params, loss_fn, expected):
    """Our loss and gradients are those of ``expected``, a loss of the torch model."""
    (loss, metrics), gradients = jax.value_and_grad(numbers(loss_fn), has_aux=True)(params)
    reference.zero_grad()
    expected.backward()
    assert_allclose(loss, expected.item(), rtol=1e-5)
    assert_gradients_equal(model, gradients, reference)
    return metrics


@pytest.mark.parametrize("name", FAMILIES)
def test_reward_model_loss_and_gradients(tmp_path, name):
    """-log sigmoid(chosen - rejected - margin), and TRL's ``center_rewards_coefficient``."""
    import torch

    model, params, reference = load(name, "classifier", tmp_path)
    batch = pairs(margin=jnp.array([0.0, 0.5, 1.5]))
    config = reward_model.Config(centering=0.05)
    chosen, rejected = torch_outputs(reference, batch).reshape(3, 2).T
    expected = -torch.nn.functional.logsigmoid(
        chosen - rejected - torch.tensor(np.asarray(batch.margin))
    ).mean()
    expected = expected + 0.05 * ((chosen + rejected) ** 2).mean()
    options = {"score_fn": jax.jit(models.score_fn(model)), "config": config}
    metrics = assert_equal(
        model,
        reference,
        params,
        lambda params: reward_model.loss(params, batch, None, **options),
        expected,
    )
    assert_allclose(metrics["reward_model/margin"], (chosen - rejected).mean().item(), rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_dpo_loss_and_gradients(tmp_path, name):
    import torch

    model, params, policy = load(name, "causal_lm", tmp_path / "policy")
    _, ref_params, reference = load(name, "causal_lm", tmp_path / "reference", scale=0.9)
    with torch.no_grad():
        ref_log_probs = torch_log_probs(reference, pairs())
    policy_fn = jax.jit(models.policy_fn(model, prompt_length=PROMPT_LENGTH))
    batch = dpo.with_reference(pairs(), Partial(policy_fn, ref_params))
    assert_allclose(batch.ref_log_probs, ref_log_probs, rtol=1e-5)
    chosen, rejected = (torch_log_probs(policy, batch) - ref_log_probs).T
    h = 0.1 * (chosen - rejected)
    expected = -(
        0.9 * torch.nn.functional.logsigmoid(h) + 0.1 * torch.nn.functional.logsigmoid(-h)
    ).mean()
    options = {"policy_fn": policy_fn, "config": dpo.Config(beta=0.1, label_smoothing=0.1)}
    metrics = assert_equal(
        model, policy, params, lambda params: dpo.loss(params, batch, None, **options), expected
    )
    assert_allclose(metrics["dpo/margin"], h.mean().item(), rtol=1e-5)


def relatives(torch, mean, total):
    """Losses as TRL has them, of the mean log-probs of a token [3, 2] and of summed log-ratios [3,
    2].
    """
    log_sigmoid = torch.nn.functional.logsigmoid
    odds = (mean - torch.log1p(-torch.exp(mean))).T
    kl = torch.tensor(0.3, dtype=mean.dtype)
    liked = torch.sigmoid(0.1 * (total[:, 0] - kl))
    other = torch.sigmoid(0.1 * (kl - total[:, 1]))
    return {
        "simpo": -log_sigmoid(2.0 * (mean[:, 0] - mean[:, 1]) - 1.0).mean(),
        "orpo": (-mean[:, 0] - 0.1 * log_sigmoid(odds[0] - odds[1])).mean(),
        "kto": torch.cat([1 - liked, 1 - other]).mean(),
    }


@pytest.mark.parametrize("kind", ["simpo", "orpo", "kto"])
def test_relatives_of_dpo_and_their_gradients(tmp_path, kind):
    import torch

    model, params, policy = load("llama", "causal_lm", tmp_path)
    policy_fn = jax.jit(models.policy_fn(model, prompt_length=PROMPT_LENGTH))
    batch = pairs()
    lengths = torch.tensor([[7, 4], [1, 6], [3, 3]])
    summed = torch_log_probs(policy, batch)
    expected = relatives(torch, summed / lengths, summed + 20.0)[kind]
    if kind == "kto":
        flat = [
            x.reshape(6, LENGTH) for x in (batch.tokens, batch.attention_mask, batch.response_mask)
        ]
        rows = Feedback(
            *flat,
            jnp.arange(6) % 2 == 0,
            ref_log_probs=jnp.full(6, -20.0),
        )
        rows = rows.replace(reference_point=jnp.full(6, 0.3))
        loss = partial(kto.loss, feedback=rows, key=None, policy_fn=policy_fn, config=kto.Config())
    else:
        config = dpo.Config(
            kind=kind,
            **({"beta": 2.0, "gamma": 1.0} if kind == "simpo" else {}),
        )
        loss = partial(dpo.loss, comparisons=batch, key=None, policy_fn=policy_fn, config=config)
    assert_equal(model, policy, params, loss, expected)
