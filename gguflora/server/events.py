"""Server-sent events: how every streaming API of this server writes them, and how OpenAI's are read again."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

from gguflora.files.strict_json import to_json

_DATA: Final = b"data: "
DONE: Final = b"data: [DONE]\n\n"
"""The last event of OpenAI's streams."""


def data_event(fields: Mapping[str, Any]) -> bytes:
    """Return an event without a name."""
    return f"data: {to_json(fields)}\n\n".encode()


def named_event(kind: str, fields: Mapping[str, Any]) -> bytes:
    """Return an event with a name, which its data repeat as ``type``."""
    return f"event: {kind}\ndata: {to_json({'type': kind, **fields})}\n\n".encode()


async def chunks_of(events: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """Yield the data of OpenAI's events; several may arrive in one block, and an error is one of them."""
    async for block in events:
        for event in block.split(b"\n\n"):
            if event.startswith(_DATA) and event != DONE.rstrip():
                yield json.loads(event[len(_DATA) :])
