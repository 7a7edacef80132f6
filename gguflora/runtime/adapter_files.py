"""From an adapter on disk to a GGUF LoRA file that llama.cpp can load safely."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gguflora._version import __version__
from gguflora.architectures.base_model import BaseModel
from gguflora.errors import HotSwapError
from gguflora.files.checksum import sha256_of
from gguflora.lora.convert import convert
from gguflora.lora.preflight import check_loadable

_TIMES_THE_BASE: Final = 32
_ALWAYS_READ: Final = 1 << 30

_KEPT_FILES: Final = 32
"""How many converted adapters the cache keeps, newest first."""


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """A checked GGUF LoRA file, its SHA-256, its size in bytes, and the method that trained it."""

    file: Path
    sha256: str
    size: int
    method: str


def open_adapter(location: Path, base: BaseModel) -> AdapterSource:
    """The GGUF LoRA at ``location``, or the one converted of the PEFT directory there, checked against ``base``.

    Raises:
        HotSwapError: if there is nothing, or it does not fit the base, or llama.cpp would abort or ignore a part of it.
        GgufError, AdapterError, ArchitectureError, MismatchError: if it cannot be read or converted.
    """
    if not location.exists():
        raise HotSwapError(f"{location}: no such file or directory; expected a GGUF LoRA file or a PEFT directory")
    if location.is_dir():
        file, method = _converted(location, base), _method(location)
    else:
        file, method = location, "LORA"
    check_loadable(file, base)
    return AdapterSource(file, sha256_of(file), file.stat().st_size, method)


def cache_folder() -> Path:
    """Where converted adapters are kept: ``gguflora/adapters`` below ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    below = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(below) / "gguflora" / "adapters"


def _converted(folder: Path, base: BaseModel) -> Path:
    """A PEFT directory as a GGUF LoRA, from the cache where it was converted for this base before."""
    cache = cache_folder()
    file = cache / f"{_cache_key(folder, base)}.gguf"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="new-", dir=cache) as new:
            written = Path(new) / f"{folder.resolve().name}.gguf"
            convert(folder, base.path, written)
            written.replace(file)
        _prune(cache)
    os.utime(file)
    return file


def _cache_key(folder: Path, base: BaseModel) -> str:
    """Hash of all that a conversion depends on; of the base, large as it is, its place, size and time."""
    stat = base.path.stat()
    digest = hashlib.sha256(
        json.dumps([__version__, str(base.path.resolve()), stat.st_size, stat.st_mtime_ns]).encode()
    )
    files = sorted(path for path in folder.iterdir() if path.is_file())
    _check_sizes(files, stat.st_size)
    for path in files:
        digest.update(f"\0{path.name}\0{sha256_of(path)}".encode())
    return digest.hexdigest()


def _check_sizes(files: Sequence[Path], base_bytes: int) -> None:
    """Raise before reading what can be no adapter of such a base for hours."""
    most = max(_TIMES_THE_BASE * base_bytes, _ALWAYS_READ)
    for path in files:
        if path.stat().st_size > most:
            raise HotSwapError(
                f"{path}: has {path.stat().st_size} bytes, more than {_TIMES_THE_BASE} times those of the base: "
                "this is no adapter of it"
            )


def _prune(cache: Path) -> None:
    files = sorted(cache.glob("*.gguf"), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in files[_KEPT_FILES:]:
        file.unlink(missing_ok=True)


def _method(folder: Path) -> str:
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # an mlx directory, say: converted all the same
        return "LORA"
    method = config.get("peft_type") if isinstance(config, dict) else None
    return method if isinstance(method, str) else "LORA"
