"""Serves the page: its tokens, its connections, and pairs that are sampled while people label."""

import asyncio
import contextlib
import json
import os
import secrets
import stat
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec

from rlhf_jax.errors import UserError, file_errors, is_there, logger, warn_once
from rlhf_jax.inference import label, web
from rlhf_jax.inference.labelling import pairs, server
from rlhf_jax.inference.labelling.settings import Config
from rlhf_jax.inference.labelling.store import Pair, Store
from rlhf_jax.runs import reading
from rlhf_jax.runs.writing import refuse_links, write_atomically

_PATIENCE = 5.0  # seconds for a batch that is being sampled when the server ends


def run(folder: str | None, config: Config) -> str:
    """Serves until Ctrl-C or SIGTERM; returns a summary.

    Raises:
        UserError: as ``label.opened``; nobody may read the tokens; the port is taken.
    """
    out = Path(config.out)
    refuse_links([_tokens_file(out)])
    with label.opened(config, lambda: pairs.open_source(folder, config)) as (store, source):
        _serve(store, source, config, tokens(out, config.people))
        return label.conclude(store, source, folder, config)


def tokens(out: Path, people: list[str]) -> dict[str, str]:
    """{name: token} of the annotators, made once and kept beside the store, for the owner alone.

    Raises:
        UserError: the file is broken, or others may read it.
    """
    path = _tokens_file(out)
    known: dict[str, str] = {}
    if is_there(path):
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise UserError(f"{path}: others may read these secrets; run chmod 600 {path}")
        known = reading.read_json(path, dict[str, Annotated[str, msgspec.Meta(min_length=32)]])
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
        served.should_exit = True

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
        feeder.start()
        try:
            yield
        finally:
            await asyncio.to_thread(feeder.stop)

    served, listening, address = web.listen(server.build(page, lifespan), config.host, config.port)
    for name, token in own.items():
        logger.info(f"{name}: {address}/{token}")
    logger.info("Ctrl-C ends it; the same command continues")
    web.run(served, listening)
    if feeder.error is not None:
        raise feeder.error


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
            added: list[Pair] | None = []
            while True:
                while self._store.num_waiting() >= self._ahead:
                    if self._stopping.wait(0.2):
                        return
                added = added or next(coming, None)
                if self._stopping.is_set():
                    return
                if added is None:
                    break
                try:
                    self._store.add(added)
                    added = []
                except UserError as error:  # on a disk that is full now
                    warn_once(str(error))
                    self._stopping.wait(0.2)
            self.is_complete = True
        except Exception as error:  # a thread's own would reach nobody
            self.error = error
            self._on_error()

    def stop(self) -> None:
        """Ends the thread: it adds nothing any more, and a batch that takes long is left."""
        self._stopping.set()
        self.join(_PATIENCE)
