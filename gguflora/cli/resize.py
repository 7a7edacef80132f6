"""``gguflora resize``."""

from __future__ import annotations

from typing import Annotated

import typer

import gguflora
from gguflora.cli.app import app, console, print_errors, print_report
from gguflora.cli.options import AdapterBase, AdapterOut, AsJson, Force, OutType
from gguflora.lora.resize import ResizeReport


@app.command()
def resize(
    adapter: Annotated[str, typer.Argument(help="PEFT adapter directory or GGUF LoRA file.")],
    out: AdapterOut,
    rank: Annotated[int | None, typer.Option(min=1, help="Highest rank of a delta.")] = None,
    energy: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Keep this share of each delta's squared norm, say 0.99.")
    ] = None,
    base: AdapterBase = None,
    outtype: OutType = "auto",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write the closest adapter of a lower rank, and report the error of each delta.

    **Examples**

    gguflora resize my-adapter.gguf --rank 8 -o small.gguf

    gguflora resize ./my-adapter --energy 0.99 -o ./my-smaller-adapter
    """
    if (rank is None) == (energy is None):
        raise typer.BadParameter("give either --rank or --energy")
    report = gguflora.resize(adapter, out, rank=rank, energy=energy, base=base, outtype=outtype, force=force)
    print_report(report, _print_resized, as_json=as_json)


def _print_resized(report: ResizeReport) -> None:
    low, high = report.ranks
    console.print(
        f"wrote {report.output}: {report.tensors} changes, ranks {report.old_ranks[0]} to {report.old_ranks[1]} "
        f"before, {low} to {high} now, {report.old_size / 1e6:.2f} MB before, {report.size / 1e6:.2f} MB now",
        markup=False,
    )
    print_errors(report.errors)
