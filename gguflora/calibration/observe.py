"""Run a model over a text in llama.cpp and sum over the inputs of its weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from gguflora.calibration.text import built_in_text
from gguflora.errors import FormatError, HotSwapError, UsageError
from gguflora.quants._lib import choose_isa
from gguflora.quants.arrays import Float32Array
from gguflora.runtime import graph_hook
from gguflora.runtime.graph_hook import GraphFaultError, GraphHook
from gguflora.runtime.input_watch import Inputs, InputWatch
from gguflora.runtime.logits import POSITIONS, LogitsModel

MIN_CTX = 16
"""Fewest tokens of a window: llama.cpp's imatrix ignores shorter batches."""

Progress = Callable[[int, int], None]


def observe(
    model: LogitsModel,
    windows: Sequence[Sequence[int]],
    weights: Mapping[str, tuple[int, int]],
    *,
    loras: Sequence[tuple[Path, float]] = (),
    omega: Callable[[int], Float32Array] | None = None,
    progress: Progress | None = None,
) -> dict[str, Inputs]:
    """Evaluate windows of text, each on its own, and sum over the inputs of weights.

    Args:
        model: the model.
        windows: tokens of each window, at least `MIN_CTX`.
        weights: number of matrices and of columns by name of the weight.
        loras: adapters to apply, as GGUF files with their scales.
        omega: see `InputWatch`.
        progress: called with (tokens done, tokens in total).

    Raises:
        HotSwapError: if llama.cpp cannot compute, or the hook cannot read its graph.
    """
    reason = graph_hook.unavailable()
    if reason is not None:
        raise HotSwapError(f"the inputs of the model's weights cannot be watched here: {reason}")
    hook, watch = GraphHook(graph_hook.proven_layout()), InputWatch(weights, omega)
    hook.watch(watch, choose_isa(None))
    context = model.context(max(map(len, windows)), loras, hook=hook)
    done, total = 0, sum(map(len, windows))
    for window in windows:
        context.clear()
        for batch in batches_of(window):
            hook.begin_watching(np.asarray(batch, np.int32))
            try:
                context.decode(batch)
            finally:
                report = _end(hook, model)
            if not report:
                raise HotSwapError(f"{model.path}: llama.cpp computed the batch without looking up its tokens")
            done += len(batch)
            if progress:
                progress(done, total)
    return watch.found()


def _end(hook: GraphHook, model: LogitsModel) -> int:
    """Return the number of ubatches in the batch that is over."""
    try:
        return hook.end().n_ubatches
    except GraphFaultError as error:
        raise HotSwapError(f"{model.path}: the inputs of its weights cannot be summed up: {error}") from error


def batches_of(window: Sequence[int]) -> list[Sequence[int]]:
    """Divide a window into batches of about equal size, none of them larger than llama.cpp's contexts take here."""
    count = math.ceil(len(window) / POSITIONS)
    bounds = [len(window) * number // count for number in range(count + 1)]
    return [window[start:stop] for start, stop in pairwise(bounds)]


def windows_of(model: LogitsModel, text: Path | None, ctx: int) -> list[list[int]]:
    """Split a text into whole windows of ``ctx`` tokens, as llama.cpp's imatrix does; a rest is left out.

    Each begins with the token for the beginning of a text, if the model has one, in place of its first token.

    Raises:
        UsageError: if ``ctx`` is too small.
        FormatError: if the text cannot be read, or has fewer tokens.
    """
    if ctx < MIN_CTX:
        raise UsageError(f"ctx is {ctx}, expected at least {MIN_CTX} tokens")
    tokens = [*model.first_tokens, *model.tokenize(read_text(text))]
    if len(tokens) < ctx:
        raise FormatError(
            f"{text or 'the built-in text'}: has {len(tokens)} tokens, expected at least {ctx}; give a longer text "
            "with --text, or a smaller window with --ctx"
        )
    size = len(model.first_tokens)
    starts = range(0, len(tokens) - ctx + 1, ctx)
    return [[*model.first_tokens, *tokens[start + size : start + ctx]] for start in starts]


def read_text(path: Path | None) -> bytes:
    """Return a text in UTF-8, or the built-in one.

    Raises:
        FormatError: if it cannot be read, is empty or is not UTF-8.
    """
    if path is None:
        return built_in_text().encode()
    try:
        content = path.read_bytes()
        content.decode()
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: is not UTF-8: byte {error.start} is {content[error.start]:#04x}") from error
    if not content.strip():
        raise FormatError(f"{path}: is empty, expected a text")
    return content
