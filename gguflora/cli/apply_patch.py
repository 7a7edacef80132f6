"""``gguflora apply-patch``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import gguflora
from gguflora.cli.app import app, console, print_report, progress_bar
from gguflora.cli.options import AsJson, Force, Threads
from gguflora.merging.patch.apply import ApplyReport


@app.command("apply-patch")
def apply_patch(
    base: Annotated[str, typer.Argument(help="The GGUF file that the patch was made for.")],
    patch: Annotated[str, typer.Argument(help="The patch, written by gguflora merge --patch.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Merged GGUF file to write.")],
    force: Force = False,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Make the merged model from its base and a patch, with exactly the bytes that the merge would have written.

    The SHA-256 of the base is checked before, and that of the merged model afterwards.

    **Example**

    gguflora merge model-Q4_K_M.gguf --lora ./my-adapter --patch my-adapter.patch

    gguflora apply-patch model-Q4_K_M.gguf my-adapter.patch -o merged-Q4_K_M.gguf
    """
    with progress_bar("patching") as progress:
        report = gguflora.apply_patch(base, patch, out, force=force, threads=threads, progress=progress)
    print_report(report, _print_patched, as_json=as_json)


def _print_patched(report: ApplyReport) -> None:
    console.print(
        f"wrote {report.output}: {report.facts.base_name} with {report.facts.merged or 'nothing'}, "
        f"{report.size / 1e6:.1f} MB out of a patch of {report.patch_size / 1e6:.1f} MB",
        markup=False,
    )
    console.print(f"SHA-256 {report.facts.merged_sha256} checked; took {report.seconds:.2f} s", markup=False)
