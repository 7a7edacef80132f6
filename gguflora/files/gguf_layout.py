"""Compute the layout of a GGUF file that is a copy of another with some metadata and tensors changed."""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gguflora.files.gguf_shard import MAGIC, GgufShard
from gguflora.files.gguf_tensors import Shape, align, encode_tensor, n_bytes
from gguflora.quants.types import GgmlType

Forms = Mapping[str, tuple[Shape, GgmlType]]
"""Shape and type of tensors by name."""

_Arrangement = tuple[bytes, dict[str, int], list[tuple[int, int, int]], int]
"""Encoded tensor list, offsets of the changed tensors, copied ranges, size of the data; offsets from the data's start.

A copied range is (start, stop) in the source file and its offset in the new data.
"""


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """The layout of one file of the output.

    Attributes:
        start: offset of the file if all files were concatenated.
        header: all bytes before the tensor data.
        size: size of the file in bytes.
    """

    start: int
    header: bytes
    size: int


@dataclass(frozen=True, slots=True)
class Layout:
    """The layout of a GGUF model. All offsets of a split model count as if its files were concatenated.

    Attributes:
        parts: layout of each file.
        copies: ranges to copy from the source model: (start, stop) in the source and offset in the output.
        offsets: offset of each changed or added tensor.
        size: total size of all files in bytes.
    """

    parts: tuple[ShardLayout, ...]
    copies: tuple[tuple[int, int, int], ...]
    offsets: dict[str, int]
    size: int

    @property
    def data_size(self) -> int:
        """Total size in bytes of all files without their headers."""
        return self.size - sum(len(part.header) for part in self.parts)

    def locate(self, offset: int) -> tuple[int, int]:
        """Return the index of the file that holds the byte at ``offset``, and the byte's offset in that file."""
        index = bisect_right(self.parts, offset, key=lambda part: part.start) - 1
        return index, offset - self.parts[index].start


def part_layout(part: GgufShard, entries: Mapping[str, bytes], changed: Forms) -> Layout:
    """Return the layout of one file with metadata and tensors changed or added; added tensors come last.

    All other bytes stay the same. As long as no tensor changes its size, all tensors keep their offsets after the
    header.

    Args:
        part: the source file.
        entries: encoded metadata by key, see `encode_entry`.
        changed: shape and type of each tensor whose data is not copied.
    """
    added = {name: form for name, form in changed.items() if name not in part.tensors}
    if all(name in added or n_bytes(*form) == part.tensors[name].nbytes for name, form in changed.items()):
        tensor_list, offsets, copies, data_size = _arrange_in_place(part, changed, added)
    else:
        tensor_list, offsets, copies, data_size = _arrange_sequentially(part, changed)
    kept = [part.metadata.raw(key) for key in part.metadata if key not in entries]
    counts = struct.pack("<IQQ", part.version, len({*part.tensors, *changed}), len(kept) + len(entries))
    header = b"".join([MAGIC, counts, *kept, *entries.values(), tensor_list])
    header += bytes(align(len(header), part.alignment) - len(header))
    size = len(header) + data_size
    return Layout(
        (ShardLayout(0, header, size),),
        tuple((start, stop, len(header) + target) for start, stop, target in copies),
        {name: len(header) + offset for name, offset in offsets.items()},
        size,
    )


def _arrange_in_place(part: GgufShard, changed: Forms, added: Forms) -> _Arrangement:
    """Keep the offsets of all tensors, and copy the bytes between the changed ones, padding included."""
    tensor_list = _with_forms(part, changed) if _any_retyped(part, changed) else part.tensor_list
    replaced = sorted((part.tensors[name] for name in changed if name in part.tensors), key=lambda t: t.offset)
    offsets = {tensor.name: tensor.offset - part.data_start for tensor in replaced}
    used = max((tensor.offset + tensor.nbytes for tensor in part.tensors.values()), default=part.data_start)
    kept = used if added else max(part.size, part.data_start)
    edges = [part.data_start, *(edge for t in replaced for edge in (t.offset, t.offset + t.nbytes)), kept]
    ranges = zip(edges[::2], edges[1::2], strict=True)
    copies = [(start, stop, start - part.data_start) for start, stop in ranges if start < stop]
    size = kept - part.data_start
    for name, (shape, kind) in added.items():
        offsets[name] = align(size, part.alignment)
        size = align(offsets[name] + n_bytes(shape, kind), part.alignment)
        tensor_list += encode_tensor(name, shape, kind, offsets[name])
    return tensor_list, offsets, copies, size


def _any_retyped(part: GgufShard, changed: Forms) -> bool:
    """Whether a tensor changes its type or shape while its size stays the same (Q4_0 to IQ4_NL, F16 to BF16)."""
    old = part.tensors
    return any((old[name].shape, old[name].type) != form for name, form in changed.items() if name in old)


def _with_forms(part: GgufShard, changed: Forms) -> bytes:
    forms = {name: changed.get(name, (tensor.shape, tensor.type)) for name, tensor in part.tensors.items()}
    offsets = {name: tensor.offset - part.data_start for name, tensor in part.tensors.items()}
    return b"".join(encode_tensor(name, *form, offsets[name]) for name, form in forms.items())


def _arrange_sequentially(part: GgufShard, changed: Forms) -> _Arrangement:
    """Assign new offsets to all tensors, in the order of the file's tensor list."""
    tensor_list, offsets, copies, size = b"", {}, [], 0
    for name, (shape, kind) in {**{t.name: (t.shape, t.type) for t in part.tensors.values()}, **changed}.items():
        tensor_list += encode_tensor(name, shape, kind, size)
        if name in changed:
            offsets[name] = size
        else:
            copies.append((part.tensors[name].offset, part.tensors[name].offset + part.tensors[name].nbytes, size))
        size = align(size + n_bytes(shape, kind), part.alignment)
    return tensor_list, offsets, copies, size


def join(layouts: Sequence[Layout], sizes: Sequence[int]) -> Layout:
    """Combine the layouts of the files of a split model.

    Args:
        layouts: layout of each file.
        sizes: size in bytes of each source file.
    """
    parts: list[ShardLayout] = []
    copies: list[tuple[int, int, int]] = []
    offsets: dict[str, int] = {}
    start = source = 0
    for layout, size in zip(layouts, sizes, strict=True):
        parts.append(ShardLayout(start, layout.parts[0].header, layout.size))
        copies += [(first + source, stop + source, target + start) for first, stop, target in layout.copies]
        offsets |= {name: offset + start for name, offset in layout.offsets.items()}
        start, source = start + layout.size, source + size
    return Layout(tuple(parts), tuple(copies), offsets, start)
