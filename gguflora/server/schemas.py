"""Bodies of requests: OpenAI's fields, llama-server's ``lora``, vLLM's ``lora_name`` and ``lora_path``.

Fields that would change the answer but are not supported are refused; other unknown fields are ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema

from gguflora.server.bodies import stop_at_first_error

_REFUSED: Final[dict[str, object]] = {
    "audio": None,
    "best_of": 1,
    "echo": False,
    "function_call": "none",
    "functions": [],
    "grammar": "",
    "json_schema": None,
    "suffix": "",
    "tools": [],
}
"""Fields that are not supported, and the value (apart from null) that has no effect."""


class _Body(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False, extra="ignore")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:  # noqa: ANN401
        """Let lists stop at their first error, so that a long one costs no memory."""
        schema: CoreSchema = stop_at_first_error(handler(source))
        return schema


class LoraScale(_Body):
    """One item of llama-server's ``lora``."""

    id: int
    scale: float = 0.0


LoraScales = Annotated[list[LoraScale], FailFast(), Field(max_length=4096)]
"""The body of POST /lora-adapters."""


class StreamOptions(_Body):
    """OpenAI's ``stream_options``."""

    include_usage: bool = False


class ResponseFormat(_Body):
    """OpenAI's ``response_format``; only text is supported."""

    type: Literal["text"]


def _as_list(value: Any) -> Any:  # noqa: ANN401  (any JSON value)
    return [value] if isinstance(value, str) else value


StopTexts = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=256)]], BeforeValidator(_as_list), Field(max_length=16)
]


class GenerationBody(_Body):
    """The fields that completions and chat completions share."""

    model: str | None = Field(None, max_length=1024)
    lora: list[LoraScale] | None = Field(None, max_length=256)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=128)
    max_tokens: int | None = Field(None, ge=1)
    stop: StopTexts | None = None
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    temperature: float | None = Field(None, ge=0, le=10)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1 << 30)
    min_p: float | None = Field(None, ge=0, le=1)
    repeat_penalty: float | None = Field(None, gt=0, le=10)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=1024)
    response_format: ResponseFormat | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: Any) -> Any:  # noqa: ANN401
        if isinstance(body, dict):
            for name, no_effect in _REFUSED.items():
                if body.get(name) not in (None, no_effect):
                    raise ValueError(f"{name!r} is not supported by this server")
        return body


class CompletionBody(GenerationBody):
    """Body of POST /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=20)

    def prompts(self) -> list[str | list[int]]:
        """Return all prompts, each a text or a list of tokens."""
        prompt: Any = self.prompt
        several = isinstance(prompt, list) and not (prompt and isinstance(prompt[0], int))
        return list(prompt) if several else [prompt]


class TextPart(_Body):
    """A part of a message's content; only text is supported."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """One message of a chat."""

    role: str = Field(min_length=1, max_length=64)
    content: str | list[TextPart] | None = None
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        """Return the message as chat templates expect it."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatBody(GenerationBody):
    """Body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=1024)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _check_top_logprobs(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("'top_logprobs' needs 'logprobs': true")
        return self


class LoadBody(_Body):
    """Body of POST /v1/load_lora_adapter; ``task`` selects a task of a MULTITASK_PROMPT_TUNING adapter."""

    lora_name: str = Field(min_length=1, max_length=256)
    lora_path: str = Field(min_length=1, max_length=4096)
    load_inplace: bool = False
    task: int | None = Field(None, ge=0, lt=1 << 31)


class UnloadBody(_Body):
    """Body of POST /v1/unload_lora_adapter."""

    lora_name: str = Field(min_length=1, max_length=256)
