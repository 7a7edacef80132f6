"""Run recipes of many steps; a step runs only if something that it depends on has changed. Needs pydantic."""

from typing import TYPE_CHECKING, Final

from gguflora.errors import MissingExtraError
from gguflora.system.extras import lazy_face

if TYPE_CHECKING:
    from gguflora.pipeline.recipe import recipe_schema
    from gguflora.pipeline.results import PipelineReport, StepResult
    from gguflora.pipeline.run import run_pipeline

__all__ = ["PipelineReport", "StepResult", "recipe_schema", "run_pipeline"]

_HOMES: Final = {
    "PipelineReport": "gguflora.pipeline.results",
    "StepResult": "gguflora.pipeline.results",
    "recipe_schema": "gguflora.pipeline.recipe",
    "run_pipeline": "gguflora.pipeline.run",
}
"""The module of each public name."""

__getattr__ = lazy_face(__name__, _HOMES, "pydantic", MissingExtraError("a pipeline", "pydantic", "pipeline"))
