"""Bodies of requests: OpenAI's fields, llama-server's ``lora``, vLLM's ``lora_name`` and ``lora_path``.

A field that is neither read nor harmless is refused by name; see `gguflora.server.fields`.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, FailFast, Field, model_validator

from gguflora.server.fields import Body, refusal, take_alias
from gguflora.server.structured import StructureFields


class LoraScale(Body):
    """One item of llama-server's ``lora``."""

    id: int
    scale: float = 0.0
    harmless = frozenset({"method", "name", "path", "sha256", "size"})  # what GET /lora-adapters lists beside them


LoraScales = Annotated[list[LoraScale], FailFast(), Field(max_length=4096)]
"""The body of POST /lora-adapters."""


class LoraRequest(Body):
    """vLLM's ``lora_request``: a loaded adapter by name; what is said beside the name must fit it."""

    lora_name: str = Field(min_length=1, max_length=1024)
    lora_path: str | None = Field(None, max_length=4096)
    lora_int_id: int | None = None
    harmless = frozenset({"base_model_name", "load_inplace", "tensorizer_config_dict", "long_lora_max_len"})


class StreamOptions(Body):
    """OpenAI's ``stream_options``."""

    include_usage: bool | None = None
    harmless = frozenset({"continuous_usage_stats", "include_obfuscation"})


def _as_list(value: Any) -> Any:  # noqa: ANN401  (any JSON value)
    return [value] if isinstance(value, str) else value


StopTexts = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=256)]], BeforeValidator(_as_list), Field(max_length=16)
]


class GenerationBody(StructureFields):
    """The fields that completions and chat completions share."""

    model: str | None = Field(None, max_length=1024)
    lora: list[LoraScale] | None = Field(None, max_length=256)
    adapter_id: str | None = Field(None, max_length=1024)
    adapter_name: str | None = Field(None, max_length=1024)
    lora_path: str | None = Field(None, max_length=4096)
    lora_request: LoraRequest | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=128)
    max_tokens: int | None = Field(None, ge=-1)
    stop: StopTexts | None = None

    @classmethod
    def rename(cls, body: dict[str, Any]) -> dict[str, Any]:
        """Read llama-server's names of ``max_tokens`` and ``n``, too."""
        return super().rename(take_alias(take_alias(body, "n_predict", "max_tokens"), "n_cmpl", "n"))


class CompletionBody(GenerationBody):
    """Body of POST /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None

    @model_validator(mode="after")
    def _check_max_tokens(self) -> CompletionBody:
        if self.max_tokens == 0 and not self.echo:
            raise refusal("max_tokens", "{name} is 0; without 'echo' an answer needs at least one token")
        return self

    def prompts(self) -> list[str | list[int]]:
        """Return all prompts, each a text or a list of tokens."""
        prompt: Any = self.prompt
        several = isinstance(prompt, list) and not (prompt and isinstance(prompt[0], int))
        return list(prompt) if several else [prompt]


class TextPart(Body):
    """A part of a message's content; only text is supported."""

    type: Literal["text"]
    text: str
    harmless = frozenset({"cache_control"})


class CalledFunction(Body):
    """What a tool call of an earlier message called."""

    name: str = Field(min_length=1, max_length=256)
    arguments: str | dict[str, Any] = ""

    def parsed(self) -> Any:  # noqa: ANN401  (any JSON value)
        """Return the arguments as a value; text that is not JSON stays text."""
        if isinstance(self.arguments, dict):
            return self.arguments
        try:
            return json.loads(self.arguments or "{}")
        except ValueError:
            return self.arguments


class ToolCall(Body):
    """A tool call of an earlier message."""

    id: str | None = Field(None, max_length=256)
    type: Literal["function"] = "function"
    function: CalledFunction
    harmless = frozenset({"index"})


_ONLY_CALL: Final = "call00000"
"""Id of a call in OpenAI's older form, which has none."""


class Message(Body):
    """One message of a chat."""

    role: str = Field(min_length=1, max_length=64)
    content: str | list[TextPart] | None = None
    name: str | None = Field(None, max_length=256)
    tool_calls: list[ToolCall] | None = Field(None, max_length=256)
    tool_call_id: str | None = Field(None, max_length=256)
    reasoning_content: str | None = None
    harmless = frozenset({"annotations", "id"})

    @classmethod
    def rename(cls, body: dict[str, Any]) -> dict[str, Any]:
        """Read vLLM's name of the reasoning, and OpenAI's older form of calls, too."""
        body = take_alias(body, "reasoning", "reasoning_content")
        content = body.get("content")
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and part.get("type") != "text":
                kind = f"{part.get('type')!r:.40}".replace("{", "(")
                raise refusal("content", f"{{name}}: a part of type {kind} is not supported; this server reads text")
        if body.get("role") == "function":
            body = {**body, "role": "tool", "tool_call_id": _ONLY_CALL}
        if body.get("function_call") is not None:
            if body.get("tool_calls"):
                raise refusal("function_call", "{name} and 'tool_calls' cannot both be given")
            calls = [{"id": _ONLY_CALL, "function": body["function_call"]}]
            body = {name: value for name, value in body.items() if name != "function_call"} | {"tool_calls": calls}
        return body

    def text(self) -> str:
        """Return the content as one text."""
        content = self.content or ""
        return content if isinstance(content, str) else "".join(part.text for part in content)


class FunctionSpec(Body):
    """A function that the model may call."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.:/-]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def for_template(self) -> dict[str, Any]:
        """Return it as chat templates and models expect it."""
        parameters = self.parameters or {"type": "object", "properties": {}}
        return {"name": self.name, "description": self.description or "", "parameters": parameters}


class Tool(Body):
    """A tool; functions are the only kind."""

    type: Literal["function"] = "function"
    function: FunctionSpec
    harmless = frozenset({"cache_control"})


class NamedFunction(Body):
    """The name in a ``tool_choice``."""

    name: str


class NamedTool(Body):
    """A ``tool_choice`` that names a function."""

    type: Literal["function"] = "function"
    function: NamedFunction


class ChatBody(GenerationBody):
    """Body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=1024)
    max_completion_tokens: int | None = Field(None, ge=-1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = Field(None, max_length=256)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    functions: list[FunctionSpec] | None = Field(None, max_length=256)
    function_call: Literal["none", "auto"] | NamedFunction | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    enable_thinking: bool | None = None
    reasoning_effort: str | None = Field(None, max_length=64)
    reasoning_format: Literal["auto", "none", "deepseek", "deepseek-legacy"] | None = None
    include_reasoning: bool | None = None
    thinking_token_budget: int | None = Field(None, ge=-1, lt=1 << 31)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @classmethod
    def rename(cls, body: dict[str, Any]) -> dict[str, Any]:
        """Read llama-server's name of vLLM's ``thinking_token_budget``, too."""
        return super().rename(take_alias(body, "thinking_budget_tokens", "thinking_token_budget"))

    @model_validator(mode="after")
    def _check_fields(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise refusal("top_logprobs", "{name} needs 'logprobs': true")
        for name in ("max_tokens", "max_completion_tokens"):
            if getattr(self, name) == 0:
                raise refusal(name, "{name} is 0; an answer needs at least one token")
        for name, other in (("functions", "tools"), ("function_call", "tool_choice")):
            if getattr(self, name) and getattr(self, other) and getattr(self, name) != getattr(self, other):
                raise refusal(name, f"{{name}} is the older form of {other!r}; they cannot both be given")
        return self

    @property
    def is_legacy(self) -> bool:
        """Whether functions are offered in OpenAI's older form, in which an answer calls at most one."""
        return bool(self.functions)

    def offered_tools(self) -> list[Tool]:
        """Return the tools, given in either of OpenAI's forms."""
        return self.tools or [Tool(function=function) for function in self.functions or ()]

    def chosen_tool(self) -> Literal["none", "auto", "required"] | NamedTool | None:
        """Return which tools may be called, given in either of OpenAI's forms."""
        if self.function_call is None:
            return self.tool_choice
        if isinstance(self.function_call, NamedFunction):
            return NamedTool(function=self.function_call)
        return self.function_call


class LoadBody(Body):
    """Body of POST /v1/load_lora_adapter; ``task`` selects a task of a MULTITASK_PROMPT_TUNING adapter."""

    lora_name: str = Field(min_length=1, max_length=256)
    lora_path: str = Field(min_length=1, max_length=4096)
    load_inplace: bool = False
    task: int | None = Field(None, ge=0, lt=1 << 31)
    harmless = frozenset({"base_model_name"})


class UnloadBody(Body):
    """Body of POST /v1/unload_lora_adapter."""

    lora_name: str = Field(min_length=1, max_length=256)
    harmless = frozenset({"lora_int_id"})
