"""OpenAI's endpoints: /v1/models, /v1/completions and /v1/chat/completions."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response

from gguflora import engine
from gguflora.server.errors import as_failure, log_fault
from gguflora.server.names import BASE_MODEL
from gguflora.server.openai_format import ChatChoice, ChatForm, Choice, Form, TextForm, timings, usage
from gguflora.server.prompts import chat_requests, text_requests
from gguflora.server.schemas import ChatBody, CompletionBody, GenerationBody
from gguflora.server.selectors import requested_set
from gguflora.server.service import Service, ServiceDep
from gguflora.server.streaming import Answers, EventStream, while_connected

router = APIRouter()


@router.get("/v1/models")
def list_models(service: ServiceDep) -> dict[str, Any]:
    """List the base, each adapter and each alias; requests may also name a set, such as ``legal@0.5+tone@0.3``."""
    return {"object": "list", "data": [_model(service, name) for name in service.names.all()]}


@router.get("/v1/models/{model:path}")
def show_model(model: str, service: ServiceDep) -> dict[str, Any]:
    """Describe the base, an adapter or an adapter set."""
    service.adapter_set(model, None)
    return _model(service, model)


def _model(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "gguflora",
        "root": service.engine.model_name,
        "parent": None if name == BASE_MODEL else BASE_MODEL,
        "max_model_len": service.engine.n_ctx,
    }


@router.post("/v1/completions")
async def complete(body: CompletionBody, request: Request, service: ServiceDep) -> Response:
    """Continue one or several texts."""
    adapters = requested_set(service, body)
    model = service.names.of(body.model, adapters)
    answers = Answers(stream=bool(body.stream))
    requests, echoes = await run_in_threadpool(text_requests, service, body, adapters)
    await run_in_threadpool(answers.begin, service.engine, requests)
    form = TextForm()
    choices = [Choice(form, index, body.logprobs is not None, echo) for index, echo in enumerate(echoes)]
    return await _Completion(service, form, body, answers, choices, model).respond(request)


@router.post("/v1/chat/completions")
async def chat(body: ChatBody, request: Request, service: ServiceDep) -> Response:
    """Answer the last message of a chat."""
    adapters = requested_set(service, body)
    model = service.names.of(body.model, adapters)
    answers = Answers(stream=bool(body.stream))
    requests, replies = await run_in_threadpool(chat_requests, service, body, adapters)
    await run_in_threadpool(answers.begin, service.engine, requests)
    form = ChatForm()
    choices = [ChatChoice(form, index, bool(body.logprobs), reply=reply) for index, reply in enumerate(replies)]
    return await _Completion(service, form, body, answers, choices, model).respond(request)


@dataclass(frozen=True, slots=True)
class _Completion:
    """One request that is being answered.

    Attributes:
        service: the service that answers.
        form: the format of the answer.
        body: the request's body.
        answers: the generations.
        choices: what has arrived of each generation.
        model: name of the adapter set that answers.
    """

    service: Service
    form: Form
    body: GenerationBody
    answers: Answers
    choices: Sequence[Choice]
    model: str

    async def respond(self, request: Request) -> Response:
        if self.body.stream:
            return EventStream(self.answers, self._events())
        return JSONResponse(await while_connected(request, self.answers, self._whole()))

    async def _whole(self) -> dict[str, Any]:
        choices = self.choices
        while self.answers.running:
            for index, piece in await self.answers.arrived():
                if piece is not None:
                    choices[index].add(piece)
        generations = self.answers.generations
        self.service.metrics.finished(generations)
        return {
            **self._head(self.form.whole),
            "choices": [
                choice.whole(answer.finish_reason) for choice, answer in zip(choices, generations, strict=True)
            ],
            "usage": self._usage(),
            **timings(generations),
        }

    def _usage(self) -> dict[str, Any]:
        return usage(self.answers.generations, self.body.n or 1)

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"{self.form.prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self.model,
        }

    async def _events(self) -> AsyncIterator[bytes]:
        """Yield server-sent events: chunks, then the usage if requested, then ``[DONE]``; an error ends the stream."""
        head = self._head(self.form.chunk)
        include_usage = bool(self.body.stream_options and self.body.stream_options.include_usage)
        no_usage = {"usage": None} if include_usage else {}
        choices = self.choices
        try:
            yield b"".join(
                _event({**head, "choices": [opening], **no_usage}) for each in choices if (opening := each.opening())
            )
            while self.answers.running:
                yield b"".join(
                    _event({**head, "choices": [choice], **no_usage, **more})
                    for choice, more in self._chunks(choices, await self.answers.arrived())
                )
        except Exception as error:
            failure = as_failure(error, self.service.folders())
            log_fault(failure, error, "an answer")
            yield failure.to_event()
            return
        self.service.metrics.finished(self.answers.generations)
        if include_usage:
            yield _event({**head, "choices": [], "usage": self._usage()})
        yield b"data: [DONE]\n\n"

    def _chunks(
        self, choices: Sequence[Choice], arrived: Sequence[tuple[int, engine.Piece | None]]
    ) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Yield a chunk for each arrived item, with fields to add beside it."""
        for index, piece in arrived:
            if piece is not None:
                yield choices[index].add(piece), {}
            else:
                reason = self.answers.generations[index].finish_reason
                yield choices[index].closing(reason), timings(self.answers.generations)


def _event(chunk: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(chunk)}\n\n".encode()
