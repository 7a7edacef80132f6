"""Other APIs in terms of OpenAI's chat completions: a request becomes its body, and its answer becomes theirs.

So the other APIs can do what chat completions can do: tools, grammars, reasoning, adapters.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ValidationError

from gguflora.server.completions import chat
from gguflora.server.errors import Failure
from gguflora.server.schemas import ChatBody
from gguflora.server.service import Service
from gguflora.server.streaming import EventStream

_LOG: Final = logging.getLogger(__name__)
_DATA: Final = b"data: "
B = TypeVar("B", bound=BaseModel)
Json: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Part:
    """A part of an answer's content.

    Attributes:
        kind: what it is.
        number: number of the tool call, from 0; 0 for others.
        text: its text; of a tool call, the arguments in JSON.
        id: id of a tool call, in its first part.
        name: name of the called tool, in its first part.
    """

    kind: Literal["reasoning", "text", "tool"]
    text: str
    number: int = 0
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Ending:
    """The end of an answer.

    Attributes:
        reason: OpenAI's ``finish_reason``.
        stop_text: the stop text that ended it, if one did.
        usage: OpenAI's ``usage``.
    """

    reason: str
    stop_text: str | None
    usage: Json


Item: TypeAlias = Part | Ending | Failure
"""An item of a stream; a failure is the last one."""


def validated(kind: type[B], fields: Mapping[str, Any]) -> B:
    """Return a body made from the fields of another API's.

    Raises:
        RequestValidationError: if a field is wrong.
    """
    try:
        return kind.model_validate(dict(fields))
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False)) from error


async def answer(
    service: Service,
    request: Request,
    fields: Json,
    whole: Callable[[Json, list[Part], Ending], Json],
    stream: Callable[[Json, AsyncIterator[Item]], AsyncIterator[bytes]],
) -> Response:
    """Answer a request of another API.

    Args:
        service: the service.
        request: the HTTP request.
        fields: the body as one of chat completions.
        whole: makes the answer from the head of a chat completion, its parts, and its end.
        stream: makes server-sent events from the head and the items as they arrive.

    Raises:
        RequestValidationError: if a field is wrong.
        GgufloraError: if the request cannot be answered.
    """
    if fields.get("stream"):
        fields = {**fields, "stream_options": {"include_usage": True}}
    response = await chat(validated(ChatBody, fields), request, service)
    if isinstance(response, EventStream):
        return response.translated(lambda events: _translated(events, stream))
    assert isinstance(response, JSONResponse)
    body = json.loads(bytes(response.body))
    choice = body["choices"][0]
    ending = Ending(choice["finish_reason"], body.get("stopping_word"), body["usage"])
    return JSONResponse(whole(body, list(_parts(choice["message"])), ending))


async def _translated(
    events: AsyncIterator[bytes], stream: Callable[[Json, AsyncIterator[Item]], AsyncIterator[bytes]]
) -> AsyncIterator[bytes]:
    chunks = chunks_of(events)
    head = await anext(chunks)
    async for event in stream(head, _items(head, chunks)):
        yield event


async def chunks_of(events: AsyncIterator[bytes]) -> AsyncIterator[Json]:
    """Yield the chunks of OpenAI's server-sent events; an error is one of them."""
    async for block in events:
        for line in block.split(b"\n\n"):
            if line.startswith(_DATA) and line != b"data: [DONE]":
                yield json.loads(line[len(_DATA) :])


async def _items(head: Json, chunks: AsyncIterator[Json]) -> AsyncIterator[Item]:
    reason, stop_text = "stop", None
    usage: Json = {}
    chunk: Json | None = head
    while chunk is not None:
        if "error" in chunk:
            error = chunk["error"]
            yield Failure(500, error["message"], error["code"], error["param"])
            return
        usage, stop_text = chunk.get("usage") or usage, chunk.get("stopping_word") or stop_text
        for choice in chunk["choices"]:
            for part in _parts(choice["delta"]):
                yield part
            reason = choice["finish_reason"] or reason
        chunk = await anext(chunks, None)
    yield Ending(reason, stop_text, usage)


def _parts(message: Json) -> Sequence[Part]:
    """Return the parts of a message or of a chunk's delta."""
    parts = []
    if message.get("reasoning_content"):
        parts.append(Part("reasoning", message["reasoning_content"]))
    if message.get("content"):
        parts.append(Part("text", message["content"]))
    for number, call in enumerate(message.get("tool_calls") or ()):
        function = call.get("function") or {}
        text = function.get("arguments") or ""
        parts.append(Part("tool", text, call.get("index", number), call.get("id"), function.get("name")))
    return parts


def event(kind: str, fields: Json) -> bytes:
    """Return a server-sent event with a name, which its data repeat as ``type``."""
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()
