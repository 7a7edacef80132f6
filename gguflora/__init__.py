"""LoRA for GGUF: convert PEFT adapters, merge them into quantized models, hot-swap them at run time.

A name's module is loaded when the name is first used, so that ``import gguflora`` costs next to nothing.
"""

import logging
import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from gguflora._version import __version__
from gguflora.errors import GgufloraError

if TYPE_CHECKING:
    from gguflora.adapters import read_adapter
    from gguflora.lora.combine import CombineReport, combine
    from gguflora.lora.diff import DiffReport, diff
    from gguflora.lora.export import ExportReport, export
    from gguflora.lora.extract import ExtractReport, extract
    from gguflora.lora.resize import ResizeReport, resize
    from gguflora.diagnostics.compare import CompareReport, compare
    from gguflora.lora.convert import ConvertReport, convert
    from gguflora.diagnostics.demo import DemoReport, run_demo
    from gguflora.diagnostics.doctor import DoctorReport, doctor
    from gguflora.merging.in_place import UnmergeReport, unmerge
    from gguflora.lora.inspect import InspectReport, inspect
    from gguflora.merging.merge import merge, plan_merge
    from gguflora.merging.parts import PartReport, assemble, merge_part
    from gguflora.merging.report import MergeReport, TensorReport
    from gguflora.merging.patch.apply import ApplyReport, apply_patch
    from gguflora.pipeline import PipelineReport, run_pipeline
    from gguflora.engine.run import RunReport, run
    from gguflora.runtime.attached import Adapters, attach
    from gguflora.server.serve import ServeReport, serve

__all__ = [
    "Adapters",
    "ApplyReport",
    "CombineReport",
    "CompareReport",
    "ConvertReport",
    "DemoReport",
    "DiffReport",
    "DoctorReport",
    "ExportReport",
    "ExtractReport",
    "GgufloraError",
    "InspectReport",
    "MergeReport",
    "PartReport",
    "PipelineReport",
    "ResizeReport",
    "RunReport",
    "ServeReport",
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
    "doctor",
    "export",
    "extract",
    "inspect",
    "merge",
    "merge_part",
    "plan_merge",
    "read_adapter",
    "resize",
    "run",
    "run_demo",
    "run_pipeline",
    "serve",
    "unmerge",
]

_HOMES = {
    "Adapters": "gguflora.runtime.attached",
    "ApplyReport": "gguflora.merging.patch.apply",
    "CombineReport": "gguflora.lora.combine",
    "CompareReport": "gguflora.diagnostics.compare",
    "ConvertReport": "gguflora.lora.convert",
    "DemoReport": "gguflora.diagnostics.demo",
    "DiffReport": "gguflora.lora.diff",
    "DoctorReport": "gguflora.diagnostics.doctor",
    "ExportReport": "gguflora.lora.export",
    "ExtractReport": "gguflora.lora.extract",
    "InspectReport": "gguflora.lora.inspect",
    "MergeReport": "gguflora.merging.report",
    "PartReport": "gguflora.merging.parts",
    "PipelineReport": "gguflora.pipeline",
    "ResizeReport": "gguflora.lora.resize",
    "RunReport": "gguflora.engine.run",
    "ServeReport": "gguflora.server.serve",
    "TensorReport": "gguflora.merging.report",
    "UnmergeReport": "gguflora.merging.in_place",
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
    "inspect": "gguflora.lora.inspect",
    "merge": "gguflora.merging.merge",
    "merge_part": "gguflora.merging.parts",
    "plan_merge": "gguflora.merging.merge",
    "read_adapter": "gguflora.adapters",
    "resize": "gguflora.lora.resize",
    "run": "gguflora.engine.run",
    "run_demo": "gguflora.diagnostics.demo",
    "run_pipeline": "gguflora.pipeline",
    "serve": "gguflora.server.serve",
    "unmerge": "gguflora.merging.in_place",
}
"""The module of each public name."""


class _Package(ModuleType):
    """Keeps ``gguflora.merge`` the function when the module of that name is imported, which sets the attribute, too."""

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401  (any attribute)
        if isinstance(value, ModuleType) and _HOMES.get(name) == value.__name__:
            value = getattr(value, name)
        super().__setattr__(name, value)


def __getattr__(name: str) -> Any:  # noqa: ANN401  (a function, a class or a module)
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if not name.startswith("_") and find_spec(f"gguflora.{name}"):
        return import_module(f"gguflora.{name}")
    raise AttributeError(f"module 'gguflora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


sys.modules[__name__].__class__ = _Package
logging.getLogger(__name__).addHandler(logging.NullHandler())
