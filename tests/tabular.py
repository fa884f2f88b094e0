"""Policies and scorers that are lookup tables, rollouts to feed them, and the ways to run an
update.
"""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from builders import initial_params
from jax.sharding import PartitionSpec as P

from rlhf_jax import models, ops, sharding
from rlhf_jax.types import Comparisons, PolicyOutput, Rollout

VOCAB_SIZE = 5


def policy_fn(
    params,
    tokens,
    attention_mask,
    key,
):
    """A bigram table [V, V] of logits and a table [V] of values, both looked up by the token
    before.
    """
    del attention_mask, key
    logits = params["logits"][tokens]
    values = jnp.pad(params["values"][tokens[:, :-1]], ((0, 0), (1, 0)))
    return PolicyOutput(ops.token_log_probs(logits, tokens), ops.entropy(logits), values)


def in_groups(batch, group_size):
    """The rollout whose adjacent rows have the prompt of the first of their group."""
    first = np.arange(len(batch.tokens)) // group_size * group_size
    is_prompt = np.arange(batch.tokens.shape[1]) < np.argmax(np.any(batch.mask, axis=0))
    prompts = {
        name: jnp.where(is_prompt, x[first], x)
        for name, x in vars(batch).items()
        if name in ("tokens", "attention_mask")
    }
    return batch.replace(**prompts)


def teacher_params():
    return policy_params(1)


def taught(config):
    """``policy_fn`` with a teacher, another such table."""

    def taught_fn(
        params,
        tokens,
        attention_mask,
        key,
    ):
        output = policy_fn(params, tokens, attention_mask, key)
        teacher = teacher_params()["logits"][tokens]
        apart = config.measure(params["logits"][tokens[:, :-1]], teacher_logits=teacher[:, :-1])
        return output._replace(
            teacher_log_probs=ops.token_log_probs(teacher, tokens),
            divergence=jnp.pad(apart, ((0, 0), (1, 0))),
        )

    return taught_fn


def score_fn(
    params,
    tokens,
    attention_mask,
    key,
):
    """The sum of a table [V] over real tokens."""
    del key
    return jnp.sum(jnp.where(attention_mask != 0, params["scores"][tokens], 0.0), axis=1)


def policy_params(seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(VOCAB_SIZE, VOCAB_SIZE))
    return {
        "logits": jnp.asarray(logits, jnp.float32),
        "values": jnp.asarray(rng.normal(size=VOCAB_SIZE), jnp.float32),
    }


def rollout(
    seed,
    lengths,
    prompt_length=3,
    response_length=4,
):
    """Rows with responses of these ``lengths`` (0: absent) after left-padded prompts of random
    lengths; all fields set.

    Log-probs and values are near those of ``policy_params(seed)``, so that some ratios are clipped
    and some are not.
    """
    rng = np.random.default_rng(seed)
    rows = len(lengths)
    total = prompt_length + response_length
    column = np.arange(total)[None, :]
    lengths = np.asarray(lengths)[:, None]
    response_mask = (column >= prompt_length) & (column < prompt_length + lengths)
    prompt_mask = (column < prompt_length) & (
        column >= rng.integers(0, prompt_length, size=(rows, 1))
    )
    tokens = rng.integers(0, VOCAB_SIZE, size=(rows, total))
    params = jax.tree.map(np.asarray, policy_params(seed))
    before = tokens[:, :-1]
    log_p = scipy.special.log_softmax(params["logits"], axis=1)
    log_probs, values = np.zeros((2, rows, total))
    log_probs[:, 1:] = log_p[before, tokens[:, 1:]]
    values[:, 1:] = params["values"][before]

    def near(x, scale):
        x = x + scale * rng.normal(size=(rows, total))
        return jnp.asarray(np.where(response_mask, x, 0.0), jnp.float32)

    return Rollout(
        tokens=jnp.asarray(tokens, jnp.int32),
        attention_mask=jnp.asarray(response_mask | prompt_mask, jnp.int32),
        response_mask=jnp.asarray(response_mask, jnp.int32),
        log_probs=near(log_probs, 0.2),
        row_ids=jnp.asarray(np.arange(rows)),
        ref_log_probs=near(log_probs, 0.5),
        values=near(values, 0.2),
        rewards=near(0.0, 1.0),
        advantages=near(0.0, 1.0),
        returns=near(0.0, 1.0),
    )


def comparisons(
    seed,
    num_rows,
    num_answers,
    length=6,
    absent=(),
):
    """Random answers; ``absent`` lists (row, answer) pairs that are not there."""
    rng = np.random.default_rng(seed)
    shape = (num_rows, num_answers, length)
    real = np.arange(length)[None, None, :] < rng.integers(
        2, length + 1, size=(num_rows, num_answers, 1)
    )
    for row, answer in absent:
        real[row, answer] = False
    response = real & (np.arange(length)[None, None, :] >= 1)
    return Comparisons(
        tokens=jnp.asarray(rng.integers(0, VOCAB_SIZE, size=shape), jnp.int32),
        attention_mask=jnp.asarray(real, jnp.int32),
        response_mask=jnp.asarray(response, jnp.int32),
    )


def numbers(loss):
    """``loss`` with the values of its Means in their place: the sum of the terms, and the
    metrics.
    """

    def valued(*args, **kwargs):
        terms, metrics = loss(*args, **kwargs)
        terms = terms if isinstance(terms, tuple) else (terms,)
        return sum(term.value for term in terms), {
            name: metric.value for name, metric in metrics.items()
        }

    return valued


def every_way(update, state, batch, key, check_vma=(True, False), **jit_options):
    """Results of ``update(state, batch, key)`` under plain jit over arrays sharded over 4 devices,
    and under shard_map over the same 4, for each ``check_vma``. Under jit no row may move from one
    device to another."""
    mesh = sharding.make_mesh(4)
    spread = (
        sharding.replicate(mesh, state),
        sharding.shard_rows(mesh, batch),
        sharding.replicate(mesh, key),
    )
    compiled = jax.jit(partial(update, **jit_options)).lower(*spread).compile()
    moves = [
        name
        for name in ("all-gather", "all-to-all", "collective-permute")
        if name in compiled.as_text()
    ]
    assert not moves
    specs = {"mesh": mesh, "in_specs": (P(), P("data"), P()), "out_specs": P()}
    mapped = [
        jax.shard_map(partial(update, axis_name="data"), check_vma=check, **specs)
        for check in check_vma
    ]
    return compiled(*spread), *(jax.jit(f)(*spread) for f in mapped)


def assert_close(
    actual,
    expected,
    atol=1e-6,
    rtol=1e-5,
):
    """Trees of the same structure and, within ``atol``, of the same numbers."""
    actual, expected = jax.tree.map(np.asarray, (actual, expected))
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=atol)


def assert_identical(actual, expected):
    """Trees of the same structure and the same bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def gpt2(head=None):
    """A GPT-2 of one layer whose token table takes more than 1 MB, and its parameters."""
    config = models.GPT2Config(
        vocab_size=1100,
        max_length=16,
        hidden_size=256,
        num_layers=1,
        num_heads=2,
    )
    model = models.build(config)
    params = initial_params(model)
    return model, params if head is None else models.add_head(jax.random.key(1), params, head)
