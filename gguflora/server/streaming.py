"""Pass generations from the engine's thread to the event loop, and cancel them when their client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gguflora.engine import Engine, Generation, Piece
from gguflora.engine import Request as EngineRequest
from gguflora.server.errors import Failure
from gguflora.server.keys import CACHE_OWNER

T = TypeVar("T")
CLIENT_GONE = 499


class Answers:
    """The generations of one client's request, which run at the same time.

    The engine's thread wakes the event loop, but only once until the loop has fetched what has arrived.

    Args:
        stream: wake the event loop for every piece, not only at the end of a generation.

    Attributes:
        generations: the generations, in the order of their requests.
    """

    def __init__(self, *, stream: bool) -> None:
        self.generations: list[Generation] = []
        self._stream = stream
        self._open: list[int] = []
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._woken = False

    @property
    def running(self) -> int:
        """Number of generations whose end `arrived` has not reported yet."""
        return len(self._open)

    def begin(self, engine: Engine, requests: Sequence[EngineRequest]) -> None:
        """Submit all requests, or none of them. Callable from any thread.

        Raises:
            QueueFullError: if the queue has no room for all of them.
        """
        try:
            for request in requests:
                owned = replace(request, cache_owner=CACHE_OWNER.get())
                self.generations.append(engine.submit(owned, self._notify))
        except Exception:
            self.cancel()
            raise
        self._open = list(range(len(requests)))

    async def arrived(self) -> list[tuple[int, Piece | None]]:
        """Wait until something arrives and return it.

        Returns:
            Pairs of a generation's index and its next piece, or None if it has ended normally.

        Raises:
            EngineError: if a generation failed.
            Failure: if a generation was aborted.
        """
        await self._wake.wait()
        self._wake.clear()
        self._woken = False  # before fetching, so that later pieces wake the loop again
        items: list[tuple[int, Piece | None]] = []
        for index in list(self._open):
            generation = self.generations[index]
            items.extend((index, piece) for piece in generation.arrived())
            if generation.finish_reason is not None:
                _check_ended_normally(generation)
                self._open.remove(index)
                items.append((index, None))
        return items

    def cancel(self) -> None:
        """Cancel all generations. Idempotent."""
        for generation in self.generations:
            generation.cancel()

    def _notify(self, ended: bool) -> None:
        """Wake the event loop; the engine's thread calls this for each generation."""
        if not self._woken and (ended or self._stream):
            self._woken = True
            with suppress(RuntimeError):  # the loop is closed, so nobody is waiting
                self._loop.call_soon_threadsafe(self._wake.set)


def _check_ended_normally(generation: Generation) -> None:
    reason = generation.finish_reason
    if generation.error is not None:
        raise generation.error
    if reason == "timeout":
        raise Failure(504, "the answer took longer than the server allows", "timeout")
    if reason not in {"stop", "length"}:
        raise Failure(503, "the server aborted the answer", reason)


class EventStream(Response):
    """A response of server-sent events; at its end, normal or not, the generations are cancelled."""

    media_type = "text/event-stream"

    def __init__(self, answers: Answers, events: AsyncIterator[bytes]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["Content-Length"]
        self._answers = answers
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until the last one or until the client disconnects."""
        del scope
        listening = _when_disconnected(receive, self._answers.cancel)
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            listening.cancel()
            self._answers.cancel()


async def while_connected(request: Request, answers: Answers, work: Awaitable[T]) -> T:
    """Return the result of ``work``, or cancel the generations if the client disconnects first.

    Raises:
        Failure: if the client has disconnected; nobody receives it.
    """
    working = asyncio.ensure_future(work)
    listening = _when_disconnected(request.receive, working.cancel)
    try:
        return await working
    except asyncio.CancelledError:
        if not listening.done() or listening.cancelled():
            raise
        raise Failure(CLIENT_GONE, "the client has disconnected", "cancelled") from None
    finally:
        working.cancel()
        listening.cancel()
        answers.cancel()


def _when_disconnected(receive: Receive, then: Callable[[], object]) -> asyncio.Task[None]:
    """Start a task that calls ``then`` when the client disconnects; the caller cancels the task."""

    async def listen() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        then()

    return asyncio.create_task(listen())
