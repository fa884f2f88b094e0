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
from typing import Any, NamedTuple, TypeVar

from rlhf_jax.errors import ServiceError, UserError, escaped, logger
from rlhf_jax.ops import check_number

T = TypeVar("T")

SERVICE_KEY = "REWARD_API_KEY"
JUDGE_KEY = "OPENAI_API_KEY"
ENGINE_KEY = "ENGINE_API_KEY"
TEACHER_KEY = "TEACHER_API_KEY"
MOST_LEVELS = 32  # of lists and objects in a reply
SHOWN = 200  # characters of a reply in an error
_ATTEMPTS = 5
_SECONDS = 1.0  # before the second attempt; each later one waits twice as long
_LONGEST_WAIT = 30.0
_PATIENCE = 10.0  # seconds after which waiting is said; then after twice as many, and so on
_SCHEMES = ("http", "https")
_PASSING = (408, 429)  # and from 500 on: statuses after which a request is sent again
_HIDDEN = "***"


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


# --- The forms of replies


class Leaf(NamedTuple):
    """What a value of a reply must be."""

    what: str
    fits: Callable[[Any], bool]


TEXT = Leaf("a text", lambda value: isinstance(value, str))
NULL = Leaf("null", lambda value: value is None)
NUMBER = Leaf("a finite number", lambda value: is_number(value))
INDEX = Leaf("a whole number of 31 bits", lambda value: type(value) is int and 0 <= value < 1 << 31)

_LOG_PROBS = {"token_logprobs": [NUMBER], "tokens": ([TEXT], NULL)}
_CHOICE = {
    "index": INDEX,
    "finish_reason": (TEXT, NULL),
    "token_ids": ([INDEX], NULL),
    "prompt_token_ids": ([INDEX], NULL),
    "logprobs": (NULL, _LOG_PROBS),
}
_TOKEN = {"token_id": INDEX, "logprob": NUMBER}
_GENERATED = {
    "index": INDEX,
    "finish_reason": (TEXT, NULL),
    "token_ids": [INDEX],
    "logprobs": {"content": [_TOKEN]},
    "weight_versions": (NULL, [{"version": (TEXT, INDEX)}]),
}
_GIVEN = {"tokens": [TEXT], "token_logprobs": [(NUMBER, NULL)]}

# An object has at least the keys of its form; a key that may be null may be missing. A tuple is a
# choice of forms, a list has the form of each item.
REWARDS = {"rewards": [(NUMBER, NULL)], "ids": ([INDEX], NULL)}
JUDGEMENT = {"choices": [{"message": {"content": (TEXT, NULL)}}]}
MODELS = {"data": [{"id": TEXT}]}
COMPLETIONS = {"model": TEXT, "choices": [_CHOICE]}
GENERATIONS = {"choices": [_GENERATED]}
LOG_PROBS = {"choices": [{"index": INDEX, "logprobs": (NULL, _GIVEN)}]}


def is_number(value: Any) -> bool:
    """Whether a value is a number that a float can hold; True and False are."""
    return isinstance(value, int | float) and abs(value) < 1e300


def misfit(value: Any, form: Any, place: str = "it") -> str:
    """A sentence about the first place where a value differs from a form; "" if it fits."""
    if isinstance(form, Leaf):
        return "" if form.fits(value) else f"{place} must be {form.what}"
    if isinstance(form, tuple):
        misfits = [misfit(value, choice, place) for choice in form]
        return "" if "" in misfits else max(misfits, key=len)  # the one that names the inner place
    if isinstance(form, list):
        if not isinstance(value, list):
            return f"{place} must be a list"
        of_items = (misfit(item, form[0], f"{place}[{i}]") for i, item in enumerate(value))
        return next(filter(None, of_items), "")
    if not isinstance(value, dict):
        return f"{place} must be an object"
    of_keys = (misfit(value.get(name), inner, f"{place}.{name}") for name, inner in form.items())
    return next(filter(None, of_keys), "")


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

    Raises:
      ServiceError: it names the URL and quotes the reply, without the key.
      UserError: the key cannot be a key.
    """
    key = _key(variable)
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


def _key(variable: str) -> str | None:
    """The value of an environment variable, which a header can hold."""
    key = os.environ.get(variable)
    if key and not re.fullmatch("[!-~]+", key):
        raise UserError(
            f"{variable}: the key in the environment holds a line end, a space or a character "
            "beyond ASCII, which no key has; set it again"
        )
    return key or None


async def _exchange(url: str, body: bytes | None, settings: Requests, key: str | None) -> bytes:
    """The body of the reply to one request, which ends at the deadline."""
    # Only runs that ask a server pay for the import.
    import httpx

    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    method = "GET" if body is None else "POST"
    client = httpx.AsyncClient(trust_env=False, verify=_trusted(), timeout=None)
    try:
        async with asyncio.timeout(settings.timeout), client:
            request = client.stream(method, url, content=body, headers=headers)
            async with request as response:
                content = await _content(response, settings.most_bytes)
    except TimeoutError:
        limit = f"{settings.timeout:g} seconds ({settings.section}.timeout)"
        raise _Fault(f"no whole reply within {limit}") from None
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        raise _Fault(f"{type(error).__name__}: {quoted(error, key)}") from None
    status = response.status_code
    if response.is_success:
        return content
    reason = quoted(response.reason_phrase, key)
    where = quoted(response.headers.get("location", ""), key)
    moved = f", a redirect to {where}, which is not followed" if response.is_redirect else ""
    said = f"HTTP {status} {reason}{moved}: {quoted(content, key)}"
    raise _Fault(said, passes=status in _PASSING or status >= 500)


async def _content(response: Any, most_bytes: int) -> bytes:
    content = bytearray()
    async for piece in response.aiter_raw():
        content += piece
        if len(content) > most_bytes:
            raise _Fault(f"the reply has more than {most_bytes} bytes", passes=False)
    return bytes(content)


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
    started = time.monotonic()
    patience = _PATIENCE
    while True:
        try:
            left = started + patience - time.monotonic()
            return future.result(max(left, 0.0))
        except concurrent.futures.TimeoutError:
            if future.done():
                return future.result()
            logger.info(f"{what} for {patience:g} seconds ({attempt})")
            patience *= 2
        except BaseException:
            future.cancel()
            raise


def _read(content: bytes, form: Any, key: str | None) -> Any:
    """The JSON of a reply.

    Raises:
      _Fault: it is none, or has another form.
    """
    try:
        value = cleaned(json.loads(content), key)
    except (ValueError, RecursionError) as error:
        reason = "too many levels" if isinstance(error, RecursionError) else quoted(error, key)
        raise _Fault(f"the reply is no JSON: {reason}; got {quoted(content, key)}") from None
    wrong = misfit(value, form)
    if wrong:
        shown = quoted(json.dumps(value, ensure_ascii=False), key)
        raise _Fault(f"{wrong}; got {shown}", passes=False)
    return value


def cleaned(value: Any, key: str | None, level: int = 0) -> Any:
    """JSON without the key and without halves of surrogate pairs, which no file can hold.

    Raises ValueError if it has more than ``MOST_LEVELS``.
    """
    if isinstance(value, str):
        return _without(value, key).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if level > MOST_LEVELS:
        raise ValueError(f"more than {MOST_LEVELS} levels")
    if isinstance(value, list):
        return [cleaned(item, key, level + 1) for item in value]
    if isinstance(value, dict):
        return {cleaned(name, key): cleaned(item, key, level + 1) for name, item in value.items()}
    return value


def quoted(said: Any, key: str | None, limit: int = SHOWN) -> str:
    """The beginning of what a server said, as a terminal may show it, without the key."""
    text = said.decode("utf-8", "replace") if isinstance(said, bytes) else str(said)
    text = _without(text, key)
    shown = escaped(text[:limit]).replace("\n", "\\n")
    return shown if len(text) <= limit else f"{shown}..."


def _without(text: str, key: str | None) -> str:
    if not key:
        return text
    spelled = json.dumps(key)[1:-1]
    return text.replace(spelled, _HIDDEN).replace(key, _HIDDEN)


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
