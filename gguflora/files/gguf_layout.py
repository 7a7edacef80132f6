"""Where everything lies in a GGUF file that is another one with changes."""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gguflora.files.gguf_shard import MAGIC, GgufShard
from gguflora.files.gguf_tensors import Shape, align, encode_tensor, n_bytes
from gguflora.quants.types import GgmlType

Forms = Mapping[str, tuple[Shape, GgmlType]]
_Arrangement = tuple[bytes, dict[str, int], list[tuple[int, int, int]], int]
"""Encoded list of tensors, offsets of the changed ones, copied ranges, end; all from the start of the data."""


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """One file of the output.

    Attributes:
        start: of the file, as if the files were one after the other.
        header: everything before the tensor data.
        size: of the file.
    """

    start: int
    header: bytes
    size: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything lies in a file, or in the files of a split model as if they were one after the other.

    Attributes:
        parts: the files.
        copies: ranges of the other file's bytes that stay: first, last (exclusive), and where they go.
        offsets: of the changed and added tensors.
        size: of all files.
    """

    parts: tuple[ShardLayout, ...]
    copies: tuple[tuple[int, int, int], ...]
    offsets: dict[str, int]
    size: int

    @property
    def data_size(self) -> int:
        """Bytes of all files after their headers."""
        return self.size - sum(len(part.header) for part in self.parts)

    def locate(self, offset: int) -> tuple[int, int]:
        """Number of the file in which a byte lies, and where."""
        index = bisect_right(self.parts, offset, key=lambda part: part.start) - 1
        return index, offset - self.parts[index].start


def part_layout(part: GgufShard, entries: Mapping[str, bytes], changed: Forms) -> Layout:
    """The layout of one file with metadata and tensors changed or added; new tensors come last.

    Everything else stays byte for byte; while no tensor changes its size, its place after the header too.

    Args:
        part: the file.
        entries: metadata by key, see `encode_entry`.
        changed: shape and type of each tensor whose data is not copied.
    """
    added = {name: form for name, form in changed.items() if name not in part.tensors}
    if all(name in added or n_bytes(*form) == part.tensors[name].nbytes for name, form in changed.items()):
        tensor_list, offsets, copies, end = _in_place(part, changed, added)
    else:
        tensor_list, offsets, copies, end = _moved(part, changed)
    kept = [part.metadata.raw(key) for key in part.metadata if key not in entries]
    counts = struct.pack("<IQQ", part.version, len({*part.tensors, *changed}), len(kept) + len(entries))
    header = b"".join([MAGIC, counts, *kept, *entries.values(), tensor_list])
    header += bytes(align(len(header), part.alignment) - len(header))
    size = len(header) + end
    return Layout(
        (ShardLayout(0, header, size),),
        tuple((first, last, len(header) + to) for first, last, to in copies),
        {name: len(header) + offset for name, offset in offsets.items()},
        size,
    )


def _in_place(part: GgufShard, changed: Forms, added: Forms) -> _Arrangement:
    """Tensors keep their offsets; what lies between the changed ones is copied, padding included."""
    tensor_list = _with_forms(part, changed) if _any_retyped(part, changed) else part.tensor_list
    replaced = sorted((part.tensors[name] for name in changed if name in part.tensors), key=lambda t: t.offset)
    offsets = {tensor.name: tensor.offset - part.data_start for tensor in replaced}
    used = max((tensor.offset + tensor.nbytes for tensor in part.tensors.values()), default=part.data_start)
    kept = used if added else max(part.size, part.data_start)
    edges = [part.data_start, *(edge for t in replaced for edge in (t.offset, t.offset + t.nbytes)), kept]
    ranges = zip(edges[::2], edges[1::2], strict=True)
    copies = [(first, last, first - part.data_start) for first, last in ranges if first < last]
    end = kept - part.data_start
    for name, (shape, kind) in added.items():
        offsets[name] = align(end, part.alignment)
        end = align(offsets[name] + n_bytes(shape, kind), part.alignment)
        tensor_list += encode_tensor(name, shape, kind, offsets[name])
    return tensor_list, offsets, copies, end


def _any_retyped(part: GgufShard, changed: Forms) -> bool:
    """Whether a tensor changes its type or shape, if not its size (Q4_0 and IQ4_NL, F16 and BF16)."""
    old = part.tensors
    return any((old[name].shape, old[name].type) != form for name, form in changed.items() if name in old)


def _with_forms(part: GgufShard, changed: Forms) -> bytes:
    forms = {name: changed.get(name, (tensor.shape, tensor.type)) for name, tensor in part.tensors.items()}
    offsets = {name: tensor.offset - part.data_start for name, tensor in part.tensors.items()}
    return b"".join(encode_tensor(name, *form, offsets[name]) for name, form in forms.items())


def _moved(part: GgufShard, changed: Forms) -> _Arrangement:
    """Tensors follow each other in the order of the file's list."""
    tensor_list, offsets, copies, end = b"", {}, [], 0
    for name, (shape, kind) in {**{t.name: (t.shape, t.type) for t in part.tensors.values()}, **changed}.items():
        tensor_list += encode_tensor(name, shape, kind, end)
        if name in changed:
            offsets[name] = end
        else:
            copies.append((part.tensors[name].offset, part.tensors[name].offset + part.tensors[name].nbytes, end))
        end = align(end + n_bytes(shape, kind), part.alignment)
    return tensor_list, offsets, copies, end


def join(layouts: Sequence[Layout], sizes: Sequence[int]) -> Layout:
    """The layouts of several files as one.

    Args:
        layouts: one for each file.
        sizes: of the files that they are changes of.
    """
    parts: list[ShardLayout] = []
    copies: list[tuple[int, int, int]] = []
    offsets: dict[str, int] = {}
    start = source = 0
    for layout, size in zip(layouts, sizes, strict=True):
        parts.append(ShardLayout(start, layout.parts[0].header, layout.size))
        copies += [(first + source, last + source, to + start) for first, last, to in layout.copies]
        offsets |= {name: offset + start for name, offset in layout.offsets.items()}
        start, source = start + layout.size, source + size
    return Layout(tuple(parts), tuple(copies), offsets, start)
