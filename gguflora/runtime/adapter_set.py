"""The adapters that a Llama has loaded and applied, and the identity that its KV cache depends on."""

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


Untyped: TypeAlias = Any
"""An object of llama_cpp, which has no type annotations."""


def identity_of(adapters: Sequence[tuple[str, float]]) -> str:
    """Return a hash of (SHA-256 of the file, scale) pairs; sets with equal hashes compute equal logits."""
    parts = sorted(f"{sha256}@{np.float32(scale).tobytes().hex()}" for sha256, scale in adapters)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest() if parts else BASE


class AttachedSet:
    """The adapters that one Llama has loaded and applied.

    The Llama owns this object; the object does not refer back to it, so that dropping the Llama frees it.

    Attributes:
        llama_lock: gives one call or generation at a time the use of the Llama.
        lock: held while the Llama computes and while its adapters change.
        loaded: the loaded adapters by name.
        active: scale of each applied adapter by name; never 0.
        origin: identity of the set that was applied when gguflora was attached.
        identity: identity of the set applied now.
        changes: number of times that the identity has changed.
        closed: whether all adapters are unset and freed.
        starts: position of the first token that each activated LoRA computes, in the tokens evaluated so far.
        planned: whether `starts` is already right for the tokens evaluated next; true while tokens are generated.
        template: which chat template the user wants: ``adapter``, ``base``, one in Jinja, or None.
        chat_handler: what answers chats under the applied adapters; None if the Llama itself does.
    """

    def __init__(self, context: Untyped, model: Untyped, concatenated: ConcatenatedAdapters) -> None:
        self._context = context
        self._model = model
        self._concatenated = concatenated
        self.llama_lock: Final = LlamaLock()
        self.lock: Final = self.llama_lock.lock
        self.loaded: dict[str, HotAdapter] = {}
        self.active: dict[str, float] = {}
        self.origin = self.identity = BASE
        self.changes = 0
        self.closed = False
        self.starts: Starts = {}
        self.planned = False
        self.template: str | None = None
        self.chat_handler: Untyped = None

    @property
    def invocations(self) -> dict[str, tuple[int, ...]]:
        """Invocation tokens of the applied activated LoRAs, by name."""
        return {name: self.loaded[name].invocation for name in self.active if self.loaded[name].invocation}

    @property
    def prefix(self) -> Prefix | None:
        """The applied soft prompt, if there is one."""
        return next((self.loaded[name].prefix for name in self.active if self.loaded[name].prefix), None)

    def set_active(self, active: Mapping[str, float]) -> bool:
        """Apply the adapters of ``active`` (scale by name); return whether this changes what the model computes."""
        self._set(active)
        self.active, self.starts = dict(active), {}
        identity = identity_of([(self.loaded[name].sha256, scale) for name, scale in active.items()])
        changed = identity != self.identity
        self.identity = identity
        self.changes += changed
        self._context.__dict__["shift"] = self.prefix.n_tokens if self.prefix else 0
        return changed

    def set_started(self, started: frozenset[str]) -> None:
        """Set the context's adapters to the applied ones, without activated LoRAs that are not in ``started``."""
        waiting = self.invocations.keys() - started
        self._set({name: scale for name, scale in self.active.items() if name not in waiting})

    def _set(self, active: Mapping[str, float]) -> None:
        loaded = [(self.loaded[name], scale) for name, scale in active.items()]
        parts = [ScaledLora(each.pointer, each.path, each.sha256, scale) for each, scale in loaded if each.pointer]
        self._concatenated.apply(self._context.ctx, parts)

    def free(self, name: str) -> None:
        """Unload an adapter that is not active, and free its memory if gguflora owns it."""
        adapter = self.loaded.pop(name)
        self._concatenated.drop(adapter.sha256)
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
            if self._model.model is None:  # somebody freed the model, and its adapters with it
                self.loaded.clear()
            else:
                self._concatenated.free()
            for name in list(self.loaded):
                self.free(name)


def describe(active: Mapping[str, float]) -> str:
    """Describe an adapter set in words, for messages."""
    return ", ".join(f"{name} at {scale:g}" for name, scale in active.items()) or "no adapter"
