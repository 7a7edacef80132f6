"""Create a patch: a sink that encodes the rows that a merge changes, and the patch file."""

from __future__ import annotations

import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import numpy as np

from gguflora.files.atomic import atomic_output
from gguflora.files.gguf import GgufFile, Layout
from gguflora.files.gguf_shard import GgufShard
from gguflora.merging.patch.chain import Chain, write
from gguflora.merging.patch.coding import PLAIN, Grain, encode
from gguflora.merging.patch.format import (
    MAX_LENGTH,
    Facts,
    Patch,
    Range,
    Record,
    checksum,
    write_patch_file,
)
from gguflora.merging.patch.stream import files_sha256, result, sha256
from gguflora.merging.sinks import Block, RowSink
from gguflora.quants.arrays import Bytes
from gguflora.system.descriptors import read_at

_COUNTS = 24
"""Bytes before the first metadata entry of a GGUF file: magic, version, number of tensors, number of entries."""


@dataclass(frozen=True, slots=True)
class Merged:
    """What was merged: name, SHA-256 and scale of each adapter, the rounding mode and its seed."""

    adapters: tuple[tuple[str, str, float], ...]
    rounding: str
    seed: int


def write_patch(
    target: Path,
    base: GgufFile,
    layout: Layout,
    rewrite: Callable[[RowSink], None],
    merged: Merged,
    *,
    threads: int,
    force: bool = True,
) -> int:
    """Write the changes of a merge as a patch file.

    The SHA-256 of the result is computed by applying the patch to the base, so every patch is tested before it is
    written.

    Args:
        target: the patch file to write.
        base: the base of the merge.
        layout: layout of the result.
        rewrite: writes the changed rows and the copied ranges, except the header, to a sink.
        merged: what was merged; it is recorded in the patch.
        threads: number of threads.
        force: overwrite ``target``.

    Returns:
        The size of the patch in bytes.

    Raises:
        GgufloraError: if the base changes meanwhile, or the target cannot be written.
    """
    with (
        ThreadPoolExecutor(1) as background,
        tempfile.TemporaryFile(dir=target.parent) as spill,
        atomic_output(target, force=force) as output,
    ):
        files = Chain.from_model(base)
        base_sha256 = background.submit(files_sha256, files)
        sink = PatchSink(spill.fileno(), layout)
        sink.put_headers(base)
        rewrite(sink)
        facts = Facts(
            base_name=base.path.name,
            base_size=base.size,
            base_sha256=base_sha256.result(),
            merged_sizes=tuple(part.size for part in layout.parts),
            merged_sha256="",
            adapters=merged.adapters,
            rounding=merged.rounding,
            seed=merged.seed,
        )
        patch = sink.patch(target, facts)
        digest = sha256(result(patch, files, threads))
        base.check_unchanged()
        write_patch_file(output, replace(patch, facts=replace(facts, merged_sha256=digest)))
        return output.tell()


class PatchSink:
    """Encodes changed rows in the order in which they arrive, and writes them to a temporary file.

    Args:
        spill: file descriptor of the temporary file.
        layout: layout of the result.
    """

    def __init__(self, spill: int, layout: Layout) -> None:
        self._spill, self._layout = spill, layout
        self._copies: list[Range] = []
        self._records: list[Record] = []
        self._end = 0
        self._lock = threading.Lock()

    def put(self, block: Block) -> None:
        """Encode new rows of a changed tensor; rows that the base lacks are encoded as a difference from zeros."""
        target, grain = block.target, Grain.from_type(block.target.type)
        to = self._layout.offsets[target.name] + block.start * block.new.shape[1]
        is_comparable = target.type == target.source.type and target.shape[-1] == target.source.n_in
        n_known = max(0, min(len(block.new), target.source.n_rows - block.start)) if is_comparable else 0
        known = n_known * block.new.shape[1]
        new = block.new.reshape(-1)
        source = target.source.offset + block.start * block.new.shape[1]
        self._add(to, source, block.old.reshape(-1)[:known], new[:known], grain)
        self._add(to + known, None, np.zeros(len(new) - known, np.uint8), new[known:], grain)

    def copy(self, start: int, stop: int, to: int) -> None:
        """Record that the base's bytes ``start`` to ``stop`` are copied to ``to``."""
        with self._lock:
            self._copies.append((start, stop, to))

    def put_headers(self, base: GgufFile) -> None:
        """Encode the headers of the result's files; most of their bytes (the tokenizer) are copied from the base."""
        starts = [0, *accumulate(part.size for part in base.parts)]
        for source, part, new in zip(starts, base.parts, self._layout.parts, strict=False):
            self._put_header(part, source, new.header, new.start)

    def _put_header(self, part: GgufShard, source: int, header: bytes, offset: int) -> None:
        done = 0
        for start, stop, to in header_copies(part, header):
            self._put_new(header[done:to], offset + done)
            self.copy(source + start, source + stop, offset + to)
            done = to + stop - start
        self._put_new(header[done:], offset + done)

    def _put_new(self, content: bytes, to: int) -> None:
        new = np.frombuffer(content, np.uint8)
        self._add(to, None, np.zeros(len(new), np.uint8), new, PLAIN)

    def patch(self, path: Path, facts: Facts) -> Patch:
        """Return the patch with all copies and records, in the order of the result."""
        records = sorted(self._records, key=lambda record: record.to)
        return Patch(path, self._spill, facts, join_ranges(self._copies), records)

    def _add(self, to: int, source: int | None, old: Bytes, new: Bytes, grain: Grain) -> None:
        step = MAX_LENGTH // grain.block * grain.block
        for start in range(0, len(new), step):
            offset = None if source is None else source + start
            self._add_one(to + start, offset, old[start : start + step], new[start : start + step], grain)

    def _add_one(self, to: int, source: int | None, old: Bytes, new: Bytes, grain: Grain) -> None:
        payload = encode(old, new, grain)
        with self._lock:
            at, self._end = self._end, self._end + len(payload)
        write(self._spill, np.frombuffer(payload, np.uint8), at)
        sums = checksum(old), checksum(new)
        record = Record(to, source, len(new), grain, at, len(payload), zlib.crc32(payload), *sums)
        with self._lock:
            self._records.append(record)


def header_copies(base: GgufShard, header: bytes) -> list[Range]:
    """Find the ranges that a header has in common with the base's header: all of it, metadata entries, tensor list."""
    if header == read_at(base.fileno(), len(header), 0):
        return [(0, len(header), 0)]
    return join_ranges(_common_ranges(base, header))


def _common_ranges(base: GgufShard, header: bytes) -> Iterator[Range]:
    start = to = _COUNTS
    for key in base.metadata:
        entry = base.metadata.raw(key)
        if header.startswith(entry, to):
            yield start, start + len(entry), to
            to += len(entry)
        start += len(entry)
    stop = min((tensor.offset for tensor in base.tensors.values()), default=start)
    tail = read_at(base.fileno(), stop - start, start).rstrip(b"\0")
    at = header.rfind(tail) if tail else -1
    if at >= to:
        yield start, start + len(tail), at


def join_ranges(ranges: Sequence[Range] | Iterator[Range]) -> list[Range]:
    """Sort ranges by their offset in the result and join adjacent ones."""
    joined: list[Range] = []
    for start, stop, to in sorted(ranges, key=lambda copied: copied[2]):
        if joined and joined[-1][1] == start and joined[-1][2] + joined[-1][1] - joined[-1][0] == to:
            joined[-1] = joined[-1][0], stop, joined[-1][2]
        else:
            joined.append((start, stop, to))
    return joined
