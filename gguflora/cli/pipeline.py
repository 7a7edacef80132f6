"""``gguflora pipeline``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import gguflora
from gguflora.cli.app import FAILED, app, console, print_report
from gguflora.cli.options import AsJson

if TYPE_CHECKING:
    from gguflora.pipeline import PipelineReport


@app.command()
def pipeline(
    recipe: Annotated[Path | None, typer.Argument(help="Recipe: a TOML file.")] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="Number of jobs at once; default: 1, or the scheduler's number of threads."),
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Dask scheduler that runs the jobs, such as tcp://host:8786.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, run nothing.")] = False,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="After a failed step, run the steps that do not need it.")
    ] = False,
    resume: Annotated[bool, typer.Option(help="Keep outputs that are up to date, or make all of them again.")] = True,
    report: Annotated[Path | None, typer.Option(help="Directory for report.json and report.html.")] = None,
    memory: Annotated[int | None, typer.Option(min=1, help="Memory for all running jobs together, in MB.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of recipes and exit.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run the steps of a recipe, except for those that are up to date. The exit code is 1 if a step failed.

    **Examples**

    gguflora pipeline nightly.toml --dry-run

    gguflora pipeline nightly.toml --jobs 2 --keep-going --report ./report

    gguflora pipeline nightly.toml --scheduler tcp://head:8786
    """
    if schema:
        from gguflora.pipeline import recipe_schema  # noqa: PLC0415  (needs pydantic)

        print(json.dumps(recipe_schema(), indent=2))
        return
    if recipe is None:
        raise typer.BadParameter("give a recipe")
    done = gguflora.run_pipeline(
        recipe,
        jobs=jobs,
        scheduler=scheduler,
        dry_run=dry_run,
        keep_going=keep_going,
        resume=resume,
        report=report,
        memory=memory,
    )
    print_report(done, _print_pipeline, as_json=as_json)
    if done.failed:
        raise typer.Exit(FAILED)


def _print_pipeline(report: PipelineReport) -> None:
    for result in report.results:
        time = f" ({result.seconds:.1f} s)" if result.seconds else ""
        error = f": {result.error}" if result.error else ""
        console.print(f"{result.status:8}{result.step}: {report.name_of(result)}{time}{error}", markup=False)
    counts = [result.status for result in report.results]
    summary = ", ".join(f"{counts.count(status)} {status}" for status in dict.fromkeys(counts))
    console.print(f"{summary}; outputs in {report.output}; took {report.seconds:.1f} s", markup=False)
