"""The format of recipes: a TOML file that is checked before anything runs. Errors name the line and the key."""

from __future__ import annotations

import difflib
import os
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, Field, ValidationError

from gguflora.errors import RecipeError
from gguflora.pipeline.steps import ACTIONS, AdapterUse, AnyStep, Limits, Name, Scalar, Step, Strict
from gguflora.pipeline.toml_lines import line_of
from gguflora.pipeline.variables import fill_variables

_TO_PLANE: Final = {0xDC00 + byte: 0xF0000 + byte for byte in range(0x80, 0x100)}
"""Bytes of names that are no UTF-8, which pydantic refuses, stand in a private plane while it checks the step."""

_FROM_PLANE: Final = {to: given for given, to in _TO_PLANE.items()}

STDIN: Final = "-"
"""The name of a recipe that is read from stdin; its paths are relative to the working directory."""
MAX_BYTES: Final = 1 << 20
"""Largest size of a recipe: the time of reading TOML grows with the square of the length of its keys."""


class Recipe(Strict):
    """A recipe.

    Attributes:
        name: name of the recipe in the records of its output folder; by default its path.
        output: folder of all outputs; it may be remote (``s3://bucket/folder``).
        vars: values to insert where the recipe has ``{name}``; ``--var`` replaces them.
        sources: locations and globs by name: paths relative to the recipe's folder, fsspec URLs, ``hf://org/name``.
        exclude: globs of files and folders that globs leave out.
        include_hidden: whether globs take files and folders whose names begin with a dot.
        steps: the steps to run.
    """

    name: Name | None = Field(
        default=None, description="Name in the records of the output folder, for --prune; by default the recipe's path."
    )
    output: str = Field(
        min_length=1, description="Folder of all outputs: a path relative to the recipe's folder, or a writable URL."
    )
    vars: dict[Name, Scalar | list[Scalar]] = Field(
        default={}, description="Values to insert where the recipe has {name}; --var NAME=VALUE replaces them."
    )
    sources: dict[Name, str | list[str]] = Field(
        default={},
        description="Locations or globs: paths relative to the recipe's folder, URLs, hf://org/name[@revision][/path].",
    )
    exclude: list[str] = Field(default=[], description="Globs of files and folders that globs leave out.")
    include_hidden: bool = Field(default=False, description="Whether globs take names that begin with a dot.")
    steps: list[AnyStep] = Field(min_length=1)


@dataclass(frozen=True, slots=True)
class RecipeFile:
    """A recipe and its file.

    Attributes:
        path: path of the file; ``-`` for stdin.
        text: text of the file.
        recipe: the parsed recipe.
    """

    path: Path
    text: str
    recipe: Recipe

    @property
    def root(self) -> Path:
        """The folder that paths are relative to."""
        return self.path.absolute().parent

    def error(self, location: Sequence[str | int], message: str) -> RecipeError:
        """Return an error about a key, with its line."""
        return _error(self.path, self.text, location, message)


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of recipes, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def read_recipe(path: Path, var: Mapping[str, str | int | float] | None = None) -> RecipeFile:
    """Read a recipe; from stdin if ``path`` is ``-``.

    Args:
        path: path of the TOML file.
        var: values of its variables, which take precedence over those of ``vars``.

    Raises:
        RecipeError: if it cannot be read, is not TOML, or is not a valid recipe.
    """
    try:
        content = _read(path)
        text = content.decode("utf-8-sig").replace("\r\n", "\n")
        table = tomllib.loads(text)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: cannot be read: it is not UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:  # also of numbers with thousands of digits, and deep lists
        raise RecipeError(f"{_shown(path)}: is not TOML: {error}") from error
    for keys in _with_nul(table):
        raise _error(path, text, keys, "has the character U+0000, which no path and no name can have")
    table = fill_variables(table, var or {}, lambda keys, message: _error(path, text, keys, message))
    try:
        recipe = Recipe.model_validate(table)
    except ValidationError as error:
        raise _first_error(path, text, table, error) from None
    file = RecipeFile(path, text, recipe)
    names = [step.name for step in recipe.steps]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise file.error(("steps", index, "name"), f"another step is named {name!r}, too")
    return file


def _read(path: Path) -> bytes:
    """Return the content of a recipe, which may be a FIFO.

    Raises:
        OSError: if it cannot be read.
        RecipeError: if it is larger than `MAX_BYTES`.
    """
    with nullcontext(sys.stdin.buffer) if os.fspath(path) == STDIN else path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise RecipeError(f"{_shown(path)}: has more than the {MAX_BYTES} bytes that a recipe may have")
    return content


def _with_nul(item: Any, keys: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:  # noqa: ANN401  (TOML)
    """Yield the keys that lead to texts with a NUL character."""
    for key, entry in item.items() if isinstance(item, dict) else enumerate(item):
        if isinstance(entry, dict | list):
            yield from _with_nul(entry, (*keys, key))
        if "\0" in f"{key}{entry if isinstance(entry, str) else ''}":
            yield (*keys, key)


def validate_step(file: RecipeFile, index: int, fields: dict[str, Any]) -> Step:
    """Validate a step whose templates have been filled in.

    Raises:
        RecipeError: if a value of the matrix has the wrong type.
    """
    model = type(file.recipe.steps[index])
    try:
        if "\\udc" not in ascii(fields):
            return model.model_validate(fields)
        step = model.model_validate(_translated(fields, _TO_PLANE))
        texts = step.model_dump(by_alias=True, exclude_unset=True, include=set(step.inputs) | {step.target})
        restored = _translated(texts, _FROM_PLANE)
        if "adapters" in restored:
            items = restored["adapters"]
            restored["adapters"] = [
                AdapterUse.model_construct(**item) if isinstance(item, dict) else item for item in items
            ]
        return step.model_copy(update=restored)
    except ValidationError as error:
        problem = error.errors()[0]
        keys = ("steps", index, *_location(problem, fields))
        raise file.error(keys, _describe(problem, type(file.recipe.steps[index]))) from None


def _translated(item: Any, table: Mapping[int, int]) -> Any:  # noqa: ANN401  (TOML)
    if isinstance(item, dict):
        return {key: _translated(entry, table) for key, entry in item.items()}
    if isinstance(item, list):
        return [_translated(entry, table) for entry in item]
    return item.translate(table) if isinstance(item, str) else item


def _first_error(path: Path, text: str, table: Mapping[str, Any], error: ValidationError) -> RecipeError:
    problems = error.errors()
    # pydantic reports every alternative of a union; an unknown key is the most helpful message
    problem = next((one for one in problems if one["type"] == "extra_forbidden"), problems[0])
    return _error(path, text, _location(problem, table), _describe(problem, _model_at(problem)))


def _location(problem: Any, table: Mapping[str, Any]) -> list[str | int]:  # noqa: ANN401  (pydantic's ErrorDetails)
    """Return the keys that lead to a problem, without pydantic's names of union alternatives."""
    keys: list[str | int] = []
    place: Any = table
    parts = problem["loc"]
    for number, part in enumerate(parts):
        is_index = isinstance(part, int) and isinstance(place, list) and part < len(place)
        if is_index or (isinstance(place, dict) and part in place):
            keys.append(part)
            place = place[part]
        elif problem["type"] == "missing" and number == len(parts) - 1:
            keys.append(part)
    return [*keys, "action"] if problem["type"].startswith("union_tag") else keys


def _model_at(problem: Any) -> type[BaseModel] | None:  # noqa: ANN401  (pydantic's ErrorDetails)
    """Return the model of the table that has the key."""
    parts = problem["loc"]
    if len(parts) == 1:
        return Recipe
    if parts[0] == "steps" and len(parts) == 4:
        return ACTIONS.get(str(parts[2]))
    return AdapterUse if "AdapterUse" in parts else Limits if "checks" in parts else None


def _describe(problem: Any, model: type[BaseModel] | None) -> str:  # noqa: ANN401  (pydantic's ErrorDetails)
    if problem["type"] == "extra_forbidden":
        return f"unknown key{_suggestion(str(problem['loc'][-1]), model)}"
    if problem["type"].startswith("union_tag"):
        return f"is {problem.get('ctx', {}).get('tag', 'missing')!r}, expected one of {', '.join(sorted(ACTIONS))}"
    given = "" if problem["type"] in {"missing", "value_error"} else f", found {problem['input']!r:.80}"
    said = problem["msg"].removeprefix("Value error, ")
    return f"{said[:1].lower()}{said[1:]}{given}"


def _suggestion(key: str, model: type[BaseModel] | None) -> str:
    known = [field.alias or name for name, field in model.model_fields.items()] if model else []
    close = difflib.get_close_matches(key, known, 1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}" if known else ""


def _shown(path: Path) -> str:
    return "<stdin>" if os.fspath(path) == STDIN else str(path)


def _error(path: Path, text: str, location: Sequence[str | int], message: str) -> RecipeError:
    key = ".".join(f"{part + 1}" if isinstance(part, int) else str(part) for part in location)
    return RecipeError(f"{_shown(path)}:{line_of(text, location)}: {key or 'recipe'}: {message}")
