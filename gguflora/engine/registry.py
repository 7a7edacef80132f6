"""The adapters that an engine has loaded, by name, and the number of requests that use each."""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gguflora.engine.adapter_sets import AdapterSet, Identity, check_name
from gguflora.errors import AdapterNameError, RequestError
from gguflora.placement.prefix import Prefix
from gguflora.runtime.bindings import Pointer
from gguflora.runtime.concatenated_adapters import ScaledLora

Embeddings: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """An adapter that requests can name.

    Attributes:
        id: number of the adapter, from 0. Never reused, because a client may remember the id of an unloaded adapter.
        name: name of the adapter.
        path: GGUF LoRA file or PEFT directory that it was loaded from.
        sha256: SHA-256 of the GGUF LoRA file, in hexadecimal.
        size: size of that file in bytes.
        method: PEFT's name of the training method, such as "LORA".
        load_id: number of loads that the engine had started before; different for each load.
        scale: scale in adapter sets that do not give one.
        warnings: what the conversion of a PEFT directory left out or could not check.
    """

    id: int
    name: str
    path: Path
    sha256: str
    size: int
    method: str
    load_id: int
    scale: float = 1.0
    warnings: tuple[str, ...] = ()

    @property
    def generation(self) -> int:
        """Old name of `load_id`."""
        return self.load_id


@dataclass(slots=True, eq=False)
class RegisteredAdapter:
    """A loaded adapter with its data in memory.

    Attributes:
        adapter: its public description.
        pointer: its ``llama_adapter_lora *``; None for a soft prompt.
        prefix: the embeddings, or keys and values, of a soft prompt; None for other adapters.
        invocation: the tokens at which an activated LoRA begins; empty for other adapters.
        users: number of requests that use it.
        removed: whether it has been unloaded or replaced.
        freed: whether its memory has been given back; only for the scheduler's thread.
    """

    adapter: LoadedAdapter
    pointer: Pointer | None
    prefix: Prefix | None = None
    invocation: tuple[int, ...] = ()
    users: int = 0
    removed: bool = False
    freed: bool = False


@dataclass(frozen=True, slots=True)
class AdapterPhase:
    """The adapters that compute some consecutive tokens of a request.

    Attributes:
        identity: identity of the KV cells that they compute.
        parts: the LoRAs that llama.cpp applies, with their scales.
    """

    identity: Identity
    parts: tuple[ScaledLora, ...]


NO_ADAPTERS: Final = AdapterPhase(frozenset(), ())


@dataclass(frozen=True)
class ResolvedSet:
    """The adapters that the names of a request's set stood for when the request was submitted.

    Attributes:
        names: names and scales of the set.
        members: the adapters and their scales.
        request_prefix: embeddings (n, n_embd) that the request itself puts in front of its tokens.
    """

    names: AdapterSet
    members: tuple[tuple[RegisteredAdapter, float], ...]
    request_prefix: Embeddings | None = None
    _phases: dict[frozenset[str], AdapterPhase] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def base_phase(self) -> AdapterPhase:
        """Adapters of the first token: all but activated LoRAs. Requests with equal ones share a context."""
        return self.phase(frozenset())

    @cached_property
    def invocations(self) -> dict[str, tuple[int, ...]]:
        """Invocation tokens of the activated LoRAs, by name."""
        return {
            registered.adapter.name: registered.invocation for registered, _ in self.members if registered.invocation
        }

    def phase(self, started: frozenset[str]) -> AdapterPhase:
        """Return the adapters that compute a token at which the activated LoRAs named in ``started`` have begun."""
        if started not in self._phases:
            waiting = self.invocations.keys() - started
            self._phases[started] = self._phase([m for m in self.members if m[0].adapter.name not in waiting])
        return self._phases[started]

    @cached_property
    def keys_and_values(self) -> Prefix | None:
        """The soft prompt of keys and values, which are written to the cache before anything is decoded."""
        return next((r.prefix for r, _ in self.members if r.prefix and r.prefix.embeddings is None), None)

    @cached_property
    def embeddings(self) -> Embeddings | None:
        """Embeddings (n, n_embd) to decode before the tokens: those of a soft prompt, then those of the request."""
        parts = [r.prefix.embeddings for r, _ in self.members if r.prefix and r.prefix.embeddings is not None]
        parts += [] if self.request_prefix is None else [self.request_prefix]
        return np.concatenate(parts, dtype=np.float32) if parts else None

    @property
    def n_before(self) -> int:
        """Number of positions before the first token."""
        n_prefix = self.keys_and_values.n_tokens if self.keys_and_values else 0
        return n_prefix + (0 if self.embeddings is None else len(self.embeddings))

    def _phase(self, members: Sequence[tuple[RegisteredAdapter, float]]) -> AdapterPhase:
        identity = {(registered.adapter.sha256, registered.adapter.load_id, scale) for registered, scale in members}
        if self.request_prefix is not None:
            identity.add((hashlib.sha256(self.request_prefix.tobytes()).hexdigest(), -1, 1.0))
        loras = [(registered, scale) for registered, scale in members if registered.pointer is not None]
        parts = [ScaledLora(each.pointer, each.adapter.path, each.adapter.sha256, scale) for each, scale in loras]
        return AdapterPhase(frozenset(identity), tuple(parts))


def _check_soft_prompts(members: Sequence[tuple[RegisteredAdapter, float]]) -> None:
    soft = [(registered.adapter.name, scale) for registered, scale in members if registered.prefix]
    for name, scale in soft:
        if scale != 1:
            raise RequestError(f"{name!r} is a soft prompt, which is on (1) or off (0); found the scale {scale:g}")
    if len(soft) > 1:
        raise RequestError(f"only one soft prompt can be applied at once, found {', '.join(name for name, _ in soft)}")


class AdapterRegistry:
    """The loaded adapters by name. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_name: dict[str, RegisteredAdapter] = {}
        self._ids = itertools.count()
        self._reserved: set[str] = set()
        self._load_ids = itertools.count()

    def reserve(self, name: str, replace: bool = False) -> tuple[int, int]:
        """Reserve a name while an adapter is being loaded.

        Args:
            name: name of the new adapter.
            replace: whether a loaded adapter may have the name already; its id then stays.

        Returns:
            The new adapter's id and load id.

        Raises:
            AdapterNameError: if the name is taken or malformed.
        """
        check_name(name)
        with self._lock:
            if name in self._reserved or (name in self._by_name and not replace):
                raise AdapterNameError(
                    f"an adapter named {name!r} is loaded already; unload it first, or use another name"
                )
            self._reserved.add(name)
            replaced = self._by_name.get(name)
            number = next(self._ids) if replaced is None else replaced.adapter.id
            return number, next(self._load_ids)

    def give_up(self, name: str) -> None:
        """Release a reserved name after its load has failed."""
        with self._lock:
            self._reserved.discard(name)

    def add(self, registered: RegisteredAdapter) -> RegisteredAdapter | None:
        """Add an adapter under its reserved name; return the adapter that it replaces, if there is one."""
        with self._lock:
            self._reserved.discard(registered.adapter.name)
            replaced = self._by_name.get(registered.adapter.name)
            if replaced is not None:
                replaced.removed = True
            self._by_name[registered.adapter.name] = registered
            return replaced

    def remove(self, name: str) -> RegisteredAdapter:
        """Remove an adapter from the registry and return it; requests that use it keep it.

        Raises:
            AdapterNameError: if no adapter of this name is loaded.
        """
        with self._lock:
            if name not in self._by_name:
                known = ", ".join(map(repr, self._by_name)) or "none"
                raise AdapterNameError(f"no adapter named {name!r:.80} is loaded; loaded: {known}")
            registered = self._by_name.pop(name)
            registered.removed = True
            return registered

    def take(self, names: AdapterSet, prefix: Embeddings | None = None) -> ResolvedSet:
        """Resolve the names of a request's adapter set, and count the request as a user until `give_back`.

        Args:
            names: names and scales of the set.
            prefix: embeddings (n, n_embd) that the request puts in front of its tokens.

        Raises:
            AdapterNameError: if an adapter has been unloaded.
            RequestError: if there are several soft prompts, or one has a scale other than 1.
        """
        with self._lock:
            missing = [name for name, _ in names if name not in self._by_name]
            if missing:
                raise AdapterNameError(f"the adapter {missing[0]!r:.80} is no longer loaded")
            members = tuple((self._by_name[name], scale) for name, scale in names)
            _check_soft_prompts(members)
            for registered, _ in members:
                registered.users += 1
            return ResolvedSet(names, members, prefix)

    def give_back(self, taken: ResolvedSet) -> list[RegisteredAdapter]:
        """End the use of a set by a request; return its adapters that are removed and have no users left."""
        with self._lock:
            for registered, _ in taken.members:
                registered.users -= 1
            return [registered for registered, _ in taken.members if registered.removed and not registered.users]

    def users(self, name: str) -> tuple[LoadedAdapter, int] | None:
        """Return the adapter that is loaded under a name, and the number of requests that use it; None if none is."""
        with self._lock:
            registered = self._by_name.get(name)
            return None if registered is None else (registered.adapter, registered.users)

    def check(self, names: AdapterSet) -> None:
        """Check that the loaded adapters of a set can be applied together at these scales.

        Raises:
            RequestError: if there are several soft prompts, or one has a scale other than 1.
        """
        with self._lock:
            _check_soft_prompts([(self._by_name[name], scale) for name, scale in names if name in self._by_name])

    def all(self) -> Sequence[RegisteredAdapter]:
        """Return the loaded adapters, sorted by id."""
        with self._lock:
            return sorted(self._by_name.values(), key=lambda registered: registered.adapter.id)

    def scales(self) -> dict[str, float]:
        """Return the default scale of each adapter, by name."""
        return {registered.adapter.name: registered.adapter.scale for registered in self.all()}
