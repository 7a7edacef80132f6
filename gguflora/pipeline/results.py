"""The results of a pipeline."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gguflora.files.strict_json import to_json

Status = Literal["done", "kept", "planned", "failed", "left"]


@dataclass(frozen=True, slots=True)
class StepResult:
    """The result of one job: a step for one combination of its matrix.

    Attributes:
        step: name of the step.
        out: location of the output; a string if it is a URL.
        status: ``done``; ``kept`` if nothing had changed; ``planned`` in a dry run; ``failed``; ``left`` if it did not
            run because of another failure.
        seconds: wall time.
        key: hash of everything that the output depends on.
        error: why the job failed or did not run.
        packed: the `report`, compressed by `compress` to save memory in runs of many jobs.
        why: why the job ran, or would run: what has changed.
        name: path of the output relative to the output folder.
    """

    step: str
    out: Path | str
    status: Status
    seconds: float
    key: str
    error: str | None = None
    packed: bytes | None = field(default=None, repr=False)
    why: str | None = None
    name: str = ""

    @property
    def report(self) -> dict[str, Any] | None:
        """The report of the command, ready for JSON."""
        return None if self.packed is None else json.loads(zlib.decompress(self.packed))

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, ready for JSON."""
        fields = {
            name: getattr(self, name) for name in ("step", "status", "seconds", "key", "report", "error", "why", "name")
        }
        return {**fields, "out": str(self.out)}


def compress(report: Mapping[str, Any] | None) -> bytes | None:
    """Compress a report to about a tenth of its size."""
    if report is None:
        return None
    return zlib.compress(to_json(report).encode(), level=1)


@dataclass(frozen=True, slots=True)
class PipelineReport:
    """What `run_pipeline` did.

    Attributes:
        recipe: path of the recipe.
        output: location of the output folder; a string if it is a URL.
        results: result of each job, in the order of the recipe.
        seconds: wall time.
        warnings: what is likely a mistake in the recipe, and the warnings of the steps that ran.
        orphans: names of outputs that former runs made and that the recipe no longer names.
        pruned: names of those that were removed.
        interrupted: whether Ctrl+C or SIGTERM ended the run.
    """

    recipe: Path
    output: Path | str
    results: tuple[StepResult, ...]
    seconds: float
    warnings: tuple[str, ...] = ()
    orphans: tuple[str, ...] = ()
    pruned: tuple[str, ...] = ()
    interrupted: bool = False

    @property
    def failed(self) -> int:
        """Number of jobs that failed or did not run because of a failure."""
        return sum(result.status in {"failed", "left"} for result in self.results)

    @property
    def totals(self) -> dict[str, int]:
        """Number of jobs by status, for those that occur."""
        counts = [result.status for result in self.results]
        return {status: counts.count(status) for status in dict.fromkeys(counts)}

    def name_of(self, result: StepResult) -> str:
        """Return the path of a result's output relative to the output folder."""
        return str(result.out).removeprefix(f"{self.output}/")

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, ready for JSON."""
        return {
            "recipe": str(self.recipe),
            "output": str(self.output),
            "results": [result.to_dict() for result in self.results],
            "seconds": self.seconds,
            "failed": self.failed,
            "totals": self.totals,
            "warnings": list(self.warnings),
            "orphans": list(self.orphans),
            "pruned": list(self.pruned),
            "interrupted": self.interrupted,
        }


class PipelineInterrupted(KeyboardInterrupt):
    """Ctrl+C or SIGTERM ended a run of a pipeline.

    Attributes:
        report: what was done until then.
    """

    def __init__(self, report: PipelineReport) -> None:
        super().__init__(report)
        self.report = report


def warnings_of(result: StepResult) -> list[str]:
    """Return the warnings of a step that ran."""
    if result.status not in {"done", "failed"} or result.packed is None:
        return []
    texts = (result.report or {}).get("warnings", [])
    return [f"{result.step}: {result.name}: {text}" for text in texts if isinstance(texts, list)]
