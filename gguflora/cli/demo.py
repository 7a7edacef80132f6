"""``gguflora demo``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

import gguflora
from gguflora.cli.app import app, console, print_report
from gguflora.cli.options import AsJson

if TYPE_CHECKING:
    from gguflora.diagnostics.demo import DemoReport


@app.command()
def demo(
    keep: Annotated[Path | None, typer.Option(help="Directory in which to keep the demo's GGUF files.")] = None,
    prompt: Annotated[
        str, typer.Option(help="Prompt for the base and each adapter.")
    ] = "Q: What does the fox eat?\nA:",
    as_json: AsJson = False,
) -> None:
    """Convert and merge two small adapters on an embedded model, and with llama-cpp-python hot-swap them.

    **Example**

    gguflora demo --keep ./demo-files
    """
    print_report(gguflora.run_demo(keep, prompt=prompt), print_demo, as_json=as_json)
    if keep and not as_json:
        console.print(f"\nThe files are in {keep}", markup=False)


def print_demo(report: DemoReport) -> None:
    """Print the report of a demo as a table and lines of times."""
    if report.answers:
        _print_answers(report)
    for name, seconds in report.convert_seconds.items():
        console.print(f"convert {name}: {seconds * 1e3:.0f} ms")
    for name, seconds in report.load_seconds.items():
        console.print(f"load {name}: {seconds * 1e3:.0f} ms")
    merged = report.merge
    console.print(
        f"merge {merged.adapters[0][0]} into {', '.join(merged.types)}: {merged.seconds * 1e3:.0f} ms "
        f"({merged.weights / 1e6:.1f} M weights)"
    )
    if report.kl is None:
        console.print(
            "\nThe answers of the base, of both adapters and of the merged file need llama-cpp-python: pip install "
            "'gguflora[runtime]'\n(gguflora doctor says what that takes)",
            markup=False,
        )
        return
    console.print(
        f"KL divergence from the hot adapter, nats per token: merged file {report.kl:.1e}, base {report.kl_base:.1e}"
    )


def _print_answers(report: DemoReport) -> None:
    console.print(f"Prompt: {report.prompt!r}\n", markup=False)
    table = Table(box=box.SIMPLE_HEAD, show_lines=True)
    for title in ("weights", "answer (greedy)", "swap", "answer time"):
        table.add_column(title, justify="right" if "time" in title or title == "swap" else "left")
    for answer in report.answers:
        swap = "" if answer.swap_seconds is None else f"{answer.swap_seconds * 1e3:.2f} ms"
        table.add_row(answer.weights, escape(answer.text.strip()), swap, f"{answer.answer_seconds:.2f} s")
    console.print(table)
