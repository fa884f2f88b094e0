"""Scalar heads, and a model as the PolicyFn or ScoreFn of the algorithms. Nothing here depends on
the family.

Token log-probabilities are ``logit - logsumexp`` over chunks of columns under ``jax.checkpoint``: a
[B, T, V] float32 array is never built for a large vocabulary, and nothing is computed for prompt
columns.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from rlhf_jax import ops
from rlhf_jax.models.attention import Columns, by_blocks
from rlhf_jax.models.kernels import fused
from rlhf_jax.models.kernels.shared import Groups, answers
from rlhf_jax.models.model import Model
from rlhf_jax.policies import Policy
from rlhf_jax.types import Params, PolicyOutput, ScoreFn

# Logits of one row in memory at once (columns x V). Rows do not count, so that a shard has the same
# chunks as the whole batch.
_CHUNK_LOGITS = 2**20
# So many times more on an accelerator, where the gradient of each chunk reads and writes the whole
# table: of 8 rows of 1,024 columns and 152,000 tokens, 19 chunks in place of 147.
_ON_ACCELERATORS = 8
# A CPU too waits for the table if a chunk has fewer columns (docs/gemma.md).
_CHUNK_COLUMNS = 16
HEADS = ("value", "score")  # their keys in a model's parameters


class Teacher(NamedTuple):
    """A model with which a policy is compared at every token."""

    model: Model
    # (logits [..., V], *, teacher_logits [..., V]) -> [...], such as ``losses.divergence``
    measure: Callable[..., Array]


def add_head(
    key: Array,
    params: Params,
    kind: str,
    width: int | None = None,
) -> Params:
    """Adds a scalar head on the final hidden states.

    Args:
        key: PRNG key of the score head's weights; the value head starts at 0.
        params: of a model; not changed.
        kind: "value", {"kernel" [D], "bias" []}: zeros; or "score", {"kernel" [D], "bias", "gain",
            "shift"}: weights normal with standard deviation 1 / sqrt(D + 1) (Stiennon et al. 2020),
            bias 0, gain 1, shift 0.
        width: D; None: the width of the parameters' ``ln_f``. Adapters, and networks of your own,
            have none.

    Returns:
        A new dict with the head under ``kind``.

    Raises:
        ValueError: for another kind, or without a width.
    """
    if width is None and "ln_f" not in params:
        raise ValueError(
            "these parameters are adapters, or of a network without ln_f, and do not say how wide "
            f'its states are: add_head(key, params, "{kind}", model.config.hidden_size)'
        )
    if kind not in HEADS:
        raise ValueError(f"unknown head {kind!r}; choose from {', '.join(HEADS)}")
    zero = jnp.float32(0.0)
    size = width or params["ln_f"]["scale"].shape[-1]
    head = {"kernel": jnp.zeros(size), "bias": zero}
    if kind == "score":
        kernel = jax.random.normal(key, (size,)) / math.sqrt(size + 1)
        head = {"kernel": kernel, "bias": zero, "gain": jnp.float32(1.0), "shift": zero}
    return {**params, kind: head}


def policy_params(params: Params) -> Params:
    """The policy's parameters: ``params``, or their "policy" part beside a whole value model."""
    return params["policy"] if isinstance(params, Mapping) and "policy" in params else params


def policy_fn(
    model: Model,
    temperature: float | Array = 1.0,
    prompt_length: int = 0,
    value_model: Model | None = None,
    *,
    teacher: Teacher | None = None,
    group_size: int = 1,
    num_answers: int = 0,
    one_text: bool = False,
) -> Policy:
    """Turns a language model into a policy.

    Args:
        model: the policy.
        temperature: logits are divided by it, as in sampling; above 0. It may be traced.
        prompt_length: columns before it are not computed and stay 0, as does column 0. Of a batch
            with a ``prompt_length`` of its own, such as a rollout, ``ops.evaluate`` needs none.
        value_model: a whole model for the values; params are then {"policy": ..., "value": ...},
            the latter with its own "value" head. Without it values come from the network's own
            head (``Model.values``) or from ``params["value"]``; they are None if both are missing.
        teacher: a model of the same tokens, whose parameters are a fifth argument of the result;
            without that argument it is not called. Of vocabularies of different sizes (padded ones)
            the first tokens are compared, as many as both have.
        group_size: G adjacent rows have the same columns before these, tokens and mask, which all
            models compute once (``models.kernels.shared``); the number of rows is a multiple of G.
            The results are the same up to rounding. With dropout each row is computed by itself.
        num_answers: K: ``attention_mask`` numbers prompts and the K answers to each, as in batches
            of comparisons that compute a prompt once (``types.Comparisons``); 0: it numbers packed
            documents.
        one_text: each row holds one text, its real tokens side by side: attention on GPUs then
            reads the rows' lengths in place of a mask.

    Returns:
        ``(params, tokens, attention_mask, key) -> PolicyOutput``. Log-probabilities and entropies
        of column t come from the logits at t - 1 (equal to ``ops.token_log_probs`` and
        ``ops.entropy``), and so do values from the head, and with the teacher's parameters
        ``teacher_log_probs`` and ``divergence``, in the same chunks. With the keyword ``support``
        [B, T, K] all of these but the values are of the distributions among its ids; a
        ``statistic`` (``ops.evaluate``) is of the whole vocabulary, in the same chunks. With the
        keyword ``response_mask`` [B, n], of the last n columns, those before it are not computed,
        and others outside it may be left out: logits of many columns are computed in chunks, on
        CPUs those with columns of responses alone.

    Raises:
        ValueError: if ``temperature`` is not positive; from the result, if rows share no column.
    """
    if not isinstance(temperature, jax.core.Tracer) and not temperature > 0:
        raise ValueError(
            f"temperature must be positive, got {temperature!r}; greedy choices have no "
            "log-probabilities"
        )

    def policy(
        params: Params,
        tokens: Array,
        attention_mask: Array,
        key: Array | None = None,
        teacher_params: Params | None = None,
        *,
        support: Array | None = None,
        response_mask: Array | None = None,
        statistic: Callable[..., Any] | None = None,
        arrays: tuple[Array, ...] = (),
    ) -> PolicyOutput:
        width = tokens.shape[1]
        before_responses = 0 if response_mask is None else width - response_mask.shape[1]
        prompt = max(prompt_length, before_responses)
        first = max(prompt, 1)
        if first > width:
            raise ValueError(f"prompt_length {prompt} is longer than the {width} columns")
        shared = shared_by(group_size=group_size, prompt_length=prompt, num_answers=num_answers)
        states = partial(_states, shared, one_text)
        policy_key, value_key = (None, None) if key is None else jax.random.split(key)
        body = policy_params(params)
        # The states before columns first, ..., T - 1: [B, T - first, D].
        before: Columns = slice(first - 1, width - 1)
        if num_answers:
            before = answers(attention_mask, num_answers).previous[:, first:]
        rows = (tokens, attention_mask)
        hidden = states(model, body, *rows, policy_key, before)
        of_teacher = compare = None
        if teacher is not None and teacher_params is not None:
            of_teacher = states(teacher.model, teacher_params, *rows, None, before)
            compare = partial(_compared, teacher, teacher_params, temperature)
        in_support = None if support is None else support[:, first:]
        own = (x[:, first:] for x in arrays)
        columns = (tokens[:, first:], hidden, of_teacher, in_support, *own)
        present, layout = jax.tree.flatten(columns)  # without what is None

        def of_chunk(_: Array, *parts: Array) -> PolicyOutput:
            columns = jax.tree.unflatten(layout, parts)
            return _of_tokens(model, body, temperature, compare, statistic, *columns)

        read = None
        if response_mask is not None:
            read = response_mask[:, first - before_responses :] != 0
        output = _by_chunks(of_chunk, model.config.vocab_size, *present, read=read)
        critic = params
        if value_model is not None:
            critic = params["value"]
            hidden = states(value_model, critic, *rows, value_key, before)
        if value_model is not None or model.values is not None or "value" in params:
            output = output._replace(values=_values(value_model or model, critic, hidden))
        return jax.tree.map(lambda columns: ops.from_column(columns, first), output)

    known = temperature if isinstance(temperature, int | float) else None
    return Policy(
        policy,
        temperature=known,
        prompt_length=prompt_length,
        takes_response_mask=True,
        takes_statistic=True,
    )


def shared_by(*, group_size: int, prompt_length: int, num_answers: int) -> dict[str, Any]:
    """The argument ``groups`` or ``num_answers`` of ``Model.hidden``; none for single rows.

    Raises:
        ValueError: a size is too small, there is no prompt to share, or both are given.
    """
    ops.check_number("group_size", group_size, at_least=1)
    ops.check_number("num_answers", num_answers, at_least=0)
    if group_size > 1 and num_answers:
        raise ValueError(
            f"group_size {group_size} and num_answers {num_answers}: answers are adjacent rows or "
            "packed into one; give one of both"
        )
    if num_answers:
        return {"num_answers": num_answers}
    if group_size == 1:
        return {}
    if prompt_length < 1:
        raise ValueError(f"group_size {group_size}: give the prompt_length that its rows share")
    return {"groups": Groups(prompt_length, group_size)}


def _states(
    shared: dict[str, Any],
    one_text: bool,
    model: Model,
    params: Params,
    *rows: Any,
) -> Array:
    """``model.hidden`` of rows that share prompts, or hold one text each."""
    if one_text and "num_answers" not in shared and model.takes_groups:
        return model.hidden(params, *rows, one_text=True, **shared)
    return model.hidden(params, *rows, **shared)


def score_fn(
    model: Model,
    *,
    prompt_length: int = 0,
    group_size: int = 1,
    num_answers: int = 0,
    one_text: bool = False,
    at_tokens: bool = False,
) -> ScoreFn:
    """Turns a model with a "score" head into a ScoreFn.

    Args:
        model: the reward model's body.
        prompt_length, group_size: the columns that G adjacent rows share, as in ``policy_fn``.
        num_answers, one_text: as in ``policy_fn``.
        at_tokens: the scores [B, T] of the states at all tokens, 0 at padding, in place of the last
            one's; without ``documents``.

    Returns:
        ``(params, tokens, attention_mask, key) -> [B]`` float32, ``gain * (w . h + bias) + shift``
        with h the hidden state at the row's last real token. ``gain`` and ``shift`` get no
        gradient. A row without a real token scores 0. A further argument ``documents`` [B, n],
        numbers of packed texts in ``attention_mask``, asks for each text's score [B, n] instead of
        the row's; a missing text scores 0.

    Raises:
        ValueError: rows share no column.
    """
    shared = shared_by(group_size=group_size, prompt_length=prompt_length, num_answers=num_answers)

    def score(
        params: Params,
        tokens: Array,
        attention_mask: Array,
        key: Array | None = None,
        documents: Array | None = None,
    ) -> Array:
        mask = attention_mask[:, None]
        # [B, n, T]; n = 1 for whole rows
        real = mask != 0 if documents is None else mask == documents[..., None]
        columns = jnp.arange(tokens.shape[1])[None, None]
        last = jnp.max(jnp.where(real, columns, 0), axis=2)  # [B, n]
        rows = (tokens, attention_mask, key, None if at_tokens else last)
        hidden = _states(shared, one_text, model, params, *rows)
        scores = _scalar(params, "score", hidden)
        head = params["score"]
        gain, shift = lax.stop_gradient((head["gain"], head["shift"]))
        is_scored = attention_mask != 0 if at_tokens else jnp.any(real, axis=2)
        scores = jnp.where(is_scored, gain * scores + shift, 0.0)
        return scores if at_tokens or documents is not None else scores[:, 0]

    return score


def _values(model: Model, params: Params, hidden: Array) -> Array:
    """[B, T] of [B, T, D] states, by the network's own value head or by the head "value"."""
    if model.values is not None:
        return model.values(params, hidden)
    return _scalar(params, "value", hidden)


def _scalar(params: Params, kind: str, hidden: Array) -> Array:
    """The head ``kind`` of [B, T, D] states: [B, T] in float32."""
    if kind not in params:
        raise ValueError(f'the model has no {kind} head: params = add_head(key, params, "{kind}")')
    head: Params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params[kind])
    return jnp.einsum("btd,d->bt", hidden.astype(jnp.float32), head["kernel"]) + head["bias"]


def _of_tokens(
    model: Model,
    params: Params,
    temperature: float | Array,
    compare: Callable[..., dict[str, Any]] | None,
    statistic: Callable[..., Any] | None,
    targets: Array,
    hidden: Array,
    of_teacher: Array | None,
    support: Array | None,
    *arrays: Array,
) -> PolicyOutput:
    """Log-probabilities and entropies [B, n] of the targets, from states [B, n, D].

    compare: ``compare(logits [B, n, V], targets, support, of_teacher)`` gives further fields.
    statistic: ``statistic(logits, *arrays)`` is a further field.
    support: [B, n, K] ids among which the targets were drawn; None: the whole vocabulary.
    """
    whole = model.unembed(params, hidden) / temperature
    chosen = _at(whole, targets)
    logits = ops.among(whole, support)
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    probs = jnp.exp(logits - normalizer[..., None])
    entropy = normalizer - jnp.sum(probs * logits, axis=-1)
    further = {} if compare is None else compare(whole, targets, support, of_teacher)
    if statistic is not None:
        further["statistic"] = statistic(ops.float32(whole), *arrays)
    return PolicyOutput(chosen - normalizer, entropy, **further)


def _by_chunks(
    fn: Callable[..., PolicyOutput],
    vocab_size: int,
    *arrays: Array,
    read: Array | None = None,
) -> PolicyOutput:
    """``fn(number of the chunk, *arrays)`` of arrays [B, N, ...], in chunks of columns whose logits
    are about ``_logits_at_once`` numbers for each row.

    read: [B, N] bool, the columns whose results are read; on CPUs the chunks of others are left
        out, and 0. None: all.
    """
    columns = arrays[0].shape[1]
    chunks = math.ceil(columns * vocab_size / _logits_at_once(vocab_size))
    if chunks <= 1:
        return fn(jnp.int32(0), *arrays)
    size = math.ceil(columns / chunks)
    # Compiled for an H200 and a TPU v5e, chunks that may be left out take another copy of the
    # table's gradient, and on the TPU twice the time to compile.
    if read is None or fused.platform() != "cpu":
        output: PolicyOutput = by_blocks(fn, size, *((x, 1) for x in arrays))
        return output
    # Each row's columns that are read come first, so that they fill as few chunks as possible.
    order = jnp.argsort(~read, axis=1, stable=True)
    in_front = [(_permuted(x, order), 1) for x in (read, *arrays)]
    output = by_blocks(partial(_where_read, fn), size, *in_front)
    back = jnp.argsort(order, axis=1)
    return jax.tree.map(lambda x: _permuted(x, back), output)


def _logits_at_once(vocab_size: int) -> int:
    usual = _CHUNK_LOGITS * (1 if fused.platform() == "cpu" else _ON_ACCELERATORS)
    return max(usual, _CHUNK_COLUMNS * vocab_size)


def _where_read(fn: Callable[..., PolicyOutput], number: Array, read: Array, *arrays: Array) -> Any:
    """``fn(number, *arrays)``, or zeros if no column is read."""
    of_chunk = partial(fn, number)
    shapes = jax.eval_shape(of_chunk, *arrays)

    def zeros(*_: Array) -> Any:
        # Like the shapes also in the axes of shard_map over which they vary.
        return jax.tree.map(jnp.zeros_like, shapes)

    return lax.cond(jnp.any(read), of_chunk, zeros, *arrays)


def _permuted(x: Array, order: Array) -> Array:
    """Each row of [B, N, ...] in its order [B, N]."""
    return jax.vmap(lambda row, places: row.at[places].get(unique_indices=True))(x, order)


def _at(logits: Array, targets: Array) -> Array:
    """The logits of the targets. A pad's id may lie outside the vocabulary; its column is masked
    later but must stay finite.
    """
    return jnp.take_along_axis(logits, targets[..., None], axis=-1, mode="clip")[..., 0]


def _compared(
    teacher: Teacher,
    params: Params,
    temperature: float | Array,
    logits: Array,
    targets: Array,
    support: Array | None,
    hidden: Array,
) -> dict[str, Array]:
    """What a teacher with ``hidden`` states [B, n, D] says of the targets, [B, n] each."""
    theirs = teacher.model.unembed(params, hidden) / temperature
    shared = min(logits.shape[-1], theirs.shape[-1])
    chosen = _at(theirs[..., :shared], targets)
    if support is not None:
        support = jnp.where(support < shared, support, -1)
    ours = ops.among(logits[..., :shared], support)
    theirs = ops.among(theirs[..., :shared], support)
    log_probs = chosen - jax.nn.logsumexp(theirs, axis=-1)
    divergence = teacher.measure(ours, teacher_logits=theirs)
    return {"teacher_log_probs": log_probs, "divergence": divergence}
