"""Measure how much an adapter changes each tensor of the base, once for each adapter file."""

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
    """Measures adapters with `gguflora.inspect`: each file once, and one file at a time.

    Args:
        base: the base model.
    """

    def __init__(self, base: Path) -> None:
        self._base = base
        self._lock = threading.Lock()
        self._measuring = threading.Lock()
        self._measured: dict[str, Future[Rows]] = {}

    def measure(self, path: Path, sha256: str) -> Future[Rows]:
        """Return a future of the adapter's deltas, one row for each tensor.

        The future fails with a `GgufloraError` if the adapter or the base can no longer be read; then the next call
        tries again.
        """
        with self._lock:
            if sha256 not in self._measured:
                self._measured[sha256] = Future()
                # a daemon thread, so that the server does not wait for it when it stops
                threading.Thread(target=self._measure, args=(path, sha256), name="changes", daemon=True).start()
            return self._measured[sha256]

    def _measure(self, path: Path, sha256: str) -> None:
        future = self._measured[sha256]
        try:
            with self._measuring:
                future.set_result([_row(change) for change in inspect(path, self._base).changes])
        except Exception as error:
            with self._lock:
                del self._measured[sha256]
            future.set_exception(error)


def _row(change: InspectedChange) -> dict[str, Any]:
    """Return one tensor's row; ``module`` is the name without the layer: ``attn_q``, ``ffn_down``, ``output``."""
    return {
        "name": change.name,
        "layer": layer_of(change.name),
        "module": _LAYER.sub("", change.name.removesuffix(".weight")),
        "rank": change.rank,
        "relative": change.relative,
        "problem": change.problem,
    }
