"""Anthropic's API: ``/v1/messages`` and ``/v1/messages/count_tokens``."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response
from pydantic import Field

from gguflora.files.strict_json import to_json
from gguflora.server.errors import Failure
from gguflora.server.events import named_event
from gguflora.server.fields import ForeignBody
from gguflora.server.prompts import chat_requests
from gguflora.server.schemas import ChatBody
from gguflora.server.service import Service, ServiceDep
from gguflora.server.translation import Ending, Item, Json, Part, answer, cached_tokens, validated

router = APIRouter()

_REASONS: Final = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_CHOICES: Final[dict[str, Any]] = {"auto": "auto", "any": "required", "none": "none"}
_HARMLESS: Final = frozenset(
    {"cache_control", "context_management", "diagnostics", "inference_geo", "speed", "user_profile_id", "workspace_id"}
)


class MessagesBody(ForeignBody):
    """Body of POST /v1/messages; fields that chat completions know may stand beside Anthropic's."""

    messages: list[dict[str, Any]] = Field(min_length=1, max_length=1024)
    max_tokens: int | None = Field(None, ge=1)
    system: str | list[dict[str, Any]] | None = None
    stop_sequences: list[str] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None

    @classmethod
    def is_void(cls, name: str, value: Any) -> bool:  # noqa: ANN401  (any JSON value)
        """Return whether a field of Anthropic's that is not read never changes an answer."""
        return name in _HARMLESS

    def as_chat(self) -> Json:
        """Return the body of the same request for chat completions.

        Raises:
            Failure: if a part of the content is not supported.
        """
        messages = [message for each in self.messages for message in _messages(each)]
        if self.system:
            messages = [{"role": "system", "content": _text(self.system, "system")}, *messages]
        fields: Json = {**self.others, "messages": messages, "max_tokens": self.max_tokens, "stop": self.stop_sequences}
        if self.tools:
            fields["tools"] = [_tool(tool) for tool in self.tools]
        if self.tool_choice:
            fields |= _tool_choice(self.tool_choice)
        if self.thinking:
            fields |= _thinking(self.thinking)
        schema = (self.output_config or {}).get("format")
        if schema:
            named = {"name": "answer", "schema": schema.get("schema"), "strict": True}
            fields["response_format"] = {"type": "json_schema", "json_schema": named}
        return {name: value for name, value in fields.items() if value is not None}


@router.post("/v1/messages")
async def create_message(body: MessagesBody, request: Request, service: ServiceDep) -> Response:
    """Answer the last message of a chat, as Anthropic's API does."""
    if body.max_tokens is None:
        raise Failure(400, "max_tokens: Field required", "invalid_value", "max_tokens")
    return await answer(service, request, body.as_chat(), _whole, _events)


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: MessagesBody, service: ServiceDep) -> dict[str, int]:
    """Return the number of tokens of a prompt."""
    chat = validated(ChatBody, body.as_chat())
    return {"input_tokens": await run_in_threadpool(_count, service, chat)}


def _count(service: Service, chat: ChatBody) -> int:
    requests, _ = chat_requests(service, chat, ())
    return len(requests[0].tokens)


def _messages(message: Json) -> Iterator[Json]:
    """Yield the messages of chat completions that one of Anthropic's stands for."""
    role, content = message.get("role"), message.get("content")
    if isinstance(content, str) or content is None:
        yield {"role": role, "content": content}
        return
    texts, calls, thoughts = [], [], []
    for block in _blocks(content, "messages"):
        kind = block.get("type")
        if kind == "text":
            texts.append(_string(block, "text"))
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": to_json(block.get("input") or {})}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "tool_result":
            result = _text(block.get("content") or "", "tool_result")
            yield {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": result}
        elif kind == "thinking":
            thoughts.append(_string(block, "thinking"))
        elif kind != "redacted_thinking":
            raise Failure(400, f"messages: content of type {kind!r:.40} is not supported", "unsupported", "messages")
    extra = ({"tool_calls": calls} if calls else {}) | ({"reasoning_content": "".join(thoughts)} if thoughts else {})
    if texts or extra:
        yield {"role": role, "content": "".join(texts), **extra}


def _blocks(content: Any, where: str) -> Sequence[Json]:  # noqa: ANN401  (any JSON value)
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise Failure(400, f"{where}: content must be a text or a list of blocks", "invalid_value", where)
    return content


def _text(content: Any, where: str) -> str:  # noqa: ANN401  (any JSON value)
    """Return the text of a content that may only be text."""
    if isinstance(content, str):
        return content
    for block in _blocks(content, where):
        if block.get("type") != "text":
            raise Failure(400, f"{where}: content of type {block.get('type')!r:.40} is not supported", "unsupported")
    return "".join(_string(block, "text") for block in content)


def _string(block: Json, name: str) -> str:
    text = block.get(name)
    if not isinstance(text, str):
        raise Failure(400, f"messages: {name} of a block must be a text", "invalid_value", "messages")
    return text


def _tool(tool: Json) -> Json:
    if tool.get("type", "custom") != "custom":
        raise Failure(
            400, f"tools: the tool {tool.get('type')!r:.40} is Anthropic's own and is not here", "unsupported"
        )
    parts = {"name": tool.get("name"), "description": tool.get("description"), "parameters": tool.get("input_schema")}
    return {"type": "function", "function": {name: value for name, value in parts.items() if value is not None}}


def _tool_choice(choice: Json) -> Json:
    kind = choice.get("type")
    if kind == "tool":
        fields: Json = {"tool_choice": {"type": "function", "function": {"name": choice.get("name")}}}
    elif kind in _CHOICES:
        fields = {"tool_choice": _CHOICES[kind]}
    else:
        raise Failure(400, f"tool_choice: the type is {kind!r:.40}, expected auto, any, none or tool", "invalid_value")
    return fields | ({"parallel_tool_calls": False} if choice.get("disable_parallel_tool_use") else {})


def _thinking(thinking: Json) -> Json:
    wanted = {"enabled": True, "disabled": False}.get(str(thinking.get("type")))
    return {} if wanted is None else {"enable_thinking": wanted}


def _usage(usage: Json) -> Json:
    cached = cached_tokens(usage)
    return {
        "input_tokens": usage.get("prompt_tokens", 0) - cached,
        "output_tokens": usage.get("completion_tokens", 0),
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
    }


def _reason(ending: Ending) -> Json:
    reason = "stop_sequence" if ending.stop_text is not None else _REASONS.get(ending.reason, "end_turn")
    return {"stop_reason": reason, "stop_sequence": ending.stop_text}


def _message(head: Json, content: Sequence[Json], usage: Json) -> Json:
    number = str(head["id"]).rpartition("-")[2]
    fields = {"id": f"msg_{number}", "type": "message", "role": "assistant", "model": head["model"]}
    return {**fields, "content": content, "stop_reason": None, "stop_sequence": None, "usage": usage}


def _whole(head: Json, parts: list[Part], ending: Ending) -> Json:
    blocks = []
    for part in parts:
        if part.kind == "tool":
            blocks.append({**_block(part), "input": _arguments(part.text)})
        else:
            blocks.append({**_block(part), {"text": "text", "reasoning": "thinking"}[part.kind]: part.text})
    return {**_message(head, blocks, _usage(ending.usage)), **_reason(ending)}


def _arguments(text: str) -> Any:  # noqa: ANN401  (any JSON value)
    try:
        return json.loads(text or "{}")
    except ValueError:
        return {"arguments": text}


def _block(part: Part) -> Json:
    """Return a content block that is still empty."""
    if part.kind == "tool":
        return {"type": "tool_use", "id": part.id, "name": part.name, "input": {}}
    if part.kind == "reasoning":
        return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "text", "text": ""}


def _delta(part: Part) -> Json:
    if part.kind == "tool":
        return {"type": "input_json_delta", "partial_json": part.text}
    if part.kind == "reasoning":
        return {"type": "thinking_delta", "thinking": part.text}
    return {"type": "text_delta", "text": part.text}


async def _events(head: Json, items: AsyncIterator[Item]) -> AsyncIterator[bytes]:
    # what was cached is known at the end only: the usage of message_delta replaces this one
    yield named_event("message_start", {"message": _message(head, [], _usage(head.get("usage") or {}))})
    index, current = -1, None
    async for item in items:
        if isinstance(item, Failure):
            yield named_event("error", item.to_anthropic())
            return
        if isinstance(item, Part):
            if current != (item.kind, item.number):
                if current is not None:
                    yield named_event("content_block_stop", {"index": index})
                index, current = index + 1, (item.kind, item.number)
                yield named_event("content_block_start", {"index": index, "content_block": _block(item)})
            if item.text:
                yield named_event("content_block_delta", {"index": index, "delta": _delta(item)})
            continue
        if current is not None:
            yield named_event("content_block_stop", {"index": index})
        yield named_event("message_delta", {"delta": _reason(item), "usage": _usage(item.usage)})
        yield named_event("message_stop", {})
