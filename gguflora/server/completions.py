"""OpenAI's endpoints: /v1/models, /v1/completions and /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response

from gguflora import engine
from gguflora.engine import AdapterSet
from gguflora.server.errors import as_failure, log_fault
from gguflora.server.events import DONE, data_event
from gguflora.server.json_response import JSONResponse
from gguflora.server.names import BASE_MODEL
from gguflora.server.openai_format import ChatChoice, ChatForm, Choice, Form, TextForm, timings, usage
from gguflora.server.prompts import chat_requests, text_requests
from gguflora.server.schemas import ChatBody, CompletionBody, GenerationBody
from gguflora.server.selectors import requested_set
from gguflora.server.service import Service, ServiceDep
from gguflora.server.streaming import Answers, EventStream, while_connected

router = APIRouter()
G = TypeVar("G", bound=GenerationBody)
T = TypeVar("T")


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
    return await (await begin_completion(body, service)).respond(request)


async def begin_completion(body: CompletionBody, service: Service) -> Completion:
    """Begin to continue one or several texts.

    Raises:
        GgufloraError: if the request cannot be answered.
    """
    answers = Answers(stream=bool(body.stream))
    model, echoes = await run_in_threadpool(_submit, service, body, answers, text_requests)
    form = TextForm()
    choices = [Choice(form, index, body.logprobs is not None, echo) for index, echo in enumerate(echoes)]
    return Completion(service, form, body, answers, choices, model)


@router.post("/v1/chat/completions")
async def chat(body: ChatBody, request: Request, service: ServiceDep) -> Response:
    """Answer the last message of a chat."""
    return await (await begin_chat(body, service)).respond(request)


async def begin_chat(body: ChatBody, service: Service) -> Completion:
    """Begin to answer the last message of a chat.

    Raises:
        GgufloraError: if the request cannot be answered.
    """
    answers = Answers(stream=bool(body.stream))
    model, replies = await run_in_threadpool(_submit, service, body, answers, chat_requests)
    form = ChatForm()
    choices = [ChatChoice(form, index, bool(body.logprobs), reply=reply) for index, reply in enumerate(replies)]
    return Completion(service, form, body, answers, choices, model)


def _submit(
    service: Service,
    body: G,
    answers: Answers,
    make_requests: Callable[[Service, G, AdapterSet], tuple[list[engine.Request], list[T]]],
) -> tuple[str, list[T]]:
    """Find a request's adapters, which may need a look at files, and begin its answers; not for the event loop.

    Returns:
        The name of the set that answers, and what ``make_requests`` returns beside each request.
    """
    adapters = requested_set(service, body)
    requests, others = make_requests(service, body, adapters)
    model = service.names.of(body.model, adapters)
    answers.begin(service.engine, requests)
    return model, others


@dataclass(frozen=True, slots=True)
class Completion:
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
        """Return the answer in OpenAI's format, whole or as a stream."""
        return self.stream() if self.body.stream else JSONResponse(await self.whole(request))

    def stream(
        self, translate: Callable[[AsyncIterator[bytes]], AsyncIterator[bytes]] = lambda events: events
    ) -> EventStream:
        """Return the answer as a stream of OpenAI's events, or of what another API makes of them."""
        return EventStream(self.answers, translate(self._events()))

    async def whole(self, request: Request) -> dict[str, Any]:
        """Return the whole answer in OpenAI's format.

        Raises:
            EngineError: if a generation failed.
            Failure: if one was aborted, or the client has gone.
        """
        return await while_connected(request, self.answers, self._whole())

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
                data_event({**head, "choices": [opening], **no_usage})
                for each in choices
                if (opening := each.opening())
            )
            while self.answers.running:
                yield b"".join(
                    data_event({**head, "choices": [choice], **no_usage, **more})
                    for choice, more in self._chunks(choices, await self.answers.arrived())
                )
        except Exception as error:
            failure = as_failure(error, self.service.folders())
            log_fault(failure, error, "an answer")
            yield data_event(failure.to_dict())
            return
        self.service.metrics.finished(self.answers.generations)
        if include_usage:
            yield data_event({**head, "choices": [], "usage": self._usage()})
        yield DONE

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
