"""What a pipeline has done."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Status = Literal["done", "kept", "planned", "failed", "left"]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What became of one job: a step for one combination of its matrix.

    Attributes:
        step: name of the step.
        out: its output; a string where it is a URL.
        status: ``done``; ``kept`` as nothing had changed; ``planned`` in a dry run; ``failed``; ``left`` undone after a
            failure.
        seconds: wall time.
        key: hash of what the output depends on.
        report: of the command, ready for JSON.
        error: why it failed, or what it waited for.
    """

    step: str
    out: Path | str
    status: Status
    seconds: float
    key: str
    report: dict[str, Any] | None
    error: str | None


@dataclass(frozen=True, slots=True)
class PipelineReport:
    """What `run_pipeline` did.

    Attributes:
        recipe: its file.
        output: folder of the outputs; a string where it is a URL.
        results: one for each job, in the order of the recipe.
        seconds: wall time.
    """

    recipe: Path
    output: Path | str
    results: tuple[StepResult, ...]
    seconds: float

    @property
    def failed(self) -> int:
        """Number of jobs that failed or were left undone."""
        return sum(result.status in {"failed", "left"} for result in self.results)

    def name_of(self, result: StepResult) -> str:
        """The name of a result's output below the folder."""
        return str(result.out).removeprefix(f"{self.output}/")

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        results = [{**asdict(result), "out": str(result.out)} for result in self.results]
        return {
            "recipe": str(self.recipe),
            "output": str(self.output),
            "results": results,
            "seconds": self.seconds,
            "failed": self.failed,
        }
