"""Private copies of adapters that clients name: what was checked is what is loaded, converted and measured.

A path that is checked and then opened again by its name can name something else by then. So each file is opened once,
checked by its descriptor, and copied from it to a folder that only this server writes to.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
import threading
from pathlib import Path
from typing import Final

from gguflora.server.errors import Failure
from gguflora.system.descriptors import open_file

_READ: Final = re.compile(r".*\.(json|jinja|safetensors|bin|gguf|npz|txt)|tokenizer\.model", re.IGNORECASE)
"""Names of the files of an adapter; a training run leaves larger ones beside them."""
_FOLDERS: Final = ("", "additional_chat_templates")


class PrivateCopies:
    """Copies of the adapters that clients have loaded, by name. Thread-safe; they vanish with this object."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="gguflora-loaded-")
        self._lock = threading.Lock()
        self._by_name: dict[str, Path] = {}

    def make(self, path: Path, inside: Path) -> Path:
        """Copy an adapter and return the path of the copy, which has its name.

        Args:
            path: a file or directory inside of ``inside``; see `gguflora.server.adapters.path_inside`.
            inside: the directory that the server loads adapters from; links are followed only within it.

        Raises:
            Failure: if a file is not inside any more.
        """
        target = Path(tempfile.mkdtemp(dir=self._folder.name)) / path.name
        try:
            if not path.is_dir():
                _copy(path, target, inside)
                return target
            for name in _FOLDERS:
                for entry in sorted((path / name).iterdir()) if (path / name).is_dir() else ():
                    if _READ.fullmatch(entry.name) and not entry.is_dir():
                        (target / name).mkdir(parents=True, exist_ok=True)
                        _copy(entry, target / name / entry.name, inside)
            target.mkdir(exist_ok=True)
        except OSError as error:
            self.remove(target)
            raise _refused() from error
        except Failure:
            self.remove(target)
            raise
        return target

    def keep(self, name: str, copy: Path) -> None:
        """Keep a copy for as long as the adapter ``name`` is loaded, in place of its former one."""
        with self._lock:
            former, self._by_name[name] = self._by_name.get(name), copy
        if former is not None:
            self.remove(former)

    def forget(self, name: str) -> None:
        """Remove the copy of an adapter that was unloaded."""
        with self._lock:
            former = self._by_name.pop(name, None)
        if former is not None:
            self.remove(former)

    @staticmethod
    def remove(copy: Path) -> None:
        """Remove a copy."""
        shutil.rmtree(copy.parent, ignore_errors=True)


def _copy(path: Path, target: Path, inside: Path) -> None:
    """Copy one file, after checking by its descriptor that it is a regular file inside of a directory."""
    handle = open_file(path)
    with os.fdopen(handle, "rb") as source:
        opened, named = os.fstat(handle), path.resolve()
        found = named.stat()
        is_same = (opened.st_dev, opened.st_ino) == (found.st_dev, found.st_ino)
        if not (stat.S_ISREG(opened.st_mode) and is_same and named.is_relative_to(inside)):
            raise _refused()
        with target.open("xb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)


def _refused() -> Failure:
    return Failure(
        400, "lora_path was changed while it was read, or leads out of its directory", "bad_path", "lora_path"
    )
