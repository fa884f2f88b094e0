"""A language of four tokens, EOS and three letters, in which everything can be listed: its 121
responses of at most four tokens (1 + 3 + 9 + 27 end with EOS, 81 are cut after four letters), their
probabilities, and what each algorithm makes of them.

Prefixes are numbered as in a heap: 0 is the empty one, and token a after prefix n makes prefix 4 n
+ 1 + a. A policy is a table of logits by prefix, so every distribution over the responses is one
that it can have.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from rlhf_jax import ops, rollout
from rlhf_jax.types import PolicyOutput, Rollout

# PAD lies outside the vocabulary: its log-prob is NaN, and whoever reads it shows it
EOS = 0
PAD = 4
STEPS = 4
# prefixes of fewer than four tokens, and of up to four
NUM_OPEN = 85
NUM_PREFIXES = 341


def prefixes(tokens):
    """[B, 5] -> [B, 5]: the prefix that each column completes. Column 0 is the prompt, which says
    nothing.
    """
    numbers = [jnp.zeros_like(tokens[:, 0])]
    for t in range(1, tokens.shape[1]):
        numbers.append(4 * numbers[-1] + 1 + tokens[:, t])
    return jnp.stack(numbers, axis=1)


def _complete(said=()):
    if len(said) == STEPS or EOS in said:
        return [said]
    return [response for token in range(4) for response in _complete((*said, token))]


RESPONSES = _complete()
LENGTHS = np.array([len(response) for response in RESPONSES])  # [121]
TOKENS = np.array(
    [[1, *response, *[PAD] * (STEPS - len(response))] for response in RESPONSES], np.int32
)  # [121, 5]
ATTENTION_MASK = (np.arange(1 + STEPS)[None, :] <= LENGTHS[:, None]).astype(np.int32)
RESPONSE_MASK = ATTENTION_MASK * (np.arange(1 + STEPS) > 0)
PATHS = np.asarray(prefixes(jnp.asarray(TOKENS)))  # [121, 5]
ENDS = PATHS[np.arange(len(RESPONSES)), LENGTHS]  # the number of each whole response
OPEN_BY_LENGTH = [np.unique(PATHS[steps < LENGTHS, steps]) for steps in range(STEPS)]


def probabilities(logits):
    """Of every response under a table of logits [85, 4]: [121] float64."""
    logits = np.asarray(logits, np.float64)
    log_probs = logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
    steps = [
        log_probs[path[:n], said] for path, n, said in zip(PATHS, LENGTHS, RESPONSES, strict=True)
    ]
    return np.exp([step.sum() for step in steps])


def table(probs):
    """The logits [85, 4] of a policy with these probabilities [121]."""
    mass = np.zeros(NUM_PREFIXES)
    for t in range(1 + STEPS):
        there = t <= LENGTHS
        np.add.at(mass, PATHS[there, t], probs[there])
    children = mass[1:].reshape(NUM_OPEN, 4)
    return np.log(np.where(children > 0, children, 1.0))  # what comes after EOS is never asked for


_RNG = np.random.default_rng(0)
REF_LOGITS = _RNG.normal(scale=0.7, size=(NUM_OPEN, 4))
REF = probabilities(REF_LOGITS)
# Rewards of whole responses: no two alike; letter 2 and brevity pay.
REWARDS = (
    _RNG.normal(scale=0.5, size=len(RESPONSES)) + 0.3 * np.sum(TOKENS == 2, axis=1) - 0.5 * LENGTHS
)


def distance(p, q):
    """Total variation."""
    return 0.5 * np.sum(np.abs(p - q))


# The same language as the library sees it.


def params():
    """The reference policy, with a table of values."""
    return {"logits": REF_LOGITS.astype(np.float32), "values": np.zeros(NUM_OPEN, np.float32)}


def policy_fn(
    params,
    tokens,
    attention_mask,
    key,
):
    del attention_mask
    assert key is None
    number = jnp.minimum(prefixes(tokens), NUM_OPEN - 1)
    logits, values = (jnp.asarray(params[name])[number] for name in ("logits", "values"))
    values = jnp.pad(
        values[:, :-1],
        ((0, 0), (1, 0)),
    )
    return PolicyOutput(ops.token_log_probs(logits, tokens), ops.entropy(logits), values)


def score_fn(
    params,
    tokens,
    attention_mask,
    key,
):
    """A table of scores [341] of whole responses."""
    del key
    last = jnp.sum(attention_mask != 0, axis=1, keepdims=True) - 1
    return params["scores"][jnp.take_along_axis(prefixes(tokens), last, axis=1)[:, 0]]


LISTED = Rollout(
    TOKENS,
    ATTENTION_MASK,
    RESPONSE_MASK,
    np.zeros(TOKENS.shape),
    scores=REWARDS.astype(np.float32),
)


def every_response(params_now, listed=LISTED):
    """Every response once, with its log-probs, values and the reference's log-probs."""
    return rollout.rescore(
        listed, params_now, policy_fn=policy_fn, ref_fn=Partial(policy_fn, params())
    )


def draw(params_now, uniform):
    """Responses drawn from that list by uniform numbers [B]: what sampling token by token gives, in
    one step.
    """
    listed = every_response(params_now).replace(sampler_log_probs=None)  # its own are
    cumulative = jnp.cumsum(jnp.exp(jnp.sum(listed.log_probs, axis=1)))
    drawn = jnp.searchsorted(cumulative, uniform * cumulative[-1])
    return jax.tree.map(lambda x: jnp.asarray(x)[drawn], listed)


def greedy(params_now):
    """The number of the response whose every token is the likeliest."""
    best = jnp.argmax(params_now["logits"], axis=1)[np.minimum(PATHS[:, :-1], NUM_OPEN - 1)]
    return jnp.argmax(
        jnp.all(
            (best == TOKENS[:, 1:]) | (RESPONSE_MASK[:, 1:] == 0),
            axis=1,
        )
    )


# Training.


def repeat(update, state, inputs):
    """``update(state, input) -> (state, metrics)`` for each of the inputs, or their number
    times.
    """
    if isinstance(inputs, int):
        return jax.jit(
            lambda state: jax.lax.scan(lambda state, _: update(state, None), state, length=inputs)
        )(state)
    return jax.jit(lambda state, inputs: jax.lax.scan(update, state, inputs))(
        state,
        inputs,
    )


def adam(num_steps, learning_rate=0.1):
    return optax.adam(optax.linear_schedule(learning_rate, 0.0, num_steps))


# Optima.


def tilted(coef):
    """argmax of E[r] - coef * KL(policy || reference) over all distributions: ref * exp(r / coef),
    normalised.
    """
    weights = REF * np.exp(REWARDS / coef)
    return weights / weights.sum()


def fixed_point(
    advantage,
    coef,
    estimator,
    weight,
):
    """Where the expected gradient of a KL term per token, in the loss, cancels that of the policy
    term: [121].

    All tokens of response y have the advantage A(y), and its tokens count w(y) in the loss. The
    expected gradient by the logits of prefix n is, times the probability of n, that of
    ``-sum_a pi(a|n) (Q(n, a) - coef W(n, a) g(a|n))`` with Q, W and g held fixed: Q and W are the
    means of w A and of w over the responses that go through a, and g is the slope of the estimator,
    ``d = log(pi / ref)`` for k2 and ``1 - exp(-d)`` for k3. It is 0 where ``Q - coef W g`` is the
    same number mu(n) for every a:

      k2: ``pi(a|n) = ref exp((Q - mu) / (coef W))``        k3: ``pi(a|n) = ref coef W / (coef W +
      mu - Q)``

    with the mu(n) that makes them add up to 1. Q and W follow from the longest prefixes backwards.
    A KL term per token does not see what a token does to the KL of those after it (Tang and Munos
    2025, "On a few pitfalls in KL divergence gradient estimation for RL"): Q holds no KL, so that
    this is not ``tilted``. With a single step it is (k2), or is ``coef ref / (mu - r)`` (k3).

    Args:
      advantage: probabilities [121] -> A [121], where A may depend on the policy (the other answers
        of a group).
      weight: probabilities [121] -> w [121].
    """
    probs = REF
    for _ in range(200):
        w = weight(probs)
        new = _backwards(w * advantage(probs), w, coef, estimator)
        if distance(new, probs) < 1e-10:
            return new
        probs = 0.5 * (probs + new)
    raise AssertionError("no fixed point was found")


def _backwards(
    weighted_advantage,
    weight,
    coef,
    estimator,
):
    ref = np.exp(REF_LOGITS) / np.exp(REF_LOGITS).sum(axis=1, keepdims=True)
    q = np.zeros(NUM_PREFIXES)
    w = np.zeros(NUM_PREFIXES)
    policy = np.full((NUM_OPEN, 4), 0.25)
    q[ENDS] = weighted_advantage
    w[ENDS] = weight
    for numbers in reversed(OPEN_BY_LENGTH):
        children = 4 * numbers[:, None] + 1 + np.arange(4)
        policy[numbers] = _conditional(
            ref[numbers],
            q[children],
            coef * w[children],
            estimator,
        )
        q[numbers] = np.sum(
            policy[numbers] * q[children],
            axis=1,
        )
        w[numbers] = np.sum(
            policy[numbers] * w[children],
            axis=1,
        )
    return probabilities(np.log(policy))


def _conditional(
    ref,
    q,
    scale,
    estimator,
):
    """mu by bisection, for all prefixes of one length at once: [N, 4] each."""

    def shares(mu):
        return (
            ref * np.exp((q - mu) / scale) if estimator == "k2" else ref * scale / (scale + mu - q)
        )

    high = q.max(
        axis=1, keepdims=True
    )  # the shares add up to at most 1 here, and to at least 1 at low
    low = (
        q.min(axis=1, keepdims=True)
        if estimator == "k2"
        else (q - scale).max(axis=1, keepdims=True) + 1e-12
    )
    for _ in range(60):
        middle = 0.5 * (low + high)
        above = shares(middle).sum(axis=1, keepdims=True) > 1
        low = np.where(above, middle, low)
        high = np.where(above, high, middle)
    found = shares(high)
    return found / found.sum(axis=1, keepdims=True)
