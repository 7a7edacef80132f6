"""Concatenate large adapter sets into one adapter, so that llama.cpp computes one product instead of many.

``scale_1 * b_1 @ a_1 + scale_2 * b_2 @ a_2 = [scale_1 * b_1, scale_2 * b_2] @ [a_1; a_2]``
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from gguflora.errors import GgufloraError, HotSwapError
from gguflora.files.checksum import sha256_of
from gguflora.lora.concatenate import concatenate
from gguflora.runtime.bindings import Pointer, free_lora, load_lora, set_loras
from gguflora.system.nameless import memory_file

SEPARATE: Final = 4
"""Largest number of adapters that are applied separately; larger sets are concatenated.

Measured by tools/benchmarks/fusing.py on a model of 0.1 B weights: 8 separate adapters decode at half the rate of one
concatenated adapter, 16 at a third. Concatenating costs about as much as 40 tokens, when a set is first used.
"""

FIXED_GRAPH: Final = frozenset(
    {
        "bailingmoe3", "deepseek4", "dflash", "glm5-next", "hrm_text", "hy_v4", "kimi-k3", "kimi-linear", "minimax-01",
        "minimax-m3", "nanbeige", "qwen35", "qwen35moe", "qwen3next", "qwen4exp",
    }
)  # fmt: skip
"""Architectures whose compute graph has no spare nodes for adapters: llama.cpp would abort if it had to apply a few
(`graph_max_nodes` in ``llama-context.cpp``). In all others it reserves the six nodes that a pair of factors takes."""

_MAX_LOADED: Final = 4
"""Number of concatenated adapters that stay loaded; the least recently used are freed."""

Key: TypeAlias = tuple[tuple[str, float], ...]
"""SHA-256 and scale of each adapter of a set."""


@dataclass(frozen=True, slots=True)
class ScaledLora:
    """A loaded adapter and its scale in a set.

    Attributes:
        pointer: its ``llama_adapter_lora *``.
        path: GGUF LoRA file or PEFT directory that it was loaded from.
        sha256: SHA-256 of its GGUF LoRA file, in hexadecimal.
        scale: its scale in the set.
    """

    pointer: Pointer
    path: Path
    sha256: str
    scale: float


class ConcatenatedAdapters:
    """The concatenated adapters of one model, made on demand. Not thread-safe.

    Args:
        model: the ``llama_model *``.
        architecture: the model's ``general.architecture``.
        lora_file: returns the GGUF LoRA file of an adapter, given the path that the adapter was loaded from.
    """

    def __init__(self, model: int, architecture: str, lora_file: Callable[[Path], Path]) -> None:
        self._model = model
        self._is_fixed = architecture in FIXED_GRAPH
        self._lora_file = lora_file
        self._made: dict[Key, Pointer] = {}
        self._users: dict[int, Key] = {}

    def apply(self, context: int, parts: Sequence[ScaledLora]) -> None:
        """Apply exactly these adapters in ``context`` (a ``llama_context *``), concatenated if they are many.

        Raises:
            HotSwapError: if llama.cpp refuses the set, or if it must be concatenated but a file has changed or is gone.
        """
        key = tuple(sorted((part.sha256, part.scale) for part in parts))
        if self._should_concatenate(len(parts)) and self._ensure_loaded(key, parts):
            set_loras(context, [(self._made[key], 1.0)])
        else:
            set_loras(context, [(part.pointer, part.scale) for part in parts])
        self._users[context] = key
        for old in list(self._made)[:-_MAX_LOADED]:
            if old not in self._users.values():
                free_lora(self._made.pop(old))

    def _should_concatenate(self, count: int) -> bool:
        return count > (1 if self._is_fixed else SEPARATE)

    def _ensure_loaded(self, key: Key, parts: Sequence[ScaledLora]) -> bool:
        """Make the concatenated adapter of a set unless it is loaded; return whether it is loaded now."""
        try:
            self._made[key] = self._made.pop(key) if key in self._made else self._load(parts)
        except (GgufloraError, OSError) as error:
            if self._is_fixed:
                raise HotSwapError(
                    f"{len(parts)} adapters must be concatenated for this architecture, but {error}"
                ) from error
            return False
        return True

    def drop(self, sha256: str) -> None:
        """Free the concatenated adapters that contain this adapter, unless a context uses them."""
        for key in [key for key in self._made if any(part == sha256 for part, _ in key)]:
            if key not in self._users.values():
                free_lora(self._made.pop(key))

    def free(self) -> None:
        """Free all concatenated adapters; no context may still use one. Idempotent."""
        self._users.clear()
        while self._made:
            free_lora(self._made.popitem()[1])

    def forget(self, context: int) -> None:
        """Remove a context that has been freed from the records."""
        self._users.pop(context, None)

    def _load(self, parts: Sequence[ScaledLora]) -> Pointer:
        with memory_file("gguflora-concatenated") as target:
            files = [(self._lora_file(part.path), part.scale) for part in parts]
            for (file, _), part in zip(files, parts, strict=True):
                if sha256_of(file) != part.sha256:
                    raise HotSwapError(
                        f"{part.path}: the file has changed since it was loaded; unload and load it again"
                    )
            concatenate(files, target)
            return load_lora(self._model, target)
