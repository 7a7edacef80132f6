"""From a request's body to requests for the engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from gguflora.engine import AdapterSet, Request, Sampling
from gguflora.server.errors import Failure
from gguflora.server.schemas import ChatBody, CompletionBody, GenerationBody
from gguflora.server.service import Service

_DEFAULT_TOKENS: Final = 16
"""OpenAI's, for completions."""


def text_requests(service: Service, body: CompletionBody, adapters: AdapterSet) -> list[Request]:
    """One request for each prompt and each of its ``n`` answers.

    Raises:
        Failure: if they are too many, or ask for too many tokens.
    """
    max_tokens = _checked_tokens(service, body.max_tokens or _DEFAULT_TOKENS)
    prompts = [service.engine.tokenize(item) if isinstance(item, str) else item for item in body.prompts()]
    return _requests(service, body, adapters, prompts, max_tokens, body.logprobs)


def chat_requests(service: Service, body: ChatBody, adapters: AdapterSet) -> list[Request]:
    """One request for each of the ``n`` answers.

    Raises:
        Failure: if they are too many, or ask for too many tokens.
    """
    tokens = service.engine.render_chat([message.for_template() for message in body.messages])
    asked = body.max_completion_tokens or body.max_tokens
    max_tokens = _checked_tokens(service, asked) if asked else service.settings.max_tokens
    return _requests(service, body, adapters, [tokens], max_tokens, (body.top_logprobs or 0) if body.logprobs else None)


def _checked_tokens(service: Service, asked: int) -> int:
    limit = service.settings.max_tokens
    if asked > limit:
        raise Failure(
            400, f"max_tokens is {asked}, but this server's limit is {limit}", "too_many_tokens", "max_tokens"
        )
    return asked


def _requests(
    service: Service,
    body: GenerationBody,
    adapters: AdapterSet,
    prompts: list[list[int]],
    max_tokens: int,
    logprobs: int | None,
) -> list[Request]:
    n, limit = body.n or 1, service.settings.max_answers
    if not 0 < len(prompts) * n <= limit:
        message = f"{len(prompts)} prompts with {n} answers each: this server gives 1 to {limit} answers to a request"
        raise Failure(400, message, "too_many_answers", "n")
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
        for number in range(n)
    ]


def _sampling(body: GenerationBody) -> Sampling:
    """The engine's own defaults for what the body leaves out."""
    names = ("temperature", "top_p", "min_p", "seed", "repeat_penalty", "frequency_penalty", "presence_penalty")
    given = {name: value for name in names if (value := getattr(body, name)) is not None}
    if body.top_k is not None:
        given["top_k"] = max(body.top_k, 0)
    return Sampling(**given, logit_bias=body.logit_bias or {})
