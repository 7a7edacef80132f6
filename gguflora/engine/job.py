"""A request under way: its tokens, where it stands, and what it has given out."""

from __future__ import annotations

import time

from gguflora.engine.context import Chunk, Context, Sequence_
from gguflora.engine.model import Model
from gguflora.engine.requests import Ending, FinishReason, Piece, Request, Sink, Timings, TokenLogprob, Usage
from gguflora.engine.residents import ResidentSet
from gguflora.engine.sampler import Sampler, token_logprob
from gguflora.engine.text import AnswerText
from gguflora.errors import EngineError


class Job:
    """One request of the scheduler.

    Attributes:
        adapters: its set, resolved.
        tokens: the prompt and what was generated.
        sequence: where it is computed; None while it waits.
    """

    def __init__(self, request: Request, adapters: ResidentSet, sink: Sink, model: Model, n_ctx: int) -> None:
        self.request = request
        self.adapters = adapters
        self.tokens: list[int] = [int(token) for token in request.tokens]
        self.sequence: Sequence_ | None = None
        self.n_prompt = len(self.tokens)
        self._last = min(self.n_prompt + request.max_tokens, n_ctx)  # tokens at most
        self._sink = sink
        self._model = model
        self._sampler = Sampler(request.sampling, model.n_vocab, [int(token) for token in request.tokens])
        self._text = AnswerText(request.stop)
        self._reused: int | None = None
        self._submitted = time.monotonic()
        self._started = self._first = 0.0
        self.ended = False

    @property
    def begun(self) -> bool:
        """Whether it has ever run."""
        return self._reused is not None

    @property
    def remaining(self) -> int:
        """Tokens that are still to be decoded before the next one can be chosen."""
        return len(self.tokens) - (0 if self.sequence is None else len(self.sequence.held))

    @property
    def interruption(self) -> FinishReason | None:
        """Why it must end now, whatever it has; None if it may go on."""
        if self._sink.cancelled.is_set():
            return "cancelled"
        timeout = self.request.timeout
        if timeout is not None and time.monotonic() - self._submitted >= timeout:
            return "timeout"
        return None

    def start(self, sequence: Sequence_) -> None:
        """Go on in ``sequence``."""
        self.sequence = sequence
        if self._reused is None:
            self._reused = len(sequence.held)
            self._started = time.monotonic()

    def chunk(self, most: int) -> Chunk:
        """What to decode next, at most so many tokens."""
        assert self.sequence is not None
        first = len(self.sequence.held)
        tokens = self.tokens[first : first + most]
        return Chunk(self.sequence, tokens, wants_logits=first + len(tokens) == len(self.tokens))

    def advance(self, context: Context, index: int) -> FinishReason | None:
        """Choose the next token by the logits at ``index``; why the request ends with it, or None.

        Raises:
            GenerationError: if the logits are not finite.
        """
        logits = context.logits(index)
        if self._first == 0:
            self._first = time.monotonic()
        if len(self.tokens) >= self._last:
            return "length"
        token = self._sampler.sample(context.pointer, index)
        wanted = self.request.logprobs
        logprob = None if wanted is None else token_logprob(logits, token, wanted, self._model.piece)
        self.tokens.append(token)
        if self._model.is_end(token):
            return "stop"
        self._give(token, logprob)
        if self._text.stopped:
            return "stop"
        return "length" if len(self.tokens) >= self._last else None

    def _give(self, token: int, logprob: TokenLogprob | None) -> None:
        self._send(self._text.push(token, self._model.piece(token), logprob))

    def _send(self, piece: Piece) -> None:
        if piece.text or piece.tokens:
            self._sink.arrived.put(piece)

    def end(self, reason: FinishReason, error: EngineError | None = None) -> None:
        """Tell the caller that nothing more comes. Idempotent."""
        if self.ended:
            return
        self.ended = True
        self._send(self._text.finish())
        self._sampler.close()
        self._sink.arrived.put(Ending(reason, self.usage, self._timings(), error))

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(self.n_prompt, len(self.tokens) - self.n_prompt, self._reused or 0)

    def _timings(self) -> Timings:
        now = time.monotonic()
        started, first = self._started or now, self._first or now
        return Timings(
            queue=started - self._submitted, prefill=first - started, decode=now - first, ttft=first - self._submitted
        )
