"""Answers in OpenAI's format, whole or in chunks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from gguflora.engine import Generation, Piece, TokenLogprob
from gguflora.server.replies import Reply


class Form(Protocol):
    """The format of one kind of answer.

    Attributes:
        prefix: beginning of an answer's id.
        whole: ``object`` of a whole answer.
        chunk: ``object`` of a chunk.
    """

    prefix: str
    whole: str
    chunk: str

    def choice(self, text: str) -> dict[str, Any]:
        """Return the text fields of a whole choice."""

    def delta(self, text: str) -> dict[str, Any]:
        """Return the text fields of a chunk."""

    def opening(self) -> dict[str, Any] | None:
        """Return the fields of a choice's first chunk, before any text; None if there is no such chunk."""

    def logprobs(self, tokens: Sequence[TokenLogprob], offsets: Sequence[int]) -> dict[str, Any]:
        """Return the log probabilities of tokens that begin at these characters of the answer."""


class TextForm:
    """The format of /v1/completions."""

    prefix = "cmpl"
    whole = chunk = "text_completion"

    def choice(self, text: str) -> dict[str, Any]:
        """Return the text."""
        return {"text": text}

    def delta(self, text: str) -> dict[str, Any]:
        """Return the text."""
        return {"text": text}

    def opening(self) -> None:
        """Return None: there is no opening chunk."""

    def logprobs(self, tokens: Sequence[TokenLogprob], offsets: Sequence[int]) -> dict[str, Any]:
        """Return OpenAI's lists; offsets count characters of the answer."""
        return {
            "tokens": [_name(token.text) for token in tokens],
            "token_logprobs": [None if math.isnan(token.logprob) else token.logprob for token in tokens],
            "top_logprobs": [None if math.isnan(token.logprob) else _by_name(token) for token in tokens],
            "text_offset": list(offsets),
        }


class ChatForm:
    """The format of /v1/chat/completions."""

    prefix = "chatcmpl"
    whole = "chat.completion"
    chunk = "chat.completion.chunk"

    def choice(self, text: str) -> dict[str, Any]:
        """Return the assistant's message."""
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text: str) -> dict[str, Any]:
        """Return a part of the assistant's message."""
        return {"delta": {"content": text} if text else {}}

    def opening(self) -> dict[str, Any]:
        """Return the role."""
        return {"delta": {"role": "assistant", "content": ""}}

    def logprobs(self, tokens: Sequence[TokenLogprob], offsets: Sequence[int]) -> dict[str, Any]:
        """Return OpenAI's objects; chats have no offsets."""
        del offsets
        items = [
            _item(token.text, token.logprob)
            | {"top_logprobs": [_item(text, logprob) for _, text, logprob in token.top]}
            for token in tokens
        ]
        return {"content": items, "refusal": None}


def _text(piece: bytes) -> str:
    return piece.decode("utf-8", errors="replace")


def _name(piece: bytes) -> str:
    """Return a token's text; one that is no whole text is spelled as OpenAI does, so that none equals another."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def _by_name(token: TokenLogprob) -> dict[str, float]:
    """Return the most likely tokens and the chosen one; a second token of the same text is named by its number."""
    named = {_name(token.text): token.logprob}
    for number, piece, logprob in token.top:
        if number != token.token:
            name = _name(piece)
            named[f"token_id:{number}" if name in named else name] = logprob
    return dict(sorted(named.items(), key=lambda item: -item[1]))


def _item(text: bytes, logprob: float) -> dict[str, Any]:
    return {"token": _text(text), "logprob": logprob, "bytes": list(text)}


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt that is returned before its answer.

    Attributes:
        text: the prompt.
        first: bytes of its first token, which has no log probability.
    """

    text: str
    first: bytes


@dataclass(slots=True)
class _Place:
    """Where the next token begins in a text.

    Attributes:
        chars: number of whole characters before it.
        n_bytes: number of bytes of a character that has begun.
    """

    chars: int = 0
    n_bytes: int = 0

    def pass_token(self, token: bytes, text: str) -> int:
        """Return the place and go behind the token, unless its bytes are not here, as those of control tokens."""
        start = self.chars
        rest = text[start : start + len(token) + 1].encode(errors="surrogatepass")[: self.n_bytes + len(token)]
        if rest[self.n_bytes :] == token:
            whole = rest.decode(errors="ignore")
            self.chars += len(whole)
            self.n_bytes = len(rest) - len(whole.encode())
        return start


@dataclass(slots=True)
class Choice:
    """One answer, as far as it has arrived.

    Attributes:
        form: the format.
        index: number of the answer in the response.
        with_logprobs: whether to report log probabilities.
        echo: the prompt to return before the answer.
        text: the text so far.
        tokens: log probabilities of the tokens so far.
    """

    form: Form
    index: int
    with_logprobs: bool
    echo: Echo | None = None
    text: str = ""
    tokens: list[TokenLogprob] = field(default_factory=list)
    _offsets: list[int] = field(default_factory=list)
    _place: _Place = field(default_factory=_Place)

    def __post_init__(self) -> None:
        """Begin with the prompt."""
        if self.echo is not None:
            self.text = self.echo.text
            if self.with_logprobs:
                self._note([TokenLogprob(-1, self.echo.first, math.nan)])

    def add(self, piece: Piece) -> dict[str, Any]:
        """Add a piece and return the chunk that carries it."""
        self.text += piece.text
        start = len(self.tokens)
        self._note([*(piece.prompt or ()), *piece.logprobs])
        return self._chunk(self.form.delta(piece.text), self._logprobs(start))

    def opening(self) -> dict[str, Any] | None:
        """Return the chunk before the first text, if there is one."""
        if self.echo is not None:
            return self._chunk(self.form.delta(self.echo.text), self._logprobs(0))
        fields = self.form.opening()
        return None if fields is None else self._chunk(fields)

    def closing(self, reason: str | None) -> dict[str, Any]:
        """Return the last chunk."""
        return self._chunk(self.form.delta("")) | {"finish_reason": reason}

    def whole(self, reason: str | None) -> dict[str, Any]:
        """Return the whole choice."""
        return {
            "index": self.index,
            **self.form.choice(self.text),
            "logprobs": self._logprobs(0),
            "finish_reason": reason,
        }

    def _chunk(self, fields: dict[str, Any], logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
        return {"index": self.index, **fields, "logprobs": logprobs, "finish_reason": None}

    def _note(self, tokens: Sequence[TokenLogprob]) -> None:
        self.tokens += tokens
        self._offsets += [self._place.pass_token(token.text, self.text) for token in tokens]

    def _logprobs(self, start: int) -> dict[str, Any] | None:
        """Return the log probabilities of the tokens from ``start`` on."""
        if not self.with_logprobs:
            return None
        return self.form.logprobs(self.tokens[start:], self._offsets[start:])


@dataclass(slots=True)
class ChatChoice(Choice):
    """An answer of a chat, which is read for reasoning and tool calls.

    Attributes:
        reply: its reader.
    """

    reply: Reply = field(default_factory=Reply)

    def add(self, piece: Piece) -> dict[str, Any]:
        """Add a piece and return the chunk that carries it."""
        start = len(self.tokens)
        self._note(piece.logprobs)
        return self._chunk({"delta": self.reply.push(piece.text)}, self._logprobs(start))

    def closing(self, reason: str | None) -> dict[str, Any]:
        """Return the last chunk, with what was held back."""
        delta = self.reply.push("", last=True)
        return self._chunk({"delta": delta}) | {"finish_reason": self._reason(reason)}

    def whole(self, reason: str | None) -> dict[str, Any]:
        """Return the whole choice."""
        self.reply.push("", last=True)
        fields = {"message": self.reply.message(), "logprobs": self._logprobs(0)}
        return {"index": self.index, **fields, "finish_reason": self._reason(reason)}

    def _reason(self, reason: str | None) -> str | None:
        called = "function_call" if self.reply.is_legacy else "tool_calls"
        return called if self.reply.calls and reason == "stop" else reason


def usage(generations: Sequence[Generation], n: int) -> dict[str, Any]:
    """Return OpenAI's ``usage`` of ended generations.

    Args:
        generations: the generations of a request, ``n`` for each prompt in turn.
        n: number of answers to each prompt; a prompt's tokens count once.
    """
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
    """Return the speed of a generation after its first token, which counts as prompt evaluation; 0 without others."""
    rest, seconds = generation.usage.completion_tokens - 1, generation.timings.decode
    return rest / seconds if rest > 0 and seconds > 0 else 0.0


def timings(generations: Sequence[Generation]) -> dict[str, Any]:
    """Return llama-server's ``timings`` and ``stopping_word``, or nothing if a request has several answers."""
    if len(generations) != 1:
        return {}
    (generation,) = generations
    tokens, seconds = generation.usage, generation.timings
    evaluated = tokens.prompt_tokens - tokens.reused_tokens
    return {
        "timings": {
            "cache_n": tokens.reused_tokens,
            "queue_ms": seconds.queue * 1e3,
            "prompt_n": evaluated,
            "prompt_ms": seconds.prefill * 1e3,
            "prompt_per_second": evaluated / seconds.prefill if seconds.prefill else 0.0,
            "predicted_n": tokens.completion_tokens,
            "predicted_ms": seconds.decode * 1e3,
            "predicted_per_second": tokens_per_second(generation),
        },
        **({} if generation.stop_text is None else {"stopping_word": generation.stop_text}),
    }
