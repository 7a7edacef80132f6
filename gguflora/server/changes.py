"""How much an adapter changes each tensor of the base, measured once for each adapter file."""

from __future__ import annotations

import re
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final

from gguflora.files.gguf import layer_of
from gguflora.inspect import InspectedChange, inspect

_LAYER: Final = re.compile(r"blk\.\d+\.")
_Rows = list[dict[str, Any]]


class Changes:
    """Measures adapters with `gguflora.inspect`; each file once, however many ask at the same time."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self._lock = threading.Lock()
        self._measured: dict[str, Future[_Rows]] = {}

    def of(self, path: Path, sha256: str) -> _Rows:
        """The changes of the adapter at ``path``, one row for each tensor; waits until they are measured.

        Raises:
            GgufloraError: if the adapter or the base cannot be read any more; the next call tries again.
        """
        with self._lock:
            known = self._measured.get(sha256)
            future = self._measured.setdefault(sha256, Future())
        if known is not None:
            return known.result()
        try:
            future.set_result([_row(change) for change in inspect(path, self._base).changes])
        except BaseException as error:
            with self._lock:
                del self._measured[sha256]
            future.set_exception(error)
            raise
        return future.result()


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
