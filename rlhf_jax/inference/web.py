"""What the web servers of this package share: which requests reach an application, and for how
long a connection may say nothing. SECURITY.md has the model.
"""

import asyncio
import contextlib
import ipaddress
import re
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.datastructures import URL
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from rlhf_jax.errors import UserError, logger

MAX_WAIT = 10.0  # seconds for the lines before a body, and for a body
MAX_UNREAD = 30.0  # seconds in which the reader of a reply takes none of it
MOST_OPEN = 900
"""Connections; beyond it one that waits for its client is closed: first those that have never
asked, and of these the oldest."""
_MOST_ANSWERED = 1000  # more connections than that, and requests get 503
_UNREAD_BYTES = 1 << 16  # of a reply, in the kernel
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


def is_json(request: Request) -> bool:
    """Whether a request says that its body is JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0]
    return kind.strip().lower() == "application/json"


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
    reply, without end. Here the lines before a body have ``MAX_WAIT`` seconds, from the connection
    or the reply before, and a reader takes something in each ``MAX_UNREAD`` seconds.
    """

    _limit: asyncio.TimerHandle | None = None  # set while the client has to do something
    _unread = 0  # bytes of replies when it was set

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()
        others: set[Any] = self.connections
        waiting = [one for one in others if one._limit and one is not self]
        if waiting and len(others) > MOST_OPEN:
            min(waiting, key=lambda one: (one.cycle is not None, one._limit.when()))._give_up()

    def handle_events(self) -> None:
        super().handle_events()
        self._answers()

    def on_response_complete(self) -> None:
        self._wait()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._answers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_wait()
        super().connection_lost(exc)

    def _answers(self) -> None:
        """Ends the wait if it is the server's turn."""
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if is_answering and not self.flow.write_paused:
            self._end_wait()

    def _wait(self) -> None:
        self._end_wait()
        self._unread = self.transport.get_write_buffer_size()
        seconds = MAX_UNREAD if self._unread else MAX_WAIT
        self._limit = self.loop.call_later(seconds, self._end_of_wait)

    def _end_of_wait(self) -> None:
        if self.transport.get_write_buffer_size() < self._unread:
            self._wait()
        else:
            self._give_up()

    def _end_wait(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None

    def _give_up(self) -> None:
        self._end_wait()
        self.transport.abort()


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
            limit_concurrency=_MOST_ANSWERED,
            timeout_graceful_shutdown=5,
        )
    )
    try:
        listening = web.config.bind_socket()
        # A large buffer would hide for long whether a reader takes anything.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNREAD_BYTES)
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
