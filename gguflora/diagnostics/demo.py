"""``demo``: convert two adapters, merge one, hot-swap both and compare, on a small model in the package.

``python -m tools.make_demo`` makes the model and its adapters, ``shout`` (capitals) and ``verse`` (rhymes).
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from gguflora.diagnostics.divergence import kl_divergence
from gguflora.lora.convert import convert
from gguflora.merging.merge import merge
from gguflora.merging.report import MergeReport

if TYPE_CHECKING:
    from gguflora.runtime.attached import Adapters

HERE: Final = Path(__file__).parent / "demo_files"
BASE: Final = HERE / "base.gguf"
ADAPTERS: Final = ("shout", "verse")
PROMPT: Final = "Q: What does the fox eat?\nA:"
MAX_TOKENS: Final = 110

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class DemoAnswer:
    """One answer of the demo.

    Attributes:
        weights: name of the weights that answered.
        text: the answer.
        swap_seconds: time to switch to these weights; None for the merged file.
        answer_seconds: time to answer.
    """

    weights: str
    text: str
    swap_seconds: float | None
    answer_seconds: float


@dataclass(frozen=True, slots=True)
class DemoReport:
    """Everything the demo measured.

    Attributes:
        prompt: the prompt of all answers.
        answers: one answer for each set of weights; none without llama-cpp-python.
        convert_seconds: time to convert each adapter.
        load_seconds: time to load the base model, each adapter, and the merged file.
        merge: the report of the merge.
        kl: mean KL divergence of the merged file from the hot adapter on the prompt and its answer, in nats per token;
            None without llama-cpp-python.
        kl_base: mean KL divergence of the base from the hot adapter, which shows how much the adapter changes.
    """

    prompt: str
    answers: tuple[DemoAnswer, ...]
    convert_seconds: dict[str, float]
    load_seconds: dict[str, float]
    merge: MergeReport
    kl: float | None
    kl_base: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, ready for JSON."""
        return {**asdict(self), "merge": self.merge.to_dict()}


def run_demo(keep: str | os.PathLike[str] | None = None, *, prompt: str = PROMPT) -> DemoReport:
    """Convert, merge and hot-swap the demo's adapters on its model. Without llama-cpp-python only convert and merge.

    Args:
        keep: directory for the files (two GGUF LoRAs, one merged model); by default they are temporary.
        prompt: the prompt for every set of weights.

    Raises:
        GgufloraError: if the files cannot be written.
    """
    return Demo(BASE, {name: HERE / name for name in ADAPTERS}).run(keep, prompt=prompt)


@dataclass(frozen=True)
class Demo:
    """A model and two adapters to show.

    Attributes:
        base: GGUF file of the model.
        adapters: two PEFT directories by name; the first is also merged.
    """

    base: Path
    adapters: Mapping[str, Path]

    def run(self, keep: str | os.PathLike[str] | None, *, prompt: str) -> DemoReport:
        """Convert, merge and hot-swap the adapters; see `run_demo`."""
        if keep is not None:
            Path(keep).mkdir(parents=True, exist_ok=True)
            return self._run(Path(keep), prompt)
        with tempfile.TemporaryDirectory(prefix="gguflora-demo-") as folder:
            return self._run(Path(folder), prompt)

    def _run(self, folder: Path, prompt: str) -> DemoReport:
        files, convert_seconds = {}, {}
        for name, source in self.adapters.items():
            files[name] = folder / f"{name}.gguf"
            _, convert_seconds[name] = _timed(convert, source, self.base, files[name], force=True)
        first = next(iter(self.adapters))
        merged_file = folder / f"base-{first}.gguf"
        merge_report = merge(self.base, self.adapters[first], merged_file, force=True)
        if importlib.util.find_spec("llama_cpp") is None:
            return DemoReport(prompt, (), convert_seconds, {}, merge_report, None, None)
        from gguflora.runtime.attached import attach  # noqa: PLC0415  (for its parts that need llama.cpp)

        llm, load_base = _timed(_open, self.base)
        load_seconds = {"base": load_base}
        with attach(llm) as adapters:
            for name, file in files.items():
                _, load_seconds[name] = _timed(adapters.load, name, file)
            answers = [_hot_answer(llm, adapters, *row, prompt) for row in _sets(*self.adapters)]
            text = prompt + next(answer.text for answer in answers if answer.weights == first)
            base_logits, hot_logits = (_logits(llm, adapters, names, text) for names in ({}, {first: 1.0}))
        llm.close()

        merged, load_seconds["merged file"] = _timed(_open, merged_file)
        answers.append(_answer(merged, f"merged file ({first})", prompt))
        merged_logits = _evaluate(merged, text)
        merged.close()
        return DemoReport(
            prompt=prompt,
            answers=tuple(answers),
            convert_seconds=convert_seconds,
            load_seconds=load_seconds,
            merge=merge_report,
            kl=kl_divergence(hot_logits, merged_logits),
            kl_base=kl_divergence(hot_logits, base_logits),
        )


def _sets(first: str, second: str) -> tuple[tuple[str, dict[str, float]], ...]:
    """Return the adapter sets that answer, each with its name in the table."""
    return (
        ("base", {}),
        (first, {first: 1.0}),
        (f"{first} at 0.5", {first: 0.5}),
        (f"{first} removed", {}),
        (second, {second: 1.0}),
        (f"{first} + {second}", {first: 1.0, second: 1.0}),
    )


def _hot_answer(llm: Any, adapters: Adapters, weights: str, scales: Mapping[str, float], prompt: str) -> DemoAnswer:  # noqa: ANN401
    _, seconds = _timed(adapters.apply, scales)
    return _answer(llm, weights, prompt, seconds)


def _answer(llm: Any, weights: str, prompt: str, swap_seconds: float | None = None) -> DemoAnswer:  # noqa: ANN401
    reply, seconds = _timed(llm, prompt, max_tokens=MAX_TOKENS, temperature=0.0)
    return DemoAnswer(weights, reply["choices"][0]["text"], swap_seconds, seconds)


def _logits(llm: Any, adapters: Adapters, scales: Mapping[str, float], text: str) -> NDArray[np.float32]:  # noqa: ANN401
    with adapters.using(scales):
        return _evaluate(llm, text)


def _evaluate(llm: Any, text: str) -> NDArray[np.float32]:  # noqa: ANN401
    tokens = llm.tokenize(text.encode(), special=True)
    llm.reset()
    llm.eval(tokens)
    return np.array(llm.scores[: len(tokens)], np.float32)


def _open(path: Path) -> Any:  # noqa: ANN401
    import llama_cpp  # noqa: PLC0415  (optional)

    return llama_cpp.Llama(str(path), n_ctx=256, logits_all=True, seed=0, verbose=False)


def _timed(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> tuple[T, float]:
    started = time.perf_counter()
    return work(*args, **kwargs), time.perf_counter() - started
