"""What a ``llama_cpp.Llama`` may reuse of earlier work: only what was computed under the adapters now in force.

llama-cpp-python reuses tokens in four ways: the KV cache of its context, ``generate``'s prefix match on it, the caches
of ``set_cache``, and saved states. None of them knows of adapters. `guard` gives one Llama a class that does.
"""

from __future__ import annotations

import copyreg
import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

import llama_cpp
import numpy as np

from gguflora.errors import HotSwapError
from gguflora.llama import LoadedAdapter, free_lora, set_loras

BASE: Final = ""
"""Identity of the empty adapter set."""

_Untyped: TypeAlias = Any
"""An object of llama_cpp, which has no types."""

_ATTRIBUTE: Final = "_gguflora"
_TAG: Final = "adapter_set"
_TOKEN_BITS: Final = 32


def identity_of(adapters: Sequence[tuple[str, float]]) -> str:
    """Identity of a set of (SHA-256 of the file, scale): equal sets compute equal logits, whatever their names."""
    parts = sorted(f"{sha256}@{np.float32(scale).tobytes().hex()}" for sha256, scale in adapters)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest() if parts else BASE


class AdapterSet:
    """The adapters one Llama has loaded and applied. Belongs to the Llama and does not refer to it.

    Attributes:
        lock: held around every change.
        loaded: by name.
        active: scale by name, of those applied; none is 0.
        origin: identity of the set found when gguflora was attached.
        identity: of the set in force.
        changes: how often the identity has changed.
        closed: whether everything is unset and freed.
    """

    def __init__(self, context: _Untyped, model: _Untyped) -> None:
        self._context = context
        self._model = model
        self.lock: Final = threading.RLock()
        self.loaded: dict[str, LoadedAdapter] = {}
        self.active: dict[str, float] = {}
        self.origin = self.identity = BASE
        self.changes = 0
        self.closed = False

    def set_active(self, active: Mapping[str, float]) -> bool:
        """Put ``active`` in force; returns whether that changes what the model computes."""
        set_loras(self._context.ctx, [(self.loaded[name].pointer, scale) for name, scale in active.items()])
        self.active = dict(active)
        identity = identity_of([(self.loaded[name].sha256, scale) for name, scale in active.items()])
        changed = identity != self.identity
        self.identity = identity
        self.changes += changed
        return changed

    def free(self, name: str) -> None:
        """Forget an adapter that is not active, and free it if it is gguflora's."""
        adapter = self.loaded.pop(name)
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
            for name in list(self.loaded):
                self.free(name)


class CachePartition:
    """The entries of a llama-cpp-python cache that belong to one adapter set, as a cache of its own.

    Tokens are moved to a number range of the set's own, so that keys of two sets never share a prefix, in memory and on
    disk. The set that gguflora found when attached keeps the plain tokens: what was cached before stays within reach.
    """

    def __init__(self, cache: _Untyped, identity: str, origin: str) -> None:
        self.cache = cache
        self._offset = 0 if identity == origin else _namespace(identity) << _TOKEN_BITS

    def __getitem__(self, tokens: Sequence[int]) -> _Untyped:
        return self.cache[self._key(tokens)]

    def __setitem__(self, tokens: Sequence[int], state: object) -> None:
        self.cache[self._key(tokens)] = state

    def __contains__(self, tokens: Sequence[int]) -> bool:
        return self._key(tokens) in self.cache

    def __getattr__(self, name: str) -> _Untyped:
        if name == "cache":  # not yet set, while being unpickled
            raise AttributeError(name)
        return getattr(self.cache, name)

    def _key(self, tokens: Sequence[int]) -> tuple[int, ...]:
        return tuple(self._offset + int(token) for token in tokens)


def _namespace(identity: str) -> int:
    return int(hashlib.sha256(f"gguflora {identity}".encode()).hexdigest()[:32], 16) | 1


class GuardedLlama(llama_cpp.Llama):  # type: ignore[misc]  # llama_cpp has no types
    """A Llama that reuses nothing across adapter sets. An existing Llama becomes one by `guard`."""

    @property
    def cache(self) -> CachePartition | None:
        """The part of the cache that belongs to the adapter set in force."""
        cache, adapters = self.__dict__.get("cache"), _set_of(self)
        return None if cache is None else CachePartition(cache, adapters.identity, adapters.origin)

    @cache.setter
    def cache(self, cache: _Untyped) -> None:
        self.__dict__["cache"] = cache.cache if isinstance(cache, CachePartition) else cache

    def save_state(self) -> _Untyped:
        """As `llama_cpp.Llama.save_state`; the state remembers its adapter set."""
        state = super().save_state()
        setattr(state, _TAG, _set_of(self).identity)
        return state

    def load_state(self, state: _Untyped) -> None:
        """As `llama_cpp.Llama.load_state`.

        Raises:
            HotSwapError: if the state was saved under another adapter set.
        """
        adapters = _set_of(self)
        if getattr(state, _TAG, adapters.origin) != adapters.identity:
            raise HotSwapError(
                f"this state was saved under another adapter set than the one in force ({describe(adapters.active)}); "
                "apply the set it was saved under first, or evaluate the prompt again"
            )
        super().load_state(state)

    def generate(self, *args: _Untyped, **kwargs: _Untyped) -> Iterator[int]:
        """As `llama_cpp.Llama.generate`.

        Raises:
            HotSwapError: if the adapter set changes while tokens are still being taken.
        """
        adapters = _set_of(self)
        changes, tokens, sent = adapters.changes, super().generate(*args, **kwargs), None
        while True:
            if adapters.changes != changes:
                raise HotSwapError(
                    "the adapter set was changed while tokens were being generated; "
                    "take the tokens first, or generate again under the new set"
                )
            try:
                token = tokens.send(sent)
            except StopIteration:
                return
            sent = yield token

    def __reduce_ex__(self, protocol: object) -> tuple[Callable[..., Any], tuple[type], Any]:
        # Llama pickles as its constructor's arguments: the copy has no adapters and is a plain Llama
        return copyreg.__newobj__, (_class_before(self),), self.__getstate__()  # type: ignore[attr-defined]


def _set_of(llm: _Untyped) -> AdapterSet:
    adapters: AdapterSet = llm.__dict__[_ATTRIBUTE]
    return adapters


def _class_before(llm: _Untyped) -> type:
    before: type = type(llm).__bases__[1]
    return before


_CLASSES: Final[dict[type, type]] = {}


def _guarded(kind: type) -> type:
    """`GuardedLlama` over ``kind``, which is Llama or a subclass of it; always the same class for the same one."""
    if kind not in _CLASSES:
        names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
        _CLASSES[kind] = type(kind.__name__, (GuardedLlama, kind), names)
    return _CLASSES[kind]


def attached_set(llm: _Untyped) -> AdapterSet | None:
    """The adapter set ``llm`` has or last had; None if gguflora was never attached to it."""
    adapters: AdapterSet | None = llm.__dict__.get(_ATTRIBUTE)
    return adapters


def guard(llm: _Untyped, adapters: AdapterSet) -> None:
    """Let ``llm`` reuse only what was computed under ``adapters``, and free them before its model when it is closed.

    The class of this one Llama is exchanged for a subclass: that also catches ``llm.cache = ...``, and unlike wrapped
    methods makes no reference cycle, so that dropping the Llama frees its model at once.
    """
    llm.__dict__[_ATTRIBUTE] = adapters
    llm.__class__ = _guarded(type(llm))
    llm._stack.callback(adapters.release)  # last in, first out: before context and model


def unguard(llm: _Untyped) -> None:
    """Undo `guard` once the adapter set is released. Idempotent."""
    if not isinstance(llm, GuardedLlama):
        return
    adapters, cache = _set_of(llm), llm.__dict__.get("cache")
    llm.__class__ = _class_before(llm)
    if cache is not None and adapters.origin != BASE:  # its plain keys are those of Llama(lora_path=...)'s adapter
        llm.cache = CachePartition(cache, BASE, adapters.origin)


def describe(active: Mapping[str, float]) -> str:
    """An adapter set in words."""
    return ", ".join(f"{name} at {scale:g}" for name, scale in active.items()) or "no adapter"
