"""The adapters that may be mixed in one batch, and the stacks that hold those at work.

Stacks come in sizes that are powers of two, made when they are first needed: a larger one costs every token more.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from gguflora.adapters.gguf_lora import ALPHA_KEY
from gguflora.errors import HotSwapError
from gguflora.files.gguf import GgufFile
from gguflora.quants.arrays import Float32Array
from gguflora.runtime.adapter_stack import SIZES, AdapterStack, Shapes, StackableAdapter, add_shapes
from gguflora.runtime.bindings import Pointer, set_loras
from gguflora.runtime.concatenated_adapters import FIXED_GRAPH, ScaledLora
from gguflora.runtime.factor_finder import FactorFinder, is_finite
from gguflora.runtime.graph_hook import GraphHook, proven_layout, unavailable

_LOG: Final = logging.getLogger(__name__)

MAX_BAYS: Final = 32
"""Of the largest stack. Sets that need more together are computed in several batches."""

_PATIENCE: Final = 64
"""So many batches in a row must fit a smaller stack before it takes the place of a larger one."""


class MixedAdapters:
    """Applies several adapter sets in one batch. Not thread-safe.

    Args:
        model: the ``llama_model *``.
        architecture: the model's ``general.architecture``.
        can_rewind: whether the model keeps nothing but an attention cache: llama.cpp reorders the tokens of others.

    Attributes:
        hook: for the context that serves; None if sets cannot be mixed.
        reason: why they cannot; None if they can.
        before_release: called before stacks are freed; it takes them out of the context.
    """

    def __init__(self, model: int, architecture: str, *, can_rewind: bool) -> None:
        self._model = model
        self._architecture = architecture
        self._adapters: dict[int, StackableAdapter] = {}
        self._shapes: Shapes = {}
        self._stacks: dict[int, AdapterStack] = {}
        self._current: AdapterStack | None = None
        self._n_fitting = 0
        self._finder: FactorFinder | None = None
        self.hook: GraphHook | None = None
        self.before_release: Callable[[], None] = _do_nothing
        self.reason = unavailable()
        if not can_rewind:
            self.reason = "the model keeps a running state"
        elif architecture in FIXED_GRAPH:
            self.reason = f"llama.cpp's graph of {architecture} has no room for a stack of adapters"
        if self.reason is None:
            self.hook = GraphHook(proven_layout())

    def add(self, pointer: Pointer, file: Path) -> bool:
        """Take note of an adapter that was loaded from ``file``; return whether it can be mixed with others."""
        if self.reason is not None:
            return False
        try:
            adapter = self._read(pointer, file)
        except HotSwapError as error:
            _LOG.warning("%s: cannot be mixed with other adapters in a batch: %s", file, error)
            return False
        if adapter is None:
            return False
        self._adapters[_address(pointer)] = adapter
        if add_shapes(self._shapes, adapter):
            self.release()
        return True

    def _read(self, pointer: Pointer, file: Path) -> StackableAdapter | None:
        """The adapter's factors in memory; None if a stack would not compute the same."""
        if self._finder is None:
            self._finder = FactorFinder(self._model, proven_layout())
        pairs = self._finder.find(pointer)
        with GgufFile(file) as opened:
            names, alpha = set(opened.tensors), float(opened.metadata.get(ALPHA_KEY, 0.0))
        has_all = names == {factor.name for pair in pairs for factor in (pair.a, pair.b)}
        has_types = all(factor.type in SIZES for pair in pairs for factor in (pair.a, pair.b))
        if not (pairs and has_all and has_types and is_finite(pairs, SIZES)):
            return None
        adapter = StackableAdapter(pairs, alpha)
        return adapter if adapter.n_bays <= MAX_BAYS else None

    def drop(self, pointer: Pointer | None) -> None:
        """Forget an adapter that no request uses."""
        adapter = self._adapters.pop(_address(pointer), None) if pointer else None
        if adapter is not None:
            for stack in self._stacks.values():
                stack.drop(adapter)

    def can_mix(self, parts: Sequence[ScaledLora]) -> bool:
        """Whether these can be applied to some tokens of a batch while others have others."""
        return self.reason is None and all(_address(part.pointer) in self._adapters for part in parts)

    @property
    def in_force(self) -> bool:
        """Whether a batch was mixed before, so that there is a stack."""
        return self._current is not None

    def n_bays(self, sets: Sequence[Sequence[ScaledLora]]) -> int:
        """How many bays these sets need together."""
        return sum(adapter.n_bays for adapter in self._members(sets))

    def prepare(self, n_sets: int) -> None:
        """Make the stack that so many adapters of those loaded need, so that the first batch need not wait for it."""
        sizes = sorted((adapter.n_bays for adapter in self._adapters.values()), reverse=True)[:n_sets]
        if self.reason is None and len(self._adapters) > 1:
            try:
                self._ensure(min(sum(sizes), MAX_BAYS))
            except HotSwapError as error:
                self.disable(str(error))

    def apply(self, context: int, sets: Sequence[Sequence[ScaledLora]]) -> Float32Array:
        """Put the stack that holds these sets in force in ``context``, which must have the hook.

        Returns:
            Weights (n_sets, n_bays), to be handed to the hook for the tokens of each set.

        Raises:
            HotSwapError: if llama.cpp refuses a stack; or if they need more bays than there are.
        """
        assert self.hook is not None
        adapters = self._members(sets)
        stack = self._choose(sum(adapter.n_bays for adapter in adapters))
        if not stack.place(adapters):
            raise HotSwapError(f"the adapters of a batch need more than {MAX_BAYS} bays")
        if stack is not self._current or not stack.is_announced:
            stack.announce(self.hook)
        self._current = stack
        set_loras(context, [(lora, 1.0) for lora in stack.loras])
        weights = np.zeros((len(sets), stack.n_bays), np.float32)
        for row, parts in zip(weights, sets, strict=True):
            stack.fill_weights(row, [(self._adapters[_address(part.pointer)], part.scale) for part in parts])
        return weights

    def _members(self, sets: Sequence[Sequence[ScaledLora]]) -> list[StackableAdapter]:
        return list(dict.fromkeys(self._adapters[_address(part.pointer)] for parts in sets for part in parts))

    def _choose(self, n_bays: int) -> AdapterStack:
        """The smallest stack with so many bays, or the current one if a smaller one may soon be too small."""
        current = self._current
        if current is None or current.n_bays < n_bays:
            self._n_fitting = 0
            return self._ensure(n_bays)
        self._n_fitting = self._n_fitting + 1 if 2 * n_bays <= current.n_bays else 0
        if self._n_fitting < _PATIENCE:
            return current
        self._n_fitting = 0
        return self._ensure(n_bays)

    def _ensure(self, n_bays: int) -> AdapterStack:
        size = 1 << max(n_bays - 1, 0).bit_length()
        if size not in self._stacks:
            assert self._finder is not None
            self._stacks[size] = AdapterStack(self._model, self._architecture, self._finder, self._shapes, size)
        return self._stacks[size]

    def release(self) -> None:
        """Free all stacks."""
        if self._stacks:
            self.before_release()
        self._current = None
        while self._stacks:
            self._stacks.popitem()[1].free()

    def disable(self, reason: str) -> None:
        """Mix no more."""
        _LOG.warning("requests of different adapters take turns from now on: %s", reason)
        self.reason = reason
        self._adapters.clear()

    def close(self) -> None:
        """Free everything; the context with the hook must be gone. Idempotent."""
        if self._finder is not None:
            self._finder.close()
            self._finder = None
        self.release()
        self._adapters.clear()
        if self.hook is not None:
            self.hook.free()
            self.hook = None


def _do_nothing() -> None:
    """No context has a stack yet."""


def _address(pointer: Pointer) -> int:
    return ctypes.cast(pointer, ctypes.c_void_p).value or 0
