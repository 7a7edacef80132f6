"""The adapters an engine has loaded: names, and who uses them."""

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
        id: from 0, never given twice: a client may still know that of an adapter no longer loaded.
        path: where it was loaded from: a GGUF LoRA file or a PEFT directory.
        sha256: of the GGUF LoRA file, in hexadecimal.
        size: of that file, in bytes.
        method: how it was trained, in PEFT's words.
        generation: how many loads this engine had done before; no two loads have the same.
        scale: used where a set gives none.
    """

    id: int
    name: str
    path: Path
    sha256: str
    size: int
    method: str
    generation: int
    scale: float = 1.0


@dataclass(slots=True, eq=False)
class RegisteredAdapter:
    """A loaded adapter in memory.

    Attributes:
        pointer: its ``llama_adapter_lora *``; None for a soft prompt.
        prefix: of a soft prompt: what precedes the tokens.
        invocation: of an activated LoRA: the tokens that it begins to work at.
        users: number of requests that use it.
        removed: whether its name is gone.
    """

    adapter: LoadedAdapter
    pointer: Pointer | None
    prefix: Prefix | None = None
    invocation: tuple[int, ...] = ()
    users: int = 0
    removed: bool = False


@dataclass(frozen=True, slots=True)
class AdapterPhase:
    """The adapters that compute a stretch of a request's tokens.

    Attributes:
        identity: what KV cells computed by them depend on.
        parts: those of llama.cpp.
    """

    identity: Identity
    parts: tuple[ScaledLora, ...]


NO_ADAPTERS: Final = AdapterPhase(frozenset(), ())


@dataclass(frozen=True)
class ResolvedSet:
    """An adapter set of one request, resolved: what its names meant when it was submitted.

    Attributes:
        members: with their scales.
        request_prefix: embeddings that the request itself puts before its tokens.
    """

    names: AdapterSet
    members: tuple[tuple[RegisteredAdapter, float], ...]
    request_prefix: Embeddings | None = None
    _phases: dict[frozenset[str], AdapterPhase] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def base_phase(self) -> AdapterPhase:
        """What computes from the first token on: all but activated LoRAs. Requests that share it share a context."""
        return self.phase(frozenset())

    @cached_property
    def invocations(self) -> dict[str, tuple[int, ...]]:
        """Invocation tokens of the activated LoRAs, by name."""
        return {resident.adapter.name: resident.invocation for resident, _ in self.members if resident.invocation}

    def phase(self, started: frozenset[str]) -> AdapterPhase:
        """What computes where these of the activated LoRAs have begun."""
        if started not in self._phases:
            waiting = self.invocations.keys() - started
            self._phases[started] = self._phase([m for m in self.members if m[0].adapter.name not in waiting])
        return self._phases[started]

    @cached_property
    def keys_and_values(self) -> Prefix | None:
        """The soft prompt that is written to the cache before anything is decoded."""
        return next((r.prefix for r, _ in self.members if r.prefix and r.prefix.embeddings is None), None)

    @cached_property
    def embeddings(self) -> Embeddings | None:
        """Embeddings (n, n_embd) decoded before the tokens: those of a soft prompt, then the request's own."""
        parts = [r.prefix.embeddings for r, _ in self.members if r.prefix and r.prefix.embeddings is not None]
        parts += [] if self.request_prefix is None else [self.request_prefix]
        return np.concatenate(parts, dtype=np.float32) if parts else None

    @property
    def n_before(self) -> int:
        """Positions before the first token."""
        written = self.keys_and_values.n_tokens if self.keys_and_values else 0
        return written + (0 if self.embeddings is None else len(self.embeddings))

    def _phase(self, members: Sequence[tuple[RegisteredAdapter, float]]) -> AdapterPhase:
        of = {(resident.adapter.sha256, resident.adapter.generation, scale) for resident, scale in members}
        if self.request_prefix is not None:
            of.add((hashlib.sha256(self.request_prefix.tobytes()).hexdigest(), -1, 1.0))
        loras = [(resident, scale) for resident, scale in members if resident.pointer is not None]
        parts = [ScaledLora(each.pointer, each.adapter.path, each.adapter.sha256, scale) for each, scale in loras]
        return AdapterPhase(frozenset(of), tuple(parts))


def _check_soft_prompts(members: Sequence[tuple[RegisteredAdapter, float]]) -> None:
    soft = [(resident.adapter.name, scale) for resident, scale in members if resident.prefix]
    for name, scale in soft:
        if scale != 1:
            raise RequestError(f"{name!r} is a soft prompt, which is on (1) or off (0); found the scale {scale:g}")
    if len(soft) > 1:
        raise RequestError(f"only one soft prompt can precede the prompt, found {', '.join(name for name, _ in soft)}")


class AdapterRegistry:
    """All loaded adapters by name. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_name: dict[str, RegisteredAdapter] = {}
        self._numbers = itertools.count()
        self._reserved: dict[str, int] = {}
        self._generations = itertools.count()

    def reserve(self, name: str, replace: bool = False) -> tuple[int, int]:
        """Keep ``name`` for a load under way, which may ``replace`` another: the new adapter's id and generation.

        Raises:
            AdapterNameError: if it is taken or malformed.
        """
        check_name(name)
        with self._lock:
            if name in self._reserved or (name in self._by_name and not replace):
                raise AdapterNameError(
                    f"an adapter named {name!r} is loaded already; unload it first, or take another name"
                )
            number = next(self._numbers)
            self._reserved[name] = number
            return number, next(self._generations)

    def give_up(self, name: str) -> None:
        """The load under way has failed."""
        with self._lock:
            self._reserved.pop(name, None)

    def add(self, resident: RegisteredAdapter) -> RegisteredAdapter | None:
        """The load under way has succeeded; the adapter that had this name before, if any."""
        with self._lock:
            self._reserved.pop(resident.adapter.name, None)
            replaced = self._by_name.get(resident.adapter.name)
            if replaced is not None:
                replaced.removed = True
            self._by_name[resident.adapter.name] = resident
            return replaced

    def remove(self, name: str) -> RegisteredAdapter:
        """Take an adapter out; requests that use it still do.

        Raises:
            AdapterNameError: if there is none of this name.
        """
        with self._lock:
            if name not in self._by_name:
                known = ", ".join(map(repr, self._by_name)) or "none"
                raise AdapterNameError(f"no adapter named {name!r:.80} is loaded; loaded: {known}")
            resident = self._by_name.pop(name)
            resident.removed = True
            return resident

    def take(self, names: AdapterSet, prefix: Embeddings | None = None) -> ResolvedSet:
        """Resolve a set (with what the request puts before its tokens), and count its user until `give_back`.

        Raises:
            AdapterNameError: if a name is gone.
            RequestError: if there are several soft prompts, or one with another scale than 1.
        """
        with self._lock:
            gone = [name for name, _ in names if name not in self._by_name]
            if gone:
                raise AdapterNameError(f"no adapter named {gone[0]!r:.80} is loaded any more")
            members = tuple((self._by_name[name], scale) for name, scale in names)
            _check_soft_prompts(members)
            for resident, _ in members:
                resident.users += 1
            return ResolvedSet(names, members, prefix)

    def give_back(self, taken: ResolvedSet) -> list[RegisteredAdapter]:
        """A user has ended; the adapters that nobody can reach any more."""
        with self._lock:
            for resident, _ in taken.members:
                resident.users -= 1
            return [resident for resident, _ in taken.members if resident.removed and not resident.users]

    def all(self) -> Sequence[RegisteredAdapter]:
        """Those that have names, by id."""
        with self._lock:
            return sorted(self._by_name.values(), key=lambda resident: resident.adapter.id)

    def scales(self) -> dict[str, float]:
        """Default scale of each name."""
        return {resident.adapter.name: resident.adapter.scale for resident in self.all()}
