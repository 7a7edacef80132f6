"""Other APIs in terms of OpenAI's chat completions: a request becomes its body, and its answer becomes theirs.

So the other APIs can do what chat completions can do: tools, grammars, reasoning, adapters.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel, ValidationError

from gguflora.server.completions import begin_chat
from gguflora.server.errors import Failure
from gguflora.server.events import chunks_of
from gguflora.server.json_response import JSONResponse
from gguflora.server.schemas import ChatBody
from gguflora.server.service import Service

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


def check_fields(item: Json, where: str, *read: str, harmless: Collection[str] = ()) -> None:
    """Check that an object of a request has only fields that are read or harmless; null stands for no field.

    Raises:
        Failure: if it has another one, which is named.
    """
    for name, value in item.items():
        if value is not None and name not in read and name not in harmless:
            message = f"{where}.{name}: {name!r:.80} is not supported by this server"
            raise Failure(400, message, "refused_field", f"{where}.{name}"[:120])


@contextmanager
def naming(names: Mapping[str, str]) -> Iterator[None]:
    """Let errors about a field of chat completions name the field of another API that stands for it."""
    try:
        yield
    except Failure as failure:
        name = names.get(failure.param or "")
        if name is None:
            raise
        raise Failure(failure.status, f"{name}: {failure.message}", failure.code, name) from failure


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
        stream: makes server-sent events from the head and the items as they arrive. The usage in the head is only the
            number of prompt tokens.

    Raises:
        RequestValidationError: if a field is wrong.
        GgufloraError: if the request cannot be answered.
    """
    if fields.get("stream"):
        fields = {**fields, "stream_options": {"include_usage": True}}
    chat = validated(ChatBody, fields)
    for name in ("functions", "function_call"):
        if getattr(chat, name):
            raise Failure(400, f"{name!r} is a field of chat completions only; give 'tools'", "unsupported", name)
    if chat.n not in {None, 1}:
        raise Failure(400, f"n is {chat.n}, but this API has one answer", "invalid_value", "n")
    completion = await begin_chat(chat, service)
    if chat.stream:
        (generation,) = completion.answers.generations
        return completion.stream(lambda events: _translated(events, generation.prompt_tokens, stream))
    body = await completion.whole(request)
    choice = body["choices"][0]
    ending = Ending(choice["finish_reason"], body.get("stopping_word"), body["usage"])
    return JSONResponse(whole(body, list(_parts(choice["message"])), ending))


async def _translated(
    events: AsyncIterator[bytes], n_prompt: int, stream: Callable[[Json, AsyncIterator[Item]], AsyncIterator[bytes]]
) -> AsyncIterator[bytes]:
    chunks = chunks_of(events)
    first = await anext(chunks)
    head = {**first, "usage": {"prompt_tokens": n_prompt}}  # what is known of it at the start
    async for event in stream(head, _items(first, chunks)):
        yield event


async def _items(head: Json, chunks: AsyncIterator[Json]) -> AsyncIterator[Item]:
    reason, stop_text = "stop", None
    usage: Json = {}
    chunk: Json | None = head
    while chunk is not None:
        if "error" in chunk:
            error = chunk["error"]
            status = 400 if error["type"] == "invalid_request_error" else 500
            yield Failure(status, error["message"], error["code"], error["param"])
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


def cached_tokens(usage: Json) -> int:
    """Return how many prompt tokens of OpenAI's ``usage`` an earlier request had evaluated."""
    return int((usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0))
