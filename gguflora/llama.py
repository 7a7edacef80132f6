"""llama.cpp's side of hot-swapping: the few calls into the library that llama-cpp-python carries, and its log text.

Imports llama_cpp, so nothing that ``import gguflora`` reaches may import this module at its top.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import llama_cpp
import numpy as np

from gguflora.errors import HotSwapError

Pointer: TypeAlias = Any
"""A ``llama_adapter_lora *`` of ctypes; llama_cpp has no types."""

_WARN, _ERROR, _CONTINUED = 3, 4, 5  # enum ggml_log_level


class _Log:
    """Listens to llama.cpp's log: keeps what is serious, hands the rest on to the listener before it.

    llama.cpp has one listener for the whole process and reads it without a lock, so the C function must outlive every
    thread that may be about to call it: there is one of these, and it is never freed.
    """

    def __init__(self) -> None:
        self.turn = threading.Lock()
        self.kept: list[str] = []
        self._least = _WARN
        self.callback: Final = llama_cpp.llama_log_callback(self._hear)
        self._before: Any = None
        self._before_data: Any = None
        self._level = 0

    def _hear(self, level: int, text: bytes, _: Any) -> None:  # noqa: ANN401  (a void pointer)
        self._level = self._level if level == _CONTINUED else level
        if self._least <= self._level <= _ERROR:
            self.kept.append(text.decode("utf-8", errors="replace"))
        if self._level != _ERROR and self._before:
            self._before(level, text, self._before_data)

    def start(self, least: int) -> None:
        self.kept, self._least = [], least
        self._before, self._before_data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
        llama_cpp.llama_log_get(ctypes.byref(self._before), ctypes.byref(self._before_data))
        llama_cpp.llama_log_set(self.callback, None)

    def stop(self) -> None:
        llama_cpp.llama_log_set(self._before, self._before_data)


_LOG: Final = _Log()


@contextmanager
def captured_log(least: int = _WARN) -> Iterator[list[str]]:
    """Collect what llama.cpp says, warnings and errors by default; the listener before is put back afterwards."""
    with _LOG.turn:
        _LOG.start(least)
        try:
            yield _LOG.kept
        finally:
            _LOG.stop()


@dataclass(frozen=True, slots=True, eq=False)
class LoadedAdapter:
    """An adapter in llama.cpp's memory.

    Attributes:
        sha256: of the file it was loaded from, in hexadecimal.
        pointer: its ``llama_adapter_lora *``.
        owned: whether gguflora frees it (not so for the one of ``Llama(lora_path=...)``).
    """

    name: str
    sha256: str
    pointer: Pointer
    owned: bool = True


def load_lora(model: int, path: Path) -> Pointer:
    """Load a GGUF LoRA for ``model`` (a ``llama_model *``): its ``llama_adapter_lora *``.

    Raises:
        HotSwapError: with llama.cpp's log text.
    """
    with captured_log() as log:
        pointer: Pointer = llama_cpp.llama_adapter_lora_init(model, os.fsencode(path))
    if not pointer:  # a null pointer, which in ctypes is not None
        said = " ".join("".join(log).split()) or "it gave no reason"
        raise HotSwapError(f"{path}: llama.cpp could not load this adapter: {said}")
    return pointer


def free_lora(pointer: Pointer) -> None:
    """Free an adapter. It must be in no context's set: llama.cpp does not look."""
    llama_cpp.llama_adapter_lora_free(pointer)


def set_loras(context: int, loras: Sequence[tuple[Pointer, float]]) -> None:
    """Make ``loras`` (pointer, scale) the complete adapter set of ``context`` (a ``llama_context *``).

    Raises:
        HotSwapError: if llama.cpp refuses.
    """
    count = len(loras)
    pointers = (llama_cpp.llama_adapter_lora_p_ctypes * count)(*(pointer for pointer, _ in loras))
    scales = (ctypes.c_float * count)(*(scale for _, scale in loras))
    status = llama_cpp.llama_set_adapters_lora(context, pointers, count, scales)
    if status:
        raise HotSwapError(f"llama.cpp refused a set of {count} adapters (status {status})")


def clear_memory(context: int, n_vocab: int) -> None:
    """Forget every token of ``context``: KV cache and recurrent state.

    Only the bookkeeping is cleared, which takes no time, unless the last logits hold NaN: a masked cell counts 0 times
    its value, and 0 * NaN would carry a diverged adapter's numbers into the tokens of the next one.
    """
    memory = llama_cpp.llama_get_memory(context)
    if memory is None:  # encoder-only models keep nothing
        return
    model = llama_cpp.llama_get_model(context)
    stateful = llama_cpp.llama_model_is_recurrent(model) or llama_cpp.llama_model_is_hybrid(model)
    llama_cpp.llama_memory_clear(memory, stateful or _last_logits_hold_nan(context, n_vocab))


def _last_logits_hold_nan(context: int, n_vocab: int) -> bool:
    with captured_log():  # no logits yet is no error here, but llama.cpp logs it as one
        logits = llama_cpp.llama_get_logits_ith(context, -1)
    return bool(logits) and bool(np.isnan(np.ctypeslib.as_array(logits, (n_vocab,))).any())
