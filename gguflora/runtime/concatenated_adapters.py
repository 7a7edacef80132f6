"""Several adapters in one: factors side by side, scales folded in. One product instead of many, the same sum.

``scale_1 * b_1 @ a_1 + scale_2 * b_2 @ a_2 = [scale_1 * b_1, scale_2 * b_2] @ [a_1; a_2]``
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from gguflora.errors import GgufloraError, HotSwapError
from gguflora.files.checksum import sha256_of
from gguflora.lora.concatenate import concatenate, memory_file
from gguflora.runtime.bindings import (
    Pointer,
    free_lora,
    load_lora,
    set_loras,
)

SEPARATE: Final = 4
"""So many adapters are applied side by side, which takes no time; more as one.

tools/benchmarks/fusing.py on a model of 0.1 B weights: 8 side by side decode at half the rate of one fused of them, 16
at a third. Fusing takes as long as some 40 tokens, whatever the number, when a set is first used.
"""

FIXED_GRAPH: Final = frozenset(
    {
        "bailingmoe3", "deepseek4", "dflash", "glm5-next", "hrm_text", "hy_v4", "kimi-k3", "kimi-linear", "minimax-01",
        "minimax-m3", "nanbeige", "qwen35", "qwen35moe", "qwen3next", "qwen4exp",
    }
)  # fmt: skip
"""Architectures for whose adapters llama.cpp makes no room in its graph: it would abort on a few (`graph_max_nodes` in
``llama-context.cpp``). All others get six nodes for each pair of factors, which is what a pair takes."""

_KEPT: Final = 4
"""Fused adapters stay loaded for so many sets, those used last."""

Key: TypeAlias = tuple[tuple[str, float], ...]
"""SHA-256 and scale of each adapter of a set."""


@dataclass(frozen=True, slots=True)
class ScaledLora:
    """A loaded adapter of a set: where it came from, and its SHA-256 as a GGUF LoRA file."""

    pointer: Pointer
    path: Path
    sha256: str
    scale: float


class ConcatenatedAdapters:
    """Fused adapters of one model, made when a set needs one and kept for those used last. For one thread at a time.

    Args:
        model: the ``llama_model *``.
        architecture: of the model.
        lora_file: gives the GGUF LoRA file of an adapter again, from where it was loaded.
    """

    def __init__(self, model: int, architecture: str, lora_file: Callable[[Path], Path]) -> None:
        self._model = model
        self._is_fixed = architecture in FIXED_GRAPH
        self._lora_file = lora_file
        self._made: dict[Key, Pointer] = {}
        self._users: dict[int, Key] = {}

    def apply(self, context: int, parts: Sequence[ScaledLora]) -> None:
        """Make these adapters the complete set of ``context`` (a ``llama_context *``), fused where they are many.

        Raises:
            HotSwapError: if llama.cpp refuses; or if they must be fused, but a file has changed or is gone.
        """
        key = tuple(sorted((part.sha256, part.scale) for part in parts))
        if self._should_fuse(len(parts)) and self._has(key, parts):
            set_loras(context, [(self._made[key], 1.0)])
        else:
            set_loras(context, [(part.pointer, part.scale) for part in parts])
        self._users[context] = key
        for old in list(self._made)[:-_KEPT]:
            if old not in self._users.values():
                free_lora(self._made.pop(old))

    def _should_fuse(self, count: int) -> bool:
        return count > (1 if self._is_fixed else SEPARATE)

    def _has(self, key: Key, parts: Sequence[ScaledLora]) -> bool:
        """Whether there is one for this set, made now if need be."""
        try:
            self._made[key] = self._made.pop(key) if key in self._made else self._load(parts)
        except (GgufloraError, OSError) as error:
            if self._is_fixed:
                raise HotSwapError(f"{len(parts)} adapters must be fused for this architecture, but {error}") from error
            return False
        return True

    def drop(self, sha256: str) -> None:
        """Free those that an adapter is part of and no context has."""
        for key in [key for key in self._made if any(part == sha256 for part, _ in key)]:
            if key not in self._users.values():
                free_lora(self._made.pop(key))

    def free(self) -> None:
        """Free all; no context may have them. Idempotent."""
        self._users.clear()
        while self._made:
            free_lora(self._made.popitem()[1])

    def forget(self, context: int) -> None:
        """A context has been freed."""
        self._users.pop(context, None)

    def _load(self, parts: Sequence[ScaledLora]) -> Pointer:
        with memory_file("gguflora-concatenated") as target:
            files = [(self._lora_file(part.path), part.scale) for part in parts]
            for (file, _), part in zip(files, parts, strict=True):
                if sha256_of(file) != part.sha256:
                    raise HotSwapError(f"{part.path}: has changed since it was loaded; unload it and load it again")
            concatenate(files, target)
            return load_lora(self._model, target)
