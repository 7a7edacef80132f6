"""``gguflora compare``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich import box
from rich.table import Table

import gguflora
from gguflora.cli.app import app, console, print_report, stderr
from gguflora.cli.options import AsJson, Lora, LoraScaled, TextOnly, Threads, TrustNames, scaled_paths
from gguflora.diagnostics.compare import CompareReport


@app.command()
def compare(
    base: Annotated[str, typer.Argument(help="The base: the GGUF file that the adapters were merged into.")],
    merged: Annotated[str, typer.Argument(help="The merged GGUF file.")],
    lora: Lora = None,
    lora_scaled: LoraScaled = None,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Text to evaluate, best like the adapters' training data; default: a short built-in text.",
        ),
    ] = None,
    naive: Annotated[
        bool, typer.Option("--naive", help="Also measure a merge with ggml's own rounding, made in a temporary file.")
    ] = False,
    n_ctx: Annotated[int, typer.Option(min=16, help="Tokens per window; each window starts without context.")] = 512,
    threads: Threads = None,
    text_only: TextOnly = False,
    trust_names: TrustNames = False,
    as_json: AsJson = False,
) -> None:
    """Measure how closely a merged file predicts what the base with hot adapters predicts (needs llama-cpp-python).

    This measures the KL divergence and agreement of the predictions, perplexities and tokens per second. llama.cpp must
    be able to apply the adapters. Two models are in memory at once.

    **Examples**

    gguflora compare model-Q4_K_M.gguf merged-Q4_K_M.gguf --lora ./my-adapter --text sample.txt

    gguflora compare model.gguf merged.gguf --lora-scaled tone.gguf:0.5 --naive --json
    """
    adapters = scaled_paths(lora, lora_scaled)
    with stderr.status("comparing"):
        report = gguflora.compare(
            base,
            merged,
            adapters,
            text=text,
            naive=naive,
            n_ctx=n_ctx,
            threads=threads,
            text_only=text_only,
            trust_names=trust_names,
        )
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
