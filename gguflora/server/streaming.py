"""Generations, which the engine computes in its own thread, as answers of an event loop that end with their client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gguflora.engine import Engine, Generation, Piece
from gguflora.engine import Request as EngineRequest
from gguflora.server.errors import Failure

T = TypeVar("T")
CLIENT_GONE = 499


class Answers:
    """The generations of one request of a client, all running.

    The engine's thread only wakes the event loop, and not again before the loop has looked.

    Args:
        at_once: take every piece when it comes, not all of a generation at its end.

    Attributes:
        generations: in the order of their requests.
        running: how many have not been seen to end.
    """

    def __init__(self, *, at_once: bool) -> None:
        self.generations: list[Generation] = []
        self._at_once = at_once
        self._open: list[int] = []
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._woken = False

    @property
    def running(self) -> int:
        """How many have not been seen to end."""
        return len(self._open)

    def begin(self, engine: Engine, requests: Sequence[EngineRequest]) -> None:
        """Put all of them into the queue, or none. From any thread.

        Raises:
            QueueFullError: if they do not fit.
        """
        try:
            for request in requests:
                self.generations.append(engine.submit(request, self._notify))
        except Exception:
            self.cancel()
            raise
        self._open = list(range(len(requests)))

    async def arrived(self) -> list[tuple[int, Piece | None]]:
        """Numbers of generations with their next pieces, waited for; None for one that has ended well.

        Raises:
            EngineError: if one failed.
            Failure: if one was given up.
        """
        await self._wake.wait()
        self._wake.clear()
        self._woken = False  # before looking: what comes later wakes again
        found: list[tuple[int, Piece | None]] = []
        for index in list(self._open):
            generation = self.generations[index]
            found.extend((index, piece) for piece in generation.arrived())
            if generation.finish_reason is not None:
                _check_ended_well(generation)
                self._open.remove(index)
                found.append((index, None))
        return found

    def cancel(self) -> None:
        """End them all. Idempotent."""
        for generation in self.generations:
            generation.cancel()

    def _notify(self, ended: bool) -> None:
        """Of any generation, in the engine's thread."""
        if not self._woken and (ended or self._at_once):
            self._woken = True
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._wake.set)


def _check_ended_well(generation: Generation) -> None:
    reason = generation.finish_reason
    if generation.error is not None:
        raise generation.error
    if reason == "timeout":
        raise Failure(504, "the answer took longer than the server allows", "timeout")
    if reason not in {"stop", "length"}:
        raise Failure(503, "the answer was given up by the server", reason)


class EventStream(Response):
    """Server-sent events; the generations are cancelled when it is over, however it ends."""

    media_type = "text/event-stream"

    def __init__(self, answers: Answers, events: AsyncIterator[bytes]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["Content-Length"]
        self._answers = answers
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, until the client goes away."""
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
    """The result of ``work``; the generations are cancelled if the client goes away first.

    Raises:
        Failure: if it has gone (nobody hears it).
    """
    working = asyncio.ensure_future(work)
    listening = _when_disconnected(request.receive, working.cancel)
    try:
        return await working
    except asyncio.CancelledError:
        if not listening.done() or listening.cancelled():
            raise
        raise Failure(CLIENT_GONE, "the client has gone", "cancelled") from None
    finally:
        working.cancel()
        listening.cancel()
        answers.cancel()


def _when_disconnected(receive: Receive, then: Callable[[], object]) -> asyncio.Task[None]:
    """Call ``then`` as soon as the client has gone; to be cancelled when nobody wants to know any more."""

    async def listen() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        then()

    return asyncio.create_task(listen())
