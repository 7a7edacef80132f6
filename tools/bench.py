"""Measure gguflora, always beside its peer in the same run: ``python -m tools.bench --help``."""

from __future__ import annotations

import typer

from tools.benchmarks.algebra import algebra
from tools.benchmarks.combining import combining
from tools.benchmarks.concatenate import measure_concatenation
from tools.benchmarks.dither import dither
from tools.benchmarks.fidelity import fidelity
from tools.benchmarks.hotswap import hotswap
from tools.benchmarks.kernels import measure_kernels
from tools.benchmarks.merge import merge
from tools.benchmarks.quantize import quantize
from tools.benchmarks.serve import serve
from tools.benchmarks.train import train

app = typer.Typer(add_completion=False)
app.command()(algebra)
app.command()(combining)
app.command("concatenate")(measure_concatenation)
app.command()(dither)
app.command("kernels")(measure_kernels)
app.command()(hotswap)
app.command()(merge)
app.command()(quantize)
app.command()(fidelity)
app.command()(serve)
app.command()(train)


@app.callback()
def main() -> None:
    """Measure gguflora."""


if __name__ == "__main__":
    app()
