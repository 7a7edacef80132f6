"""Embeddings of texts, and the scores of models that rank texts, in a context of their own.

An encoder (BERT) and a model that ranks compute a text at once, and llama.cpp pools its rows. A causal model computes a
text in steps of ``n_batch`` tokens, because llama.cpp keeps room for the logits of every token of a step; its rows are
pooled here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import llama_cpp
import numpy as np

from gguflora.engine.batch import Batch
from gguflora.engine.context import KV_TYPES, ContextOptions, flash_attention
from gguflora.engine.model import Model
from gguflora.engine.registry import NO_ADAPTERS, AdapterPhase
from gguflora.engine.slots import Chunk, Slot
from gguflora.errors import DivergedError, EngineError, GenerationError, PromptTooLongError, RequestError
from gguflora.quants.arrays import Float32Array
from gguflora.runtime.bindings import captured_log, position_factors
from gguflora.runtime.concatenated_adapters import ConcatenatedAdapters

_NONE: Final = llama_cpp.LLAMA_POOLING_TYPE_NONE
_MEAN: Final = llama_cpp.LLAMA_POOLING_TYPE_MEAN
_CLS: Final = llama_cpp.LLAMA_POOLING_TYPE_CLS
_LAST: Final = llama_cpp.LLAMA_POOLING_TYPE_LAST
_RANK: Final = llama_cpp.LLAMA_POOLING_TYPE_RANK
RANKING_HEAD: Final = "cls.output.weight"

_SMALLEST: Final = 512
"""Tokens that the first context holds; longer texts get a larger one."""


class Embedder:
    """Computes embeddings of one model. Not thread-safe.

    Args:
        model: the model.
        options: options of the engine's context: its size limits the length of a text.
        concatenated: applies adapters.
        is_encoder: whether the model has no KV cache and computes all tokens of a text at once.
        has_head: whether the model has a head for classes, which ranks if its file names no pooling.

    Attributes:
        pooling: llama.cpp's number of the pooling that the model's file names; if it names none, that of the head, or
            else the mean.
    """

    def __init__(
        self,
        model: Model,
        options: ContextOptions,
        concatenated: ConcatenatedAdapters,
        *,
        is_encoder: bool,
        has_head: bool,
    ) -> None:
        self._model = model
        self._options = options
        self._concatenated = concatenated
        named = model.metadata(f"{model.metadata('general.architecture')}.pooling_type")
        without_name = _RANK if has_head else _MEAN
        self.pooling = int(named) if named and named.isdecimal() and int(named) != _NONE else without_name
        self._at_once = is_encoder or self.pooling == _RANK
        self._limit = min(options.n_ctx, model.n_ctx_train) if is_encoder else options.n_ctx
        self._width = int(llama_cpp.llama_model_n_embd_out(model.pointer))
        self._pointer: Any = None
        self._n_cells = 0
        self._batch: Batch | None = None

    @property
    def can_rank(self) -> bool:
        """Whether the model has a head that ranks a document for a query."""
        return bool(self.pooling == _RANK)

    def check_length(self, n_tokens: int) -> None:
        """Check that a text is not empty and fits.

        Raises:
            PromptTooLongError, RequestError: if it does not.
        """
        if not n_tokens:
            raise RequestError("a text to embed has no tokens")
        if n_tokens > self._limit:
            raise PromptTooLongError(f"a text to embed has {n_tokens} tokens, but at most {self._limit} fit")

    def compute(self, tokens: Sequence[int], phase: AdapterPhase) -> Float32Array:
        """Return the pooled embedding (n_embd,) of a text, not normalized; or the scores (n,) of a model that ranks.

        Args:
            tokens: the text.
            phase: the adapters that compute it.

        Raises:
            EngineError: if llama.cpp cannot make the context.
            GenerationError: if llama.cpp fails, or the numbers are not finite.
        """
        self._ensure_room(len(tokens))
        self._concatenated.apply(self._pointer, phase.parts)
        memory = llama_cpp.llama_get_memory(self._pointer)
        if memory:
            llama_cpp.llama_memory_clear(memory, False)
        pooled = self._whole(tokens, phase) if self._at_once else self._in_steps(tokens, phase)
        if not np.isfinite(pooled).all():
            raise (DivergedError if phase.parts else GenerationError)("the embedding is not finite")
        return pooled

    def free(self) -> None:
        """Free the context. Idempotent."""
        pointer, self._pointer = self._pointer, None
        if pointer is not None:
            self._concatenated.forget(pointer)
            llama_cpp.llama_free(pointer)

    def forget_adapters(self) -> None:
        """Apply no adapters, so that they may be freed."""
        if self._pointer is not None:
            self._concatenated.apply(self._pointer, NO_ADAPTERS.parts)

    def _whole(self, tokens: Sequence[int], phase: AdapterPhase) -> Float32Array:
        self._decode(tokens, 0, phase)
        values = llama_cpp.llama_get_embeddings_seq(self._pointer, 0)
        if not values:
            raise GenerationError("llama.cpp gave no embedding")
        count = int(llama_cpp.llama_model_n_cls_out(self._model.pointer)) if self.can_rank else self._width
        return np.array(np.ctypeslib.as_array(values, (count,)), np.float32)

    def _in_steps(self, tokens: Sequence[int], phase: AdapterPhase) -> Float32Array:
        total = np.zeros(self._width, np.float64)
        first = last = total
        for start in range(0, len(tokens), self._options.n_batch):
            part = tokens[start : start + self._options.n_batch]
            self._decode(part, start, phase)
            values = llama_cpp.llama_get_embeddings(self._pointer)
            if not values:
                raise GenerationError("llama.cpp gave no embeddings")
            rows = np.array(np.ctypeslib.as_array(values, (len(part) * self._width,))).reshape(len(part), -1)
            total = total + rows.sum(axis=0, dtype=np.float64)
            first, last = first if start else rows[0], rows[-1]
        pooled = {_CLS: first, _LAST: last}.get(self.pooling, total / len(tokens))
        return pooled.astype(np.float32)

    def _decode(self, tokens: Sequence[int], start: int, phase: AdapterPhase) -> None:
        assert self._batch is not None
        slot = Slot(0, held=[0] * start)
        self._batch.fill([Chunk(slot, tokens, tokens, phase, wants_logits=True)])
        self._batch.outputs[:] = 1
        status = llama_cpp.llama_decode(self._pointer, self._batch.struct)
        if status:
            raise GenerationError(f"llama.cpp could not embed a text of {len(tokens)} tokens (status {status})")

    def _ensure_room(self, n_tokens: int) -> None:
        """Make a context that holds so many tokens, unless there is one."""
        if self._pointer is not None and n_tokens <= self._n_cells:
            return
        self.free()
        size = min(max(_SMALLEST, 1 << (n_tokens - 1).bit_length()), self._limit)
        n_batch = size if self._at_once else self._options.n_batch
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = size
        parameters.n_batch = parameters.n_ubatch = n_batch
        parameters.n_threads = parameters.n_threads_batch = self._options.threads
        parameters.type_k = parameters.type_v = KV_TYPES[self._options.kv_type]
        parameters.flash_attn_type = flash_attention(self._options)
        parameters.embeddings = True
        parameters.pooling_type = self.pooling if self._at_once else _NONE
        parameters.swa_full = True
        parameters.no_perf = True
        with captured_log() as log:
            pointer = llama_cpp.llama_init_from_model(self._model.pointer, parameters)
        if not pointer:
            raise EngineError(f"llama.cpp could not make a context for embeddings: {' '.join(log).strip()}")
        self._pointer, self._n_cells = pointer, size
        self._batch = Batch(n_batch, position_factors(self._model.pointer))
