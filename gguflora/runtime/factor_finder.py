"""Finds the factors of a loaded LoRA in llama.cpp's memory.

llama.cpp tells nobody where it keeps them, but a graph built under an adapter has them as sources of its nodes. So a
small context of its own builds a graph for one token; the hook notes the factors, and then nothing is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import llama_cpp

from gguflora.errors import HotSwapError
from gguflora.files.gguf import TOKEN_EMBEDDING
from gguflora.runtime.bindings import Pointer, captured_log, set_loras
from gguflora.runtime.graph_hook import Factor, GraphHook, all_finite
from gguflora.runtime.tensor_layout import TensorLayout

_CELLS: Final = 32
_WARN: Final = 3  # of enum ggml_log_level


@dataclass(frozen=True, slots=True)
class FactorPair:
    """Both factors of one weight.

    Attributes:
        name: name of the weight.
        a: (rank, n_in) or, of experts, (n_expert, rank, n_in); of the token embedding (n_vocab, rank).
        b: (n_out, rank) or (n_expert, n_out, rank).
    """

    name: str
    a: Factor
    b: Factor

    @property
    def rank(self) -> int:
        """Columns of B."""
        return self.b.ne[0]

    @property
    def is_embedding(self) -> bool:
        """Whether llama.cpp looks rows up in A."""
        return self.name == TOKEN_EMBEDDING


class FactorFinder:
    """A context that builds graphs of a model only to see what is in them. For one thread at a time.

    Raises:
        HotSwapError: if llama.cpp cannot make it.
    """

    def __init__(self, model: int, layout: TensorLayout) -> None:
        self._layout = layout
        self._hook = GraphHook(layout)
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = _CELLS
        parameters.n_batch = parameters.n_ubatch = parameters.n_seq_max = 1
        parameters.n_threads = parameters.n_threads_batch = 1
        parameters.no_perf = True
        self._hook.attach(parameters)
        self._hook.attach_abort(parameters)
        with captured_log() as log:
            self._context: Any = llama_cpp.llama_init_from_model(model, parameters)
        if not self._context:
            self._hook.free()
            raise HotSwapError(f"llama.cpp could not make a context to look into: {' '.join(''.join(log).split())}")

    def find(self, adapter: Pointer) -> list[FactorPair]:
        """The factors of a loaded LoRA that take part in the graph.

        Raises:
            HotSwapError: if A without B is found, or the other way round.
        """
        try:
            set_loras(self._context, [(adapter, 1.0)])
            self._hook.begin_finding()
            token = (llama_cpp.llama_token * 1)(0)
            with captured_log(hidden_from=_WARN):  # it says that the graph was not computed
                llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(token, 1))
            self._hook.end()
            factors = {factor.name: factor for factor in self._hook.found()}
        finally:
            set_loras(self._context, [])
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
        names = sorted({name.rpartition(".")[0] for name in factors})
        if len(factors) != 2 * len(names):
            raise HotSwapError("llama.cpp's graph has a factor of a LoRA without its other one")
        return [FactorPair(name, factors[f"{name}.lora_a"], factors[f"{name}.lora_b"]) for name in names]

    def close(self) -> None:
        """Free the context. Idempotent."""
        context, self._context = self._context, None
        if context is not None:
            llama_cpp.llama_free(context)
            self._hook.free()


def is_finite(pairs: Sequence[FactorPair], sizes: dict[int, int]) -> bool:
    """Whether all numbers of the factors are finite; ``sizes`` are bytes of a number by type."""
    factors = [factor for pair in pairs for factor in (pair.a, pair.b)]
    return all(all_finite(f.data, f.ne[0] * f.ne[1] * f.ne[2] * f.ne[3], sizes[f.type]) for f in factors)
