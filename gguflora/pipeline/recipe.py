"""The format of recipes: a TOML file that is checked before anything runs. Errors name the line and the key."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gguflora.errors import RecipeError
from gguflora.files.remote import Kind, input_kinds
from gguflora.pipeline.commands import commands

Template = Annotated[str, Field(pattern=r"^\{\w+\}$")]
"""A variable of the matrix in place of a number."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z][\w-]*$")]
Whole = int | Template
Number = float | Template
OutType = Literal["auto", "f32", "f16", "bf16", "q8_0"] | Template
Scalar = str | int | float


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Limits(_Strict):
    """Limits of a number in a step's report."""

    min: float | None = None
    max: float | None = None


class AdapterUse(_Strict):
    """An adapter and its scale (or weight)."""

    path: str
    scale: Number = 1.0


class Step(_Strict):
    """The keys that all steps have.

    Attributes:
        name: name of the step.
        for_each: the matrix: for each variable a list of values, or ``sources.NAME`` or ``steps.NAME``.
        out: path of each output in the output folder; ``{variable}`` is replaced by a value, or by a file's stem.
        checks: limits of numbers in the report by path, such as ``errors.*``; see `gguflora.pipeline.checks`.
        memory: peak memory of one job in MB.
    """

    name: Name
    for_each: dict[Name, str | list[Scalar]] = Field(default={}, alias="for")
    out: str
    checks: dict[str, Limits] = {}
    memory: int = Field(default=1024, ge=1)

    @property
    def inputs(self) -> Mapping[str, Kind]:
        """The keys that name inputs, and the kind of each, which says what to fetch of a remote folder."""
        return input_kinds(commands()[self.model_dump(include={"action"})["action"]])


class Convert(Step):
    """`gguflora.convert`."""

    action: Literal["convert"]
    adapter: str
    base: str
    outtype: OutType = "auto"
    rank: Whole | None = None
    energy: Number | None = None
    scale: Number = 1.0
    text_only: bool = False
    trust_names: bool = False


class Merge(Step):
    """`gguflora.merge`.

    Attributes:
        split: number of parts of the merge on a cluster, each done by one worker; the result is the same.
    """

    action: Literal["merge"]
    base: str
    adapters: list[str | AdapterUse] = Field(min_length=1)
    rounding: Literal["adaptive", "nearest"] | Template = "adaptive"
    seed: Whole = 0
    base_f16: str | None = None
    outtype: str = "keep"
    type: dict[str, str] | None = None
    imatrix: str | None = None
    text_only: bool = False
    trust_names: bool = False
    split: int | None = Field(default=None, ge=2)
    threads: int | None = Field(default=None, ge=1)


class Quantize(Step):
    """`gguflora.quantize`."""

    action: Literal["quantize"]
    base: str
    preset: str
    imatrix: str | None = None
    tensor_types: dict[str, str] | None = None
    pure: bool = False
    output_tensor_type: str | None = None
    token_embedding_type: str | None = None
    threads: int | None = Field(default=None, ge=1)


class Combine(Step):
    """`gguflora.combine`."""

    action: Literal["combine"]
    adapters: list[str | AdapterUse] = Field(min_length=1)
    method: str = "linear"
    rank: Whole | None = None
    density: Number | None = None
    sign: Literal["total", "frequency"] | Template = "total"
    seed: Whole = 0
    base: str | None = None
    outtype: OutType = "auto"


class Resize(Step):
    """`gguflora.resize`."""

    action: Literal["resize"]
    adapter: str
    rank: Whole | None = None
    energy: Number | None = None
    base: str | None = None
    outtype: OutType = "auto"


class Extract(Step):
    """`gguflora.extract`."""

    action: Literal["extract"]
    finetuned: str
    base: str
    rank: Whole
    energy: Number | None = None
    iterations: Whole = 2
    seed: Whole = 0
    outtype: OutType = "auto"
    threads: int | None = Field(default=None, ge=1)


class Export(Step):
    """`gguflora.export`."""

    action: Literal["export"]
    lora: str
    base: str
    base_model_name: str | None = None


class Inspect(Step):
    """`gguflora.inspect`; its report is the output, as JSON."""

    action: Literal["inspect"]
    adapter: str
    base: str | None = None
    ranks: bool = False
    text_only: bool = False
    trust_names: bool = False


class Compare(Step):
    """`gguflora.compare`; its report is the output, as JSON."""

    action: Literal["compare"]
    base: str
    merged: str
    adapters: list[str | AdapterUse] = Field(min_length=1)
    text: str | None = None
    naive: bool = False
    n_ctx: Whole = 512
    threads: int | None = Field(default=None, ge=1)


class Train(Step):
    """`gguflora.train`; ``out`` names the PEFT directory, and a LoRA's GGUF file lies beside it."""

    action: Literal["train"]
    base: str
    data: str | list[str]
    valid: str | list[str] | None = None
    valid_split: Number = 0.05
    rank: Whole = 16
    alpha: Number | None = None
    dropout: Number = 0.0
    rslora: bool = False
    targets: str | list[str] | None = None
    layers: Whole | None = None
    epochs: Number = 3.0
    steps: Whole | None = None
    hours: float | None = None
    batch: Whole = 8
    accumulate: Whole | Literal["auto"] = "auto"
    length: Whole | Literal["auto"] = "auto"
    lr: Number | None = None
    schedule: Literal["cosine", "linear", "constant"] | Template = "cosine"
    warmup: Number = 0.03
    weight_decay: Number = 0.01
    max_grad_norm: Number = 1.0
    loss: Literal["answers", "all"] | Template = "answers"
    eval_every: Whole | None = None
    patience: Whole = 3
    method: Literal["lora", "dora", "prompt"] | Template = "lora"
    init: Literal["default", "olora", "pissa"] | Template = "default"
    lora_plus_ratio: Number = 1.0
    from_adapter: str | None = None
    precision: Literal["auto", "f32", "bf16"] | Template = "auto"
    chat_template: str | None = None
    seed: Whole = 0
    check_merge: bool = False
    threads: int | None = Field(default=None, ge=1)


AnyStep = Annotated[
    Convert | Merge | Quantize | Combine | Resize | Extract | Export | Inspect | Compare | Train,
    Field(discriminator="action"),
]


class Recipe(_Strict):
    """A recipe.

    Attributes:
        output: folder of all outputs; it may be remote (``s3://bucket/folder``).
        sources: locations and globs by name: paths relative to the recipe's folder, fsspec URLs, ``hf://org/name``.
        steps: the steps to run.
    """

    output: str = Field(description="Folder of all outputs: a path relative to the recipe's folder, or a writable URL.")
    sources: dict[Name, str | list[str]] = Field(
        default={},
        description="Locations or globs: paths relative to the recipe's folder, URLs, hf://org/name[@revision][/path].",
    )
    steps: list[AnyStep] = Field(min_length=1)


@dataclass(frozen=True, slots=True)
class RecipeFile:
    """A recipe and its file.

    Attributes:
        path: path of the file.
        text: text of the file.
        recipe: the parsed recipe.
    """

    path: Path
    text: str
    recipe: Recipe

    def error(self, location: Sequence[str | int], message: str) -> RecipeError:
        """Return an error about a key, with its line."""
        return _error(self.path, self.text, location, message)


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of recipes, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def read_recipe(path: Path) -> RecipeFile:
    """Read a recipe.

    Raises:
        RecipeError: if it cannot be read, is not TOML, or is not a valid recipe.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path}: is not TOML: {error}") from error
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise _first_error(path, text, error) from None
    file = RecipeFile(path, text, recipe)
    names = [step.name for step in recipe.steps]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise file.error(("steps", index, "name"), f"another step is named {name!r}, too")
    return file


def validate_step(file: RecipeFile, index: int, fields: dict[str, Any]) -> Step:
    """Validate a step whose templates have been filled in.

    Raises:
        RecipeError: if a value of the matrix has the wrong type.
    """
    try:
        return type(file.recipe.steps[index]).model_validate(fields)
    except ValidationError as error:
        problem = error.errors()[0]
        raise file.error(("steps", index, *_location(problem)), _describe(problem)) from None


def _first_error(path: Path, text: str, error: ValidationError) -> RecipeError:
    problems = error.errors()
    # pydantic reports every alternative of a union; an unknown key is the most helpful message
    problem = next((one for one in problems if one["type"] == "extra_forbidden"), problems[0])
    return _error(path, text, _location(problem), _describe(problem))


def _location(problem: Any) -> list[str | int]:  # noqa: ANN401  (pydantic's ErrorDetails)
    """Return the keys that lead to a problem, without pydantic's names of union alternatives."""
    keys = [
        part for part in problem["loc"] if part not in _ALTERNATIVES and not str(part).startswith(("list[", "literal["))
    ]
    return [*keys, "action"] if problem["type"].startswith("union_tag") else keys


def _describe(problem: Any) -> str:  # noqa: ANN401  (pydantic's ErrorDetails)
    if problem["type"] == "extra_forbidden":
        return "unknown key"
    if problem["type"].startswith("union_tag"):
        return f"is {problem.get('ctx', {}).get('tag', 'missing')!r}, expected one of {', '.join(sorted(_ACTIONS))}"
    given = "" if problem["type"] == "missing" else f", found {problem['input']!r:.80}"
    return f"{problem['msg'][:1].lower()}{problem['msg'][1:]}{given}"


_ACTIONS: Final = {
    "convert", "merge", "quantize", "combine", "resize", "extract", "export", "inspect", "compare", "train",
}  # fmt: skip
_ALTERNATIVES: Final = {*_ACTIONS, "str", "int", "float", "constrained-str", "AdapterUse"}


def _error(path: Path, text: str, location: Sequence[str | int], message: str) -> RecipeError:
    key = ".".join(f"{part + 1}" if isinstance(part, int) else str(part) for part in location)
    return RecipeError(f"{path}:{line_of(text, location)}: {key or 'recipe'}: {message}")


def line_of(text: str, location: Sequence[str | int]) -> int:
    """Return the line (from 1) of a key, or of the table that it belongs to."""
    lines, start, end = text.splitlines(), 0, None
    keys = [str(part) for part in location if not isinstance(part, int)]
    if len(location) > 1 and location[0] == "steps" and isinstance(location[1], int):
        heads = [number for number, line in enumerate(lines) if re.match(r"\s*\[\[\s*steps\s*\]\]", line)]
        if location[1] < len(heads):
            start = heads[location[1]]
            end = heads[location[1] + 1] if location[1] + 1 < len(heads) else None
        keys = keys[1:]
    elif keys[:1] == ["sources"]:
        start = next((number for number, line in enumerate(lines) if re.match(r"\s*\[\s*sources", line)), 0)
        keys = keys[1:]
    for number, line in enumerate(lines[start:end], start):
        if keys and re.match(rf"\s*(?:\[steps\.)?[\"']?{re.escape(keys[0])}[\"']?\s*(?:=|\.|\])", line):
            return number + 1
    return start + 1
