"""Split a merge into parts that may run on different machines: ``merge_part`` and ``assemble``.

Each part computes its share of the changed tensors. ``assemble`` copies the rest of the base and inserts the shares.
The bytes and the report equal those of `gguflora.merge` with the same arguments, because each tensor is rounded on its
own. A part file consists of

* the new rows of its tensors, one tensor after the other;
* a JSON object with ``plan`` (a hash of the merge), ``seconds``, and ``tensors``: for each tensor its ``offset``, its
  ``sums`` (see `gguflora.quants.kernels.SUMS`) and its ``blocks`` (first row, number of rows, CRC-32);
* 16 bytes: the length of the JSON (little-endian) and ``GFLPART1``.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from gguflora.errors import FormatError, OutputError
from gguflora.files.atomic import atomic_output, atomic_outputs
from gguflora.files.gguf import GgufFile, Layout, ShardLayout, part_paths
from gguflora.files.output_checks import check_target, check_targets
from gguflora.files.remote import is_remote, redacted, remote_inputs
from gguflora.files.strict_json import to_json
from gguflora.merging.moments import hash_moments
from gguflora.merging.part_file import MAGIC, TRAILER, MergePart, check_rows, open_part, part_errors
from gguflora.merging.prepare import (
    AdapterArgument,
    MergeOptions,
    PreparedMerge,
    prepared_merge,
    with_moments,
)
from gguflora.merging.report import MergeReport
from gguflora.merging.rewriter import Rewriter
from gguflora.merging.sinks import Block, FileSink, Progress
from gguflora.placement.target import ChangedTensor
from gguflora.system.cpus import thread_count


@dataclass(frozen=True, slots=True)
class PartReport:
    """What `merge_part` did.

    Attributes:
        output: path of the part file.
        tensors: names of the tensors in the part.
        written: size of the part file in bytes.
        seconds: wall time.
        threads: number of threads used.
    """

    output: Path
    tensors: tuple[str, ...]
    written: int
    seconds: float
    threads: int

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, ready for JSON."""
        return {**asdict(self), "output": str(self.output)}


@remote_inputs(
    base="file", adapters="adapter", base_f16="model", imatrix="file", calibration_text="file", moments="file"
)
def merge_part(
    base: str | os.PathLike[str],
    adapters: AdapterArgument,
    out: str | os.PathLike[str],
    *,
    number: int,
    count: int,
    threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
    **options: Any,  # noqa: ANN401  (the fields of MergeOptions)
) -> PartReport:
    """Compute one part of a merge.

    Args:
        base: as for `gguflora.merge`.
        adapters: as for `gguflora.merge`.
        out: the part file to write.
        number: number of the part, starting with 1.
        count: number of parts.
        threads: number of threads; by default one for each core that this process may use.
        force: overwrite ``out``.
        progress: called with (bytes done, bytes in total); calls come from several threads but never overlap.
        options: the options of `gguflora.merge` that `MergeOptions` lists.

    Raises:
        GgufloraError: under the same conditions as `gguflora.merge`.
    """
    if not 1 <= number <= count:
        raise OutputError(f"{out}: cannot be part {number} of {count}; expected a number from 1 to {count}")
    started, target = time.perf_counter(), Path(out)
    used_threads = thread_count(threads)
    chosen = MergeOptions(**options)
    with prepared_merge(base, adapters, chosen) as prepared:
        share = shares(prepared.plan.targets, count)[number - 1]
        layout = _part_layout(share)
        check_target(target, prepared.inputs, force=force, size=layout.size)
        merging = with_moments(prepared, adapters, chosen, [target], threads=used_threads)
        rewriter = Rewriter(
            merging.weights,
            layout,
            share,
            merging.rounding,
            threads=used_threads,
            folder=target.parent,
            progress=progress,
        )
        with atomic_output(target, force=force) as output:
            sink = _PartSink(output, merging.file, layout)
            rewriter.write(sink)
            merging.file.check_unchanged()
            tensors = {
                each.name: {
                    "offset": layout.offsets[each.name],
                    "sums": rewriter.sums(each.name).tolist(),
                    "blocks": sorted(sink.blocks[each.name]),
                }
                for each in share
            }
            seconds = time.perf_counter() - started
            index = to_json({"plan": _hash_plan(merging, chosen), "seconds": seconds, "tensors": tensors}).encode()
            output.seek(layout.size)
            output.write(index + TRAILER.pack(len(index), MAGIC))
            written = output.tell()
    return PartReport(target, tuple(each.name for each in share), written, seconds, used_threads)


@remote_inputs(base="file", adapters="adapter", imatrix="file", calibration_text="file", moments="file")
def assemble(
    base: str | os.PathLike[str],
    adapters: AdapterArgument,
    out: str | os.PathLike[str],
    parts: Sequence[str | os.PathLike[str]],
    *,
    threads: int | None = None,
    force: bool = False,
    **options: Any,  # noqa: ANN401  (the fields of MergeOptions)
) -> MergeReport:
    """Write the merged model from all of its parts. The part files are kept.

    Args:
        base: as for `merge_part`.
        adapters: as for `merge_part`.
        out: the file to write; for a split base, the same number of files with names like
            ``out-00001-of-00003.gguf``.
        parts: the part files, in any order; they may be remote.
        threads: number of threads; by default one for each core that this process may use.
        force: overwrite ``out``.
        options: as for `merge_part`; ``base_f16`` is not read again.

    Returns:
        The report of `gguflora.merge`. Its ``seconds`` are the sum over all parts and assembling.

    Raises:
        FormatError: if a part is missing or damaged, or belongs to another merge.
        GgufloraError: under the same conditions as `gguflora.merge`.
    """
    started = time.perf_counter()
    used_threads = thread_count(threads)
    chosen = MergeOptions(**options)
    with ExitStack() as stack:
        opened = [open_part(os.fspath(path), stack) for path in parts]
        merging = stack.enter_context(prepared_merge(base, adapters, replace(chosen, base_f16=None)))
        layout = merging.plan.layout
        outputs = part_paths(Path(out), len(merging.file.paths))
        check_targets(
            outputs,
            [*merging.inputs, *(Path(path) for path in parts if not is_remote(path))],
            force=force,
            size=layout.size,
        )
        merging = with_moments(merging, adapters, chosen, outputs, threads=used_threads)
        _check_parts(merging, opened, _hash_plan(merging, chosen))
        copier = Rewriter(
            merging.weights,
            layout,
            (),
            merging.rounding,
            threads=used_threads,
            folder=outputs[0].parent,
            progress=None,
        )
        targets = {target.name: target for target in merging.plan.targets}
        with atomic_outputs(outputs, force=force) as drafts, ThreadPoolExecutor(used_threads) as pool:
            sink = FileSink(drafts, merging.file, layout)
            copier.write(sink)
            list(pool.map(lambda part: part.put(sink, targets), opened))
            merging.file.check_unchanged()
        return replace(merging, predicts=chosen.base_f16 is None).report(
            outputs[0],
            {name: np.array(tensor["sums"]) for part in opened for name, tensor in part.tensors.items()},
            written=layout.size,
            seconds=time.perf_counter() - started + sum(part.seconds for part in opened),
            threads=used_threads,
            dry_run=False,
        )


def shares(targets: Sequence[ChangedTensor], count: int) -> list[list[ChangedTensor]]:
    """Divide tensors into ``count`` shares of about equal size in bytes; shares may be empty.

    Tensors with a common delta stay together: the delta may need the whole Hugging Face weight that they come from.
    """
    deltas = [{id(item.delta) for item, _ in target.deltas} for target in targets]
    groups: dict[int, list[int]] = {}
    group_of: dict[int, int] = {}
    for number in range(len(targets)):
        joined = {group_of[delta] for delta in deltas[number] if delta in group_of}
        groups[number] = [number, *(other for group in joined for other in groups.pop(group))]
        group_of |= {delta: number for member in groups[number] for delta in deltas[member]}
    sizes = {number: sum(_n_bytes(targets[member]) for member in group) for number, group in groups.items()}
    loads, chosen = [0] * count, [list[int]() for _ in range(count)]
    for number in sorted(groups, key=lambda number: -sizes[number]):
        smallest = loads.index(min(loads))
        loads[smallest] += sizes[number]
        chosen[smallest] += groups[number]
    return [[targets[number] for number in sorted(numbers)] for numbers in chosen]


def _n_bytes(target: ChangedTensor) -> int:
    return target.n_rows * target.type.row_bytes(target.shape[-1])


def _part_layout(share: Sequence[ChangedTensor]) -> Layout:
    offsets, size = {}, 0
    for target in share:
        offsets[target.name], size = size, size + _n_bytes(target)
    return Layout((ShardLayout(0, b"", size),), (), offsets, size)


def _hash_plan(merging: PreparedMerge, options: MergeOptions) -> str:
    """Hash everything that all parts must agree on; the header has the adapters, rounding, seed and version."""
    digest, rounding = hashlib.sha256(), merging.rounding
    for part in merging.plan.layout.parts:
        digest.update(part.header)
    for name, values in sorted(rounding.imatrix.items()):
        digest.update(name.encode() + values.tobytes())
    digest.update(hash_moments(rounding.moments))
    digest.update(repr((merging.plan.layout.copies, merging.plan.layout.offsets, rounding.merges)).encode())
    digest.update(repr(options.base_f16 is not None).encode())
    return digest.hexdigest()


class _PartSink:
    """Writes rows to a part file and records the CRC-32 of each block."""

    def __init__(self, output: IO[bytes], base: GgufFile, layout: Layout) -> None:
        self._rows = FileSink([output], base, layout)
        self._lock = threading.Lock()
        self.blocks: dict[str, list[tuple[int, int, int]]] = defaultdict(list)

    def put(self, block: Block) -> None:
        checksum = zlib.crc32(block.new.data)
        with self._lock:
            self.blocks[block.target.name].append((block.start, len(block.new), checksum))
        self._rows.put(block)

    def copy(self, start: int, stop: int, to: int) -> None:
        raise AssertionError  # a part's layout copies nothing


def _check_parts(merging: PreparedMerge, parts: Sequence[MergePart], plan: str) -> None:
    """Raise ``FormatError`` unless the parts belong to this merge and hold each row of each changed tensor once."""
    held: dict[str, str] = {}
    for part in parts:
        if part.plan != plan:
            raise FormatError(
                f"{redacted(part.path)}: belongs to another merge; all parts need the same base, adapters and options"
            )
        for name in part.tensors:
            if name in held:
                raise FormatError(f"{redacted(part.path)}: holds {name!r}, as {redacted(held[name])} does")
            held[name] = part.path
    for target in merging.plan.targets:
        if target.name not in held:
            raise FormatError(f"{merging.file.path}: no part of the merge holds {target.name!r}; all are needed")
    for part in parts:
        with part_errors(part.path):
            check_rows(part, {target.name: target.n_rows for target in merging.plan.targets})
