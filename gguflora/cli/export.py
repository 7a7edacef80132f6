"""``gguflora export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import gguflora
from gguflora.cli.app import app, console, print_json, print_warnings


@app.command()
def export(
    lora: Annotated[Path, typer.Argument(help="GGUF LoRA file.")],
    base: Annotated[Path, typer.Option(help="Base model: a GGUF file, or a directory with config.json.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="PEFT directory to write.")],
    base_model_name: Annotated[
        str | None, typer.Option(help="Hub id or path of the base, for the configuration.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a PEFT directory.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Write a GGUF LoRA as a PEFT directory, which PEFT, vLLM and others load; values come back exactly.

    **Example**

    gguflora export my-adapter.gguf --base model-Q4_K_M.gguf -o my-adapter
    """
    report = gguflora.export(lora, base, out, base_model_name=base_model_name, force=force)
    print_warnings(report.warnings)
    if as_json:
        print_json(report)
        return
    low, high = report.ranks
    rank = f"rank {low}" if low == high else f"ranks {low} to {high}"
    console.print(
        f"wrote {report.output}: adapter {report.adapter!r} of {report.architecture}, {report.modules} modules, "
        f"{rank}, {report.size / 1e6:.2f} MB",
        markup=False,
    )
