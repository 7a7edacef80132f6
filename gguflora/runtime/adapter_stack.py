"""Several adapters stacked into one LoRA of the summed rank, in which each token is given only its own.

The stack is a LoRA of zeros in llama.cpp's memory whose rank rows are divided into bays of `WIDTH` rows. An adapter
takes as many bays as its rank needs, the same ones in every tensor; its factors are copied there in place. While a
batch is computed, the hook multiplies the rank rows of every token by weights: the scale of the token's request in the
bays of its adapters, 0 in all others.

Factors keep their types, since with a factor of another type llama.cpp rounds the activations differently: there is a
LoRA of the stack for each combination of types that adapters have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import numpy as np

from gguflora.errors import HotSwapError
from gguflora.lora.gguf_writer import LoraHeader, Stored, write_lora
from gguflora.quants.arrays import Float32Array
from gguflora.runtime.bindings import Pointer, free_lora, load_lora
from gguflora.runtime.factor_finder import FactorFinder, FactorPair
from gguflora.runtime.graph_hook import Factor, GraphHook, copy_strided
from gguflora.system.nameless import memory_file

WIDTH: Final = 16
"""Rank rows of a bay: what the vectors of a processor hold, so that an adapter of rank 16 is summed in the same order
in every bay."""

SIZES: Final = {0: 4, 1: 2}
"""Bytes of a number by ggml's type: F32, F16. Adapters of other types are not stacked."""

_NAMES: Final = {0: "F32", 1: "F16"}

Kind: TypeAlias = tuple[int, int]
"""Types of A and B."""

Shapes: TypeAlias = dict[Kind, dict[str, FactorPair]]
"""What a stack must have: by types and name of the weight, a pair of that shape (whatever its rank)."""


@dataclass(frozen=True, slots=True, eq=False)
class StackableAdapter:
    """A loaded LoRA that can be stacked.

    Attributes:
        pairs: its factors in llama.cpp's memory.
        alpha: alpha in its file; 0 for none.
    """

    pairs: Sequence[FactorPair]
    alpha: float

    @property
    def n_bays(self) -> int:
        """How many bays its highest rank needs."""
        return -(-max((pair.rank for pair in self.pairs), default=1) // WIDTH)


def add_shapes(shapes: Shapes, adapter: StackableAdapter) -> bool:
    """Let ``shapes`` have all that ``adapter`` has; whether anything was new."""
    new = False
    for pair in adapter.pairs:
        names = shapes.setdefault((pair.a.type, pair.b.type), {})
        new |= pair.name not in names
        names.setdefault(pair.name, pair)
    return new


@dataclass(slots=True)
class _Tensor:
    """A weight's pair in the stack, and by what a token's weight of each bay is multiplied in it."""

    pair: FactorPair
    factors: list[float] = field(default_factory=list)


class AdapterStack:
    """Bays for adapters of one model. For one thread.

    Args:
        model: the ``llama_model *``.
        architecture: the model's ``general.architecture``.
        finder: finds the factors of LoRAs of the same model.
        shapes: the tensors that adapters may have.
        n_bays: number of bays.

    Raises:
        HotSwapError: if llama.cpp cannot load a LoRA of this size.
    """

    def __init__(self, model: int, architecture: str, finder: FactorFinder, shapes: Shapes, n_bays: int) -> None:
        self.n_bays = n_bays
        self.loras: list[Pointer] = []
        self._tensors: dict[tuple[Kind, str], _Tensor] = {}
        self._bays: dict[StackableAdapter, list[int]] = {}  # the one used last comes last
        self._is_announced = False
        try:
            for kind, names in shapes.items():
                self._load(model, architecture, finder, kind, names)
        except BaseException:
            self.free()
            raise

    def _load(
        self, model: int, architecture: str, finder: FactorFinder, kind: Kind, names: Mapping[str, FactorPair]
    ) -> None:
        rank = self.n_bays * WIDTH
        stored = [tensor for pair in names.values() for tensor in _zeros(pair, rank)]
        with memory_file("gguflora-stack") as file:
            write_lora(file, LoraHeader("stack", architecture, 0.0, {"source": f"{self.n_bays} bays"}), stored)
            self.loras.append(load_lora(model, file))
        found = finder.find(self.loras[-1])
        if {pair.name for pair in found} != names.keys() or any(pair.rank != rank for pair in found):
            raise HotSwapError("llama.cpp does not apply the stack of adapters as it was written")
        for pair in found:
            self._tensors[kind, pair.name] = _Tensor(pair, [0.0] * self.n_bays)

    def free(self) -> None:
        """Free its LoRAs, which no context may have. Idempotent."""
        self._tensors.clear()
        self._bays.clear()
        while self.loras:
            free_lora(self.loras.pop())

    def place(self, adapters: Sequence[StackableAdapter]) -> bool:
        """Give each of these bays, those of adapters unused for longest if need be; whether there is room for all."""
        if sum(adapter.n_bays for adapter in adapters) > self.n_bays:
            return False
        for adapter in adapters:
            if adapter in self._bays:
                self._bays[adapter] = self._bays.pop(adapter)
        for adapter in adapters:
            if adapter not in self._bays:
                self._bays[adapter] = self._free_bays(adapter.n_bays, adapters)
                self._copy(adapter)
                self._is_announced = False
        return True

    def _free_bays(self, count: int, wanted: Sequence[StackableAdapter]) -> list[int]:
        free = [bay for bay in range(self.n_bays) if not any(bay in bays for bays in self._bays.values())]
        for adapter in list(self._bays):
            if len(free) >= count:
                break
            if adapter not in wanted:
                free += self._bays.pop(adapter)
        return sorted(free)[:count]

    def drop(self, adapter: StackableAdapter) -> None:
        """Forget an adapter."""
        self._bays.pop(adapter, None)

    def announce(self, hook: GraphHook) -> None:
        """Tell the hook which products to mask."""
        tensors = list(self._tensors.values())
        factors = np.array([tensor.factors for tensor in tensors], np.float32)
        hook.set_stack([tensor.pair.a.tensor for tensor in tensors], WIDTH, factors)
        self._is_announced = True

    @property
    def is_announced(self) -> bool:
        """Whether nothing has changed since `announce`."""
        return self._is_announced

    def fill_weights(self, row: Float32Array, scales: Sequence[tuple[StackableAdapter, float]]) -> None:
        """Write to ``row`` (n_bays,) the scales of a token's adapters, which were placed."""
        for adapter, scale in scales:
            row[self._bays[adapter]] += np.float32(scale)

    def _copy(self, adapter: StackableAdapter) -> None:
        """Copy an adapter's factors into its bays."""
        bays = self._bays[adapter]
        for tensor in self._tensors.values():
            for bay in bays:
                tensor.factors[bay] = 0.0
        for pair in adapter.pairs:
            tensor = self._tensors[(pair.a.type, pair.b.type), pair.name]
            for index, bay in enumerate(bays):
                start, stop = index * WIDTH, min((index + 1) * WIDTH, pair.rank)
                if start < stop:
                    tensor.factors[bay] = adapter.alpha / pair.rank if adapter.alpha else 1.0
                    _copy_rows(pair, tensor.pair, start, stop, bay * WIDTH)


def _zeros(pair: FactorPair, rank: int) -> list[Stored]:
    """Both factors of a weight in a stack of this rank."""
    a_shape, b_shape = list(pair.a.ne), list(pair.b.ne)
    a_shape[0 if pair.is_embedding else 1], b_shape[0] = rank, rank
    return [
        _zero_tensor(f"{pair.name}.lora_a", pair.a.type, a_shape),
        _zero_tensor(f"{pair.name}.lora_b", pair.b.type, b_shape),
    ]


def _zero_tensor(name: str, kind: int, ne: Sequence[int]) -> Stored:
    shape = [ne[2]] * (ne[2] > 1) + [ne[1], ne[0] * SIZES[kind]]
    return Stored(name, _NAMES[kind], np.zeros(shape, np.uint8))


def _copy_rows(pair: FactorPair, stack: FactorPair, start: int, stop: int, to: int) -> None:
    """Copy ranks ``start`` to ``stop`` - 1 to rank ``to`` and after it, and zeros to what is left of the bay."""
    _copy_columns(pair.b, stack.b, start, stop, to)
    if pair.is_embedding:
        _copy_columns(pair.a, stack.a, start, stop, to)
        return
    a, target = pair.a, stack.a
    for expert in range(a.ne[2]):
        rows = target.data + expert * target.nb[2] + to * target.nb[1]
        source = a.data + expert * a.nb[2] + start * a.nb[1]
        copy_strided(rows, target.nb[1], source, a.nb[1], stop - start, a.nb[1])
        left = WIDTH - (stop - start)
        copy_strided(rows + (stop - start) * target.nb[1], target.nb[1], None, 0, left, target.nb[1])


def _copy_columns(source: Factor, target: Factor, start: int, stop: int, to: int) -> None:
    """The same where the ranks lie side by side."""
    size = SIZES[source.type]
    for expert in range(source.ne[2]):
        first = target.data + expert * target.nb[2] + to * size
        begin = source.data + expert * source.nb[2] + start * size
        copy_strided(first, target.nb[1], begin, source.nb[1], source.ne[1], (stop - start) * size)
        left = (WIDTH - (stop - start)) * size
        copy_strided(first + (stop - start) * size, target.nb[1], None, 0, source.ne[1] if left else 0, left)
