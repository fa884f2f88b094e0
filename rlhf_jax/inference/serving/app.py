"""The server's application: which address answers what."""

import asyncio
import base64
import contextlib
import dataclasses
import hmac
import itertools
import json
import secrets
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from rlhf_jax.data import chat, conversation, files, formats
from rlhf_jax.data.rows import Record
from rlhf_jax.errors import UserError, logger
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.inference import web
from rlhf_jax.inference.labelling.store import Pair, Store
from rlhf_jax.inference.serving import protocol
from rlhf_jax.inference.serving.answers import Answers, Policy
from rlhf_jax.inference.serving.protocol import Chat, Completion, Judgement, Refused, Score

MAX_BODY = 4 << 20  # bytes
_READ = ("role", "content", "name")  # of an answer that is scored
_FOLDER = Path(__file__).parent.parent
_FILES = {
    "/": ("serving/page/chat.html", "text/html"),
    "/chat.js": ("serving/page/chat.js", "text/javascript"),
    "/chat.css": ("serving/page/chat.css", "text/css"),
    "/label.css": ("labelling/page/label.css", "text/css"),  # both pages look alike
}


class Judge(NamedTuple):
    """A reward model."""

    model: LanguageModel
    scoring: asyncio.Lock  # held while it scores


class Labels(NamedTuple):
    """Judgements, and the file of preferences that they make."""

    store: Store
    out: Path


class Served(NamedTuple):
    """What the application serves."""

    policies: Mapping[str, Policy]  # by the names in requests; the first is the default
    judges: Mapping[str, Judge]
    token: str | None = None
    names: tuple[str, ...] = ()  # further host names
    seconds: float = 600.0  # that a request may take
    labels: Labels | None = None  # where judgements of the page are kept


def error(status: int, message: str, code: str | None = None) -> Response:
    """A refusal in OpenAI's form."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    said = {"message": message, "type": kind, "param": None, "code": code}
    return JSONResponse({"error": said}, status)


def build(served: Served, lifespan: Any = None) -> ASGIApp:
    """The application. ``lifespan``: as of Starlette."""

    def reads(form: type[Any], answer: Callable[..., Awaitable[Response]]) -> Any:
        """An endpoint of a body of this form."""

        async def respond(request: Request) -> Response:
            try:
                given = protocol.read(await request.body(), form)
                async with asyncio.timeout(served.seconds):
                    return await answer(served, given, request)
            except Exception as fault:
                return error(*_told(fault, served))

        return respond

    scores = reads(Score, _score)
    routes = [
        *(Route(path, lambda _, file=file: _file(*file)) for path, file in _FILES.items()),
        Route("/health", lambda _: Response()),
        Route("/v1/models", lambda _: JSONResponse(_models(served))),
        Route("/v1/models/{name:path}", lambda request: _model(served, request)),
        Route("/v1/chat/completions", reads(Chat, _complete), methods=["POST"]),
        Route("/v1/completions", reads(Completion, _complete), methods=["POST"]),
        Route("/v1/score", scores, methods=["POST"]),
        Route("/score", scores, methods=["POST"]),
        Route("/judgement", reads(Judgement, _judge), methods=["POST"]),
    ]

    async def fails(_: Request, fault: Any) -> Response:
        return error(fault.status_code, fault.detail)

    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: fails})
    app.router.redirect_slashes = False

    def unknown(request: Request) -> tuple[int, str] | None:
        if served.token is None or request.scope["path"] in (*_FILES, "/health"):
            return None
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind == "Basic":  # of an address http://anybody:TOKEN@HOST
            with contextlib.suppress(ValueError):
                given = base64.b64decode(given).decode().partition(":")[2]
        if hmac.compare_digest(given.encode(), served.token.encode()):
            return None
        return 401, "give the server's token: Authorization: Bearer TOKEN"

    names = served.names
    return web.Guard(
        app, names=names, max_body=MAX_BODY, needs_origin=False, limit=unknown, refusal=error
    )


def _file(name: str, kind: str) -> Response:
    return Response((_FOLDER / name).read_bytes(), media_type=kind)


def _told(fault: Exception, served: Served) -> tuple[int, str, str | None]:
    """What is said of an exception: the status, the message and a code."""
    if isinstance(fault, Refused):
        return fault.status, str(fault), fault.code
    if isinstance(fault.__cause__, OSError | sqlite3.OperationalError):
        logger.warning(str(fault))
        return 507, f"this was not saved: {fault}", None
    if isinstance(fault, msgspec.MsgspecError | UserError | RecursionError | UnicodeError):
        return 400, str(fault), None
    if isinstance(fault, TimeoutError):
        return 504, f"no whole answer within {served.seconds:g} seconds", None
    logger.warning(f"a request failed: {type(fault).__name__}: {fault}")
    return 500, "the server failed; its log says why", None


def _models(served: Served) -> dict[str, Any]:
    data = []
    for name, policy in served.policies.items():
        config, room = policy.generator.config, policy.generator.room
        limits = {
            "max_model_len": room + config.max_new_tokens,
            "max_tokens": config.max_new_tokens,
            "temperature": config.temperature,
        }
        data.append({"id": name, "kind": "policy", **limits})
    data += [{"id": name, "kind": "reward"} for name in served.judges]
    common = {"object": "model", "created": 0, "owned_by": "rlhf_jax"}
    labels = served.labels and str(served.labels.out)
    return {"object": "list", "data": [one | common for one in data], "judgements": labels}


def _model(served: Served, request: Request) -> Response:
    name = request.path_params["name"]
    unknown = error(404, f"there is no model {name!r} here", "model_not_found")
    return next((JSONResponse(x) for x in _models(served)["data"] if x["id"] == name), unknown)


def _named(models: Mapping[str, Any], name: str | None, kind: str) -> tuple[str, Any]:
    """The model that a request names, or the first."""
    name = next(iter(models), "") if name is None else name
    if name not in models:
        known = ", ".join(models) or "none"
        raise Refused(404, f"there is no {kind} {name!r} here, but {known}", "model_not_found")
    return name, models[name]


async def _complete(served: Served, asked: Chat | Completion, request: Request) -> Response:
    """Answers to a conversation, or to texts."""
    name, policy = _named(served.policies, asked.model, "model")
    loop = asyncio.get_running_loop()
    answers = await run_in_threadpool(Answers, policy, asked, loop)
    is_chat = isinstance(asked, Chat)
    head: dict[str, Any] = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": int(time.time()),
        "model": name,
    }
    answers.begin()
    if asked.stream:
        head["object"] += ".chunk" if is_chat else ""
        events = _events(answers, head, served)
        return StreamingResponse(events, media_type="text/event-stream")
    async with contextlib.aclosing(answers.pieces()) as pieces:
        async for _ in pieces:
            if await request.is_disconnected():
                break  # nobody reads what is returned
    choices = [answers.choice(answer, is_piece=False) for answer in answers.all]
    head |= answers.prompt()
    return JSONResponse(head | {"choices": choices, "usage": answers.usage()})


async def _events(answers: Answers, head: dict[str, Any], served: Served) -> AsyncIterator[str]:
    """The answers piece by piece, as server-sent events."""

    def event(content: object) -> str:
        return f"data: {json.dumps(content, allow_nan=False)}\n\n"

    options = answers.asked.stream_options
    prompt = answers.prompt()  # comes with the first piece
    try:
        async with asyncio.timeout(served.seconds):
            async with contextlib.aclosing(answers.pieces()) as pieces:
                async for answer in pieces:
                    if answer is None:
                        yield ": waiting\n\n"  # a comment, which keeps the connection
                        continue
                    choice = answers.choice(answer, is_piece=True)
                    yield event(head | prompt | {"choices": [choice]})
                    prompt = {}
        if options is not None and options.include_usage:
            yield event(head | {"choices": [], "usage": answers.usage()})
    except Exception as fault:
        status, message, _ = _told(fault, served)
        yield event({"error": {"message": message, "type": "server_error", "code": status}})
    yield "data: [DONE]\n\n"


async def _score(served: Served, asked: Score, _: Request) -> Response:
    """The scores of a reward model."""
    name, judge = _named(served.judges, asked.model, "reward model")
    async with judge.scoring:
        found = await run_in_threadpool(_scores, judge.model, asked)
    scores = [float(score) for score in found]
    return JSONResponse({"model": name, "score": scores[0], "scores": scores, "rewards": scores})


def _scores(judge: LanguageModel, asked: Score) -> np.ndarray:
    if asked.query:
        tokenizer = dataclasses.replace(judge.tokenizer, spelled_as="tokens")
        texts = [tokenizer.encode(text) for text in asked.query]
        limit = judge.model.config.max_length
        for number, ids in enumerate(texts):
            if not 1 <= len(ids) <= limit:
                raise Refused(
                    400, f"query {number} has {len(ids)} tokens; the model reads 1 to {limit}"
                )
        return judge.score_ids(texts)
    talks: list[Any] = list(asked.messages)
    if talks and isinstance(talks[0], dict):
        talks = [talks]
    prompts = [*asked.prompts, *([] if asked.prompt is None else [asked.prompt])]
    for number, turns in enumerate(asked.columns.messages[: len(prompts)]):
        prompts[number] = turns or prompts[number]
    responses = [*asked.responses, *([] if asked.response is None else [asked.response])]
    if len(prompts) != len(responses) or bool(talks) == bool(prompts):
        raise Refused(400, "give messages that end with an answer, or a response to each prompt")
    for prompt, response in zip(prompts, responses, strict=True):
        asks = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        says = [{"role": "assistant", "content": response}]
        talks.append([*asks, *(says if isinstance(response, str) else response)])
    for number, talk in enumerate(talks):
        talks[number] = conversation.messages_of(Record({"text": talk}, f"{number}"), "text")
        if len(talk) < 2 or talk[-1]["role"] != "assistant":
            raise Refused(400, f"text {number} must end with an answer of the assistant")
        unread = [name for name, value in talk[-1].items() if value and name not in _READ]
        if unread:
            raise Refused(400, f"text {number}: {', '.join(unread)} of the answer is not scored")
    answers = [conversation.text_of(talk[-1]) for talk in talks]
    return judge.score_texts([talk[:-1] for talk in talks], answers)


async def _judge(served: Served, given: Judgement, _: Request) -> Response:
    """Keeps a judgement of the page."""
    if served.labels is None:
        raise Refused(404, "judgements are not kept here: start the server with --labels FILE")
    await run_in_threadpool(_keep, served, served.labels.store, given)
    return JSONResponse({"kept": True, "file": str(served.labels.out)})


def _keep(served: Served, store: Store, given: Judgement) -> None:
    """Keeps a judgement that a model with the template of the first one here can train on."""
    where = "the judgement"
    if Pair(0, "", list(given.answers)).is_useless:
        raise UserError("the answers are equal, or one is empty: a choice would teach nothing")
    turns = conversation.messages_of(Record({"messages": given.messages}, where), "messages")
    pair = dict(zip(formats.PAIR, given.answers, strict=True))
    line = json.dumps({"prompt": turns} | pair, ensure_ascii=False).encode()
    policies = (policy.generator.tokenizer for policy in served.policies.values())
    judges = (judge.model.tokenizer for judge in served.judges.values())
    template = chat.template_of(next(itertools.chain(policies, judges)), chat.AUTO)
    formats.read("pairs", {where: files.parse_bytes(line, where)}, template=template)
    store.record("page", turns, given.answers, given.choice, given.seconds)
