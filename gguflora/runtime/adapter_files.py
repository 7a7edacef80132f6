"""Turn an adapter on disk into a GGUF LoRA file that llama.cpp can load safely."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from gguflora._version import __version__
from gguflora.architectures.base_model import BaseModel
from gguflora.errors import HotSwapError
from gguflora.files.checksum import sha256_of
from gguflora.files.remote.cache import user_cache
from gguflora.files.small_files import CONFIG_BYTES, read_small_text
from gguflora.files.strict_json import to_json
from gguflora.lora.convert import convert
from gguflora.lora.preflight import check_loadable
from gguflora.system import storage

_MAX_TIMES_BASE: Final = 32
"""A file larger than this many times the base cannot be one of its adapters."""

_ALWAYS_ALLOWED_BYTES: Final = 1 << 30

_MAX_CACHED_FILES: Final = 32
"""Number of converted adapters in the cache; the least recently used ones are deleted."""


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """A GGUF LoRA file that has been checked against the base.

    Attributes:
        file: path of the GGUF LoRA file.
        sha256: SHA-256 of the file, in hexadecimal.
        size: size of the file in bytes.
        method: PEFT's name of the training method, such as "LORA".
        warnings: what the conversion of a PEFT directory left out or could not check.
    """

    file: Path
    sha256: str
    size: int
    method: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AdapterReading:
    """How adapters are read for a base.

    Attributes:
        text_only: take only the part of a multimodal model's adapter that changes the language model.
        trust_names: apply adapters by name and shape where the order of a tensor's rows is not known.
    """

    text_only: bool = False
    trust_names: bool = False

    def changed(self, text_only: bool | None, trust_names: bool | None) -> AdapterReading:
        """Return the same with other options, where they are given."""
        return AdapterReading(
            self.text_only if text_only is None else text_only,
            self.trust_names if trust_names is None else trust_names,
        )

    def open(self, location: Path, base: BaseModel) -> AdapterSource:
        """Call `open_adapter` with these options."""
        return open_adapter(location, replace(base, trust_names=self.trust_names), text_only=self.text_only)


def open_adapter(location: Path, base: BaseModel, *, text_only: bool = False) -> AdapterSource:
    """Return a GGUF LoRA file for the adapter at ``location``, checked against ``base``.

    A PEFT directory is converted first; the result is cached.

    Args:
        location: GGUF LoRA file or PEFT directory.
        base: model that will run the adapter.
        text_only: take only the part of a multimodal model's adapter that changes the language model.

    Raises:
        HotSwapError: if ``location`` does not exist, does not fit the base, or holds tensors that would make llama.cpp
            abort or that it would ignore.
        GgufError, AdapterError, ArchitectureError, MismatchError: if the adapter cannot be read or converted.
    """
    if not location.exists():
        raise HotSwapError(f"{location}: no such file or directory; expected a GGUF LoRA file or a PEFT directory")
    if location.is_dir():
        file, warnings = _converted(location, base, text_only=text_only)
        method = _method(location)
    else:
        file, method, warnings = location, "LORA", ()
    check_loadable(file, base)
    return AdapterSource(file, sha256_of(file), file.stat().st_size, method, warnings)


def cache_folder() -> Path:
    """Return the directory of converted adapters: ``gguflora/adapters`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    below = user_cache()
    return Path(below) / "gguflora" / "adapters"


def _converted(folder: Path, base: BaseModel, *, text_only: bool) -> tuple[Path, tuple[str, ...]]:
    """Convert a PEFT directory, or take the result of an earlier conversion from the cache.

    Returns:
        The GGUF LoRA file, and the warnings of the conversion.
    """
    cache, options = cache_folder(), {"text_only": text_only, "trust_names": base.trust_names}
    file = cache / f"{_cache_key(folder, base, options)}.gguf"
    warnings = _cached_warnings(file)
    if warnings is None:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="new-", dir=cache) as new:
            written = Path(new) / f"{folder.resolve().name}.gguf"
            warnings = convert(folder, base.path, written, text_only=text_only, trust_names=base.trust_names).warnings
            noted = written.with_suffix(".json")
            noted.write_text(to_json(warnings), encoding="utf-8")
            noted.replace(file.with_suffix(".json"))
            storage.replace(written, file)
        _prune(cache)
    os.utime(file)
    return file, warnings


def _cached_warnings(file: Path) -> tuple[str, ...] | None:
    """Return the warnings of an earlier conversion to this file of the cache, or None if it must be converted."""
    try:
        noted = json.loads(read_small_text(file.with_suffix(".json")))
    except (OSError, ValueError):
        return None
    is_whole = file.exists() and isinstance(noted, list) and all(isinstance(text, str) for text in noted)
    return tuple(noted) if is_whole else None


def _cache_key(folder: Path, base: BaseModel, options: Mapping[str, bool]) -> str:
    """Hash everything that a conversion depends on.

    The base is too large to read each time, so its path, size and modification time stand for its content.
    """
    stat = base.path.stat()
    digest = hashlib.sha256(
        to_json([__version__, str(base.path.resolve()), stat.st_size, stat.st_mtime_ns, options]).encode()
    )
    files = sorted(path for path in folder.iterdir() if path.is_file())
    _check_sizes(files, stat.st_size)
    for path in files:
        digest.update(f"\0{path.name}\0{sha256_of(path)}".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _check_sizes(files: Sequence[Path], base_bytes: int) -> None:
    """Raise if a file is too large to be an adapter of this base, instead of hashing it for hours."""
    limit = max(_MAX_TIMES_BASE * base_bytes, _ALWAYS_ALLOWED_BYTES)
    for path in files:
        if path.stat().st_size > limit:
            raise HotSwapError(
                f"{path}: has {path.stat().st_size} bytes, more than {_MAX_TIMES_BASE} times the size of the base; "
                "this cannot be an adapter of it"
            )


def _prune(cache: Path) -> None:
    files = sorted(cache.glob("*.gguf"), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in files[_MAX_CACHED_FILES:]:
        file.unlink(missing_ok=True)
        file.with_suffix(".json").unlink(missing_ok=True)


def _method(folder: Path) -> str:
    try:
        config = json.loads(read_small_text(folder / "adapter_config.json", CONFIG_BYTES))
    except (OSError, ValueError):  # for example a directory of mlx-lm, which has no such file
        return "LORA"
    method = config.get("peft_type") if isinstance(config, dict) else None
    return method if isinstance(method, str) else "LORA"
