"""Merge adapters into a quantized GGUF file: ``merge``.

The output is the base file but for the rows of the changed tensors: those are dequantized, changed and quantized
again, a block of rows at a time, on several threads, while the rest is copied by the kernel. No model is ever held in
memory.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Final, get_args

import numpy as np

from gguflora._native import SUMS
from gguflora.adapters import read_adapter
from gguflora.base_model import describe
from gguflora.changed_rows import Weights
from gguflora.errors import AdapterError, OutputError, QuantizationError
from gguflora.files.gguf import GgufFile, part_paths
from gguflora.files.output import atomic_outputs, check_targets
from gguflora.hf_model import HighPrecisionBase
from gguflora.imatrix import read_imatrix
from gguflora.in_place import check_in_place, merge_in_place
from gguflora.merge_plan import OutputTypes, Plan, make_plan, merges_of
from gguflora.merge_report import MergeReport, TensorReport, survival_warning
from gguflora.patch import Merged, write_patch
from gguflora.rewrite import FileSink, Progress, Rewriter
from gguflora.rounding import Mode, Rounding, Sums

AdapterPath = str | os.PathLike[str]
AdapterArgument = AdapterPath | Sequence[AdapterPath | tuple[AdapterPath, float]]
MAX_SEED: Final = 2**31 - 1


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
    threads: int | None = None,
    dry_run: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Write ``base`` with adapters merged in.

    Args:
        base: GGUF file of any quant types, or any file of a split model; opened read-only.
        adapters: a PEFT directory or GGUF LoRA file, or a sequence of them or of (path, scale); summed, then
            rounded once.
        out: the file to write; of a split base as many files, named like it (``out-00001-of-00003.gguf``).
        patch: instead of ``out``: write only what changes, for `gguflora.apply_patch`.
        in_place: instead of ``out``: write the changed rows into ``base`` itself, after an undo file beside it, for
            `gguflora.unmerge`.
        rounding: ``adaptive`` keeps changes that are smaller than a quantization step (see `gguflora.rounding`);
            ``nearest`` makes exactly the bytes ggml would.
        seed: of the adaptive rounding; the same seed gives the same bytes.
        base_f16: the base before it was quantized, a GGUF file or a Hugging Face directory: changes are added to its
            weights, and the sum is rounded to nearest.
        outtype: type of the changed matrices; ``keep`` leaves each in its own.
        type: types of some changed tensors by pattern, before ``outtype``.
        imatrix: importance matrix (GGUF or legacy ``.dat``) for the search of scales, as llama-quantize uses it.
        threads: number of threads; by default one for each core this process may use.
        dry_run: check everything, write nothing.
        force: overwrite ``out`` or ``patch``.
        progress: called with (bytes done, bytes in all), from several threads but never at once.

    Raises:
        GgufloraError: if something cannot be read, does not fit together or cannot be written; ``out`` is then as
            it was, and so is ``base``, or the message says how to get it back.
    """
    if (out is not None) + (patch is not None) + in_place != 1:
        raise OutputError("say where the result goes with exactly one of --out, --patch and --in-place")
    started = time.perf_counter()
    used_threads = threads or len(os.sched_getaffinity(0))
    types = OutputTypes.named(outtype, type or {})
    with ExitStack() as opened:
        file = opened.enter_context(GgufFile(base))
        outputs = _outputs(file, out, patch)
        sources = [(read_adapter(path), scale) for path, scale in with_scales(adapters)]
        how = _rounding(file, rounding, seed, imatrix)
        plan = make_plan(file, sources, how, types)
        precise = None
        if base_f16 is not None:
            precise = opened.enter_context(HighPrecisionBase.open(base_f16, describe(file)))
            precise.check(file, (changed.source.name for changed in plan.targets if changed.changes))
        if in_place:
            plan = replace(plan, layout=check_in_place(file, plan.targets))
        else:
            inputs = [*file.paths, *(source.path for source, _ in sources)]
            check_targets(outputs, inputs, force=force or dry_run, size=0 if patch else plan.layout.size)
        merged = Merged(tuple((source.name, source.sha256, scale) for source, scale in sources), rounding, seed)
        sums: dict[str, Sums] = {}
        written = 0
        if not dry_run:
            rewriter = Rewriter(
                Weights(file, precise),
                plan.layout,
                plan.targets,
                how,
                threads=used_threads,
                folder=outputs[0].parent,
                progress=progress,
            )
            if in_place:
                written = merge_in_place(file, plan.targets, rewriter.write, merged, threads=used_threads)
            elif patch is not None:
                written = write_patch(
                    outputs[0], file, plan.layout, rewriter.write, merged, threads=used_threads, force=force
                )
            else:
                with atomic_outputs(outputs, force=force) as drafts:
                    rewriter.write(FileSink(drafts, file, plan.layout))
                    file.check_unchanged()
                written = plan.layout.size
            sums = {changed.name: rewriter.sums(changed.name) for changed in plan.targets}
    tensors, total = _reports(plan, sums)
    warning = survival_warning(tensors, total, rounding)
    return MergeReport(
        output=outputs[0],
        adapters=merged.adapters,
        tensors=tensors,
        total=total,
        rounding=rounding,
        seed=seed,
        size=plan.layout.size,
        written=written,
        seconds=time.perf_counter() - started,
        threads=used_threads,
        warnings=plan.warnings if warning is None else (*plan.warnings, warning),
        dry_run=dry_run,
    )


def plan_merge(
    base: str | os.PathLike[str],
    adapters: AdapterArgument,
    out: str | os.PathLike[str] = "merged.gguf",
    *,
    rounding: Mode = "adaptive",
    seed: int = 0,
    base_f16: str | os.PathLike[str] | None = None,
    outtype: str = "keep",
    type: Mapping[str, str] | None = None,
    imatrix: str | os.PathLike[str] | None = None,
) -> MergeReport:
    """What `merge` with the same arguments would do: every check made, nothing written.

    Raises:
        GgufloraError: as `merge` would.
    """
    return merge(
        base,
        adapters,
        out,
        rounding=rounding,
        seed=seed,
        base_f16=base_f16,
        outtype=outtype,
        type=type,
        imatrix=imatrix,
        dry_run=True,
    )


def _outputs(
    file: GgufFile, out: str | os.PathLike[str] | None, patch: str | os.PathLike[str] | None
) -> tuple[Path, ...]:
    if patch is not None:
        return (Path(patch),)
    return (file.path,) if out is None else part_paths(Path(out), len(file.paths))


def with_scales(adapters: AdapterArgument) -> list[tuple[AdapterPath, float]]:
    """The paths of adapters and their scales, 1 where none is given; ``AdapterError`` if one is not finite."""
    given = [adapters] if isinstance(adapters, str | os.PathLike) else adapters
    pairs = [item if isinstance(item, tuple) else (item, 1.0) for item in given]
    for path, scale in pairs:
        if not abs(float(scale)) <= float(np.finfo(np.float32).max):
            raise AdapterError(f"{path}: its scale is {scale}, expected a finite number")
    return [(path, float(scale)) for path, scale in pairs]


def _rounding(file: GgufFile, mode: Mode, seed: int, imatrix: str | os.PathLike[str] | None) -> Rounding:
    if mode not in get_args(Mode):
        raise QuantizationError(f"rounding is {mode!r}, expected one of {', '.join(get_args(Mode))}")
    if not 0 <= seed <= MAX_SEED:
        raise QuantizationError(f"the seed is {seed}, expected a number from 0 to {MAX_SEED}")
    return Rounding(mode, seed, merges_of(file), {} if imatrix is None else read_imatrix(imatrix))


def _reports(plan: Plan, sums: Mapping[str, Sums]) -> tuple[tuple[TensorReport, ...], TensorReport]:
    """A report for each changed tensor, and one for all together; without sums, of what is planned."""
    changed = [target for target in plan.targets if target.changes]
    count = sum(math.prod(target.shape) for target in changed)
    if not sums:
        reports = (TensorReport(target.name, target.type.name, math.prod(target.shape)) for target in changed)
        return tuple(reports), TensorReport("all", "", count)
    reports = (
        TensorReport.of(target.name, target.type.name, math.prod(target.shape), sums[target.name]) for target in changed
    )
    total = np.sum([sums[target.name] for target in changed], axis=0) if changed else np.zeros(len(SUMS))
    return tuple(reports), TensorReport.of("all", "", max(count, 1), total)
