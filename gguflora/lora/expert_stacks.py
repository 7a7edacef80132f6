"""The experts of a Hugging Face checkpoint as the stacks that they are in memory, and that PEFT adapts.

Most checkpoints hold each expert's gate, up and down projection as a weight of its own. transformers 5 stacks them when
it loads a model: ``experts.gate_up_proj`` with the rows of gate and up projection, and ``experts.down_proj``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from gguflora.lora.model_difference import Difference
from gguflora.quants.arrays import Float32Array

_EXPERT: Final = re.compile(r"(?P<owner>.+\.experts)\.(?P<expert>\d+)\.(?P<part>gate|up|down)_proj\.weight")
_STACKS: Final = re.compile(r"(?P<owner>.+)\.(?P<part>input|output)_linear\.weight\.(?P<expert>\d+)")
"""Granite's stacks of experts."""
_PARAMETERS: Final = {"input": "gate_up_proj", "output": "down_proj"}


def stack_experts(weights: Sequence[Difference]) -> list[Difference]:
    """Return the differences with those of experts under the names of stacks; gate and up projections are joined."""
    by_name = {item.name: item for item in weights}
    found = (_stacked(item, by_name) for item in weights)
    return [item for item in found if item is not None]


def _stacked(item: Difference, by_name: Mapping[str, Difference]) -> Difference | None:
    """Return one difference of the stack, or None if it is part of another one."""
    known = _STACKS.fullmatch(item.name)
    if known:
        name = f"{known['owner']}.experts.{_PARAMETERS[known['part']]}.{known['expert']}"
        return replace(item, name=name, problem=None)
    match = _EXPERT.fullmatch(item.name)
    if match is None:
        return item
    owner, expert = match["owner"], match["expert"]
    gate, up = (by_name.get(f"{owner}.{expert}.{part}_proj.weight") for part in ("gate", "up"))
    if gate is None or up is None or gate.n_columns != up.n_columns:
        return item
    if match["part"] == "down":
        return replace(item, name=f"{owner}.down_proj.{expert}")
    return _join(f"{owner}.gate_up_proj.{expert}", gate, up) if match["part"] == "gate" else None


def _join(name: str, first: Difference, second: Difference) -> Difference:
    """Return one difference with the rows of two."""

    def rows(start: int, stop: int) -> tuple[Float32Array, Float32Array]:
        size = first.n_rows
        parts = []
        if start < size:
            parts.append(first.rows(start, min(stop, size)))
        if stop > size:
            parts.append(second.rows(max(start - size, 0), stop - size))
        tuned, base = (np.concatenate(sides) for sides in zip(*parts, strict=True))
        return tuned, base

    return replace(first, name=name, n_rows=first.n_rows + second.n_rows, rows=rows)
