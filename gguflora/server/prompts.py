"""Turn the body of an HTTP request into requests to the engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from gguflora.engine import AdapterSet, Request, Sampling
from gguflora.server.errors import Failure
from gguflora.server.schemas import ChatBody, CompletionBody, GenerationBody
from gguflora.server.service import Service

_DEFAULT_TOKENS: Final = 16
"""OpenAI's default of ``max_tokens`` for completions."""


def text_requests(service: Service, body: CompletionBody, adapters: AdapterSet) -> list[Request]:
    """Return one request for each prompt and each of its ``n`` answers.

    Raises:
        Failure: if there are too many requests, or they ask for too many tokens.
    """
    max_tokens = _checked_tokens(service, body.max_tokens or _DEFAULT_TOKENS)
    given = body.prompts()
    _check_count(service, body, len(given))  # before the work of splitting them into tokens
    prompts = [service.engine.tokenize(item, as_prompt=True) if isinstance(item, str) else item for item in given]
    return _requests(service, body, adapters, prompts, max_tokens, body.logprobs)


def chat_requests(service: Service, body: ChatBody, adapters: AdapterSet) -> list[Request]:
    """Return one request for each of the ``n`` answers.

    Raises:
        Failure: if there are too many requests, or they ask for too many tokens.
    """
    tokens = service.engine.render_chat([message.for_template() for message in body.messages])
    requested = body.max_completion_tokens or body.max_tokens
    max_tokens = _checked_tokens(service, requested) if requested else service.settings.max_tokens
    return _requests(service, body, adapters, [tokens], max_tokens, (body.top_logprobs or 0) if body.logprobs else None)


def _checked_tokens(service: Service, requested: int) -> int:
    limit = service.settings.max_tokens
    if requested > limit:
        raise Failure(
            400, f"max_tokens is {requested}, but this server's limit is {limit}", "too_many_tokens", "max_tokens"
        )
    return requested


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
    sampling = _sampling(body)
    return [
        Request(
            tokens=tokens,
            adapters=adapters,
            max_tokens=max_tokens,
            sampling=sampling if sampling.seed is None else replace(sampling, seed=(sampling.seed + number) % 2**63),
            stop=tuple(body.stop or ()),
            logprobs=logprobs,
            timeout=service.settings.timeout,
        )
        for tokens in prompts
        for number in range(body.n or 1)
    ]


def _sampling(body: GenerationBody) -> Sampling:
    """Return the sampling parameters of a body, with the engine's defaults for those that it leaves out."""
    names = ("temperature", "top_p", "min_p", "seed", "repeat_penalty", "frequency_penalty", "presence_penalty")
    given = {name: value for name in names if (value := getattr(body, name)) is not None}
    if body.top_k is not None:
        given["top_k"] = max(body.top_k, 0)
    return Sampling(**given, logit_bias=body.logit_bias or {})
