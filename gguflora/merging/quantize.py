"""``quantize``: write a GGUF model in a preset of llama-quantize, with its types, metadata and bytes."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gguflora.architectures.base_model import describe
from gguflora.files.atomic import atomic_outputs
from gguflora.files.gguf import GgufFile, part_paths
from gguflora.files.output_checks import check_targets
from gguflora.files.remote import remote_inputs
from gguflora.merging.presets import Preset, TensorTypes, preset_named
from gguflora.merging.rewriter import Rewriter
from gguflora.merging.rounding import RoundingOptions
from gguflora.merging.sinks import FileSink, Progress
from gguflora.merging.whole_file import WholePlan, plan_whole_file, read_importance
from gguflora.placement.base_weights import BaseTensors
from gguflora.system.cpus import thread_count


@dataclass(frozen=True, slots=True)
class QuantizeReport:
    """What `quantize` did, or would do with ``dry_run``.

    Attributes:
        output: path of the file; of a split model, of its first file.
        preset: name of the preset.
        tensors: type of each tensor in the output.
        weights: number of weights in all tensors.
        bits_per_weight: size of the tensors in bits for each weight.
        size_before: size of the source in bytes.
        size: size of the output in bytes.
        seconds: wall time.
        threads: number of threads used.
        warnings: messages for the user.
        dry_run: True if nothing was written.
    """

    output: Path
    preset: str
    tensors: dict[str, str]
    weights: int
    bits_per_weight: float
    size_before: int
    size: int
    seconds: float
    threads: int
    warnings: tuple[str, ...]
    dry_run: bool

    @property
    def types(self) -> dict[str, int]:
        """Number of tensors by type."""
        return dict(sorted(Counter(self.tensors.values()).items()))

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, ready for JSON."""
        return {**asdict(self), "output": str(self.output), "types": self.types}


@remote_inputs(base="file", imatrix="file")
def quantize(
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    preset: str,
    *,
    imatrix: str | os.PathLike[str] | None = None,
    tensor_types: TensorTypes | None = None,
    pure: bool = False,
    output_tensor_type: str | None = None,
    token_embedding_type: str | None = None,
    threads: int | None = None,
    dry_run: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Write ``base`` in the types of a preset, with the same bytes as llama-quantize.

    Tensors that are quantized already are quantized again, with a warning (llama-quantize: ``--allow-requantize``).

    Args:
        base: GGUF file, or any file of a split model; opened read-only.
        out: the file to write. A split model gives the same number of files (llama-quantize: ``--keep-split``).
        preset: llama-quantize's name, such as ``Q4_K_M``.
        imatrix: importance matrix (GGUF or legacy ``.dat``).
        tensor_types: types of tensors by regular expressions that are searched in their names, instead of the
            preset's; the first match counts.
        pure: give all tensors the preset's main type.
        output_tensor_type: type of the output weight.
        token_embedding_type: type of the token embedding.
        threads: number of threads; by default one for each core that this process may use.
        dry_run: check everything but write nothing.
        force: overwrite ``out``.
        progress: called with (bytes done, bytes in total); calls come from several threads but never overlap.

    Raises:
        GgufloraError: if something cannot be read, quantized or written. ``out`` is then unchanged.
    """
    started, used_threads = time.perf_counter(), thread_count(threads)
    chosen = preset_named(
        preset,
        tensor_types=tensor_types,
        pure=pure,
        output_tensor_type=output_tensor_type,
        token_embedding_type=token_embedding_type,
    )
    importance = read_importance(imatrix)
    with GgufFile(base) as file:
        describe(file)  # refuses files that hold no model
        plan = plan_whole_file(file, chosen, importance)
        outputs = part_paths(Path(out), len(file.paths))
        inputs = [*file.paths, *([] if imatrix is None else [Path(imatrix)])]
        check_targets(outputs, inputs, force=force or dry_run, size=plan.layout.size)
        if not dry_run:
            rounding = RoundingOptions("nearest", imatrix={} if importance is None else importance.weights)
            rewriter = Rewriter(
                BaseTensors(file),
                plan.layout,
                plan.targets,
                rounding,
                threads=used_threads,
                folder=outputs[0].parent,
                progress=progress,
            )
            with atomic_outputs(outputs, force=force) as drafts:
                rewriter.write(FileSink(drafts, file, plan.layout))
                file.check_unchanged()
        return _report(file, plan, chosen, outputs[0], time.perf_counter() - started, used_threads, dry_run=dry_run)


def _report(
    file: GgufFile, plan: WholePlan, preset: Preset, output: Path, seconds: float, threads: int, *, dry_run: bool
) -> QuantizeReport:
    types = {name: tensor.type.name for name, tensor in file.tensors.items()}
    types |= {target.name: target.type.name for target in plan.targets}
    weights = sum(math.prod(tensor.shape) for tensor in file.tensors.values())
    return QuantizeReport(
        output,
        preset.name,
        types,
        weights,
        8 * plan.layout.data_size / weights if weights else 0.0,
        file.size,
        plan.layout.size,
        seconds,
        threads,
        plan.warnings,
        dry_run,
    )
