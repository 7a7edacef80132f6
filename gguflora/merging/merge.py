"""``merge``: merge adapters into a quantized GGUF file.

The rows of changed tensors are dequantized, changed and quantized again in blocks, on several threads. The operating
system copies everything else from the base. The model is never held in memory.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gguflora.errors import OutputError, UsageError
from gguflora.files.atomic import atomic_outputs
from gguflora.files.gguf import GgufFile, part_paths
from gguflora.files.output_checks import check_targets
from gguflora.files.remote import remote_inputs
from gguflora.merging.in_place import check_in_place, merge_in_place
from gguflora.merging.moment_sources import Texts
from gguflora.merging.patch import write_patch
from gguflora.merging.plan import MergePlan
from gguflora.merging.prepare import (
    MAX_SEED,
    AdapterArgument,
    AdapterPath,
    MergeOptions,
    prepared_merge,
    with_moments,
    with_scales,
)
from gguflora.merging.presets import TensorTypes
from gguflora.merging.report import MergeReport
from gguflora.merging.rewriter import Rewriter
from gguflora.merging.rounding import Mode, Sums
from gguflora.merging.sinks import FileSink, Progress
from gguflora.system.cpus import thread_count

__all__ = ["MAX_SEED", "AdapterArgument", "AdapterPath", "merge", "plan_merge", "with_scales"]


@remote_inputs(
    base="file", adapters="adapter", base_f16="model", imatrix="file", calibration_text="file", moments="file"
)
def merge(
    base: str | os.PathLike[str],
    adapters: AdapterArgument,
    out: str | os.PathLike[str] | None = None,
    *,
    patch: str | os.PathLike[str] | None = None,
    in_place: bool = False,
    rounding: Mode = "adaptive",
    seed: int = 0,
    base_f16: str | os.PathLike[str] | None = None,
    outtype: str = "keep",
    type: Mapping[str, str] | None = None,
    imatrix: str | os.PathLike[str] | None = None,
    text_only: bool = False,
    trust_names: bool = False,
    quantize: str | None = None,
    tensor_types: TensorTypes | None = None,
    pure: bool = False,
    output_tensor_type: str | None = None,
    token_embedding_type: str | None = None,
    calibrate: bool = False,
    calibration_text: Texts | None = None,
    moments: str | os.PathLike[str] | None = None,
    save_moments: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    dry_run: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Write ``base`` with adapters merged in.

    Args:
        base: GGUF file of any quant types, or any file of a split model; opened read-only.
        adapters: a PEFT directory or GGUF LoRA file, or a sequence of paths or ``(path, scale)``. Their deltas are
            summed and rounded once.
        out: the file to write. For a split base, the same number of files with names like
            ``out-00001-of-00003.gguf``.
        patch: instead of ``out``: write only the changes to this file, for `gguflora.apply_patch`.
        in_place: instead of ``out``: write the changed rows into ``base`` itself and an undo file beside it, for
            `gguflora.unmerge`.
        rounding: ``adaptive`` is stochastic rounding, which keeps deltas smaller than a quantization step (see
            docs/rounding.md); ``nearest`` gives exactly ggml's bytes.
        seed: seed of the stochastic rounding; the same seed gives the same bytes.
        base_f16: the base before quantization, a GGUF file or a Hugging Face directory. Deltas are added to its
            weights, and the sum is rounded to nearest.
        outtype: quant type of the changed matrices; ``keep`` keeps each tensor's own type.
        type: quant types of changed tensors by name pattern; takes precedence over ``outtype``.
        imatrix: importance matrix (GGUF or legacy ``.dat``) for the choice of scales, as llama-quantize uses it.
        text_only: take only the part of a multimodal model's adapter that changes the language model.
        trust_names: apply adapters by name and shape where the order of a tensor's rows is not known.
        quantize: write the whole file in this preset of llama-quantize, such as ``Q4_K_M``, best from a base in F16,
            BF16 or F32: the bytes are those of llama-quantize on the merged model in F32.
        tensor_types: with ``quantize``: other types by regular expressions, as for `gguflora.quantize`.
        pure: with ``quantize``: give all tensors the preset's main type.
        output_tensor_type: with ``quantize``: type of the output weight.
        token_embedding_type: with ``quantize``: type of the token embedding.
        calibrate: run the base with the adapters over a text first, and move single codes such that the layers'
            outputs change as the adapters ask and as little as possible otherwise (docs/rounding.md). Needs
            llama-cpp-python. Types of six bits and more and codebook types are rounded as without.
        calibration_text: with ``calibrate``: texts like those that the model will read, for half of the calibration;
            the other half is a built-in text.
        moments: calibrate with second moments from this file, which ``save_moments`` wrote, without running the base.
        save_moments: with ``calibrate``: write the second moments to this file.
        threads: number of threads; by default one for each core that this process may use.
        dry_run: check everything but write nothing.
        force: overwrite ``out`` or ``patch``.
        progress: called with (bytes done, bytes in total); calls come from several threads but never overlap.

    Raises:
        GgufloraError: if something cannot be read, does not fit together or cannot be written. ``out`` is then
            unchanged, and so is ``base``, or the message says how to restore it.
    """
    if (out is not None) + (patch is not None) + in_place != 1:
        raise OutputError("give exactly one of --out, --patch and --in-place")
    started = time.perf_counter()
    used_threads = thread_count(threads)
    options = MergeOptions(
        rounding,
        seed,
        base_f16,
        outtype,
        type,
        imatrix,
        text_only,
        trust_names,
        quantize,
        tensor_types,
        pure,
        output_tensor_type,
        token_embedding_type,
        calibrate,
        calibration_text,
        moments,
        save_moments,
    )
    if in_place and quantize is not None:
        raise UsageError("a merge in place keeps the types of all tensors; use --out with --quantize")
    with prepared_merge(base, adapters, options) as prepared:
        file, plan = prepared.file, prepared.plan
        outputs = _output_paths(file, out, patch)
        if in_place:
            plan = _plan_in_place(file, plan)
        else:
            check_targets(outputs, prepared.inputs, force=force or dry_run, size=0 if patch else plan.layout.size)
        merging = with_moments(
            replace(prepared, plan=plan), adapters, options, outputs, threads=used_threads, dry_run=dry_run
        )
        sums: dict[str, Sums] = {}
        written = 0
        if not dry_run:
            rewriter = Rewriter(
                merging.weights,
                plan.layout,
                plan.targets,
                merging.rounding,
                threads=used_threads,
                folder=outputs[0].parent,
                progress=progress,
            )
            if in_place:
                written = merge_in_place(file, plan.targets, rewriter.write, merging.merged, threads=used_threads)
            elif patch is not None:
                written = write_patch(
                    outputs[0], file, plan.layout, rewriter.write, merging.merged, threads=used_threads, force=force
                )
            else:
                with atomic_outputs(outputs, force=force) as drafts:
                    rewriter.write(FileSink(drafts, file, plan.layout))
                    file.check_unchanged()
                written = plan.layout.size
            sums = {changed.name: rewriter.sums(changed.name) for changed in plan.targets}
        return merging.report(
            outputs[0],
            sums,
            written=written,
            seconds=time.perf_counter() - started,
            threads=used_threads,
            dry_run=dry_run,
        )


def _plan_in_place(file: GgufFile, plan: MergePlan) -> MergePlan:
    """Return a plan that keeps the base's metadata, with a warning about the tokenizer's changes that are lost."""
    layout = check_in_place(file, plan.targets)
    if not plan.tokenizer:
        return replace(plan, layout=layout)
    lost = (
        f"{file.path}: a merge in place cannot change metadata; it keeps the base's tokenizer, which differs from the "
        f"adapter's: {'; '.join(plan.tokenizer)}. Use --out or --patch to carry the differences over"
    )
    return replace(plan, layout=layout, warnings=(*plan.warnings, lost), tokenizer=())


def plan_merge(
    base: str | os.PathLike[str],
    adapters: AdapterArgument,
    out: str | os.PathLike[str] = "merged.gguf",
    **options: Any,  # noqa: ANN401  (the fields of MergeOptions)
) -> MergeReport:
    """Make all checks of `merge` without writing anything, and report what it would do.

    Args:
        base: as for `merge`.
        adapters: as for `merge`.
        out: as for `merge`.
        options: the options of `merge` that `MergeOptions` lists.

    Raises:
        GgufloraError: under the same conditions as `merge`.
    """
    return merge(base, adapters, out, **asdict(MergeOptions(**options)), dry_run=True)


def _output_paths(
    file: GgufFile, out: str | os.PathLike[str] | None, patch: str | os.PathLike[str] | None
) -> tuple[Path, ...]:
    if patch is not None:
        return (Path(patch),)
    return (file.path,) if out is None else part_paths(Path(out), len(file.paths))
