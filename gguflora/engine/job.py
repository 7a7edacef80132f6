"""A request that the scheduler is working on: its tokens, its progress and its output."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gguflora.engine.answer_text import AnswerText
from gguflora.engine.context import Context
from gguflora.engine.model import Model
from gguflora.engine.registry import AdapterPhase, Embeddings, ResolvedSet
from gguflora.engine.requests import Ending, FinishReason, GenerationSink, Piece, Request, Timings, TokenLogprob, Usage
from gguflora.engine.sampler import Sampler, token_logprob
from gguflora.engine.slots import Chunk, Key, SavedSlot, Slot
from gguflora.engine.thoughts import ThoughtWatch
from gguflora.errors import EngineError
from gguflora.placement.prefix import Prefix
from gguflora.runtime.alora import starts_of
from gguflora.runtime.concatenated_adapters import ScaledLora


@dataclass(slots=True)
class TokenPlan:
    """What to decode at each position of a request, and with which adapters: first a soft prompt, then tokens.

    Attributes:
        adapters: the request's adapter set.
        keys: key of each position; see `Key`.
        tokens: the tokens, without the soft prompt.
        starts: position at which each activated LoRA begins, by name; None if it does not begin.
    """

    adapters: ResolvedSet
    keys: list[Key]
    tokens: list[int]
    starts: dict[str, int | None]

    @classmethod
    def from_prompt(cls, adapters: ResolvedSet, prompt: list[int]) -> TokenPlan:
        """Plan the tokens of a prompt."""
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
        """Add a token."""
        phase = self._phase(len(self.keys))
        self.keys.append(token if phase is self.adapters.base_phase else (token, phase.identity))
        self.tokens.append(token)

    def chunk(self, slot: Slot, limit: int) -> Chunk:
        """Return the next positions that ``slot`` lacks.

        A chunk has at most ``limit`` positions, all of one kind and with the same adapters. The keys and values of a
        soft prompt come all at once.
        """
        start, n_before, prefix = len(slot.held), self.adapters.n_before, self.adapters.keys_and_values
        n_prefix = prefix.n_tokens if prefix else 0
        borders = [n_prefix, n_before, len(self.keys), *(position for position in self.starts.values() if position)]
        stop = min(border for border in borders if border > start)
        inputs: list[int] | Embeddings | Prefix
        if prefix and start < n_prefix:
            inputs = prefix
        elif start < n_before:
            stop = min(stop, start + limit)
            assert self.adapters.embeddings is not None
            inputs = self.adapters.embeddings[start - n_prefix : stop - n_prefix]
        else:
            stop = min(stop, start + limit)
            inputs = self.tokens[start - n_before : stop - n_before]
        return Chunk(slot, self.keys[start:stop], inputs, self._phase(start), stop == len(self.keys))

    def _phase(self, position: int) -> AdapterPhase:
        started = (name for name, start in self.starts.items() if start is not None and position >= start)
        return self.adapters.phase(frozenset(started))


class GenerationJob:
    """One request in the scheduler.

    Attributes:
        request: the request.
        adapters: its adapter set, resolved.
        slot: the slot that computes it; None while it waits.
        saved: copy of its slot from when it was suspended, if there was memory for one.
        slot_taken: when it got its slot, in seconds of the monotonic clock.
        ended: whether the caller has been told that it ended.
    """

    def __init__(self, request: Request, adapters: ResolvedSet, sink: GenerationSink, model: Model, n_ctx: int) -> None:
        prompt = [int(token) for token in request.tokens]
        self.request = request
        self.adapters = adapters
        self.slot: Slot | None = None
        self.saved: SavedSlot | None = None
        self.slot_taken = 0.0
        self._plan = TokenPlan.from_prompt(adapters, prompt)
        if request.cache_owner:  # nothing is equal after a first key that differs
            self._plan.keys[0] = (self._plan.keys[0], request.cache_owner)
        self._n_prompt = len(self._plan.keys)
        self._max_positions = min(self._n_prompt + request.max_tokens, n_ctx)
        self._n_scores = len(prompt) - 1 if request.prompt_logprobs else 0
        self._scores: list[TokenLogprob] = []
        self._sink = sink
        self._model = model
        self._sampler = Sampler(request.sampling, model, prompt)
        self._text = AnswerText(request.stop)
        self._thoughts = None if request.thoughts is None else ThoughtWatch(request.thoughts)
        self._reused: int | None = None
        self._submitted = time.monotonic()
        self._started = self._first = 0.0
        self.ended = False

    @property
    def started(self) -> bool:
        """Whether the job has started; it may be suspended."""
        return self._reused is not None

    @property
    def keys(self) -> list[Key]:
        """Keys of all positions so far."""
        return self._plan.keys

    @property
    def reusable_keys(self) -> list[Key]:
        """Keys of the positions that may be taken from another slot, and of the one after them, which must not."""
        return self.keys[: self.adapters.n_before + len(self._scores) + 1] if self.is_scoring else self.keys

    @property
    def is_scoring(self) -> bool:
        """Whether log probabilities of prompt tokens are asked for and not known yet."""
        return len(self._scores) < self._n_scores

    @property
    def remaining(self) -> int:
        """Number of positions to decode before the next token can be sampled."""
        return len(self.keys) - (0 if self.slot is None else len(self.slot.held))

    @property
    def interruption(self) -> FinishReason | None:
        """Why the job must end now: "cancelled" or "timeout"; None if it may continue."""
        if self._sink.cancelled.is_set():
            return "cancelled"
        timeout = self.request.timeout
        if timeout is not None and time.monotonic() - self._submitted >= timeout:
            return "timeout"
        return None

    @property
    def all_parts(self) -> tuple[ScaledLora, ...]:
        """Every LoRA that computes any of its tokens."""
        return self.adapters.phase(frozenset(self.adapters.invocations)).parts

    def start(self, slot: Slot) -> None:
        """Start or resume the job in ``slot``."""
        self.slot, self.saved, self.slot_taken = slot, None, time.monotonic()
        if self._reused is None:
            self._reused = len(slot.held)
            self._started = time.monotonic()

    def chunk(self, limit: int) -> Chunk:
        """Return what to decode next, at most ``limit`` positions unless it is a prefix of keys and values."""
        assert self.slot is not None
        chunk = self._plan.chunk(self.slot, limit)
        return replace(chunk, wants_all_logits=True) if self.is_scoring and chunk.kind is list else chunk

    def score(self, context: Context, chunk: Chunk, indices: Sequence[int]) -> None:
        """Note the log probabilities of the prompt tokens that follow those of a chunk just decoded.

        Raises:
            GenerationError: if the logits are not finite.
        """
        assert self.slot is not None
        first = len(self.slot.held) - len(chunk.keys) - self.adapters.n_before
        for token, index in enumerate(indices, first + 1):
            if token == len(self._scores) + 1 and self.is_scoring:  # others were noted before the job was suspended
                logprob = self._logprob(context.logits(index), self._plan.tokens[token])
                self._scores.append(logprob)
                if not self.is_scoring:
                    self._sink.put(Piece("", prompt=tuple(self._scores)))

    def advance(self, context: Context, index: int) -> FinishReason | None:
        """Sample the next token from the logits at ``index`` of the context's last batch.

        Returns:
            The reason if the request ends with this token, else None.

        Raises:
            GenerationError: if the logits are not finite.
        """
        logits = context.logits(index)
        if self._first == 0:
            self._first = time.monotonic()
        if len(self.keys) >= self._max_positions:
            return "length"
        forced = self._thoughts.forced() if self._thoughts else None
        token = self._sampler.sample(context.pointer, index) if forced is None else self._sampler.accept(forced)
        if self._thoughts:
            self._thoughts.accept(self._model.piece(token, True))
        logprob = None if self.request.logprobs is None else self._logprob(logits, token)
        self._plan.append(token)
        if self._model.is_end(token) or token in self.request.sampling.stop_token_ids:
            return "stop"
        self._push(token, logprob)
        if self._text.stopped:
            return "stop"
        return "length" if len(self.keys) >= self._max_positions else None

    def _logprob(self, logits: NDArray[np.float32], token: int) -> TokenLogprob:
        return token_logprob(logits, token, self.request.logprobs or 0, lambda each: self._model.piece(each, True))

    def _push(self, token: int, logprob: TokenLogprob | None) -> None:
        self._send(self._text.push(token, self._model.piece(token, token in self.request.spelled_tokens), logprob))

    def _send(self, piece: Piece) -> None:
        if piece.text or piece.tokens:
            self._sink.put(piece)

    def end(self, reason: FinishReason, error: EngineError | None = None) -> None:
        """Tell the caller that the request has ended. Idempotent."""
        if self.ended:
            return
        self.ended = True
        self._send(self._text.finish())
        self._sampler.close()
        self._sink.put(Ending(reason, self.usage, self._timings(), error, self._text.stop_text))

    @property
    def usage(self) -> Usage:
        """Token counts so far; embeddings in front of the prompt count as prompt tokens."""
        return Usage(self._n_prompt, len(self.keys) - self._n_prompt, self._reused or 0)

    def _timings(self) -> Timings:
        now = time.monotonic()
        started, first = self._started or now, self._first or now
        return Timings(
            queue=started - self._submitted, prefill=first - started, decode=now - first, ttft=first - self._submitted
        )
