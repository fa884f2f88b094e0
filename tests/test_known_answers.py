"""Problems whose answers are known: in a language all of whose responses can be listed, what is learnt from data has
the optimum that enumeration gives, and would miss it with another coefficient; best of n; the count of one token.

The bandits of the algorithms' own tests are problems of the same kind, as are those of test_known_optima.
"""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_language as tiny
from tiny_language import adam, repeat

from rlhf_jax import ops, rewards, sampling
from rlhf_jax import rollout as rollouts
from rlhf_jax.algorithms import dpo, reward_model, sft, vpg
from rlhf_jax.types import Comparisons, Demonstrations, TrainState

KEY = jax.random.key(7)


def test_list_and_policy_speak_of_one_distribution():
    assert len(tiny.RESPONSES) == 121
    assert sum(tiny.EOS not in response for response in tiny.RESPONSES) == 81
    assert tiny.REF.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(tiny.probabilities(tiny.table(tiny.REF)), tiny.REF, rtol=1e-9)
    listed = jax.jit(tiny.every_response)(tiny.params())
    np.testing.assert_allclose(np.exp(np.asarray(listed.log_probs).sum(axis=1)), tiny.REF, rtol=1e-5)


@pytest.mark.parametrize("aggregate", ["token", pytest.param("sequence", marks=pytest.mark.slow)])
def test_sft_learns_the_data(aggregate):
    """The optimum is the empirical distribution. Means of rows' means count a token of a long response less: at each
    prefix they learn the frequencies of the next token with every response counting 1 / length."""
    seen = np.random.default_rng(1).integers(1, 9, size=121)
    data = np.repeat(np.arange(121), seen)
    batch = Demonstrations(*(jnp.asarray(x[data]) for x in (tiny.TOKENS, tiny.ATTENTION_MASK, tiny.RESPONSE_MASK)))
    optima = {
        "token": seen / seen.sum(),
        "sequence": tiny.probabilities(tiny.table(seen / tiny.LENGTHS)),
    }
    config, optimizer = sft.Config(aggregate=aggregate), adam(200)

    def step(state, key):
        del key
        return sft.update(state, batch, None, policy_fn=tiny.policy_fn, optimizer=optimizer, config=config)

    state, metrics = repeat(step, TrainState.create(tiny.params(), optimizer), 200)
    other = optima["sequence" if aggregate == "token" else "token"]
    found = tiny.probabilities(state.params["logits"])
    assert tiny.distance(found, optima[aggregate]) < 0.002
    assert tiny.distance(found, other) > 0.05
    if aggregate == "token":
        entropy = -np.sum(seen * np.log(optima["token"])) / np.sum(seen * tiny.LENGTHS)
        np.testing.assert_allclose(metrics["sft/loss"][-1], entropy, rtol=1e-4)


def comparisons(chosen_and_rejected, **fields):
    """Responses by their number, [B, K]."""
    lists = (tiny.TOKENS, tiny.ATTENTION_MASK, tiny.RESPONSE_MASK)
    return Comparisons(*(x[chosen_and_rejected] for x in lists), **fields)


def random_answers(num_rows, num_answers):
    rng = np.random.default_rng(2)
    return np.stack([rng.permutation(121)[:num_answers] for _ in range(num_rows)])


PAIRS = random_answers(800, 2)
PREFERRED = 1.0 / (1.0 + np.exp(tiny.REWARDS[PAIRS[:, 1]] - tiny.REWARDS[PAIRS[:, 0]]))  # Bradley-Terry


def labelled_pairs(flipped=0.0):
    """Both labels of each pair, weighted with their probability, a share of them flipped: no sampling noise."""
    first = (1.0 - flipped) * PREFERRED + flipped * (1.0 - PREFERRED)
    weight = np.concatenate([first, 1.0 - first]).astype(np.float32)
    return comparisons(np.concatenate([PAIRS, PAIRS[:, ::-1]]), weight=weight)


def labelled_rankings(num_answers=4, num_rows=250):
    """Sets of answers with each of them as the best, weighted with the probability that it is chosen."""
    answers = random_answers(num_rows, num_answers)
    chosen = np.exp(tiny.REWARDS[answers])
    chosen /= chosen.sum(axis=1, keepdims=True)
    best = np.tile(np.arange(num_answers), num_rows)
    return comparisons(np.repeat(answers, num_answers, axis=0), best=best, weight=chosen.ravel().astype(np.float32))


@pytest.mark.parametrize("data", [labelled_pairs, pytest.param(labelled_rankings, marks=pytest.mark.slow)])
def test_reward_model_recovers_the_rewards(data):
    """Labels in expectation, so that the optimum is exact: the rewards of whole responses, up to a constant."""
    batch, optimizer = data(), adam(200, 0.3)

    def step(state, key):
        return reward_model.update(
            state, batch, key, score_fn=tiny.score_fn, optimizer=optimizer, config=reward_model.Config()
        )

    start = TrainState.create({"scores": jnp.zeros(tiny.NUM_PREFIXES)}, optimizer)
    state, _ = repeat(step, start, 200)
    scores = np.asarray(state.params["scores"])[tiny.ENDS]
    np.testing.assert_allclose(scores - scores.mean(), tiny.REWARDS - tiny.REWARDS.mean(), atol=0.02)


def ipo_optimum(beta):
    """ref * exp(u), normalised, u_i - u_j nearest to (2 P(i preferred to j) - 1) / (2 beta) over the pairs: the squares
    of its distances from +-1 / (2 beta) are least there (Azar et al. 2023, section 5)."""
    incidence = np.eye(121)[PAIRS[:, 0]] - np.eye(121)[PAIRS[:, 1]]
    weights = tiny.REF * np.exp(np.linalg.lstsq(incidence, (2.0 * PREFERRED - 1.0) / (2.0 * beta))[0])
    return weights / weights.sum()


@pytest.mark.parametrize(
    ("config", "flipped", "optimum"),
    [
        pytest.param(dpo.Config(beta=0.5), 0.0, tiny.tilted, id="sigmoid"),
        pytest.param(
            dpo.Config(beta=0.5, kind="robust", label_smoothing=0.2),
            0.2,
            tiny.tilted,
            id="robust",
            marks=pytest.mark.slow,
        ),
        pytest.param(dpo.Config(beta=0.2, kind="ipo"), 0.0, ipo_optimum, id="ipo", marks=pytest.mark.slow),
    ],
)
def test_dpo_reaches_its_optimum(config, flipped, optimum):
    """On labels of Bradley-Terry the implicit reward is the reward, so the policy is ref * exp(r / beta), normalised
    (Rafailov et al. 2023, section 4); robust DPO finds it in spite of flipped labels."""
    optimizer = adam(200, 0.2)

    @jax.jit
    def train(batch):
        batch = dpo.with_reference(batch, functools.partial(tiny.policy_fn, tiny.params()))

        def step(state, key):
            return dpo.update(state, batch, key, policy_fn=tiny.policy_fn, optimizer=optimizer, config=config)

        return repeat(step, TrainState.create(tiny.params(), optimizer), 200)

    found = tiny.probabilities(train(labelled_pairs(flipped))[0].params["logits"])
    assert tiny.distance(found, optimum(config.beta)) < 0.005
    assert tiny.distance(found, optimum(2 * config.beta)) > 0.1
    if optimum is tiny.tilted:
        implicit = config.beta * np.log(found / tiny.REF)
        np.testing.assert_allclose(implicit - implicit.mean(), tiny.REWARDS - tiny.REWARDS.mean(), atol=0.05)


# Best of n


def best_of(n):
    """No two rewards are equal: P(the best has rank <= i) = F(i)^n."""
    order = np.argsort(tiny.REWARDS)
    probs = np.zeros(121)
    probs[order] = np.diff(np.cumsum(tiny.REF[order]) ** n, prepend=0.0)
    return probs


def test_best_of_n_is_what_enumeration_says():
    rows = 10_000
    one = tiny.prompts(rows)

    @jax.jit
    def run(key):
        return sampling.best_of_n(
            tiny.MODEL, tiny.params(), one, one, key, config=tiny.SAMPLING, n=4, reward_fn=tiny.reward_fn
        )[0]

    best = run(KEY)
    found = tiny.which(best)
    np.testing.assert_allclose(np.exp(np.asarray(best.log_probs).sum(axis=1)), tiny.REF[found], rtol=1e-4)
    share = np.bincount(found, minlength=121) / rows
    assert tiny.distance(share, best_of(4)) < 0.04
    assert tiny.distance(best_of(4), best_of(3)) > 0.08
    np.testing.assert_allclose(best.scores, tiny.REWARDS[found], rtol=1e-5)
    for n in (1, 2, 4, 16, 256):
        kl = np.sum(best_of(n) * np.log(np.maximum(best_of(n), 1e-300) / tiny.REF))
        assert -1e-9 <= kl <= sampling.best_of_n_kl(n) + 1e-9
    assert np.sum(best_of(2) * np.log(best_of(2) / tiny.REF)) > 0.8 * sampling.best_of_n_kl(2)


# Count of a token


@pytest.mark.slow
def test_token_count_climbs_to_its_ceiling():
    """ALGORITHMS 8.4: one letter of 26 counts, 20 are said, no KL: from 20 / 26 to (nearly) 20."""
    num_letters, steps, iterations = 26, 20, 120

    def decode(table, tokens, positions, key_mask, cache, index):
        del positions, key_mask, index
        return table[tokens], cache

    model = SimpleNamespace(config=None, init_cache=lambda batch, length: (), decode=decode)
    options = sampling.SamplingConfig(max_new_tokens=steps, eos_id=None, pad_id=num_letters)
    policy_fn = ops.policy_fn(lambda table, tokens, attention_mask, key: table[tokens])
    count = rewards.token_count(7, include_prompt=False)
    optimizer = adam(iterations, 0.2)
    prompts = jnp.arange(64)[:, None] % num_letters

    def iteration(state, key):
        batch = rollouts.collect(
            model, state.params, prompts, jnp.ones_like(prompts), key, sampling=options, policy_fn=policy_fn
        )
        scores, _ = count(batch)
        batch = batch.replace(scores=scores)
        state, _ = vpg.update(state, batch, key, policy_fn=policy_fn, optimizer=optimizer, config=vpg.Config())
        return state, scores.mean()

    start = vpg.State.create(jnp.zeros((num_letters, num_letters)), optimizer)
    _, scores = repeat(iteration, start, jax.random.split(KEY, iterations))
    assert scores[0] == pytest.approx(20 / 26, abs=0.4)
    assert 19.5 < scores[-10:].mean() <= 20.0
