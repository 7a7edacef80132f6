"""Whole files in presets against llama.cpp's own quantizer: ``python -m tools.bench quantize [--model smollm2|1.1b]``.

Both write the same preset from the same F16 file (in the page cache) on all cores, each in a process of its own, in
turns. The two files must be equal, byte for byte. Seconds are those of the one call, ``gguflora.quantize`` or
``llama_model_quantize``: the imports before it, about half a CPU second for the command ``gguflora quantize``, are not
counted on either side. The peak is the process's, imports included.
"""

from __future__ import annotations

import filecmp
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import gguflora
from gguflora.files.strict_json import to_json
from support.llama_quantize import imatrix_of
from tools.benchmarks.models import CACHE, LLAMAS, base_file
from tools.benchmarks.processes import Usage, run
from tools.benchmarks.quantize_once import OURS, THEIRS
from tools.real_models import real_model

PRESETS = ("Q4_K_M", "Q5_K_M", "Q3_K_M", "IQ4_XS", "IQ3_M")
CORES = len(os.sched_getaffinity(0))
_PYTHON_PATH = {"PYTHONPATH": os.pathsep.join(map(str, (Path(gguflora.__file__).resolve().parent.parent, *sys.path)))}


def source_file(folder: Path, model: str) -> Path:
    """The F16 file of a model, made unless it is there."""
    if model in LLAMAS:
        return base_file(folder, LLAMAS[model], "F16")
    quantized = real_model(model)
    path = folder / f"{quantized.stem}-as-F16.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        gguflora.quantize(quantized, path, "F16")
    return path


def _run(who: str, source: Path, out: Path, preset: str, imatrix: Path | None) -> Usage:
    figures = out.with_suffix(".json")
    command = [sys.executable, "-P", "-m", "tools.benchmarks.quantize_once", who, source, out, preset, imatrix or ""]
    whole = run([*command, figures], os.environ | _PYTHON_PATH)
    call = json.loads(figures.read_text(encoding="utf-8"))
    return Usage(call["wall"], call["cpu"], whole.memory)


def _measure(source: Path, preset: str, imatrix: Path | None, repeats: int, folder: Path) -> dict[str, Any]:
    """Medians of both.

    Raises:
        SystemExit: if the two files differ.
    """
    usages: dict[str, list[Usage]] = {OURS: [], THEIRS: []}
    outs = {who: folder / f"{who}.gguf" for who in usages}
    for _ in range(repeats):
        for who, taken in usages.items():
            subprocess.run(["cat", source], stdout=subprocess.DEVNULL, check=True)  # into the page cache
            outs[who].unlink(missing_ok=True)
            taken.append(_run(who, source, outs[who], preset, imatrix))
    if not filecmp.cmp(outs[OURS], outs[THEIRS], shallow=False):
        raise SystemExit(f"{preset}: the files differ")
    result: dict[str, Any] = {"preset": preset, "imatrix": imatrix is not None, "bytes": outs[OURS].stat().st_size}
    for who, taken in usages.items():
        result[who] = {
            "cpu_seconds": statistics.median(usage.cpu for usage in taken),
            "seconds": statistics.median(usage.wall for usage in taken),
            "peak_bytes": max(usage.memory for usage in taken),
        }
    result["cpu_ratio"] = result[THEIRS]["cpu_seconds"] / result[OURS]["cpu_seconds"]
    print(to_json(result), file=sys.stderr, flush=True)
    return result


def _table(results: list[dict[str, Any]], title: str) -> Table:
    table = Table(title=title)
    for heading in ("preset", "CPU s", "wall s", "peak MB", "llama.cpp CPU s", "wall s", "peak MB", "less CPU"):
        table.add_column(heading, justify="left" if heading == "preset" else "right")
    for result in results:
        cells = [
            f"{result[who][key]:{form}}"
            for who in (OURS, THEIRS)
            for key, form in (("cpu_seconds", ".2f"), ("seconds", ".2f"))
        ]
        peaks = [f"{result[who]['peak_bytes'] / 1e6:.0f}" for who in (OURS, THEIRS)]
        name = result["preset"] + (", imatrix" if result["imatrix"] else "")
        table.add_row(name, *cells[:2], peaks[0], *cells[2:], peaks[1], f"{result['cpu_ratio']:.1f}x")
    return table


def quantize(
    model: Annotated[str, typer.Option(help=f"smollm2, gemma3, or the size of a llama: {', '.join(LLAMAS)}.")] = "1.1b",
    presets: Annotated[str, typer.Option(help="Presets, separated by commas.")] = ",".join(PRESETS),
    imatrix: Annotated[str, typer.Option(help="without, with or both: an importance matrix.")] = "both",
    repeats: Annotated[int, typer.Option(min=1, help="Turns that each one takes; the median counts.")] = 1,
    folder: Annotated[Path, typer.Option(help="Where models are kept and outputs written.")] = CACHE,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results here too.")] = None,
) -> None:
    """Quantize an F16 model to presets: gguflora and llama_model_quantize in turns, bytes compared."""
    source = source_file(folder, model)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        matrix = imatrix_of(source, Path(scratch, "random.imatrix"))
        choices: list[Path | None] = (
            [None] if imatrix == "without" else [matrix] if imatrix == "with" else [None, matrix]
        )
        results = [
            _measure(source, preset, choice, repeats, Path(scratch))
            for preset in presets.split(",")
            for choice in choices
        ]
    Console(width=None if sys.stdout.isatty() else 140).print(_table(results, f"{source.name} on {CORES} cores"))
    if json_file:
        report = {"source": source.name, "cores": CORES, "results": results}
        json_file.write_text(to_json(report, indent=1) + "\n", encoding="utf-8")
