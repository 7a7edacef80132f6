"""A merge into a quantized file against the detour through F16: ``python -m tools.bench merge [--model 1.1b|8b]``.

In turns: a plain copy of the base, gguflora with both roundings, and llama.cpp's way, ``llama-export-lora`` to F16 and
``llama-quantize`` back. Everybody starts from the same quantized file (in the page cache) and the same adapter, may use
all cores, and ends with the output on the disk. Medians; who runs is a process of its own, Python's start included.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import gguflora
from gguflora.files.gguf import GgufFile
from gguflora.files.strict_json import to_json
from tools.benchmarks.models import CACHE, LLAMAS, adapter_files, base_file
from tools.benchmarks.peers import llama_cpp_tools
from tools.benchmarks.processes import Usage, run

INSTALLED = Path(gguflora.__file__).resolve().parent.parent
ROUNDINGS = ("adaptive", "nearest")
PEERS, COPY = "export-lora + quantize", "plain copy"
RECIPE = "Q4_K_M"
CORES = len(os.sched_getaffinity(0))


def _gguflora(base: Path, adapter: Path, rounding: str, out: Path) -> Usage:
    merge = [sys.executable, "-P", "-m", "gguflora", "merge", base, "--lora", adapter]
    return run([*merge, "-o", out, "--rounding", rounding], os.environ | {"PYTHONPATH": str(INSTALLED)})


def _copy(base: Path, out: Path) -> Usage:
    return run(["sh", "-c", 'cp --reflink=never "$0" "$1" && sync "$1"', base, out])


def _peers(tools: Path, base: Path, lora: Path, out: Path) -> Usage:
    """To F16, back to the base's types, and to the disk."""
    middle = out.with_suffix(".f16.gguf")
    export = run([tools / "llama-export-lora", "-m", base, "--lora", lora, "-o", middle, "-t", CORES])
    quantize = run([tools / "llama-quantize", "--allow-requantize", middle, out, RECIPE, CORES])
    middle.unlink()
    return export.then(quantize).then(run(["sync", out]))


def _types(path: Path) -> dict[str, str]:
    with GgufFile(path) as file:
        return {name: tensor.type.name for name, tensor in file.tensors.items()}


def _measure(runs: dict[str, Callable[[Path], Usage]], base: Path, repeats: int, folder: Path) -> list[dict[str, Any]]:
    """Medians by who runs.

    Raises:
        SystemExit: if anybody's output has other types than the base.
    """
    usages: dict[str, list[Usage]] = {who: [] for who in runs}
    sizes = {}
    for turn in range(repeats):
        for who, measured in runs.items():
            subprocess.run(["cat", base], stdout=subprocess.DEVNULL, check=True)  # into the page cache
            out = folder / "out.gguf"
            usages[who].append(measured(out))
            sizes[who] = out.stat().st_size
            if _types(out) != _types(base):
                raise SystemExit(f"{who}: the output's types are not the base's")
            out.unlink()
            print(f"turn {turn + 1} of {repeats}: {who}: {usages[who][-1]}", file=sys.stderr, flush=True)
    return [
        {
            "who": who,
            "seconds": statistics.median(usage.wall for usage in taken),
            "cpu_seconds": statistics.median(usage.cpu for usage in taken),
            "peak_bytes": max(usage.memory for usage in taken),
            "output_bytes": sizes[who],
        }
        for who, taken in usages.items()
    ]


def _add_ratios(results: list[dict[str, Any]]) -> None:
    """What bounds each: the share of a plain copy's rate, and of the cores' time; and how many times less CPU."""
    by_who = {result["who"]: result for result in results}
    for result in results:
        result["share_of_copy_rate"] = by_who[COPY]["seconds"] / result["seconds"]
        result["share_of_cores"] = result["cpu_seconds"] / result["seconds"] / CORES
        if PEERS in by_who:
            result["peers_cpu_ratio"] = by_who[PEERS]["cpu_seconds"] / result["cpu_seconds"]
            result["peers_wall_ratio"] = by_who[PEERS]["seconds"] / result["seconds"]


def _table(results: list[dict[str, Any]], title: str) -> Table:
    table = Table(title=title)
    headings = (
        "",
        "wall s",
        "CPU s",
        "peak MB",
        "output MB",
        "of a copy's rate",
        "of the cores",
        "peers' wall",
        "peers' CPU",
    )
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    for result in results:
        ratios = [f"{result[key]:.1f}x" if key in result else "" for key in ("peers_wall_ratio", "peers_cpu_ratio")]
        table.add_row(
            str(result["who"]),
            f"{result['seconds']:.2f}",
            f"{result['cpu_seconds']:.2f}",
            f"{result['peak_bytes'] / 1e6:.0f}",
            f"{result['output_bytes'] / 1e6:.0f}",
            f"{result['share_of_copy_rate']:.0%}",
            f"{result['share_of_cores']:.0%}",
            *ratios,
        )
    return table


def merge(
    model: Annotated[str, typer.Option(help=f"Size of the llama: {', '.join(LLAMAS)}.")] = "1.1b",
    repeats: Annotated[int, typer.Option(min=1, help="Turns that each one takes; the median counts.")] = 3,
    peers: Annotated[
        bool | None, typer.Option("--peers/--no-peers", help="Run llama.cpp's tools too; by default up to 1.1b.")
    ] = None,
    roundings: Annotated[str, typer.Option(help="Roundings to measure, separated by commas.")] = ",".join(ROUNDINGS),
    folder: Annotated[Path, typer.Option(help="Where models are kept and outputs written.")] = CACHE,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results here too.")] = None,
) -> None:
    """Merge a rank-16 adapter on all linear layers into a Q4_K_M llama: gguflora and llama.cpp's tools in turns."""
    llama = LLAMAS[model]
    base = base_file(folder, llama, RECIPE)
    adapter, lora = adapter_files(folder, llama)
    runs: dict[str, Callable[[Path], Usage]] = {COPY: partial(_copy, base)}
    runs |= {
        f"gguflora {rounding}": partial(_gguflora, base, adapter, rounding)
        for rounding in roundings.split(",")
        if rounding
    }
    if peers or (peers is None and model != "8b"):
        runs[PEERS] = partial(_peers, llama_cpp_tools(), base, lora)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        results = _measure(runs, base, repeats, Path(scratch))
    _add_ratios(results)
    adapter_bytes = (adapter / "adapter_model.safetensors").stat().st_size
    title = f"{base.name} and an adapter of {adapter_bytes / 1e6:.0f} MB on {CORES} cores"
    Console(width=None if sys.stdout.isatty() else 140).print(_table(results, title))
    if json_file:
        report = {"base": base.name, "adapter_bytes": adapter_bytes, "cores": CORES, "results": results}
        json_file.write_text(to_json(report, indent=1) + "\n", encoding="utf-8")
