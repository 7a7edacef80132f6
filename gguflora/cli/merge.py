"""``gguflora merge``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

import gguflora
from gguflora.cli.app import app, console, print_report, progress_bar, to_json
from gguflora.cli.options import (
    AsJson,
    DryRun,
    Force,
    Lora,
    LoraScaled,
    OutputTensorType,
    Pure,
    TensorType,
    TextOnly,
    Threads,
    TokenEmbeddingType,
    TrustNames,
    scaled_paths,
    tensor_types,
)
from gguflora.errors import listed
from gguflora.files.output_rule import check_text_targets, write_output
from gguflora.merging.merge import MAX_SEED
from gguflora.merging.plots import plot_report
from gguflora.merging.report import MergeReport
from gguflora.merging.rounding import Mode as RoundingMode


@app.command()
def merge(
    base: Annotated[str, typer.Argument(help="Base model: a GGUF file of any quantization.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Merged GGUF file to write.")] = None,
    lora: Lora = None,
    lora_scaled: LoraScaled = None,
    patch: Annotated[
        Path | None,
        typer.Option(help="Write only the changes, as a small file for gguflora apply-patch; instead of -o."),
    ] = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Change BASE itself; gguflora unmerge undoes it. Instead of -o.")
    ] = False,
    rounding: Annotated[
        RoundingMode,
        typer.Option(
            help="adaptive: stochastic rounding, keeps changes below a quantization step; nearest: ggml's own rounding."
        ),
    ] = "adaptive",
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the adaptive rounding.")] = 0,
    base_f16: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="The base before quantization (GGUF file or Hugging Face directory), to quantize W + delta.",
        ),
    ] = None,
    outtype: Annotated[
        str, typer.Option(help="Type of changed matrices (f16, q8_0, ...); keep: the type that they have.")
    ] = "keep",
    type: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=TYPE", help="Type of changed tensors whose names match a glob or regex. Repeatable."
        ),
    ] = None,
    imatrix: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Importance matrix (GGUF or .dat), used as llama-quantize does."),
    ] = None,
    text_only: TextOnly = False,
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="PRESET",
            help="Write the whole file in a preset of llama-quantize (Q4_K_M, IQ3_M, ...), best from an F16 base.",
        ),
    ] = None,
    tensor_type: TensorType = None,
    pure: Pure = False,
    output_tensor_type: OutputTensorType = None,
    token_embedding_type: TokenEmbeddingType = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Run BASE over a text first, and move as few codes as the adapters need (needs llama-cpp-python).",
        ),
    ] = False,
    calibration_text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH", help="Text for half of the calibration; the rest, or all, is built in. Repeatable."
        ),
    ] = None,
    save_moments: Annotated[
        Path | None, typer.Option(help="File to write with what --calibrate measured, for later merges.")
    ] = None,
    moments: Annotated[
        str | None, typer.Option(metavar="PATH", help="Calibrate with what --save-moments wrote; BASE is not run.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="JSON file to write, with the share of its change that each tensor kept.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="PNG file to write, with the same as heat maps (needs matplotlib).")
    ] = None,
    as_json: AsJson = False,
    threads: Threads = None,
    trust_names: TrustNames = False,
    dry_run: DryRun = False,
    force: Force = False,
) -> None:
    """Merge adapters into a quantized GGUF file; tensors keep their types, and unchanged tensors keep their bytes.

    Stochastic rounding keeps the adapter: ggml's own rounding would undo most of a small change.

    **Examples**

    gguflora merge model-Q4_K_M.gguf --lora ./my-adapter -o merged-Q4_K_M.gguf

    gguflora merge model-Q8_0.gguf --lora legal.gguf --lora-scaled tone.gguf:0.5 -o merged.gguf

    gguflora merge model-Q4_K_M.gguf --lora ./my-adapter --base-f16 ./hf-model --imatrix model.imatrix -o merged.gguf

    gguflora merge model-Q4_K_M.gguf --lora ./my-adapter --type 'blk.*.ffn_down.weight=q6_k' -o out.gguf --report r.json

    gguflora merge model-F16.gguf --lora ./my-adapter --quantize Q4_K_M --imatrix model.imatrix -o merged-Q4_K_M.gguf

    gguflora merge model-Q4_K_M.gguf --lora ./my-adapter --calibrate --calibration-text prompts.txt -o merged.gguf

    gguflora merge model-Q4_K_M.gguf --lora ./my-adapter --patch my-adapter.patch

    gguflora merge mmproj.gguf --lora ./my-vision-adapter -o merged-mmproj.gguf

    gguflora merge model-Q4_K_M.gguf --lora ./my-adapter --in-place && gguflora unmerge model-Q4_K_M.gguf

    **In place**

    The merge first writes BASE.undo, then the changed rows. If it is interrupted, even by a power failure, gguflora
    unmerge restores the base. Stop programs that have the model loaded before you merge: llama.cpp maps the file, so
    they would compute with half-changed weights.
    """
    adapters = scaled_paths(lora, lora_scaled)
    if (out is not None) + (patch is not None) + in_place != 1:
        raise typer.BadParameter("give exactly one of --out, --patch and --in-place")
    others = [base, *(path for path, _ in adapters), out, patch, base_f16, imatrix, save_moments, moments]
    check_text_targets((report, plot), [*others, *(calibration_text or [])], force=force)
    with progress_bar("merging") as progress:
        result = gguflora.merge(
            base,
            adapters,
            out,
            patch=patch,
            in_place=in_place,
            rounding=rounding,
            seed=seed,
            base_f16=base_f16,
            outtype=outtype,
            type=_split_types(type or []),
            imatrix=imatrix,
            text_only=text_only,
            trust_names=trust_names,
            quantize=quantize,
            tensor_types=tensor_types(tensor_type) or None,
            pure=pure,
            output_tensor_type=output_tensor_type,
            token_embedding_type=token_embedding_type,
            calibrate=calibrate,
            calibration_text=calibration_text,
            save_moments=save_moments,
            moments=moments,
            threads=threads,
            dry_run=dry_run,
            force=force,
            progress=progress,
        )
    if report:
        write_output(report, to_json(result).encode())
    if plot:
        plot_report(result, plot)
    print_report(result, partial(_print_merge, in_place=in_place), as_json=as_json)


def _split_types(texts: list[str]) -> dict[str, str]:
    pairs = [text.rpartition("=") for text in texts]
    for text, (pattern, _, name) in zip(texts, pairs, strict=True):
        if not pattern or not name:
            raise typer.BadParameter(f"--type is {text!r}, expected PATTERN=TYPE, for example '*.attn_v.weight=q8_0'")
    return {pattern: name for pattern, _, name in pairs}


def _print_merge(report: MergeReport, *, in_place: bool) -> None:
    merged = ", ".join(f"{name} x {scale:g}" for name, _, scale in report.adapters)
    types = ", ".join(f"{count} {name}" for name, count in report.types.items()) or "none"
    verb = "would write" if report.dry_run else "wrote"
    console.print(
        f"{verb} {report.output}: {merged}; {len(report.tensors)} tensors changed ({types}), "
        f"{report.weights / 1e6:.1f} M weights, {report.size / 1e6:.1f} MB",
        markup=False,
    )
    if report.tokenizer:
        console.print(f"from the adapter's tokenizer: {'; '.join(report.tokenizer)}", markup=False)
    if report.written != report.size and not report.dry_run:
        file_kind = "undo file" if in_place else "patch"
        console.print(
            f"the {file_kind} has {report.written / 1e6:.1f} MB, {report.written / report.size:.1%} of the model",
            markup=False,
        )
    if report.total.retention_h is not None:
        console.print(
            f"calibrated: {report.total.retention_h:.1%} of the change's effect on the outputs kept", markup=False
        )
    reasons = report.uncalibrated_reasons
    for reason in dict.fromkeys(reasons.values()):
        names = [name for name in reasons if reasons[name] == reason]
        console.print(f"not calibrated, {reason}: {len(names)} tensors, {listed(names, 3)}", markup=False)
    if report.total.retention is not None:
        console.print(
            f"{report.rounding} rounding: {report.total.retention:.1%} of the change kept, "
            f"{report.total.relative_change:.2%} of the weights' norm, SNR {report.total.snr_db:.1f} dB",
            markup=False,
        )
    if not report.dry_run:
        rate = report.weights_per_second / 1e6
        console.print(f"took {report.seconds:.2f} s on {report.threads} threads, {rate:.0f} M weights/s", markup=False)
