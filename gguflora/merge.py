"""Merge adapters into a quantized GGUF file: ``merge``.

The output is the base file but for the rows of the changed tensors: those are dequantized, changed and quantized
again, a block of rows at a time, on several threads, while the rest is copied by the kernel. No model is ever held in
memory.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
from numpy.typing import NDArray

from gguflora import _native
from gguflora._version import __version__
from gguflora.adapters import Adapter, read_adapter
from gguflora.architectures import place
from gguflora.base_model import describe
from gguflora.deltas import LowRank, sum_factors
from gguflora.errors import AdapterError, NonFiniteError, QuantizationError
from gguflora.files.copying import copy_range
from gguflora.files.gguf import GgufFile, TensorEntry, encode_entry
from gguflora.files.output import atomic_output, check_target

AdapterPath = str | os.PathLike[str]
AdapterArgument = AdapterPath | Sequence[AdapterPath | tuple[AdapterPath, float]]
Progress = Callable[[int, int], None]

BLOCK_WEIGHTS: Final = 1 << 20
"""Weights of one task: enough to make Python's share of the time small, and a few megabytes of rows."""
COPY_BYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What `merge` did, or with ``dry_run`` would do.

    Attributes:
        output: the merged GGUF file.
        adapters: name, SHA-256 and scale of each adapter.
        tensors: number of changed tensors by quant type.
        weights: number of weights in them.
        size: of the output, in bytes.
        seconds: wall time.
        threads: used.
        dry_run: True if nothing was written.
    """

    output: Path
    adapters: tuple[tuple[str, str, float], ...]
    tensors: dict[str, int]
    weights: int
    size: int
    seconds: float
    threads: int
    dry_run: bool

    @property
    def weights_per_second(self) -> float:
        """Changed weights for each second of wall time."""
        return self.weights / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return {**asdict(self), "output": str(self.output), "weights_per_second": self.weights_per_second}


@dataclass(frozen=True, slots=True)
class _Plan:
    """The changes of each tensor that is touched, and the header of the output."""

    changes: Mapping[str, list[tuple[LowRank, float]]]
    header: bytes
    size: int


def merge(
    base: str | os.PathLike[str],
    adapters: AdapterArgument,
    out: str | os.PathLike[str],
    *,
    threads: int | None = None,
    dry_run: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Write ``base`` with adapters merged in, every tensor in its own quant type.

    Args:
        base: GGUF file of any quant types; opened read-only.
        adapters: a PEFT directory or GGUF LoRA file, or a sequence of them or of (path, scale); summed, then
            rounded once.
        out: the file to write.
        threads: number of threads; by default one for each core this process may use.
        dry_run: check everything, write nothing.
        force: overwrite ``out``.
        progress: called with (bytes done, bytes in all), from several threads but never at once.

    Raises:
        GgufloraError: if something cannot be read, does not fit together or cannot be written; ``out`` is then as
            it was.
    """
    started, target = time.perf_counter(), Path(out)
    used_threads = threads or len(os.sched_getaffinity(0))
    with GgufFile(base) as file:
        sources = [(read_adapter(path), scale) for path, scale in _with_scales(adapters)]
        plan = _make_plan(file, sources)
        inputs = [file.path, *(source.path for source, _ in sources)]
        check_target(target, inputs, force=force or dry_run, size=plan.size)
        if not dry_run:
            with atomic_output(target) as output:
                _Writer(file, output, plan, used_threads, progress).run()
                file.check_unchanged()
        touched = [file.tensors[name] for name in plan.changes]
    types = [tensor.type.name for tensor in touched]
    return MergeReport(
        output=target,
        adapters=tuple((source.name, source.sha256, scale) for source, scale in sources),
        tensors={name: types.count(name) for name in sorted(set(types))},
        weights=sum(tensor.n_rows * tensor.n_in for tensor in touched),
        size=plan.size,
        seconds=time.perf_counter() - started,
        threads=used_threads,
        dry_run=dry_run,
    )


def _with_scales(adapters: AdapterArgument) -> list[tuple[AdapterPath, float]]:
    given = [adapters] if isinstance(adapters, str | os.PathLike) else adapters
    pairs = [item if isinstance(item, tuple) else (item, 1.0) for item in given]
    for path, scale in pairs:
        if not abs(scale) <= np.finfo(np.float32).max:
            raise AdapterError(f"{path}: its scale is {scale}, expected a finite number")
    return [(path, float(scale)) for path, scale in pairs]


def _make_plan(file: GgufFile, sources: Sequence[tuple[Adapter, float]]) -> _Plan:
    model = describe(file)
    changes: dict[str, list[tuple[LowRank, float]]] = {}
    for source, scale in sources:
        for name, change in place(source, model).items():
            if scale * change.factor:
                changes.setdefault(name, []).append((change, scale))
    for name in changes:
        kind = file.tensors[name].type
        if kind.id not in _native.TYPES or kind.needs_imatrix:
            raise QuantizationError(f"{file.path}: tensor {name!r} is {kind.name}, which cannot be quantized again")
    header = file.header_with(_record(file, sources))
    return _Plan(changes, header, len(header) + file.size - file.data_start)


def _record(file: GgufFile, sources: Sequence[tuple[Adapter, float]]) -> dict[str, bytes]:
    """Metadata that says what was merged, after what an earlier merge has said."""
    lists: dict[str, list[Any]] = {
        "gguflora.merged.names": [source.name for source, _ in sources],
        "gguflora.merged.sha256": [source.sha256 for source, _ in sources],
        "gguflora.merged.scales": [scale for _, scale in sources],
    }
    record = {key: encode_entry(key, [*(file.metadata.get(key) or []), *values]) for key, values in lists.items()}
    return {"gguflora.version": encode_entry("gguflora.version", __version__), **record}


class _Writer:
    """Writes the output: header, copied ranges, and the changed tensors block by block."""

    def __init__(self, base: GgufFile, output: IO[bytes], plan: _Plan, threads: int, progress: Progress | None) -> None:
        self.base = base
        self.target = output.fileno()
        self.plan = plan
        self.threads = threads
        self.shift = len(plan.header) - base.data_start
        self._progress = progress
        self._done = 0
        self._lock = threading.Lock()
        self._cancelled = threading.Event()

    def run(self) -> None:
        """Write everything; the first error stops all threads and is raised."""
        os.truncate(self.target, self.plan.size)
        os.pwrite(self.target, self.plan.header, 0)
        pending: set[Future[None]] = set()
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="gguflora")
        try:
            for task in self._tasks():
                while len(pending) >= 2 * self.threads:
                    pending = _collect(pending, FIRST_COMPLETED)
                pending.add(pool.submit(self._unless_cancelled, task))
            while pending:
                pending = _collect(pending, FIRST_COMPLETED)
        finally:
            self._cancelled.set()
            pool.shutdown(cancel_futures=True)

    def _unless_cancelled(self, task: Callable[[], int]) -> None:
        if self._cancelled.is_set():
            return
        done = task()
        with self._lock:
            self._done += done
            if self._progress:
                self._progress(self._done, self.base.size - self.base.data_start)

    def _tasks(self) -> Iterator[Callable[[], int]]:
        """Everything to do, each task returning the number of bytes it wrote, in the order of the file."""
        at = self.base.data_start
        for tensor in sorted((self.base.tensors[name] for name in self.plan.changes), key=lambda tensor: tensor.offset):
            yield from self._copies(at, tensor.offset)
            yield from self._blocks(tensor)
            at = tensor.offset + tensor.nbytes
        yield from self._copies(at, self.base.size)

    def _copies(self, start: int, end: int) -> Iterator[Callable[[], int]]:
        for first in range(start, end, COPY_BYTES):
            yield lambda first=first: self._copy(first, min(first + COPY_BYTES, end))  # type: ignore[misc]

    def _copy(self, start: int, end: int) -> int:
        copy_range(self.base.fileno(), start, self.target, start + self.shift, end - start)
        return end - start

    def _blocks(self, tensor: TensorEntry) -> Iterator[Callable[[], int]]:
        a, b = sum_factors(self.plan.changes[tensor.name])
        step = max(1, BLOCK_WEIGHTS // tensor.n_in)
        for first in range(0, tensor.n_rows, step):
            yield lambda first=first: self._merge_rows(tensor, a, b, first, min(first + step, tensor.n_rows))  # type: ignore[misc]

    def _merge_rows(
        self, tensor: TensorEntry, a: NDArray[np.float32], b: NDArray[np.float32], first: int, last: int
    ) -> int:
        rows = self.base.read_rows(tensor, first, last)
        try:
            _native.merge_rows(rows, tensor.type, rows, tensor.type, a, b[first:last])
        except NonFiniteError as error:
            raise NonFiniteError(
                f"{self.base.path}: tensor {tensor.name!r}, row {first + error.row}, column {error.column}: {error}; "
                "the base, an adapter, or their sum at this scale is out of range",
                first + error.row,
                error.column,
            ) from error
        _write_at(self.target, rows, tensor.offset + self.shift + first * rows.shape[1])
        return rows.nbytes


def _collect(pending: set[Future[None]], when: str) -> set[Future[None]]:
    """Wait for some of the pending tasks; raises the first error among them."""
    done, left = wait(pending, return_when=when)
    for future in done:
        future.result()
    return left


def _write_at(handle: int, rows: NDArray[np.uint8], offset: int) -> None:
    view = memoryview(rows.data).cast("B")
    while view:
        count = os.pwrite(handle, view, offset)
        view, offset = view[count:], offset + count
