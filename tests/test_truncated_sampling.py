"""Truncated sampling: rollouts say among which ids each token was drawn, and every log-prob of an
update is one among these ids.
"""

import importlib
import inspect
import itertools
import pkgutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import scipy.stats
from builders import (
    CONFIG,
    goes_on_alike,
    letters_run,
    metric_rows,
    run_grpo,
    slow,
    soak,
    with_rl,
)
from jax.tree_util import Partial
from numpy.testing import assert_allclose, assert_array_equal
from tabular import assert_close

from rlhf_jax import algorithms, losses, models, ops, policies, rewards, rollout, sampling
from rlhf_jax.algorithms import grpo, rloo
from rlhf_jax.config import Compute, RLStage
from rlhf_jax.data import chat, encoding
from rlhf_jax.data.rows import Row
from rlhf_jax.data.tokenizers import characters
from rlhf_jax.errors import UserError
from rlhf_jax.generation import stops
from rlhf_jax.generation.environment import Environment, converse
from rlhf_jax.models import heads
from rlhf_jax.training.common import initial
from rlhf_jax.training.rl import teacher
from rlhf_jax.types import Rollout, TrainState

KEY = jax.random.key(3)
KINDS = [{"top_k": 4}, {"top_p": 0.7}, {"top_k": 6, "top_p": 0.9, "min_p": 0.3}]
GROUP = 2
P = 3


def how(new=4, temperature=0.8, **options):
    given = {"temperature": temperature, "eos_id": 1, "pad_id": 0, **options}
    return sampling.SamplingConfig(new, **given)


def bigrams(params, tokens, attention_mask, key):
    """Logits [B, T, V] from the token before alone."""
    return params[tokens]


PROMPTS = np.repeat(np.random.default_rng(5).integers(2, 13, (4, P)), GROUP, axis=0)
MASK = np.repeat([[1, 1, 1], [0, 1, 1], [1, 1, 1], [0, 0, 0]], GROUP, axis=0)
TABLE = jnp.asarray(np.random.default_rng(0).normal(size=(13, 13)), jnp.float32)
TABLE_FN = ops.policy_fn(bigrams, 0.8)
generate = jax.jit(sampling.generate, static_argnames=("model", "config"))


def draw(*inputs, config):
    """A rollout of NumPy arrays."""
    return jax.tree.map(np.asarray, generate(*inputs, config=config))


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: "+".join(kind))
def drawn(request):
    """Of each kind of truncation: its settings, and a rollout."""
    config = how(**request.param, record_support=True)
    made = draw(sampling.uncached(bigrams), TABLE, PROMPTS, MASK, KEY, config=config)
    return config, made


def test_the_support_is_what_the_sampler_left(drawn):
    config, made = drawn
    logits = np.asarray(TABLE)[made.tokens[:, :-1]] / np.float32(0.8)  # of columns 1 to T - 1
    options = {"top_k": config.top_k, "top_p": config.top_p, "min_p": config.min_p}
    left = jax.jit(partial(sampling.decoding.truncate, **options))(logits.reshape(-1, 13))
    left = np.asarray(left, np.float64).reshape(logits.shape)
    assert made.support.shape == (8, P + 4, config.top_k or 13)
    said = made.mask
    assert (made.support[~said] == -1).all()
    sizes = set()
    for row, column in zip(*np.nonzero(said), strict=True):
        support = made.support[row, column]
        own = left[row, column - 1]
        expected = np.argsort(-own, kind="stable")[: np.isfinite(own).sum()]
        assert_array_equal(support[: len(expected)], expected)
        assert (support[len(expected) :] == -1).all()
        log_prob = scipy.special.log_softmax(own)[made.tokens[row, column]]
        assert_allclose(made.log_probs[row, column], log_prob, atol=1e-5)
        sizes.add(len(expected))
    assert max(sizes) > 1


LIKELY_END = np.where(np.arange(13) == 1, np.float32(9.0), TABLE)


def test_a_response_has_its_fewest_tokens_and_log_probs_without_eos():
    """EOS is by far the likeliest token, at all slots but the first two: there the distribution is
    the softmax of the other twelve tokens."""
    table = LIKELY_END
    config = how(min_new_tokens=2, record_support=True)
    made = draw(sampling.uncached(bigrams), table, PROMPTS, MASK, KEY, config=config)
    present = MASK.any(axis=1)
    tokens = made.tokens[present]
    assert (tokens[:, P : P + 2] != 1).all()
    assert np.mean(tokens[:, P + 2] == 1) > 0.9
    support = made.support[present]
    assert not (support[:, P : P + 2] == 1).any()
    assert (support[:, P : P + 2] >= 0).sum(axis=2).tolist() == [[12, 12]] * len(tokens)
    assert ((support[:, P + 2] == 1).sum(axis=1) == 1).all()
    logits = np.asarray(table, np.float64)[tokens[:, P - 1]] / 0.8
    without = np.delete(logits, 1, axis=1)
    chosen = np.take_along_axis(logits, tokens[:, P : P + 1], axis=1)[:, 0]
    expected = chosen - scipy.special.logsumexp(without, axis=1)
    assert_allclose(made.log_probs[present, P], expected, rtol=1e-4)
    rescored = jax.jit(partial(rollout.rescore, policy_fn=TABLE_FN))(made, table)
    assert_allclose(rescored.log_probs, made.log_probs, atol=1e-5)


def test_the_likeliest_response_has_its_fewest_tokens_too():
    present = MASK.any(axis=1)
    greedy = how(min_new_tokens=2, temperature=0.0)
    likeliest = draw(sampling.uncached(bigrams), LIKELY_END, PROMPTS, MASK, KEY, config=greedy)
    mask = likeliest.response_mask[present]
    assert (mask.sum(axis=1) == 3).all()


def test_settings_of_a_shortest_response():
    for wrong in ({"environment": "e.py:f"}, {"max_new_tokens": 1}):
        with pytest.raises(ValueError, match="min_new_tokens"):
            RLStage(min_new_tokens=2, **wrong)
    settings = RLStage(min_new_tokens=2, top_k=5)
    assert initial.recorded(initial.drawn(settings, 1, 0), 5000).min_new_tokens == 2
    with pytest.raises(UserError, match="top_k must be at most 1024"):
        initial.recorded(initial.drawn(replace(settings, top_k=None), 1, 0), 5000)


def test_a_record_changes_no_token():
    inputs = (sampling.uncached(bigrams), TABLE, PROMPTS, MASK, KEY)
    plain = draw(*inputs, config=how(top_k=4))
    recorded = draw(*inputs, config=how(top_k=4, record_support=True))
    assert_array_equal(plain.tokens, recorded.tokens)
    assert plain.support is None
    assert plain.truncated


def test_equals_at_the_border_are_k_in_all():
    config = how(1, top_k=2, record_support=True)
    table = np.zeros((13, 13), np.float32)
    made = draw(sampling.uncached(bigrams), table, PROMPTS, MASK, KEY, config=config)
    assert_array_equal(made.support[:6, P], [[0, 1]] * 6)
    assert set(made.tokens[:6, P].tolist()) <= {0, 1}
    assert_allclose(made.log_probs[:6, P], np.log(0.5), rtol=1e-6)


def update_of(policy_fn, params, scored):
    """Metrics of a step of GRPO with a KL term in two microbatches."""
    scored = replace(scored, scores=np.arange(8, dtype=np.float32) % 3)
    config = grpo.Config(group_size=GROUP, num_microbatches=2, kl_loss_coef=0.1)
    optimizer = optax.sgd(1e-3)
    update = partial(grpo.update, policy_fn=policy_fn, optimizer=optimizer, config=config)
    _, metrics = jax.jit(update)(TrainState.create(params, optimizer), scored, KEY)
    return metrics


@pytest.mark.parametrize("drawn", KINDS[2:], indirect=True)
def test_a_first_step_has_the_ratio_one_in_chunks_of_logits_too(drawn, monkeypatch):
    """A network whose states are one-hot tokens, two columns of logits at a time."""
    monkeypatch.setattr(heads, "_logits_at_once", lambda size: 2 * 13)
    _, made = drawn

    def hidden(params, tokens, mask, key, columns):
        return jax.nn.one_hot(tokens, 13)[:, columns]

    def unembed(params, states):
        assert states.shape[1] == 2
        return states @ params["table"]

    params = {"table": TABLE}
    model = SimpleNamespace(config=CONFIG, hidden=hidden, unembed=unembed, values=None)
    policy_fn = models.policy_fn(model, 0.8, P)
    by_rows = ops.by_rows(policy_fn, 4, group_size=GROUP)
    rescore = partial(rollout.rescore, policy_fn=by_rows, ref_fn=Partial(policy_fn, params))
    scored = jax.tree.map(np.asarray, jax.jit(rescore)(made, params))
    assert np.abs(scored.log_probs - made.log_probs).max() < 1e-5
    metrics = update_of(policy_fn, params, scored)
    assert metrics["policy/ratio_max"] == pytest.approx(1, abs=1e-6)
    assert metrics["policy/approx_kl"] < 1e-12
    assert metrics["policy/kl_loss"] < 1e-12  # the policy is its own reference
    plain = jax.jit(partial(ops.evaluate, TABLE_FN))(TABLE, made)
    assert_allclose(np.where(made.mask, plain.log_probs, 0), made.log_probs, atol=1e-5)
    entropy = np.where(made.mask, plain.entropy, 0).sum() / 6
    assert metrics["objective/entropy"] == pytest.approx(entropy, rel=1e-5)


def test_a_teacher_is_compared_among_the_same_ids():
    """Of a smaller vocabulary, which the support leaves."""
    measure = partial(losses.divergence, kind="reverse_kl", beta=0.5)
    model = SimpleNamespace(unembed=lambda params, hidden: hidden)
    ours = np.random.default_rng(2).normal(size=(1, 3, 13))
    theirs = np.random.default_rng(3).normal(size=(1, 3, 11))
    targets = np.array([[2, 7, 5]])
    support = np.array([[[2, 12, 4], [7, -1, -1], [6, 5, 0]]])
    compare = jax.jit(partial(heads._compared, models.Teacher(model, measure), None, 0.5))
    compared = compare(np.float32(ours), targets, support, np.float32(theirs))
    for column, ids in enumerate(([2, 4], [7], [6, 5, 0])):
        p = scipy.special.softmax(ours[0, column, ids])
        q = scipy.special.softmax(theirs[0, column, ids] / 0.5)
        log_q = np.log(q[ids.index(targets[0, column])])
        assert_allclose(compared["teacher_log_probs"][0, column], log_q, atol=1e-6)
        kl = np.sum(p * np.log(p / q))
        assert_allclose(compared["divergence"][0, column], kl, atol=1e-6)


# --- A table of logits, one token a response


def bandit(params, tokens, attention_mask, key):
    return jnp.broadcast_to(params, (*tokens.shape, len(params)))


BANDIT = sampling.uncached(bandit)
BANDIT_FN = ops.policy_fn(bandit)


def by_hand(token, support):
    """A rollout of one row whose second column was drawn among the ids of the support."""
    columns = np.array([[0, token]])
    mask = np.array([[0, 1]])
    supports = np.array([[[-1] * len(support), support]])
    return Rollout(columns, np.ones_like(columns), mask, np.float32(0 * mask), support=supports)


def test_a_token_that_the_policy_moves_out_of_the_support():
    """Two likeliest of (.5, .3, .2), later (.1, .3, .6): then 0 is not among them, and its
    probability is still that among 0 and 1."""
    made = by_hand(0, [0, 1])

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def log_prob(logits):
        output = ops.evaluate(BANDIT_FN, logits, made)
        return output.log_probs[0, 1], output.entropy[0, 1]

    (before, _), _ = log_prob(np.log(np.array([0.5, 0.3, 0.2], np.float32)))
    assert_allclose(np.exp(before), 0.5 / 0.8, rtol=1e-6)
    later = np.log(np.array([0.1, 0.3, 0.6], np.float32))
    (after, entropy), gradient = log_prob(later)
    # .1 / .5 of the whole softmax
    assert_allclose(np.exp(after - before), (0.1 / 0.4) / (0.5 / 0.8), rtol=1e-6)
    assert_allclose(entropy, scipy.stats.entropy([0.25, 0.75]), rtol=1e-6)
    assert_allclose(gradient, [0.75, -0.75, 0.0], rtol=1e-6)
    config = how(1, 1.0, top_k=2, eos_id=None, record_support=True)
    prompts = np.zeros((64, 1), np.int32)
    fresh = draw(BANDIT, later, prompts, np.ones_like(prompts), KEY, config=config)
    assert_array_equal(fresh.support[:, 1], [[2, 1]] * 64)
    assert set(fresh.tokens[:, 1].tolist()) == {1, 2}


def test_the_optimum_among_the_likeliest():
    """The three likeliest of five, rewards (1, 0, 2) and 100 for what is never drawn, KL .5: pi =
    ref exp(r / .5), normalised among the three. The others' logits do not move."""
    ref = np.log(np.array([0.5, 0.3, 0.2, 1e-3, 1e-4], np.float32))
    values = jnp.array([1.0, 0.0, 2.0, 100.0, 100.0])
    prompts = np.zeros((1024, 1), np.int32)
    config = how(1, 1.0, top_k=3, eos_id=None, pad_id=9)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, 120))

    def iterate(state, key):
        made = rollout.collect(
            BANDIT, state.params, prompts, np.ones_like(prompts), key,
            sampling=config, policy_fn=BANDIT_FN, ref_fn=Partial(BANDIT_FN, ref),
        )  # fmt: skip
        scored = replace(made, scores=values[made.tokens[:, 1]])
        shaped = replace(scored, rewards=rewards.kl_shaped(scored, 0.5))
        settings = rloo.Config(group_size=4)
        how_to = {"policy_fn": BANDIT_FN, "optimizer": optimizer, "config": settings}
        state, _ = rloo.update(state, shaped, key, **how_to)
        return state, None

    keys = jax.random.split(KEY, 120)
    state, _ = jax.jit(partial(jax.lax.scan, iterate))(TrainState.create(ref, optimizer), keys)
    learned = scipy.special.softmax(np.asarray(state.params)[:3])
    expected = np.array([0.247720, 0.020115, 0.732165])
    assert np.abs(learned - expected).sum() / 2 < 0.02
    assert_array_equal(np.asarray(state.params)[3:], ref[3:])


# --- What carries rollouts


def numpy_rollout(**changes):
    """Two rows of a prompt of 1 token and 4 of a response in the letters a, b, c, ..."""
    made = {
        "tokens": np.array([[2, 2, 3, 4, 2], [3, 4, 2, 3, 4]]),
        "attention_mask": np.ones((2, 5), np.int32),
        "response_mask": np.array([[0, 1, 1, 1, 1]] * 2),
        "log_probs": np.full((2, 5), -0.5, np.float32),
        "support": np.arange(20).reshape(2, 5, 2),
    }
    return Rollout(**(made | changes))


def test_a_stop_string_cuts_the_support_too():
    cut = stops.cut(numpy_rollout(), ["bc"], characters("abc"))
    assert_array_equal(cut.support[0], [[0, 1], [2, 3], [4, 5], [6, 7], [-1, -1]])
    assert_array_equal(cut.support[1], numpy_rollout().support[1])
    assert stops.cut(numpy_rollout(support=None), ["bc"], characters("abc")).support is None


def test_what_cannot_be_known_is_refused():
    made = replace(by_hand(0, [0, 1]), support=None, truncated=True)
    with pytest.raises(ValueError, match="record_support"):
        ops.evaluate(BANDIT_FN, np.zeros(3, np.float32), made)
    with pytest.raises(ValueError, match="repetition_penalty"):
        how(repetition_penalty=1.5, record_support=True)
    for options in ({"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 1025}):
        with pytest.raises(UserError, match=r"^rl\.top_k must be at most 1024, got .* 5000 tokens"):
            initial.recorded(how(**options), 5000)
        assert initial.recorded(how(**options), 1024).records
    assert initial.recorded(how(top_k=1024, top_p=0.9), 5000).records
    assert not initial.recorded(how(), 5000).records
    assert not how(temperature=0.0, top_k=5, record_support=True).truncates
    served = SimpleNamespace(needs_teacher=True, teacher_server="http://x", teacher="x")
    method = SimpleNamespace(algorithm_config=served, settings=RLStage(top_p=0.9))
    with pytest.raises(UserError, match=r"whole vocabulary; leave rl\.top_k"):
        teacher.connect(None, method, None)


def test_the_turns_of_a_conversation_keep_their_support():
    letters = characters("abcdef")
    table = jnp.asarray(
        np.random.default_rng(1).normal(size=(letters.vocab_size,) * 2), jnp.float32
    )
    rows = [Row(text, (), f"row {text}", columns={}) for text in ("a", "bc", "d")]
    encoded = encoding.encode_prompts(rows, letters, length=2)
    config = how(8, 1.0, top_k=3, record_support=True)
    generate = jax.jit(partial(sampling.generate, sampling.uncached(bigrams), config=config))

    def respond(tokens, mask, _, used):
        return generate(table, tokens, mask, KEY, used=used)

    def reply(conversation, row):
        return "ef" if len(conversation) < 4 else None

    setting = Environment(reply, letters, chat.template_of(letters), 8)
    made, talks = converse(setting, respond, encoded, np.array([0, 1, -1, 2]))
    assert max(talks["turns"]) > 1
    said = made.response_mask == 1
    holes = (made.attention_mask == 1) & ~said
    assert holes[:, 2:].any()
    assert (made.support[~said] == -1).all()
    expected = np.argsort(-np.asarray(table)[np.roll(made.tokens, 1, axis=1)[said]], axis=1)[:, :3]
    assert_array_equal(made.support[said], expected)
    scored = jax.jit(partial(rollout.rescore, policy_fn=ops.policy_fn(bigrams)))(made, table)
    assert_allclose(scored.log_probs, made.log_probs, atol=1e-6)


# --- Every algorithm: as if the policy gave what was not drawn from a probability of 0

ALLOWED = np.random.default_rng(7).random((6, 6)) < 0.5  # by the token before
ALLOWED[np.arange(6), (np.arange(6) + 1) % 6] = ALLOWED[np.arange(6), (np.arange(6) + 3) % 6] = True
TAUGHT = np.float32(np.random.default_rng(8).normal(size=(6, 6)))


def bag(allowed, measure=None):
    """A policy of the token before and of all that are attended to, with values and a teacher. Ids
    that are not allowed have a logit of -1e30.
    """
    identity = SimpleNamespace(unembed=lambda params, hidden: hidden)

    def fn(params, tokens, mask, key, *, support=None, statistic=None, arrays=()):
        seen = jnp.cumsum(params["context"][tokens] * (mask != 0)[..., None], axis=1)
        excluded = jnp.where(jnp.asarray(allowed)[tokens], 0.0, -1e30)
        logits = params["logits"][tokens] + seen + excluded
        plain = ops.policy_fn(lambda params, *_: logits)
        how = {"support": support, "statistic": statistic, "arrays": arrays}
        output = plain(params, tokens, mask, key, **how)
        output = output._replace(values=jnp.pad(params["values"][tokens[:, :-1]], ((0, 0), (1, 0))))
        if measure is None:
            return output
        compared = partial(heads._compared, models.Teacher(identity, measure), None, 1.0)
        drawn_among = None if support is None else support[:, 1:]
        theirs = (jnp.asarray(TAUGHT)[tokens] + excluded)[:, :-1]
        found = compared(logits[:, :-1], tokens[:, 1:], drawn_among, theirs)
        return output._replace(**{k: jnp.pad(x, ((0, 0), (1, 0))) for k, x in found.items()})

    return policies.Policy(fn, takes_statistic=True)


def of_algorithms():
    """{name: module} of those whose ``update`` takes a rollout."""
    modules = {
        name: importlib.import_module(f"rlhf_jax.algorithms.{name}")
        for _, name, _ in pkgutil.iter_modules(algorithms.__path__)
    }
    return {
        name: module
        for name, module in modules.items()
        if hasattr(module, "update") and "rollout" in inspect.signature(module.update).parameters
    }


UPDATES = of_algorithms()
CONFIGS = {
    "clip_cov": {"kind": "kl", "share": 0.3, "kl_cov_coef": 0.5},
    "distill": {"divergence": "jsd"},
    "gdpo": {"components": ("cost", "tone"), "weights": (1.0, 0.5)},
    "nash_md": {"preference": "scores"},
    "pass_at_k": {"k": 2},
    "ppo": {"gae_lambda": 0.9, "entropy_coef": 0.1},
    "self_distill": {"top_k": 2},
    "vpg": {"entropy_coef": 0.1},
    "xpo": {"alpha": 0.1},
}


def drawn_by_hand():
    """Four prompts of two tokens with two responses each, of up to four tokens, one of them
    missing; and what the algorithms read of a rollout.
    """
    rng = np.random.default_rng(11)
    lengths = np.array([4, 2, 3, 4, 1, 4, 0, 3])
    tokens = np.zeros((8, 6), np.int32)
    tokens[:, :2] = np.repeat(rng.integers(0, 6, (4, 2)), 2, axis=0)
    support = np.full((8, 6, 6), -1, np.int32)
    for row, column in itertools.product(range(8), range(2, 6)):
        ids = np.flatnonzero(ALLOWED[tokens[row, column - 1]])
        tokens[row, column] = rng.choice(ids)
        if column < 2 + lengths[row]:
            support[row, column, : len(ids)] = rng.permutation(ids)
    mask = (np.arange(6) >= 2) & (np.arange(6) < 2 + lengths[:, None])
    told = tokens.copy()
    told[:, 0] = (told[:, 0] + 2) % 6  # the last token of a prompt says what is allowed
    attended = mask | (np.arange(6) < 2)
    scores = np.float32([0.2, 1.0, 0.0, 0.7, 0.5, 0.1, 0.0, 0.9])
    extras = {"cost": scores[::-1].copy(), "tone": scores**2, "teacher_tokens": np.float32(told)}
    return Rollout(
        *(tokens, attended.astype(np.int32), mask.astype(np.int32), np.zeros(mask.shape)),
        row_ids=np.repeat(np.arange(4), 2),
        scores=scores,
        rewards=np.asarray(ops.at_end(scores, mask)),
        extras=extras | {"teacher_mask": np.float32(attended)},
        support=support,
        truncated=True,
    )


@pytest.mark.parametrize("name", UPDATES)
def test_each_algorithm_learns_among_the_support_or_says_why_not(name):
    """Loss, metrics and gradient of a rollout with its supports, and of one without them by a
    policy that never draws what they leave out.
    """
    module = UPDATES[name]
    settings = CONFIGS.get(name, {})
    if module.Config(**settings).group_size > 2:
        settings = settings | {"group_size": 2}
    config = module.Config(**settings)
    rng = np.random.default_rng(12)
    shapes = {"logits": (6, 6), "context": (6, 6), "values": (6,)}
    params, old, reference = (
        {part: np.float32(rng.normal(size=shape)) for part, shape in shapes.items()}
        for _ in range(3)
    )
    old = jax.tree.map(lambda x, y: x + 0.1 * y, params, old)
    measure = getattr(config, "measure", None) if name == "distill" else None
    among, excluding = bag(np.ones((6, 6), bool), measure), bag(ALLOWED, measure)
    made = drawn_by_hand()
    of_sampler, of_reference = (
        np.where(made.mask, ops.evaluate(among, x, made).log_probs, 0) for x in (old, reference)
    )
    values = ops.evaluate(among, old, made).values
    made = replace(made, log_probs=of_sampler, ref_log_probs=of_reference, values=values)
    optimizer = optax.sgd(1.0)
    sizes = {"rows": 8, "columns": 6, "prompts": 4}
    create = getattr(module, "State", TrainState).create
    own = {k: v for k, v in sizes.items() if k in inspect.signature(create).parameters}
    state = create(params, optimizer, **own)

    def updated(policy_fn, batch):
        how = {"policy_fn": policy_fn, "optimizer": optimizer, "config": config}
        after, metrics = jax.jit(partial(module.update, **how))(state, batch, KEY)
        return jax.tree.map(np.subtract, params, after.params), metrics

    if name == "replay":  # its buffer has none
        with pytest.raises(UserError, match=r"replay has no supports: leave rl\.top_k"):
            updated(among, made)
        return
    gradient, metrics = updated(among, made)
    expected = updated(excluding, replace(made, support=None, truncated=False))
    assert metrics["grad_norm"] > 1e-3
    assert_close((gradient, metrics), expected, atol=2e-6, rtol=2e-5)


# --- Runs


@pytest.mark.parametrize("blocks", [slow(None), soak(4)])
def test_a_run_learns_and_goes_on_bit_for_bit(blocks, tmp_path):
    """The first step of each iteration has the ratio 1, with shared prompts and microbatches."""
    size = {"batch_size": 8, "num_iterations": 3, "validation_interval": 3}
    config = with_rl(letters_run(tmp_path), **size, max_new_tokens=4, top_p=0.8, kl_coef=0.1)
    config = replace(
        config,
        reward=("count:e",),
        checkpoint_interval=1,
        compute=Compute(share_prompts=blocks is None, blocks=blocks),
        grpo=grpo.Config(group_size=2, num_microbatches=2),
    )
    result = run_grpo(config)
    for row in metric_rows(result.folder)[1:]:
        assert row["policy/sampler_gap"] < 1e-5
        assert row["policy/ratio_max"] == pytest.approx(1, abs=1e-6)
        assert row["policy/approx_kl"] < 1e-12
    goes_on_alike(run_grpo, config, result)
