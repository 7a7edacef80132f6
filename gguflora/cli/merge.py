"""``gguflora merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer

import gguflora
from gguflora.cli.app import app, console, print_warnings, progress_bar
from gguflora.merge import MergeReport


@app.command()
def merge(
    base: Annotated[Path, typer.Argument(help="Base model, a GGUF file of any quantization.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Merged GGUF file to write.")],
    lora: Annotated[list[str] | None, typer.Option(help="Adapter: PEFT directory or GGUF LoRA. Repeatable.")] = None,
    lora_scaled: Annotated[
        list[str] | None, typer.Option(metavar="PATH:SCALE", help="Adapter with a scale of its own. Repeatable.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="Threads; by default one for each core.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the output file.")] = False,
) -> None:
    """Merge adapters into a quantized GGUF file; every tensor keeps its type, untouched ones keep their bytes.

    **Examples**

    gguflora merge model-Q4_K_M.gguf --lora ./my-adapter -o merged-Q4_K_M.gguf

    gguflora merge model-Q8_0.gguf --lora legal.gguf --lora-scaled tone.gguf:0.5 -o merged.gguf
    """
    adapters = [(path, 1.0) for path in lora or ()] + [_split_scale(text) for text in lora_scaled or ()]
    if not adapters:
        raise typer.BadParameter("give at least one adapter with --lora or --lora-scaled")
    with progress_bar("merging") as progress:
        report = gguflora.merge(base, adapters, out, threads=threads, dry_run=dry_run, force=force, progress=progress)
    _print_merge(report)


def _split_scale(text: str) -> tuple[str, float]:
    path, _, scale = text.rpartition(":")
    try:
        return path, float(scale) if path else _refuse_scale(text)
    except ValueError:
        _refuse_scale(text)


def _refuse_scale(text: str) -> NoReturn:
    raise typer.BadParameter(f"--lora-scaled is {text!r}, expected PATH:SCALE, for example adapter.gguf:0.5")


def _print_merge(report: MergeReport) -> None:
    print_warnings(report.warnings)
    merged = ", ".join(f"{name} x {scale:g}" for name, _, scale in report.adapters)
    types = ", ".join(f"{count} {name}" for name, count in report.tensors.items()) or "none"
    verb = "would write" if report.dry_run else "wrote"
    console.print(
        f"{verb} {report.output}: {merged}; {sum(report.tensors.values())} tensors changed ({types}), "
        f"{report.weights / 1e6:.1f} M weights, {report.size / 1e6:.1f} MB",
        markup=False,
    )
    if not report.dry_run:
        rate = report.weights_per_second / 1e6
        console.print(f"took {report.seconds:.2f} s on {report.threads} threads, {rate:.0f} M weights/s", markup=False)
