"""Generations, which block a thread, as one asynchronous stream that ends when the client goes away."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import suppress
from typing import TypeVar

from fastapi import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from gguflora.engine import Generation, Piece
from gguflora.server.failures import Failure

T = TypeVar("T")
CLIENT_GONE = 499


class Answers:
    """The generations of one request, all running; each is read by a thread of its own."""

    def __init__(self, generations: Sequence[Generation]) -> None:
        self.generations = generations
        self._loop = asyncio.get_running_loop()
        self._arrived: deque[tuple[int, Piece | Exception | None]] = deque()
        self._wake = asyncio.Event()

    async def pieces(self, *, at_once: bool = True) -> AsyncIterator[tuple[int, Piece | None]]:
        """The number of a generation with its next piece, or with None when it has ended well.

        Args:
            at_once: give out every piece when it comes, not all of a generation at its end.

        Raises:
            Failure: if one has not ended well.
        """
        for index in range(len(self.generations)):
            threading.Thread(target=self._read, args=(index, at_once), name=f"answer {index}", daemon=True).start()
        running = len(self.generations)
        while running:
            await self._wake.wait()
            self._wake.clear()
            while self._arrived:
                index, item = self._arrived.popleft()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    _check_ended_well(self.generations[index])
                    running -= 1
                yield index, item

    def cancel(self) -> None:
        """End them all. Idempotent."""
        for generation in self.generations:
            generation.cancel()

    def _read(self, index: int, at_once: bool) -> None:
        try:
            for piece in self.generations[index]:
                self._arrived.append((index, piece))
                if at_once:
                    self._notify()
        except Exception as error:
            self._arrived.append((index, error))  # raised again where it is awaited
        else:
            self._arrived.append((index, None))
        self._notify()

    def _notify(self) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._wake.set)


def _check_ended_well(generation: Generation) -> None:
    reason = generation.finish_reason
    if reason == "timeout":
        raise Failure(504, "the answer took longer than the server allows", "timeout")
    if reason not in {"stop", "length"}:
        raise Failure(503, "the answer was given up by the server", reason)


class EventStream(StreamingResponse):
    """Server-sent events; the generations are cancelled when it is over, however it ends."""

    media_type = "text/event-stream"

    def __init__(self, answers: Answers, events: AsyncIterator[str]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, until the client goes away."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.cancel()


async def while_connected(request: Request, answers: Answers, work: Awaitable[T]) -> T:
    """The result of ``work``; the generations are cancelled if the client goes away first.

    Raises:
        Failure: if it has gone (nobody hears it).
    """
    working, waiting = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Failure(CLIENT_GONE, "the client has gone", "cancelled")
        return working.result()
    finally:
        working.cancel()
        waiting.cancel()
        answers.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
