"""Read ``adapter_config.json``, with checked access to its fields."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from gguflora.adapters.peft.patterns import SECONDS, Matcher, ModulePatterns
from gguflora.adapters.wrong_folder import describe_wrong_folder
from gguflora.errors import AdapterError
from gguflora.files.small_files import CONFIG_BYTES, read_small_text

FILE_NAME: Final = "adapter_config.json"
MLX: Final = "MLX"
"""The ``peft_type`` used here for adapters of mlx-lm, whose configuration has none."""


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """The configuration of an adapter. All methods raise ``AdapterError`` if a field has the wrong type or range.

    Attributes:
        path: path of the file, for messages.
        peft_type: PEFT's name of the method, in upper case.
        fields: all fields of the file.
        matcher: matches its regular expressions.
    """

    path: Path
    peft_type: str
    fields: Mapping[str, Any]
    matcher: Matcher = field(default_factory=Matcher, repr=False, compare=False)
    _patterns: dict[str, ModulePatterns] = field(default_factory=dict, repr=False, compare=False)

    def number(self, name: str, default: float) -> float:
        """Return a number, or ``default`` if the field is missing."""
        return self._number(name, self.fields.get(name, default))

    def integer(self, name: str, default: int, minimum: int = -(1 << 63)) -> int:
        """Return a whole number of at least ``minimum``, or ``default`` if the field is missing."""
        value = self.fields.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value < 1 << 64:
            raise self.error(name, f"a whole number from {minimum}" if minimum >= 0 else "a whole number", value)
        return value

    def integer_or_none(self, name: str) -> int | None:
        """Return a whole number, or None if the field is missing or null."""
        return None if self.fields.get(name) is None else self.integer(name, 0)

    def flag(self, name: str) -> bool:
        """Return a boolean, False if the field is missing or null."""
        value = self.fields.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.error(name, "true or false", value)
        return bool(value)

    def for_module(self, name: str, pattern_name: str, module: str, default: float) -> float:
        """Return the number for a module: that of the first matching pattern, or else the field's (PEFT's rule)."""
        first = next(self._matching(pattern_name, module), None)
        return self.number(name, default) if first is None else first

    def _matching(self, pattern_name: str, module: str) -> Iterator[float]:
        """Yield the numbers of all patterns that match a module, in the order of the file."""
        patterns = self.fields.get(pattern_name) or {}
        if not isinstance(patterns, dict):
            raise self.error(pattern_name, "an object of module patterns and numbers", patterns)
        if pattern_name not in self._patterns:
            self._patterns[pattern_name] = ModulePatterns(patterns)
        with self.explained(pattern_name):
            found = list(self._patterns[pattern_name].matching(module, self.matcher))
        for pattern, value in found:
            yield self._number(f"{pattern_name}[{pattern!r:.80}]", value)

    @contextmanager
    def explained(self, name: str) -> Iterator[None]:
        """Turn what a regular expression raises into an error about a field."""
        try:
            yield
        except re.error as error:
            raise AdapterError(f"{self.path}: {name}: not a valid regular expression: {error}") from error
        except TimeoutError as error:
            raise AdapterError(
                f"{self.path}: {name}: its regular expressions take longer than {SECONDS:g} s; write the names of the "
                "modules in their place"
            ) from error

    def ranks(self, module: str) -> list[int]:
        """Return the ranks of all patterns that match a module, or ``r`` if none matches.

        PEFT sorts the patterns when it writes them, so the first need not be the one that applied in training.
        """
        ranks = list(self._matching("rank_pattern", module)) or [self.number("r", 8)]
        for rank in ranks:
            if rank != int(rank) or rank < 1:
                raise self.error("r", "a positive whole number", rank)
        return [int(rank) for rank in ranks]

    def rank(self, module: str, stored_rank: int) -> int:
        """Return the configured rank of a module: ``stored_rank``, that of its tensors, if it is one of `ranks`."""
        ranks = self.ranks(module)
        return stored_rank if stored_rank in ranks else ranks[0]

    def ambiguous_alphas(self, modules: Iterable[str]) -> list[str]:
        """Return the modules that several patterns match with different alphas; for the reason see `ranks`."""
        return [module for module in modules if len(set(self._matching("alpha_pattern", module))) > 1]

    def _number(self, name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
            raise self.error(name, "a finite number", value)
        return value

    def error(self, name: str, expected: str, found: object) -> AdapterError:
        """Return an error about a field."""
        return AdapterError(f"{self.path}: {name} is {found!r:.100}, expected {expected}")


def read_config(folder: Path) -> PeftConfig:
    """Read the configuration in a PEFT or mlx-lm directory.

    Raises:
        AdapterError: if it is missing, is not a JSON object, or does not name a method.
    """
    path = folder / FILE_NAME
    try:
        fields = json.loads(read_small_text(path, CONFIG_BYTES))
    except FileNotFoundError as error:
        found = describe_wrong_folder(folder) or "expected a directory written by PEFT's save_pretrained"
        raise AdapterError(f"{folder}: holds no {FILE_NAME}; {found}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(fields, dict):
        raise AdapterError(f"{path}: expected a JSON object, found {type(fields).__name__}")
    peft_type = MLX if _is_mlx(folder, fields) else fields.get("peft_type")
    if not isinstance(peft_type, str):
        raise AdapterError(f"{path}: peft_type is {peft_type!r}, expected the name of a PEFT method such as 'LORA'")
    return PeftConfig(path, peft_type.upper(), fields)


def _is_mlx(folder: Path, fields: Mapping[str, Any]) -> bool:
    """Whether a directory was written by mlx-lm, mlx-vlm or unsloth-mlx, which also writes a ``peft_type``."""
    names = {"lora_parameters", "fine_tune_type"} & fields.keys()
    if "peft_type" not in fields:
        return bool(names) or ({"rank", "alpha"} <= fields.keys() and _holds_mlx(folder))
    return _holds_mlx(folder) and not any(folder.glob("adapter_model.*"))


def _holds_mlx(folder: Path) -> bool:
    return any((folder / f"adapters.{suffix}").is_file() for suffix in ("safetensors", "npz"))
