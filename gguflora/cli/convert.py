"""``gguflora convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import gguflora
from gguflora.cli.app import app, console, print_errors, print_report, span
from gguflora.cli.options import AsJson, Base, DryRun, Force, OutType, TextOnly, TrustNames
from gguflora.lora.convert import ConvertReport


@app.command()
def convert(
    adapter: Annotated[
        str,
        typer.Argument(help="PEFT adapter directory, or a GGUF LoRA file to write with other options."),
    ],
    base: Base,
    out: Annotated[Path, typer.Option("-o", "--out", help="GGUF LoRA file to write.")],
    outtype: OutType = "auto",
    rank: Annotated[
        int | None, typer.Option(min=1, help="Approximate each delta that is not low-rank by the closest of this rank.")
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="As --rank, with the lowest rank that keeps this share of the squared norm, say 0.999.",
        ),
    ] = None,
    scale: Annotated[float, typer.Option(help="Factor for all deltas of the adapter.")] = 1.0,
    text_only: TextOnly = False,
    trust_names: TrustNames = False,
    dry_run: DryRun = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Convert a PEFT adapter into a GGUF LoRA file for llama.cpp.

    This needs neither torch nor the Hugging Face model: names, shapes and head counts come from the base's GGUF file.

    **Examples**

    gguflora convert ./my-adapter --base model-Q4_K_M.gguf -o my-adapter.gguf

    gguflora convert ./my-adapter --base model.gguf -o small.gguf --outtype q8_0

    gguflora convert ./my-dora --base model.gguf -o my-dora.gguf --rank 64
    """
    if rank is not None and energy is not None:
        raise typer.BadParameter("give --rank or --energy, not both")
    report = gguflora.convert(
        adapter,
        base,
        out,
        outtype=outtype,
        rank=rank,
        energy=energy,
        scale=scale,
        text_only=text_only,
        trust_names=trust_names,
        dry_run=dry_run,
        force=force,
    )
    print_report(report, _print_conversion, as_json=as_json)


def _print_conversion(report: ConvertReport) -> None:
    scale = f"alpha {report.alpha:g}" if report.alpha else "factors folded into B (alpha 0)"
    types = ", ".join(f"{count} {name}" for name, count in report.types.items())
    verb = "would write" if report.dry_run else "wrote"
    console.print(
        f"{verb} {report.output}: adapter {report.adapter!r} for {report.architecture}, {report.tensors} tensors, "
        f"{span(report.ranks)}, {scale}, factors {types}, {report.size / 1e6:.2f} MB",
        markup=False,
    )
    if report.errors:
        worst = max(report.errors.values())
        console.print(f"approximated {len(report.errors)} changes, relative error at most {worst:.2g}:", markup=False)
        print_errors(report.errors, label="")
