"""Write keys and values into llama.cpp's attention cache by rewriting the saved state of one sequence.

llama.cpp has no call that writes its cache, but it restores a sequence from bytes (``llama_state_seq_set_data``). So
arbitrary tokens are decoded, their state is saved, the numbers in it are replaced, and the state is restored.

The layout is that of ``llama_kv_cache::state_write``: a magic number and the sequence id; then, for each cache (first
that of full-attention layers, then that of sliding-window layers) and each stream, the positions of its cells, the keys
of each layer by cell, and the values of each layer, by cell or transposed.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Final

from gguflora import quants
from gguflora.errors import UnsupportedAdapterError
from gguflora.placement.prefix import Prefix
from gguflora.quants.arrays import Float32Array

_FLOAT_BYTES: Final[dict[int, int]] = {0: 4, 1: 2, 30: 2}
"""Bytes of a number by ``enum ggml_type``: F32, F16, BF16. Quantized caches are also rotated and cannot be written."""


class _LayoutError(Exception):
    """The state does not have the expected layout. Never leaves this module."""


class _StateEditor:
    """Reads the bytes of a state in order and overwrites some of them."""

    def __init__(self, state: bytes) -> None:
        self.bytes = bytearray(state)
        self.offset = 0

    def read(self, layout: str) -> tuple[Any, ...]:
        """Read numbers in the format of the `struct` module, little-endian."""
        try:
            numbers = struct.unpack_from(f"<{layout}", self.bytes, self.offset)
        except struct.error as error:
            raise _LayoutError("it ends too early") from error
        self.offset += struct.calcsize(f"<{layout}")
        return numbers

    def overwrite(self, content: bytes) -> None:
        """Replace the next bytes."""
        if self.offset + len(content) > len(self.bytes):
            raise _LayoutError("it ends too early")
        self.bytes[self.offset : self.offset + len(content)] = content
        self.offset += len(content)


def fill_state(state: bytes, prefix: Prefix, candidates: Sequence[Sequence[Sequence[int]]]) -> bytes:
    """Return the state of a sequence with its keys and values replaced by those of ``prefix``.

    Args:
        state: state of a sequence that holds ``prefix.n_tokens`` tokens, from position 0 on.
        prefix: keys and values of a soft prompt.
        candidates: possible divisions of the model's layers into attention caches; the first that fits is used.

    Raises:
        UnsupportedAdapterError: if the state does not have the layout of a plain attention cache of floats.
    """
    reasons = []
    for caches in candidates:
        try:
            return _filled(state, prefix, caches)
        except _LayoutError as error:
            reasons.append(str(error))
    raise UnsupportedAdapterError(
        "the keys and values of a soft prompt cannot be written to llama.cpp's attention cache of this model: "
        f"{reasons[0]}; train LORA"
    )


def _filled(state: bytes, prefix: Prefix, caches: Sequence[Sequence[int]]) -> bytes:
    editor = _StateEditor(state)
    editor.read("Ii")
    for layers in caches:
        _fill_cache(editor, prefix, layers)
    if editor.offset != len(state):
        raise _LayoutError(f"{len(state) - editor.offset} bytes of it are left over")
    return bytes(editor.bytes)


def _fill_cache(editor: _StateEditor, prefix: Prefix, layers: Sequence[int]) -> None:
    (n_streams,) = editor.read("I")
    for _ in range(n_streams):
        (n_cells,) = editor.read("I")
        if not n_cells:
            continue
        cells = [_position(editor, prefix.n_tokens) for _ in range(n_cells)]
        transposed, n_layers = editor.read("II")
        if n_layers != len(layers):
            raise _LayoutError(f"{n_layers} layers, expected {len(layers)}")
        for layer in layers:
            kind, row_bytes = editor.read("iQ")
            _put(editor, kind, prefix.keys[layer][cells], row_bytes)
        for layer in layers:
            rows = prefix.values[layer][cells]
            if transposed:
                kind, size, n_values = editor.read("iII")
                if n_values != rows.shape[1]:
                    raise _LayoutError(f"{n_values} values for each token, expected {rows.shape[1]}")
                _put(editor, kind, rows.T, n_cells * size)
            else:
                kind, row_bytes = editor.read("iQ")
                _put(editor, kind, rows, row_bytes)


def _position(editor: _StateEditor, n_tokens: int) -> int:
    position, n_sequences, _ = editor.read("iIi")
    if n_sequences != 1 or not 0 <= position < n_tokens:
        raise _LayoutError(f"a cell of {n_sequences} sequences at position {position}")
    return int(position)


def _put(editor: _StateEditor, kind: int, rows: Float32Array, row_bytes: int) -> None:
    if kind not in _FLOAT_BYTES:
        raise _LayoutError(
            f"its numbers are quantized (ggml type {kind}); open the model with type_k and type_v F16 or F32"
        )
    if row_bytes != rows.shape[1] * _FLOAT_BYTES[kind]:
        raise _LayoutError(f"rows of {row_bytes} bytes, expected {rows.shape[1]} numbers of {_FLOAT_BYTES[kind]}")
    editor.overwrite(quants.quantize(rows, kind).tobytes())
