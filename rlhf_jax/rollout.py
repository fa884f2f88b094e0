"""From prompts to what an update reads: sample, here or elsewhere, then score with the update's own forward pass.

Decoding with a cache is not bit-identical to a full forward (3e-6 in float32, 5e-2 in bfloat16). So the sampler's
log-probs are replaced by those of the policy function that the update will use: with unchanged parameters the ratio of
the first minibatch is then exactly 1. Samples of another engine (``from_text``) go the same way.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlhf_jax import ops
from rlhf_jax.errors import UserError
from rlhf_jax.models import Model, policy_params
from rlhf_jax.sampling import SamplingConfig, generate
from rlhf_jax.types import BoundPolicyFn, Params, PolicyFn, Rollout


def collect(
    model: Model,
    params: Params,
    tokens: jax.Array,
    attention_mask: jax.Array,
    key: jax.Array,
    *,
    sampling: SamplingConfig,
    policy_fn: PolicyFn,
    ref_fn: BoundPolicyFn | None = None,
    row_ids: jax.Array | None = None,
    mesh: Mesh | None = None,
) -> Rollout:
    """Responses [B, T] to prompts [B, P] with log-probs, values and reference log-probs; no scores yet.

    ``generate`` followed by ``rescore``; call the two yourself to measure ``sampler_gap`` between them. ``policy_fn``
    and ``ref_fn`` must divide logits by ``sampling.temperature``. With a whole value model ``params`` are
    {"policy", "value"}, as in ``models.policy_fn``. Arguments and errors are those of the two functions.
    """
    sampled = generate(model, policy_params(params), tokens, attention_mask, key, sampling, row_ids, mesh)
    return rescore(sampled, params, policy_fn=policy_fn, ref_fn=ref_fn)


def rescore(
    rollout: Rollout,
    params: Params,
    *,
    policy_fn: PolicyFn,
    ref_fn: BoundPolicyFn | None = None,
    importance_cap: float | None = None,
) -> Rollout:
    """The rollout with ``log_probs`` and ``values`` [B, T] of ``policy_fn``, ``ref_log_probs`` [B, T] of ``ref_fn``.

    All are float32 and 0 outside the response. ``values`` is None if the policy has no value function. Dropout is off.
    ``ref_fn`` carries its parameters: ``jax.tree_util.Partial(policy_fn, ref_params)``.

    With ``importance_cap`` the rollout gets ``importance_weights`` [B, T] too,
    ``min(exp(log_probs of policy_fn - the rollout's own log_probs), importance_cap)``: truncated importance sampling
    (Ionides 2008), with which each token of an engine whose numbers are not quite the policy's counts as often as the
    policy would have said it (Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL
    Training"). ``math.inf`` truncates nothing. No gradient flows through them.

    Raises:
      ValueError: ``importance_cap`` is not above 0.
    """
    if importance_cap is not None and not importance_cap > 0:
        raise ValueError(f"importance_cap: expected a number above 0 (or None), got {importance_cap}")
    response = rollout.response_mask != 0

    def in_response(x: jax.Array) -> jax.Array:
        return jnp.where(response, x, 0.0).astype(jnp.float32)

    output = policy_fn(params, rollout.tokens, rollout.attention_mask, None)
    log_probs = in_response(output.log_probs)
    values = None if output.values is None else in_response(output.values)
    if importance_cap is not None:
        weights = jnp.minimum(ops.ratio(log_probs, rollout.log_probs), importance_cap)
        rollout = dataclasses.replace(rollout, importance_weights=jax.lax.stop_gradient(in_response(weights)))
    rollout = dataclasses.replace(rollout, log_probs=log_probs, values=values)
    if ref_fn is None:
        return rollout
    ref_output = ref_fn(rollout.tokens, rollout.attention_mask, None)
    return dataclasses.replace(rollout, ref_log_probs=in_response(ref_output.log_probs))


def sampler_gap(sampled: Rollout, rescored: Rollout) -> jax.Array:
    """The largest ``|log-prob difference|`` [] over response tokens, in nats; 0 if there are none.

    More than rounding (about 1e-5 in float32, 1e-1 in bfloat16) means that sampler and policy function disagree: by
    temperature, by parameters, or by a bug.
    """
    gap = jnp.abs(sampled.log_probs - rescored.log_probs)
    return jnp.max(jnp.where(sampled.response_mask != 0, gap, 0.0), initial=0.0)


def truncated_share(rollout: Rollout, importance_cap: float) -> jax.Array:
    """The share [] of response tokens whose importance weight reached the cap that ``rescore`` was given; 0 of none.

    Raises:
      ValueError: the rollout has no importance weights.
    """
    if rollout.importance_weights is None:
        raise ValueError("rollout.importance_weights is None: give rollout.rescore an importance_cap")
    return ops.masked_mean(rollout.importance_weights >= importance_cap, rollout.response_mask)


class Encoder(Protocol):
    """What ``from_text`` needs of a tokenizer. ``encode`` gives the ids of the text alone, nothing before or after."""

    @property
    def pad_id(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    def encode(self, text: str, /) -> list[int]: ...


class _Row(NamedTuple):
    prompt: np.ndarray  # [prompt tokens]
    response: np.ndarray  # [response tokens], holes and EOS included
    said: np.ndarray  # [response tokens] bool
    log_probs: np.ndarray  # [response tokens] float32


Texts = Sequence[str | Sequence[int] | np.ndarray]


def from_text(
    prompts: Texts,
    responses: Texts,
    tokenizer: Encoder,
    *,
    log_probs: Sequence[Sequence[float | None] | np.ndarray],
    finished: Sequence[bool] | None = None,
    masks: Sequence[Sequence[int] | np.ndarray] | None = None,
    prompt_length: int | None = None,
    response_length: int | None = None,
    row_ids: Sequence[int] | np.ndarray | None = None,
) -> Rollout:
    """A rollout of samples that were made elsewhere: B rows of texts or token ids with their log-probabilities.

    Token ids are the safe form: a text need not encode into the tokens that were sampled. ``rescore`` comes next, with
    a ``policy_fn`` of the temperature at which the samples were drawn.

    Args:
      prompts: B texts, or lists of token ids; padded on the left.
      responses: B texts, or lists of token ids; padded on the right.
      tokenizer: the run's own; texts are encoded by it, prompt and response apart.
      log_probs: for each row the log-probability (nats) that the engine gave each response token, EOS included.
      finished: for each row whether EOS ended it. EOS is put at the end of a finished row that lacks it (engines leave
        it out of texts, most keep it in token ids). A row that a length limit or a stop string ended is not finished.
        None: token ids say so by their last id; a text cannot.
      masks: for each row one number a response token, EOS included, 0 where the policy did not say it (a tool's output,
        a user's turn); what ``log_probs`` has there is not read. A row of zeros is absent. None: it said everything.
      prompt_length, response_length: P and R; None: those of the longest row. They count EOS.
      row_ids: [B] the data row of each prompt; None means 0..B-1.

    Returns:
      A Rollout with tokens, attention_mask, response_mask [B, P + R] int32, log_probs [B, P + R] float32 and row_ids.

    Raises:
      UserError: naming the row: not one log-probability (or mask) a token, one that is positive or not finite, an empty
        prompt or response, more tokens than P or R, an id outside the vocabulary, a policy that goes on after EOS.
    """
    num_rows = len(prompts)
    columns = {"responses": responses, "log_probs": log_probs, "finished": finished, "masks": masks, "row_ids": row_ids}
    for name, column in columns.items():
        if column is not None and len(column) != num_rows:
            raise UserError(f"{name}: expected one entry a prompt, {num_rows}, got {len(column)}")
    if not num_rows:
        raise UserError("prompts: expected at least one row, got none")
    rows = [
        _read_row(
            f"row {i}",
            prompts[i],
            responses[i],
            tokenizer,
            log_probs[i],
            None if finished is None else bool(finished[i]),
            None if masks is None else masks[i],
        )
        for i in range(num_rows)
    ]
    prompt_length = _width("prompt", [len(row.prompt) for row in rows], prompt_length)
    length = prompt_length + _width("response", [len(row.response) for row in rows], response_length)
    tokens = np.full((num_rows, length), tokenizer.pad_id, np.int32)
    attention_mask, response_mask = np.zeros((2, num_rows, length), np.int32)
    placed = np.zeros((num_rows, length), np.float32)
    for i, row in enumerate(rows):
        start, end = prompt_length - len(row.prompt), prompt_length + len(row.response)
        tokens[i, start:end] = np.concatenate([row.prompt, row.response])
        attention_mask[i, start:end] = 1
        response_mask[i, prompt_length:end] = row.said
        placed[i, prompt_length:end] = np.where(row.said, row.log_probs, 0.0)
    return Rollout(
        tokens=jnp.asarray(tokens),
        attention_mask=jnp.asarray(attention_mask),
        response_mask=jnp.asarray(response_mask),
        log_probs=jnp.asarray(placed),
        row_ids=jnp.asarray(np.arange(num_rows) if row_ids is None else row_ids, jnp.int32),
    )


def _read_row(
    where: str,
    prompt: str | Sequence[int] | np.ndarray,
    response: str | Sequence[int] | np.ndarray,
    tokenizer: Encoder,
    log_probs: Sequence[float | None] | np.ndarray,
    finished: bool | None,
    mask: Sequence[int] | np.ndarray | None,
) -> _Row:
    eos_id = tokenizer.eos_id
    prompt_ids, ids = (
        _ids(f"{where}, {name}", text, tokenizer) for name, text in (("prompt", prompt), ("response", response))
    )
    if not len(prompt_ids):
        raise UserError(f"{where}: the prompt has no tokens")
    in_hole = mask is not None and len(mask) == len(ids) > 0 and not mask[-1]
    ended = len(ids) > 0 and int(ids[-1]) == eos_id and not in_hole
    if finished is None and isinstance(response, str):
        raise UserError(
            f"{where}: a text does not show whether EOS ended it: give finished, True or False for each row"
        )
    if ended and finished is False:
        raise UserError(f"{where}: finished is False, but its last token is EOS, {eos_id}")
    adds_eos = bool(finished) and not ended
    if adds_eos:
        ids = np.append(ids, eos_id)
    if not len(ids):
        raise UserError(f"{where}: the response has no tokens, and EOS did not end it; leave the row out")
    try:
        numbers = np.asarray(log_probs, np.float32)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: log_probs must be numbers, one a token, got {log_probs!r:.80}") from error
    said = np.ones(len(ids), bool) if mask is None else np.asarray(mask) != 0
    for name, given in (("log_probs", numbers), ("masks", said)):
        if given.shape != ids.shape:
            eos = " (the EOS that finished adds included)" if adds_eos else ""
            advice = ""
            if isinstance(response, str):
                advice = "; a text need not encode into the tokens that were sampled: give token ids"
            raise UserError(f"{where}: {given.size} {name} for {len(ids)} response tokens{eos}{advice}")
    for t in np.flatnonzero(said & ~(np.isfinite(numbers) & (numbers <= 0))):
        raise UserError(
            f"{where}: the log-probability of response token {t} must be finite and at most 0: {numbers[t]}"
        )
    for t in np.flatnonzero(said[:-1] & (ids[:-1] == eos_id) & said[1:]):
        raise UserError(
            f"{where}: the policy goes on after EOS, response token {t} of {len(ids)}; end the row there, or give "
            "masks with 0 for what it did not say"
        )
    return _Row(prompt_ids, ids, said, numbers)


def _ids(where: str, text: str | Sequence[int] | np.ndarray, tokenizer: Encoder) -> np.ndarray:
    ids = np.asarray(tokenizer.encode(text) if isinstance(text, str) else text)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise UserError(f"{where}: expected a text or a list of token ids, got {text!r:.80}")
    for token_id in ids[(ids < 0) | (ids >= tokenizer.vocab_size)]:
        raise UserError(f"{where}: token id {token_id} is outside the vocabulary of {tokenizer.vocab_size}")
    return ids.astype(np.int32)


def _width(name: str, lengths: list[int], width: int | None) -> int:
    for i, length in enumerate(lengths):
        if width is not None and length > width:
            raise UserError(f"row {i}: the {name} has {length} tokens, {name}_length is {width}")
    return max(lengths) if width is None else width
