"""The adapters that are applied at one time, and how a KV cache knows them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np

from gguflora.placement.prefix import Prefix
from gguflora.runtime.alora import Starts
from gguflora.runtime.bindings import HotAdapter, free_lora
from gguflora.runtime.concatenated_adapters import ConcatenatedAdapters, ScaledLora
from gguflora.runtime.llama_lock import LlamaLock

BASE: Final = ""
"""Identity of the empty adapter set."""


_Untyped: TypeAlias = Any
"""An object of llama_cpp, which has no types."""


def identity_of(adapters: Sequence[tuple[str, float]]) -> str:
    """Identity of a set of (SHA-256 of the file, scale): equal sets compute equal logits, whatever their names."""
    parts = sorted(f"{sha256}@{np.float32(scale).tobytes().hex()}" for sha256, scale in adapters)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest() if parts else BASE


class AttachedSet:
    """The adapters one Llama has loaded and applied. Belongs to the Llama and does not refer to it.

    Attributes:
        turn: who may use the Llama.
        lock: held around every change, and while the Llama computes.
        loaded: by name.
        active: scale by name, of those applied; none is 0.
        origin: identity of the set found when gguflora was attached.
        identity: of the set in force.
        changes: how often the identity has changed.
        closed: whether everything is unset and freed.
        starts: where the activated LoRAs begin in the tokens evaluated so far.
        planned: whether `starts` holds for what is evaluated next, too: while tokens are being generated.
    """

    def __init__(self, context: _Untyped, model: _Untyped, fused: ConcatenatedAdapters) -> None:
        self._context = context
        self._model = model
        self._fused = fused
        self.llama_lock: Final = LlamaLock()
        self.lock: Final = self.llama_lock.lock
        self.loaded: dict[str, HotAdapter] = {}
        self.active: dict[str, float] = {}
        self.origin = self.identity = BASE
        self.changes = 0
        self.closed = False
        self.starts: Starts = {}
        self.planned = False

    @property
    def invocations(self) -> dict[str, tuple[int, ...]]:
        """Invocation tokens of the activated LoRAs that are applied."""
        return {name: self.loaded[name].invocation for name in self.active if self.loaded[name].invocation}

    @property
    def prefix(self) -> Prefix | None:
        """The soft prompt that is applied."""
        return next((self.loaded[name].prefix for name in self.active if self.loaded[name].prefix), None)

    def set_active(self, active: Mapping[str, float]) -> bool:
        """Put ``active`` in force; returns whether that changes what the model computes."""
        self._set(active)
        self.active, self.starts = dict(active), {}
        identity = identity_of([(self.loaded[name].sha256, scale) for name, scale in active.items()])
        changed = identity != self.identity
        self.identity = identity
        self.changes += changed
        self._context.__dict__["shift"] = self.prefix.n_tokens if self.prefix else 0
        return changed

    def set_started(self, started: frozenset[str]) -> None:
        """Let the context compute with the applied adapters, of the activated LoRAs only with those that have begun."""
        waiting = self.invocations.keys() - started
        self._set({name: scale for name, scale in self.active.items() if name not in waiting})

    def _set(self, active: Mapping[str, float]) -> None:
        loaded = [(self.loaded[name], scale) for name, scale in active.items()]
        parts = [ScaledLora(each.pointer, each.path, each.sha256, scale) for each, scale in loaded if each.pointer]
        self._fused.apply(self._context.ctx, parts)

    def free(self, name: str) -> None:
        """Forget an adapter that is not active, and free it if it is gguflora's."""
        adapter = self.loaded.pop(name)
        self._fused.drop(adapter.sha256)
        if adapter.owned:
            free_lora(adapter.pointer)

    def release(self) -> None:
        """Unset and free everything. Idempotent; called before the Llama frees its context and model."""
        with self.lock:
            if self.closed:
                return
            self.closed = True
            if self._context.ctx is not None:
                self.set_active({})
            self.active = {}
            if self._model.model is None:  # freed by hand, and its adapters with it
                self.loaded.clear()
            else:
                self._fused.free()
            for name in list(self.loaded):
                self.free(name)


def describe(active: Mapping[str, float]) -> str:
    """An adapter set in words."""
    return ", ".join(f"{name} at {scale:g}" for name, scale in active.items()) or "no adapter"
