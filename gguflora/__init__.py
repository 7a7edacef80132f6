"""LoRA for GGUF: convert PEFT adapters, merge them into quantized models, hot-swap them at run time."""

from gguflora._version import __version__
from gguflora.adapters import read_adapter
from gguflora.algebra.combine import CombineReport, combine
from gguflora.algebra.diff import DiffReport, diff
from gguflora.algebra.export import ExportReport, export
from gguflora.algebra.extract import ExtractReport, extract
from gguflora.algebra.resize import ResizeReport, resize
from gguflora.compare import CompareReport, compare
from gguflora.convert import ConvertReport, convert
from gguflora.errors import GgufloraError
from gguflora.inspect import InspectReport, inspect
from gguflora.merge import merge, plan_merge
from gguflora.merge_report import MergeReport, TensorReport
from gguflora.runtime import Adapters, attach

__all__ = [
    "Adapters",
    "CombineReport",
    "CompareReport",
    "ConvertReport",
    "DiffReport",
    "ExportReport",
    "ExtractReport",
    "GgufloraError",
    "InspectReport",
    "MergeReport",
    "ResizeReport",
    "TensorReport",
    "__version__",
    "attach",
    "combine",
    "compare",
    "convert",
    "diff",
    "export",
    "extract",
    "inspect",
    "merge",
    "plan_merge",
    "read_adapter",
    "resize",
]
