"""The client of every server outside this program: rewards, judges, teachers and engines.

A request has a deadline for the whole exchange and a limit of bytes. It follows no redirect and
reads no proxy or password from the environment. A reply must have one of the forms of this file;
whatever else comes back becomes a `ServiceError` that quotes its beginning. Keys are read from the
environment variables below, when a request is made; no message, reply or file has them.
"""

import asyncio
import concurrent.futures
import contextlib
import functools
import json
import logging
import os
import re
import ssl
import threading
import time
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any, NotRequired, TypedDict, TypeVar

import msgspec
from msgspec import Meta

from rlhf_jax.errors import ServiceError, UserError, escaped, logger
from rlhf_jax.ops import check_number

T = TypeVar("T")

SERVICE_KEY = "REWARD_API_KEY"
JUDGE_KEY = "OPENAI_API_KEY"
ENGINE_KEY = "ENGINE_API_KEY"
TEACHER_KEY = "TEACHER_API_KEY"
SHOWN = 200  # characters of a reply in an error
_ATTEMPTS = 5
_SECONDS = 1.0  # before the second attempt; each later one waits twice as long
_LONGEST_WAIT = 30.0
_PATIENCE = 10.0  # seconds after which waiting is said; then after twice as many, and so on
_SCHEMES = ("http", "https")
_PASSING = (408, 429)  # and from 500 on: statuses after which a request is sent again


@dataclass(frozen=True)
class Requests:
    """How a server is asked."""

    concurrency: int = 8
    """Requests that are sent at once."""
    timeout: float = 120.0
    """Seconds from the connection to the last byte after which a request counts as failed."""

    section = "judge"  # of the settings, for messages
    most_bytes = 1 << 24  # of a reply

    def __post_init__(self) -> None:
        check_number("concurrency", self.concurrency, at_least=1)
        check_number("timeout", self.timeout, above=0)


# --- The forms of replies: a key that may be null may be missing, and other keys are left out
# ruff: noqa: UP013 (a form is shorter as a call)

_Number = Annotated[float, Meta(gt=-1e300, lt=1e300)]  # finite
_Index = Annotated[int, Meta(ge=0, lt=1 << 31)]
_Ids = list[_Index] | None
_Text = str | None
_Message = TypedDict("_Message", {"content": NotRequired[_Text]})
_Judged = TypedDict("_Judged", {"message": _Message, "finish_reason": NotRequired[_Text]})
_Model = TypedDict("_Model", {"id": str, "owned_by": NotRequired[Any]})
_LogProbs = TypedDict(
    "_LogProbs", {"token_logprobs": list[_Number], "tokens": NotRequired[list[str] | None]}
)
_Choice = TypedDict(
    "_Choice",
    {
        "index": _Index,
        "finish_reason": NotRequired[_Text],
        "token_ids": NotRequired[_Ids],
        "prompt_token_ids": NotRequired[_Ids],
        "logprobs": NotRequired[_LogProbs | None],
    },
)
_Token = TypedDict("_Token", {"token_id": _Index, "logprob": _Number})
_Tokens = TypedDict("_Tokens", {"content": list[_Token]})
_Span = TypedDict("_Span", {"version": str | _Index})
_Generated = TypedDict(
    "_Generated",
    {
        "index": _Index,
        "finish_reason": NotRequired[_Text],
        "token_ids": list[_Index],
        "logprobs": _Tokens,
        "weight_versions": NotRequired[list[_Span] | None],
        "sampling_mask": NotRequired[list[list[_Index]] | None],
    },
)
_Given = TypedDict("_Given", {"tokens": list[str], "token_logprobs": list[_Number | None]})
_Echo = TypedDict("_Echo", {"index": _Index, "logprobs": NotRequired[_Given | None]})

Rewards = TypedDict("Rewards", {"rewards": list[_Number | bool | None], "ids": NotRequired[_Ids]})
Judgement = TypedDict("Judgement", {"choices": list[_Judged]})
Models = TypedDict("Models", {"data": list[_Model]})
Completions = TypedDict("Completions", {"model": str, "choices": list[_Choice]})
Generations = TypedDict("Generations", {"choices": list[_Generated]})
LogProbs = TypedDict("LogProbs", {"choices": list[_Echo]})


# --- Asking


class _Fault(Exception):
    """Why an attempt failed, and whether the next one may not."""

    def __init__(self, message: str, passes: bool = True):
        super().__init__(message)
        self.passes = passes


def ask(url: str, question: Any, settings: Requests, variable: str, form: Any = None) -> Any:
    """The reply to a JSON POST, or to a GET if the question is None: its JSON, of the form, or None
    if there is no form. It asks again after faults that may pass: no connection, no reply in time,
    HTTP 408, 429 or 5xx, a reply that is cut or no JSON.

    Args:
      variable: of the environment, whose value is sent as a key if it is set.
      form: a typed dict, whose keys the result has.

    Raises:
      ServiceError: it names the URL and quotes the reply, without the key.
      UserError: the key cannot be a key.
    """
    key = os.environ.get(variable) or None
    if key and not re.fullmatch("[!-~]+", key):
        raise UserError(
            f"{variable}: the key in the environment holds a line end, a space or a character "
            "beyond ASCII, which no key has; set it again"
        )
    body = None if question is None else json.dumps(question).encode("utf-8")
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(min(_SECONDS * 2 ** (attempt - 1), _LONGEST_WAIT))
        waiting = f"attempt {attempt + 1} of {_ATTEMPTS}"
        try:
            content = _waited(_exchange(url, body, settings, key), f"{url}: no reply", waiting)
            return None if form is None else _read(content, form, key)
        except _Fault as error:
            fault = error
        if not fault.passes:
            break
    raise ServiceError(f"{url}: {quoted(fault, key, SHOWN * 4)} (attempt {attempt + 1})") from None


async def _exchange(url: str, body: bytes | None, settings: Requests, key: str | None) -> bytes:
    """The body of the reply to one request, which ends at the deadline."""
    # Only runs that ask a server pay for the import.
    import httpx

    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    method = "GET" if body is None else "POST"
    client = httpx.AsyncClient(trust_env=False, verify=_trusted(), timeout=None)
    content = bytearray()
    try:
        async with asyncio.timeout(settings.timeout), client:
            request = client.stream(method, url, content=body, headers=headers)
            async with request as response:
                async for piece in response.aiter_raw():
                    content += piece
                    if len(content) > settings.most_bytes:
                        what = f"the reply has more than {settings.most_bytes} bytes"
                        raise _Fault(what, passes=False)
    except TimeoutError:
        limit = f"{settings.timeout:g} seconds ({settings.section}.timeout)"
        raise _Fault(f"no whole reply within {limit}") from None
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        raise _Fault(f"{type(error).__name__}: {quoted(error, key)}") from None
    if response.is_success:
        return bytes(content)
    status = response.status_code
    reason = quoted(response.reason_phrase, key)
    where = quoted(response.headers.get("location", ""), key)
    moved = f", a redirect to {where}, which is not followed" if response.is_redirect else ""
    said = f"HTTP {status} {reason}{moved}: {quoted(bytes(content), key)}"
    raise _Fault(said, passes=status in _PASSING or status >= 500)


@functools.cache
def _trusted() -> ssl.SSLContext:
    """The system's certificates, or those of SSL_CERT_FILE."""
    return ssl.create_default_context()


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """The event loop of all requests, in a thread of its own: callers may have a loop too."""
    for name in ("httpx", "httpcore"):  # their lines have headers and reason phrases
        logging.getLogger(name).setLevel(logging.WARNING)
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="requests", daemon=True).start()
    return loop


def _waited(work: Coroutine[Any, Any, T], what: str, attempt: str) -> T:
    """The result of the work; waiting for it is said after 10, 20, 40, ... seconds."""
    future = asyncio.run_coroutine_threadsafe(work, _loop())
    pause = patience = _PATIENCE
    try:
        while not concurrent.futures.wait([future], pause).done:
            logger.info(f"{what} for {patience:g} seconds ({attempt})")
            pause = patience
            patience *= 2
    except BaseException:
        future.cancel()
        raise
    return future.result()


def _read(content: bytes, form: Any, key: str | None) -> Any:
    """The JSON of a reply, of a form, without the key and halves of surrogate pairs; or _Fault."""
    try:
        value = _cleaned(json.loads(content), key)
        shown = json.dumps(value, ensure_ascii=False)
    except (ValueError, RecursionError) as error:
        reason = "too many levels" if isinstance(error, RecursionError) else quoted(error, key)
        raise _Fault(f"the reply is no JSON: {reason}; got {quoted(content, key)}") from None
    try:
        return msgspec.convert(value, form)
    except msgspec.ValidationError as error:
        said = f"the reply has another form: {error}; got {quoted(shown, key)}"
        raise _Fault(said, passes=False) from None


def _cleaned(value: Any, key: str | None) -> Any:
    """JSON without the key and without halves of surrogate pairs, which no file can hold."""
    if isinstance(value, str):
        return _without(value, key).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_cleaned(item, key) for item in value]
    if isinstance(value, dict):
        return {_cleaned(name, key): _cleaned(item, key) for name, item in value.items()}
    return value


def quoted(said: Any, key: str | None, limit: int = SHOWN) -> str:
    """The beginning of what a server said, as a terminal may show it, without the key."""
    text = said.decode("utf-8", "replace") if isinstance(said, bytes) else str(said)
    text = _without(text, key)
    shown = escaped(text[:limit]).replace("\n", "\\n")
    return shown if len(text) <= limit else f"{shown}..."


def _without(text: str, key: str | None) -> str:
    return text.replace(json.dumps(key)[1:-1], "***").replace(key, "***") if key else text


def ask_each(ask: Callable[[T], None], questions: Iterable[T], settings: Requests) -> None:
    """Calls ``ask`` with each question, ``settings.concurrency`` at once. After an error no other
    call begins.
    """
    with ThreadPoolExecutor(settings.concurrency) as threads:
        try:
            list(threads.map(ask, questions))
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise


def is_url(text: str) -> bool:
    """Whether a text is an http or https URL, in letters of any case."""
    if ":" not in text:  # without the import
        return False
    import httpx

    with contextlib.suppress(httpx.InvalidURL):
        return httpx.URL(text).scheme in _SCHEMES
    return False


def check_url(name: str, url: str) -> None:
    """Raises UserError unless it is an http or https URL, without a name and password in it."""
    import httpx

    try:
        parts = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise UserError(f"{name} is no URL: {error}; got {quoted(repr(url), None)}") from None
    if parts.userinfo:
        raise UserError(
            f"{name} holds a name or password, which the run's files would keep; give a key as "
            f"{JUDGE_KEY}, {SERVICE_KEY}, {ENGINE_KEY} or {TEACHER_KEY} in the environment"
        )
    if parts.scheme not in _SCHEMES or not parts.host or (parts.port or 1) >= 1 << 16:
        raise UserError(f"{name} must begin with http://HOST or https://HOST, got {url!r}")
