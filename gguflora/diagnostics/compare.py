"""``compare``: measure how far merged files' answers are from those of their adapters.

The reference is the base with the adapters applied at run time ("hot"), because this does not round any weights.
llama.cpp evaluates texts with the base, the hot adapters and the merged files side by side, a few positions at a time.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from gguflora.architectures.base_model import read_whole_base
from gguflora.diagnostics.comparison import CompareReport, Speed, TextComparison
from gguflora.diagnostics.general_text import BUILT_IN_TEXT
from gguflora.diagnostics.side_by_side import Tally, measure, speeds_of, summed_up, windows_of_text
from gguflora.errors import (
    FormatError,
    HotSwapError,
    MismatchError,
    MissingExtraError,
    QuantizationError,
    UnsupportedAdapterError,
    UsageError,
)
from gguflora.files.gguf import GgufFile
from gguflora.files.remote import remote_inputs
from gguflora.merging.merge import AdapterArgument, merge, with_scales
from gguflora.merging.moment_sources import Texts
from gguflora.runtime.adapter_files import AdapterReading
from gguflora.system.cpus import thread_count

if TYPE_CHECKING:
    from gguflora.runtime.logits import LogitsModel

MIN_CTX: Final = 16
_OPEN_TOGETHER: Final = 1 << 30
"""Merged files that have no more bytes are open at the same time, so that the hot adapters are evaluated once."""

_OWN: Final = ("base", "hot", "naive", "nearest", "adaptive", "calibrated")


@remote_inputs(base="file", merged="file", adapters="adapter", text="file", calibration_text="file")
def compare(
    base: str | os.PathLike[str],
    merged: Texts,
    adapters: AdapterArgument,
    *,
    text: Texts | None = None,
    naive: bool = False,
    all: bool = False,
    calibration_text: Texts | None = None,
    n_ctx: int = 512,
    threads: int | None = None,
    text_only: bool = False,
    trust_names: bool = False,
) -> CompareReport:
    """Measure how closely merged files reproduce the answers of ``base`` with ``adapters`` applied at run time.

    Needs llama-cpp-python, and memory for two models at once.

    Args:
        base: the GGUF file that was merged into.
        merged: the merged GGUF file, or several, or none.
        adapters: the merged adapters, as for `gguflora.merge`.
        text: UTF-8 files to evaluate, ideally similar to the adapters' training data. A built-in English text follows
            them, so that it shows what a merge does to other text.
        naive: also measure a merge that rounds to nearest; it is written to a temporary file.
        all: also measure three merges: nearest, adaptive, and calibrated; they are written to temporary files.
        calibration_text: text for the calibrated merge, see `gguflora.merge`; not the text to evaluate.
        n_ctx: number of tokens in each window of a text; each window is evaluated on its own.
        threads: number of threads; by default one for each core that this process may use.
        text_only: take only the part of a multimodal model's adapters that changes the language model.
        trust_names: apply adapters by name and shape where the order of a tensor's rows is not known.

    Raises:
        UsageError: if ``n_ctx`` is too small, or ``calibration_text`` has no use.
        MissingExtraError: if llama-cpp-python is not installed.
        HotSwapError: if an adapter cannot be applied at run time, or llama.cpp refuses a file.
        MismatchError: if the models have different vocabularies.
        GgufloraError: if a file cannot be read.
    """
    if n_ctx < MIN_CTX:
        raise UsageError(f"n_ctx is {n_ctx}, expected at least {MIN_CTX} tokens")
    texts, given = [] if text is None else _paths(text), _named(_paths(merged))
    own = [] if calibration_text is None else _paths(calibration_text)
    _check_calibration_text(own, texts, used=all)
    base_path, pairs, used_threads = Path(base), with_scales(adapters), thread_count(threads)
    reading = AdapterReading(text_only, trust_names)
    loras = _open_loras(base_path, pairs, reading)
    with _open(base_path, used_threads) as model:
        side_by_side = _Comparison(model, [*texts, None], loras, min(n_ctx, model.n_ctx_train), used_threads)
        roundings = (*(["naive"] if naive else []), *(["nearest", "adaptive", "calibrated"] if all else []))
        with _own_merges(base_path, pairs, used_threads, reading, roundings, own) as (made, warnings):
            for group in _groups({**given, **made}):
                side_by_side.add(group, timed=given.keys())
    found = side_by_side.summed_up()
    return CompareReport(
        base=base_path,
        merged=next(iter(given.values()), None),
        files=given,
        adapters=tuple((str(path), scale) for path, scale in pairs),
        text=found[0].text,
        positions=found[0].positions,
        n_ctx=side_by_side.n_ctx,
        divergences=found[0].divergences,
        perplexities=found[0].perplexities,
        texts=found,
        speeds=side_by_side.speeds,
        warnings=tuple(warnings),
    )


class _Comparison:
    """A base and its hot adapters on some texts, beside which merged files are evaluated."""

    def __init__(
        self,
        model: LogitsModel,
        texts: Sequence[Path | None],
        loras: Sequence[tuple[Path, float]],
        n_ctx: int,
        threads: int,
    ) -> None:
        self.n_ctx = n_ctx
        self.speeds: dict[str, Speed] = {}
        self._model, self._threads = model, threads
        self._names = ["built-in text" if text is None else str(text) for text in texts]
        self._tokens = [_tokens(model, text) for text in texts]
        self._tallies: list[dict[str, Tally]] = [{} for _ in texts]
        self._hot, self._base = model.context(n_ctx, loras), model.context(n_ctx)

    def add(self, files: Mapping[str, Path], timed: Container[str]) -> None:
        """Evaluate files, and measure the speeds of those of them that are to be timed."""
        with ExitStack() as models:
            contexts = {"hot": self._hot} | ({} if "base" in self._tallies[0] else {"base": self._base})
            for name, path in files.items():
                model = models.enter_context(_open(path, self._threads, self._model))
                contexts[name] = model.context(self.n_ctx)
            for tokens, tallies in zip(self._tokens, self._tallies, strict=True):
                tallies.update(measure(list(windows_of_text(tokens, self._model.first_tokens, self.n_ctx)), contexts))
            fast = {name: contexts[name] for name in files if name in timed}
            if fast:
                self.speeds = speeds_of({"hot": self._hot, **fast}, self._tokens[0], self.n_ctx) | self.speeds

    def summed_up(self) -> tuple[TextComparison, ...]:
        """Return what was found on each text."""
        return tuple(map(summed_up, self._names, self._tallies))


def _paths(given: Texts) -> list[Path]:
    return [Path(given)] if isinstance(given, str | os.PathLike) else [Path(path) for path in given]


def _named(merged: Sequence[Path]) -> dict[str, Path]:
    """Return the merged files under their names in the report."""
    if len(merged) == 1:
        return {"merged": merged[0]}
    names = [path.name for path in merged]
    short = len({*names, *_OWN}) == len(names) + len(_OWN)
    return dict(zip(names if short else map(str, merged), merged, strict=True))


def _check_calibration_text(own: Sequence[Path], texts: Sequence[Path], *, used: bool) -> None:
    if own and not used:
        raise UsageError("a text for the calibration needs --all: no other merge is calibrated here")
    for path in own:
        if path in texts:
            raise UsageError(f"{path}: is to be both calibrated and evaluated on, which flatters the merge; split it")


def _groups(files: Mapping[str, Path]) -> Iterator[dict[str, Path]]:
    """Divide files into those that are open at the same time; without files there is one empty group."""
    sizes = {name: path.stat().st_size if path.exists() else 0 for name, path in files.items()}
    group: dict[str, Path] = {}
    for name, path in files.items():
        if group and sum(sizes[each] for each in group) + sizes[name] > _OPEN_TOGETHER:
            yield group
            group = {}
        group[name] = path
    yield group


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


def _tokens(model: LogitsModel, text: Path | None) -> list[int]:
    try:
        content = BUILT_IN_TEXT.encode() if text is None else text.read_bytes()
    except OSError as error:
        raise FormatError(f"{text}: cannot be read: {error.strerror}") from error
    tokens = model.tokenize(content)
    if len(tokens) < 2:
        raise FormatError(f"{text}: has {len(tokens)} tokens, expected at least 2")
    return tokens


@contextmanager
def _own_merges(
    base: Path,
    pairs: AdapterArgument,
    threads: int,
    reading: AdapterReading,
    names: Sequence[str],
    calibration_text: Sequence[Path],
) -> Iterator[tuple[dict[str, Path], list[str]]]:
    """Merge into temporary files; yield them by name, and warnings on merges that are not possible."""
    made: dict[str, Path] = {}
    warnings = []
    with tempfile.TemporaryDirectory(prefix="gguflora-") as folder:
        for name in names:
            file = Path(folder) / f"{name}.gguf"
            rounding: Literal["nearest", "adaptive"] = "nearest" if name in {"naive", "nearest"} else "adaptive"
            try:
                merge(
                    base,
                    pairs,
                    file,
                    threads=threads,
                    rounding=rounding,
                    text_only=reading.text_only,
                    trust_names=reading.trust_names,
                    calibrate=name == "calibrated",
                    calibration_text=list(calibration_text) if name == "calibrated" else None,
                )
            except QuantizationError as error:
                if name != "calibrated":
                    raise
                warnings.append(f"there is no calibrated merge to compare: {error}")
                continue
            made[name] = file
        yield made, warnings
