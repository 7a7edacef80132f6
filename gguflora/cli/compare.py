"""``gguflora compare``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich import box
from rich.table import Table

import gguflora
from gguflora.cli.app import app, console, print_report, stderr
from gguflora.cli.options import AsJson, Lora, LoraScaled, Threads, scaled_paths
from gguflora.diagnostics.compare import CompareReport


@app.command()
def compare(
    base: Annotated[str, typer.Argument(help="The GGUF file that was merged into.")],
    merged: Annotated[str, typer.Argument(help="The merged GGUF file.")],
    lora: Lora = None,
    lora_scaled: LoraScaled = None,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Text to evaluate, best of the kind the adapters were trained for; default a short built-in.",
        ),
    ] = None,
    naive: Annotated[
        bool, typer.Option("--naive", help="Measure a merge that rounds to the nearest, too (in a temporary file).")
    ] = False,
    n_ctx: Annotated[int, typer.Option(min=16, help="Tokens of a window; each one begins a new text.")] = 512,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Measure how well a merged file answers for the base with its adapters applied at run time (llama-cpp-python).

    KL divergence and agreement of the predictions, perplexities, tokens a second. The adapters must be such as
    llama.cpp can apply. Takes memory for two of the models.

    **Examples**

    gguflora compare model-Q4_K_M.gguf merged-Q4_K_M.gguf --lora ./my-adapter --text sample.txt

    gguflora compare model.gguf merged.gguf --lora-scaled tone.gguf:0.5 --naive --json
    """
    adapters = scaled_paths(lora, lora_scaled)
    with stderr.status("comparing"):
        report = gguflora.compare(base, merged, adapters, text=text, naive=naive, n_ctx=n_ctx, threads=threads)
    print_report(report, _print_comparison, as_json=as_json)


def _print_comparison(report: CompareReport) -> None:
    console.print(f"{report.positions} tokens of {report.text}, in windows of up to {report.n_ctx}", markup=False)
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("", "KL from hot, nats", "same first choice", "perplexity", "prompt tokens/s", "answer tokens/s"):
        table.add_column(title, justify="right" if title else "left")
    for name in ("base", "hot", "merged", "naive"):
        if name in report.perplexities:
            table.add_row(name, *_cells(report, name))
    console.print(table)


def _cells(report: CompareReport, name: str) -> list[str]:
    divergence, speed = report.divergences.get(name), report.speeds.get(name)
    kl = f"{divergence.kl:.2e} ± {divergence.error:.0e}" if divergence else ""
    agreement = f"{divergence.top_agreement:.1%}" if divergence else ""
    rates = [f"{speed.prompt:.1f}", f"{speed.generation:.1f}"] if speed else ["", ""]
    return [kl, agreement, f"{report.perplexities[name]:.3f}", *rates]
