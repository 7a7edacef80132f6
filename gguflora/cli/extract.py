"""``gguflora extract``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import gguflora
from gguflora.cli.app import app, console, print_json, print_warnings, progress_bar
from gguflora.cli.convert import OutType


@app.command()
def extract(
    finetuned: Annotated[Path, typer.Argument(help="Fine-tuned model: a GGUF file or a Hugging Face directory.")],
    base: Annotated[Path, typer.Option(help="The model before, in the same form.")],
    rank: Annotated[int, typer.Option(min=1, help="Highest rank of a change.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="GGUF LoRA file (.gguf) or PEFT directory to write.")],
    energy: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Lower ranks where they keep this share, say 0.99.")
    ] = None,
    iterations: Annotated[int, typer.Option(min=0, help="Power iterations; each reads the models once more.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Of the random subspace.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="Threads; default one for each core.")] = None,
    outtype: Annotated[OutType, typer.Option(help="Type of the factors in a GGUF file.")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Overwrite the output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Find the LoRA that comes closest to what fine-tuning has done to a model.

    **Example**

    gguflora extract tuned-F16.gguf --base model-F16.gguf --rank 32 -o tuned-lora.gguf
    """
    with progress_bar("extracting") as progress:
        report = gguflora.extract(
            finetuned,
            base,
            out,
            rank=rank,
            energy=energy,
            iterations=iterations,
            seed=seed,
            threads=threads,
            outtype=outtype,
            force=force,
            progress=progress,
        )
    print_warnings(report.warnings)
    if as_json:
        print_json(report)
        return
    low, high = report.ranks
    console.print(
        f"wrote {report.output}: {report.tensors} changes, ranks {low} to {high}, {report.size / 1e6:.2f} MB; "
        f"{report.unchanged} weights unchanged; took {report.seconds:.1f} s",
        markup=False,
    )
    for name, error in sorted(report.errors.items(), key=lambda item: -item[1]):
        console.print(f"  {name}: relative error {error:.2g}", markup=False)
