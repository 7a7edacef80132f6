"""Compute the layout of a GGUF model whose tensors are written in a new order, most of them in new types."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from gguflora.files.gguf import GgufFile
from gguflora.files.gguf_header import encode_int32, encode_string
from gguflora.files.gguf_layout import Forms, Layout, ShardLayout
from gguflora.files.gguf_shard import MAGIC
from gguflora.files.gguf_tensors import align, encode_tensor, n_bytes

_VERSION: Final = 3
_UINT16: Final = 2
_COUNT, _NUMBER, _N_TENSORS = "split.count", "split.no", "split.tensors.count"


def rewritten_layout(
    file: GgufFile, parts: Sequence[Sequence[str]], forms: Forms, entries: Mapping[str, bytes], changed: Iterable[str]
) -> Layout:
    """Return the layout of a model with all tensors in a given order, as llama.cpp's gguf writer puts them.

    Args:
        file: the source.
        parts: names of the tensors of each output file, in order.
        forms: shape and type in the output of every tensor.
        entries: encoded metadata that replaces entries of the source or comes after them.
        changed: names of the tensors whose data is not copied.
    """
    kept = [file.metadata.raw(key) for key in file.metadata if key not in {*entries, _COUNT, _NUMBER, _N_TENSORS}]
    first, alignment, written = [*kept, *entries.values()], file.parts[0].alignment, set(changed)
    layouts: list[ShardLayout] = []
    copies: list[tuple[int, int, int]] = []
    offsets: dict[str, int] = {}
    start = 0
    for index, names in enumerate(parts):
        metadata = first if index == 0 else []
        if len(parts) > 1:
            metadata = [*metadata, *_split_entries(index, len(parts), len(forms))]
        places, size = _place({name: forms[name] for name in names}, alignment)
        listed = (encode_tensor(name, *forms[name], places[name]) for name in names)
        counts = struct.pack("<IQQ", _VERSION, len(names), len(metadata))
        header = b"".join([MAGIC, counts, *metadata, *listed])
        header += bytes(align(len(header), alignment) - len(header))
        for name in names:
            at = start + len(header) + places[name]
            if name in written:
                offsets[name] = at
            else:
                source = file.tensors[name]
                copies.append((source.offset, source.offset + source.nbytes, at))
        layouts.append(ShardLayout(start, header, len(header) + size))
        start += len(header) + size
    return Layout(tuple(layouts), tuple(copies), offsets, start)


def _place(forms: Forms, alignment: int) -> tuple[dict[str, int], int]:
    places, size = {}, 0
    for name, form in forms.items():
        places[name] = size
        size = align(size + n_bytes(*form), alignment)
    return places, size


def _split_entries(index: int, count: int, n_tensors: int) -> list[bytes]:
    numbers = {_NUMBER: index, _COUNT: count}
    encoded = [encode_string(key) + struct.pack("<IH", _UINT16, value) for key, value in numbers.items()]
    return [*encoded, encode_int32(_N_TENSORS, n_tensors)]
