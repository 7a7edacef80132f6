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
from gguflora.server.selectors import requested_set
from gguflora.server.service import Service, ServiceDep
from gguflora.server.translation import (
    Ending,
    Item,
    Json,
    Part,
    answer,
    cached_tokens,
    check_fields,
    naming,
    validated,
)

router = APIRouter()

_REASONS: Final = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_CHOICES: Final[dict[str, Any]] = {"auto": "auto", "any": "required", "none": "none"}
HARMLESS: Final[dict[str, str]] = {
    "billing_policy": "says who pays",
    "cache_control": "says what to cache; prompts are cached anyway",
    "diagnostics": "asks why a cache was missed",
    "fallback_credit_token": "says who pays",
    "inference_geo": "says where to compute",
    "speed": "says how fast to answer",
    "user_profile_id": "says who asks",
    "workspace_id": "says who asks",
}
"""Anthropic's fields that never change an answer, with the reasons."""

_CACHED: Final = frozenset({"cache_control"})
_KEPT_THOUGHTS: Final = {"type": "clear_thinking_20251015", "keep": "all"}
_NAMES: Final = {
    "reasoning_effort": "output_config.effort",
    "enable_thinking": "thinking",
    "thinking_token_budget": "thinking.budget_tokens",
}
_DEFAULT_EFFORT: Final = "high"
"""What Anthropic's API takes without ``effort``, so that it asks for nothing."""


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
        edits = value.get("edits") if name == "context_management" and isinstance(value, dict) else None
        keeps_all = edits is not None and all(each == _KEPT_THOUGHTS for each in edits)
        return value is None or name in HARMLESS or keeps_all or (name == "fallbacks" and value == [])

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
        if self.output_config:
            fields |= _output(self.output_config)
        return {name: value for name, value in fields.items() if value is not None}


@router.post("/v1/messages")
async def create_message(body: MessagesBody, request: Request, service: ServiceDep) -> Response:
    """Answer the last message of a chat, as Anthropic's API does."""
    if body.max_tokens is None:
        raise Failure(400, "max_tokens: Field required", "invalid_value", "max_tokens")
    with naming(_NAMES):
        return await answer(service, request, body.as_chat(), _whole, _events)


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: MessagesBody, service: ServiceDep) -> dict[str, int]:
    """Return the number of tokens of a prompt."""
    chat = validated(ChatBody, body.as_chat())
    with naming(_NAMES):
        return {"input_tokens": await run_in_threadpool(_count, service, chat)}


def _count(service: Service, chat: ChatBody) -> int:
    requests, _ = chat_requests(service, chat, requested_set(service, chat))
    return len(requests[0].tokens)


_BLOCKS: Final[dict[str, tuple[tuple[str, ...], frozenset[str]]]] = {
    "text": (("text",), _CACHED | {"citations"}),
    "tool_use": (("id", "name", "input"), _CACHED | {"caller"}),
    "tool_result": (("tool_use_id", "content", "is_error"), _CACHED),
    "thinking": (("thinking",), frozenset({"signature"})),
    "redacted_thinking": ((), frozenset({"data"})),
}
"""Fields of the kinds of blocks: those that are read, and those that change nothing."""


def _messages(message: Json) -> Iterator[Json]:
    """Yield the messages of chat completions that one of Anthropic's stands for."""
    check_fields(message, "messages", "role", "content")
    role, content = message.get("role"), message.get("content")
    if isinstance(content, str) or content is None:
        yield {"role": role, "content": content}
        return
    texts, calls, thoughts = [], [], []
    for block in _blocks(content, "messages"):
        kind = block.get("type")
        read, harmless = _BLOCKS.get(str(kind), ((), frozenset(block)))
        check_fields(block, "messages.content", "type", *read, harmless=harmless)
        if kind == "text":
            texts.append(_string(block, "text"))
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": to_json(block.get("input") or {})}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "tool_result":
            result = _text(block.get("content") or "", "tool_result")
            if block.get("is_error") and not result.lower().startswith("error"):
                result = f"Error: {result}"  # no template has another place for it
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
        if block.get("type") == "text":
            check_fields(block, where, "type", "text", harmless=_CACHED | {"citations"})
        else:
            raise Failure(400, f"{where}: content of type {block.get('type')!r:.40} is not supported", "unsupported")
    return "".join(_string(block, "text") for block in content)


def _string(block: Json, name: str) -> str:
    text = block.get(name)
    if not isinstance(text, str):
        raise Failure(400, f"messages: {name} of a block must be a text", "invalid_value", "messages")
    return text


_NO_EFFECT_OF_TOOLS: Final[Json] = {"allowed_callers": ["direct"], "defer_loading": False, "input_examples": []}


def _tool(tool: Json) -> Json:
    if tool.get("type", "custom") != "custom":
        raise Failure(
            400, f"tools: the tool {tool.get('type')!r:.40} is Anthropic's own and is not here", "unsupported"
        )
    no_effect = {name for name, value in _NO_EFFECT_OF_TOOLS.items() if tool.get(name) == value}
    names = ("type", "name", "description", "input_schema", "strict")
    check_fields(tool, "tools", *names, harmless=_CACHED | {"eager_input_streaming"} | no_effect)
    parts = {"name": tool.get("name"), "description": tool.get("description"), "parameters": tool.get("input_schema")}
    parts["strict"] = tool.get("strict")
    return {"type": "function", "function": {name: value for name, value in parts.items() if value is not None}}


def _tool_choice(choice: Json) -> Json:
    check_fields(choice, "tool_choice", "type", "name", "disable_parallel_tool_use")
    kind = choice.get("type")
    if kind == "tool":
        fields: Json = {"tool_choice": {"type": "function", "function": {"name": choice.get("name")}}}
    elif kind in _CHOICES:
        fields = {"tool_choice": _CHOICES[kind]}
    else:
        raise Failure(400, f"tool_choice: the type is {kind!r:.40}, expected auto, any, none or tool", "invalid_value")
    return fields | ({"parallel_tool_calls": False} if choice.get("disable_parallel_tool_use") else {})


def _thinking(thinking: Json) -> Json:
    """Return the fields for Anthropic's ``thinking``."""
    check_fields(thinking, "thinking", "type", "budget_tokens", "display")
    kind, budget, display = (thinking.get(name) for name in ("type", "budget_tokens", "display"))
    if kind not in {"enabled", "disabled", "adaptive"}:
        message = f"thinking.type is {kind!r:.40}, expected enabled, disabled or adaptive"
        raise Failure(400, message, "invalid_value", "thinking.type")
    if budget is not None and (not isinstance(budget, int) or isinstance(budget, bool) or budget < 1):
        message = f"thinking.budget_tokens is {budget!r:.40}, expected a number of tokens"
        raise Failure(400, message, "invalid_value", "thinking.budget_tokens")
    if display not in {None, "summarized", "omitted"}:
        message = f"thinking.display is {display!r:.40}, expected summarized or omitted"
        raise Failure(400, message, "invalid_value", "thinking.display")
    hidden = {"include_reasoning": False} if display == "omitted" else {}
    limit = {"thinking_token_budget": budget} if kind == "enabled" and budget is not None else {}
    return hidden if kind == "adaptive" else {**hidden, **limit, "enable_thinking": kind == "enabled"}


def _output(config: Json) -> Json:
    """Return the fields for Anthropic's ``output_config``."""
    check_fields(config, "output_config", "effort", "format")
    fields: Json = {}
    effort, form = config.get("effort"), config.get("format")
    if effort not in {None, _DEFAULT_EFFORT}:
        fields["reasoning_effort"] = effort
    if form is not None:
        if not isinstance(form, dict) or form.get("type") != "json_schema":
            raise Failure(400, "output_config.format must be of type json_schema", "invalid_value", "output_config")
        check_fields(form, "output_config.format", "type", "schema")
        named = {"name": "answer", "schema": form.get("schema"), "strict": True}
        fields["response_format"] = {"type": "json_schema", "json_schema": named}
    return fields


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
