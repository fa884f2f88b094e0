"""What the web servers of this package share: which requests reach an application, and for how
long a connection may say nothing. SECURITY.md has the model.
"""

import asyncio
import contextlib
import ipaddress
import re
from collections.abc import Callable
from socket import SO_SNDBUF, SOL_SOCKET
from typing import Any

import uvicorn
from starlette.datastructures import URL
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from rlhf_jax.errors import UserError, logger

MAX_WAIT = 10.0  # seconds for the lines before a body, and for a body
MAX_UNREAD = 20.0  # seconds in which the reader of a reply takes none of it
MOST_OPEN = 900
"""Connections; beyond it one that waits for its client is closed, first one that has never asked,
and of these the oldest."""
_HOST = re.compile(r"(?:\[([0-9a-f.]*:[0-9a-f:.]*)\]|([\w.-]+))(?::\d+)?", re.ASCII)
_OPEN_TO_ALL = ("0.0.0.0", "::")
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


class Guard:
    """Refuses requests before the application sees them, and adds the security headers to all
    responses.

    Args:
        names: host names, besides localhost and addresses, that are this server's.
        max_body: bytes.
        needs_origin: whether a change must say which page it comes from, as browsers do; else it
            may say nothing.
        limit: the status and the reason of a refusal of one's own; None: it is allowed.
        refusal: the response of a status and a reason.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        names: tuple[str, ...],
        max_body: int,
        needs_origin: bool = True,
        limit: Callable[[Request], tuple[int, str] | None] = lambda _: None,
        refusal: Callable[[int, str], Response] = lambda status, why: PlainTextResponse(
            why, status
        ),
    ):
        self.app = app
        self._names = ("localhost", *map(str.lower, names))
        self._max_body = max_body
        self._needs_origin = needs_origin
        self._limit = limit
        self._refusal = refusal

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
        body = b""
        if refused is None and request.method == "POST":
            try:
                body = await asyncio.wait_for(self._body(receive), MAX_WAIT)
            except TimeoutError:
                refused = 408, "too slow"
            if len(body) > self._max_body:
                refused = 413, "too large"
        if refused is not None:
            await self._refusal(*refused)(scope, receive, with_headers)
            return
        is_read = False

        async def replayed() -> Message:
            nonlocal is_read
            if is_read:
                return await receive()
            is_read = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replayed, with_headers)

    def _refused(self, request: Request) -> tuple[int, str] | None:
        host = request.headers.get("host", "")
        if not self._is_ours(host):
            return 421, "this page is not served under that name; see --names"
        given = request.headers.get("origin")
        if request.method not in ("GET", "HEAD") and (self._needs_origin or given is not None):
            try:
                origin = URL(given or "").netloc
            except ValueError:
                return 400, "the Origin is no address"
            if origin.lower() != host.lower():
                return 403, "from another page"
        if not request.scope["path"].startswith("/"):
            return 400, "a path begins with /"
        kind = request.headers.get("content-type", "").partition(";")[0]
        if request.method == "POST" and kind.strip().lower() != "application/json":
            return 415, "the body must be application/json"
        return self._limit(request)

    def _is_ours(self, host: str) -> bool:
        """Whether a Host header names this server. An address cannot be pointed here by DNS."""
        parts = _HOST.fullmatch(host.lower())
        if parts is None:
            return False
        try:
            ipaddress.ip_address(parts[1] or parts[2])
        except ValueError:
            return parts[2] in self._names
        return True

    async def _body(self, receive: Receive) -> bytes:
        """The body of a request, or its beginning if it is too large."""
        body = bytearray()
        while True:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > self._max_body or not message.get("more_body"):
                return bytes(body)


class Connection(H11Protocol):
    """uvicorn's protocol, which would wait for the rest of a request, and for the reader of a
    reply, without end. Here it is closed if a client that has to do something does nothing between
    two looks: no whole lines before a body in ``MAX_WAIT`` seconds, or no byte of a reply taken in
    ``MAX_UNREAD``, and at most twice as long.
    """

    _next_look: asyncio.TimerHandle

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._look()
        others: set[Any] = self.connections - {self}
        waiting = [one for one in others if one._is_waiting()]
        if waiting and len(others) >= MOST_OPEN:
            first = min(waiting, key=lambda one: (one.cycle is not None, one._next_look.when()))
            first.transport.abort()
            self.connections.discard(first)  # now: further ones may come before it is lost

    def connection_lost(self, exc: Exception | None) -> None:
        self._next_look.cancel()
        super().connection_lost(exc)

    def _is_waiting(self) -> bool:
        """Whether the client has to do something."""
        is_unread = self.transport.get_write_buffer_size() > 0
        return is_unread or self.cycle is None or self.cycle.response_complete

    def _look(self, before: object = None) -> None:
        unread = self.transport.get_write_buffer_size()
        now = self.cycle, self._is_waiting(), unread
        if self._is_waiting() and now == before:
            self.transport.abort()
        else:
            seconds = MAX_UNREAD if unread else MAX_WAIT
            self._next_look = self.loop.call_later(seconds, self._look, now)


def listen(app: Any, host: str, port: int) -> tuple[uvicorn.Server, Any, str]:
    """A server that ``run`` runs, its socket, which takes connections already, and its address.

    Raises:
        UserError: the port is taken.
    """
    web = uvicorn.Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            log_config=None,  # its access log would hold tokens
            log_level="critical",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            http=Connection,
            ws="none",
            timeout_keep_alive=10,  # longer than clients keep a connection that they may use again
            limit_concurrency=1000,  # more connections, and requests get 503
            timeout_graceful_shutdown=5,
        )
    )
    try:
        listening = web.config.bind_socket()
        # A large buffer would hide for long whether a reader takes anything.
        listening.setsockopt(SOL_SOCKET, SO_SNDBUF, 1 << 16)
        listening.listen(2048)  # a browser that is faster than the start waits
    except SystemExit:
        raise UserError(f"--port: {host}:{port} cannot be used; choose another") from None
    if host in _OPEN_TO_ALL:
        logger.warning(
            f"--host {host}: everybody who reaches this machine reaches the page, and reads "
            "tokens and texts on the way. Leave --host out and put a server with TLS, such "
            "as nginx or Caddy, in front"
        )
    shown = f"[{host}]" if ":" in host else host
    return web, listening, f"http://{shown}:{listening.getsockname()[1]}"


def run(web: uvicorn.Server, listening: Any) -> None:
    """Serves until a signal."""
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it after it has ended
        web.run(sockets=[listening])
