"""``gguflora compare``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

import gguflora
from gguflora.cli.app import app, console, print_report, stderr
from gguflora.cli.options import AsJson, Lora, LoraScaled, TextOnly, Threads, TrustNames, scaled_paths
from gguflora.diagnostics.comparison import CompareReport, TextComparison


@app.command()
def compare(
    base: Annotated[str, typer.Argument(help="The base: the GGUF file that the adapters were merged into.")],
    merged: Annotated[list[str] | None, typer.Argument(help="Merged GGUF files.")] = None,
    lora: Lora = None,
    lora_scaled: LoraScaled = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH",
            help="Text to evaluate, best like the adapters' training data; a built-in general text follows. "
            "Repeatable.",
        ),
    ] = None,
    naive: Annotated[
        bool, typer.Option("--naive", help="Also measure a merge with ggml's own rounding, made in a temporary file.")
    ] = False,
    all: Annotated[
        bool,
        typer.Option(
            "--all", help="Also measure a nearest, an adaptive and a calibrated merge, made in temporary files."
        ),
    ] = False,
    calibration_text: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="Text for the calibrated merge of --all, other than --text. Repeatable."),
    ] = None,
    n_ctx: Annotated[int, typer.Option(min=16, help="Tokens per window; each window starts without context.")] = 512,
    threads: Threads = None,
    text_only: TextOnly = False,
    trust_names: TrustNames = False,
    as_json: AsJson = False,
) -> None:
    """Measure how closely merged files predict what the base with hot adapters predicts (needs llama-cpp-python).

    This measures on each text the KL divergence and agreement of the predictions, the share of the adapters' gain that
    a merge keeps, and perplexities; and tokens per second. llama.cpp must be able to apply the adapters. Two models, or
    files of up to 1 GiB, are in memory at once.

    **Examples**

    gguflora compare model-Q4_K_M.gguf merged-Q4_K_M.gguf --lora ./my-adapter --text sample.txt

    gguflora compare model-Q4_K_M.gguf --lora ./my-adapter --text sample.txt --all

    gguflora compare model.gguf merged.gguf --lora-scaled tone.gguf:0.5 --naive --json
    """
    adapters = scaled_paths(lora, lora_scaled)
    with stderr.status("comparing"):
        report = gguflora.compare(
            base,
            merged or [],
            adapters,
            text=text,
            naive=naive,
            all=all,
            calibration_text=calibration_text,
            n_ctx=n_ctx,
            threads=threads,
            text_only=text_only,
            trust_names=trust_names,
        )
    print_report(report, _print_comparison, as_json=as_json)


def _print_comparison(report: CompareReport) -> None:
    for text in report.texts:
        console.print(f"{text.positions} tokens of {text.text}, in windows of up to {report.n_ctx}", markup=False)
    table = Table(box=box.SIMPLE_HEAD)
    titles = ["", "KL from hot, nats", "same first choice", "gain kept", "perplexity", "beside hot"]
    for title in titles:
        table.add_column(title, justify="right" if title else "left")
    for text in report.texts:
        if len(report.texts) > 1:
            table.add_row(escape(text.text), style="bold")
        for name in text.perplexities:
            table.add_row(escape(name), *_cells(text, name))
        table.add_section()
    console.print(table)
    for name, speed in report.speeds.items():
        rates = f"{speed.prompt:.1f} tokens/s of a prompt, {speed.generation:.1f} of an answer"
        console.print(f"{name}: {rates}", markup=False)


def _cells(text: TextComparison, name: str) -> list[str]:
    divergence, kept, ratio = text.divergences.get(name), text.kept.get(name), text.perplexity_ratios.get(name)
    return [
        f"{divergence.kl:.2e} ± {divergence.error:.0e}" if divergence else "",
        f"{divergence.top_agreement:.1%}" if divergence else "",
        f"{kept.value:.1%} ± {kept.error:.1%}" if kept else "",
        f"{text.perplexities[name]:.3f}",
        f"{ratio.value:.3f} ± {ratio.error:.3f}" if ratio else "",
    ]
