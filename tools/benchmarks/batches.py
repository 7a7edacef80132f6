"""What llama.cpp itself gains by decoding several sequences in one batch: the limit of every server built on it."""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import llama_cpp

from gguflora.runtime.bindings import free_lora, load_lora, set_loras

UBATCH = 128
FIRST_TOKEN = 300
"""Of texts: any that are no control tokens."""


@dataclass(frozen=True)
class Costs:
    """CPU seconds of one prompt alone, and of one step in which each of so many sequences gets one token."""

    prompt: float
    steps: dict[int, float]

    def gain(self, clients: int, tokens: int, prompts: int = 1) -> float:
        """Tokens per second of so many clients, as a multiple of one client's, for answers of ``tokens`` tokens.

        Prompts gain nothing: they fill batches of their own. With ``prompts`` 0 they are left out.
        """
        alone = prompts * self.prompt + tokens * self.steps[1]
        return clients * alone / (clients * prompts * self.prompt + tokens * self.steps[clients])


def measure_batches(
    base: Path, lora: Path, sizes: Sequence[int], prompt: int, threads: int, repeats: int = 12
) -> Costs:
    """Medians of steps of ``sizes`` sequences, measured in turns, each behind a prompt of ``prompt`` tokens."""
    sizes = sorted({1, *sizes})
    with _context(base, lora, sizes[-1], prompt + 2 * len(sizes) * (repeats + 1), threads) as context:
        batch = _Batch(context, UBATCH)
        prompts = [batch.decode([(sequence, at) for at in range(prompt)]) for sequence in range(sizes[-1])]
        at = prompt
        taken: dict[int, list[float]] = {size: [] for size in sizes}
        for _ in range(repeats + 1):  # the first turn warms up
            for size in sizes:
                taken[size].append(batch.decode([(sequence, at) for sequence in range(size)]))
                batch.decode([(sequence, at) for sequence in range(size, sizes[-1])])
                at += 1
    return Costs(statistics.median(prompts), {size: statistics.median(times[1:]) for size, times in taken.items()})


@contextmanager
def _context(base: Path, lora: Path, sequences: int, positions: int, threads: int) -> Iterator[int]:
    """A llama.cpp context with the adapter in force, as llama.cpp's own server sets it up."""
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(os.fsencode(base), llama_cpp.llama_model_default_params())
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = sequences * positions
    parameters.n_batch = parameters.n_ubatch = UBATCH
    parameters.n_seq_max = parameters.n_outputs_max = sequences
    parameters.n_threads = parameters.n_threads_batch = threads
    parameters.kv_unified = True
    context = llama_cpp.llama_init_from_model(model, parameters)
    adapter = load_lora(model, lora)
    try:
        set_loras(context, [(adapter, 1.0)])
        yield context
    finally:
        llama_cpp.llama_free(context)
        free_lora(adapter)
        llama_cpp.llama_model_free(model)


class _Batch:
    """Decodes one token at each of some places (sequence, position)."""

    def __init__(self, context: int, size: int) -> None:
        self._context = context
        self._struct = llama_cpp.llama_batch_init(size, 0, 1)

    def decode(self, places: Sequence[tuple[int, int]]) -> float:
        """CPU seconds that it took; logits are computed of each sequence's last token."""
        batch, last = self._struct, dict(places)
        batch.n_tokens = len(places)
        for index, (sequence, at) in enumerate(places):
            batch.token[index] = FIRST_TOKEN + (7 * at + sequence) % 100
            batch.pos[index] = at
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = ctypes.c_int8(last[sequence] == at)
        started = time.process_time()
        if places and llama_cpp.llama_decode(self._context, batch):
            raise SystemExit(f"llama.cpp could not decode a batch of {len(places)}")
        return time.process_time() - started

    def __del__(self) -> None:
        llama_cpp.llama_batch_free(self._struct)
