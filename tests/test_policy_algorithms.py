"""VPG, PPO, RLOO, GRPO and GSPO: numbers by hand, bandits whose optima are known; what must not matter (masked columns,
absent rows, microbatches, devices, jit) and what must (steps, keys, the state)."""

import dataclasses
import functools
import itertools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from tabular import (
    BANDIT_OPTIMUM,
    BANDIT_REF,
    BANDIT_REWARD,
    assert_close,
    assert_identical,
    bandit_params,
    bandit_policy_fn,
    bandit_rollout,
    numbers,
    policy_fn,
    policy_params,
    rollout,
    three_ways,
)

from rlhf_jax import sharding
from rlhf_jax.algorithms import grpo, policy, ppo, rloo, vpg
from rlhf_jax.rollout import rescore
from rlhf_jax.types import Algorithm, PolicyOutput, Rollout, TrainState

KEY = jax.random.key(7)
SGD = optax.sgd(0.3)
# Groups of four answers: one with an absent answer, one with a single present answer, one that is absent.
LENGTHS = [4, 1, 2, 0, 3, 0, 0, 0, 0, 0, 0, 0, 2, 4, 1, 1]
PRESENT = np.array(LENGTHS) > 0
TERMS = {"entropy_coef": 0.1, "kl_loss_coef": 0.1}
CASES = {
    "vpg": (vpg, vpg.Config(entropy_coef=0.1)),
    "ppo": (ppo, ppo.Config(num_epochs=2, **TERMS)),
    "rloo": (rloo, rloo.Config(num_epochs=2, **TERMS)),
    "grpo": (grpo, grpo.Config(group_size=4, num_epochs=2, **TERMS)),
    "gspo": (grpo, grpo.Config(group_size=4, num_epochs=2, ratio="sequence", **TERMS)),
}
each = pytest.mark.parametrize("name", CASES)


def batch_of(name, lengths=LENGTHS):
    """A rollout without advantages: the update is to make them."""
    del name
    return rollout(0, lengths).replace(advantages=None, returns=None)


def updater(name, policy_fn=policy_fn, optimizer=SGD, **changes):
    module, config = CASES[name]
    config = dataclasses.replace(config, **changes)
    return partial(module.update, policy_fn=policy_fn, optimizer=optimizer, config=config)


@functools.cache
def jitted(name, **changes):
    return jax.jit(updater(name, **changes))


def start(name, optimizer=SGD):
    return CASES[name][0].State.create(policy_params(0), optimizer)


# What must not matter


@each
def test_microbatches_change_nothing(name):
    whole, parts = jitted(name), jitted(name, num_microbatches=4)
    assert_close(parts(start(name), batch_of(name), KEY), whole(start(name), batch_of(name), KEY))


@each
def test_masked_columns_do_not_matter(name):
    batch = batch_of(name)
    inside = batch.response_mask != 0

    @jax.jit
    def run(poison):
        def poisoned(x):  # added, so that what is masked too late comes back as a gradient
            return x + jnp.where(inside, 0.0, poison)

        def poisoned_policy(*args):
            return PolicyOutput(*(poisoned(x) for x in policy_fn(*args)))

        fields = ("log_probs", "ref_log_probs", "values", "rewards")
        bad = batch.replace(**{name: poisoned(getattr(batch, name)) for name in fields})
        return updater(name, poisoned_policy)(start(name), bad, KEY)

    expected = run(0.0)
    assert expected[1]["grad_norm"] > 0
    for poison in (np.nan, 1e4, -1e4):
        assert_identical(run(poison), expected)


@each
def test_absent_rows_are_not_there(name):
    """Neither in the loss of a prepared rollout nor, without its absent answers, in a group's advantages."""
    module, config = CASES[name]
    prepared = module.prepare(batch_of(name), config=config)
    f = jax.jit(jax.value_and_grad(partial(numbers(module.loss), policy_fn=policy_fn, config=config), has_aux=True))
    smaller = jax.tree.map(lambda x: np.asarray(x)[PRESENT], prepared)
    assert_close(f(policy_params(0), smaller, KEY), f(policy_params(0), prepared, KEY))
    padded, kept = batch_of(name, [4, 2, 0, 0, 3, 1, 0, 0]), np.array([0, 1, 4, 5])
    pairs = dataclasses.replace(config, **({"group_size": 2} if config.group_size > 1 else {}))
    expected = module.prepare(jax.tree.map(lambda x: np.asarray(x)[kept], padded), config=pairs).advantages
    assert_close(module.prepare(padded, config=config).advantages[kept], expected)


@each
def test_nothing_at_all_changes_nothing(name):
    after, metrics = jitted(name)(start(name), batch_of(name, [0] * 16), KEY)
    assert_identical(after.replace(step=start(name).step), start(name))
    assert not any(np.asarray(x).any() for x in metrics.values())


@each
def test_a_reward_that_is_not_finite_keeps_the_state(name):
    batch = batch_of(name)
    state, metrics = jitted(name)(start(name), batch, KEY)
    assert metrics["nonfinite"] == 0
    kept, metrics = jitted(name)(state, batch.replace(rewards=batch.rewards.at[0, 3].set(jnp.nan)), KEY)
    assert metrics["nonfinite"] == 1
    assert_identical(kept, state)


@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [name if name in ("vpg", "gspo") else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_devices_agree_on_an_update(name, check_vma):
    """Unequal token counts per device, one of them empty, several minibatches and microbatches."""
    cut = {"num_minibatches": 2, "num_microbatches": 2, "shuffle_blocks": 4, "aggregate": "sequence"}
    constraint = sharding.rows(sharding.make_mesh(4))
    ways = three_ways(
        updater(name, **cut), start(name), batch_of(name), KEY, check_vma=check_vma, minibatch_sharding=constraint
    )
    assert_close(ways[1], ways[0])
    assert_close(ways[2], ways[0])
    assert np.abs(ways[0][0].params["logits"] - policy_params(0)["logits"]).max() > 0.01


@pytest.mark.parametrize("name", ["vpg", "ppo"])
def test_pmap_agrees(name):
    batch = batch_of(name)
    expected = jitted(name)(start(name), batch, KEY)
    shards = jax.tree.map(lambda x: x.reshape(4, 4, *x.shape[1:]), batch)
    mapped = jax.pmap(partial(updater(name), axis_name="data"), axis_name="data", in_axes=(None, 0, None))
    results = mapped(start(name), shards, KEY)
    for device in range(4):
        assert_close(jax.tree.map(lambda x, device=device: x[device], results), expected)


class Variants(chex.TestCase):
    @chex.all_variants(with_pmap=False)
    def test_jit_and_device_change_nothing(self):
        for name in ("vpg", "ppo"):
            expected = jitted(name)(start(name), batch_of(name), KEY)
            assert_close(self.variant(updater(name))(start(name), batch_of(name), KEY), expected)


def test_mask_types():
    module, config = CASES["ppo"]
    batch = module.prepare(batch_of("ppo"), config=config)
    f = jax.jit(partial(numbers(module.loss), policy_fn=policy_fn, config=config))
    expected = f(policy_params(0), batch, KEY)
    for mask in (batch.response_mask != 0, batch.response_mask.astype(jnp.float32) * 2):
        assert_identical(f(policy_params(0), batch.replace(response_mask=mask), KEY), expected)


# What must matter


@each
def test_number_of_steps_and_fresh_shuffles(name):
    num_epochs = CASES[name][1].num_epochs
    update = jitted(name, num_minibatches=2)
    first, _ = update(start(name), batch_of(name), KEY)
    assert first.step == 2 * num_epochs
    assert jitted(name)(start(name), batch_of(name), KEY)[0].step == num_epochs
    assert_identical(update(start(name), batch_of(name), KEY)[0], first)
    other, _ = update(start(name), batch_of(name), jax.random.key(8))
    assert np.any(other.params["logits"] != first.params["logits"])


@pytest.mark.parametrize("name", ["ppo", "rloo", "grpo", "gspo"])
def test_first_ratio_is_exactly_one(name):
    batch = jax.jit(partial(rescore, policy_fn=policy_fn))(batch_of(name), policy_params(0))
    frozen = updater(name, optimizer=optax.sgd(0.0), num_epochs=1, num_minibatches=2)
    _, metrics = jax.jit(frozen)(start(name, optax.sgd(0.0)), batch, KEY)
    assert metrics["policy/ratio_max"] == 1.0
    assert metrics["policy/approx_kl"] == 0.0
    assert metrics["policy/clip_fraction"] == 0.0


@each
def test_modules_are_algorithms(name):
    module, config = CASES[name]
    algorithm: Algorithm = module
    assert algorithm.needs_values == (name == "ppo")
    assert algorithm.kl_coef == (0.0 if module is grpo else 0.05)
    assert issubclass(algorithm.State, TrainState)
    assert config.kl_in_loss == (name != "vpg")
    assert not dataclasses.replace(config, **({} if name == "vpg" else {"kl_loss_coef": 0.0})).kl_in_loss
    assert (config.group_size > 1) == (module in (rloo, grpo))


UNUSABLE = [
    ({"aggregate": "mean"}, "token, sequence, sum, fixed"),
    ({"aggregate": "fixed"}, "length"),
    ({"num_minibatches": 0}, "num_minibatches must be at least 1, got 0"),
    ({"num_minibatches": 3}, "16 rows .* num_minibatches=3"),
    ({"num_microbatches": 3}, "num_microbatches=3 does not divide the 16 rows"),
]
CLIPPED = [
    ({"kl_loss_estimator": "k1"}, "use it in the reward"),
    ({"kl_loss_estimator": "k4"}, "k1, k2, k3"),
    ({"ratio": "row"}, "ratio must be one of token, sequence, got 'row'"),
    ({"dual_clip": 0.5}, "dual_clip must be above 1"),
    ({"clip_low": -0.1}, "clip_low must be at least 0"),
    ({"clip_high": -0.1}, "clip_high must be at least 0"),
    ({"num_epochs": 0}, "num_epochs must be at least 1"),
]
GROUPED = [({"group_size": 1}, "group_size must be at least 2"), ({"group_size": 3}, "16 rows .* group_size=3")]
OF_ONE = [
    ("ppo", {"value_clip": 0.0}, "value_clip must be above 0"),
    ("grpo", {"eps": -1.0}, "eps must be at least 0"),
    ("vpg", {"baseline": "mean"}, "ema, none"),
    ("vpg", {"baseline_decay": 1.5}, "baseline_decay must be at most 1"),
]


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [(name, *rule) for name in CASES for rule in UNUSABLE]
    + [(name, *rule) for name in ("ppo", "grpo") for rule in CLIPPED]
    + [(name, *rule) for name in ("rloo", "grpo") for rule in GROUPED]
    + OF_ONE,
)
def test_unusable_configs(name, fields, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(updater(name, **fields), start(name), batch_of(name), KEY)


@pytest.mark.parametrize(
    ("name", "missing", "message"),
    [
        ("vpg", ["rewards"], "got neither"),
        ("ppo", ["rewards"], r"rollout\.rewards .*got None"),
        ("ppo", ["values"], r"rollout\.values .*got None"),
        ("rloo", ["rewards"], "got neither"),
        ("grpo", ["ref_log_probs"], r"rollout\.ref_log_probs .*got None.*kl_loss_coef=0"),
    ],
)
def test_missing_fields_are_named(name, missing, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(updater(name), start(name), batch_of(name).replace(**dict.fromkeys(missing)), KEY)


@each
def test_a_loss_needs_a_prepared_rollout(name):
    module, config = CASES[name]
    with pytest.raises(ValueError, match=r"rollout\.advantages .*got None"):
        module.loss(policy_params(0), batch_of(name), KEY, policy_fn=policy_fn, config=config)


def test_ppo_needs_values_and_returns():
    batch = rollout(0, LENGTHS)
    with pytest.raises(ValueError, match=r"rollout\.returns .*got None"):
        ppo.loss({}, batch.replace(returns=None), KEY, policy_fn=fixed_policy, config=ppo.Config())
    without = lambda *args: fixed_policy(*args)._replace(values=None)  # noqa: E731
    with pytest.raises(ValueError, match="values=None"):
        ppo.loss({}, batch, KEY, policy_fn=without, config=ppo.Config())


def fixed_policy(params, tokens, attention_mask, key):
    return PolicyOutput(*[jnp.zeros(tokens.shape)] * 3)


@each
@pytest.mark.parametrize("field", ["log_probs", "rewards", "values", "ref_log_probs", "scores", "policy"])
def test_shapes_that_would_broadcast_are_refused(name, field):
    """A column [B, 1] beside [B, T] is broadcast in silence by everything but a check."""
    batch, function = batch_of(name), policy_fn
    reads = {"values": ["ppo"], "ref_log_probs": ["ppo", "rloo", "grpo", "gspo"], "log_probs": list(CASES)[1:]}
    if field == "policy":

        def function(*args):
            return PolicyOutput(*(x[:, :1] for x in policy_fn(*args)))

    elif name not in reads.get(field, CASES) or (field, name) == ("scores", "ppo"):
        pytest.skip("not read")
    elif field == "scores":
        batch = batch.replace(rewards=None, scores=jnp.ones((16, 1)))
    else:
        batch = batch.replace(**{field: getattr(batch, field)[:, :1]})
    with pytest.raises(AssertionError, match=r"\(16, 1\)"):
        jax.eval_shape(updater(name, function), start(name), batch, KEY)


# Hyperparameters under vmap


SWEEPS = [
    ("vpg", {"entropy_coef": (0.0, 0.3), "baseline_decay": (0.5, 0.9)}),
    (
        "ppo",
        {
            **dict.fromkeys(("clip_low", "clip_high", "value_clip"), (0.1, 0.3)),
            **dict.fromkeys(("entropy_coef", "kl_loss_coef"), (0.0, 0.3)),
            "dual_clip": (1.1, 3.0),
            "gamma": (0.9, 1.0),
            "gae_lambda": (0.5, 1.0),
            "value_coef": (0.1, 1.0),
        },
    ),
    ("rloo", {"clip_low": (0.1, 0.3), "kl_loss_coef": (0.0, 0.3)}),
    ("grpo", {"eps": (1e-4, 0.1), "kl_loss_coef": (0.0, 0.3)}),
    ("gspo", {"clip_high": (0.01, 0.3), "entropy_coef": (0.0, 0.3)}),
]


@pytest.mark.parametrize(("name", "values"), SWEEPS)
def test_a_sweep_under_vmap_equals_separate_runs(name, values):
    batch = batch_of(name)
    swept = jax.jit(jax.vmap(lambda fields: updater(name, **fields)(start(name), batch, KEY)))
    together = swept({field: jnp.array(pair) for field, pair in values.items()})
    for run in range(2):
        fields = {field: pair[run] for field, pair in values.items()}
        state, metrics = jax.jit(updater(name, **fields))(start(name), batch, KEY)
        swept_state, found = jax.tree.map(lambda x, run=run: x[run], together)
        assert_close(swept_state, state)
        assert_close({metric: found[metric] for metric in metrics}, metrics)  # a term of Python's 0 has no metric


# Numbers by hand


def one_token(log_ratio, **fields):
    """One row, one response token, two tokens of equal probability: the policy's log-prob is -ln 2, its value 1."""
    mask = jnp.array([[0, 1]])
    batch = Rollout(
        tokens=jnp.array([[0, 1]]),
        attention_mask=jnp.ones((1, 2), jnp.int32),
        response_mask=mask,
        log_probs=jnp.where(mask != 0, -np.log(2.0) - log_ratio, 0.0),
        values=jnp.zeros((1, 2)),
        advantages=jnp.array([[0.0, 1.0]]),
        returns=jnp.array([[0.0, 2.0]]),
    ).replace(**fields)
    params = {"logits": jnp.zeros((2, 2)), "values": jnp.ones(2)}
    return params, batch


def test_ppo_of_one_token():
    params, batch = one_token(np.log(1.5))
    value, metrics = numbers(ppo.loss)(params, batch, KEY, policy_fn=policy_fn, config=ppo.Config())
    expected = {
        "policy/loss": -1.2,  # the ratio of 1.5 is clipped
        "policy/clip_fraction": 1.0,
        "policy/approx_kl": 0.5 * np.log(1.5) ** 2,
        "policy/ratio_max": 1.5,
        "value/loss": 1.62,  # v = 1, old 0, R = 2 (ALGORITHMS 5)
        "objective/entropy": np.log(2.0),
    }
    assert_close(metrics, expected)
    np.testing.assert_allclose(value, -1.2 + 0.1 * 1.62, rtol=1e-6)
    free = ppo.Config(value_clip=None, entropy_coef=0.5)
    value, metrics = numbers(ppo.loss)(params, batch, KEY, policy_fn=policy_fn, config=free)
    np.testing.assert_allclose(metrics["value/loss"], 0.5, rtol=1e-6)
    np.testing.assert_allclose(value, -1.2 + 0.1 * 0.5 - 0.5 * np.log(2.0), rtol=1e-6)


def test_kl_term_of_one_token():
    """d = ln 2: k2 0.240227, k3 0.193147 (ALGORITHMS 3), times the ratio, through which no gradient flows."""
    params, batch = one_token(np.log(1.1), ref_log_probs=jnp.array([[0.0, -2 * np.log(2.0)]], jnp.float32))
    for estimator, kl, slope in [("k2", 0.240227, np.log(2.0)), ("k3", 0.193147, 0.5)]:
        config = ppo.Config(kl_loss_coef=0.3, kl_loss_estimator=estimator, value_coef=0.0)
        f = partial(numbers(ppo.loss), policy_fn=policy_fn, config=config)
        (value, metrics), grads = jax.jit(jax.value_and_grad(f, has_aux=True))(params, batch, KEY)
        np.testing.assert_allclose(metrics["policy/kl_loss"], 1.1 * kl, rtol=1e-5)
        np.testing.assert_allclose(value, -1.1 + 0.3 * 1.1 * kl, rtol=1e-5)
        # d log p / d logit of the chosen token is 1/2; the surrogate's own slope is -ratio.
        np.testing.assert_allclose(grads["logits"][0, 1], 0.5 * (-1.1 + 0.3 * 1.1 * slope), rtol=1e-5)


def test_gspo_by_hand():
    """Log-ratios (ln 1.44, 0, ln 1) of two tokens: each token has the ratio 1.44^(1/2) = 1.2 (GSPO, eq. 7), its
    gradient is A * 1.2 / 2 for each token's log-prob (eq. 10), and beyond the bound there is none (eq. 5)."""
    mask = jnp.array([[0, 1, 0, 1]])
    log_probs = jnp.where(mask != 0, -1.0, jnp.nan)
    batch = Rollout(jnp.zeros((1, 4), jnp.int32), mask, mask, log_probs.at[0, 1].add(-np.log(1.44)))
    batch = batch.replace(advantages=2.0 * mask)

    def table(params, tokens, attention_mask, key):
        return PolicyOutput(params, jnp.zeros_like(params))

    for clip_high, value, slope in [(0.3, -2.4, -1.2), (0.1, -2.2, 0.0)]:
        config = grpo.Config(ratio="sequence", kl_loss_coef=0.0, clip_high=clip_high)
        f = partial(numbers(grpo.loss), policy_fn=table, config=config)
        (found, metrics), gradient = jax.value_and_grad(f, has_aux=True)(log_probs, batch, KEY)
        np.testing.assert_allclose(found, value, rtol=1e-6)
        np.testing.assert_allclose(gradient, [[0, slope, 0, slope]], rtol=1e-6)
        np.testing.assert_allclose(metrics["policy/ratio_max"], 1.2, rtol=1e-6)
        assert metrics["policy/clip_fraction"] == (clip_high < 0.2)


def test_ppo_prepare():
    """GAE by hand (ALGORITHMS 5), then whitening over the tokens of all rows."""
    batch = rollout(0, [3, 0]).replace(
        rewards=jnp.zeros((2, 7)).at[0, 5].set(1.0), values=jnp.zeros((2, 7)).at[0, 3:6].set(jnp.array([0.1, 0.2, 0.3]))
    )
    plain = ppo.prepare(batch, config=ppo.Config(whiten_advantages=False))
    np.testing.assert_allclose(plain.advantages[0, 3:6], [0.82675, 0.765, 0.7], rtol=1e-6)
    np.testing.assert_allclose(plain.returns[0, 3:6], [0.92675, 0.965, 1.0], rtol=1e-6)
    white = ppo.prepare(batch, config=ppo.Config())
    a = np.array([0.82675, 0.765, 0.7])
    np.testing.assert_allclose(white.advantages[0, 3:6], (a - a.mean()) / a.std(), rtol=1e-4)
    assert_identical(white.returns, plain.returns)
    assert not white.advantages[1].any()
    scaled = ppo.prepare(batch, config=ppo.Config(whiten_rewards=True, whiten_advantages=False, gae_lambda=1.0))
    r = np.array([0.0, 0.0, 1.0])
    r = (r - r.mean()) / r.std() + r.mean()
    np.testing.assert_allclose(scaled.returns[0, 3:6], np.cumsum(r[::-1])[::-1], rtol=1e-5)


def test_explained_variance():
    """gamma = lambda = 0: the return is the reward, so values equal to it explain everything, and twice it nothing."""
    greedy, batch = jitted("ppo", gamma=0.0, gae_lambda=0.0), rollout(0, [3, 4])
    constant = jnp.where(batch.response_mask != 0, 0.1, 0.0)
    _, metrics = greedy(start("ppo"), batch.replace(rewards=constant), KEY)  # returns that differ by rounding
    assert metrics["value/explained_variance"] == 0.0
    for factor, explained in [(1.0, 1.0), (2.0, 0.0), (0.5, 0.75)]:
        _, metrics = greedy(start("ppo"), batch.replace(values=factor * batch.rewards), KEY)
        np.testing.assert_allclose(metrics["value/explained_variance"], explained, atol=1e-6)


def test_vpg_by_hand():
    """b0 = 0 and r = (8, 12) give b = 1 and A = (7, 11) (ALGORITHMS 4); the loss is -mean_i [A_i sum_t log p_it], here
    with p = 1/2; the next update starts from b = 1, and one whose reward is not finite leaves it there."""
    mask = jnp.array([[0, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]])
    batch = Rollout(jnp.zeros((3, 4), jnp.int32), jnp.ones((3, 4), jnp.int32), mask, jnp.zeros((3, 4)))
    batch = batch.replace(scores=jnp.array([8.0, 12.0, jnp.nan]))
    prepared = vpg.prepare(batch, config=vpg.Config())
    np.testing.assert_allclose(prepared.advantages, mask * jnp.array([[7.0], [11.0], [0.0]]), rtol=1e-6)
    plain = vpg.prepare(batch, config=vpg.Config(baseline="none"))
    np.testing.assert_allclose(plain.advantages, mask * jnp.array([[8.0], [12.0], [0.0]]), rtol=1e-6)
    assert vpg.prepare(prepared, config=vpg.Config()) is prepared

    params = {"logits": jnp.zeros((2, 2)), "values": jnp.zeros(2)}
    f = jax.jit(partial(numbers(vpg.loss), policy_fn=policy_fn, config=vpg.Config(entropy_coef=0.1)))
    value, metrics = f(params, prepared, KEY)
    policy_loss, entropy = (7 * 2 + 11) / 2 * np.log(2.0), 1.5 * np.log(2.0)
    assert_close(metrics, {"policy/loss": policy_loss, "objective/entropy": entropy})
    np.testing.assert_allclose(value, policy_loss - 0.1 * entropy, rtol=1e-6)
    one_a_row = prepared.replace(advantages=jnp.array([7.0, 11.0, 0.0]))
    assert_identical(f(params, one_a_row, KEY), (value, metrics))  # [B]
    gradient = jax.grad(lambda p: f(p, prepared, KEY)[0])(params)["logits"]
    np.testing.assert_allclose(gradient[0], (7 * 2 + 11) / 2 * np.array([-0.5, 0.5]), rtol=1e-6)

    update = jax.jit(updater("vpg", entropy_coef=0.0))
    state = vpg.State.create(params, SGD)
    assert state.baseline == 0
    state, _ = update(state, batch, KEY)
    np.testing.assert_allclose(state.params["logits"][0], 0.3 * (7 * 2 + 11) / 2 * np.array([0.5, -0.5]), rtol=1e-6)
    assert state.baseline == 1.0
    assert update(state, batch.replace(scores=batch.scores.at[0].set(jnp.inf)), KEY)[0].baseline == 1.0
    assert update(state, batch, KEY)[0].baseline == np.float32(0.9 + 1.0)
    assert update(state, batch.replace(response_mask=0 * mask), KEY)[0].baseline == 1.0
    # Advantages that are given are used as they are, by a plain TrainState too.
    given, _ = update(state, prepared, KEY)
    assert given.baseline == 1.0
    simple, _ = update(TrainState.create(state.params, SGD), prepared, KEY)
    assert_close(simple.params, given.params)
    with pytest.raises(ValueError, match=r"vpg\.State"):
        updater("vpg")(TrainState.create(params, SGD), batch, KEY)


def group_advantages(module, config, batch):
    """[B]; checks that all response tokens of a row have the same advantage, and the others 0."""
    prepared, mask = np.asarray(module.prepare(batch, config=config).advantages), np.asarray(batch.response_mask) != 0
    rows = np.where(mask.any(axis=1), np.max(np.where(mask, prepared, -np.inf), axis=1, initial=-np.inf), 0.0)
    np.testing.assert_array_equal(prepared, np.where(mask, rows[:, None], 0.0))
    return rows


SEVEN = np.sqrt(7.0)  # the standard deviation of (1, 2, 6) with n - 1
GROUPS_BY_HAND = [
    (rloo, rloo.Config(), [1, -1 / 3, -1 / 3, -1 / 3, -3, -1.5, 4.5, 0, 0, 0, 0, 0]),
    (rloo, rloo.Config(group_size=2), [1, -1, 0, 0, -1, 1, 0, 0, 0, 0, 0, 0]),
    (grpo, grpo.Config(group_size=4, eps=0.0), [1.5, -0.5, -0.5, -0.5, -2 / SEVEN, -1 / SEVEN, 3 / SEVEN, *[0] * 5]),
    (grpo, grpo.Config(group_size=4, scale=False), [0.75, -0.25, -0.25, -0.25, -2, -1, 3, *[0] * 5]),
]


@pytest.mark.parametrize(("module", "config", "expected"), GROUPS_BY_HAND)
def test_group_advantages_by_hand(module, config, expected):
    """Rewards (1, 0, 0, 0), then (1, 2, 6) and an absent answer, whose score nobody reads, then equal ones."""
    batch = batch_of("", [2, 3, 4, 1, 3, 1, 2, 0, 4, 4, 1, 2])
    scores = jnp.array([1.0, 0, 0, 0, 1, 2, 6, np.nan, 0.1, 0.1, 0.1, 0.1])
    batch = batch.replace(rewards=None, scores=scores)
    np.testing.assert_allclose(group_advantages(module, config, batch), expected, rtol=1e-6)
    # Rewards come before scores and are summed over the response: here the sum is the length.
    ones = batch.replace(rewards=jnp.where(batch.response_mask != 0, 1.0, jnp.nan))
    lengths = batch.replace(scores=batch.response_mask.sum(axis=1))
    assert_close(group_advantages(module, config, ones), group_advantages(module, config, lengths))


def test_groups_do_not_cross_devices():
    prepare = partial(rloo.prepare, config=rloo.Config(group_size=8))
    mapped = jax.shard_map(prepare, mesh=sharding.make_mesh(4), in_specs=P("data"), out_specs=P("data"))
    assert jax.eval_shape(prepare, batch_of("rloo")).advantages.shape == (16, 7)
    with pytest.raises(ValueError, match=r"4 rows \(on each device.* group_size=8"):
        jax.eval_shape(mapped, batch_of("rloo"))


def test_minibatches_may_split_groups():
    """Advantages are made before the shuffle: small steps on quarters of the batch add up to those on all of it."""
    optimizer = optax.sgd(1e-3)
    batch, state = rollout(0, [4, 3, 2, 1] * 2), TrainState.create(policy_params(0), optimizer)

    def moved(**fields):
        update = updater("rloo", optimizer=optimizer, num_epochs=1, **fields)
        return np.asarray(jax.jit(update)(state, batch, KEY)[0].params["logits"] - state.params["logits"])

    whole = moved()
    np.testing.assert_allclose(moved(num_minibatches=4) / 4, whole, atol=0.02 * np.abs(whole).max())


def test_the_first_step_is_reinforce():
    """On the policy's own samples RLOO's gradient is that of REINFORCE with the same advantages (ALGORITHMS 4)."""
    params = policy_params(0)
    batch = rloo.prepare(rescore(rollout(0, LENGTHS), params, policy_fn=policy_fn), config=rloo.Config())

    @jax.jit
    def gradients(params):
        def value(params, module):
            return numbers(module.loss)(params, batch, KEY, policy_fn=policy_fn, config=module.Config())[0]

        return [jax.grad(value)(params, module) for module in (rloo, vpg)]

    ours, plain = gradients(params)
    assert np.abs(ours["logits"]).max() > 0.01
    assert_close(ours, plain)


def test_gradient_of_grpo_by_enumeration():
    """All 27 groups of three bandit answers, each with its probability: the scaled advantages' expected gradient."""
    config = grpo.Config(group_size=3, kl_loss_coef=0.0)
    groups = np.array(list(itertools.product(range(3), repeat=3)))  # [27, 3]
    probs, rewards = np.asarray(BANDIT_REF, np.float64), np.asarray(BANDIT_REWARD, np.float64)
    expected = np.zeros(3)
    for group in groups:
        r = rewards[group]
        a = (r - r.mean()) / (r.std(ddof=1) + config.eps) if r.std() > 0 else np.zeros(3)
        slope = np.mean([-a[i] * (np.eye(3)[group[i]] - probs) for i in range(3)], axis=0)
        expected += np.prod(probs[group]) * slope

    @jax.jit
    def gradient(params):
        def of_group(arms):
            tokens = jnp.stack([jnp.zeros_like(arms), arms], axis=1)
            ones = jnp.ones_like(tokens)
            log_probs = bandit_policy_fn(bandit_params(), tokens, ones, None).log_probs
            batch = Rollout(tokens, ones, ones.at[:, 0].set(0), log_probs, scores=BANDIT_REWARD[arms])
            f = partial(numbers(grpo.loss), policy_fn=bandit_policy_fn, config=config)
            return jax.grad(f, has_aux=True)(params, grpo.prepare(batch, config=config), KEY)[0]["logits"]

        return jnp.sum(jax.vmap(of_group)(groups) * jnp.prod(BANDIT_REF[groups], axis=1)[:, None], axis=0)

    assert np.abs(expected).max() > 0.05
    np.testing.assert_allclose(gradient(bandit_params()), expected, atol=1e-5)


# Bandits (ALGORITHMS 8.1)


def kl_optimum(coef):
    """argmax E[r] - coef KL(policy || reference)."""
    weights = np.asarray(BANDIT_REF) * np.exp(np.asarray(BANDIT_REWARD) / coef)
    return weights / weights.sum()


def reverse_kl_optimum(coef):
    """argmax E[r] - coef KL(reference || policy): coef ref / (lambda - r), lambda by bisection."""
    ref, rewards = np.asarray(BANDIT_REF, np.float64), np.asarray(BANDIT_REWARD, np.float64)
    low, high = rewards.max() + 1e-9, rewards.max() + 10.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.sum(coef * ref / (middle - rewards)) > 1 else (low, middle)
    return coef * ref / (low - rewards)


IN_LOSS = {"group_size": 4, "scale": False, "kl_loss_coef": 0.5}
BANDITS = {
    "vpg ema": (vpg, vpg.Config(), 200, BANDIT_OPTIMUM),
    "vpg none": (vpg, vpg.Config(baseline="none"), 200, BANDIT_OPTIMUM),
    "ppo": (ppo, ppo.Config(), 100, BANDIT_OPTIMUM),
    "rloo": (rloo, rloo.Config(), 300, BANDIT_OPTIMUM),
    # Unscaled advantages are (G - 1) / G of the leave-one-out ones, so the coefficient is in effect 0.5 G / (G - 1).
    "grpo k2": (grpo, grpo.Config(**IN_LOSS, kl_loss_estimator="k2"), 300, kl_optimum(0.5 * 4 / 3)),
    "grpo k3": (grpo, grpo.Config(**IN_LOSS), 300, reverse_kl_optimum(0.5 * 4 / 3)),
    "gspo": (grpo, grpo.Config(**IN_LOSS, ratio="sequence"), 300, reverse_kl_optimum(0.5 * 4 / 3)),
}


@pytest.mark.parametrize("name", BANDITS)
def test_bandit_reaches_the_optimum(name):
    module, config, iterations, target = BANDITS[name]
    optimizer = optax.adam(optax.linear_schedule(0.1, 0.0, config.num_epochs * iterations))
    update = partial(module.update, policy_fn=bandit_policy_fn, optimizer=optimizer, config=config)

    def iteration(state, key):
        rollout_key, update_key = jax.random.split(key)
        batch = bandit_rollout(state.params, rollout_key)
        return update(state, batch.replace(rewards=None) if config.kl_in_loss else batch, update_key)

    @jax.jit
    def train(key):
        state = module.State.create(bandit_params(), optimizer)
        return jax.lax.scan(iteration, state, jax.random.split(key, iterations))

    def distance(logits):
        return 0.5 * np.sum(np.abs(np.asarray(jax.nn.softmax(logits)) - target))

    state, metrics = train(KEY)
    np.testing.assert_allclose(target.sum(), 1.0, rtol=1e-5)
    assert distance(bandit_params()["logits"]) > 0.2
    assert distance(state.params["logits"]) < 0.02
    assert not metrics["nonfinite"].any()


def test_an_update_of_ones_own():
    """``policy.updater`` of another prepare and loss: GRPO's advantages with VPG's loss on a rollout's own samples."""
    batch = rescore(batch_of("grpo"), policy_params(0), policy_fn=policy_fn)
    config = grpo.Config(group_size=4, kl_loss_coef=0.0)
    own = policy.updater(grpo.prepare, vpg.loss, lambda prepared, axis_name: {"rows": prepared.tokens.shape[0]})
    options = {"policy_fn": policy_fn, "optimizer": SGD, "config": config}
    after, metrics = own(start("grpo"), batch, KEY, **options)
    assert metrics["rows"] == 16
    assert_close(after, grpo.update(start("grpo"), batch, KEY, **options)[0])
