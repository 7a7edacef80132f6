"""Measure the mean loss of a text's tokens with a base model and one adapter after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gguflora.architectures.base_model import read_whole_base
from gguflora.calibration.collect import spread
from gguflora.errors import FormatError, MissingExtraError
from gguflora.lora.loss_meter import Measure
from gguflora.quants.arrays import Float32Array
from gguflora.system.cpus import thread_count

TOKENS: Final = 8192
"""About as many tokens are evaluated at most, spread evenly over the texts."""
_WINDOW: Final = 512
_FEWEST: Final = 32
_ROWS: Final = 16
"""Positions whose logits are held in float64 at once."""


@contextmanager
def open_loss_meter(base: Path, texts: Sequence[Path], threads: int | None) -> Iterator[Measure]:
    """Open a base, and return a function that measures the mean loss with a GGUF LoRA file, or None.

    Each window of 512 tokens is evaluated on its own.

    Args:
        base: the GGUF file; for a split model, its first file.
        texts: UTF-8 files.
        threads: number of threads; by default one for each core that this process may use.

    Raises:
        MissingExtraError: if llama-cpp-python is not installed.
        FormatError: if a text cannot be read, or the texts are too short.
        HotSwapError: if llama.cpp cannot run the model, or the function's adapter.
    """
    try:
        from gguflora.calibration.observe import read_text  # noqa: PLC0415  (needs llama_cpp)
        from gguflora.runtime.adapter_files import open_adapter  # noqa: PLC0415
        from gguflora.runtime.logits import POSITIONS, LogitsModel  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtraError("choosing a rank by loss", "llama-cpp-python", "runtime") from error
    described, contents = read_whole_base(base), [read_text(text) for text in texts]
    with LogitsModel(base, thread_count(threads)) as model:
        size = min(_WINDOW, model.n_ctx_train)
        windows = [part for content in contents for part in _windows(model.first_tokens, model.tokenize(content), size)]
        if sum(map(len, windows)) < _FEWEST:
            raise FormatError(f"{texts[0]}: has fewer than {_FEWEST} tokens; give a longer text with --text")
        chosen = spread(windows, max(1, TOKENS // size))
        context = model.context(size)

        def measure(file: Path | None) -> float:
            context.put_loras([] if file is None else [(open_adapter(file, described).file, 1.0)])
            found = []
            for window in chosen:
                context.clear()
                for start in range(0, len(window) - 1, POSITIONS):
                    targets = window[start + 1 : start + 1 + POSITIONS]
                    found.append(token_losses(context.decode(window[start : start + len(targets)]), targets))
            return float(np.concatenate(found).mean())

        yield measure


def token_losses(logits: Float32Array, targets: Sequence[int]) -> NDArray[np.float64]:
    """Return the loss of each token in nats.

    Args:
        logits: those at each position, (n_positions, n_vocab).
        targets: the token that follows each position.
    """
    losses = np.empty(len(targets))
    for start in range(0, len(targets), _ROWS):
        rows = logits[start : start + _ROWS].astype(np.float64)
        rows -= rows.max(axis=1, keepdims=True)
        aims = targets[start : start + _ROWS]
        losses[start : start + _ROWS] = np.log(np.exp(rows).sum(axis=1)) - rows[np.arange(len(aims)), aims]
    return losses


def _windows(first: list[int], tokens: Sequence[int], size: int) -> list[list[int]]:
    step = size - len(first)
    parts = [[*first, *tokens[start : start + step]] for start in range(0, len(tokens), step)]
    return [part for part in parts if len(part) > 1]
