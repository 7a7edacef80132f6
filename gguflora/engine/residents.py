"""The adapters an engine has loaded: names, and who uses them."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gguflora.engine.adapter_sets import AdapterSet, Identity, check_name
from gguflora.errors import AdapterNameError
from gguflora.llama import Pointer


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """An adapter that requests can name.

    Attributes:
        id: the smallest number that was free when it was loaded, from 0.
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
class Resident:
    """A loaded adapter with its ``llama_adapter_lora *`` and the number of requests that use it."""

    adapter: LoadedAdapter
    pointer: Pointer
    users: int = 0
    removed: bool = False


@dataclass(frozen=True, slots=True)
class ResidentSet:
    """An adapter set of one request, resolved: what its names meant when it was submitted."""

    names: AdapterSet
    members: tuple[tuple[Resident, float], ...]

    @property
    def identity(self) -> Identity:
        """What KV cells computed under this set depend on."""
        return frozenset(
            (resident.adapter.sha256, resident.adapter.generation, scale) for resident, scale in self.members
        )

    @property
    def loras(self) -> list[tuple[Pointer, float]]:
        """For llama.cpp."""
        return [(resident.pointer, scale) for resident, scale in self.members]


class Residents:
    """All loaded adapters by name. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_name: dict[str, Resident] = {}
        self._reserved: dict[str, int] = {}
        self._generations = itertools.count()

    def reserve(self, name: str) -> tuple[int, int]:
        """Keep ``name`` for a load under way: the new adapter's id and generation.

        Raises:
            AdapterNameError: if it is taken or malformed.
        """
        check_name(name)
        with self._lock:
            if name in self._by_name or name in self._reserved:
                raise AdapterNameError(
                    f"an adapter named {name!r} is loaded already; unload it first, or take another name"
                )
            taken = {resident.adapter.id for resident in self._by_name.values()} | set(self._reserved.values())
            number = next(number for number in itertools.count() if number not in taken)
            self._reserved[name] = number
            return number, next(self._generations)

    def give_up(self, name: str) -> None:
        """The load under way has failed."""
        with self._lock:
            self._reserved.pop(name, None)

    def add(self, resident: Resident) -> None:
        """The load under way has succeeded."""
        with self._lock:
            self._reserved.pop(resident.adapter.name, None)
            self._by_name[resident.adapter.name] = resident

    def remove(self, name: str) -> Resident:
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

    def take(self, names: AdapterSet) -> ResidentSet:
        """Resolve a set, and count its user until `give_back`.

        Raises:
            AdapterNameError: if a name is gone.
        """
        with self._lock:
            gone = [name for name, _ in names if name not in self._by_name]
            if gone:
                raise AdapterNameError(f"no adapter named {gone[0]!r:.80} is loaded any more")
            members = tuple((self._by_name[name], scale) for name, scale in names)
            for resident, _ in members:
                resident.users += 1
            return ResidentSet(names, members)

    def give_back(self, taken: ResidentSet) -> list[Resident]:
        """A user has ended; the adapters that nobody can reach any more."""
        with self._lock:
            for resident, _ in taken.members:
                resident.users -= 1
            return [resident for resident, _ in taken.members if resident.removed and not resident.users]

    def all(self) -> Sequence[Resident]:
        """Those that have names, by id."""
        with self._lock:
            return sorted(self._by_name.values(), key=lambda resident: resident.adapter.id)

    def scales(self) -> dict[str, float]:
        """Default scale of each name."""
        return {resident.adapter.name: resident.adapter.scale for resident in self.all()}
