"""What the web servers of this package share: which requests reach an application, and for how
long a connection may say nothing. SECURITY.md has the model.
"""

import asyncio
import contextlib
import ipaddress
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
MOST_WAITING = 100
"""Connections of one address, such as a proxy's, that are open without a whole request; beyond it
the oldest is closed."""
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
        return self._limit(request)

    def _is_ours(self, host: str) -> bool:
        """Whether a Host header names this server. An address cannot be pointed here by DNS."""
        try:
            name = URL(f"//{host}").hostname or ""
            if name in self._names:
                return True
            ipaddress.ip_address(name)
        except ValueError:
            return False
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
    """uvicorn's protocol, which would wait for the rest of a request without end. Here the lines
    before a body have ``MAX_WAIT`` seconds, from the connection or the reply before.
    """

    _limit: asyncio.TimerHandle | None = None  # set while no request is being answered

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._end_wait()

    def on_response_complete(self) -> None:
        self._wait()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_wait()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._end_wait()
        self._limit = self.loop.call_later(MAX_WAIT, self._give_up)
        others: set[Any] = self.connections
        waiting = [one for one in others if one._limit and one._address == self._address]
        if len(waiting) > MOST_WAITING:
            min(waiting, key=lambda one: one._limit.when())._give_up()

    def _end_wait(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None

    def _give_up(self) -> None:
        self._end_wait()
        self.transport.abort()

    @property
    def _address(self) -> str:
        return self.client[0] if self.client else ""


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
            limit_concurrency=1000,
            timeout_graceful_shutdown=5,
        )
    )
    try:
        listening = web.config.bind_socket()
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
