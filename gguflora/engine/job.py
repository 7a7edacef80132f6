"""A request under way: its tokens, where it stands, and what it has given out."""

from __future__ import annotations

import time
from dataclasses import dataclass

from gguflora.engine.answer_text import AnswerText
from gguflora.engine.context import Chunk, Context, Key, SavedSlot, Slot
from gguflora.engine.model import Model
from gguflora.engine.registry import AdapterPhase, Embeddings, ResolvedSet
from gguflora.engine.requests import Ending, FinishReason, GenerationSink, Piece, Request, Timings, TokenLogprob, Usage
from gguflora.engine.sampler import Sampler, token_logprob
from gguflora.errors import EngineError
from gguflora.placement.prefix import Prefix
from gguflora.runtime.alora import starts_of


@dataclass(slots=True)
class TokenPlan:
    """What is decoded at each position of a request: a soft prompt, then tokens, the last perhaps by more adapters.

    Attributes:
        keys: by position; see `Key`.
        tokens: those of them that are tokens.
        starts: positions from which on activated LoRAs compute, too; None for those that never do.
    """

    adapters: ResolvedSet
    keys: list[Key]
    tokens: list[int]
    starts: dict[str, int | None]

    @classmethod
    def from_prompt(cls, adapters: ResolvedSet, prompt: list[int]) -> TokenPlan:
        """The plan of a prompt."""
        n_before = adapters.n_before
        starts = {
            name: None if start is None else n_before + start
            for name, start in starts_of(prompt, adapters.invocations).items()
        }
        plan = cls(adapters, [-1 - row for row in range(n_before)], [], starts)
        for token in prompt:
            plan.append(token)
        return plan

    def append(self, token: int) -> None:
        """A token more."""
        phase = self._phase(len(self.keys))
        self.keys.append(token if phase is self.adapters.base_phase else (token, phase.identity))
        self.tokens.append(token)

    def chunk(self, slot: Slot, most: int) -> Chunk:
        """What ``slot`` lacks, at most so many positions of one kind; keys and values all at once."""
        first, n_before, written = len(slot.held), self.adapters.n_before, self.adapters.keys_and_values
        n_written = written.n_tokens if written else 0
        borders = [n_written, n_before, len(self.keys), *(start for start in self.starts.values() if start)]
        end = min(border for border in borders if border > first)
        inputs: list[int] | Embeddings | Prefix
        if written and first < n_written:
            inputs = written
        elif first < n_before:
            end = min(end, first + most)
            assert self.adapters.embeddings is not None
            inputs = self.adapters.embeddings[first - n_written : end - n_written]
        else:
            end = min(end, first + most)
            inputs = self.tokens[first - n_before : end - n_before]
        return Chunk(slot, self.keys[first:end], inputs, self._phase(first), end == len(self.keys))

    def _phase(self, position: int) -> AdapterPhase:
        started = (name for name, start in self.starts.items() if start is not None and position >= start)
        return self.adapters.phase(frozenset(started))


class GenerationJob:
    """One request of the scheduler.

    Attributes:
        adapters: its set, resolved.
        slot: where it is computed; None while it waits.
        saved: what its slot held when it was suspended.
    """

    def __init__(self, request: Request, adapters: ResolvedSet, sink: GenerationSink, model: Model, n_ctx: int) -> None:
        prompt = [int(token) for token in request.tokens]
        self.request = request
        self.adapters = adapters
        self.slot: Slot | None = None
        self.saved: SavedSlot | None = None
        self._plan = TokenPlan.from_prompt(adapters, prompt)
        self._n_prompt = len(self._plan.keys)
        self._last = min(self._n_prompt + request.max_tokens, n_ctx)  # positions at most
        self._sink = sink
        self._model = model
        self._sampler = Sampler(request.sampling, model.n_vocab, prompt)
        self._text = AnswerText(request.stop)
        self._reused: int | None = None
        self._submitted = time.monotonic()
        self._started = self._first = 0.0
        self.ended = False

    @property
    def started(self) -> bool:
        """Whether it has ever run."""
        return self._reused is not None

    @property
    def keys(self) -> list[Key]:
        """Of all positions so far."""
        return self._plan.keys

    @property
    def remaining(self) -> int:
        """Positions that are still to be decoded before the next token can be chosen."""
        return len(self.keys) - (0 if self.slot is None else len(self.slot.held))

    @property
    def interruption(self) -> FinishReason | None:
        """Why it must end now, whatever it has; None if it may go on."""
        if self._sink.cancelled.is_set():
            return "cancelled"
        timeout = self.request.timeout
        if timeout is not None and time.monotonic() - self._submitted >= timeout:
            return "timeout"
        return None

    def start(self, slot: Slot) -> None:
        """Go on in ``slot``."""
        self.slot, self.saved = slot, None
        if self._reused is None:
            self._reused = len(slot.held)
            self._started = time.monotonic()

    def chunk(self, most: int) -> Chunk:
        """What to decode next, at most so many positions."""
        assert self.slot is not None
        return self._plan.chunk(self.slot, most)

    def advance(self, context: Context, index: int) -> FinishReason | None:
        """Choose the next token by the logits at ``index``; why the request ends with it, or None.

        Raises:
            GenerationError: if the logits are not finite.
        """
        logits = context.logits(index)
        if self._first == 0:
            self._first = time.monotonic()
        if len(self.keys) >= self._last:
            return "length"
        token = self._sampler.sample(context.pointer, index)
        wanted = self.request.logprobs
        logprob = None if wanted is None else token_logprob(logits, token, wanted, self._model.piece)
        self._plan.append(token)
        if self._model.is_end(token):
            return "stop"
        self._give(token, logprob)
        if self._text.stopped:
            return "stop"
        return "length" if len(self.keys) >= self._last else None

    def _give(self, token: int, logprob: TokenLogprob | None) -> None:
        self._send(self._text.push(token, self._model.piece(token), logprob))

    def _send(self, piece: Piece) -> None:
        if piece.text or piece.tokens:
            self._sink.put(piece)

    def end(self, reason: FinishReason, error: EngineError | None = None) -> None:
        """Tell the caller that nothing more comes. Idempotent."""
        if self.ended:
            return
        self.ended = True
        self._send(self._text.finish())
        self._sampler.close()
        self._sink.put(Ending(reason, self.usage, self._timings(), error))

    @property
    def usage(self) -> Usage:
        """Tokens so far; embeddings before the prompt count as its tokens."""
        return Usage(self._n_prompt, len(self.keys) - self._n_prompt, self._reused or 0)

    def _timings(self) -> Timings:
        now = time.monotonic()
        started, first = self._started or now, self._first or now
        return Timings(
            queue=started - self._submitted, prefill=first - started, decode=now - first, ttft=first - self._submitted
        )
