"""Memory: what a step needs, what there is, and an allocator that gives back what it got."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from gguflora.errors import UsageError
from gguflora.system.memory import available_memory
from gguflora.training.loss import SLICE
from gguflora.training.model import PackedModel
from gguflora.training.packed import PANEL_WEIGHTS

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MAPPED: Final = 2 << 20
"""Bytes of a block of memory that glibc maps by itself, and unmaps when it is freed."""
_KEPT: Final = 64 << 20
"""Bytes that glibc keeps at the end of its heap when blocks are freed."""
_IMPORTS: Final = 700 << 20
"""Of Python with torch and a model of transformers, which imports torch's compiler; measured, with mapped libraries."""

_ADAM: Final = 16
"""Bytes of a trained number: itself, its gradient, two moments."""

_SERVED: Final = 160 << 20
"""Of llama.cpp's context while it evaluates, and of what the heap keeps."""

_FLOAT: Final = 4
_SHARE: Final = 0.8
"""Of the memory that is available, what a run takes unless it is told."""

_CHOICES: Final = (4096, 2048, 1024, 512)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How a run keeps to its memory.

    Attributes:
        recompute: whether blocks are computed again for the backward pass.
        positions: largest number of positions in a micro-batch.
        total: bytes, estimated, with what is mapped of the file at once.
    """

    recompute: bool
    positions: int
    total: int


def return_memory_early() -> None:
    """Let glibc give freed activations back, and torch take large ones in huge pages. Call it before torch is used.

    By default glibc's threshold for mapping a block grows with what is freed, and freed activations stay in its heap.
    Measured, the second step of 512 tokens on a 1.1B llama: 2.1 GB and 19 CPU s with the largest threshold; 1.05 GB and
    29 with 256 KB, because every page of every activation is mapped by a fault; 1.2 GB and 24 so. Without effect on
    other C libraries and without huge pages.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch: c10/core/impl/alloc_cpu.cpp
    with suppress(OSError, AttributeError, TypeError):  # Windows has no library of the process
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _MAPPED)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT)


def trim_heap() -> None:
    """Give what the heap keeps for later back to the system; without effect on C libraries other than glibc."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def needed_bytes(model: PackedModel, n_trained: int, positions: int, longest: int, *, recompute: bool) -> int:
    """Estimated bytes of a step, without the mapped file.

    Args:
        model: the model.
        n_trained: trained numbers.
        positions: number of positions in a micro-batch.
        longest: sample.
        recompute: whether blocks are computed again.
    """
    config, base = model.config, model.packed.base
    width, layers = int(config.hidden_size), base.n_layers
    inner = max((shape[-2] for name, shape in base.shapes.items() if ".ffn_" in name and len(shape) == 2), default=0)
    heads = max(base.n_head, default=1)
    queries = heads * int(getattr(config, "head_dim", None) or width // heads)
    scores = 3 * heads * longest if getattr(config, "_attn_implementation", "") == "eager" else 0
    block = (13 * width + 5 * queries + 5 * inner + scores) * _FLOAT * positions
    kept = layers * width * _FLOAT * positions + block if recompute else layers * block
    logits = 3 * min(positions, SLICE) * int(config.vocab_size) * _FLOAT
    return _IMPORTS + _ADAM * n_trained + kept + logits + PANEL_WEIGHTS * _FLOAT


def total_bytes(model: PackedModel, n_trained: int, needed: int) -> int:
    """Estimated bytes at most: of a step, which maps a matrix at a time, or of llama.cpp, which maps the whole file.

    Args:
        model: the model.
        n_trained: trained numbers.
        needed: bytes of a step, without the mapped file.
    """
    packed = model.packed
    return max(needed + packed.largest_tensor, _IMPORTS + _ADAM * n_trained + _SERVED + packed.size)


def plan_memory(model: PackedModel, n_trained: int, longest: int, batch: int, asked: int | None) -> MemoryPlan:
    """Choose between recomputation and the size of micro-batches.

    Args:
        model: the model.
        n_trained: trained numbers.
        longest: sample.
        batch: samples of a step.
        asked: bytes, mapped file included; None for what is available.

    Raises:
        UsageError: if not even the smallest step fits.
    """
    budget = asked if asked is not None else int(available_memory() * _SHARE)
    sizes = [size for size in _CHOICES if size >= longest] + [longest]
    total = 0
    for recompute in (False, True):
        for positions in sizes if recompute else sizes[: max(1, len(sizes) - 1)]:
            at_once = min(positions, batch * longest)
            needed = needed_bytes(model, n_trained, at_once, longest, recompute=recompute)
            total = total_bytes(model, n_trained, needed)
            if (needed if asked is None else total) <= budget:  # what is only available need not hold the file
                return MemoryPlan(recompute, positions, total)
    raise UsageError(
        f"training needs about {total / 1e9:.1f} GB with samples of {longest} tokens, but has {budget / 1e9:.1f} GB; "
        "shorten them with --length, lower --rank, or allow more with --memory"
    )
