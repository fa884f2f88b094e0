"""Sampling for many askers at once: who comes later joins the others between two tokens.

Each sample has a slot, a row of ``sampling.generate`` with a cache, a column and settings of its
own. What it samples is a function of its prompt, key and settings, whatever the others are: the
tokens of ``sampling.generate``, up to ties within the rounding of the logits. Widths of prompts,
lengths and numbers of slots come from a few sizes, so that few programs are compiled.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rlhf_jax import models
from rlhf_jax.data import encoding
from rlhf_jax.runs import devices
from rlhf_jax.sampling import SamplingConfig, decoding
from rlhf_jax.types import Params

MOST_LIKELY = 20
"""Tokens whose log-probabilities can be asked for beside that of the sampled one."""
_NARROWEST = 16  # columns of a prompt
_SHORTEST = 256  # columns of a slot


class How(NamedTuple):
    """How samples are drawn, as ``SamplingConfig`` says: numbers, or an array [B] of each."""

    temperature: Any  # like the others 0 or at least 1e-30
    top_k: Any  # 0: all
    top_p: Any
    min_p: Any
    repetition_penalty: Any

    @classmethod
    def of(cls, config: SamplingConfig) -> "How":
        """The settings of a config."""
        return cls(
            config.temperature,
            config.top_k or 0,
            1.0 if config.top_p is None else config.top_p,
            config.min_p or 0.0,
            config.repetition_penalty,
        )


class Token(NamedTuple):
    """A token that was sampled."""

    id: int
    log_prob: float  # in nats, of the full softmax at the temperature, at 1 if that is 0
    likeliest: list[tuple[int, float]]  # the likeliest ids and their log-probabilities


@dataclasses.dataclass(eq=False, frozen=True)
class Sample:
    """A response to be sampled.

    key: its token t is drawn by ``fold_in(key, first_slot + t)``.
    likeliest: how many of the likeliest tokens are reported, at most ``MOST_LIKELY``.
    """

    key: Array
    how: How
    first_slot: int = 0
    likeliest: int = 0


class _Slots(NamedTuple):
    """B slots, each with the leaves [B, 1, ...] of a batch of one row."""

    rows: decoding.Rows  # with the data of keys
    state: decoding.DecodeState
    width: Any  # [B] columns of the prompt
    how: How


@dataclasses.dataclass
class _Group:
    """Slots of one length, and who has them."""

    slots: _Slots
    samples: list[Sample | None]

    @property
    def num_taken(self) -> int:
        return len(self.samples) - self.samples.count(None)


class Batch:
    """The responses that a model samples at present.

    Args:
        pad_id: of the tokenizer.
        positions: the most columns of prompt and response.
    """

    def __init__(self, model: models.Model, params: Params, *, pad_id: int, positions: int):
        self._model = model
        self._params = params
        self._pad_id = pad_id
        self._positions = positions
        self._begin, self._put, self._take, self._step = _compiled(model.config.num_layers)
        self._weights = jax.jit(model.for_decoding)(params)
        self._groups: dict[int, _Group] = {}

    def room(self, num_prompt: int, max_tokens: int, n: int) -> int:
        """The columns of all caches once ``n`` responses to such a prompt are there too."""
        length = self._length(num_prompt, max_tokens)
        group = self._groups.get(length)
        present = {length: len(group.samples) for length, group in self._groups.items()}
        present[length] = _size(n + (group.num_taken if group else 0))
        return sum(length * size for length, size in present.items())

    def columns(self, num_prompt: int, max_tokens: int, n: int) -> int:
        """The same without any others."""
        return self._length(num_prompt, max_tokens) * _size(n)

    def _width(self, num_prompt: int, max_tokens: int) -> int:
        return min(_power_of_two(num_prompt, _NARROWEST), self._positions - max_tokens)

    def _length(self, num_prompt: int, max_tokens: int) -> int:
        width = self._width(num_prompt, max_tokens)
        return min(_power_of_two(width + max_tokens, _SHORTEST), self._positions)

    def add(self, ids: Sequence[int], samples: Sequence[Sample], max_tokens: int) -> None:
        """Begins responses to a prompt, which is read once. Each is sampled until `remove`, for at
        most ``max_tokens``.
        """
        width = self._width(len(ids), max_tokens)
        length = self._length(len(ids), max_tokens)
        tokens, mask = encoding.left_padded([ids], width=width, pad_id=self._pad_id)
        rows, state = self._begin(
            self._model,
            self._params,
            tokens,
            mask,
            jax.random.key(0),  # the samples have their own
            max_new_tokens=length - width,
            pad_id=self._pad_id,
            places=np.zeros(1, np.int32),
            used=np.zeros(1, np.int32),
        )
        for number, sample in enumerate(samples):
            own = rows._replace(
                keys=jax.random.key_data(sample.key)[None],
                used=np.array([sample.first_slot], np.int32),
            )
            one = _Slots(own, state, np.int32(width), How(*map(np.float32, sample.how)))
            if length not in self._groups:
                slots = jax.tree.map(lambda x: jnp.asarray(x)[None], one)
                self._groups[length] = _Group(slots, [None])
            group = self._groups[length]
            size = _size(group.num_taken + len(samples) - number)
            if size > len(group.samples):
                self._resize(group, size)
            place = group.samples.index(None)
            group.slots = self._put(group.slots, one, place)
            group.samples[place] = sample

    def _resize(self, group: _Group, size: int) -> None:
        """Keeps the slots that are taken, in ``size`` slots."""
        taken = [place for place, sample in enumerate(group.samples) if sample is not None]
        places = np.array(taken + [0] * (size - len(taken)), np.int32)
        group.slots = self._take(group.slots, places)
        kept = [group.samples[place] for place in taken]
        group.samples = kept + [None] * (size - len(taken))

    def remove(self, sample: Sample) -> None:
        """Frees the slot of a sample, if it has one."""
        for length, group in self._groups.items():
            if sample in group.samples:
                group.samples[group.samples.index(sample)] = None
                if not group.num_taken:
                    del self._groups[length]
                elif _size(2 * group.num_taken) < len(group.samples):
                    self._resize(group, _size(2 * group.num_taken))
                return

    def clear(self) -> None:
        """Frees all slots."""
        self._groups.clear()

    def step(self) -> Iterator[tuple[Sample, Token]]:
        """Samples a token of each response."""
        drawn = []  # of all groups, before a reader of the tokens changes them
        for group in self._groups.values():
            most = max(sample.likeliest for sample in group.samples if sample is not None)
            number = min(MOST_LIKELY, self._model.config.vocab_size) if most else 0
            group.slots, sampled = self._step(self._model, self._weights, group.slots, number)
            drawn.append((list(group.samples), sampled))
        for owners, sampled in drawn:
            for sample, id, log_prob, *ranked in zip(
                owners, *(x.tolist() for x in jax.device_get(sampled)), strict=True
            ):
                if sample is not None:
                    likeliest = list(zip(*ranked, strict=True))[: sample.likeliest]
                    yield sample, Token(id, log_prob, likeliest)


def _power_of_two(number: int, least: int) -> int:
    return max(least, 1 << (number - 1).bit_length())


def _size(number: int) -> int:
    """Slots for a number of samples: a power of four, so that few sizes are compiled."""
    return 4 ** -(-(number - 1).bit_length() // 2)


@functools.cache
def _compiled(num_layers: int) -> tuple[Any, Any, Any, Any]:
    """What reads a prompt; what puts a slot among others, overwriting them; what takes some of
    them; and what samples a token into each.
    """

    def put(slots: _Slots, one: _Slots, place: Array) -> _Slots:
        def replaced(x: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_index_in_dim(x, new, place, 0)

        return jax.tree.map(replaced, slots, one)

    def take(slots: _Slots, places: Array) -> _Slots:
        return jax.tree.map(lambda x: x[places], slots)

    jit = functools.partial(jax.jit, compiler_options=devices.compiler_options(num_layers))
    return (
        jit(decoding.start, static_argnames=("model", "max_new_tokens", "pad_id")),
        jax.jit(put, donate_argnames="slots"),
        jax.jit(take),
        jit(_step, static_argnames=("model", "number"), donate_argnames="slots"),
    )


def _step(
    model: models.Model, weights: Params, slots: _Slots, number: int
) -> tuple[_Slots, tuple[Array, ...]]:
    """The slots after one more token; the tokens [B], their log-probs [B], and the ``number``
    likeliest tokens with theirs [B, number].
    """
    rows, state, width, how = slots
    next_logits = functools.partial(decoding.next_logits, model, weights)
    logits, cache = jax.vmap(next_logits)(rows, state, width)
    columns = jnp.arange(state.tokens.shape[-1])[None]
    seen = (columns <= state.column[:, None]) & (rows.key_mask[:, 0] != 0)
    column = state.column + 1
    row_keys = jax.random.wrap_key_data(rows.keys[:, 0])
    keys = jax.vmap(jax.random.fold_in)(row_keys, rows.used[:, 0] + column - width)
    tokens, log_probs = _draw(logits[:, 0, 0], keys, state.tokens[:, 0], seen, how)
    chosen = jnp.take_along_axis(log_probs, tokens[:, None], axis=-1)[:, 0]
    best, likeliest = jax.lax.top_k(log_probs, number)
    written = state.tokens.at[jnp.arange(len(tokens)), 0, column].set(tokens)
    state = state._replace(column=column, tokens=written, cache=cache)
    return slots._replace(state=state), (tokens, chosen, likeliest, best)


def _draw(logits: Array, keys: Array, tokens: Array, seen: Array, how: How) -> tuple[Array, Array]:
    """Tokens [B] drawn from logits [B, V] as `decoding.step` draws them, and all log-probs
    [B, V].
    """
    temperature, top_k, top_p, min_p, penalty = (value[:, None] for value in how)
    logits = logits.astype(jnp.float32)

    def penalised(logits: Array) -> Array:
        return decoding.penalised(logits, tokens, counts=seen, penalty=penalty)

    def truncated(logits: Array) -> Array:
        ranked = jnp.sort(logits, axis=-1, descending=True)
        most = jnp.where(top_k > 0, jnp.minimum(top_k, logits.shape[-1]), logits.shape[-1])
        least = jnp.take_along_axis(ranked, most.astype(jnp.int32) - 1, axis=-1)
        logits = jnp.where(logits < least, -jnp.inf, logits)
        logits = jnp.where(top_p < 1, decoding.nucleus(logits, top_p), logits)
        least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(min_p)
        return jnp.where(logits < least, -jnp.inf, logits)

    noisy = jax.lax.cond(jnp.any(penalty != 1), penalised, lambda logits: logits, logits)
    scale = jnp.where(temperature > 0, temperature, 1.0)
    logits = at_temperature(logits, scale)
    noisy = at_temperature(noisy, scale)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    limits = (temperature > 0) & ((top_k > 0) | (top_p < 1) | (min_p > 0))
    possible = jax.lax.cond(jnp.any(limits), truncated, lambda logits: logits, noisy)
    noisy = jnp.where(temperature > 0, possible + noise, noisy)
    return jnp.argmax(noisy, axis=-1).astype(jnp.int32), jax.nn.log_softmax(logits, axis=-1)


def at_temperature(logits: Array, temperature: Array) -> Array:
    """Logits [..., V] divided by a temperature above 0, the largest one moved to 0 before: at a low
    temperature it would be infinite, or its rounding larger than a log-prob.
    """
    return (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
