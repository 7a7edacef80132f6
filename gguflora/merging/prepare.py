"""Read, check and plan a merge before anything is written: ``prepared_merge``."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, get_args

import numpy as np

from gguflora.adapters.adapter import Adapter, read_adapter
from gguflora.architectures.base_model import describe, is_mmproj
from gguflora.errors import AdapterError, QuantizationError, UsageError
from gguflora.files.gguf import GgufFile
from gguflora.merging.high_precision import UnquantizedBase
from gguflora.merging.moment_sources import Texts, find_moments
from gguflora.merging.output_types import OutputTypes
from gguflora.merging.patch import Merged
from gguflora.merging.plan import MergePlan, WholeFile, count_merges, make_plan
from gguflora.merging.prediction import predictions, steps_of
from gguflora.merging.presets import TensorTypes, preset_named
from gguflora.merging.report import MergeReport, TensorReport, warnings_of
from gguflora.merging.rounding import TOTALS, Mode, RoundingOptions, Sums
from gguflora.merging.whole_file import Importance, read_importance
from gguflora.placement.base_weights import BaseTensors
from gguflora.placement.language_part import language_part, other_part

AdapterPath = str | os.PathLike[str]
AdapterArgument = AdapterPath | Sequence[AdapterPath | tuple[AdapterPath, float]]
MAX_SEED: Final = 2**31 - 1


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """The options that determine the bytes of a merge; `gguflora.merge` documents them."""

    rounding: Mode = "adaptive"
    seed: int = 0
    base_f16: str | os.PathLike[str] | None = None
    outtype: str = "keep"
    type: Mapping[str, str] | None = None
    imatrix: str | os.PathLike[str] | None = None
    text_only: bool = False
    trust_names: bool = False
    quantize: str | None = None
    tensor_types: TensorTypes | None = None
    pure: bool = False
    output_tensor_type: str | None = None
    token_embedding_type: str | None = None
    calibrate: bool = False
    calibration_text: Texts | None = None
    moments: str | os.PathLike[str] | None = None
    save_moments: str | os.PathLike[str] | None = None


@dataclass(frozen=True, slots=True)
class PreparedMerge:
    """Everything that a merge needs except its output.

    Attributes:
        file: the base.
        sources: adapters and their scales.
        rounding: rounding of the changed weights.
        plan: the plan of the merge.
        weights: the weights that deltas are added to.
        preset: the preset that the whole file is quantized in, or None.
        predicts: whether the report tells the deltas in steps: not where they are added to unquantized weights.
    """

    file: GgufFile
    sources: Sequence[tuple[Adapter, float]]
    rounding: RoundingOptions
    plan: MergePlan
    weights: BaseTensors
    preset: str | None = None
    predicts: bool = True

    @property
    def inputs(self) -> list[Path]:
        """The input files, which the output must not replace."""
        return [*self.file.paths, *(source.path for source, _ in self.sources)]

    @property
    def uncalibrated(self) -> dict[str, str]:
        """The changed quantized tensors that a calibrated merge rounds as any other merge, and why."""
        changed = [t for t in self.plan.targets if t.deltas and t.type.block_weights > 1]
        if not self.rounding.is_calibrated or not self.rounding.moments:
            return {}
        reasons = {target.name: self.rounding.why_not_calibrated(target) for target in changed}
        return {name: reason for name, reason in reasons.items() if reason is not None}

    @property
    def merged(self) -> Merged:
        """The adapters, rounding and seed, to be recorded in a patch."""
        adapters = tuple((source.name, source.sha256, scale) for source, scale in self.sources)
        return Merged(adapters, self.rounding.name, self.rounding.seed)

    def report(self, output: Path, sums: Mapping[str, Sums], **more: Any) -> MergeReport:  # noqa: ANN401
        """Report on a merge, given the sums of each target; without sums, report on the plan."""
        tensors, total = _with_predictions(
            *_tensor_reports(self.plan, sums), self.plan, self.weights if self.predicts else None
        )
        return MergeReport(
            output=output,
            adapters=self.merged.adapters,
            tensors=tensors,
            total=total,
            rounding=self.rounding.name,
            seed=self.rounding.seed,
            size=self.plan.layout.size,
            warnings=(*self.plan.warnings, *warnings_of(tensors, total, self.rounding.mode)),
            uncalibrated=tuple(self.uncalibrated),
            uncalibrated_reasons=self.uncalibrated,
            tokenizer=self.plan.tokenizer,
            preset=self.preset,
            **more,
        )


@contextmanager
def prepared_merge(
    base: str | os.PathLike[str],
    adapters: AdapterArgument,
    options: MergeOptions,
) -> Iterator[PreparedMerge]:
    """Open, check and plan a merge. A calibrated one still needs `with_moments`.

    Raises:
        GgufloraError: if something cannot be read or does not fit together.
    """
    types = OutputTypes.from_names(options.outtype, options.type or {})
    importance = read_importance(options.imatrix)
    whole = _whole_file(options, importance)
    _check_calibration(options)
    with ExitStack() as opened:
        file = opened.enter_context(GgufFile(base))
        sources = [(read_adapter(path), scale) for path, scale in with_scales(adapters)]
        if is_mmproj(file):
            sources = [(other_part(source), scale) for source, scale in sources]
        elif options.text_only:
            sources = [(language_part(source), scale) for source, scale in sources]
        rounding = _rounding_options(file, options, importance)
        plan = make_plan(
            file,
            sources,
            rounding,
            types,
            from_unquantized=options.base_f16 is not None,
            trust_names=options.trust_names,
            whole=whole,
        )
        unquantized = None
        if options.base_f16 is not None:
            unquantized = opened.enter_context(UnquantizedBase.open(options.base_f16, describe(file, mmproj=True)))
            unquantized.check(file, (changed.source.name for changed in plan.targets if changed.deltas))
        yield PreparedMerge(
            file,
            sources,
            rounding,
            plan,
            BaseTensors(file, unquantized),
            whole.preset.name if whole else None,
            unquantized is None,
        )


def with_moments(
    merging: PreparedMerge,
    adapters: AdapterArgument,
    options: MergeOptions,
    outputs: Sequence[Path],
    *,
    threads: int,
    dry_run: bool = False,
) -> PreparedMerge:
    """Read or collect the second moments of a calibrated merge; a dry run does not collect them.

    Call it once everything else is checked: the base runs for minutes.

    Raises:
        GgufloraError: if they cannot be read, collected or saved.
    """
    if not merging.rounding.is_calibrated or (dry_run and options.moments is None):
        return merging
    taken = [*merging.inputs, *outputs]
    found, notes = find_moments(
        merging.file, with_scales(adapters), merging.plan.targets, options, threads=threads, taken=taken
    )
    plan = replace(merging.plan, warnings=(*merging.plan.warnings, *notes))
    return replace(merging, rounding=replace(merging.rounding, moments=found), plan=plan)


def with_scales(adapters: AdapterArgument) -> list[tuple[AdapterPath, float]]:
    """Return the paths of adapters and their scales, 1 by default; raise ``AdapterError`` if one is not finite."""
    given = [adapters] if isinstance(adapters, str | os.PathLike) else adapters
    pairs = [item if isinstance(item, tuple) else (item, 1.0) for item in given]
    for path, scale in pairs:
        if not abs(float(scale)) <= float(np.finfo(np.float32).max):
            raise AdapterError(f"{path}: its scale is {scale}, expected a finite number")
    return [(path, float(scale)) for path, scale in pairs]


def _whole_file(options: MergeOptions, importance: Importance | None) -> WholeFile | None:
    """Return the preset that the whole file is quantized in, if there is one.

    Raises:
        QuantizationError: if a preset or type is unknown.
        UsageError: if options do not go together.
    """
    names = ("tensor_types", "pure", "output_tensor_type", "token_embedding_type")
    given = [name for name in names if getattr(options, name)]
    if options.quantize is None:
        if given:
            raise UsageError(f"{', '.join(given)} needs quantize, the preset of the whole file, such as Q4_K_M")
        return None
    if options.outtype != "keep" or options.type:
        raise UsageError(
            f"quantize {options.quantize} gives every tensor a type; use tensor_types (--tensor-type) for exceptions "
            "instead of outtype and type"
        )
    if options.base_f16 is not None:
        raise UsageError(f"quantize {options.quantize} with base_f16: give the unquantized model as the base itself")
    return WholeFile(preset_named(options.quantize, **{name: getattr(options, name) for name in names}), importance)


def _check_calibration(options: MergeOptions) -> None:
    """Raise ``UsageError`` if options of a calibrated merge do not go together."""
    calibrated = options.calibrate or options.moments is not None
    if not calibrated and (options.calibration_text or options.save_moments):
        raise UsageError("calibration_text and save_moments need calibrate (--calibrate)")
    if options.moments is not None and (options.calibration_text or options.save_moments):
        raise UsageError("moments were collected already; give either them, or calibration_text and save_moments")
    if calibrated and (options.rounding != "adaptive" or options.base_f16 is not None):
        what = "base_f16" if options.base_f16 is not None else f"rounding {options.rounding}"
        raise UsageError(f"a calibrated merge starts from the codes of the quantized base; leave out {what}")


def _rounding_options(file: GgufFile, options: MergeOptions, importance: Importance | None) -> RoundingOptions:
    mode, seed = options.rounding, options.seed
    if mode not in get_args(Mode):
        raise QuantizationError(f"rounding is {mode!r}, expected one of {', '.join(get_args(Mode))}")
    if not 0 <= seed <= MAX_SEED:
        raise QuantizationError(f"the seed is {seed}, expected a number from 0 to {MAX_SEED}")
    return RoundingOptions(
        mode,
        seed,
        count_merges(file),
        {} if importance is None else importance.weights,
        options.calibrate or options.moments is not None,
    )


def _with_predictions(
    tensors: tuple[TensorReport, ...], total: TensorReport, plan: MergePlan, weights: BaseTensors | None
) -> tuple[tuple[TensorReport, ...], TensorReport]:
    """Add what the sizes of the deltas in steps predict; nothing without weights."""
    if weights is None:
        return tensors, total
    found = {target.name: steps_of(weights, target) for target in plan.targets if target.deltas}
    steps = {name: each for name, each in found.items() if each is not None}
    made = tuple(
        replace(each, **predictions({each.name: steps[each.name]})) if each.name in steps else each for each in tensors
    )
    return made, replace(total, **predictions(steps))


def _tensor_reports(plan: MergePlan, sums: Mapping[str, Sums]) -> tuple[tuple[TensorReport, ...], TensorReport]:
    """Return a report for each changed tensor and one for all of them; without sums, they have no measures."""
    changed = [target for target in plan.targets if target.deltas]
    count = sum(math.prod(target.shape) for target in changed)
    if not sums:
        reports = (TensorReport(target.name, target.type.name, math.prod(target.shape)) for target in changed)
        return tuple(reports), TensorReport("all", "", count)
    reports = (
        TensorReport.from_sums(target.name, target.type.name, math.prod(target.shape), sums[target.name])
        for target in changed
    )
    total = np.sum([sums[target.name] for target in changed], axis=0) if changed else np.zeros(len(TOTALS))
    return tuple(reports), TensorReport.from_sums("all", "", max(count, 1), total)
