"""Recipes of many steps, each done only when something it depends on has changed."""

import importlib.util

from gguflora.errors import RecipeError

if not importlib.util.find_spec("pydantic"):
    raise RecipeError("pipelines need pydantic: pip install 'gguflora[pipeline]'")

from gguflora.pipeline.recipe import recipe_schema
from gguflora.pipeline.results import PipelineReport, StepResult
from gguflora.pipeline.run import run_pipeline

__all__ = ["PipelineReport", "StepResult", "recipe_schema", "run_pipeline"]
