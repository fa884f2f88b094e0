"""Requests as prompts and samples, and the tokens that come back as OpenAI's choices."""

import asyncio
import contextlib
import dataclasses
import functools
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from starlette.concurrency import run_in_threadpool

from rlhf_jax import models
from rlhf_jax.data import chat, conversation, encoding
from rlhf_jax.data.rows import Row
from rlhf_jax.errors import UserError
from rlhf_jax.generation import stops
from rlhf_jax.generation.generator import Generator, places_of
from rlhf_jax.generation.slots import MOST_LIKELY, How, Sample, Token, at_temperature
from rlhf_jax.inference.serving.protocol import Chat, Completion
from rlhf_jax.inference.serving.worker import Event, Job, Worker
from rlhf_jax.runs import devices

_NO_CHARACTER = "\ufffd"  # of bytes that make none yet
_LEAST = -9999.0  # JSON has no infinity; max(_LEAST, nan) is _LEAST


class Policy(NamedTuple):
    """A model that answers."""

    generator: Generator
    worker: Worker
    reading: asyncio.Lock  # held while the log-probabilities of a prompt are computed
    seeds: Iterator[int]  # of requests without one


@dataclasses.dataclass
class Answer:
    """A response as far as it is there, and how much of it was sent."""

    number: int
    prompt: list[int]
    echoed: list[Token] = dataclasses.field(default_factory=list)
    tokens: list[Token] = dataclasses.field(default_factory=list)
    text: str = ""  # that no further token changes
    finish: str | None = None
    num_sent: int = 0  # tokens, those of the prompt too if it is echoed
    num_written: int = 0  # characters
    offset: int = 0  # characters of the tokens' names, as ``text_offset`` has them


class Answers:
    """All responses to a request; ``loop`` is where they are waited for.

    Raises:
        UserError: a prompt is wrong or too long, or there are too many.
    """

    def __init__(self, policy: Policy, asked: Chat | Completion, loop: asyncio.AbstractEventLoop):
        generator, worker, *_ = policy
        self.asked = asked
        self.all: list[Answer] = []
        self._policy = policy
        if isinstance(asked, Chat):
            prompts = [_chat_ids(generator, asked)]
            most = asked.max_completion_tokens
            most = asked.max_tokens if most is None else most
            self._likeliest = (asked.top_logprobs or 0) if asked.logprobs else None
        else:
            worker.check_number(len(asked.prompt) if isinstance(asked.prompt, list) else 1)
            prompts = _text_ids(generator, asked.prompt)
            most = asked.max_tokens
            self._likeliest = asked.logprobs
        stop = generator.stop if asked.stop is None else asked.stop
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        ends = () if asked.ignore_eos else generator.config.eos_ids
        self._ends = frozenset((*ends, *asked.stop_token_ids))
        self._how = _how(generator, asked)
        self._jobs: list[Job] = []
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._ended: set[int] = set()

        def put(event: Event) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, event)

        seed = next(policy.seeds) if asked.seed is None else asked.seed
        for ids in prompts:
            length = _response_length(generator, len(ids), most)
            samples = [
                Sample(key, self._how, asked.first_slot, self._likeliest or 0)
                for key in _keys(asked, seed, ids)
            ]
            if length:
                job = Job(ids, samples, length, self._ends, put, len(self.all), self._ended)
                worker.check(job)
                self._jobs.append(job)
            for _ in samples:
                finish = None if length else "length"
                self.all.append(Answer(len(self.all), ids, finish=finish))

    def begin(self) -> None:
        """Lets the worker begin. Raises Refused: too many are waiting."""
        self._policy.worker.ask(self._jobs)

    async def pieces(self) -> AsyncGenerator[Answer | None, None]:
        """An answer whenever there is more of it, once they have begun; None after each second in
        which nothing came. Raises what went wrong.
        """
        try:
            if isinstance(self.asked, Completion) and self.asked.echo:
                for first in range(0, len(self.all), self.asked.n):
                    await self._echo(self.all[first : first + self.asked.n])
            for answer in self.all:
                if answer.finish:
                    yield answer
            while not all(answer.finish for answer in self.all):
                event = None
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1):
                        event = await self._events.get()
                if isinstance(event, Exception):
                    raise event
                number, token, is_last = event or (0, None, False)
                if token is None:
                    yield None
                elif self.all[number].finish is None:  # a stop string may have ended it
                    self._add(self.all[number], token, is_last)
                    yield self.all[number]
        finally:
            self._ended.update(range(len(self.all)))

    async def _echo(self, answers: Sequence[Answer]) -> None:
        ids = answers[0].prompt
        tokens = [Token(id, 0.0, []) for id in ids]
        if self._likeliest is not None:
            async with self._policy.reading:
                tokens = await run_in_threadpool(_read, self._policy.generator, ids, self._how)
        for answer in answers:
            answer.echoed = [t._replace(likeliest=t.likeliest[: self._likeliest]) for t in tokens]

    def _add(self, answer: Answer, token: Token, is_last: bool) -> None:
        answer.tokens.append(token)
        if is_last:
            answer.finish = "stop" if token.id in self._ends else "length"
        elif not (self._stop or self.asked.stream):
            return
        ids = [token.id for token in answer.tokens]
        text = self._decode(ids[:-1] if answer.finish == "stop" else ids)
        whole = stops.before(text, self._stop)
        if whole != text:
            answer.finish = "stop"
            self._ended.add(answer.number)
        elif answer.finish is None:
            whole = whole.rstrip(_NO_CHARACTER)
            whole = whole[: stops.sure(whole, self._stop)]
        if answer.finish or whole.startswith(answer.text):
            answer.text = whole

    def _decode(self, ids: Sequence[int]) -> str:
        tokenizer = self._policy.generator.tokenizer
        decode = tokenizer.decode if self.asked.skip_special_tokens else tokenizer.decode_raw
        return decode(ids)

    def prompt(self) -> dict[str, Any]:
        """The prompt as the model reads it, if token ids are asked for."""
        if not self.asked.return_token_ids:
            return {}
        ids = self.all[0].prompt
        text = self._policy.generator.tokenizer.decode_raw(ids)
        return {"prompt_token_ids": ids, "prompt_text": text}

    def usage(self) -> dict[str, int]:
        """How many tokens were read and sampled."""
        read = sum(len(answer.prompt) for answer in self.all[:: self.asked.n])
        sampled = sum(len(answer.tokens) for answer in self.all)
        names = ("prompt_tokens", "completion_tokens", "total_tokens")
        return dict(zip(names, (read, sampled, read + sampled), strict=True))

    def choice(self, answer: Answer, *, is_piece: bool) -> dict[str, Any]:
        """What has not been sent of an answer."""
        tokenizer = self._policy.generator.tokenizer
        whole = tokenizer.decode_raw(answer.prompt) if answer.echoed else ""
        whole += answer.text
        tokens = [*answer.echoed, *answer.tokens]
        is_first = not answer.num_sent
        text, new = whole[answer.num_written :], tokens[answer.num_sent :]
        answer.num_written, answer.num_sent = len(whole), len(tokens)
        told: dict[str, Any] = {"index": answer.number, "finish_reason": answer.finish}
        told["logprobs"] = None if self._likeliest is None else self._log_probs(new, answer)
        if isinstance(self.asked, Completion):
            told["text"] = text
        elif is_piece:
            told["delta"] = {"role": "assistant"} if is_first else {}
            told["delta"]["content"] = text
        else:
            told["message"] = {"role": "assistant", "content": text}
        if self.asked.return_token_ids:
            if is_first:
                told["prompt_token_ids"] = answer.prompt
            told["token_ids"] = [token.id for token in answer.tokens[-len(new) :]] if new else []
        return told

    def _log_probs(self, tokens: Sequence[Token], answer: Answer) -> dict[str, Any]:
        """In the form of completions or of chats, with the names of tokens in place of ids."""

        def name(id: int) -> str:
            if self.asked.return_tokens_as_token_ids:
                return f"token_id:{id}"
            return self._policy.generator.tokenizer.decode_raw([id])

        if isinstance(self.asked, Chat):

            def told(id: int, log_prob: float) -> dict[str, Any]:
                text = name(id)
                whole = None if _NO_CHARACTER in text else list(text.encode())
                return {"token": text, "logprob": max(_LEAST, log_prob), "bytes": whole}

            content = [
                told(token.id, token.log_prob)
                | {"top_logprobs": [told(*one) for one in token.likeliest]}
                for token in tokens
            ]
            return {"content": content, "refusal": None}
        names = [name(token.id) for token in tokens]
        offsets = answer.offset + np.cumsum([0, *map(len, names)])
        answer.offset = int(offsets[-1])
        first = answer.echoed[0] if answer.echoed else None  # has no token before it
        known = [None if token is first else max(_LEAST, token.log_prob) for token in tokens]
        # The likeliest token last: two ids may have one name.
        ranked = [
            {name(id): max(_LEAST, x) for id, x in [token[:2], *reversed(token.likeliest)]}
            for token in tokens
        ]
        return {
            "tokens": names,
            "token_logprobs": known,
            "top_logprobs": [
                None if x is None else one for x, one in zip(known, ranked, strict=True)
            ],
            "text_offset": offsets[:-1].tolist(),
        }


def _chat_ids(generator: Generator, asked: Chat) -> list[int]:
    """The conversation as the model reads it; a lone message of the user in the frame of a run
    that had no chat template.
    """
    tokenizer = generator.tokenizer
    options, where = asked.chat_template_kwargs, "chat_template_kwargs"
    if options:
        tokenizer = chat.reading(tokenizer, options, tokenizer.spelled_as, where)
    columns = {} if asked.tool_choice == "none" else {"tools": asked.tools}
    row = generator.row(asked.messages, "messages", columns, tokenizer)
    if chat.frame(generator.template, tokenizer) is not None and not row.tools:
        if [turn["role"] for turn in row.messages] == ["user"]:
            row = Row(conversation.text_of(row.messages[0]), (), row.source)
        elif (
            generator.template != chat.AUTO
            or chat.template_of(tokenizer, chat.AUTO).tokenizer is None
        ):
            raise UserError("messages: there is no chat template; give one message of the user")
    return encoding.prompt_ids([row], tokenizer, generator.template)[0]


def _text_ids(generator: Generator, prompts: Any) -> list[list[int]]:
    """Texts or token ids, one or several, without a template. A text begins as the tokenizer
    begins one, and special tokens that it spells are these tokens, as in other servers: clients
    render templates themselves.
    """
    if isinstance(prompts, str) or all(isinstance(prompt, int) for prompt in prompts):
        prompts = [prompts]
    if any(isinstance(prompt, int) for prompt in prompts):
        raise UserError("prompt: give texts, or lists of token ids")
    rows = [
        Row(prompt if isinstance(prompt, str) else tuple(prompt), (), f"prompt {number}")
        for number, prompt in enumerate(prompts)
    ]
    known = generator.tokenizer
    tokenizer = dataclasses.replace(known, spelled_as=known.spelled_as or "tokens")
    return encoding.prompt_ids(rows, tokenizer, "{prompt}")


def _how(generator: Generator, asked: Chat | Completion) -> How:
    """What the request says of sampling, or else as the run sampled."""
    own = How.of(generator.config)._asdict()
    given = {name: getattr(asked, name) for name in own if getattr(asked, name) is not None}
    # XLA takes numbers below 1e-38 for 0; a logit divided by 1e-30 is finite.
    return How(*(max(number, 1e-30) if number > 0 else 0 for number in (own | given).values()))


def _response_length(generator: Generator, num_prompt: int, most: int | None) -> int:
    positions = generator.room + generator.config.max_new_tokens
    room = positions - num_prompt
    length = min(generator.config.max_new_tokens, room) if most is None else most
    if length > room or (most is None and room < 1):
        raise UserError(
            f"the prompt has {num_prompt} tokens and max_tokens is {length}; the model reads "
            f"{positions} in all"
        )
    return length


def _keys(asked: Chat | Completion, seed: int, ids: Sequence[int]) -> list[Array]:
    """The key of each sample: those of the answers of ``generate`` with this seed."""
    if asked.row_keys is not None:
        if len(asked.row_keys) != asked.n:
            raise UserError(f"row_keys: expected one for each of n = {asked.n} samples")
        return [jax.random.wrap_key_data(jnp.array(key, jnp.uint32)) for key in asked.row_keys]
    key = jax.random.key(seed)
    return [jax.random.fold_in(key, int(i)) for i in places_of([tuple(ids)] * asked.n)]


@functools.cache
def _reader(model: models.Model) -> Any:
    def read(params: Any, tokens: Array, mask: Array, temperature: Array) -> Any:
        def ranked(logits: Array, targets: Array) -> tuple[Array, ...]:
            log_probs = jax.nn.log_softmax(at_temperature(logits, temperature))
            own = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
            return own, *jax.lax.top_k(log_probs, min(MOST_LIKELY, logits.shape[-1]))

        policy = models.policy_fn(model)
        return policy(params, tokens, mask, statistic=ranked, arrays=(tokens,)).statistic

    return jax.jit(read, compiler_options=devices.compiler_options(model.config.num_layers))


def _read(generator: Generator, ids: list[int], how: How) -> list[Token]:
    """The tokens of a prompt, as if they had been sampled; NaN for the first."""
    positions = generator.room + generator.config.max_new_tokens
    width = min(max(16, 1 << (len(ids) - 1).bit_length()), positions)
    tokens, mask = encoding.left_padded([ids], width=width, pad_id=generator.config.pad_id)
    found = _reader(generator.model)(generator.params, tokens, mask, how.temperature or 1.0)
    own, best, which = (x[0, -len(ids) :].tolist() for x in jax.device_get(found))
    likeliest = [list(zip(*ranked, strict=True)) for ranked in zip(which, best, strict=True)]
    return [Token(ids[0], float("nan"), []), *map(Token, ids[1:], own[1:], likeliest[1:])]
