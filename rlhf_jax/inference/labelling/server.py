"""The page's application: one address for each annotator, and nothing else.

Who knows the token of an address is its annotator. A request with another Host, another Origin, a
large body, or at a high rate is refused before anything reads it; SECURITY.md has the model.
"""

import collections
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from rlhf_jax.errors import UserError, logger
from rlhf_jax.inference.labelling import markup
from rlhf_jax.inference.labelling.store import Store
from rlhf_jax.inference.web import Guard

MAX_BODY = 16_384
RATE = 10.0
"""Requests a second of one address, after a burst of ``BURST``; wrong addresses share one rate."""
BURST = 40.0
_FOLDER = Path(__file__).parent / "page"
_TYPES = {"label.js": "text/javascript", "label.css": "text/css"}


class Page(NamedTuple):
    """What the application serves."""

    store: Store
    annotators: Mapping[str, str]  # {digest of a token: name}
    names: tuple[str, ...] = ()  # further host names
    reasons: bool = False
    is_complete: Callable[[], bool] = lambda: True  # whether all pairs are in the store
    num_pairs: int = 0  # there will be, as far as it is known


class _Undo(msgspec.Struct):
    """The body of a request: which judgement is meant."""

    id: Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]


class _Judgement(_Undo):
    choice: Literal["a", "b", "tie", "bad", "skip"]
    seconds: Annotated[float, msgspec.Meta(ge=0, lt=1e9)]
    strength: Literal["slight", "clear", "strong"] | None = None
    reason: Annotated[str, msgspec.Meta(max_length=2_000)] | None = None


def digest(token: str) -> str:
    """What is compared of a token: how long that takes says nothing about the token."""
    return hashlib.sha256(token.encode()).hexdigest()


def build(page: Page, lifespan: Any = None) -> ASGIApp:
    """The application; it takes nothing from the network but requests.

    lifespan: as of Starlette.
    """

    def of_annotator(answer: Callable[..., Any], form: Any = None) -> Any:
        """An endpoint of one annotator: 404 for a wrong token."""

        async def respond(request: Request) -> Response:
            name = page.annotators.get(digest(request.path_params["token"]))
            if name is None:
                raise HTTPException(404)
            given = () if form is None else (await _read(request, form),)
            content = await run_in_threadpool(answer, page, name, *given)
            return content if isinstance(content, Response) else JSONResponse(content)

        return respond

    def asset(name: str, kind: str) -> Response:
        return Response((_FOLDER / name).read_bytes(), media_type=kind)

    routes = [
        Route(f"/{name}", lambda _, name=name, kind=kind: asset(name, kind))
        for name, kind in _TYPES.items()
    ]
    routes += [
        Route("/{token}", of_annotator(lambda *_: asset("label.html", "text/html"))),
        Route("/{token}/pair", of_annotator(_state)),
        Route("/{token}/judgement", of_annotator(_judge, _Judgement), methods=["POST"]),
        Route("/{token}/undo", of_annotator(_undo, _Undo), methods=["POST"]),
    ]
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={UserError: _not_kept})
    app.router.redirect_slashes = False
    return Guard(app, names=page.names, max_body=MAX_BODY, limit=Rate(page))


async def _not_kept(_: Request, error: Exception) -> Response:
    logger.warning(str(error))
    return JSONResponse({"error": f"This was not saved. {error}"}, 507)


async def _read(request: Request, form: type[_Undo]) -> _Undo:
    """The body of a request, which must be JSON of this form."""
    try:
        return msgspec.convert(json.loads(await request.body()), form)
    except (ValueError, RecursionError):  # msgspec.ValidationError is a ValueError
        raise HTTPException(400) from None


def _state(page: Page, name: str, is_after: bool = False) -> dict[str, Any]:
    """All that the script shows; ``is_after``: of a reply to what the store has kept."""
    is_complete = page.is_complete()  # first: a pair may be added meanwhile
    try:
        task = page.store.next(name, is_complete=is_complete)
    except UserError:  # on a disk that is full now; the script will ask again
        if not is_after:
            raise
        task, is_complete = None, False
    progress = page.store.progress(name, 0 if is_complete else page.num_pairs)
    shown = (
        None
        if task is None
        else {
            "id": task.id,
            "again": task.again,
            "conversation": markup.conversation(task.prompt),
            "answers": [markup.render(text) for text in task.answers],
        }
    )
    return {
        "annotator": name,
        "pair": shown,
        "waiting": task is None and not is_complete,
        "undo": page.store.last(name),
        "reasons": page.reasons,
        "progress": progress._asdict(),
    }


def _judge(page: Page, name: str, given: _Judgement) -> dict[str, Any]:
    # Half of a pair of UTF-16 is no text, and SQLite would refuse it.
    reason = (given.reason or "").encode("utf-8", "replace").decode().strip() or None
    if not page.reasons and (given.strength or reason):
        raise HTTPException(400)
    kept = page.store.judge(
        name,
        given.id,
        given.choice,
        seconds=given.seconds,
        strength=given.strength,
        reason=reason,
    )
    return _state(page, name, is_after=True) | {"kept": kept}


def _undo(page: Page, name: str, given: _Undo) -> dict[str, Any]:
    kept = page.store.undo(name, given.id)
    return _state(page, name, is_after=True) | {"kept": kept}


class Rate:
    """Limits the requests of each address."""

    def __init__(self, page: Page, clock: Callable[[], float] = time.monotonic):
        self._page = page
        self._clock = clock
        # {whose: (requests that are left, when they were counted)}
        self._left: dict[str, tuple[float, float]] = collections.defaultdict(
            lambda: (BURST, clock())
        )

    def __call__(self, request: Request) -> tuple[int, str] | None:
        """Takes one from the rate of the request's address; a refusal if none is left."""
        first = request.scope["path"].split("/")[1]
        if first in _TYPES:
            return None
        key = digest(first)
        whose = key if key in self._page.annotators else ""
        left, since = self._left[whose]
        now = self._clock()
        left = min(BURST, left + (now - since) * RATE)
        self._left[whose] = (max(left - 1, 0), now)
        return None if left >= 1 else (429, "too many requests; wait a second")
