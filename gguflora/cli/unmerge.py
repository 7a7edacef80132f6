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
    base: Annotated[Path, typer.Argument(help="A model that was merged with --in-place, its undo file beside it.")],
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Give back the base that an adapter was merged into in place, byte for byte; then remove the undo file.

    It mends a model, too, whose merge was stopped midway by whatever means. Nothing is written before it is known that
    exactly the base comes out. Stop programs that have the model loaded: they would see it change.

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
        f"{report.base} is the base again, without {merged or 'anything'}: {report.changed / 1e6:.1f} MB put back, "
        f"SHA-256 {report.sha256}; took {report.seconds:.2f} s",
        markup=False,
    )
