"""How much an adapter changes each tensor of the base, measured once for each adapter file."""

from __future__ import annotations

import re
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final

from gguflora.files.gguf import layer_of
from gguflora.lora.inspect import InspectedChange, inspect

_LAYER: Final = re.compile(r"blk\.\d+\.")
Rows = list[dict[str, Any]]


class AdapterStats:
    """Measures adapters with `gguflora.inspect`; each file once, however many ask, and one at a time."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        self._measured: dict[str, Future[Rows]] = {}

    def measure(self, path: Path, sha256: str) -> Future[Rows]:
        """The changes of the adapter at ``path``, one row for each tensor, when they are measured.

        A `GgufloraError` if the adapter or the base cannot be read any more; the next call tries again.
        """
        with self._lock:
            if sha256 not in self._measured:
                self._measured[sha256] = Future()
                # a daemon: the server's end does not wait for it
                threading.Thread(target=self._measure, args=(path, sha256), name="changes", daemon=True).start()
            return self._measured[sha256]

    def _measure(self, path: Path, sha256: str) -> None:
        future = self._measured[sha256]
        try:
            with self._turn:
                future.set_result([_row(change) for change in inspect(path, self._base).changes])
        except Exception as error:
            with self._lock:
                del self._measured[sha256]
            future.set_exception(error)


def _row(change: InspectedChange) -> dict[str, Any]:
    """One tensor; ``module`` is its name without the layer: ``attn_q``, ``ffn_down``, ``output``."""
    return {
        "name": change.name,
        "layer": layer_of(change.name),
        "module": _LAYER.sub("", change.name.removesuffix(".weight")),
        "rank": change.rank,
        "relative": change.relative,
        "problem": change.problem,
    }
