"""Turn the body of an HTTP request into requests to the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from gguflora.engine import AdapterSet, Request, Sampling
from gguflora.engine.adapter_templates import ended_by
from gguflora.server.chat_prompt import chat_prompt
from gguflora.server.errors import Failure
from gguflora.server.openai_format import Echo
from gguflora.server.replies import Reply
from gguflora.server.schemas import ChatBody, CompletionBody, GenerationBody
from gguflora.server.service import Service

_DEFAULT_TOKENS: Final = 16
"""OpenAI's default of ``max_tokens`` for completions."""


def text_requests(
    service: Service, body: CompletionBody, adapters: AdapterSet
) -> tuple[list[Request], list[Echo | None]]:
    """Return one request for each prompt and each of its ``n`` answers, and what ``echo`` puts before each answer.

    Raises:
        Failure: if there are too many requests.
    """
    max_tokens = _limited_tokens(service, body.max_tokens, _DEFAULT_TOKENS)
    given = body.prompts()
    _check_count(service, body, len(given))  # before the work of splitting them into tokens
    prompts = [service.engine.tokenize(item, as_prompt=True) if isinstance(item, str) else item for item in given]
    requests = _requests(service, body, adapters, prompts, max_tokens, body.logprobs)
    return requests, _echoes(service, body, requests)


def chat_requests(service: Service, body: ChatBody, adapters: AdapterSet) -> tuple[list[Request], list[Reply]]:
    """Return one request for each of the ``n`` answers, and the readers of these answers.

    Raises:
        Failure: if there are too many requests, or the chat cannot be put into the model's template.
    """
    requested = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    max_tokens = _limited_tokens(service, requested, service.settings.max_tokens)
    template = service.engine.template_of(adapters)
    prompt = chat_prompt(service.engine, body, template)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    requests = _requests(service, body, adapters, [prompt.tokens], max_tokens, logprobs)
    requests = [
        replace(
            each,
            sampling=replace(ended_by(each.sampling, template), grammar=prompt.grammar),
            spelled_tokens=prompt.spelled,
            thoughts=prompt.thoughts,
        )
        for each in requests
    ]
    return requests, [prompt.reply() for _ in requests]


def _echoes(service: Service, body: CompletionBody, requests: Sequence[Request]) -> list[Echo | None]:
    if not body.echo:
        return [None] * len(requests)
    given = [item for item in body.prompts() for _ in range(body.n or 1)]
    engine = service.engine
    texts = [item if isinstance(item, str) else engine.detokenize(item).decode(errors="replace") for item in given]
    return [
        Echo(text, engine.detokenize(request.tokens[:1], special=True))
        for text, request in zip(texts, requests, strict=True)
    ]


def _limited_tokens(service: Service, requested: int | None, default: int) -> int:
    """Return how many tokens an answer may have: -1 asks for as many as possible, and more than that counts as that.

    The engine ends an answer at the end of the context.
    """
    limit = service.settings.max_tokens
    tokens = default if requested is None else requested
    return limit if tokens < 0 else min(tokens, limit)


def _check_count(service: Service, body: GenerationBody, n_prompts: int) -> None:
    n, limit = body.n or 1, service.settings.max_answers
    if not 0 < n_prompts * n <= limit:
        message = f"{n_prompts} prompts with {n} answers each; this server allows 1 to {limit} answers per request"
        raise Failure(400, message, "too_many_answers", "n")


def _requests(
    service: Service,
    body: GenerationBody,
    adapters: AdapterSet,
    prompts: list[list[int]],
    max_tokens: int,
    logprobs: int | None,
) -> list[Request]:
    _check_count(service, body, len(prompts))
    sampling = replace(
        body.sampling(service.engine), grammar=body.structure() if isinstance(body, CompletionBody) else None
    )
    return [
        Request(
            tokens=tokens,
            adapters=adapters,
            max_tokens=max_tokens,
            sampling=_numbered(sampling, number),
            stop=tuple(body.stop or ()),
            logprobs=logprobs,
            prompt_logprobs=logprobs is not None and isinstance(body, CompletionBody) and bool(body.echo),
            timeout=service.settings.timeout,
        )
        for tokens in prompts
        for number in range(body.n or 1)
    ]


def _numbered(sampling: Sampling, number: int) -> Sampling:
    """Return the sampling of one of several answers: a fixed seed differs by the answer's number."""
    if not number or sampling.has_random_seed:
        return sampling
    return replace(sampling, seed=((sampling.seed or 0) + number) % 2**63)
