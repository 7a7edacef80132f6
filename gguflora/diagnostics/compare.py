"""``compare``: measure how far a merged file's answers are from those of its adapters.

The reference is the base with the adapters applied at run time ("hot"), because this does not round any weights.
llama.cpp evaluates a text with the base, the hot adapters and the merged file side by side, a few positions at a time.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from gguflora.architectures.base_model import read_whole_base
from gguflora.diagnostics.divergence import kl_divergences, log_softmax
from gguflora.errors import (
    FormatError,
    HotSwapError,
    MismatchError,
    MissingExtraError,
    UnsupportedAdapterError,
    UsageError,
)
from gguflora.files.gguf import GgufFile
from gguflora.files.remote import remote_inputs
from gguflora.merging.merge import AdapterArgument, merge, with_scales
from gguflora.runtime.adapter_files import AdapterReading
from gguflora.system.cpus import thread_count

if TYPE_CHECKING:
    from gguflora.runtime.logits import LogitsContext, LogitsModel

BUILT_IN_TEXT: Final = """\
The ferry leaves the harbour at seven in the morning and comes back before dark. On the way it stops at two islands:
the larger one has a school, a bakery and a lighthouse, the smaller one nothing but sheep. Last winter the engine failed
half way across, and the captain let the wind carry the boat to the beach, where everybody climbed out laughing.

To cook rice, wash it twice in cold water, cover it with one and a half times its volume of water, and bring it to the
boil. Then turn the heat down, put the lid on, and wait for twelve minutes. Do not stir. Why not? Because the grains
break and the pot sticks.

def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values)

Water boils at 100 degrees Celsius at sea level, but at only 90 degrees on a mountain 3,000 metres high. The reason is
the pressure of the air: the less of it there is, the sooner the bubbles can grow. That is why tea tastes weak up there,
and why beans take hours.

"Have you seen my glasses?" asked the old man. "They are on your nose," said the girl, and she was right. He thanked
her, sat down by the window, and read the letter from his brother for the third time.
"""
"""The default text: a story, a recipe, a program, an explanation, a conversation."""

POSITIONS_AT_ONCE: Final = 16
"""Positions that are compared at once; each has a float64 row as long as the vocabulary."""
MIN_CTX: Final = 16
SPEED_PROMPT, SPEED_ANSWER, SPEED_TURNS = 128, 16, 3


@dataclass(frozen=True, slots=True)
class Divergence:
    """The distance of a model's predictions from those of the hot adapters.

    Attributes:
        kl: mean Kullback-Leibler divergence in nats per token.
        error: standard error of the mean.
        top_agreement: share of the positions where both models have the same most likely token.
    """

    kl: float
    error: float
    top_agreement: float


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second while reading a prompt and while generating an answer."""

    prompt: float
    generation: float


@dataclass(frozen=True, slots=True)
class CompareReport:
    """What `compare` found. The models are called "base", "hot", "merged" and "naive".

    Attributes:
        base: path of the base file.
        merged: path of the merged file.
        adapters: path and scale of each adapter.
        text: the file that was evaluated, or "built-in text".
        positions: number of predicted tokens.
        n_ctx: number of tokens in each window of the text.
        divergences: divergence from the hot adapters, by model.
        perplexities: perplexity on the text, by model.
        speeds: speed of the hot adapters and of the merged file.
    """

    base: Path
    merged: Path
    adapters: tuple[tuple[str, float], ...]
    text: str
    positions: int
    n_ctx: int
    divergences: dict[str, Divergence]
    perplexities: dict[str, float]
    speeds: dict[str, Speed]

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, ready for JSON."""
        return {**asdict(self), "base": str(self.base), "merged": str(self.merged)}


@remote_inputs(base="file", merged="file", adapters="adapter", text="file")
def compare(
    base: str | os.PathLike[str],
    merged: str | os.PathLike[str],
    adapters: AdapterArgument,
    *,
    text: str | os.PathLike[str] | None = None,
    naive: bool = False,
    n_ctx: int = 512,
    threads: int | None = None,
    text_only: bool = False,
    trust_names: bool = False,
) -> CompareReport:
    """Measure how closely ``merged`` reproduces the answers of ``base`` with ``adapters`` applied at run time.

    Needs llama-cpp-python, and memory for two models at once.

    Args:
        base: the GGUF file that was merged into.
        merged: the merged GGUF file.
        adapters: the merged adapters, as for `gguflora.merge`.
        text: a UTF-8 file to evaluate, ideally similar to the adapters' training data; by default a short English
            text.
        naive: also measure a merge that rounds to nearest; it is written to a temporary file.
        n_ctx: number of tokens in each window of the text; each window is evaluated on its own.
        threads: number of threads; by default one for each core that this process may use.
        text_only: take only the part of a multimodal model's adapters that changes the language model.
        trust_names: apply adapters by name and shape where the order of a tensor's rows is not known.

    Raises:
        UsageError: if ``n_ctx`` is too small.
        MissingExtraError: if llama-cpp-python is not installed.
        HotSwapError: if an adapter cannot be applied at run time, or llama.cpp refuses a file.
        MismatchError: if the models have different vocabularies.
        GgufloraError: if a file cannot be read.
    """
    if n_ctx < MIN_CTX:
        raise UsageError(f"n_ctx is {n_ctx}, expected at least {MIN_CTX} tokens")
    base_path, merged_path, pairs = Path(base), Path(merged), with_scales(adapters)
    used_threads = thread_count(threads)
    reading = AdapterReading(text_only, trust_names)
    loras = _open_loras(base_path, pairs, reading)
    with _open(base_path, used_threads) as base_model:
        tokens, window = _tokens(base_model, text), min(n_ctx, base_model.n_ctx_train)
        windows = list(_windows(tokens, base_model.first_tokens, window))
        hot = base_model.context(window, loras)
        with _open(merged_path, used_threads, base_model) as model:
            contexts = {"base": base_model.context(window), "merged": model.context(window)}
            tallies = _measure(windows, hot, contexts)
            speeds = _speeds({"hot": hot, "merged": contexts["merged"]}, tokens, window)
        if naive:
            with (
                _naive_merge(base_path, pairs, used_threads, reading) as file,
                _open(file, used_threads, base_model) as model,
            ):
                tallies |= _measure(windows, hot, {"naive": model.context(window)})
    return CompareReport(
        base=base_path,
        merged=merged_path,
        adapters=tuple((str(path), scale) for path, scale in pairs),
        text="built-in text" if text is None else str(text),
        positions=tallies["hot"].count,
        n_ctx=window,
        divergences={name: tally.divergence() for name, tally in tallies.items() if name != "hot"},
        perplexities={name: tally.perplexity() for name, tally in tallies.items()},
        speeds=speeds,
    )


def _open_loras(
    base: Path, pairs: Sequence[tuple[str | os.PathLike[str], float]], reading: AdapterReading
) -> list[tuple[Path, float]]:
    """Return the adapters as GGUF LoRA files that llama.cpp can apply to the base."""
    model = read_whole_base(base)
    loras = []
    for path, scale in pairs:
        try:
            loras.append((reading.open(Path(path), model).file, scale))
        except (HotSwapError, UnsupportedAdapterError) as error:
            raise HotSwapError(
                f"{path}: cannot be applied at run time, which comparing needs: {error}. Compare with the "
                "approximation that 'gguflora convert --rank N' writes; convert reports its error"
            ) from error
    return loras


@contextmanager
def _open(path: Path, threads: int, like: LogitsModel | None = None) -> Iterator[LogitsModel]:
    """Open a model; its vocabulary must have the size of ``like``'s."""
    try:
        from gguflora.runtime.logits import LogitsModel  # noqa: PLC0415  (import gguflora does not load llama_cpp)
    except ImportError as error:
        raise MissingExtraError("comparing", "llama-cpp-python", "runtime") from error
    with GgufFile(path) as file:
        first = file.path  # llama.cpp opens a split model by its first file
    with LogitsModel(first, threads) as model:
        if like is not None and model.n_vocab != like.n_vocab:
            raise MismatchError(
                f"{path}: has a vocabulary of {model.n_vocab} tokens, but {like.path} has {like.n_vocab}; "
                "they cannot be compared token by token"
            )
        yield model


def _tokens(model: LogitsModel, text: str | os.PathLike[str] | None) -> list[int]:
    content = BUILT_IN_TEXT.encode() if text is None else Path(text).read_bytes()
    tokens = model.tokenize(content)
    if len(tokens) < 2:
        raise FormatError(f"{text}: has {len(tokens)} tokens, expected at least 2")
    return tokens


def _windows(tokens: Sequence[int], first: list[int], n_ctx: int) -> Iterator[list[int]]:
    """Split the text into windows of up to ``n_ctx`` tokens, each starting with the tokens that start a text."""
    step = n_ctx - len(first)
    for start in range(0, len(tokens), step):
        window = [*first, *tokens[start : start + step]]
        if len(window) > 1:
            yield window


class _Tally:
    """Sums of a model's measures over all positions."""

    def __init__(self) -> None:
        self.count = 0
        self._kl = self._kl_squared = self._agreements = self._loss = 0.0

    def add(self, log_p: NDArray[np.float64], log_q: NDArray[np.float64], targets: Sequence[int]) -> None:
        """Add positions: log-probabilities of the hot adapters and of this model, and the tokens that follow."""
        divergences = kl_divergences(log_p, log_q)
        self.count += len(targets)
        self._kl += float(divergences.sum())
        self._kl_squared += float((divergences**2).sum())
        self._agreements += float((log_p.argmax(axis=-1) == log_q.argmax(axis=-1)).sum())
        self._loss -= float(log_q[np.arange(len(targets)), targets].sum())

    def divergence(self) -> Divergence:
        mean = self._kl / self.count
        variance = max(0.0, self._kl_squared / self.count - mean**2)
        return Divergence(mean, math.sqrt(variance / self.count), self._agreements / self.count)

    def perplexity(self) -> float:
        return math.exp(self._loss / self.count)


def _measure(
    windows: Sequence[list[int]], hot: LogitsContext, contexts: Mapping[str, LogitsContext]
) -> dict[str, _Tally]:
    """Evaluate the text with all models side by side."""
    from gguflora.runtime.logits import POSITIONS  # noqa: PLC0415

    all_contexts = {"hot": hot, **contexts}
    tallies = {name: _Tally() for name in all_contexts}
    for window in windows:
        for context in all_contexts.values():
            context.clear()
        for start in range(0, len(window) - 1, POSITIONS):
            targets = window[start + 1 : start + 1 + POSITIONS]
            inputs = window[start : start + len(targets)]
            logits = {name: context.decode(inputs) for name, context in all_contexts.items()}
            _add(tallies, logits, targets)
    return tallies


def _add(tallies: Mapping[str, _Tally], logits: Mapping[str, NDArray[np.float32]], targets: Sequence[int]) -> None:
    for start in range(0, len(targets), POSITIONS_AT_ONCE):
        block = slice(start, start + POSITIONS_AT_ONCE)
        log_p = log_softmax(logits["hot"][block])
        for name, tally in tallies.items():
            log_q = log_p if name == "hot" else log_softmax(logits[name][block])
            tally.add(log_p, log_q, targets[block])


@contextmanager
def _naive_merge(base: Path, pairs: AdapterArgument, threads: int, reading: AdapterReading) -> Iterator[Path]:
    """Merge with nearest rounding into a temporary file."""
    with tempfile.TemporaryDirectory(prefix="gguflora-") as folder:
        file = Path(folder) / "naive.gguf"
        merge(
            base,
            pairs,
            file,
            threads=threads,
            rounding="nearest",
            text_only=reading.text_only,
            trust_names=reading.trust_names,
        )
        yield file


def _speeds(contexts: Mapping[str, LogitsContext], tokens: Sequence[int], n_ctx: int) -> dict[str, Speed]:
    """Measure median speeds: read a prompt, then decode token by token. All models decode the same text."""
    answer = min(SPEED_ANSWER, n_ctx // 2)
    prompt = min(SPEED_PROMPT, n_ctx - answer)
    needed = prompt + answer
    run = (list(tokens) * (needed // len(tokens) + 1))[:needed]
    timings: dict[str, list[tuple[float, float]]] = {name: [] for name in contexts}
    for _ in range(SPEED_TURNS):
        for name, context in contexts.items():
            timings[name].append(_time(context, run, prompt))
    medians = {name: np.median(turns, axis=0).tolist() for name, turns in timings.items()}
    return {name: Speed(prompt / seconds[0], answer / seconds[1]) for name, seconds in medians.items()}


def _time(context: LogitsContext, tokens: Sequence[int], prompt: int) -> tuple[float, float]:
    """Return the seconds for the prompt and for the tokens after it."""
    context.clear()
    moments = [time.perf_counter()]
    context.decode(tokens[:prompt], only_last=True)
    moments.append(time.perf_counter())
    for token in tokens[prompt:]:
        context.decode([token])
    moments.append(time.perf_counter())
    first, second = (after - before for before, after in pairwise(moments))
    return first, second
