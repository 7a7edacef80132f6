"""llama-server's own endpoints: /completion, /tokenize, /detokenize, /apply-template, /props and /slots."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from gguflora._version import __version__
from gguflora.server.chat_prompt import chat_prompt
from gguflora.server.completions import complete
from gguflora.server.errors import Failure
from gguflora.server.fields import Body
from gguflora.server.schemas import ChatBody, CompletionBody
from gguflora.server.service import Service, ServiceDep
from gguflora.server.streaming import EventStream
from gguflora.server.translation import Json, chunks_of, validated

router = APIRouter()


class NativeBody(Body):
    """Body of POST /completion: a prompt, and fields that llama-server shares with /v1/completions."""

    prompt: str | list[Any]
    n_predict: int | None = Field(None, ge=-1)
    n_probs: int | None = Field(None, ge=0, le=20)
    stream: bool | None = None
    others: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def rename(cls, body: dict[str, Any]) -> dict[str, Any]:
        """Keep the fields that completions know as well apart."""
        own = cls.model_fields.keys() - {"others"}
        others = {name: value for name, value in body.items() if name not in own}
        return {**{name: value for name, value in body.items() if name in own}, "others": others}


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
    stream = bool(body.stream)
    limit = body.n_predict if body.n_predict is not None else body.others.get("max_tokens") or -1
    if not limit:
        raise Failure(400, "n_predict is 0: evaluating a prompt without an answer is not supported", param="n_predict")
    fields = {
        **body.others,
        "prompt": body.prompt,
        "max_tokens": limit,
        "stream": stream,
        "stream_options": {"include_usage": True} if stream else None,
        "logprobs": body.n_probs or None,
    }
    response = await complete(validated(CompletionBody, fields), request, service)
    if isinstance(response, EventStream):
        return response.translated(_native_events)
    answer = json.loads(bytes(response.body))
    results = [_native(answer, choice) for choice in answer["choices"]]
    return JSONResponse(results if len(results) > 1 else results[0])


def _native(answer: Json, choice: Json) -> Json:
    """Return one of the answers in llama-server's format."""
    usage, timings = answer["usage"], answer.get("timings") or {}
    word = answer.get("stopping_word") or ""
    kind = "limit" if choice["finish_reason"] == "length" else "word" if word else "eos"
    probabilities = {"completion_probabilities": _probabilities(choice)} if choice.get("logprobs") else {}
    return {
        "index": choice["index"],
        "content": choice["text"],
        "stop": True,
        "stop_type": kind,
        "stopping_word": word,
        "model": answer["model"],
        "tokens_predicted": usage["completion_tokens"],
        "tokens_evaluated": usage["prompt_tokens"],
        "tokens_cached": (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
        "truncated": False,
        "timings": timings,
        **probabilities,
    }


def _probabilities(choice: Json) -> list[Json]:
    found = choice["logprobs"]
    return [
        {
            "token": text,
            "logprob": logprob,
            "top_logprobs": [{"token": other, "logprob": value} for other, value in top.items()],
        }
        for text, logprob, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True)
    ]


async def _native_events(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    last: Json = {}
    usage: Json = {}
    async for chunk in chunks_of(events):
        if "error" in chunk:
            yield _event(chunk)
            return
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            if choice["finish_reason"] is not None:
                last = {**chunk, "choices": [choice]}
            else:
                probabilities = {"completion_probabilities": _probabilities(choice)} if choice.get("logprobs") else {}
                yield _event({"index": choice["index"], "content": choice["text"], "stop": False, **probabilities})
    if last:
        choice = {**last["choices"][0], "logprobs": None}
        yield _event(_native({**last, "usage": usage}, choice))


def _event(fields: Json) -> bytes:
    return f"data: {json.dumps(fields)}\n\n".encode()


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
    """Return the prompt that the chat template makes of messages."""
    prompt = await run_in_threadpool(chat_prompt, service.engine, body)
    return {"prompt": prompt.text}


@router.get("/props")
def props(service: ServiceDep) -> dict[str, Any]:
    """Describe the server as llama-server does; paths are reduced to names."""
    engine = service.engine
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
