"""The commands that steps of a recipe can run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any


@cache
def commands() -> Mapping[str, Callable[..., Any]]:
    """Return the function of each action. They are imported on first use, because they load most of gguflora."""
    from gguflora.calibration.imatrix import imatrix  # noqa: PLC0415
    from gguflora.diagnostics.compare import compare  # noqa: PLC0415
    from gguflora.lora.combine import combine  # noqa: PLC0415
    from gguflora.lora.convert import convert  # noqa: PLC0415
    from gguflora.lora.export import export  # noqa: PLC0415
    from gguflora.lora.extract import extract  # noqa: PLC0415
    from gguflora.lora.inspect import inspect  # noqa: PLC0415
    from gguflora.lora.resize import resize  # noqa: PLC0415
    from gguflora.merging.merge import merge  # noqa: PLC0415
    from gguflora.merging.parts import assemble, merge_part  # noqa: PLC0415
    from gguflora.merging.quantize import quantize  # noqa: PLC0415
    from gguflora.training.train import train  # noqa: PLC0415

    return {
        "assemble": assemble,
        "combine": combine,
        "compare": compare,
        "convert": convert,
        "export": export,
        "extract": extract,
        "imatrix": imatrix,
        "inspect": inspect,
        "merge": merge,
        "merge_part": merge_part,
        "quantize": quantize,
        "resize": resize,
        "train": train,
    }
