"""Texts in, texts out: a language model as a user meets it."""

import collections
import functools
import json
import operator
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import models, ops, sampling
from rlhf_jax.data import batches, chat, encoding, tokenizers
from rlhf_jax.data.environment import Source, converse, function_of, load_environment
from rlhf_jax.data.rows import Message, Record, Row
from rlhf_jax.errors import UserError, logger
from rlhf_jax.models import hf
from rlhf_jax.runs import devices
from rlhf_jax.sampling import SamplingConfig
from rlhf_jax.types import Params, Rollout

_BUCKET = 16  # tokens: what widths of prompts are multiples of, so that few shapes are compiled


@functools.cache
def _sampler(num_layers: int) -> Any:
    """``sampling.generate``, compiled once for each model, config and shape."""
    options = devices.compiler_options(num_layers)
    return jax.jit(sampling.generate, static_argnames=("model", "config"), compiler_options=options)


class LanguageModel(NamedTuple):
    """A model, its parameters and the tokenizer that made its vocabulary."""

    model: models.Model
    params: Params
    tokenizer: tokenizers.Tokenizer

    @classmethod
    def load(cls, source: str | Path, **compute: Any) -> "LanguageModel":
        """A Hugging Face folder (or name) with its tokenizer; the vocabulary grows if the tokenizer
        gained a pad. A pad id of the model's config that ends texts too is replaced: transformers
        takes the score of a reward model from the last token that is no pad.

        The ``eos_token_id`` of generation_config.json, or else of config.json, may be a list: each
        of them ends a response, and so does the tokenizer's own.

        compute: as in ``models.load``.

        Raises:
            UserError: the folder lacks a file, or the tokenizer has more entries than the model.
        """
        model, params = models.load(source, **compute)
        tokenizer, size = tokenizers.load_tokenizer(source), model.config.vocab_size
        if tokenizer.vocab_size == size + 1 and tokenizer.pad_id == size:
            model, params = models.resize_vocabulary(model, params, tokenizer.vocab_size)
        elif tokenizer.vocab_size > size:
            has = (
                f"the tokenizer has {tokenizer.vocab_size} entries but the model only {size} "
                "embeddings"
            )
            raise UserError(
                f"{source}: {has}; save the tokenizer that the model was trained with in this "
                "folder."
            )
        file = hf.find_folder(source) / "generation_config.json"
        ends = (hf.read_json(file) if file.exists() else {}).get(
            "eos_token_id", model.config.eos_token_id
        )
        ids = np.ravel(() if ends is None else ends).tolist()
        others = tuple(i for i in ids if i != tokenizer.eos_id and 0 <= i < size)
        tokenizer = replace(tokenizer, other_eos_ids=others)
        if model.config.pad_token_id in tokenizer.eos_ids:
            model = models.build(replace(model.config, pad_token_id=tokenizer.pad_id))
        return cls(model, jax.tree.map(jnp.asarray, params), tokenizer)

    def save(self, folder: str | Path, *, template: str, config: SamplingConfig) -> None:
        """Writes a folder that ``load``, transformers and chat clients read; for them with the
        run's prompts, sampling.

        Args:
            folder: made if missing, its files replaced.
            template: the run's ``text.template``, for the tokenizer's chat template
                (``chat.with_text_template``).
            config: for generation_config.json: how transformers samples by default. Not how long:
                lm-eval and vLLM would end their responses there, whatever a task allows. A reward
                model has no such file.
        """
        models.save(folder, self.model, self.params)
        chat.with_text_template(self.tokenizer, template).save(folder)
        keys: dict[str, Any] = {"do_sample": config.temperature > 0}
        ends = config.eos_ids if len(config.eos_ids) > 1 else next(iter(config.eos_ids), None)
        keys |= {"eos_token_id": ends, "pad_token_id": config.pad_id}
        if config.temperature > 0:  # without top_k transformers takes the likeliest 50
            keys |= {
                "temperature": config.temperature,
                "top_k": config.top_k or 0,
                "top_p": config.top_p or 1.0,
            }
        if "score" not in self.params:
            (Path(folder) / "generation_config.json").write_text(
                json.dumps(keys, indent=2) + "\n", encoding="utf-8"
            )

    def sample(
        self,
        tokens: Any,
        mask: Any,
        key: jax.Array,
        *,
        config: SamplingConfig,
        batch_size: int = 64,
        **by_row: Any,
    ) -> Rollout:
        """Samples a response to each of N left-padded prompts [N, P], ``batch_size`` at a time; a
        NumPy Rollout.

        Prompts of like length form a batch, without the columns that are padding in all
        (`batches.prompt_width`).

        by_row: ``row_ids`` and ``used`` [N], as ``sampling.generate`` has them. Row i is sampled as
            row ``row_ids[i]`` (none given: i) whatever the batch size.
        """
        by_row = {"row_ids": np.arange(len(tokens), dtype=np.int32)} | by_row
        columns = np.shape(tokens)[1]

        def sample(tokens: np.ndarray, mask: np.ndarray, by_row: dict[str, np.ndarray]) -> Rollout:
            sample = _sampler(self.model.config.num_layers)
            sampled = sample(self.model, self.params, tokens, mask, key, config=config, **by_row)
            return replace(sampled, prompt_length=columns)

        sampled = _by_length(sample, batch_size, tokens, mask, by_row)
        return replace(
            sampled, tokens=np.concatenate([tokens, sampled.tokens[:, columns:]], axis=1)
        )


class Generations(NamedTuple):
    """Responses to prompts: N = prompts * samples rows, those of one prompt adjacent."""

    texts: list[str]
    """[N] without special tokens; of several turns the policy's words alone, one response after the
    other.
    """
    transcripts: list[str]
    """[N] the same with an environment's replies in their places."""
    log_probs: np.ndarray
    """[N] float32, of the whole response: the sum of ``token_log_probs``, in nats."""
    rewards: np.ndarray | None
    """[N] float32, the reward model's scores; None without one."""
    token_log_probs: list[np.ndarray]
    """[N] arrays [response tokens], EOS included: of the full softmax at the temperature (at
    temperature 0: of 1).
    """
    finished: np.ndarray
    """[N] bool, whether EOS ended the (last) response, rather than ``max_new_tokens``."""


class Generator:
    """A policy, and a reward model beside it if wanted, from the folders that a run leaves.

        generator = Generator("runs/ppo/model", reward_model="runs/rm/model", max_new_tokens=64)
        generations = generator(["Name a prime.", "Is ice warm?"], seed=0)
        print(generations.texts, generations.log_probs, generations.rewards)

    Args:
        folder: a Hugging Face folder (or name) with its tokenizer.
        reward_model: that of a reward model with the same tokenizer.
        max_new_tokens: response slots R, of replies too.
        temperature: divides the logits; 0 takes the most likely token.
        top_k, top_p: as in ``sampling.SamplingConfig``.
        template: what the model reads for a prompt, as ``text.template``; None is ``auto``.
        environment: ``fn(conversation, row)`` or FILE.py:FUNCTION, which replies to responses
            (``data.environment``).
        max_turns: responses of a row at most; None: as many as fit.
        batch_size: at most this many rows at once.
        compute: as in ``models.load``, such as ``compute_dtype="bfloat16"``.

    Raises:
        UserError: a folder cannot be read, the policy is a reward model or the reward model none,
            their tokenizers differ, or ``max_new_tokens`` leaves no room for a prompt.
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
        template: str | None = None,
        environment: Source = None,
        max_turns: int | None = None,
        batch_size: int = 64,
        **compute: Any,
    ):
        ops.check_number("batch_size", batch_size, at_least=1)
        self.batch_size = batch_size
        self._policy = LanguageModel.load(folder, **compute)
        self.model, params, self.tokenizer = self._policy
        self.template = template or chat.AUTO
        logger.info(chat.describe(self.template, self.tokenizer, str(folder)))
        if "score" in params:
            raise UserError(
                f"{folder}: this is a reward model, which writes no text; give the policy first"
            )
        end, pad = self.tokenizer.eos_ids, self.tokenizer.pad_id
        self.config = SamplingConfig(
            max_new_tokens, temperature, top_k, top_p, eos_id=end, pad_id=pad
        )
        fn = function_of(environment, "environment")
        self._environment = load_environment(fn, self.tokenizer, max_new_tokens, max_turns)
        self._score: Callable[..., jax.Array] | None = None
        positions = self.model.config.max_length
        if reward_model is not None:
            judge, params, tokenizer = LanguageModel.load(reward_model, **compute)
            if "score" not in params:
                raise UserError(
                    f"{reward_model}: this model has no score head; give a reward model's folder"
                )
            if tokenizer.fingerprint != self.tokenizer.fingerprint:
                raise UserError(
                    f"{reward_model}: the reward model's tokenizer is not that of {folder}"
                )
            self._score = functools.partial(jax.jit(models.score_fn(judge)), params)
            positions = min(positions, judge.config.max_length)
        self._room = positions - max_new_tokens
        if self._room < 1:
            raise UserError(
                f"{folder}: max_new_tokens {max_new_tokens} leaves no room for a prompt in "
                f"{positions}"
            )

    def __call__(
        self,
        prompts: Sequence[str | Sequence[Message]],
        *,
        seed: int = 0,
        num_samples: int = 1,
        columns: Sequence[dict[str, Any]] = (),
    ) -> Generations:
        """Samples ``num_samples`` responses to each prompt.

        prompts: texts, or lists of messages such as {"role": "user", "content": "Is ice warm?"}.
        columns: what the environment gets as ``row``, for each prompt; empty: nothing.

        A response is a function of seed, prompt, and which of the prompt's samples it is: the first
        one to a prompt is the same whatever else is asked, in whatever batches (up to ties within
        the rounding of the logits). A prompt that is given twice gets its next samples the second
        time. Prompts of like length form a batch, padded to its longest.

        Raises:
            UserError: naming the prompt, such as ``prompts[3]``: it is neither a text nor messages,
                its last message is the assistant's, it is too long, holds a character that the
                tokenizer lacks, spells a special token in a message, or makes no token; or the
                template has no ``{prompt}``.
        """
        if isinstance(prompts, str):
            raise UserError("expected a list of prompts, got one text; put it in a list")
        given = zip(prompts, columns or [{}] * len(prompts), strict=True)
        rows = [self._row(prompt, f"prompts[{i}]", own) for i, (prompt, own) in enumerate(given)]
        ids = encoding.prompt_ids(rows, self.tokenizer, self.template)
        for row, own in zip(rows, ids, strict=True):
            if len(own) > self._room:
                what = (
                    f"{row.source}, {chat.shown(row, self.tokenizer)[:40]!r}: has {len(own)} tokens, and "
                    f"{self._room} are left"
                )
                raise UserError(
                    f"{what} beside max_new_tokens {self.config.max_new_tokens}; shorten one of "
                    "the two"
                )
        if not rows:
            return Generations([], [], np.zeros(0, np.float32), None, [], np.zeros(0, bool))
        width = min(-(-max(map(len, ids)) // _BUCKET) * _BUCKET, self._room)
        padded = encoding.left_padded(ids, width, self.tokenizer.pad_id)
        numbers, drawn = (
            np.repeat(np.arange(len(rows)), num_samples),
            collections.Counter[tuple[int, ...]](),
        )
        # a row's randomness is of its prompt and the number of its sample, not of its place
        streams = []
        for prompt in (tuple(ids[number]) for number in numbers):
            streams.append(
                zlib.crc32(np.array([drawn[prompt], *prompt], "<i4").tobytes()) & 0x7FFFFFFF
            )
            drawn[prompt] += 1
        how: Any = {
            "config": self.config,
            "batch_size": self.batch_size,
            "row_ids": np.array(streams, np.int32),
        }

        def respond(
            tokens: np.ndarray, mask: np.ndarray, _: Any, used: np.ndarray | None = None
        ) -> Rollout:
            return self._policy.sample(tokens, mask, jax.random.key(seed), **how, used=used)

        encoded = encoding.EncodedPrompts(*padded, rows, (), {})
        rollout: Any = converse(self._environment, respond, encoded, numbers)[0]
        inputs, said = (
            (self.batch_size, rollout.tokens, rollout.attention_mask),
            rollout.response_mask != 0,
        )
        return Generations(
            texts=responses(rollout, self.tokenizer),
            transcripts=responses(rollout, self.tokenizer, with_replies=True),
            log_probs=rollout.log_probs.sum(axis=1),
            rewards=None if self._score is None else _by_length(self._score, *inputs),
            token_log_probs=[row[mask] for row, mask in zip(rollout.log_probs, said, strict=True)],
            finished=ended(rollout, self.config.eos_ids),
        )

    def _row(self, prompt: str | Sequence[Message], source: str, columns: dict[str, Any]) -> Row:
        """A prompt of a call."""
        if isinstance(prompt, str):
            return Row(prompt, (), source, columns=columns)
        if not isinstance(prompt, Sequence):
            what = f"expected a text or a list of messages, got {type(prompt).__name__}"
            raise UserError(f"{source}: {what}")
        given = list(prompt)
        if chat.is_answered(given):
            what = "the last message is the assistant's; leave it out, the model writes it"
            raise UserError(f"{source}: {what}")
        messages = chat.conversation(Record({"messages": given}, source), "messages")
        template = chat.template_of(self.tokenizer, self.template)
        text = template.prompt(messages, source)
        return Row(text, (), source, columns=columns, messages=messages)


def _by_length(fn: Callable[..., Any], batch_size: int, tokens: Any, mask: Any, *trees: Any) -> Any:
    """`in_batches` of left-padded rows [N, T] of like length, each batch without columns that are
    padding in all its rows; zeros stand for these columns in what ``fn`` returns."""

    def narrowed(tokens: np.ndarray, mask: np.ndarray, *trees: Any) -> Any:
        unused = mask.shape[1] - batches.prompt_width(mask, _BUCKET)
        result = fn(tokens[:, unused:], mask[:, unused:], *trees)
        return jax.tree.map(
            lambda x: np.pad(x, ((0, 0), (unused, 0))) if x.ndim == 2 else x, result
        )

    order = np.argsort(np.count_nonzero(mask, axis=1), kind="stable")
    results = in_batches(
        narrowed, batch_size, *jax.tree.map(lambda x: np.asarray(x)[order], (tokens, mask, *trees))
    )
    return jax.tree.map(lambda x: x[np.argsort(order)], results)


def in_batches(fn: Callable[..., Any], batch_size: int, *trees: Any) -> Any:
    """``fn`` of the rows of pytrees of [N, ...] arrays, at most ``batch_size`` at a time; a pytree
    of NumPy arrays.

    Batches have as many rows as the power of two that holds all N, so that few shapes are compiled;
    the last one is filled up with rows of zeros.
    """
    num_rows = len(jax.tree.leaves(trees)[0])
    size = min(batch_size, 1 << (num_rows - 1).bit_length())
    padded = jax.tree.map(
        lambda x: np.pad(x, [(0, -num_rows % size)] + [(0, 0)] * (x.ndim - 1)), trees
    )
    slices = [slice(start, start + size) for start in range(0, num_rows, size)]
    parts = [
        jax.device_get(fn(*jax.tree.map(operator.itemgetter(part), padded))) for part in slices
    ]
    return jax.tree.map(lambda *xs: np.concatenate(xs)[:num_rows], *parts)


def responses(
    rollout: Rollout, tokenizer: tokenizers.Tokenizer, with_replies: bool = False
) -> list[str]:
    """The text of each row's responses without pad and EOS; ``with_replies`` of an environment
    between them, without any special token.
    """
    tokens = np.asarray(rollout.tokens)
    shown = said = np.asarray(rollout.response_mask) != 0
    if with_replies:
        behind_prompt = np.maximum.accumulate(said, axis=1)
        of_replies = behind_prompt & (np.asarray(rollout.attention_mask) != 0) & ~said
        shown = said | of_replies & ~np.isin(tokens, tokenizer.special_ids)
    return [tokenizer.decode(row[mask]) for row, mask in zip(tokens, shown, strict=True)]


def ended(rollout: Rollout, eos_ids: Sequence[int]) -> np.ndarray:
    """[N] bool, whether EOS is the last that the policy has said in a row."""
    last = np.max(np.where(rollout.response_mask, np.arange(rollout.tokens.shape[1]), 0), axis=1)
    return np.isin(np.asarray(rollout.tokens)[np.arange(len(last)), last], eos_ids)
