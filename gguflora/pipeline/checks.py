"""Limits of numbers in a step's report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from gguflora.pipeline.recipe import Limits


def failed_checks(report: Mapping[str, Any], checks: Mapping[str, Limits]) -> list[str]:
    """What a report does not keep to, a sentence each.

    A path such as ``errors.*`` or ``ranks.1`` leads through the report; ``*`` stands for every entry. A path that leads
    to no number is a failed check, too.
    """
    failed = []
    for path, limits in checks.items():
        found = list(_follow(report, path.split("."), ""))
        numbers = [(place, value) for place, value in found if isinstance(value, int | float)]
        if not numbers or len(numbers) < len(found):
            failed.append(f"{path}: the report has no number there")
        failed += [text for place, value in numbers if (text := _beyond(place, value, limits))]
    return failed


def _follow(value: Any, path: list[str], place: str) -> Iterator[tuple[str, Any]]:  # noqa: ANN401  (JSON)
    if not path:
        yield place.removeprefix("."), value
        return
    # names of tensors hold dots: the longest run of parts that is a key is taken for one
    entries = dict(enumerate(value)) if isinstance(value, list | tuple) else value if isinstance(value, Mapping) else {}
    named = {str(key): item for key, item in entries.items()}
    if path[0] == "*":
        for key, item in named.items():
            yield from _follow(item, path[1:], f"{place}.{key}")
        return
    for length in range(len(path), 0, -1):
        key = ".".join(path[:length])
        if key in named:
            yield from _follow(named[key], path[length:], f"{place}.{key}")
            return


def _beyond(place: str, value: float, limits: Limits) -> str | None:
    if not math.isfinite(value) or (limits.max is not None and value > limits.max):
        return f"{place} is {value:.6g}, allowed at most {limits.max}"
    if limits.min is not None and value < limits.min:
        return f"{place} is {value:.6g}, allowed at least {limits.min}"
    return None
