"""What a pipeline has done."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
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
        error: why it failed, or what it waited for.
        packed: the `report`, of which a run of many steps has many: from `compress`.
    """

    step: str
    out: Path | str
    status: Status
    seconds: float
    key: str
    error: str | None = None
    packed: bytes | None = field(default=None, repr=False)

    @property
    def report(self) -> dict[str, Any] | None:
        """The command's, ready for JSON."""
        return None if self.packed is None else json.loads(zlib.decompress(self.packed))

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        fields = {name: getattr(self, name) for name in ("step", "status", "seconds", "key", "report", "error")}
        return {**fields, "out": str(self.out)}


def compress(report: Mapping[str, Any] | None) -> bytes | None:
    """A report in about a tenth of its size."""
    return None if report is None else zlib.compress(json.dumps(report).encode(), level=1)


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
        return {
            "recipe": str(self.recipe),
            "output": str(self.output),
            "results": [result.to_dict() for result in self.results],
            "seconds": self.seconds,
            "failed": self.failed,
        }
