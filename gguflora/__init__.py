"""LoRA for GGUF: convert PEFT adapters, merge them into quantized models, hot-swap them at run time."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gguflora._version import __version__
from gguflora.adapters import read_adapter
from gguflora.compare import CompareReport, compare
from gguflora.convert import ConvertReport, convert
from gguflora.errors import GgufloraError
from gguflora.in_place import UnmergeReport, unmerge
from gguflora.inspect import InspectReport, inspect
from gguflora.merge import merge, plan_merge
from gguflora.merge_report import MergeReport, TensorReport
from gguflora.runtime import Adapters, attach

if TYPE_CHECKING:
    from gguflora.algebra.combine import CombineReport, combine
    from gguflora.algebra.diff import DiffReport, diff
    from gguflora.algebra.export import ExportReport, export
    from gguflora.algebra.extract import ExtractReport, extract
    from gguflora.algebra.resize import ResizeReport, resize
    from gguflora.merge_parts import PartReport, assemble, merge_part
    from gguflora.patch.applying import ApplyReport, apply_patch
    from gguflora.pipeline import PipelineReport, run_pipeline

__all__ = [
    "Adapters",
    "ApplyReport",
    "CombineReport",
    "CompareReport",
    "ConvertReport",
    "DiffReport",
    "ExportReport",
    "ExtractReport",
    "GgufloraError",
    "InspectReport",
    "MergeReport",
    "PartReport",
    "PipelineReport",
    "ResizeReport",
    "TensorReport",
    "UnmergeReport",
    "__version__",
    "apply_patch",
    "assemble",
    "attach",
    "combine",
    "compare",
    "convert",
    "diff",
    "export",
    "extract",
    "inspect",
    "merge",
    "merge_part",
    "plan_merge",
    "read_adapter",
    "resize",
    "run_pipeline",
    "unmerge",
]

_LATER = {
    "ApplyReport": "gguflora.patch.applying",
    "CombineReport": "gguflora.algebra.combine",
    "DiffReport": "gguflora.algebra.diff",
    "ExportReport": "gguflora.algebra.export",
    "ExtractReport": "gguflora.algebra.extract",
    "PartReport": "gguflora.merge_parts",
    "PipelineReport": "gguflora.pipeline",
    "ResizeReport": "gguflora.algebra.resize",
    "apply_patch": "gguflora.patch.applying",
    "assemble": "gguflora.merge_parts",
    "combine": "gguflora.algebra.combine",
    "diff": "gguflora.algebra.diff",
    "export": "gguflora.algebra.export",
    "extract": "gguflora.algebra.extract",
    "merge_part": "gguflora.merge_parts",
    "resize": "gguflora.algebra.resize",
    "run_pipeline": "gguflora.pipeline",
}
"""Names whose modules are loaded when they are first used, so that ``import gguflora`` stays quick."""


def __getattr__(name: str) -> Any:  # noqa: ANN401  (a function or a class)
    if name not in _LATER:
        raise AttributeError(f"module 'gguflora' has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)
