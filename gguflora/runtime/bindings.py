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
from numpy.typing import NDArray

from gguflora.errors import HotSwapError, UnsupportedAdapterError
from gguflora.placement.prefix import Prefix
from gguflora.runtime.kv_cache import fill_state

Pointer: TypeAlias = Any
"""A ``llama_adapter_lora *`` of ctypes; llama_cpp has no types."""

_FULL_EVERY: Final = {"gemma2": 2, "gpt-oss": 2, "cohere2": 4, "exaone4": 4, "llama4": 4, "olmo2": 4, "gemma3": 6}
"""Of architectures whose layers attend to a window: every so many layers one attends to all positions."""

_SPATIAL: Final = {llama_cpp.LLAMA_ROPE_TYPE_MROPE, llama_cpp.LLAMA_ROPE_TYPE_IMROPE}
"""Rotary embeddings that want four positions of each embedding; of text three are equal and one is 0."""

_WARN, _ERROR, _CONTINUED = 3, 4, 5  # enum ggml_log_level


class _Log:
    """Listens to llama.cpp's log: keeps what is serious, hands what is less on to the listener before it.

    llama.cpp has one listener for the whole process and reads it without a lock, so the C function must outlive every
    thread that may be about to call it: there is one of these, and it is never freed.
    """

    def __init__(self) -> None:
        self.llama_lock = threading.Lock()
        self.kept: list[str] = []
        self._least, self._kept_back = _WARN, _ERROR
        self.callback: Final = llama_cpp.llama_log_callback(self._hear)
        self._before: Any = None
        self._before_data: Any = None
        self._level = 0

    def _hear(self, level: int, text: bytes, _: Any) -> None:  # noqa: ANN401  (a void pointer)
        self._level = self._level if level == _CONTINUED else level
        if self._least <= self._level <= _ERROR:
            self.kept.append(text.decode("utf-8", errors="replace"))
        if self._level < self._kept_back and self._before:
            self._before(level, text, self._before_data)

    def start(self, least: int, kept_back: int) -> None:
        self.kept, self._least, self._kept_back = [], least, kept_back
        self._before, self._before_data = _listener()
        llama_cpp.llama_log_set(self.callback, None)

    def stop(self) -> None:
        # if somebody has set another since, the one before may have been freed
        if _address(_listener()[0]) == _address(self.callback):
            llama_cpp.llama_log_set(self._before, self._before_data)


def _listener() -> tuple[Any, ctypes.c_void_p]:
    """Whom llama.cpp tells of its log, and what it hands that function besides."""
    listener, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(listener), ctypes.byref(data))
    return listener, data


def _address(function: Any) -> int | None:  # noqa: ANN401  (a function pointer of ctypes)
    return ctypes.cast(function, ctypes.c_void_p).value


_LOG: Final = _Log()


@contextmanager
def captured_log(least: int = _WARN, kept_back: int = _ERROR) -> Iterator[list[str]]:
    """Collect what llama.cpp says, warnings and errors by default; the listener before is put back afterwards.

    Until then that one hears only what is below ``kept_back``.
    """
    with _LOG.llama_lock:
        _LOG.start(least, kept_back)
        try:
            yield _LOG.kept
        finally:
            _LOG.stop()


@dataclass(frozen=True, slots=True, eq=False)
class HotAdapter:
    """An adapter in llama.cpp's memory.

    Attributes:
        sha256: of the file it was loaded from, in hexadecimal.
        pointer: its ``llama_adapter_lora *``; None of a soft prompt.
        path: what it was loaded from: a GGUF LoRA file or a PEFT directory.
        owned: whether gguflora frees it (not so for the one of ``Llama(lora_path=...)``).
        invocation: of an activated LoRA, the tokens that it begins with.
        prefix: of a soft prompt, what it puts in front of the first token.
    """

    name: str
    sha256: str
    pointer: Pointer | None
    path: Path
    owned: bool = True
    invocation: tuple[int, ...] = ()
    prefix: Prefix | None = None


def load_lora(model: int, path: Path) -> Pointer:
    """Load a GGUF LoRA for ``model`` (a ``llama_model *``): its ``llama_adapter_lora *``.

    Raises:
        HotSwapError: with llama.cpp's log text.
    """
    with captured_log(kept_back=_WARN) as log:  # it warns of every tensor whose base weight is repacked, to no effect
        pointer: Pointer = llama_cpp.llama_adapter_lora_init(model, os.fsencode(path))
    if not pointer:  # a null pointer, which in ctypes is not None
        said = " ".join("".join(log).split()) or "it gave no reason"
        raise HotSwapError(f"{path}: llama.cpp could not load this adapter: {said}")
    return pointer


def free_lora(pointer: Pointer | None) -> None:
    """Free an adapter, if it is one. It must be in no context's set: llama.cpp does not look."""
    if pointer:
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
    stateful = is_stateful(llama_cpp.llama_get_model(context))
    llama_cpp.llama_memory_clear(memory, stateful or _last_logits_hold_nan(context, n_vocab))


def is_stateful(model: int) -> bool:
    """Whether a model keeps a running state, which cannot go back by a few tokens."""
    return bool(llama_cpp.llama_model_is_recurrent(model) or llama_cpp.llama_model_is_hybrid(model))


def begins_with(context: int, prefix: Prefix, sequence: int = 0) -> bool:
    """Whether a sequence that was given ``prefix`` still holds all of it.

    A cache of layers with a window forgets what has left the window.
    """
    memory = llama_cpp.llama_get_memory(context)
    if llama_cpp.llama_memory_seq_pos_max(memory, sequence) < prefix.n_tokens - 1:
        return False
    stateful = is_stateful(llama_cpp.llama_get_model(context))
    return stateful or llama_cpp.llama_memory_seq_pos_min(memory, sequence) == 0


def invocation_of(pointer: Pointer) -> tuple[int, ...]:
    """The tokens after which an activated LoRA begins; none of any other."""
    count = llama_cpp.llama_adapter_get_alora_n_invocation_tokens(pointer)
    return tuple(llama_cpp.llama_adapter_get_alora_invocation_tokens(pointer)[:count]) if count else ()


def _last_logits_hold_nan(context: int, n_vocab: int) -> bool:
    with captured_log():  # no logits yet is no error here, but llama.cpp logs it as one
        logits = llama_cpp.llama_get_logits_ith(context, -1)
    return bool(logits) and bool(np.isnan(np.ctypeslib.as_array(logits, (n_vocab,))).any())


def put_prefix(context: int, prefix: Prefix, sequence: int = 0) -> None:
    """Let an empty sequence of ``context`` begin with a soft prompt, at positions 0 to ``prefix.n_tokens`` - 1.

    Raises:
        HotSwapError: if llama.cpp cannot decode it.
        UnsupportedAdapterError: if it is keys and values that the model's cache cannot be given.
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
        raise HotSwapError(f"llama.cpp refused the keys and values of a soft prompt: {' '.join(''.join(log).split())}")


def axes_of_embeddings(model: int) -> tuple[int, ...]:
    """By what to multiply an embedding's place for each of the positions that ``model`` wants of it."""
    return (1, 1, 1, 0) if llama_cpp.llama_model_rope_type(model) in _SPATIAL else (1,)


def _decode(context: int, sequence: int, inputs: NDArray[Any]) -> None:
    """Decode tokens (n,) or embeddings (n, n_embd) from position 0 on, without logits."""
    step = llama_cpp.llama_n_batch(context)
    axes = axes_of_embeddings(llama_cpp.llama_get_model(context)) if inputs.ndim == 2 else (1,)
    for first in range(0, len(inputs), step):
        part = np.ascontiguousarray(inputs[first : first + step])
        count = len(part)
        own = (llama_cpp.llama_seq_id * 1)(sequence)
        sequences = (ctypes.POINTER(llama_cpp.llama_seq_id) * count)(*[own] * count)
        pointer = ctypes.POINTER(ctypes.c_int32 if part.ndim == 1 else ctypes.c_float)
        batch = llama_cpp.llama_batch(
            n_tokens=count,
            pos=(llama_cpp.llama_pos * (count * len(axes)))(
                *(on * at for on in axes for at in range(first, first + count))
            ),
            n_seq_id=(ctypes.c_int32 * count)(*[1] * count),
            seq_id=sequences,
            logits=(ctypes.c_int8 * count)(),
            **{"token" if part.ndim == 1 else "embd": part.ctypes.data_as(pointer)},
        )
        status = llama_cpp.llama_decode(context, batch)
        if status:
            raise HotSwapError(
                f"llama.cpp could not decode a soft prompt of {len(inputs)} positions (status {status}); "
                "is the context large enough for it?"
            )


def _attention_caches(model: int, n_layers: int) -> list[list[list[int]]]:
    """Ways to share out the layers to attention caches: to one, or to one without a window and one with."""
    if is_stateful(model):
        raise UnsupportedAdapterError(
            "keys and values cannot precede the prompt of a model with a recurrent state; train LORA"
        )
    layers = list(range(n_layers))
    architecture = _metadata(model, "general.architecture") or ""
    pattern = _metadata(model, f"{architecture}.attention.sliding_window_pattern") or ""
    if pattern.startswith("["):
        has_window = [word.strip() in {"true", "1"} for word in pattern.strip("[]").split(",")]
    else:
        period = int(pattern or _FULL_EVERY.get(architecture, 1))
        has_window = [layer % period < period - 1 for layer in layers]
    shared_out = [[layer for layer in layers if has_window[layer] == window] for window in (False, True)]
    return [[layers], shared_out]


def _metadata(model: int, key: str) -> str | None:
    buffer = ctypes.create_string_buffer(1 << 16)
    length = llama_cpp.llama_model_meta_val_str(model, key.encode(), buffer, len(buffer))
    return buffer.value.decode(errors="replace") if length >= 0 else None
