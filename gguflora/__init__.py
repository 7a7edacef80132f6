"""LoRA for GGUF: convert PEFT adapters, merge them into quantized models, hot-swap them at run time.

A public name's module is loaded when the name is first used, so that ``import gguflora`` is fast.
"""

import logging
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from gguflora._version import __version__ as __version__
from gguflora.errors import GgufloraError as GgufloraError
from gguflora.lora.loss_meter import LossMeter, provide_loss_meter
from gguflora.merging.collector import Collector, provide_collector

if TYPE_CHECKING:
    from gguflora.adapters.adapter import read_adapter as read_adapter
    from gguflora.calibration.imatrix import ImatrixReport as ImatrixReport
    from gguflora.calibration.imatrix import imatrix as imatrix
    from gguflora.diagnostics.compare import compare as compare
    from gguflora.diagnostics.comparison import CompareReport as CompareReport
    from gguflora.diagnostics.demo import DemoReport as DemoReport
    from gguflora.diagnostics.demo import run_demo as run_demo
    from gguflora.diagnostics.doctor import DoctorReport as DoctorReport
    from gguflora.diagnostics.doctor import doctor as doctor
    from gguflora.engine.run import RunReport as RunReport
    from gguflora.engine.run import run as run
    from gguflora.lora.combine import CombineReport as CombineReport
    from gguflora.lora.combine import combine as combine
    from gguflora.lora.convert import ConvertReport as ConvertReport
    from gguflora.lora.convert import convert as convert
    from gguflora.lora.diff import DiffReport as DiffReport
    from gguflora.lora.diff import diff as diff
    from gguflora.lora.export import ExportReport as ExportReport
    from gguflora.lora.export import export as export
    from gguflora.lora.extract import ExtractReport as ExtractReport
    from gguflora.lora.extract import extract as extract
    from gguflora.lora.inspect import InspectReport as InspectReport
    from gguflora.lora.inspect import inspect as inspect
    from gguflora.lora.resize import ResizeReport as ResizeReport
    from gguflora.lora.resize import resize as resize
    from gguflora.merging.in_place.unmerge import UnmergeReport as UnmergeReport
    from gguflora.merging.in_place.unmerge import unmerge as unmerge
    from gguflora.merging.merge import merge as merge
    from gguflora.merging.merge import plan_merge as plan_merge
    from gguflora.merging.parts import PartReport as PartReport
    from gguflora.merging.parts import assemble as assemble
    from gguflora.merging.parts import merge_part as merge_part
    from gguflora.merging.patch.apply import ApplyReport as ApplyReport
    from gguflora.merging.patch.apply import apply_patch as apply_patch
    from gguflora.merging.plots import plot_report as plot_report
    from gguflora.merging.quantize import QuantizeReport as QuantizeReport
    from gguflora.merging.quantize import quantize as quantize
    from gguflora.merging.report import MergeReport as MergeReport
    from gguflora.merging.report import TensorReport as TensorReport
    from gguflora.pipeline import PipelineReport as PipelineReport
    from gguflora.pipeline import run_pipeline as run_pipeline
    from gguflora.runtime.attached import Adapters as Adapters
    from gguflora.runtime.attached import attach as attach
    from gguflora.server.serve import ServeReport as ServeReport
    from gguflora.server.serve import serve as serve
    from gguflora.training.report import TrainReport as TrainReport
    from gguflora.training.train import train as train

_HOMES = {
    "Adapters": "gguflora.runtime.attached",
    "ApplyReport": "gguflora.merging.patch.apply",
    "CombineReport": "gguflora.lora.combine",
    "CompareReport": "gguflora.diagnostics.comparison",
    "ConvertReport": "gguflora.lora.convert",
    "DemoReport": "gguflora.diagnostics.demo",
    "DiffReport": "gguflora.lora.diff",
    "DoctorReport": "gguflora.diagnostics.doctor",
    "ExportReport": "gguflora.lora.export",
    "ExtractReport": "gguflora.lora.extract",
    "ImatrixReport": "gguflora.calibration.imatrix",
    "InspectReport": "gguflora.lora.inspect",
    "MergeReport": "gguflora.merging.report",
    "PartReport": "gguflora.merging.parts",
    "PipelineReport": "gguflora.pipeline",
    "QuantizeReport": "gguflora.merging.quantize",
    "ResizeReport": "gguflora.lora.resize",
    "RunReport": "gguflora.engine.run",
    "ServeReport": "gguflora.server.serve",
    "TensorReport": "gguflora.merging.report",
    "TrainReport": "gguflora.training.report",
    "UnmergeReport": "gguflora.merging.in_place.unmerge",
    "apply_patch": "gguflora.merging.patch.apply",
    "assemble": "gguflora.merging.parts",
    "attach": "gguflora.runtime.attached",
    "combine": "gguflora.lora.combine",
    "compare": "gguflora.diagnostics.compare",
    "convert": "gguflora.lora.convert",
    "diff": "gguflora.lora.diff",
    "doctor": "gguflora.diagnostics.doctor",
    "export": "gguflora.lora.export",
    "extract": "gguflora.lora.extract",
    "imatrix": "gguflora.calibration.imatrix",
    "inspect": "gguflora.lora.inspect",
    "merge": "gguflora.merging.merge",
    "merge_part": "gguflora.merging.parts",
    "plan_merge": "gguflora.merging.merge",
    "plot_report": "gguflora.merging.plots",
    "quantize": "gguflora.merging.quantize",
    "read_adapter": "gguflora.adapters.adapter",
    "resize": "gguflora.lora.resize",
    "run": "gguflora.engine.run",
    "run_demo": "gguflora.diagnostics.demo",
    "run_pipeline": "gguflora.pipeline",
    "serve": "gguflora.server.serve",
    "train": "gguflora.training.train",
    "unmerge": "gguflora.merging.in_place.unmerge",
}
"""The module of each public name."""

_PACKAGES = frozenset(
    {
        "adapters",
        "architectures",
        "calibration",
        "cli",
        "diagnostics",
        "engine",
        "errors",
        "files",
        "lora",
        "merging",
        "pipeline",
        "placement",
        "quants",
        "runtime",
        "server",
        "system",
        "training",
    }
)
"""Packages that are attributes of ``gguflora`` without an import of their own, such as ``gguflora.quants``."""

__all__ = sorted([*_HOMES, "GgufloraError", "__version__"])  # noqa: PLE0605  (ruff accepts only literals)


def __getattr__(name: str) -> Any:  # noqa: ANN401  (a function, a class or a package)
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _PACKAGES:
        return import_module(f"gguflora.{name}")
    raise AttributeError(f"module 'gguflora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


def _collector() -> Collector:
    from gguflora.calibration.collect import collect_moments  # noqa: PLC0415  (slow to import)

    return collect_moments


def _loss_meter() -> LossMeter:
    from gguflora.calibration.loss import open_loss_meter  # noqa: PLC0415  (slow to import)

    return open_loss_meter


class _Package(ModuleType):
    """The class of this module: pickled by its name, so that functions of notebooks that use it can be sent away."""

    def __reduce__(self) -> tuple[Any, ...]:
        return import_module, (self.__name__,)


sys.modules[__name__].__class__ = _Package
provide_collector(_collector)
provide_loss_meter(_loss_meter)
logging.getLogger(__name__).addHandler(logging.NullHandler())
