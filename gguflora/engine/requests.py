"""What a caller asks of the engine, and what it gets back."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gguflora.engine.adapter_sets import AdapterSet
from gguflora.errors import EngineError, RequestError

FinishReason: TypeAlias = Literal["stop", "length", "cancelled", "timeout", "error"]

MAX_LOGPROBS: Final = 100
_MAX_PENALTY: Final = 1000.0


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. Temperature 0 takes the most likely one.

    Attributes:
        temperature: divides the logits, at least 0.
        top_p: keep the most likely tokens of this total probability; 1 keeps all.
        top_k: keep this many tokens; 0 keeps all.
        min_p: keep tokens at least this likely relative to the most likely one; 0 keeps all.
        seed: of the random numbers; None takes one that nobody knows.
        repeat_penalty: divides the logits of the last 64 tokens' members; 1 leaves them.
        frequency_penalty: subtracted for each time a token occurs among the last 64.
        presence_penalty: subtracted once from tokens among the last 64.
        logit_bias: added to the logit of a token.
    """

    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 40
    min_p: float = 0.05
    seed: int | None = None
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def check(self, n_vocab: int) -> None:
        """Raise unless llama.cpp's samplers can work with these numbers.

        Raises:
            RequestError: naming the parameter.
        """
        _check_number("temperature", self.temperature, 0, 100)
        _check_number("top_p", self.top_p, 0, 1)
        _check_number("min_p", self.min_p, 0, 1)
        _check_number("frequency_penalty", self.frequency_penalty, -_MAX_PENALTY, _MAX_PENALTY)
        _check_number("presence_penalty", self.presence_penalty, -_MAX_PENALTY, _MAX_PENALTY)
        _check_number("repeat_penalty", self.repeat_penalty, 1 / _MAX_PENALTY, _MAX_PENALTY)
        _check_whole("top_k", self.top_k, 0, 2**31 - 1)
        if self.seed is not None:
            _check_whole("seed", self.seed, -(2**63), 2**64 - 1)
        for token, bias in self.logit_bias.items():
            _check_whole("token of logit_bias", token, 0, n_vocab - 1)
            _check_number("logit_bias", bias, -math.inf, math.inf)


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One text to continue.

    Attributes:
        tokens: the prompt.
        adapters: from `Engine.adapter_set`; names and scales.
        max_tokens: how many tokens to generate at most; 0 only evaluates the prompt.
        stop: texts that end the answer and are not part of it.
        logprobs: how many of the most likely tokens to report beside each generated one; None reports nothing.
        timeout: seconds from `Engine.submit` on, waiting included.
        prefix: embeddings (n, n_embd) decoded before the tokens.
    """

    tokens: Sequence[int]
    adapters: AdapterSet = ()
    max_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    timeout: float | None = None
    prefix: NDArray[np.float32] | None = None

    def check(self, n_vocab: int) -> None:
        """Raise unless the model can work on this.

        Raises:
            RequestError: naming the parameter.
        """
        if not len(self.tokens):
            raise RequestError("the prompt has no tokens; give at least one")
        for token in self.tokens:
            _check_whole("token of the prompt", token, 0, n_vocab - 1)
        _check_whole("max_tokens", self.max_tokens, 0, 2**31 - 1)
        if self.logprobs is not None:
            _check_whole("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.timeout is not None:
            _check_number("timeout", self.timeout, 0, math.inf)
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise RequestError(f"stop is {self.stop!r:.80}, expected non-empty texts")
        self.sampling.check(n_vocab)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A generated token's natural logarithm of its probability, before temperature and the like.

    Attributes:
        top: the most likely tokens in its place, best first.
    """

    token: int
    text: bytes
    logprob: float
    top: tuple[tuple[int, bytes, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of the answer: whole characters, and the tokens that end in it."""

    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request; of the prompt's, `reused_tokens` were evaluated by an earlier one."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    reused_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of one request: waiting, evaluating the prompt, generating; `ttft` from submit to the first token."""

    queue: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    ttft: float = 0.0


@dataclass(frozen=True, slots=True)
class Ending:
    """How a request ended."""

    reason: FinishReason
    usage: Usage
    timings: Timings
    error: EngineError | None = None


class Generation:
    """The answer to one request as it comes: an iterator of `Piece`, for one thread.

    Dropped before its end, it is cancelled.

    Args:
        notify: called in the engine's thread when something has come, with whether it is the end. It must be quick and
            not raise; as long as it refers to this object, dropping does not cancel.
    """

    def __init__(self, notify: Callable[[bool], None] | None = None) -> None:
        self._arrived: queue.SimpleQueue[Piece | Ending] = queue.SimpleQueue()
        self._notify = notify
        self._cancelled = threading.Event()
        self._ending: Ending | None = None

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        """The next piece, waited for.

        Raises:
            GenerationError: if the request failed; then `finish_reason` is "error".
        """
        if self._ending is None:
            arrived = self._arrived.get()
            if isinstance(arrived, Piece):
                return arrived
            self._ending = arrived
            if arrived.error is not None:
                raise arrived.error
        raise StopIteration

    def arrived(self) -> list[Piece]:
        """What has come and was not taken yet, without waiting. After the end `finish_reason` and `error` are set."""
        pieces: list[Piece] = []
        while self._ending is None and not self._arrived.empty():
            arrived = self._arrived.get()
            if isinstance(arrived, Piece):
                pieces.append(arrived)
            else:
                self._ending = arrived
        return pieces

    def text(self) -> str:
        """All that is still to come, waited for."""
        return "".join(piece.text for piece in self)

    def cancel(self) -> None:
        """End the request at the next token. Idempotent, from any thread; the iterator then ends by itself."""
        self._cancelled.set()

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended: "stop" (end of text or a stop text), "length", "cancelled", "timeout", "error"; else None."""
        return None if self._ending is None else self._ending.reason

    @property
    def error(self) -> EngineError | None:
        """Why it failed, if it ended by "error"."""
        return None if self._ending is None else self._ending.error

    @property
    def usage(self) -> Usage:
        """Tokens, once ended."""
        return Usage() if self._ending is None else self._ending.usage

    @property
    def timings(self) -> Timings:
        """Seconds, once ended."""
        return Timings() if self._ending is None else self._ending.timings

    def __del__(self) -> None:
        self._cancelled.set()


@dataclass(frozen=True, slots=True)
class GenerationSink:
    """The scheduler's end of a `Generation`; does not keep it alive."""

    _arrived: queue.SimpleQueue[Piece | Ending]
    _notify: Callable[[bool], None] | None
    cancelled: threading.Event

    @classmethod
    def from_generation(cls, generation: Generation) -> GenerationSink:
        """The other end of ``generation``."""
        return cls(generation._arrived, generation._notify, generation._cancelled)

    def put(self, item: Piece | Ending) -> None:
        """Hand over what comes next."""
        self._arrived.put(item)
        if self._notify is not None:
            self._notify(isinstance(item, Ending))


def _check_number(name: str, value: float, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise RequestError(f"{name} is {value!r:.80}, expected a number from {low:g} to {high:g}")


def _check_whole(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{name} is {value!r:.80}, expected a whole number from {low} to {high}")
