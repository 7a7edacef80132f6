"""``gguflora export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import gguflora
from gguflora.cli.app import app, console, print_report, span
from gguflora.cli.options import AsJson, Base, Force
from gguflora.lora.export import ExportReport


@app.command()
def export(
    lora: Annotated[str, typer.Argument(help="GGUF LoRA file.")],
    base: Base,
    out: Annotated[Path, typer.Option("-o", "--out", help="PEFT directory to write.")],
    base_model_name: Annotated[
        str | None, typer.Option(help="Hub id or path of the base, to write into adapter_config.json.")
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write a GGUF LoRA as a PEFT directory for PEFT, vLLM and others; all values stay exact.

    **Example**

    gguflora export my-adapter.gguf --base model-Q4_K_M.gguf -o my-adapter
    """
    report = gguflora.export(lora, base, out, base_model_name=base_model_name, force=force)
    print_report(report, _print_exported, as_json=as_json)


def _print_exported(report: ExportReport) -> None:
    console.print(
        f"wrote {report.output}: adapter {report.adapter!r} of {report.architecture}, {report.modules} modules, "
        f"{span(report.ranks)}, {report.size / 1e6:.2f} MB",
        markup=False,
    )
