"""``gguflora pipeline``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import gguflora
from gguflora.cli.app import FAILED, INTERRUPTED, app, console, print_json, print_report
from gguflora.cli.options import AsJson
from gguflora.files.strict_json import to_json

if TYPE_CHECKING:
    from gguflora.pipeline import PipelineReport, StepResult


@app.command()
def pipeline(
    recipe: Annotated[Path | None, typer.Argument(help="Recipe: a TOML file; - reads it from stdin.")] = None,
    targets: Annotated[
        list[str] | None,
        typer.Argument(help="Make only these and what they need: steps, outputs, or globs of outputs."),
    ] = None,
    var: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Value of a variable of the recipe; repeatable.")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="Number of jobs at once; default: 1, or what a cluster takes."),
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Dask scheduler that runs the jobs, such as tcp://host:8786.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, say what would run and why, write nothing.")
    ] = False,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="After a failed step, run the steps that do not need it.")
    ] = False,
    allow_empty: Annotated[
        bool, typer.Option("--allow-empty", help="Let globs match nothing and steps have no jobs.")
    ] = False,
    resume: Annotated[bool, typer.Option(help="Keep outputs that are up to date, or make all of them again.")] = True,
    prune: Annotated[
        bool, typer.Option("--prune", help="Remove outputs of former runs that the recipe no longer names.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace files that are in the way and that no record of the pipeline names."),
    ] = False,
    adopt: Annotated[
        bool,
        typer.Option("--adopt", help="Keep such files if they are, byte for byte, what the recipe makes."),
    ] = False,
    allow_outside: Annotated[
        bool, typer.Option("--allow-outside", help="Let the recipe write outside of its own folder.")
    ] = False,
    report: Annotated[Path | None, typer.Option(help="Directory for report.json and report.html.")] = None,
    memory: Annotated[int | None, typer.Option(min=1, help="Memory for all running jobs together, in MB.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of recipes and exit.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run the steps of a recipe, except for those that are up to date. The exit code is 1 if a step failed.

    **Examples**

    gguflora pipeline nightly.toml --dry-run

    gguflora pipeline nightly.toml merged '*-q4.gguf' --var date=2026-11-29

    gguflora pipeline nightly.toml --jobs 2 --keep-going --report ./report

    gguflora pipeline nightly.toml --scheduler tcp://head:8786
    """
    if schema:
        from gguflora.pipeline import recipe_schema  # noqa: PLC0415  (needs pydantic)

        print_json(to_json(recipe_schema(), indent=2))
        return
    if recipe is None:
        raise typer.BadParameter("give a recipe")
    is_done = True
    try:
        done = gguflora.run_pipeline(
            recipe,
            targets=targets or (),
            var=dict(_split(item) for item in var or ()),
            jobs=jobs,
            scheduler=scheduler,
            dry_run=dry_run,
            keep_going=keep_going,
            allow_empty=allow_empty,
            resume=resume,
            prune=prune,
            force=force,
            adopt=adopt,
            allow_outside=allow_outside,
            report=report,
            memory=memory,
            watch=(lambda _: None) if as_json else _print_result,
        )
    except KeyboardInterrupt as interrupt:
        found = getattr(interrupt, "report", None)
        if found is None:
            raise
        done, is_done = found, False
    print_report(done, _print_totals, as_json=as_json)
    if not is_done:
        raise typer.Exit(INTERRUPTED)
    if done.failed:
        raise typer.Exit(FAILED)


def _split(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise typer.BadParameter(f"--var {text}: expected NAME=VALUE")
    return name, value


def _print_result(result: StepResult) -> None:
    status = "to do" if result.status == "planned" else result.status
    time = f" ({result.seconds:.1f} s)" if result.seconds else ""
    more = result.error or (result.why if result.status == "planned" else None)
    console.print(f"{status:8}{result.step}: {result.name}{time}{f': {more}' if more else ''}", markup=False)
    sys.stdout.flush()


def _print_totals(report: PipelineReport) -> None:
    for name in report.orphans:
        console.print(f"orphan  {name}: the recipe no longer makes it; --prune removes it", markup=False)
    for name in report.pruned:
        console.print(f"pruned  {name}", markup=False)
    named = {"to do" if status == "planned" else status: count for status, count in report.totals.items()}
    counts = ", ".join(f"{count} {status}" for status, count in named.items())
    console.print(f"{counts or 'no jobs'}; outputs in {report.output}; took {report.seconds:.1f} s", markup=False)
