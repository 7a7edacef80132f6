"""Answers in OpenAI's form, whole and in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from gguflora.engine import Generation, Piece, TokenLogprob


class Form(Protocol):
    """How one kind of answer is written."""

    prefix: str
    whole: str
    chunk: str

    def choice(self, text: str) -> dict[str, Any]:
        """What a whole choice says."""

    def delta(self, text: str) -> dict[str, Any]:
        """What a chunk of it says."""

    def opening(self) -> dict[str, Any] | None:
        """What a choice's first chunk says, before there is any text."""

    def logprobs(self, tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
        """Log probabilities of tokens that begin at this character of the answer."""


class TextForm:
    """/v1/completions."""

    prefix = "cmpl"
    whole = chunk = "text_completion"

    def choice(self, text: str) -> dict[str, Any]:
        """What a whole choice says."""
        return {"text": text}

    def delta(self, text: str) -> dict[str, Any]:
        """What a chunk of it says."""
        return {"text": text}

    def opening(self) -> None:
        """Nothing."""

    def logprobs(self, tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
        """OpenAI's lists; offsets count characters of the answer."""
        texts = [_text(token.text) for token in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{_text(text): logprob for _, text, logprob in token.top} for token in tokens],
            "text_offset": [offset + sum(map(len, texts[:number])) for number in range(len(texts))],
        }


class ChatForm:
    """/v1/chat/completions."""

    prefix = "chatcmpl"
    whole = "chat.completion"
    chunk = "chat.completion.chunk"

    def choice(self, text: str) -> dict[str, Any]:
        """What a whole choice says."""
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text: str) -> dict[str, Any]:
        """What a chunk of it says."""
        return {"delta": {"content": text} if text else {}}

    def opening(self) -> dict[str, Any]:
        """The role."""
        return {"delta": {"role": "assistant", "content": ""}}

    def logprobs(self, tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
        """OpenAI's objects."""
        del offset
        items = [
            _item(token.text, token.logprob)
            | {"top_logprobs": [_item(text, logprob) for _, text, logprob in token.top]}
            for token in tokens
        ]
        return {"content": items, "refusal": None}


def _text(piece: bytes) -> str:
    return piece.decode("utf-8", errors="replace")


def _item(text: bytes, logprob: float) -> dict[str, Any]:
    return {"token": _text(text), "logprob": logprob, "bytes": list(text)}


@dataclass(slots=True)
class Choice:
    """One answer as far as it has come."""

    form: Form
    index: int
    with_logprobs: bool
    text: str = ""
    tokens: list[TokenLogprob] = field(default_factory=list)

    def add(self, piece: Piece) -> dict[str, Any]:
        """Take a piece; the chunk that carries it."""
        offset = len(self.text)
        self.text += piece.text
        self.tokens += piece.logprobs
        return self._chunk(self.form.delta(piece.text), self._logprobs(piece.logprobs, offset))

    def opening(self) -> dict[str, Any] | None:
        """The chunk before the first text, if there is one."""
        said = self.form.opening()
        return None if said is None else self._chunk(said)

    def closing(self, reason: str | None) -> dict[str, Any]:
        """The last chunk."""
        return self._chunk(self.form.delta("")) | {"finish_reason": reason}

    def whole(self, reason: str | None) -> dict[str, Any]:
        """The whole choice."""
        logprobs = self._logprobs(self.tokens, 0)
        return {"index": self.index, **self.form.choice(self.text), "logprobs": logprobs, "finish_reason": reason}

    def _chunk(self, said: dict[str, Any], logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
        return {"index": self.index, **said, "logprobs": logprobs, "finish_reason": None}

    def _logprobs(self, tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any] | None:
        return self.form.logprobs(tokens, offset) if self.with_logprobs else None


def usage(generations: Sequence[Generation], n: int) -> dict[str, Any]:
    """OpenAI's ``usage`` of ended generations, ``n`` for each prompt, which counts once."""
    prompt = sum(generation.usage.prompt_tokens for generation in generations[::n])
    completion = sum(generation.usage.completion_tokens for generation in generations)
    reused = sum(generation.usage.reused_tokens for generation in generations[::n])
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": reused},
    }


def tokens_per_second(generation: Generation) -> float:
    """After the first token, which belongs to the prompt's evaluation; 0 if there was no other."""
    rest, seconds = generation.usage.completion_tokens - 1, generation.timings.decode
    return rest / seconds if rest > 0 and seconds > 0 else 0.0


def timings(generations: Sequence[Generation]) -> dict[str, Any]:
    """llama-server's ``timings``, of an answer that is alone."""
    if len(generations) != 1:
        return {}
    (generation,) = generations
    used, seconds = generation.usage, generation.timings
    evaluated = used.prompt_tokens - used.reused_tokens
    return {
        "timings": {
            "cache_n": used.reused_tokens,
            "queue_ms": seconds.queue * 1e3,
            "prompt_n": evaluated,
            "prompt_ms": seconds.prefill * 1e3,
            "prompt_per_second": evaluated / seconds.prefill if seconds.prefill else 0.0,
            "predicted_n": used.completion_tokens,
            "predicted_ms": seconds.decode * 1e3,
            "predicted_per_second": tokens_per_second(generation),
        }
    }
