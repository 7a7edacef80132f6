"""``gguflora diff``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

import gguflora
from gguflora.cli.app import app, console, print_report
from gguflora.cli.options import AdapterBase, AsJson
from gguflora.lora.diff import DiffReport


@app.command()
def diff(
    a: Annotated[str, typer.Argument(help="PEFT adapter directory or GGUF LoRA file.")],
    b: Annotated[str, typer.Argument(help="The adapter to compare it with.")],
    base: AdapterBase = None,
    as_json: AsJson = False,
) -> None:
    """Compare two adapters: cosines of their deltas, overlap of their subspaces, tensors that only one changes.

    **Example**

    gguflora diff ./monday ./tuesday
    """
    print_report(gguflora.diff(a, b, base=base), _print_difference, as_json=as_json)


def _print_difference(report: DiffReport) -> None:
    console.print(
        f"cosine {report.cosine:.4f}, norm of B / norm of A {report.norm_ratio:.4g}, {len(report.changes)} changes in "
        f"both, {len(report.only_a)} only in A, {len(report.only_b)} only in B",
        markup=False,
    )
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("tensor", "cosine", "norm A", "norm B", "overlap in", "overlap out", "difference"):
        table.add_column(title)
    for change in report.changes:
        numbers = (change.cosine, *change.norms, change.overlap_in, change.overlap_out, change.difference)
        table.add_row(escape(change.name), *(f"{number:.4g}" for number in numbers))
    console.print(table)
    for which, only in (("A", report.only_a), ("B", report.only_b)):
        for name, norm in only.items():
            console.print(f"only in {which}: {name} (norm {norm:.4g})", markup=False)
