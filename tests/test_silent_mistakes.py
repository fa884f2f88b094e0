"""Mistakes that changed numbers without a word: what is right now, and what is an error in its
place.
"""

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from builders import initial_params, slow
from jax.sharding import PartitionSpec as P
from jax.tree_util import Partial
from numpy.testing import assert_allclose, assert_array_equal
from tabular import comparisons, policy_fn, policy_params, score_fn
from tabular import rollout as tabular_rollout

from rlhf_jax import (
    advantages,
    distill,
    dpo,
    gradient_step,
    grpo,
    iteration,
    kto,
    losses,
    minibatch_epochs,
    models,
    ops,
    policies,
    ppo,
    reward_model,
    rewards,
    rloo,
    rollout,
    sampling,
    vpg,
)
from rlhf_jax.algorithms import maxrl, policy
from rlhf_jax.algorithms.lengths import can_cut
from rlhf_jax.config import RunConfig, for_algorithm
from rlhf_jax.data.tokenizers import characters
from rlhf_jax.errors import UserError
from rlhf_jax.parallel import blocks, sharding
from rlhf_jax.rewards import functions
from rlhf_jax.training.supervised import normalization
from rlhf_jax.types import (
    PER_TOKEN,
    Feedback,
    Max,
    Mean,
    PolicyOutput,
    Rollout,
    TrainState,
    map_columns,
)

KEY = jax.random.key(0)
SGD = optax.sgd(1.0)
ROWS = 32
COLUMNS = 33  # a prompt of two tokens and 31 of response


# --- Equal numbers


def constant_rollout(score):
    """Responses of 31 tokens, with holes in some, that all earn the same; values are 0."""
    column = np.arange(COLUMNS)
    mask = np.broadcast_to(column >= 2, (ROWS, COLUMNS)).copy()
    mask[::3, 7] = False
    zeros = np.zeros(mask.shape, np.float32)
    tokens = (mask * (column % 5)).astype(np.int32)
    batch = Rollout(tokens, np.ones_like(tokens), mask, zeros, values=zeros)
    scored = batch.replace(scores=np.full(ROWS, score, np.float32))
    return batch.replace(rewards=shaped_at_end(scored))


shaped_at_end = jax.jit(partial(rewards.kl_shaped, kl_coef=0.0))
GLOBAL = rloo.Config(baseline="global", group_size=1)
WHITENED = {
    "ppo": partial(ppo.prepare, config=ppo.Config(gae_lambda=1.0)),
    "reinforce++": partial(rloo.prepare, config=GLOBAL),
    "reinforce++ baseline": partial(rloo.prepare, config=rloo.Config(baseline="both")),
    "distill": partial(distill.prepare, config=distill.Config()),
}
SLOW = ("reinforce++", "distill")  # whitened as the others are


@pytest.mark.parametrize("name", ["ppo", "reinforce++ baseline", *map(slow, SLOW)])
def test_equal_rewards_have_advantage_zero(name):
    """On one device, on several, and in blocks; advantages of other rewards are the same there."""
    mesh = sharding.make_mesh(4)
    prepare = WHITENED[name]
    mapped = jax.shard_map(
        partial(prepare, axis_name="data"), mesh=mesh, in_specs=P("data"), out_specs=P("data")
    )
    ways = [jax.jit(prepare), jax.jit(mapped), jax.jit(blocks.replicated(prepare, mesh, 4))]
    for score in (10.1, 100.1, 1.1):
        for way in ways:
            assert_array_equal(way(constant_rollout(score)).advantages, 0.0)
    draw = np.random.default_rng(1).normal(size=(2, ROWS, COLUMNS)).astype(np.float32)
    other = constant_rollout(1.0).replace(rewards=draw[0], values=draw[1])
    one, *others = (way(other).advantages for way in ways)
    assert np.abs(one).max() > 1
    for found in others:
        assert_allclose(found, one, rtol=1e-4, atol=1e-5)


def test_statistics_of_equal_numbers():
    mask = np.arange(31) < np.arange(ROWS)[:, None]  # the first row is empty

    @jax.jit
    def statistics(x):
        deviations = (ops.masked_var(x, mask), ops.masked_var(x, mask, axis=1))
        nothing = ops.centred(x, np.zeros_like(mask), axis=1)
        zeros = (*deviations, ops.whiten(x, mask), functions.deviation(x), *nothing)
        uncertain = functions.combined("uncertainty", x, coef=1e9)
        return zeros, ops.whiten(x, mask, shift_mean=False), uncertain

    for number in (10.1, 1 / 3, -123456.7):
        x = np.full((ROWS, 31), number, np.float32)
        zeros, kept, uncertain = statistics(x)
        for found in zeros:
            assert_array_equal(found, 0.0)
        assert_array_equal(kept, np.where(mask, x, 0.0))
        assert_allclose(uncertain, x[0], rtol=1e-6)


def test_whitening_over_devices_is_that_of_all_rows():
    """Each device has another smallest number."""
    x = np.arange(24.0, dtype=np.float32).reshape(8, 3)
    mask = x != 7.0
    whiten = partial(ops.whiten, axis_name="data")
    mapped = jax.shard_map(
        whiten, mesh=sharding.make_mesh(4), in_specs=P("data"), out_specs=P("data")
    )
    expected = np.where(mask, (x - x[mask].mean()) / x[mask].std(), 0.0)
    for way in (ops.whiten, mapped):
        assert_allclose(jax.jit(way)(x, mask), expected, rtol=1e-5, atol=1e-6)


def test_whitening_has_the_gradient_of_its_formula():
    """The number that is subtracted first changes no gradient."""

    def plain(x):
        white = (x - jnp.mean(x)) * jax.lax.rsqrt(jnp.var(x) + 1e-8)
        return jnp.sum(white**3)

    def ours(x):
        return jnp.sum(ops.whiten(x, jnp.ones_like(x)) ** 3)

    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    found, expected = jax.jit(lambda x: [jax.grad(f)(x) for f in (ours, plain)])(x)
    assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_a_correlation_far_from_zero():
    """Scores that differ by little beside their size."""
    x = (4096.0 + np.arange(99) / 64).astype(np.float32)
    y = np.arange(99, dtype=np.float32)
    correlation = jax.jit(iteration._correlation)
    for sign in (1, -1):
        assert_allclose(correlation(x, sign * y, y < 90), sign, rtol=1e-5)


def test_equal_scores_are_not_normalised(capsys):
    """Of 49 equal numbers the deviation in floating point is not 0."""
    params = {"score": {"gain": jnp.float32(2.0), "shift": jnp.float32(1.0)}}
    tokens = np.zeros((49, 4), np.int32)
    scores = np.full((49, 1), 0.1)
    assert scores.std() > 0
    found = normalization.normalize(lambda params, batch: scores, params, tokens, tokens)
    assert found is params
    assert "all 49 samples" in capsys.readouterr().out


# --- Columns, sums and maxima


@flax.struct.dataclass
class Own(Rollout):
    """A rollout with a user's own fields."""

    features: jax.Array | None = None  # [B, C]
    undeclared: jax.Array | None = None  # [B, T] or [B, C] of the same width
    costs: jax.Array | None = flax.struct.field(metadata=PER_TOKEN, default=None)  # [B, T, K]


def own_rollout(undeclared):
    lengths = 8 * np.arange(1, 17)[:, None]
    mask = ((np.arange(131) >= 3) & (np.arange(131) < 3 + lengths)).astype(np.int32)
    draw = np.random.default_rng(0).normal
    return Own(
        *(mask, mask, mask, draw(size=mask.shape).astype(np.float32)),
        prompt_length=3,
        features=draw(size=(16, 150)).astype(np.float32),
        costs=draw(size=(16, 131, 2)).astype(np.float32),
        undeclared=draw(size=(16, 131)).astype(np.float32) if undeclared else None,
    )


@pytest.mark.parametrize("undeclared", [False, True])
def test_only_columns_of_tokens_are_cut(undeclared):
    def squares(part, xp):
        """Of the rows, at a parameter of 1."""
        paid = xp.sum(xp.where(part.mask[..., None], part.costs, 0.0), axis=(1, 2))
        weight = xp.sum(part.features**2, axis=1)
        if undeclared:
            weight += xp.sum(part.undeclared**2, axis=1)
        return paid**2 * weight

    def loss(params, part):
        loss = Mean.of(params["w"] ** 2 * squares(part, jnp))
        return loss, {"columns": Mean.of(part.tokens.shape[1])}

    state = TrainState.create({"w": jnp.float32(0.5)}, SGD)
    batch = own_rollout(undeclared)
    how = {"optimizer": SGD, "num_microbatches": 4, "by_length": can_cut(batch)}
    cut, found = jax.jit(partial(gradient_step, loss, **how))(state, batch=batch)
    mean = squares(batch, np).mean()
    assert_allclose(found["loss"], 0.25 * mean, rtol=1e-5)
    assert_allclose(cut.params["w"], 0.5 - mean, rtol=1e-5)
    assert found["columns"] == (131 if undeclared else (35 + 67 + 131 + 131) / 4)


def test_the_maximum_of_minibatches_is_a_maximum():
    """Of 0 to 7 in four minibatches of two microbatches, whatever its name."""

    def loss(params, part):
        return Mean.of(params["w"] * part), {"highest": Max(jnp.max(part)), "x_max": Mean.of(part)}

    def step(state, part, key):
        return gradient_step(loss, state, SGD, batch=part, num_microbatches=2)

    state = TrainState.create({"w": jnp.float32(0.0)}, SGD)
    count = {"num_epochs": 2, "num_minibatches": 4}
    run = jax.jit(partial(minibatch_epochs, step, **count))
    _, metrics = run(state, np.arange(8, dtype=np.float32), KEY)
    assert {name: float(metrics[name]) for name in ("highest", "x_max")} == {
        "highest": 7.0,
        "x_max": 3.5,
    }
    assert isinstance(metrics["highest"], jax.Array)


def test_a_sum_of_two_losses_is_a_tuple():
    """2.5 is the mean over the entries of both."""
    one = Mean(np.float32(18.0), np.float32(4.0))
    other = Mean(np.float32(20.0), np.float32(4.0))
    state = TrainState.create({"w": jnp.float32(1.0)}, SGD)
    step = partial(gradient_step, lambda params: ((one, 0.1 * other), {}), optimizer=SGD)
    assert jax.jit(step)(state)[1]["loss"] == 5.0
    with pytest.raises(TypeError, match="tuple of Means"):
        gradient_step(lambda params: (one + 0.1 * other, {}), state, SGD)


# --- Functions that do not fit the samples

SIZES = {"vocab_size": 13, "max_length": 16, "hidden_size": 8, "num_layers": 1, "num_heads": 1}
MODEL = models.build(models.GPT2Config(**SIZES))
PROMPTS = np.full((2, 4), 3)
HALF = sampling.SamplingConfig(max_new_tokens=3, temperature=0.5, eos_id=None, pad_id=0)
MADE = {
    "longer prompts": (models.policy_fn(MODEL, 0.5, prompt_length=6), "prompt_length 6.* 4 slots"),
    "hotter": (models.policy_fn(MODEL, prompt_length=4), "temperature 1.0, .*sampled at 0.5"),
    "a table": (ops.policy_fn(MODEL.apply), "temperature 1.0"),
}
WRAPPED = {
    "as it is": lambda fn, params: fn,
    "jitted": lambda fn, params: jax.jit(fn),
    "by rows": lambda fn, params: ops.by_rows(fn, 1),
    "bound": lambda fn, params: models.lora.bind(fn, params),
}


@pytest.fixture(scope="module")
def sampled():
    params = initial_params(MODEL)
    generate = jax.jit(partial(sampling.generate, MODEL, config=HALF))
    return params, generate(params, PROMPTS, np.ones_like(PROMPTS), KEY)


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_a_policy_function_that_does_not_fit_the_samples_is_refused(made, wrapped, sampled):
    fn, message = MADE[made]
    params, drawn = sampled
    fn = WRAPPED[wrapped](fn, params)
    fits = models.policy_fn(MODEL, 0.5, prompt_length=4)
    batch = drawn.replace(advantages=drawn.log_probs)
    rescore = partial(rollout.rescore, params=params)
    loss = partial(grpo.loss, params, key=None, config=grpo.Config())
    for use, name, given in (
        (rescore, "policy_fn", {"policy_fn": fn}),
        (rescore, "ref_fn", {"policy_fn": fits, "ref_fn": Partial(fn, params)}),
        (loss, "policy_fn", {"policy_fn": fn}),
    ):
        with pytest.raises(ValueError, match=f"{name} has {message}"):
            jax.eval_shape(partial(use, **given), rollout=batch)


def test_a_policy_function_that_fits_or_is_unknown_is_used(sampled):
    params, drawn = sampled
    exact = models.policy_fn(MODEL, 0.5, prompt_length=4)
    fits = (exact, models.policy_fn(MODEL, 0.5), lambda *inputs: exact(*inputs))

    @jax.jit
    def gaps(drawn):
        known = [rollout.rescore(drawn, params, policy_fn=fn) for fn in fits]
        return [rollout.sampler_gap(drawn, each) for each in known]

    assert max(gaps(drawn)) < 1e-5
    greedy = drawn.replace(temperature=0.0)
    hotter = partial(rollout.rescore, params=params, policy_fn=models.policy_fn(MODEL))
    jax.eval_shape(hotter, greedy)


def test_a_rollout_that_a_jit_closes_over_is_checked_and_used(sampled):
    """Its mask is a constant there."""
    params, drawn = sampled
    unknown = drawn.replace(prompt_length=None)
    fits = models.policy_fn(MODEL, 0.5, prompt_length=4)
    again = jax.jit(lambda params: rollout.rescore(unknown, params, policy_fn=fits))(params)
    assert_allclose(again.log_probs, drawn.log_probs, atol=1e-5)
    longer = models.policy_fn(MODEL, 0.5, prompt_length=6)
    with pytest.raises(ValueError, match="prompt_length 6"):
        jax.jit(lambda params: rollout.rescore(unknown, params, policy_fn=longer))(params)


def test_samples_of_an_engine_may_know_their_temperature():
    made = rollout.from_text(
        *([[3]], [[4, 5]], characters("abcdefghijk")),
        log_probs=[[-1.0, -1.0]],
        temperature=0.5,
    )
    with pytest.raises(ValueError, match=r"temperature 1\.0, .*sampled at 0\.5"):
        rollout.rescore(made, initial_params(MODEL), policy_fn=models.policy_fn(MODEL))


def test_a_rollout_that_does_not_know_its_prompts_shows_them_by_its_mask(sampled):
    params, drawn = sampled
    unknown = drawn.replace(prompt_length=None)
    with pytest.raises(ValueError, match="prompt_length 6, so it computes no log-probability"):
        rollout.rescore(unknown, params, policy_fn=models.policy_fn(MODEL, 0.5, prompt_length=6))
    fits = models.policy_fn(MODEL, 0.5, prompt_length=4)
    jax.eval_shape(lambda: rollout.rescore(unknown, params, policy_fn=fits))


def test_a_rollout_whose_responses_begin_before_its_prompt_ends_is_not_scored(sampled):
    """Columns in front were dropped, and the prompt's number of slots was kept."""
    params, drawn = sampled
    trimmed = map_columns(lambda x: x[:, 1:], drawn)
    for fn in (models.policy_fn(MODEL, 0.5), models.policy_fn(MODEL, 0.5, prompt_length=3)):
        with pytest.raises(ValueError, match="prompt_length 4, and a response that begins before"):
            rollout.rescore(trimmed, params, policy_fn=fn)
        rescore = partial(rollout.rescore, policy_fn=fn)
        jax.eval_shape(rescore, trimmed.replace(prompt_length=3), params)


def test_an_id_outside_the_vocabulary_has_no_log_probability_and_no_gradient():
    @jax.jit
    @jax.value_and_grad
    def total(logits, tokens):
        return jnp.sum(ops.token_log_probs(logits, tokens))

    for pad in (13, 400, -100):
        value, gradient = total(np.zeros((1, 3, 13), np.float32), np.array([[1, 2, pad]]))
        assert_allclose(value, -np.log(13.0), rtol=1e-6)  # of the 2 alone
        assert np.all(np.isfinite(gradient))
        assert_array_equal(np.asarray(gradient)[0, 1:], 0.0)


# --- Batches that an update would misread


def answers_of(prompts, **fields):
    """Rows of a prompt, whose pads are 0, two tokens of response and a pad, with scores alone."""
    prompts = np.asarray(prompts)
    tokens = np.pad(prompts, ((0, 0), (0, 3)), constant_values=3)
    column = np.arange(tokens.shape[1]) - prompts.shape[1]
    said = np.broadcast_to((column == 0) | (column == 1), tokens.shape).astype(np.int32)
    real = said | np.pad(prompts != 0, ((0, 0), (0, 3)))
    scores = np.arange(len(tokens), dtype=np.float32)
    zeros = np.zeros(tokens.shape, np.float32)
    return Rollout(tokens, real, said, zeros, scores=scores, **fields)


def updated(module, batch, **settings):
    config = module.Config(**settings)
    state = getattr(module, "State", TrainState).create(policy_params(0), SGD)
    how = {"policy_fn": policy_fn, "optimizer": SGD, "config": config}
    return module.update(state, batch, KEY, **how)


PAIRS = answers_of([[0, 1], [0, 1], [2, 4], [2, 4]])
SCORES_ALONE = {"group_size": 2, "kl_loss_coef": 0.0}
MISREAD = {
    "another prompt": (answers_of([[0, 1], [0, 2], [2, 4], [2, 4]]), "row 1: its prompt"),
    "another pad": (answers_of([[0, 1], [0, 1], [2, 4], [0, 4]]), "row 3: its prompt"),
    "larger groups": (PAIRS.replace(group_ids=np.zeros(4, int)), "row 0: group_size 2"),
    "other groups": (PAIRS.replace(group_ids=np.array([5, 5, 1, 2])), "row 2: group_size 2"),
    "pads": (PAIRS.replace(response_mask=np.ones((4, 5), int)), "row 0: response_mask"),
    "one pad": (
        PAIRS.replace(response_mask=PAIRS.response_mask + np.outer([0, 0, 0, 1], [0, 0, 0, 0, 1])),
        "row 3: response_mask",
    ),
    "prompts": (PAIRS.replace(prompt_length=3), "row 0: response_mask"),
}
READ = {
    "groups by any number": PAIRS.replace(group_ids=np.array([7, 7, 0, 0])),
    "a missing row": answers_of([[0, 1], [0, 1], [3, 3], [2, 4]]).replace(
        response_mask=PAIRS.response_mask * np.array([[1], [1], [0], [1]])
    ),
    "a missing row of any group": PAIRS.replace(
        response_mask=PAIRS.response_mask * np.array([[1], [1], [0], [1]]),
        group_ids=np.array([5, 5, 5, 1]),
    ),
    "pads of any id": PAIRS.replace(tokens=PAIRS.tokens + np.outer([0, 9, 0, 0], [1, 0, 0, 0, 0])),
    "prompts that are known": PAIRS.replace(prompt_length=2),
}


@pytest.mark.parametrize("made", MISREAD)
def test_a_rollout_that_an_update_would_misread_is_refused_where_it_is_known(made):
    batch, says = MISREAD[made]
    update = partial(updated, grpo, **SCORES_ALONE)
    with pytest.raises(ValueError, match=f"^rollout, {says}") as refused:
        update(batch)
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match=says):  # a constant of a jit
        jax.eval_shape(lambda: update(batch))
    jax.eval_shape(update, batch)  # traced: nothing is known


@pytest.mark.parametrize("made", READ)
def test_a_rollout_that_an_update_reads_is_used(made):
    jax.eval_shape(lambda: updated(grpo, READ[made], **SCORES_ALONE))


def test_rows_that_are_not_compared_may_have_any_prompt_and_group():
    batch, _ = MISREAD["another prompt"]
    batch = batch.replace(group_ids=np.zeros(4, int))
    jax.eval_shape(lambda: updated(rloo, batch, baseline="batch", group_size=1))


@pytest.mark.parametrize("module", [rloo, grpo, maxrl, distill])
def test_a_reference_from_which_nothing_is_learned_is_refused(module):
    """In the reward or in the loss; of VPG it may be for a metric."""
    with_reference = PAIRS.replace(ref_log_probs=PAIRS.log_probs)
    update = partial(updated, module, group_size=2)
    with pytest.raises(ValueError, match="no KL is learned from: set kl_loss_coef"):
        jax.eval_shape(partial(update, kl_loss_coef=0.0), with_reference)


def test_a_reference_from_which_something_is_learned_is_used():
    """Also by an algorithm of one's own, of which no more is known."""

    def prepare(batch, *, config, axis_name=None):
        return grpo.prepare(batch, config=config)

    def loss(*args, **named):
        return grpo.loss(*args, **named)

    own_prepare = SimpleNamespace(Config=grpo.Config, update=policy.updater(prepare, grpo.loss))
    own_loss = SimpleNamespace(Config=grpo.Config, update=policy.updater(grpo.prepare, loss))
    with_reference = PAIRS.replace(ref_log_probs=PAIRS.log_probs)
    shaped = with_reference.replace(rewards=PAIRS.log_probs)
    for module, batch, settings in (
        (grpo, with_reference, {"group_size": 2}),
        (grpo, shaped, SCORES_ALONE),
        (vpg, with_reference, {}),
        (own_loss, with_reference, SCORES_ALONE),
        (own_prepare, with_reference, SCORES_ALONE),
    ):
        jax.eval_shape(partial(updated, module, **settings), batch)


def test_importance_weights_are_those_of_what_sampled_however_often_rows_are_scored():
    """Sampled at log-prob -1, scored by policies at -1/2, -1/4 and -2."""
    given = PAIRS.replace(log_probs=-1.0 * PAIRS.response_mask)
    at = lambda params, tokens, *_: PolicyOutput(params * jnp.ones(tokens.shape), None)  # noqa: E731
    policy = policies.Policy(at)
    once = rollout.rescore(given, -0.5, policy_fn=policy)
    for value in (-0.25, -2.0):
        scored = rollout.rescore(once, value, policy_fn=policy, importance_cap=10.0)
        assert_allclose(scored.importance_weights, np.exp(value + 1.0) * given.response_mask)
        assert_array_equal(scored.log_probs, value * given.response_mask)
        assert_array_equal(scored.sampler_log_probs, given.log_probs)
    assert map_columns(lambda x: x[:, :3], scored).sampler_log_probs.shape == (4, 3)


def test_labels_that_a_loss_does_not_read_are_refused():
    """The margin of DPO, under jit too, and places of the best that are none."""
    pairs = comparisons(0, 3, 2).replace(ref_log_probs=jnp.zeros((3, 2)))
    two, four = policy_params(0), {"scores": jnp.arange(5.0)}
    by_dpo = partial(dpo.loss, two, key=None, policy_fn=policy_fn, config=dpo.Config())
    scored = {"score_fn": score_fn, "config": reward_model.Config()}
    by_scores = partial(reward_model.loss, four, key=None, **scored)
    with pytest.raises(ValueError, match=r"margin .*leave it out"):
        jax.eval_shape(by_dpo, pairs.replace(margin=jnp.ones(3)))
    of_four = comparisons(0, 3, 4)
    for loss, batch, last in ((by_dpo, pairs, 1), (by_scores, pairs, 1), (by_scores, of_four, 3)):
        loss(batch.replace(best=np.array([0, last, 0])))
        for wrong in (-1, last + 1):
            with pytest.raises(ValueError, match=f"from 0 to {last}, got .*{wrong}"):
                loss(batch.replace(best=np.array([0, wrong, 0])))
            missing = batch.response_mask.at[1].set(0)
            loss(batch.replace(best=np.array([0, wrong, 0]), response_mask=missing))
    one_missing = of_four.replace(response_mask=of_four.response_mask.at[1, 2].set(0))
    with pytest.raises(ValueError, match="from 0 to 3, got 4"):
        by_scores(one_missing.replace(best=np.array([0, 4, 0])))


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_a_mixture_has_a_weight_from_0_to_1(weight):
    with pytest.raises(ValueError, match="mixture's weight must be at"):
        sampling.mixture(MODEL, weight)
    assert sampling.mixture(MODEL, 1.0) == sampling.mixture(MODEL, 1.0)


def test_rows_of_a_mapped_axis_need_its_name():
    """Where each device has a run of its own, its parameters vary too."""
    mesh = sharding.make_mesh(2, fsdp=2, devices=jax.devices()[:4])
    loss = lambda params, part: (Mean.of(params[0] * part[:, 0]), {})  # noqa: E731

    def step(state, part, axis_name):
        return gradient_step(loss, state, SGD, batch=part, axis_name=axis_name)[0].params

    def mapped(axis_name, axes, of_params):
        state = TrainState.create(jnp.zeros(4), SGD)
        specs = TrainState(P(), of_params, SGD.init(None))
        part = partial(step, axis_name=axis_name)
        own = jax.shard_map(part, mesh=mesh, in_specs=(specs, P(axes)), out_specs=of_params)
        return jax.eval_shape(own, state, jnp.ones((8, 4)))

    both = ("data", "fsdp")
    mapped("data", "data", P())
    mapped(both, both, P())
    mapped(None, "data", P("data"))
    for named, axes, unnamed in ((None, "data", "data"), ("data", both, "fsdp")):
        with pytest.raises(
            ValueError, match=rf"mapped over {unnamed}: give .*{unnamed} as axis_name"
        ):
            mapped(named, axes, P())


# --- Names that went


def test_a_name_that_went_says_what_took_its_place():
    with pytest.raises(AttributeError, match=r"removed: they are in rollout\.extras"):
        PAIRS.components  # noqa: B018
    with pytest.raises(
        AttributeError, match=r"'of_rows'; it was removed: policy\.loss reads Config\.rat"
    ):
        policy.of_rows  # noqa: B018
    with pytest.raises(AttributeError, match=r"no attribute 'of_row'$"):
        policy.of_row  # noqa: B018

    @dataclass(frozen=True)
    class Old(rloo.Config):
        needs_components: bool = True

    for use in (
        lambda: rloo.update(None, PAIRS, KEY, policy_fn=None, optimizer=SGD, config=Old()),
        lambda: for_algorithm(RunConfig(), SimpleNamespace(__name__="old", Config=Old), Old()),
    ):
        with pytest.raises(UserError, match=r"Config\.needs_components .*Config\.extras says"):
            use()


# --- Arguments in one order


def test_scores_are_followed_by_their_mask():
    scores = np.array([[1.0, 2.0, 3.0, 9.0]], np.float32)
    mask = np.array([[1, 1, 1, 0]])

    @jax.jit
    def estimates(scores, mask):
        normalized = advantages.group_normalized(scores, mask, eps=0.0)
        moved, _ = advantages.ema_baseline(0.0, scores[0], mask[0], decay=0.5)
        return normalized, advantages.leave_one_out(scores, mask), moved

    normalized, left_out, moved = estimates(scores, mask)
    assert_allclose(normalized, [[-1, 0, 1, 0]], atol=1e-6)
    assert_allclose(left_out, [[-1.5, 0, 1.5, 0]], atol=1e-6)
    assert moved == 1.0
    with pytest.raises(TypeError):
        advantages.group_normalized(scores, None, 1e-4)
    with pytest.raises(AssertionError, match="shapes"):
        advantages.group_normalized(scores, 1e-4)  # eps, where the mask stands
    with pytest.raises(AssertionError, match="shapes"):
        advantages.ema_baseline(0.0, scores[0], 0.9)


def test_surrogates_take_log_ratios_and_advantages():
    """At equal log-probs each has the gradient -A, and nothing is clipped."""
    old = np.array([[-1.0, -2.0]], np.float32)
    advantage = np.array([[3.0, -4.0]], np.float32)
    surrogates = {
        "clip": lambda now, ratio, advantage: losses.clip(ratio, advantage),
        "cispo": lambda now, ratio, advantage: losses.cispo(
            ratio, advantage, log_probs=now, clip_low=0.2, clip_high=0.2
        ),
        "sapo": lambda now, ratio, advantage: losses.sapo(ratio, advantage),
        "vespo": lambda now, ratio, advantage: losses.vespo(ratio, advantage, log_probs=now),
    }

    @jax.jit
    def found(now, old, advantage):
        """By each: the loss, by itself and chosen by its name, what is clipped, and the slope."""
        each = {}
        for kind, of_ratio in surrogates.items():
            loss, clipped = of_ratio(now, now - old, advantage)
            slope = jax.grad(lambda now, of=of_ratio: of(now, now - old, advantage)[0].sum())(now)
            chosen, also = losses.surrogate(kind, now, advantage, log_ratio=now - old)
            each[kind] = (loss, clipped), (chosen, also), slope
        return each, losses.clipped_surrogate(now, old, advantage)

    each, _ = found(old, old, advantage)
    for (_, clipped), _, slope in each.values():
        assert_allclose(slope, -advantage, rtol=1e-6)
        assert not np.any(clipped)
    each, clipped_surrogate = found(old, old - np.log(np.float32(2.0)), advantage)
    # sapo: sigmoid(1) leaves 0.79 of the gradient. vespo: 2^2 exp(-3) = 0.2 of the first token's,
    # 2^3 exp(-2) = 1.1 of the second's.
    half = [[True, False]]
    expected = {"clip": half, "cispo": [[True, True]], "sapo": [[False, False]], "vespo": half}
    for kind, ((loss, clipped), (chosen, also), _) in each.items():
        assert_allclose(chosen, loss, rtol=1e-6)
        assert_array_equal(also, clipped)
        assert_array_equal(clipped, expected[kind])
    assert_allclose(clipped_surrogate, each["clip"][0][0], rtol=1e-6)
    cispo = jax.jit(losses.cispo)
    ratio = np.full_like(old, np.log(2.0))
    assert_allclose(cispo(ratio, advantage, log_probs=old)[0], -2.0 * advantage * old, rtol=1e-6)
    bounded, clipped = cispo(ratio, advantage, log_probs=old, clip_high=0.5)
    assert_allclose(bounded, -1.5 * advantage * old, rtol=1e-6)
    assert np.all(clipped)
    for call in (
        lambda: losses.clip(old, advantage, 0.2),
        lambda: losses.cispo(old, old, advantage),
        lambda: losses.sapo(old, advantage, (1.0, 1.0)),
        lambda: losses.surrogate("clip", old, old, advantage),
        lambda: losses.vespo(old, old, advantage),
    ):
        with pytest.raises(TypeError):
            call()


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [("token", (2.0 * 0.5 + 0.5 * 4.5) / 2), ("sequence", (0.5 + 4.5) / 2)],
)
def test_the_kl_of_a_token_has_the_ratio_of_the_policy_loss(ratio, expected):
    """Ratios 2 and 1/2 of two tokens, and 1 of their row."""
    fn = ops.policy_fn(lambda params, tokens, *_: jnp.zeros((*tokens.shape, 4)))
    log_prob = -np.log(4.0)
    at = np.array([[0, 0, 1, 1]])
    old = np.array([[0, 0, log_prob - np.log(2.0), log_prob + np.log(2.0)]], np.float32)
    reference = np.array([[0, 0, log_prob - 1.0, log_prob - 3.0]], np.float32)
    batch = Rollout(np.zeros((1, 4), int), at, at, old, ref_log_probs=reference)
    batch = batch.replace(advantages=np.zeros((1, 4), np.float32))
    config = grpo.Config(ratio=ratio, kl_loss_coef=1.0, kl_loss_estimator="k2")
    loss, metrics = jax.jit(partial(grpo.loss, policy_fn=fn, config=config))({}, batch, None)
    assert_allclose(metrics["policy/kl_loss"].value, expected, rtol=1e-6)
    assert_allclose(loss.value, expected, rtol=1e-6)


# --- What was given and not used


def test_scores_beside_rewards_are_not_shaped():
    batch = constant_rollout(1.0)
    both = batch.replace(scores=np.full(ROWS, 4.7, np.float32))
    with pytest.raises(ValueError, match=r"got both.*rewards=None.*scores=None"):
        rewards.kl_shaped(both, 0.0)
    shaped = np.asarray(shaped_at_end(both.replace(rewards=None)))
    assert_allclose(shaped.sum(axis=1), 4.7, rtol=1e-6)
    assert_allclose(shaped_at_end(batch), batch.rewards)


@pytest.mark.parametrize("module", [ppo, rloo, grpo, distill])
def test_given_advantages_are_refused_where_they_would_be_ignored(module):
    batch = tabular_rollout(0, [4] * 8)
    config = module.Config(group_size=4) if module in (rloo, grpo) else module.Config()
    with pytest.raises(ValueError, match=r"advantages is given.*advantages=None"):
        module.prepare(batch, config=config)
    prepare = partial(module.prepare, config=config)
    made = jax.eval_shape(prepare, batch.replace(advantages=None))
    assert made.advantages.shape == batch.tokens.shape


def test_vpg_uses_given_advantages():
    batch = tabular_rollout(0, [4] * 8)
    assert vpg.prepare(batch, config=vpg.Config()) is batch


def test_feedback_of_one_row_has_no_reference_point():
    tokens = np.ones((1, 4), np.int32)
    feedback = Feedback(tokens, tokens, tokens, desirable=np.ones(1, bool))
    with pytest.raises(ValueError, match="at least 2 rows"):
        kto.with_reference(feedback, Partial(policy_fn, policy_params(0)))


def test_a_second_adapter_of_a_kernel_is_refused():
    params = initial_params(MODEL)
    first = models.lora.init(KEY, params, rank=2, match="attn")
    attached = models.lora.attach(params, first)
    for join in (models.lora.attach, models.lora.merge):
        with pytest.raises(ValueError, match=r"attn/c_attn has an adapter already.*lora\.merge"):
            join(attached, first)
    other = models.lora.init(KEY, params, rank=2, match="mlp")
    both = models.lora.attach(attached, other)
    assert {"lora_a", "lora_b"} <= both["h_0"]["mlp"]["c_fc"].keys() & set(
        both["h_0"]["attn"]["c_attn"]
    )
