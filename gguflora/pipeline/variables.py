"""Variables of a recipe: ``vars`` and ``--var`` in braces, ``~`` and ``$NAME`` in locations."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from gguflora.errors import GgufloraError
from gguflora.files.remote import input_kinds
from gguflora.pipeline.commands import commands

Problem = Callable[[tuple[str | int, ...], str], GgufloraError]
"""Makes an error about a key of the recipe."""

BRACES: Final = re.compile(r"\{(\w*(?:\.parent[1-9]?)?)\}")
"""A variable in a text; of a matrix, also the folder of a location: ``{adapter.parent}``."""

_DOLLAR: Final = re.compile(r"\$(?:(\$)|(\w+)|\{(\w+)\})")


def fill_variables(content: dict[str, Any], given: Mapping[str, str | int | float], problem: Problem) -> dict[str, Any]:
    """Return a recipe whose locations are expanded, and in which ``vars`` have taken the place of their names.

    Args:
        content: the recipe, as TOML has it.
        given: values that take precedence over those of ``vars``.
        problem: makes an error about a key.

    Raises:
        RecipeError: for unknown variables, and values that do not fit.
    """
    declared = content.get("vars", {})
    if not isinstance(declared, dict):
        return content  # the model says what is wrong
    used = set(_names_used(content))
    for name in given:
        if name not in declared and name not in used:
            known = ", ".join(declared) or "none"
            raise problem((), f"--var {name}: the recipe does not use it; its variables: {known}")
    values = {name: _expanded(value, ("vars", name), problem) for name, value in declared.items()}
    for name, value in given.items():
        values[name] = _as_declared(name, value, declared.get(name, ""), problem)
    filled = {key: value for key, value in content.items() if key not in {"steps", "vars"}}
    for key in {"output", "sources", "exclude"} & set(filled):
        filled[key] = _fill(_expanded(filled[key], (key,), problem), values, (key,), problem, is_complete=True)
    if "vars" in content:
        filled["vars"] = declared
    if "steps" in content:
        steps = content["steps"]
        filled["steps"] = (
            [_filled_step(step, values, ("steps", index), problem) for index, step in enumerate(steps)]
            if isinstance(steps, list)
            else steps
        )
    return filled


def _filled_step(step: Any, values: Mapping[str, Any], keys: tuple[str | int, ...], problem: Problem) -> Any:  # noqa: ANN401  (TOML)
    if not isinstance(step, dict):
        return step
    action, matrix = step.get("action"), step.get("for", {})
    own = set(matrix) if isinstance(matrix, dict) else set()
    if both := sorted(own & set(values)):
        raise problem((*keys, "for", both[0]), f"{both[0]!r} is also one of the recipe's variables; rename one of them")
    is_known = isinstance(action, str) and action in commands()
    places = {"out", "patch", "for", *(input_kinds(commands()[str(action)]) if is_known else ())}
    filled = {}
    for name, item in step.items():
        if name in {"out", "patch"} and isinstance(item, str) and item.startswith("~"):
            raise problem((*keys, name), f"{item!r} is not in the output folder; write ./~ for a name that begins so")
        expanded = _expanded(item, (*keys, name), problem) if name in places else item
        filled[name] = _fill(expanded, values, (*keys, name), problem)
    if isinstance(matrix, dict):
        for name, item in filled.get("for", {}).items():
            if isinstance(item, str) and item.startswith("vars.") and item[5:] in values:
                value = values[item[5:]]
                filled["for"][name] = value if isinstance(value, list) else [value]
    return filled


def _names_used(item: Any) -> Iterator[str]:  # noqa: ANN401  (TOML)
    if isinstance(item, str):
        yield from [item[5:]] if item.startswith("vars.") else BRACES.findall(item)
    elif isinstance(item, list | dict):
        for entry in item.values() if isinstance(item, dict) else item:
            yield from _names_used(entry)


def _as_declared(name: str, value: str | float, declared: Any, problem: Problem) -> Any:  # noqa: ANN401  (TOML)
    """Return the value of ``--var`` in the type that the recipe's value has."""
    if not isinstance(value, str) or isinstance(declared, str):
        return os.path.expanduser(value) if isinstance(value, str) else value  # noqa: PTH111  (may be a URL)
    try:
        found = tomllib.loads(f"value = {value}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        found = None
    if isinstance(declared, float) and isinstance(found, int):
        return float(found)
    if type(found) is not type(declared):
        kind = {list: "a list such as [1, 2]", int: "a whole number", float: "a number", bool: "true or false"}
        raise problem(("vars", name), f"--var {name}={value}: expected {kind.get(type(declared), 'a text')}")
    return found


def _fill(
    item: Any,  # noqa: ANN401  (TOML)
    values: Mapping[str, Any],
    keys: tuple[str | int, ...],
    problem: Problem,
    *,
    is_complete: bool = False,
) -> Any:  # noqa: ANN401
    """Replace ``{name}`` in all texts; if ``is_complete``, other names than the recipe's variables are mistakes."""
    if isinstance(item, list | dict):
        entries = item.items() if isinstance(item, dict) else enumerate(item)
        filled = {key: _fill(part, values, (*keys, key), problem, is_complete=is_complete) for key, part in entries}
        return filled if isinstance(item, dict) else list(filled.values())
    if not isinstance(item, str):
        return item
    whole = BRACES.fullmatch(item)
    if whole and whole[1] in values:
        return values[whole[1]]
    unknown = [name for name in BRACES.findall(item) if name not in values]
    if is_complete and unknown:
        known = ", ".join(values) or "none"
        raise problem(keys, f"{item!r} uses {{{unknown[0]}}}; the recipe's variables: {known}; give it with --var")
    return BRACES.sub(lambda found: str(values[found[1]]) if found[1] in values else found[0], item)


def _expanded(item: Any, keys: tuple[str | int, ...], problem: Problem) -> Any:  # noqa: ANN401  (TOML)
    """Expand ``~`` and ``$NAME`` in all texts, as a shell does; ``$$`` stands for a dollar sign."""
    if isinstance(item, list):
        return [_expanded(entry, (*keys, index), problem) for index, entry in enumerate(item)]
    if isinstance(item, dict):
        return {key: _expanded(entry, (*keys, key), problem) for key, entry in item.items()}
    if not isinstance(item, str):
        return item

    def value_of(found: re.Match[str]) -> str:
        if found[1]:
            return "$"
        name = found[2] or found[3]
        if name not in os.environ:
            raise problem(keys, f"{item!r}: the environment has no {name}; write $$ for a dollar sign")
        return os.environ[name]

    text = item
    if text.startswith("~"):
        text = os.path.expanduser(text)  # noqa: PTH111  (may be a pattern)
        if text.startswith("~"):
            raise problem(keys, f"{item!r}: there is no such home folder; write ./~ for a name that begins so")
        rest = item.partition("/")[2]
        return text.removesuffix(rest) + _DOLLAR.sub(value_of, rest)
    return _DOLLAR.sub(value_of, text)
