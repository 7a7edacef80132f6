"""Keys and values put into llama.cpp's attention cache, by way of the state of one sequence.

llama.cpp has no call that writes its cache, but it restores a sequence from bytes (``llama_state_seq_set_data``). Any
tokens are decoded, their state is taken as the mould, its numbers are exchanged, and it is put back. The layout, of
``llama_kv_cache::state_write``: a magic number and the sequence; then for each cache (the one of layers that attend to
all positions, then the one of those that attend to a window) for each stream its cells' positions, the keys of each
layer by cell, and the values of each layer, by cell or transposed.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Final

from gguflora import quants
from gguflora.errors import UnsupportedAdapterError
from gguflora.placement.prefix import Prefix
from gguflora.quants.arrays import Float32Array

_FLOATS: Final[dict[int, int]] = {0: 4, 1: 2, 30: 2}
"""Size by ``enum ggml_type``: F32, F16, BF16. Quantized caches are rotated, too, and cannot be written."""


class _Layout(Exception):  # noqa: N818  (never leaves this module)
    """The state is not laid out as expected."""


class _Mould:
    """A cursor over the bytes of a state, which it overwrites in place."""

    def __init__(self, state: bytes) -> None:
        self.bytes = bytearray(state)
        self.at = 0

    def read(self, layout: str) -> tuple[Any, ...]:
        try:
            found = struct.unpack_from(f"<{layout}", self.bytes, self.at)
        except struct.error as error:
            raise _Layout("it ends too early") from error
        self.at += struct.calcsize(f"<{layout}")
        return found

    def overwrite(self, content: bytes) -> None:
        if self.at + len(content) > len(self.bytes):
            raise _Layout("it ends too early")
        self.bytes[self.at : self.at + len(content)] = content
        self.at += len(content)


def fill_state(state: bytes, prefix: Prefix, candidates: Sequence[Sequence[Sequence[int]]]) -> bytes:
    """The state of a sequence with the keys and values of ``prefix`` in place of what was computed.

    Args:
        state: of a sequence that holds ``prefix.n_tokens`` tokens, from position 0.
        prefix: of keys and values.
        candidates: ways in which the model's layers may be shared out to attention caches; the first that fits holds.

    Raises:
        UnsupportedAdapterError: if the state is not laid out as that of a plain attention cache of floats.
    """
    reasons = []
    for caches in candidates:
        try:
            return _filled(state, prefix, caches)
        except _Layout as error:
            reasons.append(str(error))
    raise UnsupportedAdapterError(
        "llama.cpp's attention cache of this model cannot be given the keys and values of a soft prompt: "
        f"{reasons[0]}; train LORA"
    )


def _filled(state: bytes, prefix: Prefix, caches: Sequence[Sequence[int]]) -> bytes:
    mould = _Mould(state)
    mould.read("Ii")
    for layers in caches:
        _fill_cache(mould, prefix, layers)
    if mould.at != len(state):
        raise _Layout(f"{len(state) - mould.at} bytes of it are left over")
    return bytes(mould.bytes)


def _fill_cache(mould: _Mould, prefix: Prefix, layers: Sequence[int]) -> None:
    (n_streams,) = mould.read("I")
    for _ in range(n_streams):
        (n_cells,) = mould.read("I")
        if not n_cells:
            continue
        cells = [_position(mould, prefix.n_tokens) for _ in range(n_cells)]
        transposed, n_layers = mould.read("II")
        if n_layers != len(layers):
            raise _Layout(f"{n_layers} layers, expected {len(layers)}")
        for layer in layers:
            kind, row_bytes = mould.read("iQ")
            _put(mould, kind, prefix.keys[layer][cells], row_bytes)
        for layer in layers:
            rows = prefix.values[layer][cells]
            if transposed:
                kind, size, n_values = mould.read("iII")
                if n_values != rows.shape[1]:
                    raise _Layout(f"{n_values} values for each token, expected {rows.shape[1]}")
                _put(mould, kind, rows.T, n_cells * size)
            else:
                kind, row_bytes = mould.read("iQ")
                _put(mould, kind, rows, row_bytes)


def _position(mould: _Mould, n_tokens: int) -> int:
    position, n_sequences, _ = mould.read("iIi")
    if n_sequences != 1 or not 0 <= position < n_tokens:
        raise _Layout(f"a cell of {n_sequences} sequences at position {position}")
    return int(position)


def _put(mould: _Mould, kind: int, rows: Float32Array, row_bytes: int) -> None:
    if kind not in _FLOATS:
        raise _Layout(f"its numbers are quantized (ggml type {kind}); open the model with type_k and type_v F16 or F32")
    if row_bytes != rows.shape[1] * _FLOATS[kind]:
        raise _Layout(f"rows of {row_bytes} bytes, expected {rows.shape[1]} numbers of {_FLOATS[kind]}")
    mould.overwrite(quants.quantize(rows, kind).tobytes())
