"""Check numbers in a step's report against limits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from gguflora.files.strict_json import restored


class Bounds(NamedTuple):
    """Limits of a number; None is no limit."""

    min: float | None
    max: float | None


def failed_checks(report: Mapping[str, Any], checks: Mapping[str, Bounds]) -> list[str]:
    """Return a message for each check that a report fails.

    Args:
        report: report of a step, ready for JSON.
        checks: limits by path. A path such as ``errors.*`` or ``ranks.1`` names entries of the report; ``*`` matches
            every entry. The check fails if a path does not lead to a number.
    """
    failed = []
    for path, limits in checks.items():
        entries = list(_follow(restored(report), path.split("."), ""))
        numbers = [(name, value) for name, value in entries if isinstance(value, int | float)]
        if not numbers or len(numbers) < len(entries):
            failed.append(f"{path}: the report has no number there")
        failed += [text for name, value in numbers if (text := _describe_violation(name, value, limits))]
    return failed


def _follow(value: Any, path: list[str], name: str) -> Iterator[tuple[str, Any]]:  # noqa: ANN401  (JSON)
    if not path:
        yield name.removeprefix("."), value
        return
    # tensor names contain dots: try the longest run of parts that is a key first
    entries = dict(enumerate(value)) if isinstance(value, list | tuple) else value if isinstance(value, Mapping) else {}
    named = {str(key): item for key, item in entries.items()}
    if path[0] == "*":
        for key, item in named.items():
            yield from _follow(item, path[1:], f"{name}.{key}")
        return
    for length in range(len(path), 0, -1):
        key = ".".join(path[:length])
        if key in named:
            yield from _follow(named[key], path[length:], f"{name}.{key}")
            return


def _describe_violation(name: str, value: float, limits: Bounds) -> str | None:
    if math.isnan(value) or (limits.max is not None and value > limits.max):
        return f"{name} is {value:.6g}, allowed at most {limits.max}"
    if limits.min is not None and value < limits.min:
        return f"{name} is {value:.6g}, allowed at least {limits.min}"
    return None
