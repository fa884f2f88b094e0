"""Serves the page: opens the store, the tokens and the pairs, and keeps OUT up to date."""

import asyncio
import contextlib
import json
import os
import secrets
import stat
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NamedTuple

import uvicorn

from rlhf_jax.errors import UserError, file_errors, is_there, logger, read_file
from rlhf_jax.inference import asking, label
from rlhf_jax.inference.labelling import pairs, rows, server, summary
from rlhf_jax.inference.labelling.connections import Connection
from rlhf_jax.inference.labelling.settings import Config
from rlhf_jax.inference.labelling.store import Store, is_new
from rlhf_jax.runs.writing import one_writer, refuse_links, write_atomically

_WRITE_EVERY = 2.0  # seconds
_OPEN_TO_ALL = ("0.0.0.0", "::")


class Job(NamedTuple):
    """The larger job that a page is a part of."""

    ends_when_done: bool = False  # the page ends by itself when all pairs are judged
    tokens_of: Path | None = None  # the file beside which the tokens are; None: OUT


ALONE = Job()


def run(folder: str | None, config: Config, job: Job = ALONE) -> str:
    """Serves until Ctrl-C or SIGTERM; returns a summary.

    Raises:
        UserError: another process serves the same file; it was begun with other settings; a
            folder, a file or a row is wrong; nobody may read the tokens; the port is taken.
    """
    out = Path(config.out)
    of_tokens = _beside(job.tokens_of or out, "tokens.json")
    kinds = ("json", "sqlite", "sqlite-wal", "sqlite-shm", "sqlite-journal")
    refuse_links([of_tokens, *(_beside(out, kind) for kind in kinds)])
    with one_writer(out):
        source = pairs.open_source(folder, config)
        store = _open_store(out, config)
        try:
            _begin(store, source, config)
            _serve(store, source, config, job)
        finally:
            store.close()
    return summary.text(summary.read(out))


def _beside(out: Path, kind: str) -> Path:
    return out.with_name(f"{out.name}.session.{kind}")


def _open_store(out: Path, config: Config) -> Store:
    path = label.store_file(out)
    if is_new(path) and (out.exists() or label.session_file(out).exists()):
        raise UserError(
            f"{out}: exists already, and {path.name} is missing or empty: it was not begun on the "
            "page, or its store was lost. Put the store back, or choose another --out"
        )
    return Store(path, config)


def _begin(store: Store, source: pairs.Source, config: Config) -> None:
    """Checks that the store was begun with these settings and is whole, or begins it."""
    out = Path(config.out)
    now = source.settings | {"again": config.again, "per_pair": config.per_pair}
    now |= {"annotators": config.people}
    num_given = len(store.judgements())
    beside = label.session_file(out)
    if beside.exists():
        written = asking.read_beside(out, beside, label.SESSION | {"shown": int})
        if (store.num_shown(), num_given) < (written["shown"], len(written["judgements"])):
            raise UserError(
                f"{store.path}: lacks judgements that {beside.name} has. Put the whole store "
                "back, with its -wal file, or choose another --out"
            )
    before = store.settings()
    if before is not None:
        asking.check_unchanged(out, before, now | {"annotators": before["annotators"]})
        missing = [name for name in before["annotators"] if name not in config.people]
        if missing:
            raise UserError(f"{out}: --annotators lacks {', '.join(missing)}, who began to label")
        logger.info(f"{out}: {num_given} judgements so far; it continues")
    store.begin(now)


def tokens(out: Path, people: list[str]) -> dict[str, str]:
    """{name: token} of the annotators, made once and kept beside the store, for the owner alone.

    Raises:
        UserError: the file is broken, or others may read it.
    """
    path = _beside(out, "tokens.json")
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
    if any(name not in known for name in people):
        known |= {name: secrets.token_urlsafe(32) for name in people if name not in known}
        before = os.umask(0o077)  # nobody else may read the file at any moment
        try:
            with file_errors(path, "written"):
                write_atomically(path, json.dumps(known, indent=1) + "\n")
        finally:
            os.umask(before)
    return {name: known[name] for name in people}


def _serve(store: Store, source: pairs.Source, config: Config, job: Job) -> None:
    """Serves until a signal. The feeder's error ends it too."""
    out = Path(config.out)
    write(store, out)
    own = tokens(job.tokens_of or out, config.people)
    feeder = pairs.Feeder(source, store, config, on_error=lambda: _stop(web))
    page = server.Page(
        store,
        {server.digest(token): name for name, token in own.items()},
        names=(*config.names, config.host),
        reasons=config.reasons,
        is_complete=lambda: feeder.is_complete,
        # That will be shown, as far as it is known before they are sampled.
        num_pairs=min(config.count or source.num_pairs, source.num_pairs),
    )

    def end_if_done() -> None:
        if job.ends_when_done and feeder.is_complete and store.is_done():
            _stop(web)

    application = server.build(page, _keeping(store, feeder, out, end_if_done))
    web = uvicorn.Server(
        uvicorn.Config(
            application,
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


def _stop(web: uvicorn.Server) -> None:
    web.should_exit = True


def _keeping(
    store: Store, feeder: pairs.Feeder, out: Path, on_writing: Callable[[], None]
) -> Callable[[Any], Any]:
    """The lifespan of the application: pairs are added, and OUT is written when it changed.

    on_writing: called each time that it looks whether it changed.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        stopping = asyncio.Event()
        feeder.start()
        writer = asyncio.create_task(_write_often(store, out, stopping, on_writing))
        try:
            yield
        finally:
            stopping.set()
            await writer
            await asyncio.to_thread(feeder.stop)

    return lifespan


async def _write_often(
    store: Store, out: Path, stopping: asyncio.Event, on_writing: Callable[[], None]
) -> None:
    """Writes OUT when the store has changed, and a last time at the end. ``on_writing`` is called
    each time that it looks.
    """
    written = -1
    while not stopping.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stopping.wait(), _WRITE_EVERY)
        now = store.num_changes()
        try:
            if now != written:
                await asyncio.to_thread(write, store, out)
                written = now
            on_writing()
        except UserError as error:  # a full disk: the store has what it confirmed
            logger.warning(str(error))


def write(store: Store, out: Path) -> None:
    """Writes OUT and OUT.session.json, which hold what the store holds."""
    num_shown = store.num_shown()  # first: it grows when a judgement is taken back meanwhile
    judgements = store.judgements()
    settings = {"settings": store.settings(), "shown": num_shown}
    label.write(out, settings, judgements, rows.rows(judgements))
