"""From prompts to the rollout of an update: sample, or take another engine's samples, then score
with the update's own forward pass.

Decoding with a cache rounds differently than a full forward pass (by 3e-6 in float32, 5e-2 in
bfloat16). So the sampler's log-probs are replaced by those of the policy function that the update
will use. With unchanged parameters the ratio of the first minibatch is then 1 up to the rounding of
one function compiled in two programs: it was within 1e-6 of 1 in float32, within .03 in bfloat16.
Samples of another engine (``from_text``) are rescored in the same way.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from rlhf_jax import losses, ops
from rlhf_jax.errors import UserError
from rlhf_jax.models import policy_params
from rlhf_jax.policies import as_policy
from rlhf_jax.sampling import CachedModel, SamplingConfig, generate
from rlhf_jax.types import BoundPolicyFn, Params, PolicyFn, Rollout


def collect(
    model: CachedModel,
    params: Params,
    tokens: Array,
    attention_mask: Array,
    key: Array,
    *,
    sampling: SamplingConfig,
    policy_fn: PolicyFn,
    ref_fn: BoundPolicyFn | None = None,
    row_ids: Array | None = None,
    places: Array | None = None,
    mesh: Mesh | None = None,
) -> Rollout:
    """Responses [B, T] to prompts [B, P] with log-probs, values and reference log-probs; no scores
    yet.

    ``generate`` followed by ``rescore``; call the two yourself to measure ``sampler_gap`` between
    them. Under top-k, top-p or min-p the ``support`` of each token is recorded, and all log-probs
    are those among its ids. ``policy_fn`` and ``ref_fn`` must divide logits by
    ``sampling.temperature``; one that is known to have another temperature is a ValueError, and so
    is one whose ``prompt_length`` is more than P. With a whole value model ``params`` are
    {"policy", "value"}, as in ``models.policy_fn``.
    """
    policy = policy_params(params)
    sampling = replace(sampling, record_support=sampling.truncates)
    sampled = generate(
        model,
        policy,
        tokens,
        attention_mask,
        key,
        config=sampling,
        row_ids=row_ids,
        places=places,
        mesh=mesh,
    )
    return rescore(sampled, params, policy_fn=policy_fn, ref_fn=ref_fn)


def rescore(
    rollout: Rollout,
    params: Params,
    *,
    policy_fn: PolicyFn,
    ref_fn: BoundPolicyFn | None = None,
    importance_cap: float | None = None,
    importance_floor: float = 0.0,
    importance_sampling: losses.ImportanceSampling = "token_truncate",
) -> Rollout:
    """The rollout with ``log_probs`` and ``values`` [B, T] of ``policy_fn``, ``ref_log_probs`` [B,
    T] of ``ref_fn``.

    All are float32 and 0 outside the response. ``values`` is None if the policy has no value
    function. Dropout is off. ``ref_fn`` holds its parameters: ``jax.tree_util.Partial(policy_fn,
    ref_params)``.

    With ``importance_cap``, a number above 0, the rollout gets ``importance_weights`` [B, T] too,
    which correct for an engine whose probabilities differ from the policy's:
    ``losses.importance_weights`` of the log-probs of policy_fn and the rollout's own, per token or
    per row, truncated at the floor and the cap or masked beyond them. ``math.inf`` is no limit. Its
    own are those of what sampled, ``sampler_log_probs``, however often it is scored.
    """
    mask = rollout.mask
    of_sampler = rollout.sampler_log_probs
    if of_sampler is None:
        of_sampler = rollout.log_probs
    output = ops.evaluate(policy_fn, params, rollout)
    log_probs = ops.masked(output.log_probs, mask)
    values = None if output.values is None else ops.masked(output.values, mask)
    scored = replace(rollout, log_probs=log_probs, values=values, sampler_log_probs=of_sampler)
    if importance_cap is not None:
        weights = losses.importance_weights(
            log_probs,
            behaviour_log_probs=of_sampler,
            mask=mask,
            cap=importance_cap,
            floor=importance_floor,
            how=importance_sampling,
        )
        scored = replace(scored, importance_weights=weights)
    if ref_fn is not None:
        reference = as_policy(ref_fn).evaluate(rollout, name="ref_fn")
        scored = replace(scored, ref_log_probs=ops.masked(reference.log_probs, mask))
    return scored


def sampler_gap(sampled: Rollout, rescored: Rollout) -> Array:
    """The largest ``|log-prob difference|`` [] over response tokens, in nats; 0 if there are none.

    More than rounding (about 1e-5 in float32, 1e-1 in bfloat16) means that sampler and policy
    function disagree: by temperature, by parameters, or by a bug.
    """
    gap = jnp.abs(sampled.log_probs - rescored.log_probs)
    return jnp.max(ops.masked(gap, sampled.mask), initial=0.0)


def truncated_share(
    rollout: Rollout, importance_cap: float, *, importance_floor: float = 0.0
) -> Array:
    """The share [] of response tokens whose importance weight reached the cap or the floor given to
    ``rescore``, or was masked beyond them; 0 if there are no response tokens. Weights masked by a
    divergence have no cap of their own: give ``math.inf``.
    """
    weights = rollout.importance_weights
    if weights is None:
        raise ValueError(
            "rollout.importance_weights is None: give rollout.rescore an importance_cap"
        )
    is_limited = (weights >= importance_cap) | (weights <= importance_floor)
    return ops.masked_mean(is_limited, rollout.response_mask)


class Encoder(Protocol):
    """The part of a tokenizer that ``from_text`` uses. ``encode`` adds no ids before or after those
    of the text.
    """

    @property
    def pad_id(self) -> int: ...
    @property
    def eos_ids(self) -> tuple[int, ...]: ...
    @property
    def vocab_size(self) -> int: ...
    def encode(self, text: str, /) -> list[int]: ...


Ids = Sequence[int] | np.ndarray


class _Row(NamedTuple):
    prompt: np.ndarray  # [prompt tokens]
    response: np.ndarray  # [response tokens], holes and EOS included
    mask: np.ndarray  # [response tokens] bool, the policy's own tokens
    log_probs: np.ndarray  # [response tokens] float32


def from_text(
    prompts: Sequence[str | Ids],
    responses: Sequence[str | Ids],
    tokenizer: Encoder,
    *,
    log_probs: Sequence[Sequence[float | None] | np.ndarray],
    finished: Sequence[bool] | None = None,
    masks: Sequence[Ids] | None = None,
    prompt_length: int | None = None,
    response_length: int | None = None,
    row_ids: Ids | None = None,
    temperature: float | None = None,
    extras: Mapping[str, Sequence[float | Sequence[float] | np.ndarray]] | None = None,
) -> Rollout:
    """A rollout of samples that another engine drew: B rows of texts or token ids with their
    log-probabilities.

    Token ids are the safe form: a text need not encode into the tokens that were sampled.
    Call ``rescore`` next, with a ``policy_fn`` of the temperature at which the samples were drawn.

    Args:
      prompts: B texts, or lists of token ids; padded on the left.
      responses: B texts, or lists of token ids; padded on the right.
      tokenizer: the run's own; it encodes the texts of prompt and response separately.
      log_probs: for each row the log-probability (nats) that the engine gave each response token,
        EOS included.
      finished: for each row whether EOS ended it. A finished row without EOS gets one at its end
        (engines leave it out of texts, most keep it in token ids). A row that a length limit or a
        stop string ended is not finished. None: the last token id decides; a text needs True or
        False.
      masks: for each row one number for each response token, EOS included; 0 marks tokens that the
        policy did not sample (a tool's output, a user's turn), whose ``log_probs`` are ignored. A
        row of zeros is missing. None: the policy sampled all tokens.
      prompt_length, response_length: P and R, EOS included; None: those of the longest row.
      row_ids: [B] the data row of each prompt; None means 0..B-1.
      temperature: of the samples; ``rescore`` refuses a ``policy_fn`` of another one. None:
        unknown.
      extras: what else the engine says, {name: for each row a number, or one for each response
        token, EOS included}.

    Returns:
      A Rollout with tokens, attention_mask, response_mask [B, P + R] int32, log_probs [B, P + R]
      float32, row_ids, and extras [B] or [B, P + R] float32.

    Raises:
      UserError: naming the row: not one log-probability (or mask) for each token, one that is
        positive or not finite, an empty prompt or response, more tokens than P or R, an id outside
        the vocabulary, tokens of the policy after its EOS.
    """
    num_rows = len(prompts)
    if not num_rows:
        raise UserError("prompts: expected at least one row, got none")
    entries = zip(
        prompts,
        _column("responses", responses, num_rows),
        _column("log_probs", log_probs, num_rows),
        _column("finished", finished, num_rows),
        _column("masks", masks, num_rows),
        strict=True,
    )
    rows = [_read_row(f"row {i}", tokenizer, *entry) for i, entry in enumerate(entries)]
    p = _width("prompt", [len(row.prompt) for row in rows], prompt_length)
    r = _width("response", [len(row.response) for row in rows], response_length)
    ids = np.arange(num_rows) if row_ids is None else _column("row_ids", row_ids, num_rows)
    padded = _padded(rows, p, r, tokenizer.pad_id)
    arrays = {
        name: _extra(name, _column(name, column, num_rows), rows, padded.tokens.shape, p)
        for name, column in (extras or {}).items()
    }
    return replace(
        padded,
        row_ids=jnp.asarray(ids, jnp.int32),
        temperature=temperature,
        extras=arrays or None,
    )


def _extra(name: str, column: Any, rows: list[_Row], shape: tuple[int, ...], p: int) -> Array:
    """An extra [B] of numbers; or [B, T], 0 outside the response, of numbers for its tokens."""
    if all(np.ndim(entry) == 0 for entry in column):
        return jnp.asarray(column, jnp.float32)
    values = np.zeros(shape, np.float32)
    for i, (row, entry) in enumerate(zip(rows, column, strict=True)):
        if np.shape(entry) != row.response.shape:
            raise UserError(
                f"row {i}: extras {name!r} has {np.size(entry)} numbers for {len(row.response)} "
                "response tokens, EOS included"
            )
        values[i, p : p + len(row.response)] = entry
    return jnp.asarray(values)


def _padded(rows: list[_Row], p: int, r: int, pad_id: int) -> Rollout:
    """The rows with prompts padded on the left to p tokens, and responses on the right to r."""
    shape = (len(rows), p + r)
    tokens = np.full(shape, pad_id, np.int32)
    attention_mask = np.zeros(shape, np.int32)
    response_mask = np.zeros(shape, np.int32)
    log_probs = np.zeros(shape, np.float32)
    for i, row in enumerate(rows):
        start = p - len(row.prompt)
        end = p + len(row.response)
        tokens[i, start:end] = np.concatenate([row.prompt, row.response])
        attention_mask[i, start:end] = 1
        response_mask[i, p:end] = row.mask
        log_probs[i, p:end] = np.where(row.mask, row.log_probs, 0.0)
    arrays = (tokens, attention_mask, response_mask, log_probs)
    return Rollout(*map(jnp.asarray, arrays), prompt_length=p)


def _column(name: str, column: Any, num_rows: int) -> Any:
    """The entries of all rows; None for each of them if no column is given."""
    if column is None:
        return [None] * num_rows
    if len(column) != num_rows:
        raise UserError(
            f"{name}: expected one entry for each prompt, {num_rows}, got {len(column)}"
        )
    return column


def _read_row(
    where: str,
    tokenizer: Encoder,
    prompt: str | Ids,
    response: str | Ids,
    log_probs: Any,
    finished: bool | None,
    mask: Ids | None,
) -> _Row:
    if finished is None and isinstance(response, str):
        raise UserError(
            f"{where}: a text does not show whether EOS ended it: give finished, True or False for "
            "each row"
        )
    prompt_ids = _ids(f"{where}, prompt", prompt, tokenizer)
    if not len(prompt_ids):
        raise UserError(f"{where}: the prompt has no tokens")
    ids = _ids(f"{where}, response", response, tokenizer)
    ids = _with_eos(where, ids, tokenizer, finished, mask)
    try:
        numbers = np.asarray(log_probs, np.float32)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{where}: log_probs must be numbers, one for each token, got {log_probs!r:.80}"
        ) from error
    sampled = np.ones(len(ids), bool) if mask is None else np.asarray(mask) != 0
    for name, column in (("log_probs", numbers), ("masks", sampled)):
        if column.shape != ids.shape:
            raise UserError(
                f"{where}: {column.size} {name} for {len(ids)} response tokens, EOS included; a "
                "text need not encode into the tokens that were sampled: token ids are safer"
            )
    row = _Row(prompt_ids, ids, sampled, numbers)
    _check_tokens(where, row, tokenizer)
    return row


def _with_eos(
    where: str, ids: np.ndarray, tokenizer: Encoder, finished: bool | None, mask: Ids | None
) -> np.ndarray:
    """The ids of a response, with EOS at the end if the row is finished."""
    # The last token may be the EOS of another speaker's turn, which did not end the row.
    others_turn = mask is not None and len(mask) == len(ids) > 0 and not mask[-1]
    ends_with_eos = np.isin(ids[-1:], tokenizer.eos_ids).any()
    has_eos = ends_with_eos and not others_turn
    if has_eos and finished is not None and not finished:
        raise UserError(f"{where}: finished is False, but its last token is EOS, {ids[-1]}")
    if finished and not has_eos:
        return np.append(ids, tokenizer.eos_ids[0])
    if not len(ids):
        raise UserError(
            f"{where}: the response has no tokens, and EOS did not end it; leave the row out"
        )
    return ids


def _check_tokens(where: str, row: _Row, tokenizer: Encoder) -> None:
    """Checks that the policy's log-probs are log-probabilities, and that none of its tokens follows
    its EOS.
    """
    is_log_prob = np.isfinite(row.log_probs) & (row.log_probs <= 0)
    for t in np.flatnonzero(row.mask & ~is_log_prob):
        raise UserError(
            f"{where}: the log-probability of response token {t} must be finite and at most 0: "
            f"{row.log_probs[t]}"
        )
    is_eos = row.mask & np.isin(row.response, tokenizer.eos_ids)
    for t in np.flatnonzero(is_eos[:-1] & row.mask[1:]):
        raise UserError(
            f"{where}: the policy has tokens after EOS, response token {t} of {len(row.response)}; "
            "end the row there, or give masks with 0 for the tokens of others"
        )


def _ids(where: str, text: str | Ids, tokenizer: Encoder) -> np.ndarray:
    ids = np.asarray(tokenizer.encode(text) if isinstance(text, str) else text)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise UserError(f"{where}: expected a text or a list of token ids, got {text!r:.80}")
    for token_id in ids[(ids < 0) | (ids >= tokenizer.vocab_size)]:
        raise UserError(
            f"{where}: token id {token_id} is outside the vocabulary of {tokenizer.vocab_size}"
        )
    return ids.astype(np.int32)


def _width(name: str, lengths: list[int], width: int | None) -> int:
    for i, length in enumerate(lengths):
        if width is not None and length > width:
            raise UserError(f"row {i}: the {name} has {length} tokens, {name}_length is {width}")
    return max(lengths) if width is None else width
