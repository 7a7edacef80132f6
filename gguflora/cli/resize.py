"""``gguflora resize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import gguflora
from gguflora.cli.app import app, console, print_json, print_warnings
from gguflora.cli.convert import OutType


@app.command()
def resize(
    adapter: Annotated[Path, typer.Argument(help="PEFT adapter directory or GGUF LoRA file.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="GGUF LoRA file (.gguf) or PEFT directory to write.")],
    rank: Annotated[int | None, typer.Option(min=1, help="The rank that no change shall exceed.")] = None,
    energy: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Keep this share of each change's squared norm, say 0.99.")
    ] = None,
    base: Annotated[Path | None, typer.Option(help="Base model: needed from PEFT to GGUF and back.")] = None,
    outtype: Annotated[OutType, typer.Option(help="Type of the factors in a GGUF file.")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Overwrite the output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Write the closest adapter of a lower rank; says how far each change is from what it was.

    **Examples**

    gguflora resize my-adapter.gguf --rank 8 -o small.gguf

    gguflora resize ./my-adapter --energy 0.99 -o ./my-smaller-adapter
    """
    if (rank is None) == (energy is None):
        raise typer.BadParameter("give either --rank or --energy")
    report = gguflora.resize(adapter, out, rank=rank, energy=energy, base=base, outtype=outtype, force=force)
    print_warnings(report.warnings)
    if as_json:
        print_json(report)
        return
    low, high = report.ranks
    console.print(
        f"wrote {report.output}: {report.tensors} changes, ranks {report.old_ranks[0]} to {report.old_ranks[1]} "
        f"before, {low} to {high} now, {report.old_size / 1e6:.2f} MB before, {report.size / 1e6:.2f} MB now",
        markup=False,
    )
    for name, error in sorted(report.errors.items(), key=lambda item: -item[1]):
        console.print(f"  {name}: relative error {error:.2g}", markup=False)
