"""What holds for the update of every algorithm: the same numbers by hand, in microbatches, over
devices, under pmap and under vmap over settings; nothing moves if there is nothing to learn from;
what cannot be meant is refused."""

import functools
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import slow
from cases import (
    KEY,
    LEARNING_RATE,
    LENGTHS,
    MINIBATCHES,
    POLICY,
    PPO,
    UPDATES,
    answers,
    pairs,
    samples,
)
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose
from tabular import (
    assert_close,
    assert_identical,
    comparisons,
    every_way,
    numbers,
    policy_fn,
    policy_params,
    score_fn,
)

from rlhf_jax import dpo, grpo, ppo, reward_model, rloo, sharding, vpg

# One line of the table for each module; its other lines differ in settings alone.
OF_MODULES = list({case.module: name for name, case in reversed(UPDATES.items())}.values())
RL = [name for name in OF_MODULES if name in POLICY]
# And those with other sums over rows.
SUMS = [*OF_MODULES, "regression", "reinforce++", "reinforce++ baseline", "distill sampled"]
FAST = [name for name in OF_MODULES if name not in ("rloo", "grpo", "distill")]  # steps as PPO's
each = pytest.mark.parametrize("name", [name if name in FAST else slow(name) for name in SUMS])


@functools.cache
def jitted(name, **changes):
    return jax.jit(UPDATES[name].update(replace(UPDATES[name].config, **changes)))


# The same numbers everywhere


@jax.jit
def shuffled(key, epochs):
    """Rows of each minibatch [epochs, minibatches, rows], as ``minibatch_epochs`` documents
    them.
    """
    num_blocks = MINIBATCHES["shuffle_blocks"]
    num_minibatches = MINIBATCHES["num_minibatches"]
    blocks = jnp.arange(len(LENGTHS)).reshape(num_blocks, -1)

    def epoch(number):
        fold = partial(jax.random.fold_in, jax.random.fold_in(key, number))
        orders = jax.vmap(lambda i, block: jax.random.permutation(fold(i), block))(
            jnp.arange(num_blocks), blocks
        )
        return jnp.stack([part.ravel() for part in jnp.split(orders, num_minibatches, axis=1)])

    return jax.vmap(epoch)(epochs)


def by_hand(case, params, batch, key):
    """Parameters and mean metrics after a Python loop of plain gradient descent over the
    minibatches.
    """
    loss = partial(numbers(case.module.loss), **case.model, config=case.config)
    loss_and_gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    if hasattr(case.module, "prepare"):
        batch = jax.jit(partial(case.module.prepare, config=case.config))(batch)
    batch = jax.tree.map(np.asarray, batch)
    steps = []
    for rows in np.concatenate(shuffled(key, jnp.arange(case.num_epochs))):
        (value, metrics), gradient = loss_and_gradient(
            params, jax.tree.map(lambda x, rows=rows: x[rows], batch), key
        )
        params = jax.tree.map(lambda p, g: p - LEARNING_RATE * np.asarray(g), params, gradient)
        norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(gradient)))
        steps.append({**metrics, "loss": value, "grad_norm": norm})
    metrics = {
        name: (np.max if name.endswith("_max") else np.mean)([s[name] for s in steps])
        for name in steps[0]
    }
    return params, metrics


@pytest.mark.parametrize(
    ("name", "check_vma"), [("sft", [True]), *(slow(name, [True, False]) for name in SUMS)]
)
def test_steps_by_hand_and_over_devices(name, check_vma):
    case = UPDATES[name]
    constraint = sharding.rows(sharding.make_mesh(4))
    ways = every_way(
        case.steps, case.start, case.batch(), KEY, check_vma, minibatch_sharding=constraint
    )
    params, mean_metrics = by_hand(case, case.start.params, case.batch(), KEY)
    assert mean_metrics["grad_norm"] > 0.01
    for after, metrics in ways:
        assert after.step == 2 * case.num_epochs
        assert_close(after.params, params)
        assert_close({key: metrics[key] for key in mean_metrics}, mean_metrics)
        assert_close(metrics, ways[0][1])


@each
def test_microbatches_change_nothing(name):
    state = UPDATES[name].start
    batch = UPDATES[name].batch()
    after, metrics = jitted(name)(state, batch, KEY)
    assert metrics["grad_norm"] > 0.01
    assert after.step == UPDATES[name].config.num_epochs if name in POLICY else 1
    assert metrics.get("sft/tokens", sum(LENGTHS)) == sum(LENGTHS)
    assert_close(jitted(name, num_microbatches=4)(state, batch, KEY), (after, metrics))


@pytest.mark.slow
def test_pmap_agrees():
    case = UPDATES["ppo"]
    expected = jitted("ppo")(case.start, case.batch(), KEY)
    shards = jax.tree.map(lambda x: x.reshape(4, 4, *x.shape[1:]), case.batch())
    mapped = jax.pmap(
        partial(case.update(), axis_name="data"), axis_name="data", in_axes=(None, 0, None)
    )
    results = mapped(case.start, shards, KEY)
    for device in range(4):
        assert_close(jax.tree.map(lambda x, device=device: x[device], results), expected)


@pytest.mark.parametrize("name", ["kto", slow("bco")])
def test_the_reference_point_of_kto_is_that_of_all_devices(name):
    case = UPDATES[name]
    batch = case.batch()
    ref_log_probs = batch.mismatched.ref_log_probs - jnp.arange(16.0)
    batch = batch.replace(mismatched=batch.mismatched.replace(ref_log_probs=ref_log_probs))
    batch = batch.replace(ref_log_probs=batch.ref_log_probs - jnp.arange(16.0))
    _, expected = jitted(name)(case.start, batch, KEY)
    mapped = jax.shard_map(
        partial(case.update(), axis_name="data"),
        mesh=sharding.make_mesh(4),
        in_specs=(P(), P("data"), P()),
        out_specs=P(),
    )
    _, metrics = jax.jit(mapped)(case.start, batch, KEY)
    assert expected["kto/reference_point"] > 1
    assert_allclose(metrics["kto/reference_point"], expected["kto/reference_point"], rtol=1e-5)


OF_PPO = {
    **dict.fromkeys(("clip_low", "clip_high", "value_clip"), (0.1, 0.3)),
    **dict.fromkeys(("entropy_coef", "kl_loss_coef"), (0.0, 0.3)),
    **dict.fromkeys(("gae_lambda", "value_coef"), (0.1, 1.0)),
    "dual_clip": (1.1, 3.0),
    "gamma": (0.9, 1.0),
}
SWEEPS = [
    ("dpo", {"beta": (0.1, 0.5), "label_smoothing": (0.0, 0.2)}),
    slow("centering", {"centering": (0.0, 0.1)}),
    ("vpg", {"entropy_coef": (0.0, 0.3), "baseline_decay": (0.5, 0.9)}),
    ("ppo", OF_PPO),
    slow("grpo", {"eps": (1e-4, 0.1), "kl_loss_coef": (0.0, 0.3), "clip_high": (0.01, 0.3)}),
    slow("distill sampled", {"teacher_coef": (0.2, 1.0), "discount": (0.1, 0.9)}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "values"), SWEEPS)
def test_a_sweep_under_vmap_equals_separate_runs(name, values):
    """Runs of the first values, of the second ones, and of the first with one setting's second:
    none has no effect.
    """
    case = UPDATES[name]
    state = case.start
    batch = case.batch()

    def of_fields(fields, batch):
        return case.update(replace(case.config, **fields))(state, batch, KEY)

    swept = jax.jit(jax.vmap(of_fields, in_axes=(0, None)))
    columns = {
        field: jnp.array([*pair, *np.repeat(pair[0], len(values))])
        for field, pair in values.items()
    }
    columns = {
        field: x.at[2 + i].set(values[field][1]) for i, (field, x) in enumerate(columns.items())
    }
    together = swept(columns, batch)
    for i, field in enumerate(values, 2):
        assert any(np.abs(x[i] - x[0]).max() > 1e-5 for x in jax.tree.leaves(together[0])), field
    for run in range(2):
        after, metrics = jitted(name, **{field: pair[run] for field, pair in values.items()})(
            state, batch, KEY
        )
        swept_state, swept_metrics = jax.tree.map(lambda x, run=run: x[run], together)
        assert_close(swept_state, after)
        assert_close(
            {metric: swept_metrics[metric] for metric in metrics}, metrics
        )  # a term of 0 has no metric


def test_what_a_run_is_told_of_an_algorithm():
    facts = {
        name: (UPDATES[name].module.needs_values, UPDATES[name].module.kl_coef) for name in POLICY
    }
    without = ("grpo", "gspo", "cispo", "sapo", "vespo", "distill", "distill sampled")
    grpo_or_distill = dict.fromkeys(without, (False, 0.0))
    assert facts == {
        "vpg": (False, 0.05),
        "ppo": (True, 0.05),
        **dict.fromkeys(("rloo", "reinforce++", "reinforce++ baseline"), (False, 0.05)),
        **grpo_or_distill,
    }
    assert [UPDATES[name].config.kl_in_loss for name in POLICY] == [False, *[True] * 11]
    assert {vpg.Config(baseline="greedy").baseline, ppo.Config().baseline} == {
        "greedy",
        "none",
    }  # a run reads it
    assert not any(module.Config(kl_loss_coef=0.0).kl_in_loss for module in (ppo, rloo, grpo))


# Nothing to learn from, keys


@each
def test_a_batch_of_nothing_and_one_that_is_not_finite_keep_the_state(name):
    start = UPDATES[name].start
    batch = UPDATES[name].batch()
    nothing = batch.replace(response_mask=np.zeros_like(batch.response_mask))
    after, metrics = jitted(name)(start, nothing, KEY)
    assert_identical(after.replace(step=start.step), start)
    assert metrics.pop("reward/equal_share", 1) == 1  # groups of missing rows teach nothing
    assert not any(np.asarray(x).any() for x in metrics.values())
    lost = jax.tree.map(lambda x: np.where(np.arange(5) == 0, np.nan, x.T).T, start.params)
    state = start.replace(params=jax.tree.map(np.float32, lost))
    faults = [(state, batch)]
    if name in POLICY:  # a reward that is NaN in a single token
        rewards = np.array(batch.rewards)
        rewards[tuple(np.argwhere(np.asarray(batch.response_mask))[0])] = np.nan
        faults += [(start, batch.replace(rewards=rewards))]
    for state, batch in faults:
        kept, metrics = jitted(name)(state, batch, KEY)
        assert metrics["nonfinite"] == 1
        assert_identical(kept, state)


@pytest.mark.parametrize("name", ["sft", "reward_model"])
def test_dropout_has_the_key_of_the_microbatch(name):
    """What the model says is scaled by a number of that key; no key, no dropout."""
    case = UPDATES[name]
    ((kind, model),) = UPDATES[name].model.items()

    def noisy(params, tokens, attention_mask, key):
        factor = 1.0 if key is None else jax.random.uniform(key)
        return jax.tree.map(lambda x: factor * x, model(params, tokens, attention_mask, None))

    own_key = jax.random.fold_in(KEY, 0)
    factor = jax.random.uniform(own_key)

    def scaled(*args):
        return jax.tree.map(lambda x: factor * x, model(*args))

    expected = jax.jit(case.update(**{kind: scaled}))(case.start, case.batch(), None)
    _, plain = jitted(name)(case.start, case.batch(), KEY)
    assert abs(expected[1]["loss"] - plain["loss"]) > 0.01
    assert_close(jax.jit(case.update(**{kind: noisy}))(case.start, case.batch(), KEY), expected)


# Refusals

MICROBATCHES = [
    ({"num_microbatches": 0}, "num_microbatches(=0| must be at least 1)"),
    ({"num_microbatches": 3}, "num_microbatches=3 does not divide the 16 rows"),
]
ROLLOUTS = [
    ({"aggregate": "mean"}, "token, sequence, sum, fixed"),
    ({"aggregate": "fixed", "length": None}, "length"),
    ({"num_minibatches": 0}, "num_minibatches must be at least 1, got 0"),
    ({"num_minibatches": 3}, "16 rows .* num_minibatches=3"),
]
CLIPPED = [
    ({"kl_loss_estimator": "k1"}, "use it in the reward"),
    ({"kl_loss_estimator": "k4"}, "k1, k2, k3"),
    ({"surrogate": "ppo"}, "surrogate must be one of clip, cispo, sapo, vespo, gmpo, got 'ppo'"),
    (
        {"surrogate": "cispo", "dual_clip": 3.0},
        "dual_clip: only for the surrogate 'clip', not 'cispo'",
    ),
    ({"ratio": "row"}, "ratio must be one of token, sequence, product, got 'row'"),
    (
        {"surrogate": "vespo", "dual_clip": None},
        "ratio: the surrogate 'vespo' weighs whole rows, by 'product'",
    ),
    ({"dual_clip": 0.5}, "dual_clip must be above 1"),
    ({"clip_low": -0.1}, "clip_low must be at least 0"),
    ({"clip_high": -0.1}, "clip_high must be at least 0"),
    ({"num_epochs": 0}, "num_epochs must be at least 1"),
]
GROUPED = [
    ({"group_size": 1}, "group_size must be at least 2"),
    ({"group_size": 3}, "16 rows .* group_size=3"),
]
OF_ONE = [
    ("ppo", {"value_clip": 0.0}, "value_clip must be above 0"),
    slow("grpo", {"eps": -1.0}, "eps must be at least 0"),
    slow("grpo", {"length": 12}, "length 12 is only for aggregate 'fixed', got 'sequence'"),
    ("vpg", {"baseline": "mean"}, "ema, greedy, none"),
    ("distill", {"divergence": "kl"}, "reverse_kl, forward_kl, jsd, sampled"),
    ("distill", {"beta": 1.0}, "beta must be below 1"),
    ("distill", {"beta": 0.0}, "beta must be above 0"),
    ("distill", {"discount": 1.5}, "discount must be at most 1"),
    ("distill", {"teacher_coef": -1.0}, "teacher_coef must be at least 0"),
    ("distill", {"group_size": 3}, "16 rows .* group_size=3"),
    ("vpg", {"baseline_decay": 1.5}, "baseline_decay must be at most 1"),
    ("sft", {"aggregate": "mean"}, "token, sequence, sum"),
    ("dpo", {"kind": "bradley"}, "sigmoid, robust, hinge, ipo, apo_zero, apo_down, simpo, orpo"),
    ("dpo", {"gamma": 0.5}, "gamma is the target margin of 'simpo'; 'sigmoid' has no margin"),
    ("dpo", {"kind": "orpo", "label_smoothing": 0.1}, "label_smoothing: not defined for 'orpo'"),
    ("kto", {"beta": 0.0}, "beta must be above 0"),
    ("kto", {"undesirable_weight": -1.0}, "undesirable_weight must be at least 0"),
    ("rloo", {"baseline": "mean"}, "baseline must be one of group, global, both"),
    ("rloo", {"baseline": "both", "group_size": 1}, "group_size must be at least 2"),
    ("dpo", {"beta": 0.0}, "beta must be above 0"),
    ("dpo", {"label_smoothing": 0.5}, "label_smoothing must be below 0.5"),
    ("dpo", {"kind": "ipo", "label_smoothing": 0.1}, "label_smoothing"),
    slow("centering", {"centering": -0.1}, "centering must be at least 0"),
    ("reward_model", {"centering": 0.1}, "centering"),
]


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        (name, *rule)
        for name in OF_MODULES
        for rule in MICROBATCHES + (ROLLOUTS if name in POLICY else [])
    ]
    + [("grpo", *rule) for rule in CLIPPED]
    + [(name, *rule) for name in ("rloo", "grpo") for rule in GROUPED]
    + OF_ONE,
)
def test_unusable_configs(name, fields, message):
    case = UPDATES[name]
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(case.update(replace(case.config, **fields)), case.start, case.batch(), KEY)


def column(field):
    """The first column of a field: beside [B, T] everything but a check broadcasts it in
    silence.
    """
    return lambda batch: batch.replace(**{field: getattr(batch, field)[:, :1]})


def one_answer(batch):
    return batch.replace(tokens=batch.tokens[:, 0])


def wide_scores(batch):
    return batch.replace(rewards=None, scores=jnp.ones((16, 1)))


def wide_weights(batch):
    return batch.replace(weight=jnp.ones((16, 1)))


MISSING = [
    ("vpg", "rewards", r"rollout\.scores .*got None.* or give rewards"),
    ("rloo", "rewards", r"rollout\.scores .*got None"),
    ("ppo", "rewards", r"rollout\.rewards .*got None"),
    ("ppo", "values", r"rollout\.values .*got None"),
    ("grpo", "ref_log_probs", r"rollout\.ref_log_probs .*got None.*kl_loss_coef=0"),
    ("dpo", "ref_log_probs", r"ref_log_probs .*got None: dpo\.with_reference"),
    ("kto", "ref_log_probs", r"ref_log_probs .*got None: kto\.with_reference"),
    ("kto", "mismatched", r"feedback\.mismatched .* kto\.with_reference"),
    ("reinforce++", "rewards", r"rollout\.rewards .*got None"),
]
MISSHAPEN = [
    ("dpo", lambda batch: answers(4).replace(ref_log_probs=np.zeros((16, 4))), r"\(16, 4\)"),
    ("dpo", one_answer, r"\(16, 6\)"),
    ("dpo", wide_weights, r"\(16, 1\)"),
    ("dpo", column("ref_log_probs"), r"\(16, 2\), \(16, 1\)"),
    ("reward_model", lambda batch: comparisons(0, 16, 1), "at least 2 answers"),
    ("reward_model", one_answer, "rank"),
    ("reward_model", wide_weights, r"\(16, 1\)"),
    ("vpg", wide_scores, r"\(16, 1\)"),
    ("rloo", wide_scores, r"\(16, 1\)"),
    ("ppo", column("values"), r"\(16, 1\)"),
]
MISSHAPEN += [
    (name, column(field), r"\(16, 1\)")
    for name in RL
    for field in ("rewards", "importance_weights", "log_probs", "ref_log_probs")
    if name != "vpg" or "log" not in field
]


def refused(name, batch, message):
    with pytest.raises((AssertionError, ValueError), match=message):
        jax.eval_shape(UPDATES[name].update(), UPDATES[name].start, batch, KEY)


@pytest.mark.parametrize(("name", "field", "message"), MISSING)
def test_what_a_batch_lacks_is_named(name, field, message):
    refused(name, UPDATES[name].batch().replace(**{field: None}), message)


@pytest.mark.parametrize(("name", "change", "message"), MISSHAPEN)
def test_batches_of_other_shapes_are_refused(name, change, message):
    refused(name, change(UPDATES[name].batch()), message)


@pytest.mark.parametrize("name", OF_MODULES)
def test_what_a_model_returns_must_not_broadcast(name):
    case = UPDATES[name]

    def column_of_policy(*args):
        return jax.tree.map(lambda x: x[:, :1], case.model["policy_fn"](*args))

    wrong = {"score_fn": lambda *args: score_fn(*args)[:, None]} if "score_fn" in case.model else {}
    with pytest.raises((AssertionError, ValueError), match=r"\(\d+, 1\)"):
        jax.eval_shape(
            case.update(**(wrong or {"policy_fn": column_of_policy})), case.start, case.batch(), KEY
        )


@pytest.mark.parametrize("name", RL)
def test_a_loss_needs_a_prepared_rollout(name):
    case = UPDATES[name]
    loss = partial(case.module.loss, **case.model, config=case.config)
    with pytest.raises(ValueError, match=r"rollout\.advantages .*got None"):
        jax.eval_shape(loss, case.start.params, case.batch(), KEY)


def test_ppo_needs_values_and_returns():
    def loss(returns, policy_fn):
        batch = samples().replace(advantages=samples().rewards, returns=returns)
        options = {"policy_fn": policy_fn, "config": PPO}
        jax.eval_shape(partial(ppo.loss, **options), policy_params(0), batch, KEY)

    with pytest.raises(ValueError, match=r"rollout\.returns .*got None"):
        loss(None, policy_fn)
    without = lambda *args: policy_fn(*args)._replace(values=None)  # noqa: E731
    with pytest.raises(ValueError, match="values=None"):
        loss(samples().values, without)


# Settings that are traced


@pytest.mark.parametrize("name", [*FAST, "grpo", "distill", "sapo", "vespo", "centering"])
def test_every_weight_of_an_update_may_be_traced(name):
    """An argument of the caller's jit or vmap in place of a number."""
    case = UPDATES[name]
    unfit = (
        "gamma",
        "centering",
        "sft_coef",
        "positive_coef",
    )  # unless a case has them, refused with a sentence
    fields = [
        key
        for key, value in vars(case.config).items()
        if isinstance(value, float) and (value or key not in unfit)
    ]
    fields += [key for key in ("dual_clip", "value_clip") if getattr(case.config, key, None)]

    def update(numbers, state, batch):
        config = replace(case.config, **numbers)
        return case.update(config)(state, batch, KEY)

    given = {key: jnp.float32(getattr(case.config, key)) for key in fields}
    jax.eval_shape(update, given, case.start, case.batch())


@pytest.mark.parametrize("module", [dpo, reward_model])
def test_a_traced_sft_coef_weighs_the_term_and_0_takes_it_away(module):
    [case] = [case for case in UPDATES.values() if case.module is module][:1]
    more = {} if module is dpo else {"policy_fn": policy_fn}
    batch = pairs()

    @jax.jit
    def losses(coef, params):
        """With the coefficient, and without the term."""
        configs = (module.Config(sft_coef=coef), module.Config())
        model = case.model | more
        found = [
            numbers(module.loss)(params, batch, None, config=config, **model) for config in configs
        ]
        [(value, metrics), (without, _)] = found
        return value, without, metrics[f"{module.__name__.rpartition('.')[2]}/sft_loss"]

    params = case.start.params | policy_params(0)
    for weight in (0.0, 0.5, 2.0):
        value, without, nll = losses(weight, params)
        assert nll > 0.1
        assert_allclose(value, without + weight * nll, rtol=1e-5)
    with pytest.raises(ValueError, match="orpo has such a term"):
        jax.eval_shape(lambda coef: dpo.Config(kind="orpo", sft_coef=coef), 0.5)
