"""OpenAI's newer API, ``/v1/responses``, without what it would have to store: every request brings its whole chat."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from gguflora.server.errors import Failure
from gguflora.server.events import named_event
from gguflora.server.fields import ForeignBody
from gguflora.server.service import ServiceDep
from gguflora.server.translation import Ending, Item, Json, Part, answer, cached_tokens, check_fields, naming

router = APIRouter()

_TEXTS: Final = frozenset({"input_text", "output_text", "text", "reasoning_text", "summary_text"})
_NO_EFFECT: Final[dict[str, tuple[object, ...]]] = {
    "truncation": ("disabled", None),
    "background": (False, None),
    "context_management": ([],),
    "include": ([], None, ["reasoning.encrypted_content"]),
}
HARMLESS: Final[dict[str, str]] = {
    "max_tool_calls": "bounds the calls of OpenAI's own tools, and there are none here",
    "stream_options": "pads events against eavesdroppers",
}
"""Fields that never change an answer, with the reasons."""

_NAMES: Final = {"reasoning_effort": "reasoning.effort", "response_format": "text.format"}
_REASONING: Final[dict[str, tuple[object, ...]]] = {
    "context": ("auto",),
    "generate_summary": ("auto",),  # thoughts are returned whole
    "mode": ("standard",),
    "summary": ("auto",),
}
_ITEM: Final = frozenset({"id", "status", "type", "phase"})


class ResponsesBody(ForeignBody):
    """Body of POST /v1/responses; fields that chat completions know may stand beside its own."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    text: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None

    @classmethod
    def is_void(cls, name: str, value: Any) -> bool:  # noqa: ANN401  (any JSON value)
        """Return whether a field asks for nothing."""
        return value is None or name in HARMLESS or (name in _NO_EFFECT and value in _NO_EFFECT[name])

    def as_chat(self) -> Json:
        """Return the body of the same request for chat completions.

        Raises:
            Failure: if an item of the input, or a tool, is not supported.
        """
        messages = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else _messages(self.input)
        if self.instructions:
            messages = [{"role": "system", "content": self.instructions}, *messages]
        fields: Json = {**self.others, "messages": messages, "max_tokens": self.max_output_tokens}
        if self.tools:
            fields["tools"] = [_tool(tool) for tool in self.tools]
        fields["tool_choice"] = _tool_choice(self.tool_choice)
        fields["reasoning_effort"] = _effort(self.reasoning or {})
        wanted = self.text or {}
        check_fields(wanted, "text", "format", "verbosity")
        form = wanted.get("format") or {"type": "text"}
        fields["verbosity"] = wanted.get("verbosity")  # the body of the chat decides about it
        if not isinstance(form, dict):
            raise Failure(400, "text.format must be an object with a type", "invalid_value", "text.format")
        check_fields(form, "text.format", "type", "name", "schema", "strict", "description")
        if form.get("type") == "json_schema":
            schema = {name: form[name] for name in ("name", "schema", "strict", "description") if name in form}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif form.get("type") != "text":
            fields["response_format"] = {"type": form.get("type")}
        return {name: value for name, value in fields.items() if value is not None}


@router.post("/v1/responses")
async def create_response(body: ResponsesBody, request: Request, service: ServiceDep) -> Response:
    """Answer the last message of a chat, as OpenAI's Responses API does."""
    reply = _Reply(body)
    with naming(_NAMES):
        return await answer(service, request, body.as_chat(), reply.whole, reply.events)


def _effort(reasoning: Json) -> Any:  # noqa: ANN401  (any JSON value)
    no_effect = {name for name, values in _REASONING.items() if reasoning.get(name) in values}
    check_fields(reasoning, "reasoning", "effort", harmless=no_effect)
    return reasoning.get("effort") or None


_ITEMS: Final[dict[str, tuple[str, ...]]] = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "reasoning": ("content", "summary"),
}
"""The fields of the kinds of items."""


def _messages(items: Sequence[Json]) -> list[Json]:
    messages: list[Json] = []
    thoughts = ""
    for item in items:
        kind = item.get("type", "message")
        check_fields(item, "input", *_ITEMS.get(str(kind), item), harmless=_ITEM)
        if kind == "message":
            extra = {"reasoning_content": thoughts} if thoughts and item.get("role") == "assistant" else {}
            messages.append({"role": item.get("role"), "content": _text(item.get("content")), **extra})
            thoughts = ""
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments") or "{}"}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            if messages and messages[-1]["role"] == "assistant":  # calls of one turn belong to one message
                messages[-1].setdefault("tool_calls", []).append(call)
            else:
                extra = {"reasoning_content": thoughts} if thoughts else {}
                messages.append({"role": "assistant", "content": "", "tool_calls": [call], **extra})
                thoughts = ""
        elif kind == "function_call_output":
            output = {"tool_call_id": item.get("call_id"), "content": _text(item.get("output"))}
            messages.append({"role": "tool", **output})
        elif kind == "reasoning":
            thoughts = _text(item.get("content") or item.get("summary"))
        else:
            raise Failure(400, f"input: an item of type {kind!r:.40} is not supported", "unsupported", "input")
    return messages


def _text(content: Any) -> str:  # noqa: ANN401  (any JSON value)
    if isinstance(content, str) or content is None:
        return content or ""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise Failure(400, "input: content must be a text or a list of parts", "invalid_value", "input")
    for part in content:
        if part.get("type") not in _TEXTS or not isinstance(part.get("text"), str):
            raise Failure(
                400, f"input: content of type {part.get('type')!r:.40} is not supported", "unsupported", "input"
            )
        check_fields(part, "input", "type", "text", harmless={"annotations", "logprobs", "prompt_cache_breakpoint"})
    return "".join(part["text"] for part in content)


def _tool(tool: Json) -> Json:
    if tool.get("type") != "function":
        raise Failure(400, f"tools: a tool of type {tool.get('type')!r:.40} is not supported", "unsupported", "tools")
    names = ("name", "description", "parameters", "strict")
    no_effect = {"defer_loading"} if tool.get("defer_loading") is False else set()
    check_fields(tool, "tools", "type", *names, harmless=no_effect)
    return {"type": "function", "function": {name: tool[name] for name in names if tool.get(name) is not None}}


def _tool_choice(choice: str | Json | None) -> Any:  # noqa: ANN401  (any JSON value)
    if choice is None or isinstance(choice, str):
        return choice
    if choice.get("type") != "function":
        message = f"tool_choice: the type {choice.get('type')!r:.40} is not supported, expected function"
        raise Failure(400, message, "unsupported", "tool_choice")
    check_fields(choice, "tool_choice", "type", "name")
    return {"type": "function", "function": {"name": choice.get("name")}}


@dataclass(slots=True)
class _Reply:
    """The answer to one request.

    Attributes:
        body: the request.
        output: the items that are complete.
        numbers: numbers of the events.
    """

    body: ResponsesBody
    output: list[Json] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def whole(self, head: Json, parts: list[Part], ending: Ending) -> Json:
        """Return the whole answer."""
        return self._response(head, [_item(part, part.text) for part in parts], ending)

    def _response(self, head: Json, output: Sequence[Json], ending: Ending | None) -> Json:
        body, others = self.body, self.body.others
        cut = ending is not None and ending.reason == "length"
        status = "in_progress" if ending is None else "incomplete" if cut else "completed"
        return {
            "id": f"resp_{str(head['id']).rpartition('-')[2]}",
            "object": "response",
            "created_at": head.get("created", int(time.time())),
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": others.get("metadata") or {},
            "model": head["model"],
            "output": output,
            "parallel_tool_calls": others.get("parallel_tool_calls", True),
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": others.get("temperature"),
            "text": {"format": (body.text or {}).get("format") or {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_logprobs": 0,
            "top_p": others.get("top_p"),
            "truncation": "disabled",
            "usage": None if ending is None else _usage(ending.usage),
            "user": others.get("user"),
        }

    async def events(self, head: Json, items: AsyncIterator[Item]) -> AsyncIterator[bytes]:
        """Yield the events of the answer as its parts arrive."""
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._response(head, [], None))
        current: Part | None = None
        text, item_id = "", ""
        async for item in items:
            if isinstance(item, Failure):
                yield self._event("error", code=item.code, message=item.message, param=item.param)
                return
            is_next = isinstance(item, Part) and current is not None and _same(item, current)
            if current is not None and not is_next:
                yield b"".join(self._closing(current, text, item_id))
                current = None
            if isinstance(item, Part):
                if current is None:
                    current, text, item_id = item, "", _new_id(item)
                    yield b"".join(self._opening(current, item_id))
                text += item.text
                if item.text:
                    yield self._piece(item, item_id)
                continue
            response = self._response(head, self.output, item)
            yield self._event(f"response.{response['status']}", response=response)

    def _event(self, kind: str, **fields: Any) -> bytes:  # noqa: ANN401  (any JSON value)
        return named_event(kind, {"sequence_number": next(self.numbers), **fields})

    def _place(self, item_id: str, *, in_content: bool = True) -> Json:
        place: Json = {"item_id": item_id, "output_index": len(self.output)}
        return {**place, "content_index": 0} if in_content else place

    def _opening(self, part: Part, item_id: str) -> Iterator[bytes]:
        item = {**_item(part, "", item_id), "status": "in_progress"}
        if part.kind != "tool":
            item["content"] = []
        yield self._event("response.output_item.added", output_index=len(self.output), item=item)
        if part.kind != "tool":
            content = _content(part, "")
            yield self._event("response.content_part.added", **self._place(item_id), part=content)

    def _piece(self, part: Part, item_id: str) -> bytes:
        if part.kind == "tool":
            place = self._place(item_id, in_content=False)
            return self._event("response.function_call_arguments.delta", **place, delta=part.text)
        if part.kind == "reasoning":
            return self._event("response.reasoning_text.delta", **self._place(item_id), delta=part.text)
        return self._event("response.output_text.delta", **self._place(item_id), delta=part.text, logprobs=[])

    def _closing(self, part: Part, text: str, item_id: str) -> Iterator[bytes]:
        place = self._place(item_id)
        if part.kind == "tool":
            place = self._place(item_id, in_content=False)
            yield self._event("response.function_call_arguments.done", **place, arguments=text, name=part.name)
        elif part.kind == "reasoning":
            yield self._event("response.reasoning_text.done", **place, text=text)
        else:
            yield self._event("response.output_text.done", **place, text=text, logprobs=[])
        if part.kind != "tool":
            yield self._event("response.content_part.done", **place, part=_content(part, text))
        item = _item(part, text, item_id)
        yield self._event("response.output_item.done", output_index=len(self.output), item=item)
        self.output.append(item)


def _same(part: Part, current: Part) -> bool:
    return (part.kind, part.number) == (current.kind, current.number)


def _new_id(part: Part) -> str:
    return f"{ {'text': 'msg', 'tool': 'fc', 'reasoning': 'rs'}[part.kind] }_{uuid.uuid4().hex}"


def _content(part: Part, text: str) -> Json:
    if part.kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _item(part: Part, text: str, item_id: str | None = None) -> Json:
    head = {"id": item_id or _new_id(part), "status": "completed"}
    if part.kind == "tool":
        return {**head, "type": "function_call", "call_id": part.id, "name": part.name, "arguments": text}
    if part.kind == "reasoning":
        return {**head, "type": "reasoning", "summary": [], "content": [_content(part, text)]}
    return {**head, "type": "message", "role": "assistant", "content": [_content(part, text)]}


def _usage(usage: Json) -> Json:
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached_tokens(usage), "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }
