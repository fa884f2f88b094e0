"""Online DPO, XPO and Nash-MD: losses against TRL's numbers and slow NumPy, what samples, and the
policies that they converge to.
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from builders import goes_on_alike, letters_run, slow, tiny, with_rl
from numpy.testing import assert_allclose, assert_array_equal
from tabular import (
    assert_close,
    assert_identical,
    every_way,
    numbers,
    policy_fn,
    policy_params,
    rollout,
)

from rlhf_jax import iteration, ops, sampling, training
from rlhf_jax.algorithms import nash_md, online_dpo, xpo
from rlhf_jax.types import PolicyOutput, Rollout, TrainState


def given(params, tokens, attention_mask, key):
    """The policy whose log-probs are its parameters."""
    return PolicyOutput(params["log_probs"], jnp.zeros(tokens.shape))


def rollout_of(log_probs, ref_log_probs, **fields):
    """Rows [B, T] with a prompt of one token, whose column is poisoned."""
    log_probs, ref_log_probs = (
        np.pad(x, ((0, 0), (1, 0)), constant_values=np.nan).astype(np.float32)
        for x in (log_probs, ref_log_probs)
    )
    mask = np.ones(log_probs.shape, np.int32)
    response = mask * (np.arange(mask.shape[1]) > 0)
    arrays = (np.zeros(mask.shape, np.int32), mask, response, log_probs)
    return Rollout(*arrays, ref_log_probs=ref_log_probs, **fields)


def evaluated(module, config, rollout):
    """Loss, metrics, and gradient by log-probs [B, T] without the prompt."""

    def loss(params, rollout):
        prepared = module.prepare(rollout, config=config)
        return numbers(module.loss)(params, prepared, None, policy_fn=given, config=config)

    found = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, metrics), gradient = found({"log_probs": rollout.log_probs}, rollout)
    return value, metrics, gradient["log_probs"][:, 1:]


def in_turn(own, other):
    return np.stack([own, other], axis=1).reshape(-1, *own.shape[1:])


PLACES = np.arange(24.0).reshape(2, 4, 3)
OWN, OTHER = -1.5 + np.sin(3 * PLACES + 1)
REF_OWN, REF_OTHER = -1.5 + np.cos(5 * PLACES)
SCORES = np.array([[0.2, 0.9], [1.5, -0.5], [0.3, 0.1], [-1.0, 2.0]], np.float32)
PAIRS = rollout_of(in_turn(OWN, OTHER), in_turn(REF_OWN, REF_OTHER), scores=SCORES.reshape(-1))
# Of TRL 1.13 (PYTHONPATH=trl-1.13.0), the last version with XPO and Nash-MD, in float64:
#   XPOTrainer._compute_losses(SimpleNamespace(beta=0.3, alpha=alpha, args=SimpleNamespace(
#       loss_type=kind)), own, other, ref_other, ref_own, scores[:, 0] >= scores[:, 1])
# and of the loss the gradients by the first tokens; those by the others are equal.
XPO = {
    ("sigmoid", 0.0): (
        0.5947554003374463,
        [0.03831952491308339, -0.04923705171209756, -0.01925894066352162, 0.01935279345565267],
        [-0.03831952491308339, 0.04923705171209756, 0.01925894066352162, -0.01935279345565267],
    ),
    ("sigmoid", 0.05): (
        0.370628650548952,
        [0.03831952491308339, -0.04923705171209756, -0.01925894066352162, 0.01935279345565267],
        [-0.025819524913083387, 0.06173705171209756, 0.03175894066352162, -0.006852793455652668],
    ),
    ("ipo", 0.05): (
        5.9950210530004355,
        [0.9061915927189349, -1.9128484613253334, 0.9379027064500508, -0.9269918431752372],
        [-0.893691592718935, 1.9253484613253333, -0.9254027064500508, 0.9394918431752372],
    ),
}
#   NashMDTrainer._compute_losses(SimpleNamespace(beta=0.3), own, ref_own,
#       torch.sigmoid(scores[:, 0] - scores[:, 1])), the gradient by own
NASH = [
    [0.030157266902633765, -0.03598790801579507, 0.15425130262668463],
    [-0.07902425934676169, -0.0942928963684769, -0.191132229134111],
    [-0.01278656734496686, 0.054654567856963224, 0.027635474038467174],
    [0.09406231666736875, 0.010468256169469933, 0.15116522644496339],
]


@pytest.mark.parametrize(
    ("kind", "alpha"), [("sigmoid", 0.0), ("sigmoid", 0.05), slow("ipo", 0.05)]
)
def test_xpo_and_online_dpo_of_pairs_are_trls(kind, alpha):
    expected, *gradients = XPO[kind, alpha]
    configs = [(xpo, xpo.Config(beta=0.3, kind=kind, alpha=alpha))]
    if alpha == 0:
        configs.append((online_dpo, online_dpo.Config(beta=0.3, kind=kind)))
    for module, config in configs:
        value, _, gradient = evaluated(module, config, PAIRS)
        assert_allclose(value, expected, rtol=1e-6)
        by_row = in_turn(*map(np.array, gradients))
        assert_allclose(gradient, np.repeat(by_row[:, None], 3, axis=1), atol=1e-6)


def test_nash_md_is_trls():
    """TRL's loss has another value, since the loss here has no log-probability in it, and the same
    gradient."""
    config = nash_md.Config(kl_loss_coef=0.3, preference="scores")
    _, metrics, gradient = evaluated(nash_md, config, PAIRS)
    assert_allclose(gradient[::2], NASH, atol=1e-6)
    assert_array_equal(gradient[1::2], 0)
    wins = 1 / (1 + np.exp(SCORES[:, 1] - SCORES[:, 0]))
    assert_allclose(metrics["policy/loss"], -3 * np.mean(wins - 0.5), rtol=1e-5)


def test_nash_md_of_shares_that_are_won():
    """Of two rows one is missing: the other has no opponent and does not learn."""
    shares = in_turn(np.float32([1.0, 0.5, 0.0, 0.25]), np.float32([0.0, 0.5, 1.0, 0.75]))
    mask = PAIRS.response_mask * np.array([1, 1, 1, 1, 1, 0, 1, 1])[:, None]
    rows = replace(PAIRS, scores=shares, response_mask=mask)
    _, _, gradient = evaluated(nash_md, nash_md.Config(kl_loss_coef=0.0), rows)
    expected = np.zeros(8)
    expected[[0, 2, 6]] = np.array([-0.5, 0.0, 0.25]) / 3
    assert_allclose(gradient, np.repeat(expected[:, None], 3, axis=1), atol=1e-7)


def test_rewards_that_are_no_shares_of_a_comparison_stop_nash_md():
    scores = in_turn(np.float32([3.7, 0.5, 0.0, 0.25]), np.float32([1.0, 0.5, 1.0, 0.75]))
    rows = replace(PAIRS, scores=scores)
    prepared = nash_md.prepare(rows, config=nash_md.Config())
    is_nan = np.isnan(np.where(prepared.mask, prepared.advantages, 0)).any(axis=1)
    assert_array_equal(is_nan, [True] + [False] * 7)
    of_any = nash_md.prepare(rows, config=nash_md.Config(preference="scores"))
    assert np.isfinite(of_any.advantages).all()
    assert nash_md.Config(kl_loss_coef=0.0).kl_in_loss  # its opponent is the reference's


def test_online_dpo_compares_the_best_answer_with_the_worst():
    """Of three; in the second group only the worst two are there, in the third all are equal, in
    the fourth one is left."""
    rng = np.random.default_rng(0)
    log_probs, reference = -rng.uniform(0.1, 2, (2, 12, 3))
    scores = np.float32([0, 2, 1, 9, -1, -2, 3, 3, 3, 1, 2, 3])
    rows = rollout_of(log_probs, reference, scores=scores)
    present = np.array([1, 1, 1, 0, 1, 1, 1, 1, 1, 0, 1, 0])
    rows = replace(rows, response_mask=rows.response_mask * present[:, None])
    config = online_dpo.Config(group_size=3, beta=0.7)
    value, metrics, gradient = evaluated(online_dpo, config, rows)
    moved = (log_probs - reference).sum(axis=1)
    deltas = 0.7 * np.array([moved[1] - moved[0], moved[4] - moved[5]])
    assert_allclose(value, np.mean(np.log1p(np.exp(-deltas))), rtol=1e-6)
    assert_allclose(metrics["dpo/margin"], deltas.mean(), rtol=1e-5)
    expected = np.zeros(12)
    slopes = -0.7 / (1 + np.exp(deltas)) / 2
    expected[[1, 0]] = slopes[0], -slopes[0]
    expected[[4, 5]] = slopes[1], -slopes[1]
    assert_allclose(gradient, np.repeat(expected[:, None], 3, axis=1), atol=1e-6)


def test_online_dpo_compares_sums_of_rewards_at_tokens():
    """The first answer has the larger reward at a token, the second the larger sum."""
    dense = np.zeros((2, 4), np.float32)
    dense[:, 2:] = [[-4.0, 5.0], [2.0, 0.0]]
    rows = rollout_of(np.full((2, 3), -1.0), np.full((2, 3), -1.0), rewards=dense, dense=True)
    _, _, gradient = evaluated(online_dpo, online_dpo.Config(beta=0.5), rows)
    assert_allclose(gradient, np.repeat([[0.25], [-0.25]], 3, axis=1), atol=1e-6)


@pytest.mark.parametrize(
    ("module", "fields", "message"),
    [
        (online_dpo, {"group_size": 1}, "group_size must be at least 2"),
        (online_dpo, {"kind": "simpo"}, "kind must be one of sigmoid, hinge, ipo"),
        (xpo, {"group_size": 3}, "group_size must be at most 2"),
        (xpo, {"alpha": -1.0}, "alpha must be at least 0"),
        (nash_md, {"mixture": 1.5}, "mixture must be at most 1"),
        (nash_md, {"preference": "ranks"}, "preference must be one of wins, scores"),
    ],
)
def test_a_wrong_setting_is_named(module, fields, message):
    with pytest.raises(ValueError, match=message):
        module.Config(**fields)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "fields"),
    [(online_dpo, {"group_size": 4}), (xpo, {"alpha": 0.5}), (nash_md, {"preference": "scores"})],
)
def test_an_update_is_the_same_on_any_devices_and_in_microbatches(module, fields):
    lengths = [4, 1, 2, 0, 3, 0, 0, 0, 0, 0, 0, 0, 2, 4, 1, 1]
    scores = np.float32(np.sin(np.arange(16)))
    batch = rollout(0, lengths).replace(advantages=None, rewards=None, scores=scores)
    optimizer = optax.sgd(0.3)
    state = TrainState.create(policy_params(0), optimizer)
    how = {"policy_fn": policy_fn, "optimizer": optimizer}
    key = jax.random.key(0)
    update = functools.partial(module.update, config=module.Config(**fields), **how)
    expected = jax.jit(update)(state, batch, key)
    assert expected[1]["grad_norm"] > 0
    for found in every_way(update, state, batch, key):
        assert_close(found, expected)
    parts = replace(module.Config(**fields), num_microbatches=2)
    found = jax.jit(functools.partial(module.update, config=parts, **how))(state, batch, key)
    assert_close(found, expected)


# --- What samples

HOW = sampling.SamplingConfig(4, temperature=0.7, eos_id=1, pad_id=0)


@functools.cache
def sampler():
    """``sample`` as a run gives it, prompts of three rows each twice, and two policies."""
    model, policy = tiny()
    reference = jax.tree.map(lambda x: -x, policy)

    def sample(params, prompts, key, *, model=model, **changes):
        config = replace(HOW, **changes)
        return iteration.respond(params, prompts, key, model=model, config=config)

    tokens = np.repeat(np.array([[5, 6, 7], [0, 3, 8], [2, 9, 4]], np.int32), 2, axis=0)
    prompts = iteration.Prompts(tokens, (tokens > 0) * 1, np.repeat(np.arange(3), 2))
    return model, sample, prompts, policy, reference


def responses(module, config, key=0):
    model, sample, prompts, policy, reference = sampler()
    options = {"model": model, "policy": policy, "reference": reference, "config": config}
    respond = functools.partial(module.respond, sample, **options)
    return jax.jit(respond)(prompts, jax.random.key(key))


def alone(params, half, key=0):
    """The responses of one policy to the even or odd prompts, with the key of that half."""
    _, sample, prompts, *_ = sampler()
    rows = jax.tree.map(lambda x: x[half::2], prompts)
    return jax.jit(sample)(params, rows, jax.random.split(jax.random.key(key))[half])


def test_xpo_samples_from_the_policy_and_from_the_reference():
    *_, policy, reference = sampler()
    both = responses(xpo, xpo.Config())
    assert_array_equal(both.row_ids, [0, 0, 1, 1, 2, 2])
    for half, params in enumerate((policy, reference)):
        expected = alone(params, half)
        assert_identical(jax.tree.map(lambda x, half=half: x[half::2], both), expected)
    assert np.any(np.asarray(both.tokens[::2]) != both.tokens[1::2])


@pytest.mark.parametrize("mixture", [slow(0.0), 0.25, slow(1.0)])
def test_nash_md_samples_from_the_policy_and_from_the_mixture(mixture):
    """Log-probs are those of the weighted logits at the temperature, by whole forward passes."""
    model, _, _, policy, reference = sampler()
    both = responses(nash_md, nash_md.Config(mixture=mixture))
    assert_identical(jax.tree.map(lambda x: x[::2], both), alone(policy, 0))
    mixed = jax.tree.map(lambda x: x[1::2], both)
    if mixture in (0, 1):
        assert_array_equal(mixed.tokens, alone((policy, reference)[int(mixture)], 1).tokens)
    first, second = (
        model.apply(params, mixed.tokens, mixed.attention_mask) for params in (policy, reference)
    )
    logits = (1 - mixture) * first + mixture * second
    expected = ops.token_log_probs(logits, mixed.tokens, HOW.temperature)
    assert_allclose(mixed.log_probs, ops.masked(expected, mixed.mask), atol=1e-5)
    assert np.min(np.sum(mixed.mask, axis=1)) > 0


def test_a_mixture_has_no_more_columns_than_its_model():
    model, _, prompts, policy, _ = sampler()
    mixed = sampling.mixture(model, 0.5)
    how = replace(HOW, max_new_tokens=8)
    with pytest.raises(ValueError, match="max_length 10"):
        sampling.generate(mixed, (policy, policy), *prompts[:2], jax.random.key(0), config=how)


@pytest.mark.parametrize("module", [slow(online_dpo), xpo, slow(nash_md)])
def test_a_run_learns_and_goes_on_exactly(module, tmp_path):
    """Kept log-probs are those of what sampled: in XPO's odd rows the reference's own."""
    seen = []
    config = with_rl(letters_run(tmp_path), num_iterations=4, batch_size=16, validation_interval=9)
    config = replace(config, checkpoint_interval=2)
    how = {nash_md: {"preference": "scores"}, xpo: {"alpha": 0.01}}.get(module, {})

    def run(config):
        return training.rl.run(
            config,
            module,
            module.Config(num_minibatches=2, **how),
            reward=lambda rollout: (jnp.sin(jnp.sum(rollout.tokens * rollout.mask, axis=1)), {}),
            optimizer=optax.sgd(3.0),
            on_step=lambda step, state, row, batch: seen.append((row, jax.device_get(batch))),
        )

    straight = run(config)
    for step, (row, batch) in enumerate(seen):
        gap = np.abs(batch.log_probs - batch.ref_log_probs).max(axis=1)
        assert row["grad_norm"] > 0
        assert batch.row_ids[::2].tolist() == batch.row_ids[1::2].tolist()
        assert (gap[::2].max() > 1e-3) == (step > 0)
        if module is xpo:
            assert gap[1::2].max() < 1e-5
        assert ("policy/sampler_gap" in row) == (module is online_dpo)
    goes_on_alike(run, config, straight)


# --- What they converge to: answers of one token, all pairs of them with their probability


def all_pairs(number):
    """Rollouts [N * N, 2, 2] of every pair of answers."""
    first, second = (x.reshape(-1) for x in np.divmod(np.arange(number**2), number))
    answers = np.stack([first, second], axis=1).astype(np.int32)
    tokens = np.stack([np.zeros_like(answers), answers], axis=-1)
    ones = np.ones_like(tokens)
    return first, second, tokens, ones, ones * [0, 1]


def converged(module, config, logits, *, opponent, reference, outcomes, steps, rate):
    """The policy after steps of Adam on the expected loss: of each pair, weighted by the
    probabilities of both answers, and of each outcome, (rewards [N, N, 2], probability [N, N]).
    """
    number = len(logits)
    first, second, tokens, mask, response = all_pairs(number)
    ref = jnp.log(reference)
    policy_fn = ops.policy_fn(
        lambda params, tokens, *_: jnp.broadcast_to(params, (*tokens.shape, number))
    )
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def expected(params):
        now = jax.nn.log_softmax(jax.lax.stop_gradient(params))
        weight = jnp.exp(now)[first] * opponent(jnp.exp(now))[second]

        def of_pair(tokens, mask, response, scores):
            at = tokens[:, 1:]
            rows = Rollout(
                tokens,
                mask,
                response,
                jnp.pad(now[at], ((0, 0), (1, 0))),
                scores=scores,
                ref_log_probs=jnp.pad(ref[at], ((0, 0), (1, 0))),
            )
            prepared = module.prepare(rows, config=config)
            return numbers(module.loss)(params, prepared, None, policy_fn=policy_fn, config=config)[
                0
            ]

        losses = [
            jnp.sum(
                weight
                * share.reshape(-1)
                * jax.vmap(of_pair)(tokens, mask, response, rewards.reshape(-1, 2))
            )
            for rewards, share in outcomes
        ]
        return sum(losses)

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(expected)(params), state)
        return (optax.apply_updates(params, updates), state), None

    start = jnp.asarray(logits, jnp.float32)
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=steps)[0][0])
    return np.asarray(jax.nn.softmax(run((start, optimizer.init(start)))), np.float64)


def variation(p, q):
    return 0.5 * np.abs(p - q).sum()


PRIOR = np.array([0.6, 0.3, 0.1])
WINS = np.array([[0.5, 0.0, 1.0], [1.0, 0.5, 0.0], [0.0, 1.0, 0.5]])  # rock, paper, scissors


def equilibrium(tau, mixture):
    """``pi = prior * exp(P(. beats mixture of pi and prior) / tau)``, normalised, by damped
    iteration of its logarithm.
    """
    pi = PRIOR.copy()
    for _ in range(20000):
        mixed = pi ** (1 - mixture) * PRIOR**mixture
        target = np.log(PRIOR) + WINS @ (mixed / mixed.sum()) / tau
        pi = np.exp(0.99 * np.log(pi) + 0.01 * target)
        pi /= pi.sum()
    residual = np.log(pi) - target
    assert np.ptp(residual) < 1e-9
    return pi


@pytest.mark.parametrize("mixture", [0.0, 0.5])
def test_nash_md_reaches_the_regularised_equilibrium(mixture):
    """Without a mixture it is the Nash equilibrium of the preference minus tau KL to the prior."""
    tau = 0.2
    config = nash_md.Config(kl_loss_coef=tau, mixture=mixture)

    def opponent(pi):
        mixed = pi ** (1 - mixture) * PRIOR**mixture
        return mixed / jnp.sum(mixed)

    learnt = converged(
        nash_md,
        config,
        np.log(PRIOR),
        opponent=opponent,
        reference=PRIOR,
        outcomes=[(np.stack([WINS, 1 - WINS], axis=-1).astype(np.float32), np.ones((3, 3)))],
        steps=2000,
        rate=0.05,
    )
    expected = equilibrium(tau, mixture)
    assert variation(learnt, expected) < 0.003
    assert variation(PRIOR, expected) > 0.1
    assert variation(equilibrium(tau, 0.5 - mixture), expected) > 0.03


REFERENCE = np.array([0.5, 0.3, 0.15, 0.05])
REWARDS = np.array([0.0, 1.0, -0.5, 1.5])


def xpo_optimum(beta, alpha):
    """Where the expected gradient by the logits is 0, by a solver of equations: of a pair's loss it
    is ``beta (sigmoid(h) - P)``, and of the second term ``alpha * (reference - pi)``.
    """

    def gradient(logits):
        pi = np.exp(logits - logits.max())
        pi /= pi.sum()
        h = beta * (np.log(pi / REFERENCE)[:, None] - np.log(pi / REFERENCE)[None, :])
        slope = beta * (1 / (1 + np.exp(-h)) - PREFERRED) * np.outer(pi, REFERENCE)
        by_log_prob = slope.sum(axis=1) - slope.sum(axis=0) + alpha * REFERENCE
        found = by_log_prob - pi * by_log_prob.sum()
        return np.append(found[:-1], logits.sum())

    solved = scipy.optimize.root(gradient, np.log(REFERENCE), tol=1e-12)
    assert solved.success
    return np.exp(solved.x) / np.exp(solved.x).sum()


PREFERRED = 1 / (1 + np.exp(REWARDS[None, :] - REWARDS[:, None]))  # Bradley and Terry


@pytest.mark.parametrize("alpha", [0.0, 0.03])
def test_xpo_reaches_its_optimum(alpha):
    """At alpha 0 that of the rewards with a KL to the reference, ``reference * exp(r / beta)``;
    with more the policy moves away from what the reference says.
    """
    beta = 0.5
    order = np.broadcast_to(np.float32([1, 0]), (4, 4, 2))
    learnt = converged(
        xpo,
        xpo.Config(beta=beta, alpha=alpha),
        np.log(REFERENCE),
        opponent=lambda pi: REFERENCE,
        reference=REFERENCE,
        outcomes=[(order, PREFERRED), (order[..., ::-1], 1 - PREFERRED)],
        steps=800,
        rate=0.05,
    )
    tilted = REFERENCE * np.exp(REWARDS / beta)
    tilted /= tilted.sum()
    expected = xpo_optimum(beta, alpha)
    assert variation(learnt, expected) < 0.003
    assert (variation(expected, tilted) < 1e-6) == (alpha == 0)
    assert variation(expected, tilted) > 0.02 * (alpha > 0)
