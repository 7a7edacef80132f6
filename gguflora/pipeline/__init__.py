"""Recipes of many steps, each done only when something it depends on has changed."""

from gguflora.pipeline.recipe import recipe_schema
from gguflora.pipeline.results import PipelineReport, StepResult
from gguflora.pipeline.run import run_pipeline

__all__ = ["PipelineReport", "StepResult", "recipe_schema", "run_pipeline"]
