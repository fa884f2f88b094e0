"""Texts in, texts out: generation with a language model."""

import collections
import functools
import json
import operator
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from rlhf_jax import models, ops, rewards, sampling
from rlhf_jax.data import batches, chat, conversation, encoding, tokenizers
from rlhf_jax.data.rows import Message, Record, Row
from rlhf_jax.errors import UserError, is_there, logger
from rlhf_jax.generation import slots, stops
from rlhf_jax.generation.environment import (
    Environment,
    Source,
    converse,
    function_of,
    load_environment,
)
from rlhf_jax.models import hf
from rlhf_jax.parallel import sharding
from rlhf_jax.rewards.texts import SINGLE_TURN
from rlhf_jax.runs import devices, processes
from rlhf_jax.sampling import SamplingConfig
from rlhf_jax.types import Params, Rollout

_LENGTHS = ("max_length", "max_new_tokens", "min_length", "min_new_tokens")
_BUCKET = 16  # tokens: widths of prompts are multiples of it, so that few shapes are compiled


@functools.cache
def _sampler(num_layers: int) -> Any:
    """``sampling.generate``, compiled once for each model, config and shape."""
    options = devices.compiler_options(num_layers)
    static = ("model", "config", "mesh", "group_size")
    return jax.jit(sampling.generate, static_argnames=static, compiler_options=options)


@functools.cache
def _scorer(model: models.Model, closing: tuple[int, ...] = (), ends: tuple[int, ...] = ()) -> Any:
    """``models.score_fn``, or ``rewards.behind_turns`` if there is a closing, compiled once for
    each model and shape.
    """
    score_fn = models.score_fn(model)
    return jax.jit(
        rewards.behind_turns(score_fn, closing=closing, ends=ends) if closing else score_fn
    )


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
        tokenizer = tokenizers.load_tokenizer(source)
        size = model.config.vocab_size
        if tokenizer.vocab_size == size + 1 and tokenizer.pad_id == size:
            model, params = models.resize_vocabulary(model, params, tokenizer.vocab_size)
        elif tokenizer.vocab_size > size:
            raise UserError(
                f"{source}: the tokenizer has {tokenizer.vocab_size} entries but the model only "
                f"{size} embeddings; save the tokenizer that the model was trained with in this "
                "folder."
            )
        file = hf.find_folder(source) / "generation_config.json"
        generation = hf.read_json(file) if is_there(file) else {}
        ends = generation.get("eos_token_id", model.config.eos_token_id)
        ids = [] if ends is None else [ends]
        if isinstance(ends, list | tuple):
            ids = [*ends]
        if any(type(i) is not int for i in ids):
            raise UserError(
                f"{file}: eos_token_id is {ends!r:.80}, expected the number of a token, or a list "
                "of such numbers"
            )
        ids = [*ids, *chat.template_of(tokenizer, chat.AUTO).ends]
        others = dict.fromkeys(i for i in ids if i != tokenizer.eos_id and 0 <= i < size)
        tokenizer = replace(tokenizer, other_eos_ids=tuple(others), generation=generation)
        if model.config.pad_token_id in tokenizer.eos_ids:
            model = models.build(replace(model.config, pad_token_id=tokenizer.pad_id))
        return cls(model, jax.tree.map(jnp.asarray, params), tokenizer)

    def reading(
        self, options: Mapping[str, Any] | None, special_tokens: Literal["text", "tokens"] | None
    ) -> "LanguageModel":
        """The model with ``text.template_options`` and ``text.special_tokens``."""
        return self._replace(tokenizer=chat.reading(self.tokenizer, options, special_tokens))

    def save(
        self,
        folder: str | Path,
        *,
        template: str = chat.AUTO,
        config: SamplingConfig | None = None,
        score_position: str = hf.END_OF_TURN,
    ) -> None:
        """Writes a folder that ``load``, transformers and chat clients read. It tells them how the
        run formatted prompts and sampled.

        Args:
            folder: made if missing, its files replaced.
            template: the run's ``text.template``, for the tokenizer's chat template
                (``chat.with_text_template``).
            config: for generation_config.json: how transformers samples by default; None: as the
                model's author wrote, with our ends of a text. Other keys of the author stay, but no
                maximum length: lm-eval and vLLM would end all responses there, whatever their task
                allows. A reward model has no such file.
            score_position: of a reward model, as in ``models.save``.
        """
        models.save(folder, self.model, self.params, score_position=score_position)
        self.save_tokenizer(folder, template)
        if "score" in self.params:
            return
        known = self.tokenizer.generation
        keys = {key: value for key, value in known.items() if key not in _LENGTHS}
        ends = self.tokenizer.eos_ids
        keys["eos_token_id"] = list(ends) if len(ends) > 1 else ends[0]
        keys["pad_token_id"] = self.tokenizer.pad_id
        if self.tokenizer.beginning:
            keys["bos_token_id"] = self.tokenizer.beginning[0]
        if config is not None:
            is_sampled = config.temperature > 0
            sampled = {
                "temperature": config.temperature if is_sampled else None,
                "top_k": (config.top_k or 0) if is_sampled else None,  # missing: the likeliest 50
                "top_p": (config.top_p or 1.0) if is_sampled else None,
                "min_p": config.min_p if is_sampled else None,
                "repetition_penalty": (
                    config.repetition_penalty if config.repetition_penalty != 1 else None
                ),
            }
            keys = {key: value for key, value in keys.items() if key not in sampled}
            keys["do_sample"] = is_sampled
            keys |= {key: value for key, value in sampled.items() if value is not None}
        text = json.dumps(keys, indent=2, ensure_ascii=False) + "\n"
        Path(folder, "generation_config.json").write_text(text, encoding="utf-8")

    def save_tokenizer(self, folder: str | Path, template: str) -> None:
        """Writes the tokenizer with the chat template that tells chat clients of ``template``."""
        chat.with_text_template(self.tokenizer, template).save(folder)

    def respond(
        self,
        prompts: encoding.EncodedPrompts,
        key: Array,
        *,
        config: SamplingConfig,
        numbers: np.ndarray | None = None,
        places: np.ndarray | None = None,
        batch_size: int = 64,
        stop: Sequence[str] = (),
        environment: Environment | None = None,
        mesh: Mesh | None = None,
    ) -> tuple[Rollout, dict[str, np.ndarray]]:
        """Samples [N] responses, or conversations with an environment, for whatever shows or
        compares texts (`responses`).

        Prompts of similar length form a batch, without the columns that are padding in all of its
        rows (`batches.prompt_width`). Equally long runs of rows that answer one prompt compute it
        once.

        Args:
          numbers: [N] the prompt that each row answers; None: all, one after the other.
          places: [N] int32, which decide the randomness of each row whatever its batch is, as in
            ``sampling.generate``; None: 0 .. N-1.
          batch_size: the largest number of rows at once.
          stop: texts that end a response, which keeps them (``generation.stops``).
          mesh: over which the parameters are sharded, and the rows of a batch will be.

        Returns:
          As `converse`: a Rollout of NumPy arrays, and what is known of each conversation.
        """
        numbers = np.arange(len(prompts.tokens)) if numbers is None else numbers
        places = np.arange(len(numbers), dtype=np.int32) if places is None else places
        run_length = 1 if environment is not None else batches.run_length(numbers)
        size = run_length if run_length <= batch_size else 1
        multiple = size * (1 if mesh is None else sharding.num_parts(mesh))
        generate = functools.partial(
            _sampler(self.model.config.num_layers),
            self.model,
            self.params,
            config=config,
            mesh=mesh,
            group_size=size,
        )

        def sample_batch(tokens: Any, mask: Any, places: Any, used: Any) -> Rollout:
            sampled: Rollout = generate(tokens, mask, key, places=places, used=used)
            return replace(sampled, prompt_length=None)  # which batches need not have in common

        def sample(tokens: Any, mask: Any, _: Any, used: Any = None) -> Rollout:
            rows = (tokens, mask, places, used)
            sampled = _by_length(sample_batch, batch_size, *rows, multiple=multiple)
            # The prompts with all their columns: a batch omits some of them.
            columns = tokens.shape[1]
            whole = np.concatenate([tokens, sampled.tokens[:, columns:]], axis=1)
            return replace(sampled, tokens=whole, prompt_length=columns)

        until_stop = stops.stopping(sample, self.tokenizer, stop)
        return converse(environment, until_stop, prompts, numbers)

    def closing(self, in_chat: bool) -> tuple[int, ...]:
        """As `closing`, of a reward model."""
        return closing(self.model.config, self.tokenizer, in_chat)

    def score_texts(
        self,
        conversations: Sequence[Sequence[Message]],
        responses: Sequence[str],
        batch_size: int = 64,
        length: int = 0,
    ) -> np.ndarray:
        """[N] float32 scores, by a reward model, of responses to conversations, both texts:
        `encoding.answered_ids`, ``batch_size`` of similar length at a time. A model of others
        reads all that its chat template writes, one of ours up to the end of the answer.
        ``length``, for the error: of the policy's tokens that a text may have.

        Raises:
            UserError: naming the text: it has more tokens than the model reads, or spells a special
                token of it in a prompt.
        """
        limit = self.model.config.max_length
        ends = hf.scores_turns(self.model.config)
        rows = []
        for number, (messages, response) in enumerate(zip(conversations, responses, strict=True)):
            where = f"text {number}, {conversation.text_of(messages[-1])[:40]!r}"
            ids = encoding.answered_ids(messages, response, self.tokenizer, where, ends)
            if len(ids) > limit:
                now = f", now {length} of the policy's tokens" if length else ""
                raise UserError(
                    f"{where}: prompt and response are {len(ids)} tokens of the reward model's "
                    f"tokenizer, and it reads {limit}; shorten them, as by rl.max_new_tokens{now}"
                )
            rows.append(ids)
        return self.score_ids(rows, batch_size)

    def score_ids(self, texts: Sequence[Sequence[int]], batch_size: int = 64) -> np.ndarray:
        """[N] float32 scores of texts as the reward model reads them."""
        padded = pad_prompts(texts, self.model.config.max_length, self.tokenizer.pad_id)
        score = functools.partial(_scorer(self.model), self.params)
        return _by_length(score, batch_size, padded.tokens, padded.attention_mask)


def closing(config: Any, tokenizer: tokenizers.Tokenizer, in_chat: bool) -> tuple[int, ...]:
    """The ids that a reward model reads behind an answer that ``max_new_tokens`` cut, and in the
    place of another end: those that stood there when it was trained. One of ours reads the end of
    the answer, one of others all that its chat template writes there, and without one nothing.

    in_chat: the policy's prompts are in a chat template.
    """
    position = config.other_keys.get("score_position")
    if position in (hf.STEP_ENDS, hf.LAST_TOKEN):
        return ()
    if hf.scores_turns(config):
        return (chat.end_of_response(chat.AUTO, tokenizer),)
    return tuple(chat.template_of(tokenizer, chat.AUTO).closing) if in_chat else ()


def pad_prompts(
    ids: Sequence[Sequence[int]], limit: int, pad_id: int, rows: Sequence[Row] = ()
) -> encoding.EncodedPrompts:
    """Prompts for ``LanguageModel.respond``, of at most ``limit`` columns: a multiple of
    ``_BUCKET``, so that few shapes are compiled. ``rows``: those that an environment reads.
    """
    width = min(-(-max(map(len, ids)) // _BUCKET) * _BUCKET, limit)
    arrays = encoding.left_padded(ids, width=width, pad_id=pad_id)
    return encoding.EncodedPrompts(*arrays, list(rows), (), {})


class Generations(NamedTuple):
    """Responses to prompts: N = prompts * samples rows, those of one prompt adjacent."""

    texts: list[str]
    """[N] without special tokens; of a conversation the policy's responses, one after the other."""
    transcripts: list[str]
    """[N] the same with an environment's replies between the responses."""
    log_probs: np.ndarray
    """[N] float32, of the whole response: the sum of ``token_log_probs``, in nats."""
    rewards: np.ndarray | None
    """[N] float32, the reward model's scores; None without one."""
    token_log_probs: list[np.ndarray]
    """[N] arrays [response tokens], EOS included: log-probs of the full softmax at the temperature
    (at temperature 0: of the softmax at temperature 1).
    """
    finished: np.ndarray
    """[N] bool, whether EOS or a stop string ended the last response. False if ``max_new_tokens``
    cut it.
    """


class Asked(NamedTuple):
    """N prompts as a model reads them, S samples of each."""

    rows: list[Row]
    ids: list[list[int]]
    streams: np.ndarray
    """[N, S] int32, which decide the randomness of each sample."""

    def part(self, start: int, stop: int) -> "Asked":
        """The prompts from ``start`` to ``stop``; their samples are the same."""
        which = slice(start, stop)
        return Asked(self.rows[which], self.ids[which], self.streams[which])


def default_slots(positions: int) -> int:
    """Response slots of a model that no run of ours trained: 256, or half of its positions if they
    are fewer.
    """
    return min(256, positions // 2)


class Generator:
    """A policy, and optionally a reward model, from the folders that a run writes.

        generator = Generator("runs/ppo/model", reward_model="runs/rm/model", max_new_tokens=64)
        generations = generator(["Name a prime.", "Is ice warm?"], seed=0)
        print(generations.texts, generations.log_probs, generations.rewards)

    Args:
        folder: a Hugging Face folder (or name) with its tokenizer.
        reward_model: the folder of a reward model. One of another tokenizer reads the texts, by
            its own chat template.
        max_new_tokens: response slots R; replies use them too.
        temperature: divides the logits; 0 takes the most likely token.
        top_k, top_p, min_p, repetition_penalty: as in ``sampling.SamplingConfig``.
        template: how a prompt is formatted, as ``text.template``; None is ``auto``.
        template_options: variables of the chat template, as ``text.template_options``.
        special_tokens: what their spelling in a prompt is, as ``text.special_tokens``.
        environment: ``fn(conversation, row)`` or FILE.py:FUNCTION, which replies to responses
            (``generation.environment``).
        max_turns: the largest number of responses in a row; None: as many as fit.
        batch_size: the largest number of rows at once.
        stop: texts that end a response (``generation.stops``). They are left out of ``texts``; with
            an environment, which reads them, they stay.
        max_length: positions for prompt and response, if fewer than the model has.
        compute: as in ``models.load``, such as ``compute_dtype="bfloat16"``.

    Raises:
        UserError: a folder cannot be read, a setting is out of range, the policy is a reward model,
            the reward model has no score head, or ``max_new_tokens`` leaves no room for a prompt.
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
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        template: str | None = None,
        template_options: Mapping[str, Any] | None = None,
        special_tokens: Literal["text", "tokens"] | None = None,
        environment: Source = None,
        max_turns: int | None = None,
        batch_size: int = 64,
        stop: Sequence[str] = (),
        max_length: int | None = None,
        **compute: Any,
    ):
        self.batch_size = batch_size
        if isinstance(stop, str) or not all(stop):
            raise UserError(f"stop: expected a list of texts that are not empty, got {stop!r}")
        self.stop = tuple(stop)
        loaded = LanguageModel.load(folder, **compute)
        if "score" in loaded.params:
            raise UserError(
                f"{folder}: this is a reward model, which writes no text; give the policy first"
            )
        self._policy = loaded.reading(template_options, special_tokens)
        self.template_options = dict(template_options) if template_options else None
        self.model, _, self.tokenizer = self._policy
        self.template = template or chat.AUTO
        logger.info(chat.describe(self.template, self.tokenizer, str(folder)))
        try:
            ops.check_number("batch_size", batch_size, at_least=1)
            self.config = SamplingConfig(
                max_new_tokens,
                temperature,
                top_k,
                top_p,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                eos_id=self.tokenizer.eos_ids,
                pad_id=self.tokenizer.pad_id,
            )
        except ValueError as error:
            raise UserError(str(error)) from error
        fn = function_of(environment, "environment")
        self._environment = load_environment(fn, self.tokenizer, max_new_tokens, max_turns)
        self._judge: LanguageModel | None = None
        self._reads_texts = False
        positions = min(max_length or sys.maxsize, self.model.config.max_length)
        if reward_model is not None:
            self._judge = LanguageModel.load(reward_model, **compute)
            if "score" not in self._judge.params:
                raise UserError(
                    f"{reward_model}: this model has no score head; give a reward model's folder"
                )
            self._reads_texts = self._judge.tokenizer.fingerprint != self.tokenizer.fingerprint
            if not self._reads_texts:
                self._closing = self._judge.closing(
                    chat.frame(self.template, self.tokenizer) is None
                )
                reads = self._judge.model.config.max_length - len(self._closing)
                positions = min(positions, reads)
            elif self._environment is not None:
                raise UserError(f"{reward_model}: {SINGLE_TURN}")
        if max_new_tokens >= positions:
            raise UserError(
                f"{folder}: max_new_tokens {max_new_tokens} leaves no room for a prompt in "
                f"{positions}"
            )
        self.room = positions - max_new_tokens

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
        columns: for each prompt, the ``row`` that the environment gets; by default empty.

        A response depends on the seed, the prompt, and the number of the sample: the first sample
        of a prompt is the same whatever the other prompts and batches are (up to ties within the
        rounding of the logits). If a prompt is given twice, the second one gets the next samples.
        Prompts of similar length form a batch, padded to its longest.

        Raises:
            UserError: naming the prompt, such as ``prompts[3]``: it is neither a text nor messages,
                it is too long, holds a character that the
                tokenizer lacks, spells a special token in a message, or makes no token; or the
                template has no ``{prompt}``.
        """
        if isinstance(prompts, str):
            raise UserError("expected a list of prompts, got one text; put it in a list")
        own_columns = columns or [{}] * len(prompts)
        rows = [
            self.row(prompt, f"prompts[{i}]", own, self.tokenizer)
            for i, (prompt, own) in enumerate(zip(prompts, own_columns, strict=True))
        ]
        asked = self.ask(rows, num_samples)
        if not rows:
            return Generations([], [], np.zeros(0, np.float32), None, [], np.zeros(0, bool))
        texts, rollout = self.sample(asked, seed)
        in_responses = zip(rollout.log_probs, rollout.mask, strict=True)
        scores = None
        if self._judge is not None and self._reads_texts:
            talks = [row.conversation or () for row in rows for _ in range(num_samples)]
            scores = self._judge.score_texts(talks, texts, self.batch_size)
        elif self._judge is not None:
            scorer = _scorer(self._judge.model, self._closing, self.tokenizer.eos_ids)
            score = functools.partial(scorer, self._judge.params)
            scores = _by_length(score, self.batch_size, rollout.tokens, rollout.attention_mask)
        return Generations(
            texts=texts,
            transcripts=responses(rollout, self.tokenizer, with_replies=True),
            log_probs=rollout.log_probs.sum(axis=1),
            rewards=scores,
            token_log_probs=[log_probs[mask] for log_probs, mask in in_responses],
            finished=ended(rollout, self.config.eos_ids),
        )

    def ask(self, rows: Sequence[Row], num_samples: int = 1) -> "Asked":
        """The rows' prompts as the model reads them, for `sample`. Raises as a call does."""
        ids = encoding.prompt_ids(rows, self.tokenizer, self.template)
        for row, own in zip(rows, ids, strict=True):
            if len(own) > self.room:
                prompt = chat.shown(row, self.tokenizer)[:40]
                raise UserError(
                    f"{row.source}, {prompt!r}: has {len(own)} tokens, and {self.room} are left "
                    f"beside max_new_tokens {self.config.max_new_tokens}; shorten one of the two"
                )
        streams = places_of([tuple(prompt) for prompt in ids for _ in range(num_samples)])
        return Asked(list(rows), ids, streams.reshape(len(rows), num_samples))

    def sample(self, asked: "Asked", seed: int) -> tuple[list[str], Any]:
        """The texts of the samples of each prompt, one after the other, without stop strings, which
        only an environment gets to read; and a Rollout of NumPy arrays with their tokens.
        """
        num_rows, num_samples = asked.streams.shape
        rollout, _ = self._policy.respond(
            pad_prompts(asked.ids, self.room, self.tokenizer.pad_id, asked.rows),
            jax.random.key(seed),
            config=self.config,
            numbers=np.repeat(np.arange(num_rows), num_samples),
            places=asked.streams.ravel(),
            batch_size=self.batch_size,
            stop=self.stop,
            environment=self._environment,
        )
        texts = responses(rollout, self.tokenizer)
        if self._environment is None:
            texts = [stops.before(text, self.stop) for text in texts]
        return texts, rollout

    @functools.cached_property
    def batch(self) -> slots.Batch:
        """What samples token by token, for `stream` and for servers."""
        positions = self.room + self.config.max_new_tokens
        return slots.Batch(self.model, self.params, pad_id=self.config.pad_id, positions=positions)

    def stream(self, ids: Sequence[int], seed: int) -> Iterator[int]:
        """Yields the tokens of ``sample``'s first response to a prompt as they are sampled. One
        stream at a time, and none while a server uses `batch`.
        """
        key = jax.random.fold_in(jax.random.key(seed), int(places_of([tuple(ids)])[0]))
        sample = slots.Sample(key, slots.How.of(self.config))
        self.batch.add(ids, [sample], self.config.max_new_tokens)
        try:
            for _ in range(self.config.max_new_tokens):
                [(_, token)] = self.batch.step()
                yield token.id
                if token.id in self.config.eos_ids:
                    return
        finally:
            self.batch.remove(sample)

    @property
    def params(self) -> Params:
        """The policy's parameters."""
        return self._policy.params

    def row(
        self,
        prompt: str | Sequence[Message],
        source: str,
        columns: dict[str, Any],
        tokenizer: tokenizers.Tokenizer,
    ) -> Row:
        """A prompt of a call, with its ``tools`` among the columns, for a tokenizer that may have
        other options of the template. Raises UserError, naming the source.
        """
        if isinstance(prompt, str):
            return Row(prompt, (), source, columns=columns)
        if not isinstance(prompt, Sequence):
            kind = type(prompt).__name__
            raise UserError(f"{source}: expected a text or a list of messages, got {kind}")
        given = list(prompt)
        turns = conversation.messages_of(Record({"messages": given}, source), "messages")
        asked = conversation.written(Record(columns, source))
        row = Row("", (), source, columns=columns, messages=turns, **asked)
        template = chat.template_of(tokenizer, self.template)
        return replace(row, prompt=template.prompt_of(row))


def places_of(prompts: Sequence[tuple[int, ...]]) -> np.ndarray:
    """[N] int32 numbers that decide the randomness of each row: functions of its prompt and of how
    often that prompt came before, not of its place.
    """
    times = collections.Counter[tuple[int, ...]]()
    streams = []
    for prompt in prompts:
        identity = np.array([times[prompt], *prompt], "<i4").tobytes()
        streams.append(zlib.crc32(identity) & 0x7FFFFFFF)
        times[prompt] += 1
    return np.array(streams, np.int32)


def _by_length(
    fn: Callable[..., Any], batch_size: int, tokens: Any, mask: Any, *trees: Any, multiple: int = 1
) -> Any:
    """`in_batches` for left-padded rows [N, T], sorted by length. Each batch omits the columns that
    are padding in all its rows; the results of ``fn`` are zero there. Its rows are a ``multiple``.
    """

    def narrowed(tokens: np.ndarray, mask: np.ndarray, *trees: Any) -> Any:
        unused = mask.shape[1] - batches.prompt_width(mask, _BUCKET)

        def widened(x: np.ndarray) -> np.ndarray:
            return np.pad(x, ((0, 0), (unused, 0))) if x.ndim == 2 else x

        result = processes.fetch(fn(tokens[:, unused:], mask[:, unused:], *trees))
        return jax.tree.map(widened, result)

    order = np.argsort(np.count_nonzero(mask, axis=1), kind="stable")
    by_length = jax.tree.map(lambda x: np.asarray(x)[order], (tokens, mask, *trees))
    results = in_batches(narrowed, batch_size, *by_length, multiple=multiple)
    place = np.argsort(order)
    return jax.tree.map(lambda x: x[place], results)


def in_batches(fn: Callable[..., Any], batch_size: int, *trees: Any, multiple: int = 1) -> Any:
    """Applies ``fn``, which gives NumPy arrays, to the rows of pytrees of [N, ...] NumPy arrays, at
    most ``batch_size`` at a time; returns a pytree of NumPy arrays.

    The number of rows of a batch is a power of two that holds all N, or ``batch_size`` if that is
    less, so that few shapes are compiled; the last batch is completed with rows of zeros. It is
    rounded to a ``multiple``, which is at most ``batch_size``.
    """
    num_rows = len(jax.tree.leaves(trees)[0])
    size = min(batch_size, 1 << (num_rows - 1).bit_length())
    size = max(size - size % multiple, multiple)
    num_missing = -num_rows % size

    def pad(x: Any) -> Any:
        return np.pad(x, [(0, num_missing)] + [(0, 0)] * (x.ndim - 1))

    padded = jax.tree.map(pad, trees)
    parts = []
    for start in range(0, num_rows, size):
        part = operator.itemgetter(slice(start, start + size))
        parts.append(fn(*jax.tree.map(part, padded)))
    return jax.tree.map(lambda *xs: np.concatenate(xs)[:num_rows], *parts)


def responses(
    rollout: Rollout, tokenizer: tokenizers.Tokenizer, with_replies: bool = False
) -> list[str]:
    """The text of each row's responses without pad and EOS. ``with_replies`` inserts an
    environment's replies between the responses, without special tokens.
    """
    tokens = np.asarray(rollout.tokens)
    shown = np.asarray(rollout.mask)
    if with_replies:
        after_prompt = np.maximum.accumulate(shown, axis=1)
        is_reply = after_prompt & (np.asarray(rollout.attention_mask) != 0) & ~shown
        shown = shown | is_reply & ~np.isin(tokens, tokenizer.special_ids)
    return [tokenizer.decode(row[mask]) for row, mask in zip(tokens, shown, strict=True)]


def ended(rollout: Rollout, eos_ids: Sequence[int]) -> np.ndarray:
    """[N] bool, whether EOS or a stop string ended the last response of each row."""
    is_end = np.isin(rollout.tokens, eos_ids) & np.asarray(ops.is_last(rollout.mask))
    is_ended = is_end.any(axis=1)
    return is_ended if rollout.stopped is None else is_ended | np.asarray(rollout.stopped)
