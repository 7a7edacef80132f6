"""Adding a change to quantized rows on one core, to nearest and stochastically.

``python -m tools.bench dither [--types Q4_K]``.

Every instruction set takes turns with the others on the same weights, and the medians are shown. The product is that
of the kernels, without fused operations: what 128 more ranks add to the time of a merge of floats.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from gguflora.files.strict_json import to_json
from gguflora.quants import kernels
from gguflora.quants._lib import isa_names
from gguflora.quants.kernels import Product
from gguflora.quants.types import TYPES, GgmlType, type_named
from support.oracles import libggml
from tools.benchmarks.kernels import N_IN, _weights
from tools.benchmarks.timing import thread_seconds

N_ROWS, RANK, MORE_RANKS = 64, 16, 128
TASKS = ("merge_rows", "choose_scales", "round_stochastic", "choose + round")


def _change(relative: float) -> Product:
    rng = np.random.default_rng(3)
    size = relative * np.sqrt((_weights(N_ROWS) ** 2).mean(axis=1, keepdims=True) / RANK)
    a, b = rng.standard_normal((RANK, N_IN)), rng.standard_normal((N_ROWS, RANK)) * size
    return Product(a.astype(np.float32), b.astype(np.float32))


def _runs(kind: GgmlType, isa: str, change: Product) -> dict[str, Callable[[], object]]:
    imatrix = np.ones(N_IN, np.float32) if kind.needs_imatrix else None
    src = libggml.quantize(_weights(N_ROWS), kind.id, imatrix)
    nearest, dithered = src.copy(), src.copy()
    runs: dict[str, Callable[[], object]] = {
        "merge_rows": lambda: kernels.merge_rows(src, kind, nearest, kind, change, imatrix=imatrix, isa=isa)
    }
    if kind.supports_stochastic:
        runs["choose_scales"] = lambda: kernels.choose_scales(src, kind, dithered, change, isa=isa)
        runs["round_stochastic"] = lambda: kernels.round_stochastic(
            src, kind, dithered, change, gain=1, key=1, first_row=0, isa=isa
        )
    return runs


def _medians(
    runs: Mapping[tuple[str, str], Callable[[], object]], repeats: int, seconds: float
) -> dict[tuple[str, str], float]:
    times: dict[tuple[str, str], list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(thread_seconds(run, seconds))
    return {name: statistics.median(all_times) for name, all_times in times.items()}


def _gflops(isas: list[str], repeats: int, seconds: float) -> dict[str, float]:
    f32, x = type_named("F32"), _weights(N_ROWS).view(np.uint8)
    out = np.empty_like(x)
    factors = [
        (np.ones((rank, N_IN), np.float32), np.ones((N_ROWS, rank), np.float32)) for rank in (16, 16 + MORE_RANKS)
    ]
    runs = {
        (isa, str(len(a))): partial(kernels.merge_rows, x, f32, out, f32, Product(a, b), isa=isa)
        for isa in isas
        for a, b in factors
    }
    times = _medians(runs, repeats, seconds)
    work = 2 * MORE_RANKS * N_ROWS * N_IN / 1e9
    return {isa: work / (times[isa, str(16 + MORE_RANKS)] - times[isa, "16"]) for isa in isas}


def dither(
    types: Annotated[
        str, typer.Option(help="Types to measure, separated by commas; default all that can be rounded stochastically.")
    ] = "",
    isa: Annotated[str, typer.Option(help="Instruction sets, separated by commas; default all of this machine.")] = "",
    relative: Annotated[float, typer.Option(help="Size of the change against that of the weights.")] = 0.015,
    repeats: Annotated[int, typer.Option(help="Turns that each one takes; the median counts.")] = 7,
    seconds: Annotated[float, typer.Option(help="Length of a turn.")] = 0.05,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rates here too.")] = None,
) -> None:
    """Add a change of rank 16 to quantized rows: to nearest, and both passes of stochastic rounding, on one core."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    kinds = [type_named(name) for name in types.split(",") if name] or [
        t for t in TYPES.values() if t.supports_stochastic
    ]
    isas = [name for name in isa.split(",") if name] or isa_names()
    change, results = _change(relative), []
    table = Table(
        title=f"one core, millions of weights a second; a change of {relative:.1%} of the weights, rank {RANK}"
    )
    for heading in ("type", "isa", *TASKS):
        table.add_column(heading, justify="left" if heading in {"type", "isa"} else "right")
    for kind in kinds:
        runs = {(name, task): run for name in isas for task, run in _runs(kind, name, change).items()}
        times = _medians(runs, repeats, seconds)
        for name in isas:
            own = {task: time for (who, task), time in times.items() if who == name}
            if kind.supports_stochastic:
                own["choose + round"] = own["choose_scales"] + own["round_stochastic"]
            rates = {task: N_ROWS * N_IN / time for task, time in own.items()}
            table.add_row(kind.name, name, *(f"{rates[task] / 1e6:.0f}" if task in rates else "" for task in TASKS))
            results.append({"type": kind.name, "isa": name, "weights_per_second": rates})
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    gflops = _gflops(isas, repeats, seconds)
    console.print("product, GFLOP/s: " + ", ".join(f"{name} {rate:.0f}" for name, rate in gflops.items()))
    if json_file:
        about = {"n_in": N_IN, "rank": RANK, "relative": relative, "product_gflops": gflops}
        json_file.write_text(to_json(about | {"results": results}, indent=1) + "\n", encoding="utf-8")
