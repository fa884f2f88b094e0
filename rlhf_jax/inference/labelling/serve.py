"""Serves the page: its tokens, its connections, the pairs that are sampled while people label, and
OUT, which is kept up to date.
"""

import asyncio
import contextlib
import json
import os
import secrets
import stat
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from rlhf_jax.errors import UserError, file_errors, is_there, logger, read_file
from rlhf_jax.inference import label
from rlhf_jax.inference.labelling import pairs, server
from rlhf_jax.inference.labelling.settings import Config
from rlhf_jax.inference.labelling.store import Store
from rlhf_jax.runs.writing import refuse_links, write_atomically

MOST_WAITING = 100
"""Connections of one address, such as a proxy's, that are open without a whole request; beyond it
the oldest is closed."""
_WRITE_EVERY = 2.0  # seconds
_PATIENCE = 5.0  # seconds for a batch that is being sampled when the server ends
_OPEN_TO_ALL = ("0.0.0.0", "::")


def run(folder: str | None, config: Config) -> str:
    """Serves until Ctrl-C or SIGTERM; returns a summary.

    Raises:
        UserError: as ``label.opened``; nobody may read the tokens; the port is taken.
    """
    out = Path(config.out)
    refuse_links([_tokens_file(out)])
    with label.opened(folder, config) as (store, source):
        _serve(store, source, config, tokens(out, config.people))
        return label.conclude(store, source, folder, config)


def tokens(out: Path, people: list[str]) -> dict[str, str]:
    """{name: token} of the annotators, made once and kept beside the store, for the owner alone.

    Raises:
        UserError: the file is broken, or others may read it.
    """
    path = _tokens_file(out)
    known: Any = {}
    if is_there(path):
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise UserError(f"{path}: others may read these secrets; run chmod 600 {path}")
        content = read_file(path)
        try:
            known = json.loads(content)
        except (ValueError, RecursionError):
            known = None
        if not isinstance(known, dict) or not all(
            isinstance(token, str) and len(token) >= 32 for token in known.values()
        ):
            raise UserError(
                f"{path}: is no file of tokens; delete it, and each annotator gets another"
            )
    missing = [name for name in people if name not in known]
    if missing:
        known |= {name: secrets.token_urlsafe(32) for name in missing}
        before = os.umask(0o077)  # nobody else may read the file at any moment
        try:
            with file_errors(path, "written"):
                write_atomically(path, json.dumps(known, indent=1) + "\n")
        finally:
            os.umask(before)
    return {name: known[name] for name in people}


def _tokens_file(out: Path) -> Path:
    return out.with_name(f"{out.name}.session.tokens.json")


def _serve(store: Store, source: pairs.Source, config: Config, own: dict[str, str]) -> None:
    """Serves until a signal. The feeder's error ends it too."""

    def stop() -> None:
        web.should_exit = True

    feeder = Feeder(source, store, config.ahead, on_error=stop)
    page = server.Page(
        store,
        {server.digest(token): name for name, token in own.items()},
        names=(*config.names, config.host),
        reasons=config.reasons,
        is_complete=lambda: feeder.is_complete,
        num_pairs=source.num_pairs,
    )

    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        stopping = asyncio.Event()
        feeder.start()
        writer = asyncio.create_task(_write_often(store, Path(config.out), stopping))
        try:
            yield
        finally:
            stopping.set()
            await writer
            await asyncio.to_thread(feeder.stop)

    web = uvicorn.Server(
        uvicorn.Config(
            server.build(page, lifespan),
            host=config.host,
            port=config.port,
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
        raise UserError(
            f"--port: {config.host}:{config.port} cannot be used; choose another"
        ) from None
    if config.host in _OPEN_TO_ALL:
        logger.warning(
            f"--host {config.host}: everybody who reaches this machine reaches the page, and reads "
            "tokens and texts on the way. Leave --host out and put a server with TLS, such "
            "as nginx or Caddy, in front"
        )
    host = f"[{config.host}]" if ":" in config.host else config.host
    for name, token in own.items():
        logger.info(f"{name}: http://{host}:{listening.getsockname()[1]}/{token}")
    logger.info("Ctrl-C ends it; the same command continues")
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it after it has ended
        web.run(sockets=[listening])
    if feeder.error is not None:
        raise feeder.error


async def _write_often(store: Store, out: Path, stopping: asyncio.Event) -> None:
    """Writes OUT when the store has changed."""
    written = -1
    while not stopping.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stopping.wait(), _WRITE_EVERY)
        now = store.num_changes()
        try:
            if now != written:
                await asyncio.to_thread(label.write, store, out)
                written = now
        except UserError as error:  # a full disk: the store has what it confirmed
            logger.warning(str(error))


class Feeder(threading.Thread):
    """Adds the pairs of a source to a store, in the background, ahead of the readers.

    ``error``: why it ended early, if it did.
    """

    def __init__(
        self, source: pairs.Source, store: Store, ahead: int, on_error: Callable[[], None]
    ):
        super().__init__(name="pairs", daemon=True)
        self.error: Exception | None = None
        self.is_complete = False  # whether all pairs are in the store
        self._source = source
        self._store = store
        self._ahead = ahead
        self._on_error = on_error
        self._stopping = threading.Event()

    def run(self) -> None:
        """Samples until all pairs are in the store, or until it is stopped."""
        try:
            coming = self._source.batches(self._store.num_pairs())
            while True:
                while self._store.num_waiting() >= self._ahead:
                    if self._stopping.wait(0.2):
                        return
                added = next(coming, None)
                if self._stopping.is_set():
                    return
                if added is None:
                    break
                self._store.add(added)
            self.is_complete = True
        except Exception as error:  # a thread's own would reach nobody
            self.error = error
            self._on_error()

    def stop(self) -> None:
        """Ends the thread: it adds nothing any more, and a batch that takes long is left."""
        self._stopping.set()
        self.join(_PATIENCE)


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
        self._limit = self.loop.call_later(server.MAX_WAIT, self._give_up)
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
