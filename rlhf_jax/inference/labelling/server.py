"""The page's application: one address for each annotator, and nothing else.

Who knows the token of an address is its annotator. A request with another Host, another Origin, a
large body, or at a high rate is refused before anything reads it; SECURITY.md has the model.
"""

import asyncio
import collections
import hashlib
import ipaddress
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import URL
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf_jax.errors import UserError, logger
from rlhf_jax.inference.labelling import markup
from rlhf_jax.inference.labelling.store import Store, Task

MAX_BODY = 16_384
MAX_WAIT = 10.0  # seconds for the lines before a body, and for a body
MAX_REASON = 2_000
RATE = 10.0
"""Requests a second of one address, after a burst of ``BURST``; wrong addresses share one rate."""
BURST = 40.0
CHOICES = ("a", "b", "tie", "bad", "skip")
STRENGTHS = ("slight", "clear", "strong")
_FOLDER = Path(__file__).parent / "page"
_TYPES = {"label.js": "text/javascript", "label.css": "text/css"}
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",  # it would hold the token
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "x-robots-tag": "noindex",
    "cache-control": "no-store",
}


class Page(NamedTuple):
    """What the application serves."""

    store: Store
    annotators: Mapping[str, str]  # {digest of a token: name}
    names: tuple[str, ...] = ()  # further host names
    reasons: bool = False
    is_complete: Callable[[], bool] = lambda: True  # whether all pairs are in the store
    num_pairs: int = 0  # there will be, as far as it is known


def digest(token: str) -> str:
    """What is compared of a token: how long that takes says nothing about the token."""
    return hashlib.sha256(token.encode()).hexdigest()


def build(page: Page, lifespan: Any = None) -> ASGIApp:
    """The application; it takes nothing from the network but requests.

    lifespan: as of Starlette.
    """
    routes = [Route(f"/{name}", _asset(name)) for name in _TYPES]
    routes += [
        Route("/{token}", _Of(page, _html), methods=["GET"]),
        Route("/{token}/pair", _Of(page, _pair), methods=["GET"]),
        Route("/{token}/judgement", _Of(page, _judge), methods=["POST"]),
        Route("/{token}/undo", _Of(page, _undo), methods=["POST"]),
    ]
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={UserError: _not_kept})
    app.router.redirect_slashes = False
    return Guard(app, page)


async def _not_kept(_: Request, error: Exception) -> Response:
    logger.warning(str(error))
    return JSONResponse({"error": f"This was not saved. {error}"}, 507)


class _Of:
    """An endpoint of one annotator: 404 for a wrong token."""

    def __init__(self, page: Page, answer: Callable[[Page, str, Any], Response]):
        self.page = page
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        name = self.page.annotators.get(digest(request.path_params["token"]))
        if name is None:
            raise HTTPException(404)
        body = None
        if request.method == "POST":
            body = await _json(request)
        response = await run_in_threadpool(self.answer, self.page, name, body)
        await response(scope, receive, send)


async def _json(request: Request) -> dict[str, Any]:
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    if kind != "application/json":
        raise HTTPException(415)
    try:
        value = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise HTTPException(400) from None
    if not isinstance(value, dict):
        raise HTTPException(400)
    return value


def _asset(name: str) -> Callable[[Request], Response]:
    content = (_FOLDER / name).read_bytes()

    def serve(_: Request) -> Response:
        return Response(content, media_type=_TYPES[name])

    return serve


def _html(page: Page, name: str, _: Any) -> Response:
    return Response((_FOLDER / "label.html").read_bytes(), media_type="text/html")


def _pair(page: Page, name: str, _: Any) -> Response:
    return JSONResponse(_state(page, name))


def _state(page: Page, name: str) -> dict[str, Any]:
    """All that the script shows."""
    is_complete = page.is_complete()  # first: a pair may be added meanwhile
    task = page.store.next(name, is_complete=is_complete)
    progress = page.store.progress(name, 0 if is_complete else page.num_pairs)
    return {
        "annotator": name,
        "pair": None if task is None else _shown(task),
        "waiting": task is None and not is_complete,
        "undo": page.store.last(name),
        "reasons": page.reasons,
        "progress": progress._asdict(),
    }


def _shown(task: Task) -> dict[str, Any]:
    return {
        "id": task.id,
        "again": task.again,
        "conversation": markup.conversation(task.prompt),
        "answers": [markup.render(text) for text in task.answers],
    }


def _judge(page: Page, name: str, body: dict[str, Any]) -> Response:
    number = _number(body)
    choice = body.get("choice")
    strength = body.get("strength")
    if choice not in CHOICES or strength not in (None, *STRENGTHS):
        raise HTTPException(400)
    reason = _reason(body)
    if not page.reasons and (strength or reason):
        raise HTTPException(400)
    kept = page.store.judge(
        name, number, choice, seconds=_seconds(body), strength=strength, reason=reason
    )
    return JSONResponse(_state(page, name) | {"kept": kept})


def _seconds(body: dict[str, Any]) -> float:
    seconds = body.get("seconds")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise HTTPException(400)
    if not 0 <= seconds < 1e9:  # nor nan
        raise HTTPException(400)
    return seconds


def _reason(body: dict[str, Any]) -> str | None:
    """The reason as UTF-8 text; None if it is empty."""
    reason = body.get("reason") or ""
    if not isinstance(reason, str) or len(reason) > MAX_REASON:
        raise HTTPException(400)
    return reason.encode("utf-8", "replace").decode().strip() or None


def _undo(page: Page, name: str, body: dict[str, Any]) -> Response:
    kept = page.store.undo(name, _number(body))
    return JSONResponse(_state(page, name) | {"kept": kept})


def _number(body: dict[str, Any]) -> int:
    number = body.get("id")
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 1 << 62:
        raise HTTPException(400)
    return number


class Guard:
    """Refuses requests before the application sees them, and adds the security headers to all
    responses.
    """

    def __init__(self, app: ASGIApp, page: Page, clock: Callable[[], float] = time.monotonic):
        self.app = app
        self.page = page
        self._clock = clock
        # {whose: (requests that are left, when they were counted)}
        self._left: dict[str, tuple[float, float]] = collections.defaultdict(
            lambda: (BURST, clock())
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # a web socket
            await send({"type": "websocket.close", "code": 1000})
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                ours = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *ours]
            await send(message)

        request = Request(scope)
        refused = self._refused(request)
        if refused is not None:
            await PlainTextResponse(refused.detail, refused.status_code)(
                scope, receive, with_headers
            )
            return
        body: bytes | None = b""
        if request.method == "POST":
            try:
                body = await asyncio.wait_for(_body(receive), MAX_WAIT)
            except TimeoutError:
                await PlainTextResponse("too slow", 408)(scope, receive, with_headers)
                return
        if body is None:
            await PlainTextResponse("too large", 413)(scope, receive, with_headers)
            return
        await self.app(scope, _replayed(body), with_headers)

    def _refused(self, request: Request) -> HTTPException | None:
        host = request.headers.get("host", "")
        if not self._is_ours(host):
            return HTTPException(421, "this page is not served under that name; see --names")
        if request.method not in ("GET", "HEAD"):
            try:
                origin = URL(request.headers.get("origin", "")).netloc
            except ValueError:
                return HTTPException(400, "the Origin is no address")
            if origin.lower() != host.lower():
                return HTTPException(403, "from another page")
        if not request.scope["path"].startswith("/"):
            return HTTPException(400, "a path begins with /")
        if not self._is_allowed(request):
            return HTTPException(429, "too many requests; wait a second")
        return None

    def _is_ours(self, host: str) -> bool:
        """Whether a Host header names this page. An address is no name that somebody else could
        point here, as in DNS rebinding.
        """
        try:
            name = URL(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in ("localhost", *(known.lower() for known in self.page.names)):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _is_allowed(self, request: Request) -> bool:
        """Takes one from the rate of the request's address."""
        first = request.scope["path"].split("/")[1]
        if first in _TYPES:
            return True
        key = digest(first)
        whose = key if key in self.page.annotators else ""
        left, since = self._left[whose]
        now = self._clock()
        left = min(BURST, left + (now - since) * RATE)
        self._left[whose] = (max(left - 1, 0), now)
        return left >= 1


async def _body(receive: Receive) -> bytes | None:
    """The body of a request; None if it is too large."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            return None
        if not message.get("more_body"):
            return body


def _replayed(body: bytes) -> Receive:
    """A ``receive`` that gives a body that was read before."""

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive
