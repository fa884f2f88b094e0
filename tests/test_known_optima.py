"""Problems whose answers are known, in a language all of whose responses can be listed: every
algorithm finds its own optimum, from the exact gradient, from data and from samples, and would miss
it with another coefficient."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_language as tiny
from builders import slow
from jax.tree_util import Partial
from numpy.testing import assert_allclose
from tiny_language import adam, repeat

from rlhf_jax import iteration, losses, ops, rewards, rollout
from rlhf_jax.algorithms import (
    clip_cov,
    distill,
    dpo,
    gdpo,
    grpo,
    kto,
    maxrl,
    otb,
    pass_at_k,
    policy,
    ppo,
    reward_model,
    rloo,
    sft,
    vpg,
)
from rlhf_jax.config import DPOStage
from rlhf_jax.training.common import references
from rlhf_jax.types import (
    Comparisons,
    Demonstrations,
    Feedback,
    PolicyOutput,
    Rollout,
    TrainState,
)

KEY = jax.random.key(7)


def leave_one_out(probs):
    """A in expectation over the other answer."""
    return tiny.REWARDS - probs @ tiny.REWARDS


def unscaled(probs):
    """(G - 1) / G of that: half, in pairs."""
    return 0.5 * leave_one_out(probs)


def scaled(probs, rewards=tiny.REWARDS):
    """(r - s) / 2 over the pair's standard deviation |r - s| / sqrt 2, which is +-1 / sqrt 2: how
    often r wins.
    """
    difference = rewards[:, None] - rewards[None, :]
    return (0.5 * difference / (np.abs(difference) / np.sqrt(2.0) + 1e-4)) @ probs


def better_than_another(probs):
    """Pass@k of pairs with k = 2: twice how much better than the other, at least 0."""
    return 2.0 * np.maximum(tiny.REWARDS[:, None] - tiny.REWARDS[None, :], 0.0) @ probs


def of_the_mean(probs):
    """MaxRL of exp(r), in pairs: half the difference over the mean."""
    return np.tanh(0.5 * (tiny.REWARDS[:, None] - tiny.REWARDS[None, :])) @ probs


def of_components(probs):
    """GDPO of reward and brevity: who wins each, over the deviation of the sum in the batch."""
    parts = (np.asarray(x, np.float64) for x in (tiny.REWARDS, -tiny.LENGTHS))
    gaps = (x[:, None] - x[None, :] for x in parts)
    sums = sum(0.5 * gap / (np.abs(gap) / np.sqrt(2.0) + 1e-4) for gap in gaps)
    return sums @ probs / np.sqrt(probs @ sums**2 @ probs)


def each_token(probs):
    return np.ones(121)


def by_row(probs):
    return 1.0 / tiny.LENGTHS


def with_kl_in_loss(algorithm, advantage, estimator, coef, weight=each_token, **fields):
    """Algorithm, config, coefficient of k1 in the reward, and the optimum for ``factor`` times the
    coefficient.
    """
    config = algorithm.Config(
        group_size=2, kl_loss_coef=coef, kl_loss_estimator=estimator, **fields
    )
    return (
        algorithm,
        config,
        0.0,
        lambda factor: tiny.fixed_point(advantage, factor * coef, estimator, weight),
    )


def gspo(coef, counts=by_row, **fields):
    """GSPO on samples of the reference, as those of a late minibatch are an earlier policy's. A
    response's ratio is (pi / ref)^(1/n), which is (ref / pi)^(1 - 1/n) times what its probability
    changed by; its tokens count 1/n, or 1 in LUSPO."""

    def weight(probs):
        return (tiny.REF / probs) ** (1.0 - 1.0 / tiny.LENGTHS) * counts(probs)

    bounds = {"clip_low": 1.0, "clip_high": 1e3, **fields}  # none is reached
    return with_kl_in_loss(
        grpo, lambda probs: scaled(tiny.REF), "k3", coef, weight, ratio="sequence", **bounds
    )


LATE = {"powers": (1.1, 1.3), "decays": (0.2, 0.1)}  # VESPO fades late, so that coef tells


@pytest.fixture(autouse=True)
def late(monkeypatch):
    monkeypatch.setattr(losses, "vespo", functools.partial(losses.vespo, **LATE))


def vespo(coef):
    """VESPO on samples of the reference: of a response's ratio w = pi / ref, which the KL has, its
    advantage has phi(w), by the sign of each pair's advantage."""

    def advantage(probs):
        ratio = probs / tiny.REF
        rise, fall = (
            ratio ** (power - 1.0) * np.exp(decay * (1.0 - ratio))
            for power, decay in zip(*LATE.values(), strict=True)
        )
        of_pairs = tiny.REWARDS[:, None] - tiny.REWARDS[None, :]
        return np.where(of_pairs >= 0, rise[:, None], fall[:, None]) * of_pairs @ tiny.REF

    return with_kl_in_loss(rloo, advantage, "k2", coef, surrogate="vespo", ratio="product")


OFF_POLICY = ("gspo", "luspo", "vespo")  # on samples of the policy at the start


# The four tokens of a cut response cost 1, three of them a half: DAPO's eq. 13 with L_max 4 and
# L_cache 2.
DAPO = iteration.overlong(max_length=tiny.STEPS, buffer=2, penalty=1.0)
OVERLONG = tiny.REWARDS - np.array([0.0, 0.0, 0.0, 0.5, 1.0])[tiny.LENGTHS]


def dapo(coef):
    """Pairs of equal answers, which are drawn again, teach nothing: of a response's pairs p(y) are
    such. Its KL is counted in the others alone, and so is its advantage, which has no share of
    them."""
    advantage = lambda probs: scaled(probs, OVERLONG) / (1.0 - probs)  # noqa: E731
    rules = {"aggregate": "token", "clip_low": 0.2, "clip_high": 0.28}
    return with_kl_in_loss(grpo, advantage, "k3", coef, lambda probs: 1.0 - probs, **rules)


def with_kl_in_reward(algorithm, config, coef=0.5):
    return algorithm, config, coef, lambda factor: tiny.tilted(factor * coef)


DR_GRPO = {"scale": False, "aggregate": "fixed", "length": tiny.STEPS}
GROUPS = {
    "rloo": with_kl_in_reward(rloo, rloo.Config(group_size=2)),
    "rloo_k2": with_kl_in_loss(rloo, leave_one_out, "k2", 0.5),
    "cispo_k2": with_kl_in_loss(
        rloo, leave_one_out, "k2", 0.5, surrogate="cispo", clip_low=1.0, clip_high=4.0
    ),
    "grpo_k2": with_kl_in_loss(grpo, unscaled, "k2", 0.2, by_row, scale=False),
    "grpo_k3": with_kl_in_loss(grpo, unscaled, "k3", 0.2, by_row, scale=False),
    "dr_grpo_k2": with_kl_in_loss(grpo, unscaled, "k2", 0.2, **DR_GRPO),
    "dr_grpo_k3": with_kl_in_loss(grpo, unscaled, "k3", 0.2, **DR_GRPO),
    "grpo_scaled": with_kl_in_loss(grpo, scaled, "k3", 0.2, by_row),
    "sapo_k2": with_kl_in_loss(rloo, leave_one_out, "k2", 0.5, surrogate="sapo"),
    "gspo": gspo(0.4),
    "luspo": gspo(0.4, each_token, aggregate="sum"),
    "vespo": vespo(0.5),
    "dapo": dapo(0.2),
    "dppo": with_kl_in_loss(rloo, leave_one_out, "k2", 0.5, gate="tv", clip_low=1.0, clip_high=1e3),
    "drift": with_kl_in_loss(rloo, leave_one_out, "k2", 0.5, gate="drift", gate_limit=0.5),
    "gmpo": with_kl_in_loss(grpo, unscaled, "k3", 0.2, by_row, scale=False, surrogate="gmpo"),
    "maxrl": with_kl_in_loss(maxrl, of_the_mean, "k2", 0.3),
    "pass_at_k": with_kl_in_loss(pass_at_k, better_than_another, "k2", 0.5, k=2),
}


@functools.cache
def optimum_of(name, factor=1):
    return LEARNERS[name][3](factor)


def shaped(name, batch, kl_coef):
    if name == "dapo":
        batch = DAPO(batch)
    elif name == "maxrl":
        batch = batch.replace(scores=jnp.exp(batch.scores))
    elif name == "gdpo":
        brevity = -jnp.sum(batch.response_mask, axis=1, dtype=jnp.float32)
        batch = batch.replace(extras={"correct": batch.scores, "format": brevity})
    return batch.replace(rewards=rewards.kl_shaped(batch, kl_coef)) if kl_coef else batch


def expected_gradient(name):
    """``(params, probs, listed, pairs) -> gradient`` of the mean loss over the pairs of
    responses.
    """
    algorithm, config, kl_coef, _ = GROUPS[name]

    @jax.jit
    def gradient(params, probs, listed, pairs):
        sampler = params
        if name in OFF_POLICY:
            sampler = tiny.params()
            probs = jnp.asarray(tiny.REF, jnp.float32)
        batch = shaped(name, tiny.every_response(sampler, listed), kl_coef)

        def expected(params):
            output = tiny.policy_fn(params, listed.tokens, listed.attention_mask, None)

            def loss(pair):
                group, of_pair = jax.tree.map(lambda x: jnp.asarray(x)[pair], (batch, output))
                group = algorithm.prepare(group, config=config)
                loss, _ = algorithm.loss(
                    params, group, KEY, policy_fn=lambda *args: of_pair, config=config
                )
                return loss.total  # in a large batch its count is that of the mean group

            return jnp.sum(jnp.prod(probs[pairs], axis=1) * jax.vmap(loss)(pairs))

        return jax.grad(expected)(params)["logits"]

    return gradient


@pytest.mark.parametrize(
    "name",
    [name if name == "grpo_k3" else slow(name) for name in GROUPS],
)
def test_expected_gradient_vanishes_at_the_optimum(name):
    """All 121 x 121 groups of two answers, each with its probability: no samples, no steps."""
    pairs = np.stack(np.indices((121, 121)), axis=-1).reshape(-1, 2)
    if name == "dapo":
        pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    gradient = expected_gradient(name)

    def size(probs):
        params = tiny.params() | {"logits": jnp.asarray(tiny.table(probs), jnp.float32)}
        found = gradient(params, jnp.asarray(probs, jnp.float32), tiny.LISTED, pairs)
        return np.linalg.norm(found)

    optimum = optimum_of(name)
    elsewhere = optimum_of(name, 2)
    assert tiny.distance(optimum, elsewhere) > 0.1
    assert size(optimum) < 1e-3 * size(elsewhere)
    assert size(optimum) < 1e-3 * size(tiny.REF)


# From samples, step by step


LEARNERS = {
    "vpg": with_kl_in_reward(vpg, vpg.Config()),
    "ppo": with_kl_in_reward(ppo, ppo.Config()),
    **GROUPS,
}
# Without the likelihood of right answers, which moves the optimum.
LEARNERS["vapo"] = with_kl_in_reward(ppo, ppo.Config(length_adaptive=0.8, clip_high=0.28))
LEARNERS["reinforce_pp"] = with_kl_in_reward(rloo, rloo.Config(baseline="global", group_size=1))
LEARNERS["reinforce_pp_baseline"] = with_kl_in_reward(
    rloo, rloo.Config(baseline="both", group_size=2)
)
# It draws one token of thousands.
COV = (clip_cov, unscaled, "k3", 0.2, by_row)
LEARNERS["clip_cov"] = with_kl_in_loss(*COV, scale=False)
LEARNERS["kl_cov"] = with_kl_in_loss(*COV, scale=False, kind="kl")
LEARNERS["flash_reinforce"] = with_kl_in_reward(rloo, rloo.Config(baseline="batch", group_size=1))
PARTS = {"components": ("correct", "format"), "weights": (1.0, 1.0)}
LEARNERS["gdpo"] = with_kl_in_loss(gdpo, of_components, "k3", 0.2, by_row, **PARTS)
LEARNERS["remax"] = with_kl_in_reward(vpg, vpg.Config(baseline="greedy"))
# Its baseline has a share of the token's own reward, which is small in a large group.
LEARNERS["otb"] = with_kl_in_reward(otb, otb.Config(group_size=64, aggregate="sum"))
LEARNERS["other_engine"] = with_kl_in_reward(rloo, rloo.Config(group_size=2))  # see train


@ops.policy_fn
def of_logits(params, tokens, attention_mask, key):
    """The same policy, as one that gives statistics."""
    return params["logits"][jnp.minimum(tiny.prefixes(tokens), tiny.NUM_OPEN - 1)]


def train(name, algorithm, config, kl_coef, num_steps, rows):
    optimizer = adam(num_steps)
    policy_fn = of_logits if name == "otb" else tiny.policy_fn

    def sample(params, uniform):
        if name in OFF_POLICY:
            return tiny.draw(tiny.params(), uniform)
        if name == "other_engine":  # which draws at a higher temperature
            drawn = tiny.draw({**params, "logits": 0.8 * params["logits"]}, uniform)
            weights = {"importance_cap": np.inf, "importance_sampling": "sequence_truncate"}
            reference = Partial(tiny.policy_fn, tiny.params())
            return rollout.rescore(
                drawn, params, policy_fn=tiny.policy_fn, ref_fn=reference, **weights
            )
        if name == "dapo":  # groups that score alike are replaced
            kept, fresh = (tiny.draw(params, half) for half in jnp.split(uniform, 2))
            offered, teaches = (
                policy.informative_groups(rows, grpo.prepare(rows, config=config), config)
                for rows in (fresh, kept)
            )
            return iteration.refill(kept, fresh=fresh, wanting=~teaches, offered=offered)[0]
        likeliest = jnp.asarray(tiny.REWARDS, jnp.float32)[tiny.greedy(params)]
        return tiny.draw(params, uniform).replace(greedy_rewards=jnp.full(rows, likeliest))

    def one_iteration(state, uniform):
        batch = shaped(name, sample(state.params, uniform), kl_coef)
        return algorithm.update(
            state, batch, KEY, policy_fn=policy_fn, optimizer=optimizer, config=config
        )

    uniform = np.random.default_rng(3).random(
        (num_steps // config.num_epochs, rows),
        np.float32,
    )
    state, metrics = repeat(
        one_iteration,
        getattr(algorithm, "State", TrainState).create(tiny.params(), optimizer),
        uniform,
    )
    assert not metrics["nonfinite"].any()
    return tiny.probabilities(state.params["logits"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_steps", "rows", "near"),
    [
        ("ppo", 120, 1024, 0.06),
        *(slow(name, 240, 1024, 0.05) for name in LEARNERS),
    ],
)
def test_learning_from_samples_reaches_the_optimum(name, num_steps, rows, near):
    algorithm, config, kl_coef, _ = LEARNERS[name]
    learnt = train(name, algorithm, config, kl_coef, num_steps, rows)
    assert tiny.distance(learnt, optimum_of(name)) < near
    assert tiny.distance(learnt, optimum_of(name, 2)) > 0.1


# From a teacher

TEACHER = np.random.default_rng(9).normal(scale=0.7, size=(tiny.NUM_OPEN, 4)).astype(np.float32)


def taught(config):
    """The policy of the language with a teacher, another table."""

    def policy_fn(params, tokens, attention_mask, key):
        output = tiny.policy_fn(params, tokens, attention_mask, key)
        number = jnp.minimum(tiny.prefixes(tokens), tiny.NUM_OPEN - 1)
        theirs = jnp.asarray(TEACHER)[number]
        apart = config.measure(params["logits"][number[:, :-1]], teacher_logits=theirs[:, :-1])
        return output._replace(
            teacher_log_probs=ops.token_log_probs(theirs, tokens),
            divergence=jnp.pad(apart, ((0, 0), (1, 0))),
        )

    return policy_fn


def distilled(config, num_steps=120, rows=1024):
    """The probabilities of all responses after training on the student's own samples."""
    optimizer = adam(num_steps)

    def one_iteration(state, uniform):
        batch = tiny.draw(state.params, uniform).replace(ref_log_probs=None)
        if config.teacher_coef == 1.0:
            batch = batch.replace(scores=None)
        return distill.update(
            state, batch, KEY, policy_fn=taught(config), optimizer=optimizer, config=config
        )

    uniform = np.random.default_rng(3).random((num_steps, rows), np.float32)
    start = TrainState.create(tiny.params(), optimizer)
    state, metrics = repeat(one_iteration, start, uniform)
    assert not metrics["nonfinite"].any()
    return tiny.probabilities(state.params["logits"])


OF_SAMPLES = {"divergence": "sampled", "clip_high": 10.0}
WHOLE = {**OF_SAMPLES, "discount": 1.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "near"),
    [
        slow({"divergence": "reverse_kl"}, 0.01),
        ({"divergence": "forward_kl"}, 0.01),
        slow({"divergence": "jsd", "beta": 0.5}, 0.01),
        slow(OF_SAMPLES, 0.05),
        slow(WHOLE, 0.08),
    ],
    ids=["reverse_kl", "forward_kl", "jsd", "sampled", "sampled_whole"],
)
def test_a_student_reaches_its_teacher(fields, near):
    learnt = distilled(distill.Config(**fields))
    assert tiny.distance(learnt, tiny.probabilities(TEACHER)) < near
    assert tiny.distance(learnt, tiny.REF) > 0.3


@pytest.mark.slow
def test_a_teacher_and_a_reward_have_their_optimum():
    """The log-ratios of whole responses and a reward: teacher * exp(r / coef), normalised."""
    learnt = distilled(distill.Config(**WHOLE, teacher_coef=0.5, aggregate="sum"))

    def tilted(coef):
        weights = tiny.probabilities(TEACHER) * np.exp(tiny.REWARDS / coef)
        return weights / weights.sum()

    assert tiny.distance(learnt, tilted(0.5)) < 0.08
    for other in (1.0, 0.25, 1e3):
        assert tiny.distance(learnt, tilted(other)) > 0.15


# From data


@functools.cache
def trainer(module, num_steps, learning_rate, **kwargs):
    """``(params, batch)`` -> parameters after updates on the batch, and the metrics of each."""
    optimizer = adam(num_steps, learning_rate)
    update = partial(module.update, optimizer=optimizer, **kwargs)

    @jax.jit
    def train(params, batch):
        start = TrainState.create(params, optimizer)
        state, metrics = repeat(lambda state, _: update(state, batch, None), start, num_steps)
        return state.params, metrics

    return train


def fit(module, params, batch, num_steps=140, learning_rate=0.1, **kwargs):
    return trainer(module, num_steps, learning_rate, **kwargs)(params, batch)


with_reference = jax.jit(dpo.with_reference)


def test_sft_learns_the_data():
    """The optimum is the empirical distribution. With means of rows' means it would be that of
    responses which count 1 / length each."""
    seen = np.random.default_rng(1).integers(1, 9, size=121)
    data = np.repeat(np.arange(121), seen)
    batch = Demonstrations(
        *(x[data] for x in (tiny.TOKENS, tiny.ATTENTION_MASK, tiny.RESPONSE_MASK))
    )
    params, metrics = fit(
        sft,
        tiny.params(),
        batch,
        policy_fn=tiny.policy_fn,
        config=sft.Config(),
    )
    learnt = tiny.probabilities(params["logits"])
    assert tiny.distance(learnt, seen / seen.sum()) < 0.002
    assert tiny.distance(learnt, tiny.probabilities(tiny.table(seen / tiny.LENGTHS))) > 0.05
    entropy = -np.sum(seen * np.log(seen / seen.sum())) / np.sum(seen * tiny.LENGTHS)
    assert_allclose(np.asarray(metrics["sft/loss"])[-1], entropy, rtol=1e-4)


RNG = np.random.default_rng(2)
PAIRS = np.stack([RNG.permutation(121)[:2] for _ in range(800)])
PREFERRED = 1.0 / (
    1.0 + np.exp(tiny.REWARDS[PAIRS[:, 1]] - tiny.REWARDS[PAIRS[:, 0]])
)  # Bradley-Terry


def labelled_pairs():
    """Both labels of each pair, weighted with their probability: no sampling noise."""
    weight = np.concatenate([PREFERRED, 1.0 - PREFERRED]).astype(np.float32)
    lists = (tiny.TOKENS, tiny.ATTENTION_MASK, tiny.RESPONSE_MASK)
    return Comparisons(
        *(x[np.concatenate([PAIRS, PAIRS[:, ::-1]])] for x in lists),
        weight=weight,
    )


def test_reward_model_recovers_the_rewards():
    """Labels in expectation, so that the optimum is exact: the rewards of whole responses, up to a
    constant.
    """
    start = {"scores": np.zeros(tiny.NUM_PREFIXES, np.float32)}
    config = reward_model.Config()
    params, _ = fit(
        reward_model,
        start,
        labelled_pairs(),
        learning_rate=0.3,
        score_fn=tiny.score_fn,
        config=config,
    )
    scores = np.asarray(params["scores"])[tiny.ENDS]
    assert_allclose(scores - scores.mean(), tiny.REWARDS - tiny.REWARDS.mean(), atol=0.02)


def test_process_reward_model_recovers_the_probabilities():
    """Each prefix ends a step that is right in 1 to 7 of 8 rows: the optimum is that share."""
    marks = np.stack([1 + (np.arange(8) < 1 + i % 7) for i in range(tiny.NUM_PREFIXES)], axis=1)
    prefixes = np.broadcast_to(np.arange(tiny.NUM_PREFIXES), marks.shape)
    batch = Demonstrations(*map(jnp.asarray, (prefixes, np.ones_like(marks), marks)))
    params, _ = fit(
        reward_model,
        jnp.zeros(tiny.NUM_PREFIXES),
        batch,
        learning_rate=0.3,
        score_fn=lambda params, tokens, *_: params[tokens],
        config=reward_model.Config(),
    )
    expected = (1 + np.arange(tiny.NUM_PREFIXES) % 7) / 8
    assert_allclose(jax.nn.sigmoid(params), expected, atol=0.01)


def test_rewards_of_steps_teach_each_step():
    """Three steps of one token each, whose rewards are known: the policy learns the best token of
    each, which neither rewards of other steps nor those at earlier ends say.
    """
    table = np.random.default_rng(0).permutation(12).reshape(3, 4).astype(np.float32)
    places = jnp.arange(3)
    ones = jnp.ones((64, 3))
    config = grpo.Config(group_size=8, step_end="end", kl_loss_coef=0.0)

    def policy_fn(params, tokens, mask, key):
        log_probs = jax.nn.log_softmax(params)[places, tokens]
        return PolicyOutput(log_probs, jnp.zeros_like(log_probs))

    def one_iteration(state, key):
        tokens = jax.random.categorical(key, jnp.broadcast_to(state.params, (64, 3, 4)))
        log_probs = policy_fn(state.params, tokens, None, None).log_probs
        batch = Rollout(tokens, ones, ones, log_probs, rewards=jnp.asarray(table)[places, tokens])
        batch = batch.replace(extras={"end": ones}, dense=True)
        how = {"policy_fn": policy_fn, "optimizer": optimizer, "config": config}
        return grpo.update(state, batch, key, **how)

    optimizer = adam(100)
    start = grpo.State.create(jnp.zeros((3, 4)), optimizer)
    state, _ = repeat(one_iteration, start, jax.random.split(KEY, 100))
    best = jax.nn.softmax(state.params)[places, table.argmax(axis=1)]
    assert best.min() > 0.9


@pytest.mark.slow
def test_dpo_reaches_its_optimum():
    """On labels of Bradley-Terry the implicit reward is the reward, so the policy is ref * exp(r /
    beta), normalised (Rafailov et al. 2023, section 4)."""
    config = dpo.Config(beta=0.5)
    batch = with_reference(labelled_pairs(), Partial(tiny.policy_fn, tiny.params()))
    params, _ = fit(
        dpo, tiny.params(), batch, learning_rate=0.2, policy_fn=tiny.policy_fn, config=config
    )
    learnt = tiny.probabilities(params["logits"])
    assert tiny.distance(learnt, tiny.tilted(0.5)) < 0.005
    assert tiny.distance(learnt, tiny.tilted(1.0)) > 0.1
    implicit = 0.5 * np.log(learnt / tiny.REF)
    assert_allclose(implicit - implicit.mean(), tiny.REWARDS - tiny.REWARDS.mean(), atol=0.05)


@pytest.mark.parametrize("share", [slow(1.0), 0.5])
def test_dpo_goes_on_from_a_reference_that_moved(share):
    """After each move the optimum is the new reference * exp(r / beta), normalised. The logits of
    each prefix are averaged.
    """
    config = dpo.Config(beta=0.5)

    state = references.Followed.create(tiny.params(), adam(1))
    settings = DPOStage(reference_ema=share)
    move = references.mover(settings)
    for step in (1, 2):
        if references.is_due(settings, step):
            state = state.replace(reference=move(state.reference, state.params))
        batch = with_reference(labelled_pairs(), Partial(tiny.policy_fn, state.reference))
        params, _ = fit(
            dpo, state.params, batch, learning_rate=0.2, policy_fn=tiny.policy_fn, config=config
        )
        state = state.replace(params=params)
    once = tiny.table(tiny.tilted(0.5))
    reference = tiny.probabilities(share * once + (1.0 - share) * tiny.REF_LOGITS)
    twice = reference * np.exp(tiny.REWARDS / 0.5)
    learnt = tiny.probabilities(state.params["logits"])
    assert tiny.distance(learnt, twice / twice.sum()) < 0.005
    assert tiny.distance(learnt, tiny.tilted(0.5)) > 0.1


def policy_of(log_probs):
    """Parameters of the tiny policy with these log-probabilities of the 121 responses."""
    return tiny.params() | {"logits": jnp.asarray(tiny.table(np.exp(log_probs)), jnp.float32)}


def normalised(log_probs_of):
    """``log_probs_of(c)`` [121] for the constant c, by bisection, with which the probabilities add
    up to 1.
    """
    low = -100.0
    high = 100.0
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if np.exp(log_probs_of(middle)).sum() > 1 else (middle, high)
    return log_probs_of(low)


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


CHOSEN, REJECTED = PAIRS.T
N = tiny.LENGTHS
# Of policies whose log-probability of a token is (r + c) / beta, as SimPO's and ORPO's labels below
# have it.
BY_TOKEN = {
    beta: normalised(lambda c, beta=beta: N * (0.5 * tiny.REWARDS + c) / beta)
    for beta in (1.0, 2.0)
}


def ipo(beta):
    """The square's optimum for Bradley-Terry labels p is log-ratios whose differences are nearest
    to (2 p - 1) / (2 beta): a linear least-squares problem."""
    differences = np.eye(121)[CHOSEN] - np.eye(121)[REJECTED]
    log_ratios = np.linalg.lstsq(differences, (2 * PREFERRED - 1) / (2 * beta), rcond=None)[0]
    return (
        np.log(tiny.REF) + log_ratios - np.log(np.sum(tiny.REF * np.exp(log_ratios))),
        PREFERRED,
        None,
    )


def by_length(beta):
    """Bradley-Terry, with the log-ratio of a token as the reward: beta (log p - log ref) / n = r +
    c.
    """
    return normalised(lambda c: np.log(tiny.REF) + N * (tiny.REWARDS + c) / beta), PREFERRED, None


def simpo(beta):
    """Each pair's loss is least where p sigmoid(gamma - x) = (1 - p) sigmoid(gamma + x), x = beta
    (l_w - l_l): labels p that put the optimum at BY_TOKEN with beta = 1."""
    means = BY_TOKEN[1.0] / N
    x = means[CHOSEN] - means[REJECTED]
    return BY_TOKEN[beta], sigmoid(1 + x) / (sigmoid(1 + x) + sigmoid(1 - x)), None


def orpo(beta):
    """The odds ratio's gradient by the log-probability of each response, at BY_TOKEN, is cancelled
    by demonstrations: pairs of a response with itself, which have no odds ratio. The weights make
    the gradient the same number times the probability, as it is at an optimum over
    distributions."""
    means = BY_TOKEN[1.0] / N
    push = np.zeros(121)
    odds = means - np.log(-np.expm1(means))
    for p, i, j in zip(PREFERRED, CHOSEN, REJECTED, strict=True):
        slope = 0.5 * (-p * sigmoid(odds[j] - odds[i]) + (1 - p) * sigmoid(odds[i] - odds[j]))
        for k, sign, chosen in ((i, 1, p), (j, -1, 1 - p)):
            push[k] += sign * slope / -np.expm1(means[k]) / N[k] - chosen / N[k]
    wanted = -N * push
    pull = N * np.exp(BY_TOKEN[1.0])
    return BY_TOKEN[beta], PREFERRED, (np.max(wanted / pull) + 1e-3) * pull - wanted


PREFERENCES = {
    "ipo": (ipo, {"kind": "ipo"}, 0.1),
    "by_length": (by_length, {"length_normalised": True}, 0.5),
    "simpo": (simpo, {"kind": "simpo", "gamma": 1.0}, 1.0),
    "orpo": (orpo, {"kind": "orpo"}, 0.5),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PREFERENCES)
def test_expected_gradient_of_pairs_vanishes_at_the_optimum(name):
    """Labels in expectation: both of each pair, with their probability. No steps."""
    optimum_for, fields, beta = PREFERENCES[name]
    log_probs, preferred, demonstrations = optimum_for(
        beta if name in ("ipo", "by_length") else 1.0
    )
    pairs = [PAIRS, PAIRS[:, ::-1]] + (
        [] if demonstrations is None else [np.repeat(np.arange(121)[:, None], 2, axis=1)]
    )
    weights = [preferred, 1 - preferred] + ([] if demonstrations is None else [demonstrations])
    lists = [
        x[np.concatenate(pairs)] for x in (tiny.TOKENS, tiny.ATTENTION_MASK, tiny.RESPONSE_MASK)
    ]
    batch = Comparisons(
        *lists,
        weight=np.concatenate(weights).astype(np.float32),
    )
    config = dpo.Config(beta=beta, **fields)
    batch = (
        with_reference(batch, Partial(tiny.policy_fn, tiny.params()))
        if config.needs_reference
        else batch
    )
    options = {"policy_fn": tiny.policy_fn, "config": config}
    gradient = jax.jit(jax.grad(lambda params: dpo.loss(params, batch, None, **options)[0].value))

    def size(log_probs):
        return np.linalg.norm(gradient(policy_of(log_probs))["logits"])

    elsewhere = optimum_for(2 * beta if name in ("ipo", "by_length") else 2.0)[0]
    assert tiny.distance(np.exp(log_probs), np.exp(elsewhere)) > 0.1
    assert size(log_probs) < 2e-3 * size(elsewhere)
    assert size(log_probs) < 2e-3 * size(np.log(tiny.REF))


def kto_optimum(liked, beta):
    """Undesirable answers lose all probability, which pulls the reference point down to 0. The
    others share it so that the slope of sum_y sigmoid(beta log(p / ref)) by log p is the same
    multiple mu of p: bisection for p and for mu."""

    def shares(log_mu):
        # of log(p / ref): the slope / p falls with p
        low = np.full(121, -40.0)
        high = np.full(121, 40.0)
        for _ in range(80):
            x = 0.5 * (low + high)
            above = (
                np.log(beta * sigmoid(beta * x) * sigmoid(-beta * x)) - x - np.log(tiny.REF)
                > log_mu
            )
            low = np.where(above, x, low)
            high = np.where(above, high, x)
        return np.where(
            liked,
            tiny.REF * np.exp(low),
            0.0,
        )

    low = -40.0
    high = 40.0
    for _ in range(80):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if shares(middle).sum() > 1 else (low, middle)
    return shares(low) / shares(low).sum()


@pytest.mark.slow
def test_kto_reaches_its_optimum():
    liked = np.median(tiny.REWARDS) < tiny.REWARDS
    batch = Feedback(tiny.TOKENS, tiny.ATTENTION_MASK, tiny.RESPONSE_MASK, liked)
    batch = jax.jit(kto.with_reference)(
        batch,
        Partial(tiny.policy_fn, tiny.params()),
    )
    options = {"policy_fn": tiny.policy_fn, "config": kto.Config(beta=0.5)}
    params, metrics = fit(
        kto,
        tiny.params(),
        batch,
        400,
        0.2,
        **options,
    )
    learnt = tiny.probabilities(params["logits"])
    assert np.asarray(metrics["kto/reference_point"])[-1] == 0
    assert tiny.distance(learnt, kto_optimum(liked, 0.5)) < 0.02
    assert tiny.distance(learnt, kto_optimum(liked, 1.0)) > 0.1


@pytest.mark.slow
def test_apo_zero_reaches_the_optimum_of_kto_around_0():
    """On pairs of a good and a bad answer its sum is KTO's with the reference point 0."""
    liked = np.median(tiny.REWARDS) < tiny.REWARDS
    good, bad = np.flatnonzero(liked), np.flatnonzero(~liked)
    pairs = np.stack([good, bad[: len(good)]], axis=1)
    lists = (tiny.TOKENS, tiny.ATTENTION_MASK, tiny.RESPONSE_MASK)
    batch = with_reference(
        Comparisons(*(x[pairs] for x in lists)), Partial(tiny.policy_fn, tiny.params())
    )
    options = {"policy_fn": tiny.policy_fn, "config": dpo.Config(kind="apo_zero", beta=0.5)}
    params, _ = fit(dpo, tiny.params(), batch, 400, 0.2, **options)
    learnt = tiny.probabilities(params["logits"])
    assert tiny.distance(learnt, kto_optimum(liked, 0.5)) < 0.02
    assert tiny.distance(learnt, kto_optimum(liked, 1.0)) > 0.1


@pytest.mark.slow
def test_bco_reaches_its_optimum():
    """Labels whose log-odds are the rewards, with mean 0: then they are beta times the log-ratios
    up to the shift, ``ref * exp(r / beta)``. Both labels of each answer, with their probability.
    """
    share = sigmoid(tiny.REWARDS - tiny.REWARDS.mean())
    twice = (np.concatenate([x, x]) for x in (tiny.TOKENS, tiny.ATTENTION_MASK, tiny.RESPONSE_MASK))
    weight = np.concatenate([share, 1 - share]).astype(np.float32)
    batch = Feedback(*twice, np.arange(242) < 121, weight)
    batch = jax.jit(kto.with_reference)(batch, Partial(tiny.policy_fn, tiny.params()))
    options = {"policy_fn": tiny.policy_fn, "config": kto.Config(kind="bco", beta=0.5)}
    params, _ = fit(kto, tiny.params(), batch, 400, 0.2, **options)
    learnt = tiny.probabilities(params["logits"])
    assert tiny.distance(learnt, tiny.tilted(0.5)) < 0.01
    assert tiny.distance(learnt, tiny.tilted(1.0)) > 0.1


# Best of n


@pytest.mark.parametrize(("estimator", "apart"), [("k2", 0.195), ("k3", 0.149)])
def test_a_kl_in_the_loss_misses_the_optimum_of_a_kl_in_the_reward(estimator, apart):
    """By enumeration: the numbers of docs/algorithms/grpo.md, in total variation."""
    optimum = tiny.tilted(0.5)
    found = tiny.fixed_point(leave_one_out, 0.5, estimator, each_token)
    assert tiny.distance(found, optimum) == pytest.approx(apart, abs=1e-3)
    assert tiny.distance(tiny.REF, optimum) == pytest.approx(0.352, abs=1e-3)
