"""Read the pieces of a SentencePiece model (``tokenizer.model``), as far as GGUF holds them.

The file is a protocol buffer; source: ``ModelProto`` in sentencepiece's ``sentencepiece_model.proto``. The types are
those of llama.cpp's converter (``_create_vocab_sentencepiece`` in conversion/base.py).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gguflora.errors import AdapterError

_PIECES: Final = 1
"""Number of the field of ``ModelProto`` that holds a piece."""
_TEXT, _SCORE, _TYPE = 1, 2, 3
"""Numbers of the fields of a piece."""
_NORMAL, _USER_DEFINED, _BYTE = 1, 4, 6
_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5
"""Wire types of protocol buffers."""

_MAX_BYTES: Final = 1 << 28
"""What is read of a file: far more than any tokenizer has."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A token of a SentencePiece model: its text, its type in GGUF's numbers, and its score (a float32)."""

    text: str
    kind: int
    score: float


def read_pieces(path: Path) -> list[Piece]:
    """Return the pieces of a SentencePiece model in the order of their numbers.

    Raises:
        AdapterError: if the file is no SentencePiece model.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES)
        pieces = [_piece(field) for number, field in _fields(content) if number == _PIECES]
    except (OSError, ValueError, IndexError, TypeError, struct.error) as error:
        raise AdapterError(
            f"{path}: cannot be read as a SentencePiece model: {error!r:.200}; fetch the file again, or remove it to "
            "keep the base's tokenizer"
        ) from error
    if not pieces:
        raise AdapterError(f"{path}: holds no pieces of a SentencePiece model; remove it to keep the base's tokenizer")
    return pieces


def _piece(content: bytes | int) -> Piece:
    if not isinstance(content, bytes):
        raise TypeError("a piece is a number")
    text, score, kind = "", 0.0, _NORMAL
    for number, value in _fields(content):
        if number == _TEXT and isinstance(value, bytes):
            text = value.decode("utf-8")
        elif number == _SCORE and isinstance(value, bytes):
            (score,) = struct.unpack("<f", value)
        elif number == _TYPE and isinstance(value, int):
            kind = value
    if not _NORMAL <= kind <= _BYTE:
        raise ValueError(f"a piece has the type {kind}")
    return Piece(text, _NORMAL if kind == _USER_DEFINED else kind, score)


def _fields(content: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Yield number and value of the fields of a message."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        wire = key & 7
        if wire == _VARINT:
            value, at = _varint(content, at)
            yield key >> 3, value
            continue
        if wire == _BYTES:
            size, at = _varint(content, at)
        elif wire in {_EIGHT, _FOUR}:
            size = 8 if wire == _EIGHT else 4
        else:
            raise ValueError(f"a field has the wire type {wire}")
        if at + size > len(content):
            raise ValueError("a field ends behind the file")
        yield key >> 3, content[at : at + size]
        at += size


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """Return a number of seven bits a byte, the lowest first, and where it ends."""
    value = shift = 0
    while shift < 70:
        byte = content[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError("a number has too many bytes")
