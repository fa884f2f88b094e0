"""The page's connections. Those that bring no request are closed, so that the others are served."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from rlhf_jax.inference.labelling import server

MOST_WAITING = 100
"""Connections of one address, such as a proxy's, that are open without a whole request; beyond it
the oldest is closed."""


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
