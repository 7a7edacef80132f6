"""``gguflora convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

import gguflora
from gguflora.cli.app import app, console, print_warnings
from gguflora.convert import ConvertReport

OutType = Literal["auto", "f32", "f16", "bf16", "q8_0"]


@app.command()
def convert(
    adapter: Annotated[Path, typer.Argument(help="PEFT adapter directory (or a GGUF LoRA file, to store it again).")],
    base: Annotated[Path, typer.Option(help="Base model: a GGUF file, or a directory with config.json.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="GGUF LoRA file to write.")],
    outtype: Annotated[
        OutType, typer.Option(help="Type of the stored factors; auto: f16 where that is exact, else f32.")
    ] = "auto",
    rank: Annotated[
        int | None, typer.Option(min=1, help="Approximate changes that are not of this rank by the closest that are.")
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="The same, with the lowest rank that keeps this share, for example 0.999."),
    ] = None,
    scale: Annotated[float, typer.Option(help="Multiply the adapter's change.")] = 1.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the output file.")] = False,
) -> None:
    """Convert a PEFT adapter into a GGUF LoRA file for llama.cpp.

    Needs no torch and no Hugging Face model: names, shapes and head counts come from the base's GGUF file.

    **Examples**

    gguflora convert ./my-adapter --base model-Q4_K_M.gguf -o my-adapter.gguf

    gguflora convert ./my-adapter --base model.gguf -o small.gguf --outtype q8_0

    gguflora convert ./my-dora --base model.gguf -o my-dora.gguf --rank 64
    """
    if rank is not None and energy is not None:
        raise typer.BadParameter("give --rank or --energy, not both")
    _print_conversion(
        gguflora.convert(
            adapter,
            base,
            out,
            outtype=outtype,
            rank=rank,
            energy=energy,
            scale=scale,
            dry_run=dry_run,
            force=force,
        )
    )


def _print_conversion(report: ConvertReport) -> None:
    print_warnings(report.warnings)
    low, high = report.ranks
    rank = f"rank {low}" if low == high else f"ranks {low} to {high}"
    scale = f"alpha {report.alpha:g}" if report.alpha else "factors folded into B (alpha 0)"
    types = ", ".join(f"{count} {name}" for name, count in report.types.items())
    verb = "would write" if report.dry_run else "wrote"
    console.print(
        f"{verb} {report.output}: adapter {report.adapter!r} for {report.architecture}, {report.tensors} tensors, "
        f"{rank}, {scale}, factors {types}, {report.size / 1e6:.2f} MB",
        markup=False,
    )
    if report.errors:
        worst = max(report.errors.values())
        console.print(f"approximated {len(report.errors)} changes, relative error at most {worst:.2g}:", markup=False)
        for name, error in sorted(report.errors.items(), key=lambda item: -item[1]):
            console.print(f"  {name}: {error:.2g}", markup=False)
