"""``gguflora imatrix``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import gguflora
from gguflora.calibration.imatrix import ImatrixReport
from gguflora.cli.app import app, console, print_report, progress_bar
from gguflora.cli.options import AsJson, Force, Threads


@app.command()
def imatrix(
    base: Annotated[str, typer.Argument(help="Model: a GGUF file, best in F16, BF16 or Q8_0.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Importance matrix to write, a GGUF file.")],
    text: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="Text to evaluate, best like that which the model will read; default: a built-in text."
        ),
    ] = None,
    ctx: Annotated[int, typer.Option(min=16, help="Tokens per window; each window starts without context.")] = 512,
    chunks: Annotated[int | None, typer.Option(min=1, help="Number of windows; default: all of the text.")] = None,
    process_output: Annotated[
        bool, typer.Option("--process-output", help="Also measure the output weight, as llama-imatrix's option does.")
    ] = False,
    as_json: AsJson = False,
    threads: Threads = None,
    force: Force = False,
) -> None:
    """Measure how much each column of a model's weights matters: llama.cpp's importance matrix, by llama.cpp itself.

    Needs llama-cpp-python (the extra "runtime"). quantize, merge and llama-quantize read the file.

    **Examples**

    gguflora imatrix model-F16.gguf -o model.imatrix.gguf

    gguflora imatrix model-F16.gguf --text corpus.txt --ctx 512 -o model.imatrix.gguf
    """
    with progress_bar("evaluating", unit="tokens") as progress:
        report = gguflora.imatrix(
            base,
            out,
            text=text,
            ctx=ctx,
            chunks=chunks,
            process_output=process_output,
            threads=threads,
            force=force,
            progress=progress,
        )
    print_report(report, _print_measured, as_json=as_json)


def _print_measured(report: ImatrixReport) -> None:
    console.print(
        f"wrote {report.output}: {len(report.tensors)} weights on {report.chunks} x {report.ctx} tokens of "
        f"{report.text}, {report.size / 1e6:.1f} MB",
        markup=False,
    )
    console.print(f"took {report.seconds:.2f} s on {report.threads} threads", markup=False)
