"""gguflora's kernels against ggml's on one core: ``python -m tools.bench kernels [--types Q4_K,Q6_K] [--json FILE]``.

For every type the bytes (and floats) are compared first; then ggml and every instruction set of this machine take
turns on the same weights, all writing to the same memory, and the medians are shown: millions of weights in a second of
the thread's own time, and how many times ggml's rate. Dequantizing is measured on rows that stay in the second-level
cache, as a merge has them; larger ones are bound by memory whoever converts them.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from gguflora.files.strict_json import to_json
from gguflora.quants import kernels
from gguflora.quants._lib import isa_names
from gguflora.quants.types import TYPES, GgmlType, type_named
from support.oracles import libggml
from tools.benchmarks.timing import thread_seconds

N_IN = 4096
CACHED_ROWS = 16
TASKS = ("quantize", "quantize with imatrix", "dequantize")


def _weights(n_rows: int) -> np.ndarray:
    """Like a layer's: normal, the rows of different size."""
    rng = np.random.default_rng(1)
    return (rng.standard_normal((n_rows, N_IN)) * rng.uniform(0.005, 0.05, (n_rows, 1))).astype(np.float32)


def _importance() -> np.ndarray:
    return (np.random.default_rng(2).standard_normal(N_IN) ** 2 + 1e-3).astype(np.float32)


def _runs(task: str, kind: GgmlType, isas: list[str], n_rows: int) -> tuple[dict[str, Callable[[], None]], np.ndarray]:
    """Runners by who runs, ggml and every instruction set, and the output that all of them write."""
    x = _weights(n_rows)
    imatrix = _importance() if task == "quantize with imatrix" else None
    packed = libggml.quantize(x, kind.id, _importance() if kind.needs_imatrix else imatrix)
    out = np.empty_like(x if task == "dequantize" else packed)
    runs: dict[str, Callable[[], None]] = {}
    for who in ("ggml", *isas):
        isa = None if who == "ggml" else who
        if task == "dequantize":
            runs[who] = lambda isa=isa: _dequantize(packed, kind, out, isa)  # type: ignore[misc]
        else:
            runs[who] = lambda isa=isa: _quantize(x, kind, out, imatrix, isa)  # type: ignore[misc]
    return runs, out


def _quantize(x: np.ndarray, kind: GgmlType, out: np.ndarray, imatrix: np.ndarray | None, isa: str | None) -> None:
    if isa is None:
        libggml.quantize_into(out, x, kind.id, imatrix)
    else:
        kernels.quantize_rows(x, kind, out, imatrix=imatrix, isa=isa)


def _dequantize(packed: np.ndarray, kind: GgmlType, out: np.ndarray, isa: str | None) -> None:
    if isa is None:
        libggml.dequantize_into(out, packed, kind.id)
    else:
        kernels.dequantize_rows(packed, kind, out, isa=isa)


def measure(task: str, kind: GgmlType, isas: list[str], repeats: int, slice_seconds: float) -> dict[str, float]:
    """Weights per second by who runs.

    Raises:
        SystemExit: if anybody's output is not ggml's.
    """
    ggml_seconds = thread_seconds(_runs(task, kind, [], 1)[0]["ggml"], 0.01)
    n_rows = int(np.clip(slice_seconds / ggml_seconds, 4, CACHED_ROWS if task == "dequantize" else 256))
    runs, out = _runs(task, kind, isas, n_rows)
    runs["ggml"]()
    expected = out.view(np.uint8).copy()
    for who, run in runs.items():
        out.view(np.uint8)[:] = 0xAA
        run()
        if not np.array_equal(out.view(np.uint8), expected):
            raise SystemExit(f"{task} {kind.name}: {who} differs from ggml")
    times: dict[str, list[float]] = {who: [] for who in runs}
    for _ in range(repeats):
        for who, run in runs.items():
            times[who].append(thread_seconds(run, slice_seconds))
    return {who: n_rows * N_IN / statistics.median(t) for who, t in times.items()}


def _table(results: list[dict[str, object]], isas: list[str]) -> Table:
    table = Table(title=f"one core, millions of weights a second (times ggml's rate); rows of {N_IN}")
    for heading in ("type", "task", "ggml", *isas):
        table.add_column(heading, justify="left" if heading in {"type", "task"} else "right")
    for result in results:
        rates = result["weights_per_second"]
        assert isinstance(rates, dict)
        ours = [f"{rates[isa] / 1e6:.0f} ({rates[isa] / rates['ggml']:.1f}x)" for isa in isas]
        table.add_row(str(result["type"]), str(result["task"]), f"{rates['ggml'] / 1e6:.1f}", *ours)
    return table


def measure_kernels(
    types: Annotated[str, typer.Option(help="Types to measure, separated by commas; default all.")] = "",
    tasks: Annotated[str, typer.Option(help="Tasks, separated by commas; default all.")] = ",".join(TASKS),
    isa: Annotated[str, typer.Option(help="Instruction sets, separated by commas; default all of this machine.")] = "",
    repeats: Annotated[int, typer.Option(help="Turns that each one takes; the median counts.")] = 7,
    seconds: Annotated[float, typer.Option(help="Length of a turn.")] = 0.05,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rates here too.")] = None,
) -> None:
    """Quantize and dequantize: ggml and every instruction set in turns, on one core, bytes checked first."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    kinds = [type_named(name) for name in types.split(",") if name] or list(TYPES.values())
    isas = [name for name in isa.split(",") if name] or isa_names()
    results: list[dict[str, object]] = []
    for kind in kinds:
        for task in tasks.split(","):
            if task == "quantize" and kind.needs_imatrix:
                continue
            if kind.name == "F32" or (task == "quantize with imatrix" and kind.block_weights == 1):
                continue
            rates = measure(task, kind, isas, repeats, seconds)
            results.append({"type": kind.name, "task": task, "weights_per_second": rates})
    Console(width=None if sys.stdout.isatty() else 140).print(_table(results, isas))
    if json_file:
        json_file.write_text(to_json({"n_in": N_IN, "results": results}, indent=1) + "\n", encoding="utf-8")
