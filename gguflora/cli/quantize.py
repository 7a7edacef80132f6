"""``gguflora quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import gguflora
from gguflora.cli.app import app, console, print_report, progress_bar
from gguflora.cli.options import (
    AsJson,
    DryRun,
    Force,
    OutputTensorType,
    Pure,
    TensorType,
    Threads,
    TokenEmbeddingType,
    tensor_types,
)
from gguflora.merging.quantize import QuantizeReport


@app.command()
def quantize(
    base: Annotated[str, typer.Argument(help="Model: a GGUF file, best in F16, BF16 or F32.")],
    preset: Annotated[str, typer.Argument(metavar="PRESET", help="Types to write: Q4_K_M, IQ3_M, Q8_0, ...")],
    out: Annotated[Path, typer.Option("-o", "--out", help="GGUF file to write.")],
    imatrix: Annotated[
        str | None, typer.Option(metavar="PATH", help="Importance matrix (GGUF or .dat), used as llama-quantize does.")
    ] = None,
    tensor_type: TensorType = None,
    pure: Pure = False,
    output_tensor_type: OutputTensorType = None,
    token_embedding_type: TokenEmbeddingType = None,
    as_json: AsJson = False,
    threads: Threads = None,
    dry_run: DryRun = False,
    force: Force = False,
) -> None:
    """Quantize a whole GGUF model: llama-quantize's presets and bytes, in less time and memory.

    **Examples**

    gguflora quantize model-F16.gguf -o model-Q4_K_M.gguf Q4_K_M

    gguflora quantize model-F16.gguf --imatrix model.imatrix -o model-IQ3_M.gguf IQ3_M

    gguflora quantize model-F16.gguf -o model.gguf Q4_K_M --tensor-type 'ffn_down=q6_k' --output-tensor-type q8_0
    """
    with progress_bar("quantizing") as progress:
        report = gguflora.quantize(
            base,
            out,
            preset,
            imatrix=imatrix,
            tensor_types=tensor_types(tensor_type),
            pure=pure,
            output_tensor_type=output_tensor_type,
            token_embedding_type=token_embedding_type,
            threads=threads,
            dry_run=dry_run,
            force=force,
            progress=progress,
        )
    print_report(report, _print_quantized, as_json=as_json)


def _print_quantized(report: QuantizeReport) -> None:
    types = ", ".join(f"{count} {name}" for name, count in report.types.items())
    verb = "would write" if report.dry_run else "wrote"
    console.print(
        f"{verb} {report.output}: {report.preset}, {report.bits_per_weight:.2f} bits per weight; "
        f"{report.size_before / 1e6:.1f} MB before, {report.size / 1e6:.1f} MB now; {types}",
        markup=False,
    )
    if not report.dry_run:
        console.print(f"took {report.seconds:.2f} s on {report.threads} threads", markup=False)
