"""Calls into llama.cpp's C API, through llama-cpp-python: adapters, soft prompts, memory, log.

This module imports llama_cpp, so modules that ``import gguflora`` loads must not import it at their top.
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
from numpy.typing import NDArray

from gguflora.errors import HotSwapError, UnsupportedAdapterError
from gguflora.placement.prefix import Prefix
from gguflora.runtime.kv_cache import fill_state

Pointer: TypeAlias = Any
"""A ``llama_adapter_lora *`` as ctypes holds it; llama_cpp has no type annotations."""

_WINDOW_PERIODS: Final = {"gemma2": 2, "gpt-oss": 2, "cohere2": 4, "exaone4": 4, "llama4": 4, "olmo2": 4, "gemma3": 6}
"""Architectures with sliding-window attention: the last layer of every n layers attends to all positions."""

_MROPE_TYPES: Final = {llama_cpp.LLAMA_ROPE_TYPE_MROPE, llama_cpp.LLAMA_ROPE_TYPE_IMROPE}
"""Rotary embeddings that take four positions for each embedding; in text, three of them are equal and one is 0."""

_WARN, _ERROR, _CONTINUED = 3, 4, 5  # enum ggml_log_level


class _Log:
    """A callback for llama.cpp's log that stores serious messages and forwards the others to the previous callback.

    llama.cpp has one callback for the whole process and reads it without a lock, so the C function must outlive every
    thread that may be about to call it. Therefore there is a single instance, which is never freed.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.messages: list[str] = []
        self._min_level, self._hidden_from = _WARN, _ERROR
        self.callback: Final = llama_cpp.llama_log_callback(self._receive)
        self._previous: Any = None
        self._previous_data: Any = None
        self._level = 0

    def _receive(self, level: int, text: bytes, _: Any) -> None:  # noqa: ANN401  (a void pointer)
        self._level = self._level if level == _CONTINUED else level
        if self._min_level <= self._level <= _ERROR:
            self.messages.append(text.decode("utf-8", errors="replace"))
        if self._level < self._hidden_from and self._previous:
            self._previous(level, text, self._previous_data)

    def start(self, min_level: int, hidden_from: int) -> None:
        self.messages, self._min_level, self._hidden_from = [], min_level, hidden_from
        self._previous, self._previous_data = _get_log_callback()
        llama_cpp.llama_log_set(self.callback, None)

    def stop(self) -> None:
        # if somebody else has set a callback meanwhile, the previous one may have been freed: leave theirs
        if _address(_get_log_callback()[0]) == _address(self.callback):
            llama_cpp.llama_log_set(self._previous, self._previous_data)


def _get_log_callback() -> tuple[Any, ctypes.c_void_p]:
    """Return llama.cpp's log callback and the user data that llama.cpp passes to it."""
    callback, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(callback), ctypes.byref(data))
    return callback, data


def _address(function: Any) -> int | None:  # noqa: ANN401  (a function pointer of ctypes)
    return ctypes.cast(function, ctypes.c_void_p).value


_LOG: Final = _Log()


@contextmanager
def captured_log(min_level: int = _WARN, hidden_from: int = _ERROR) -> Iterator[list[str]]:
    """Collect llama.cpp's log messages while the block runs.

    Args:
        min_level: lowest ``ggml_log_level`` to collect.
        hidden_from: lowest level that is not forwarded to the callback that was set before.

    Yields:
        The messages so far.
    """
    with _LOG.lock:
        _LOG.start(min_level, hidden_from)
        try:
            yield _LOG.messages
        finally:
            _LOG.stop()


@dataclass(frozen=True, slots=True, eq=False)
class HotAdapter:
    """An adapter loaded for one Llama.

    Attributes:
        name: name of the adapter.
        sha256: SHA-256 of the file that it was loaded from, in hexadecimal.
        pointer: its ``llama_adapter_lora *``; None for a soft prompt.
        path: GGUF LoRA file or PEFT directory that it was loaded from.
        owned: whether gguflora frees it; false for the adapter of ``Llama(lora_path=...)``.
        invocation: the tokens at which an activated LoRA begins; empty for other adapters.
        prefix: the embeddings, or keys and values, of a soft prompt; None for other adapters.
    """

    name: str
    sha256: str
    pointer: Pointer | None
    path: Path
    owned: bool = True
    invocation: tuple[int, ...] = ()
    prefix: Prefix | None = None


def load_lora(model: int, path: Path) -> Pointer:
    """Load a GGUF LoRA for ``model`` (a ``llama_model *``) and return its ``llama_adapter_lora *``.

    Raises:
        HotSwapError: if llama.cpp cannot load it, with llama.cpp's log text.
    """
    with captured_log(hidden_from=_WARN) as log:  # llama.cpp warns of each tensor with a repacked base weight: harmless
        pointer: Pointer = llama_cpp.llama_adapter_lora_init(model, os.fsencode(path))
    if not pointer:  # a null pointer of ctypes is not None
        raise HotSwapError(f"{path}: llama.cpp could not load this adapter: {reason_of(log)}")
    return pointer


def reason_of(log: Sequence[str]) -> str:
    """Return log messages as one line, to quote in an error."""
    return " ".join("".join(log).split()) or "it gave no reason"


def free_lora(pointer: Pointer | None) -> None:
    """Free an adapter; do nothing for None. No context may still apply it: llama.cpp does not check."""
    if pointer:
        llama_cpp.llama_adapter_lora_free(pointer)


def set_loras(context: int, loras: Sequence[tuple[Pointer, float]]) -> None:
    """Apply exactly the adapters ``loras`` (pointer, scale) in ``context`` (a ``llama_context *``).

    Raises:
        HotSwapError: if llama.cpp refuses the set.
    """
    count = len(loras)
    pointers = (llama_cpp.llama_adapter_lora_p_ctypes * count)(*(pointer for pointer, _ in loras))
    scales = (ctypes.c_float * count)(*(scale for _, scale in loras))
    status = llama_cpp.llama_set_adapters_lora(context, pointers, count, scales)
    if status:
        raise HotSwapError(f"llama.cpp refused a set of {count} adapters (status {status})")


def clear_memory(context: int, n_vocab: int) -> None:
    """Clear the KV cache and the recurrent state of ``context``.

    Normally only the bookkeeping is cleared, which is fast. If the last logits hold NaN, the numbers are cleared too:
    attention multiplies masked cells by 0, and 0 * NaN would spoil the tokens of the next adapter.
    """
    memory = llama_cpp.llama_get_memory(context)
    if memory is None:  # encoder-only models have no memory
        return
    stateful = is_stateful(llama_cpp.llama_get_model(context))
    llama_cpp.llama_memory_clear(memory, stateful or _last_logits_hold_nan(context, n_vocab))


def is_stateful(model: int) -> bool:
    """Return whether a model has a recurrent state, which cannot be rewound by a few tokens."""
    return bool(llama_cpp.llama_model_is_recurrent(model) or llama_cpp.llama_model_is_hybrid(model))


def begins_with(context: int, prefix: Prefix, sequence: int = 0) -> bool:
    """Return whether a sequence that was given ``prefix`` still holds all of it.

    A sliding-window cache drops positions that have left the window.
    """
    memory = llama_cpp.llama_get_memory(context)
    if llama_cpp.llama_memory_seq_pos_max(memory, sequence) < prefix.n_tokens - 1:
        return False
    stateful = is_stateful(llama_cpp.llama_get_model(context))
    return stateful or llama_cpp.llama_memory_seq_pos_min(memory, sequence) == 0


def invocation_of(pointer: Pointer) -> tuple[int, ...]:
    """Return the invocation tokens of an activated LoRA; an empty tuple for other adapters."""
    count = llama_cpp.llama_adapter_get_alora_n_invocation_tokens(pointer)
    return tuple(llama_cpp.llama_adapter_get_alora_invocation_tokens(pointer)[:count]) if count else ()


def _last_logits_hold_nan(context: int, n_vocab: int) -> bool:
    with captured_log():  # llama.cpp logs an error if there are no logits yet, which is fine here
        logits = llama_cpp.llama_get_logits_ith(context, -1)
    return bool(logits) and bool(np.isnan(np.ctypeslib.as_array(logits, (n_vocab,))).any())


def put_prefix(context: int, prefix: Prefix, sequence: int = 0) -> None:
    """Put a soft prompt into an empty sequence of ``context``, at positions 0 to ``prefix.n_tokens`` - 1.

    Raises:
        HotSwapError: if llama.cpp cannot decode it.
        UnsupportedAdapterError: if it consists of keys and values that cannot be written to this model's cache.
    """
    if prefix.embeddings is not None:
        _decode(context, sequence, prefix.embeddings)
        return
    candidates = _attention_caches(llama_cpp.llama_get_model(context), len(prefix.keys))
    _decode(context, sequence, np.zeros(prefix.n_tokens, np.int32))
    size = llama_cpp.llama_state_seq_get_size(context, sequence)
    state = (ctypes.c_uint8 * size)()
    llama_cpp.llama_state_seq_get_data(context, state, size, sequence)
    filled = fill_state(bytes(state), prefix, candidates)
    with captured_log() as log:
        done = llama_cpp.llama_state_seq_set_data(
            context, (ctypes.c_uint8 * size).from_buffer_copy(filled), size, sequence
        )
    if done != size:
        raise HotSwapError(f"llama.cpp refused the keys and values of a soft prompt: {reason_of(log)}")


def position_factors(model: int) -> tuple[int, ...]:
    """Return the factors that turn an embedding's position into each of the positions that ``model`` takes for it."""
    return (1, 1, 1, 0) if llama_cpp.llama_model_rope_type(model) in _MROPE_TYPES else (1,)


def _decode(context: int, sequence: int, inputs: NDArray[Any]) -> None:
    """Decode tokens (n,) or embeddings (n, n_embd) from position 0 on, without computing logits."""
    step = llama_cpp.llama_n_batch(context)
    factors = position_factors(llama_cpp.llama_get_model(context)) if inputs.ndim == 2 else (1,)
    for start in range(0, len(inputs), step):
        part = np.ascontiguousarray(inputs[start : start + step])
        count = len(part)
        ids = (llama_cpp.llama_seq_id * 1)(sequence)
        id_pointers = (ctypes.POINTER(llama_cpp.llama_seq_id) * count)(*[ids] * count)
        pointer = ctypes.POINTER(ctypes.c_int32 if part.ndim == 1 else ctypes.c_float)
        batch = llama_cpp.llama_batch(
            n_tokens=count,
            pos=(llama_cpp.llama_pos * (count * len(factors)))(
                *(factor * position for factor in factors for position in range(start, start + count))
            ),
            n_seq_id=(ctypes.c_int32 * count)(*[1] * count),
            seq_id=id_pointers,
            logits=(ctypes.c_int8 * count)(),
            **{"token" if part.ndim == 1 else "embd": part.ctypes.data_as(pointer)},
        )
        status = llama_cpp.llama_decode(context, batch)
        if status:
            raise HotSwapError(
                f"llama.cpp could not decode a soft prompt of {len(inputs)} positions (status {status}); "
                "open the model with a larger n_ctx if the context is too small for it"
            )


def _attention_caches(model: int, n_layers: int) -> list[list[list[int]]]:
    """Return the possible divisions of the layers into attention caches.

    All layers share one cache, or full-attention layers have one and sliding-window layers another.
    """
    if is_stateful(model):
        raise UnsupportedAdapterError(
            "a model with a recurrent state cannot take keys and values in front of the prompt; train LORA"
        )
    layers = list(range(n_layers))
    architecture = _metadata(model, "general.architecture") or ""
    pattern = _metadata(model, f"{architecture}.attention.sliding_window_pattern") or ""
    if pattern.startswith("["):
        has_window = [word.strip() in {"true", "1"} for word in pattern.strip("[]").split(",")]
    else:
        period = int(pattern or _WINDOW_PERIODS.get(architecture, 1))
        has_window = [layer % period < period - 1 for layer in layers]
    two_caches = [[layer for layer in layers if has_window[layer] == window] for window in (False, True)]
    return [[layers], two_caches]


def _metadata(model: int, key: str) -> str | None:
    buffer = ctypes.create_string_buffer(1 << 16)
    length = llama_cpp.llama_model_meta_val_str(model, key.encode(), buffer, len(buffer))
    return buffer.value.decode(errors="replace") if length >= 0 else None
