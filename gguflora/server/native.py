"""llama-server's own endpoints: /completion, /tokenize, /detokenize, /apply-template, /props and /slots."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response
from pydantic import Field

from gguflora._version import __version__
from gguflora.engine import Generation
from gguflora.server.chat_prompt import chat_prompt
from gguflora.server.completions import begin_completion
from gguflora.server.errors import Failure
from gguflora.server.events import chunks_of, data_event
from gguflora.server.fields import Body, ForeignBody, take_alias
from gguflora.server.json_response import JSONResponse
from gguflora.server.openai_format import timings
from gguflora.server.schemas import ChatBody, CompletionBody
from gguflora.server.selectors import requested_set
from gguflora.server.service import Service, ServiceDep
from gguflora.server.translation import Json, validated

router = APIRouter()


class NativeBody(ForeignBody):
    """Body of POST /completion: a prompt, and fields that llama-server shares with /v1/completions."""

    prompt: str | list[Any]
    n_predict: int | None = Field(None, ge=-1)
    n_probs: int | None = Field(None, ge=0, le=20)
    stream: bool | None = None

    @classmethod
    def rename(cls, body: dict[str, Any]) -> dict[str, Any]:
        """Read OpenAI's names of these fields, too."""
        return super().rename(take_alias(take_alias(body, "max_tokens", "n_predict"), "logprobs", "n_probs"))

    def as_completion(self) -> Json:
        """Return the body of the same request for /v1/completions.

        Raises:
            Failure: if it asks for no answer.
        """
        limit = -1 if self.n_predict is None else self.n_predict
        if limit == 0:
            message = "n_predict is 0: evaluating a prompt without an answer is not supported"
            raise Failure(400, message, param="n_predict")
        fields = {"prompt": self.prompt, "max_tokens": limit, "stream": self.stream, "logprobs": self.n_probs or None}
        return {**self.others, **fields}


class TokenizeBody(Body):
    """Body of POST /tokenize: llama-server's ``content``, or vLLM's ``prompt``."""

    content: str | None = None
    prompt: str | None = None
    model: str | None = None
    add_special: bool = False
    add_special_tokens: bool = True
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeBody(Body):
    """Body of POST /detokenize."""

    tokens: list[int] = Field(max_length=1 << 20)
    model: str | None = None


@router.post("/completion")
async def native_completion(body: NativeBody, request: Request, service: ServiceDep) -> Response:
    """Continue a text, with llama-server's names of the fields of request and answer."""
    completion = await begin_completion(validated(CompletionBody, body.as_completion()), service)
    generations = completion.answers.generations
    if body.stream:
        return completion.stream(lambda events: _native_events(events, generations))
    answer = await completion.whole(request)
    results = [
        {**_native(answer, choice, generation), **_probabilities(choice)}
        for choice, generation in zip(answer["choices"], generations, strict=True)
    ]
    return JSONResponse(results if len(results) > 1 else results[0])


def _native(answer: Json, choice: Json, generation: Generation) -> Json:
    """Return one of the answers, which has ended, in llama-server's format."""
    word, usage = generation.stop_text, generation.usage
    kind = "limit" if choice["finish_reason"] == "length" else "word" if word else "eos"
    return {
        "index": choice["index"],
        "content": choice["text"],
        "stop": True,
        "stop_type": kind,
        "stopping_word": word or "",
        "model": answer["model"],
        "tokens_predicted": usage.completion_tokens,
        "tokens_evaluated": usage.prompt_tokens,
        "tokens_cached": usage.reused_tokens,
        "truncated": False,
        "timings": timings([generation])["timings"],
    }


def _probabilities(choice: Json) -> Json:
    found = choice["logprobs"]
    if found is None:
        return {}
    tokens = zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True)
    return {
        "completion_probabilities": [
            {
                "token": text,
                "logprob": logprob,
                "top_logprobs": [{"token": other, "logprob": value} for other, value in (top or {}).items()],
            }
            for text, logprob, top in tokens
        ]
    }


async def _native_events(events: AsyncIterator[bytes], generations: Sequence[Generation]) -> AsyncIterator[bytes]:
    async for chunk in chunks_of(events):
        if "error" in chunk:
            yield data_event(chunk)
            return
        for choice in chunk["choices"]:
            if choice["finish_reason"] is not None:
                yield data_event(_native(chunk, choice, generations[choice["index"]]))
            else:
                part = {"index": choice["index"], "content": choice["text"], "stop": False}
                yield data_event({**part, **_probabilities(choice)})


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, service: ServiceDep) -> dict[str, Any]:
    """Split a text into tokens."""
    if (body.content is None) == (body.prompt is None):
        raise Failure(400, "give the text once, as 'content' or as 'prompt'", "invalid_value", "content")
    text = body.content if body.content is not None else body.prompt or ""
    add_bos = body.add_special if body.content is not None else body.add_special_tokens
    engine = service.engine
    tokens = await run_in_threadpool(engine.tokenize, text, add_bos=add_bos, special=body.parse_special)
    if body.prompt is not None:
        return {"tokens": tokens, "count": len(tokens), "max_model_len": engine.n_ctx}
    return {"tokens": _pieces(service, tokens) if body.with_pieces else tokens}


def _pieces(service: Service, tokens: Sequence[int]) -> list[Json]:
    pieces = [service.engine.detokenize([token], special=True) for token in tokens]
    return [{"id": token, "piece": _readable(piece)} for token, piece in zip(tokens, pieces, strict=True)]


def _readable(piece: bytes) -> str | list[int]:
    """Return a piece as text, or as its bytes if they are no whole characters, as llama-server does."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, service: ServiceDep) -> dict[str, str]:
    """Return the text of tokens."""
    text = await run_in_threadpool(service.engine.detokenize, body.tokens, special=True)
    readable = text.decode("utf-8", errors="replace")
    return {"content": readable, "prompt": readable}  # llama-server's name, and vLLM's


@router.post("/apply-template")
async def apply_template(body: ChatBody, service: ServiceDep) -> dict[str, str]:
    """Return the prompt that a chat of this body gets, and the errors that it would get."""

    def make() -> str:
        template = service.engine.template_of(requested_set(service, body))
        return chat_prompt(service.engine, body, template).text

    return {"prompt": await run_in_threadpool(make)}


@router.get("/props")
def props(service: ServiceDep) -> dict[str, Any]:
    """Describe the server as llama-server does; paths are reduced to names."""
    engine = service.engine
    adapters = engine.adapters()
    loaded = {adapter.name for adapter in adapters}
    return {
        "default_generation_settings": {"n_ctx": engine.n_ctx, "params": {"n_predict": -1, "stream": True}},
        "total_slots": engine.n_parallel,
        "model_alias": next(iter(service.settings.aliases), engine.model_name),
        "model_path": service.base.name,
        "chat_template": engine.chat_template,
        **engine.special_texts,
        "modalities": {"vision": False, "audio": False},
        "build_info": f"gguflora {__version__}",
        "is_sleeping": False,
        "memory": {
            "model": service.base.stat().st_size,
            "kv": engine.stats().kv_bytes,
            "adapters": sum(adapter.size for adapter in adapters),
        },
        "can_load_adapters": service.settings.allow_load is not None,
        "adapters_on_disk": [name for name in engine.adapter_names() if name not in loaded],
    }


@router.get("/slots")
async def slots(service: ServiceDep) -> list[dict[str, Any]]:
    """List the slots that requests are computed in, each with the adapters of what it holds."""
    stats = await run_in_threadpool(service.engine.stats)
    return [
        {
            "id": slot.id,
            "n_ctx": service.engine.n_ctx,
            "is_processing": slot.busy,
            "n_tokens": slot.tokens,
            "adapters": None if slot.adapters is None else service.names.describe(slot.adapters),
        }
        for slot in stats.slots
    ]
