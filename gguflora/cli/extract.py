"""``gguflora extract``."""

from __future__ import annotations

from typing import Annotated

import typer

import gguflora
from gguflora.cli.app import app, console, print_errors, print_report, progress_bar, span
from gguflora.cli.options import AdapterOut, AsJson, Force, OutType, Threads
from gguflora.lora.extract import ExtractReport


@app.command()
def extract(
    finetuned: Annotated[str, typer.Argument(help="Fine-tuned model: a GGUF file or a Hugging Face directory.")],
    base: Annotated[str, typer.Option(metavar="PATH", help="The model before fine-tuning, in the same format.")],
    rank: Annotated[int, typer.Option(min=1, help="Highest rank of a delta.")],
    out: AdapterOut,
    energy: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=1.0, help="Use lower ranks that keep this share of a delta's squared norm, say 0.99."
        ),
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(min=0, help="Passes over both models; by default until the error is within 0.1 % of the lowest."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random subspace.")] = 0,
    threads: Threads = None,
    outtype: OutType = "auto",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Extract the LoRA that is closest to the difference between a fine-tuned model and its base.

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
    print_report(report, _print_extracted, as_json=as_json)


def _print_extracted(report: ExtractReport) -> None:
    console.print(
        f"wrote {report.output}: {report.tensors} changes, {span(report.ranks)}, {report.size / 1e6:.2f} MB; "
        f"{report.unchanged} weights unchanged; took {report.seconds:.1f} s",
        markup=False,
    )
    if report.saved:
        console.print(f"holds {len(report.saved)} weights of norms as a whole (modules_to_save)", markup=False)
    print_errors(report.errors)
