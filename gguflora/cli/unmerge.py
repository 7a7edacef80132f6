"""``gguflora unmerge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import gguflora
from gguflora.cli.app import app, console, print_report, progress_bar
from gguflora.cli.options import AsJson, Threads
from gguflora.merging.in_place import UnmergeReport


@app.command()
def unmerge(
    base: Annotated[Path, typer.Argument(help="A model merged with --in-place; its undo file lies beside it.")],
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Restore the exact base of a model that was merged in place, and remove the undo file.

    This also repairs a model whose merge was interrupted. Nothing is written before it is certain that exactly the
    base will result. Stop programs that have the model loaded before you run this: they would compute with half-changed
    weights.

    **Example**

    gguflora merge model-Q4_K_M.gguf --lora ./my-adapter --in-place

    gguflora unmerge model-Q4_K_M.gguf
    """
    with progress_bar("checking") as progress:
        report = gguflora.unmerge(base, threads=threads, progress=progress)
    print_report(report, _print_unmerged, as_json=as_json)


def _print_unmerged(report: UnmergeReport) -> None:
    merged = ", ".join(f"{name} x {scale:g}" for name, _, scale in report.adapters)
    console.print(
        f"{report.base} is the base again, without {merged or 'any adapter'}: {report.changed / 1e6:.1f} MB put back, "
        f"SHA-256 {report.sha256}; took {report.seconds:.2f} s",
        markup=False,
    )
