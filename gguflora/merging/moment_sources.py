"""Where a calibrated merge gets its second moments: from a file, or from running the base."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gguflora.errors import OutputError, QuantizationError
from gguflora.files.gguf import GgufFile
from gguflora.files.output_checks import check_target
from gguflora.merging.calibrated import can_calibrate
from gguflora.merging.collector import load_collector
from gguflora.merging.moments import AllMoments, read_moments, write_moments
from gguflora.placement.target import ChangedTensor

if TYPE_CHECKING:
    from gguflora.merging.prepare import MergeOptions

Texts = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def find_moments(
    file: GgufFile,
    adapters: Sequence[tuple[str | os.PathLike[str], float]],
    targets: Sequence[ChangedTensor],
    options: MergeOptions,
    *,
    threads: int,
    taken: Sequence[Path],
) -> tuple[AllMoments, list[str]]:
    """Read or collect the moments of the changed tensors.

    Args:
        file: the base.
        adapters: paths and scales.
        targets: the changed tensors.
        options: say where the moments come from.
        threads: number of threads.
        taken: files of the merge, which the moments must not replace.

    Raises:
        QuantizationError: if no changed tensor can be calibrated.
        GgufloraError: if moments cannot be read, collected or saved.
    """
    weights = {
        target.name: (math.prod(target.source.shape[:-2]), target.source.n_in)
        for target in targets
        if target.deltas and len(target.shape) > 1 and target.type == target.source.type and can_calibrate(target.type)
    }
    if not weights:
        raise QuantizationError(
            f"{file.path}: no changed tensor can be calibrated: that takes matrices of a quantized type of fewer than "
            "six bits that keep their type; merge without --calibrate"
        )
    if options.moments is not None:
        found = read_moments(options.moments)
        if not weights.keys() & found.keys():
            raise QuantizationError(
                f"{options.moments}: has moments of none of the {len(weights)} tensors that the adapters change; "
                "collect them with the same adapters and base"
            )
        return found, []
    saved = None if options.save_moments is None else Path(options.save_moments)
    texts = options.calibration_text or ()
    texts = [texts] if isinstance(texts, str | os.PathLike) else list(texts)
    if saved is not None:
        if saved.absolute() in [path.absolute() for path in taken]:
            raise OutputError(f"{saved}: is to get both the second moments and the merge; give save_moments a file")
        check_target(saved, [*taken, *map(Path, texts)], force=True, size=0)
    collected, warnings = load_collector()(file.path, adapters, weights, texts, threads)
    if saved is not None:
        write_moments(saved, collected, force=True)
    return collected, warnings
