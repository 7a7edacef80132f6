"""Say why a job must run: what has changed since its output was made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gguflora.files import remote
from gguflora.pipeline.job import PipelineJob


def describe_changes(old: Mapping[str, Any], new: Mapping[str, Any], job: PipelineJob) -> str:
    """Return what differs between the origins of two outputs (see `gguflora.pipeline.state.Keys`).

    Args:
        old: what the output was made from.
        new: what it would be made from now.
        job: the job that would make it.
    """
    return ", ".join(_changes(old, new, job)) or "its record is of another kind"


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], job: PipelineJob) -> Iterator[str]:
    if not old:
        return
    if old.get("version") != new["version"]:
        yield f"gguflora is {new['version']}, was {old.get('version')}"
    if old.get("action") != new["action"] or old.get("target") != new["target"]:
        yield f"action is {new['action']}, was {old.get('action')}"
    yield from _inputs(old, new, job)
    before, now = dict(_flat(old.get("arguments"), "")), dict(_flat(new["arguments"], ""))
    for name in sorted({**before, **now}):
        if before.get(name) != now.get(name):
            yield f"option {name} is {_shown(now, name)}, was {_shown(before, name)}"
    if old.get("name") != new["name"]:
        yield f"its name is {new['name']}, was {old.get('name')}"


def _inputs(old: Mapping[str, Any], new: Mapping[str, Any], job: PipelineJob) -> Iterator[str]:
    contents, names = old.get("inputs", []), old.get("names", [])
    is_list = isinstance(contents, list) and isinstance(names, list)
    if not is_list or len(contents) != len(new["inputs"]) or len(names) != len(contents):
        yield f"{len(new['inputs'])} inputs, were {len(contents) if is_list else 'unknown'}"
        return
    for number, location in enumerate(job.inputs):
        shown = remote.redacted(location)
        if names[number] != new["names"][number]:
            yield f"input {shown} was {names[number]}"
        elif contents[number] != new["inputs"][number]:
            yield f"input {shown} has changed"


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:  # noqa: ANN401  (JSON)
    """Yield the values of nested tables and lists with the way to each; adapters are pairs of a path and a scale."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list):
        is_pair = name.startswith("adapters.") and len(value) == 2
        for number, item in enumerate(value):
            part = ("path", "scale")[number] if is_pair else number + 1
            yield from _flat(item, f"{name}.{part}")
    else:
        yield name, value


def _shown(values: Mapping[str, Any], name: str) -> str:
    return f"{values[name]!r:.80}" if name in values else "not given"
