"""Connections of strangers: heads of requests have a largest size and a time to arrive, and connections a number.

uvicorn's own protocols wait for ever for a head that does not end, and accept connections until no descriptor is left.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any, ClassVar, Final

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from gguflora.system.processes import most_open_files
from gguflora.system.storage import RENAMES_OPEN_FILES

HEAD_BYTES: Final = 32 << 10
"""Largest size of a request's first line and headers."""
_SLICE: Final = 16 << 10
"""Bytes that are parsed at once, so that other connections have their turn."""
_HELD: Final = 1 << 20
"""Largest number of received bytes that wait to be parsed."""
_OTHER_FILES: Final = 128
"""Descriptors that are left for models, adapters and the system."""


def server_config(app: ASGIApp, **options: Any) -> uvicorn.Config:  # noqa: ANN401  (uvicorn's own options)
    """Return uvicorn's configuration for a server that strangers can reach.

    Args:
        app: the ASGI application.
        options: further arguments of ``uvicorn.Config``.
    """
    fixed: dict[str, Any] = {
        "http": GuardedProtocol,
        "ws": "none",
        "h11_max_incomplete_event_size": HEAD_BYTES,
        "log_level": "error",
        "access_log": False,
        "server_header": False,
    }
    return uvicorn.Config(app, **{**fixed, **options})


def most_connections() -> int:
    """Return how many connections this process can hold at once: up to 1024, fewer if it may open fewer files."""
    most = most_open_files()
    if most is None:
        return 1024 if RENAMES_OPEN_FILES else 512  # Windows says nothing, and its select() takes 512
    return max(min(1024, most - _OTHER_FILES), 16)


class GuardedProtocol(H11Protocol):
    """HTTP/1.1 on one connection, with limits.

    Attributes:
        head_seconds: time in which the head of a request must arrive.
        max_connections: largest number of connections. One more takes the place of the one that has kept the server
            waiting longest; if none does, it is refused.
    """

    head_seconds: ClassVar[float] = 10.0
    max_connections: ClassVar[int] = most_connections()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._held = bytearray()
        self._timer: asyncio.TimerHandle | None = None
        self._since = self.loop.time()
        self._watch()
        if len(self.connections) > self.max_connections:
            self._make_room()

    def _make_room(self) -> None:
        waiting = [other for other in self.connections if isinstance(other, GuardedProtocol) and other.waits_for_client]
        oldest = min((other for other in waiting if other is not self), key=lambda other: other._since, default=self)
        oldest.connections.discard(oldest)
        oldest.transport.abort()

    @property
    def waits_for_client(self) -> bool:
        """Whether the next move is the client's: to send a request or the rest of it, or to read the answer."""
        is_idle = self.cycle is None or self.cycle.response_complete
        return is_idle or self.conn.their_state is h11.SEND_BODY or self.flow.write_paused

    def data_received(self, data: bytes) -> None:
        """Parse what has arrived, a slice at a time."""
        if not self._held and len(data) <= _SLICE:
            super().data_received(data)
            return
        if len(self._held) + len(data) > _HELD:
            self.transport.abort()
            return
        is_feeding = bool(self._held)
        self._held += data
        if self.transport.is_reading():
            self.transport.pause_reading()
        if not is_feeding:
            self._feed()

    def _feed(self) -> None:
        if self.transport.is_closing() or self.conn.their_state is h11.DONE:  # `on_response_complete` goes on
            return
        if not self._held:  # scheduled twice; h11 would take no bytes for the end of the connection
            return
        data = bytes(self._held[:_SLICE])
        del self._held[:_SLICE]
        super().data_received(data)
        if self._held:
            self.loop.call_soon(self._feed)
        elif not self.flow.read_paused and not self.transport.is_closing() and not self.transport.is_reading():
            self.transport.resume_reading()

    def handle_events(self) -> None:
        """Handle what was parsed, then watch the time of a head that has not ended."""
        super().handle_events()
        self._watch()

    def on_response_complete(self) -> None:
        """Go on with what the client has sent ahead."""
        self._since = self.loop.time()
        super().on_response_complete()
        if self._held:
            self.loop.call_soon(self._feed)

    def _watch(self) -> None:
        waits = self.conn.their_state is h11.IDLE and self.timeout_keep_alive_task is None
        if not waits and self._timer is not None:
            self._timer.cancel()
            self._timer = None
        elif waits and self._timer is None:
            self._timer = self.loop.call_later(self.head_seconds, self._give_up)

    def _give_up(self) -> None:
        if self.transport.is_closing():
            return
        with suppress(h11.LocalProtocolError):
            head = h11.Response(status_code=408, headers=[("connection", "close"), ("content-length", "0")])
            self.transport.write(self.conn.send(head) or b"")
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        if self._timer is not None:
            self._timer.cancel()
        self._held.clear()
        super().connection_lost(exc)
