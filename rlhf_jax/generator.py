"""Texts in, texts out: a language model as a user meets it."""

import collections
import functools
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import models, rewards, sampling
from rlhf_jax.data import encoding, tokenizers
from rlhf_jax.data.rows import Prompt
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.types import Params, Rollout

_BUCKET = 16  # prompts are padded to a multiple of this many tokens, so that few shapes are compiled


class LanguageModel(NamedTuple):
    """A model, its parameters and the tokenizer that made its vocabulary."""

    model: models.Model
    params: Params
    tokenizer: Tokenizer


def load(source: str | Path, **compute: Any) -> LanguageModel:
    """A Hugging Face folder (or name) with its tokenizer; the vocabulary grows if the tokenizer gained a pad.

    compute: as in ``models.load``.

    Raises:
        UserError: the folder lacks a file, or the tokenizer has more entries than the model.
    """
    model, params = models.load(source, **compute)
    tokenizer = tokenizers.load_tokenizer(source)
    size = model.config.vocab_size
    if tokenizer.vocab_size == size + 1 and tokenizer.pad_id == size:
        model, params = models.resize_vocabulary(model, params, tokenizer.vocab_size)
    elif tokenizer.vocab_size > size:
        raise UserError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} entries but the model only {size} embeddings; "
            "save the tokenizer that the model was trained with in this folder."
        )
    return LanguageModel(model, jax.tree.map(jnp.asarray, params), tokenizer)


class Generations(NamedTuple):
    """Responses to prompts: N = prompts * samples rows, those of one prompt adjacent."""

    texts: list[str]
    """[N] without special tokens."""
    log_probs: np.ndarray
    """[N] float32, of the whole response: the sum of ``token_log_probs``, in nats."""
    rewards: np.ndarray | None
    """[N] float32, the reward model's scores; None without one."""
    token_log_probs: list[np.ndarray]
    """[N] arrays [response tokens], EOS included: of the full softmax at the temperature (at temperature 0: of 1)."""
    finished: np.ndarray
    """[N] bool, whether EOS ended the response, rather than ``max_new_tokens``."""


class _Generation(NamedTuple):
    text: str
    log_probs: np.ndarray  # [response tokens]
    finished: bool
    reward: float


class Generator:
    """A policy, and a reward model beside it if wanted, from the folders that a run leaves.

        generator = Generator("runs/ppo/model", reward_model="runs/rm/model", max_new_tokens=64)
        generations = generator(["Name a prime.", "Is ice warm?"], seed=0)
        print(generations.texts, generations.log_probs, generations.rewards)

    Args:
        folder: a Hugging Face folder (or name) with its tokenizer.
        reward_model: that of a reward model with the same tokenizer.
        max_new_tokens: response slots R.
        temperature: divides the logits; 0 takes the most likely token.
        top_k, top_p: as in ``sampling.SamplingConfig``.
        template: what the model reads for a prompt, as ``text.template`` of the run.
        batch_size: at most this many rows at once.
        compute: as in ``models.load``, such as ``compute_dtype="bfloat16"``.

    Raises:
        UserError: a folder cannot be read, the policy is a reward model or the reward model none, their tokenizers
            differ, or ``max_new_tokens`` leaves no room for a prompt.
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        folder: str | Path,
        reward_model: str | Path | None = None,
        *,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        template: str = "{prompt}",
        batch_size: int = 64,
        **compute: Any,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.template, self.batch_size = template, batch_size
        self.model, self._params, self.tokenizer = load(folder, **compute)
        if "score" in self._params:
            raise UserError(f"{folder}: this is a reward model, which says nothing; give the policy first")
        self.config = sampling.SamplingConfig(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            eos_id=self.tokenizer.eos_id,
            pad_id=self.tokenizer.pad_id,
        )
        self._sample = jax.jit(functools.partial(sampling.generate, self.model, config=self.config))
        self._reward, positions = None, self.model.config.max_length
        if reward_model is not None:
            judge, params, tokenizer = load(reward_model, **compute)
            if "score" not in params:
                raise UserError(f"{reward_model}: this model has no score head; give a reward model's folder")
            if tokenizer.fingerprint != self.tokenizer.fingerprint:
                raise UserError(f"{reward_model}: the reward model's tokenizer is not that of {folder}")
            self._reward = rewards.from_model(models.score_fn(judge), params)
            positions = min(positions, judge.config.max_length)
        self._score = jax.jit(lambda reward, rollout: reward(rollout)[0])
        self._room = positions - max_new_tokens
        if self._room < 1:
            raise UserError(
                f"{folder}: max_new_tokens {max_new_tokens} leaves no room for a prompt in {positions} positions"
            )

    def __call__(self, prompts: Sequence[str], *, seed: int = 0, num_samples: int = 1) -> Generations:
        """Samples ``num_samples`` responses to each prompt.

        A response is a function of seed, prompt, and which of the prompt's samples it is: the first one to a prompt is
        the same whatever else is asked, in whatever batches (up to ties within the rounding of the logits). A prompt
        that is given twice gets its next samples the second time.

        Raises:
            UserError: naming the prompt, such as ``prompts[3]``: it is no text, too long, holds a character that the
                tokenizer lacks, or makes no token; or the template has no ``{prompt}``.
            ValueError: ``num_samples`` is below 1.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        if isinstance(prompts, str):
            raise UserError("expected a list of prompts, got one text; put it in a list")
        for i, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise UserError(f"prompts[{i}]: expected a text, got {type(prompt).__name__}")
        rows = [Prompt(prompt, f"prompts[{i}]") for i, prompt in enumerate(prompts)]
        encoded = encoding.prompt_ids(rows, self.tokenizer, self.template)
        for row, ids in zip(rows, encoded, strict=True):
            if len(ids) > self._room:
                raise UserError(
                    f"{row.source}, {row.prompt[:40]!r}: has {len(ids)} tokens, and {self._room} of the model's "
                    f"positions are left beside max_new_tokens {self.config.max_new_tokens}; shorten one of the two"
                )
        before: collections.Counter[tuple[int, ...]] = collections.Counter()
        wanted: list[tuple[tuple[int, ...], int]] = []  # (prompt, which of its samples)
        for key in map(tuple, encoded):
            wanted += [(key, before[key] + sample) for sample in range(num_samples)]
            before[key] += num_samples
        # A prompt's own length alone decides how far it is padded, so that its neighbours change nothing.
        widths = [min(-(-len(ids) // _BUCKET) * _BUCKET, self._room) for ids, _ in wanted]
        found: dict[int, _Generation] = {}
        for width in sorted(set(widths)):
            places = [i for i, its in enumerate(widths) if its == width]
            for start in range(0, len(places), self.batch_size):
                batch = places[start : start + self.batch_size]
                found |= zip(batch, self._generations([wanted[i] for i in batch], width, seed), strict=True)
        done = [found[i] for i in range(len(wanted))]
        return Generations(
            texts=[row.text for row in done],
            log_probs=np.array([row.log_probs.sum() for row in done], np.float32),
            rewards=None if self._reward is None else np.array([row.reward for row in done], np.float32),
            token_log_probs=[row.log_probs for row in done],
            finished=np.array([row.finished for row in done], bool),
        )

    def _generations(self, wanted: Sequence[tuple[tuple[int, ...], int]], width: int, seed: int) -> "list[_Generation]":
        """One batch; of a power of two rows, completed with absent ones, so that few shapes are compiled."""
        size = min(1 << (len(wanted) - 1).bit_length(), self.batch_size)
        tokens = np.full((size, width), self.tokenizer.pad_id, np.int32)
        attention_mask = np.zeros((size, width), np.int32)
        row_ids = np.zeros(size, np.int32)
        for i, (ids, sample) in enumerate(wanted):
            tokens[i, width - len(ids) :] = ids
            attention_mask[i, width - len(ids) :] = 1
            # The row's random stream: of the prompt and the sample's number, not of the place in the batch.
            row_ids[i] = zlib.crc32(np.array([sample, *ids], "<i4").tobytes()) & 0x7FFFFFFF
        rollout = self._sample(self._params, tokens, attention_mask, jax.random.key(seed), row_ids=row_ids)
        scores = np.zeros(size) if self._reward is None else np.asarray(self._score(self._reward, rollout))
        rollout = jax.device_get(rollout)
        said = [mask != 0 for mask in rollout.response_mask[: len(wanted)]]
        texts = responses(rollout, self.tokenizer)
        return [
            _Generation(
                texts[i],
                rollout.log_probs[i, here],
                bool(rollout.tokens[i, here][-1] == self.tokenizer.eos_id),
                scores[i],
            )
            for i, here in enumerate(said)
        ]


def generate(
    model: models.Model,
    params: Params,
    tokens: np.ndarray,
    attention_mask: np.ndarray,
    key: jax.Array,
    config: sampling.SamplingConfig,
    batch_size: int = 64,
) -> Rollout:
    """Samples a response to each of N left-padded prompts [N, P], ``batch_size`` at a time; a NumPy Rollout of N rows.

    Row i is sampled as row i whatever the batch size. The last batch is filled up with absent rows, so one program is
    compiled.
    """
    step = jax.jit(functools.partial(sampling.generate, model, config=config))
    num_rows = len(tokens)
    padding = -num_rows % batch_size
    tokens = np.pad(tokens, ((0, padding), (0, 0)))
    attention_mask = np.pad(attention_mask, ((0, padding), (0, 0)))
    row_ids = np.arange(num_rows + padding, dtype=np.int32)
    parts = [
        jax.device_get(step(params, tokens[rows], attention_mask[rows], key, row_ids=row_ids[rows]))
        for rows in np.split(row_ids, len(row_ids) // batch_size)
    ]
    return jax.tree.map(lambda *xs: np.concatenate(xs)[:num_rows], *parts)


def responses(rollout: Rollout, tokenizer: Tokenizer) -> list[str]:
    """The text of each row's response, special tokens left out."""
    return [
        tokenizer.decode([int(token) for token in tokens[mask != 0]])
        for tokens, mask in zip(np.asarray(rollout.tokens), np.asarray(rollout.response_mask), strict=True)
    ]
