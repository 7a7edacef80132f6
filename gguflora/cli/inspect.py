"""``gguflora inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

import gguflora
from gguflora.cli.app import app, console, print_report
from gguflora.cli.options import AsJson, TextOnly, TrustNames
from gguflora.lora.inspect import InspectReport


@app.command()
def inspect(
    adapter: Annotated[str, typer.Argument(help="PEFT or mlx-lm adapter directory, or GGUF LoRA file.")],
    base: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Base model, to measure the deltas and to predict what llama.cpp can apply."),
    ] = None,
    ranks: Annotated[bool, typer.Option("--ranks", help="Show what lower ranks would keep and save.")] = False,
    text_only: TextOnly = False,
    plot: Annotated[Path | None, typer.Option(help="PNG, SVG or PDF file to write, with the singular values.")] = None,
    trust_names: TrustNames = False,
    as_json: AsJson = False,
) -> None:
    """Show what an adapter is, what it changes, and what llama.cpp cannot apply at run time.

    **Examples**

    gguflora inspect ./my-adapter

    gguflora inspect ./my-adapter --base model-Q4_K_M.gguf --json

    gguflora inspect my-adapter.gguf --ranks --plot spectra.png
    """
    report = gguflora.inspect(adapter, base, ranks=ranks, text_only=text_only, plot=plot, trust_names=trust_names)
    print_report(report, _print_inspection, as_json=as_json)
    if ranks and not as_json:
        _print_ranks(report)


def _print_inspection(report: InspectReport) -> None:
    effect = f"{len(report.changes)} tensors changed"
    if report.virtual_tokens:
        effect = f"{report.virtual_tokens} virtual tokens in front of the prompt (use attach, run or serve)"
    console.print(f"{report.adapter}: {report.method}, {effect}, {report.size / 1e6:.2f} MB", markup=False)
    if not report.changes:
        return
    if report.invocation_tokens:
        console.print(f"activated by the tokens {', '.join(map(str, report.invocation_tokens))}", markup=False)
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("tensor", "shape", "rank", "factor", "norm", "relative", "problem at run time"):
        table.add_column(title)
    for change in report.changes:
        shape = "x".join(map(str, change.shape or ())) or "?"
        numbers = (change.rank, change.factor, change.norm, change.relative)
        cells = ("-" if number is None else f"{number:.4g}" for number in numbers)
        table.add_row(escape(change.name), shape, *cells, escape(change.problem or ""))
    console.print(table)
    if report.problems:
        console.print(f"{report.problems} of {len(report.changes)} changes cannot be applied at run time", markup=False)


def _print_ranks(report: InspectReport) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("modules", "rank", "size", "kept energy", "saving"):
        table.add_column(title, justify="left" if title == "modules" else "right")
    for choice in report.ranks:
        size = f"{choice.size / 1e6:.3f} MB"
        table.add_row(escape(choice.kind), str(choice.rank), size, f"{choice.energy:.4%}", f"{choice.saving:.0%}")
    console.print(table)
