"""Requests to the engine, and the answers that it returns."""

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
from gguflora.engine.thoughts import ThoughtLimit
from gguflora.errors import EngineError, RequestError

FinishReason: TypeAlias = Literal["stop", "length", "cancelled", "timeout", "error"]

MAX_LOGPROBS: Final = 100
_RANDOM_SEEDS: Final = frozenset({-1, 2**32 - 1})
"""-1, and llama.cpp's ``LLAMA_DEFAULT_SEED``."""

_MAX_PENALTY: Final = 1000.0
_MAX_GRAMMAR: Final = 1 << 18
_MAX_BREAKERS: Final = 32
_MAX_BREAKER_CHARS: Final = 40
_RANGES: Final[tuple[tuple[str, float, float], ...]] = (
    ("typical_p", 0, 1),
    ("top_n_sigma", -1, 1000),
    ("xtc_probability", 0, 1),
    ("xtc_threshold", 0, 1),
    ("dynatemp_range", 0, 100),
    ("dynatemp_exponent", 0, 100),
    ("mirostat_tau", 0, 100),
    ("mirostat_eta", 0, 10),
    ("dry_multiplier", 0, 1000),
    ("dry_base", 1, 1000),
)
_WHOLE_RANGES: Final = (
    ("repeat_last_n", -1, 1 << 16),
    ("mirostat", 0, 2),
    ("dry_allowed_length", 0, 1 << 16),
    ("dry_penalty_last_n", -1, 1 << 16),
    ("min_tokens", 0, 2**31 - 1),
)


@dataclass(frozen=True, slots=True)
class Grammar:
    """A grammar that an answer must follow.

    Attributes:
        text: the rules.
        triggers: regular expressions over the answer so far; the grammar begins where the first group of one of them
            matches, and the text before is free. Empty: the grammar holds from the first token on.
        kind: "gbnf", llama.cpp's own grammars, whose rule ``root`` is the whole answer; or "llguidance", a grammar in
            Lark's syntax with the rule ``start``, or what ``llguidance.LLMatcher.grammar_from_json_schema`` returns.
    """

    text: str
    triggers: tuple[str, ...] = ()
    kind: Literal["gbnf", "llguidance"] = "gbnf"


@dataclass(frozen=True, slots=True)
class Sampling:
    """Parameters for sampling the next token, as in llama.cpp.

    Attributes:
        temperature: divisor of the logits, at least 0; 0 always takes the most likely token.
        top_p: keep the most likely tokens whose probabilities sum to this; 1 keeps all.
        top_k: keep this number of most likely tokens; 0 keeps all.
        min_p: keep tokens whose probability is at least this share of the highest one; 0 keeps all.
        seed: seed of the random numbers; None, -1 or 4294967295 for a random seed.
        repeat_penalty: weakens the logits of tokens that occur among the last ``repeat_last_n``; 1 changes nothing.
        frequency_penalty: subtracted from a token's logit for each occurrence among the last ``repeat_last_n`` tokens.
        presence_penalty: subtracted once from the logit of a token that occurs among them.
        logit_bias: number to add to the logit of a token, by token.
        repeat_last_n: number of tokens that the three penalties look at; 0 switches them off, -1 looks at all.
        typical_p: keep locally typical tokens whose probabilities sum to this; 1 keeps all.
        top_n_sigma: keep tokens within this number of standard deviations of the highest logit; 0 or less keeps all.
        xtc_probability: chance to remove all but the least likely of the tokens above ``xtc_threshold``; 0 never does.
        xtc_threshold: probability above which XTC may remove a token.
        dynatemp_range: the temperature varies by this with the entropy, up and down; 0 keeps it fixed.
        dynatemp_exponent: how the entropy maps to the temperature.
        mirostat: 0, or the version of mirostat (1 or 2) that replaces the other filters.
        mirostat_tau: mirostat's target entropy.
        mirostat_eta: mirostat's learning rate.
        dry_multiplier: strength of the DRY penalty of repeated sequences; 0 switches it off.
        dry_base: base of the DRY penalty, which grows with the length of the repetition.
        dry_allowed_length: length of repetitions that DRY does not penalize.
        dry_penalty_last_n: number of tokens that DRY looks at; 0 switches it off, -1 looks at all.
        dry_sequence_breakers: texts at which a repetition ends for DRY.
        min_tokens: number of tokens before which the answer does not end by itself.
        ignore_eos: never end the answer by itself.
        stop_token_ids: further tokens that end the answer; they are not part of it.
        grammar: what the answer must look like.
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
    repeat_last_n: int = 64
    typical_p: float = 1.0
    top_n_sigma: float = -1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    grammar: Grammar | None = None

    @property
    def has_random_seed(self) -> bool:
        """Whether each request gets a seed of its own."""
        return self.seed is None or self.seed in _RANDOM_SEEDS

    def check(self, n_vocab: int) -> None:
        """Check that llama.cpp's samplers accept these parameters.

        Raises:
            RequestError: if a parameter is out of range; the message names it.
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
        self._check_filters()
        for token in self.stop_token_ids:
            _check_whole("stop_token_ids", token, 0, n_vocab - 1)
        if self.grammar is not None and (len(self.grammar.text) > _MAX_GRAMMAR or "\0" in self.grammar.text):
            raise RequestError(f"grammar is longer than {_MAX_GRAMMAR} characters, or has a NUL character")
        for token, bias in self.logit_bias.items():
            _check_whole("token of logit_bias", token, 0, n_vocab - 1)
            _check_number("logit_bias", bias, -math.inf, math.inf)

    def _check_filters(self) -> None:
        for name, low, high in _RANGES:
            _check_number(name, getattr(self, name), low, high)
        for name, low, high in _WHOLE_RANGES:
            _check_whole(name, getattr(self, name), low, high)
        breakers = self.dry_sequence_breakers
        if len(breakers) > _MAX_BREAKERS or not all(0 < len(text) <= _MAX_BREAKER_CHARS for text in breakers):
            raise RequestError(
                f"dry_sequence_breakers has {len(breakers)} texts, expected up to {_MAX_BREAKERS} of 1 to "
                f"{_MAX_BREAKER_CHARS} characters"
            )


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One prompt to continue.

    Attributes:
        tokens: the prompt.
        adapters: names and scales of the adapter set, from `Engine.adapter_set`.
        max_tokens: largest number of tokens to generate; 0 only evaluates the prompt.
        sampling: sampling parameters.
        stop: texts that end the answer; they are not part of it.
        logprobs: number of most likely tokens to report at each generated token; None reports no log probabilities.
        spelled_tokens: control tokens whose spelling is part of the answer; others have no text.
        prompt_logprobs: whether to report the log probabilities of the prompt's tokens, too; needs ``logprobs``.
        timeout: seconds after which the request ends, from `Engine.submit` on; waiting counts.
        prefix: embeddings (n, n_embd) to decode before the tokens.
        cache_owner: KV cells are shared only by requests of one owner.
        thoughts: how long the thoughts before the answer may be; None sets no limit.
    """

    tokens: Sequence[int]
    adapters: AdapterSet = ()
    max_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: bool = False
    spelled_tokens: frozenset[int] = frozenset()
    timeout: float | None = None
    prefix: NDArray[np.float32] | None = None
    cache_owner: str = ""
    thoughts: ThoughtLimit | None = None

    def check(self, n_vocab: int) -> None:
        """Check the request for a model with ``n_vocab`` tokens in its vocabulary.

        Raises:
            RequestError: if a parameter is out of range; the message names it.
        """
        if not len(self.tokens):
            raise RequestError("the prompt has no tokens; give at least one")
        check_tokens(self.tokens, n_vocab)
        _check_whole("max_tokens", self.max_tokens, 0, 2**31 - 1)
        if self.logprobs is not None:
            _check_whole("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        elif self.prompt_logprobs:
            raise RequestError("prompt_logprobs needs logprobs, the number of most likely tokens to report, 0 or more")
        if self.thoughts is not None:
            _check_whole("tokens of thoughts", self.thoughts.tokens, 0, 2**31 - 1)
            check_tokens(self.thoughts.ending, n_vocab)
        if self.timeout is not None:
            _check_number("timeout", self.timeout, 0, math.inf)
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise RequestError(f"stop is {self.stop!r:.80}, expected non-empty texts")
        self.sampling.check(n_vocab)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and its log probability (natural logarithm), before temperature and penalties.

    Attributes:
        token: the token.
        text: bytes of the token; the spelling of a control token, which is no part of the answer.
        logprob: its log probability.
        top: (token, bytes, log probability) of the most likely tokens at its position, best first.
    """

    token: int
    text: bytes
    logprob: float
    top: tuple[tuple[int, bytes, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer.

    Attributes:
        text: whole characters.
        tokens: the tokens that end in this part.
        logprobs: log probabilities of these tokens, if the request asks for them.
        prompt: log probabilities of all tokens of the prompt but the first, in one piece before the answer, if the
            request asks for them.
    """

    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request.

    Attributes:
        prompt_tokens: number of prompt tokens.
        completion_tokens: number of generated tokens.
        reused_tokens: number of prompt tokens that an earlier request had evaluated.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    reused_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Durations of one request in seconds.

    Attributes:
        queue: waiting to start.
        prefill: evaluating the prompt.
        decode: generating, after the first token.
        ttft: from `Engine.submit` to the first token.
    """

    queue: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    ttft: float = 0.0


@dataclass(frozen=True, slots=True)
class Ending:
    """The end of a request.

    Attributes:
        reason: why it ended.
        usage: its token counts.
        timings: its durations.
        error: the error, if the reason is "error".
        stop_text: the stop text, if one ended it.
    """

    reason: FinishReason
    usage: Usage
    timings: Timings
    error: EngineError | None = None
    stop_text: str | None = None


class Generation:
    """The answer to one request, as an iterator of `Piece`. Not thread-safe.

    The request is cancelled when this object is garbage-collected.

    Args:
        notify: called in the engine's thread when something arrives, with True if it is the end. It must be quick and
            must not raise. While it refers to this object, the object is not garbage-collected.
        prompt_tokens: number of prompt tokens.

    Attributes:
        prompt_tokens: number of prompt tokens, which is known before the end.
    """

    def __init__(self, notify: Callable[[bool], None] | None = None, prompt_tokens: int = 0) -> None:
        self.prompt_tokens = prompt_tokens
        self._arrived: queue.SimpleQueue[Piece | Ending] = queue.SimpleQueue()
        self._notify = notify
        self._cancelled = threading.Event()
        self._ending: Ending | None = None

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        """Wait for the next piece and return it.

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
        """Return the pieces that have arrived since the last call, without waiting.

        This method does not raise: after the end, see `finish_reason` and `error`.
        """
        pieces: list[Piece] = []
        while self._ending is None and not self._arrived.empty():
            arrived = self._arrived.get()
            if isinstance(arrived, Piece):
                pieces.append(arrived)
            else:
                self._ending = arrived
        return pieces

    def text(self) -> str:
        """Wait for the end and return the rest of the answer."""
        return "".join(piece.text for piece in self)

    def cancel(self) -> None:
        """End the request at the next token; the iterator then ends. Idempotent, and callable from any thread."""
        self._cancelled.set()

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the request ended: "stop" (end of text or a stop text), "length", "cancelled", "timeout" or "error".

        None if it has not ended.
        """
        return None if self._ending is None else self._ending.reason

    @property
    def error(self) -> EngineError | None:
        """The error, if the request ended with "error"."""
        return None if self._ending is None else self._ending.error

    @property
    def stop_text(self) -> str | None:
        """The stop text that ended the answer; None before the end, or if none did."""
        return None if self._ending is None else self._ending.stop_text

    @property
    def usage(self) -> Usage:
        """Token counts; all 0 before the end."""
        return Usage() if self._ending is None else self._ending.usage

    @property
    def timings(self) -> Timings:
        """Durations; all 0 before the end."""
        return Timings() if self._ending is None else self._ending.timings

    def __del__(self) -> None:
        self._cancelled.set()


@dataclass(frozen=True, slots=True)
class GenerationSink:
    """The scheduler's end of a `Generation`. It does not keep the `Generation` alive.

    Attributes:
        cancelled: set when the caller cancels the request.
    """

    _arrived: queue.SimpleQueue[Piece | Ending]
    _notify: Callable[[bool], None] | None
    cancelled: threading.Event

    @classmethod
    def from_generation(cls, generation: Generation) -> GenerationSink:
        """Make the sink that feeds ``generation``."""
        return cls(generation._arrived, generation._notify, generation._cancelled)

    def put(self, item: Piece | Ending) -> None:
        """Pass a piece or the end to the caller."""
        self._arrived.put(item)
        if self._notify is not None:
            self._notify(isinstance(item, Ending))


def check_tokens(tokens: Sequence[int], n_vocab: int) -> None:
    """Check that a vocabulary of ``n_vocab`` tokens has these.

    Raises:
        RequestError: if it has not.
    """
    for token in tokens:
        _check_whole("token of the prompt", token, 0, n_vocab - 1)


def _check_number(name: str, value: float, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise RequestError(f"{name} is {value!r:.80}, expected a number from {low:g} to {high:g}")


def _check_whole(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{name} is {value!r:.80}, expected a whole number from {low} to {high}")
