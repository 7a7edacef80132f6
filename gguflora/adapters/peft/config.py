"""``adapter_config.json`` of PEFT, checked as far as gguflora relies on it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gguflora.errors import AdapterError

FILE_NAME: Final = "adapter_config.json"
MLX: Final = "MLX"
"""Stands for a ``peft_type`` in adapters of mlx-lm, which name none."""


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """The parsed file.

    Attributes:
        path: of the file, for messages.
        peft_type: in upper case, as PEFT spells it.
        fields: everything in the file.
    """

    path: Path
    peft_type: str
    fields: Mapping[str, Any]

    def number(self, name: str, default: float) -> float:
        """A number, or ``default`` where the field is missing."""
        return self._number(name, self.fields.get(name, default))

    def integer(self, name: str, default: int, least: int = -(1 << 63)) -> int:
        """A whole number of at least ``least``, or ``default`` where the field is missing."""
        value = self.fields.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 64:
            raise self.error(name, f"a whole number from {least}" if least >= 0 else "a whole number", value)
        return value

    def integer_or_none(self, name: str) -> int | None:
        """A whole number, or None where the field is missing or null."""
        return None if self.fields.get(name) is None else self.integer(name, 0)

    def flag(self, name: str) -> bool:
        """A boolean, False where the field is missing or null."""
        value = self.fields.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.error(name, "true or false", value)
        return bool(value)

    def for_module(self, name: str, pattern_name: str, module: str, default: float) -> float:
        """The number that holds for a module: the first matching pattern's, else the field's (PEFT's rule)."""
        first = next(self._matching(pattern_name, module), None)
        return self.number(name, default) if first is None else first

    def _matching(self, pattern_name: str, module: str) -> Iterator[float]:
        """The numbers of all patterns that match a module, in the order of the file."""
        patterns = self.fields.get(pattern_name) or {}
        if not isinstance(patterns, dict):
            raise self.error(pattern_name, "an object of module patterns and numbers", patterns)
        for pattern, value in patterns.items():
            try:
                matches = re.match(rf"(.*\.)?({pattern})$", module)
            except re.error as error:
                raise AdapterError(
                    f"{self.path}: {pattern_name}: {pattern!r} is no regular expression: {error}"
                ) from error
            if matches:
                yield self._number(f"{pattern_name}[{pattern!r}]", value)

    def ranks(self, module: str) -> list[int]:
        """The rank ``r`` that holds for a module, or those of all patterns that match it.

        PEFT sorts the patterns when it writes them, so the first of them need not be the one that held in training.
        """
        ranks = list(self._matching("rank_pattern", module)) or [self.number("r", 8)]
        for rank in ranks:
            if rank != int(rank) or rank < 1:
                raise self.error("r", "a positive whole number", rank)
        return [int(rank) for rank in ranks]

    def rank(self, module: str, found: int) -> int:
        """The rank that holds for a module: ``found`` in its tensors if a pattern says so, else the first one's."""
        ranks = self.ranks(module)
        return found if found in ranks else ranks[0]

    def unclear_alphas(self, modules: Iterable[str]) -> list[str]:
        """Those of some modules that several patterns match with different alphas: see `ranks`."""
        return [module for module in modules if len(set(self._matching("alpha_pattern", module))) > 1]

    def _number(self, name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
            raise self.error(name, "a finite number", value)
        return value

    def error(self, name: str, expected: str, found: object) -> AdapterError:
        """An error about one field."""
        return AdapterError(f"{self.path}: {name} is {found!r:.100}, expected {expected}")


def read_config(folder: Path) -> PeftConfig:
    """Read a PEFT directory's configuration.

    Raises:
        AdapterError: if it is missing, no JSON object, or names no PEFT method.
    """
    path = folder / FILE_NAME
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterError(
            f"{folder}: holds no {FILE_NAME}; expected a directory written by PEFT's save_pretrained"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(fields, dict):
        raise AdapterError(f"{path}: expected a JSON object, found {type(fields).__name__}")
    peft_type = fields.get("peft_type", MLX if {"lora_parameters", "fine_tune_type"} & fields.keys() else None)
    if not isinstance(peft_type, str):
        raise AdapterError(f"{path}: peft_type is {peft_type!r}, expected the name of a PEFT method such as 'LORA'")
    return PeftConfig(path, peft_type.upper(), fields)
