"""Ways to combine two real adapters, judged by the held-out loss of both tasks: ``python -m tools.bench combining``.

The model is SmolLM2-135M-Instruct. *shout* and *verse* (rank 4) are those of `tools.make_real_demo`; *code* (rank 16)
is that of `tools.benchmarks.real_adapters`. Every method works on the whole changes and nothing is cut. Methods differ
in the size of their result, so each is scaled to shares of the sum's norm (`SCALES`), and the best one counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer

from gguflora.adapters.adapter import read_adapter
from gguflora.adapters.deltas import LowRank
from gguflora.files.strict_json import to_json
from gguflora.lora.low_rank import values_of
from gguflora.lora.task_arithmetic import combine_arrays
from tools.benchmarks.models import CACHE
from tools.benchmarks.real_adapters import held_out_text, trained
from tools.demo_text import QUESTIONS, Style, answer_for, is_held_out
from tools.make_demo import read_base
from tools.real_demo import HERE, chat_prompt
from tools.real_models import real_model

STYLES = {"shout": Style.SHOUT, "verse": Style.VERSE}
SCALES = (0.5, 0.7, 1.0, 1.4)
DENSITY = 0.5
CODE_TOKENS = 160
Arrays = list[np.ndarray]
Changes = dict[str, np.ndarray]


class Row(NamedTuple):
    """Token ids, and how many of them are not judged."""

    ids: list[int]
    start: int


def della(deltas: Arrays, density: float = DENSITY, spread: float = 0.15) -> np.ndarray:
    """Sum what DELLA keeps (arXiv 2406.11617): the larger a value in its row, the higher its chance to be kept."""
    rng, total = np.random.default_rng(0), np.zeros_like(deltas[0])
    for delta in deltas:
        ranks = np.abs(delta).argsort(axis=1).argsort(axis=1) / (delta.shape[1] - 1)
        chance = density - spread + 2 * spread * ranks
        total += np.where(rng.random(delta.shape) < chance, delta / chance, 0)
    return total


def breadcrumbs(deltas: Arrays, density: float = DENSITY, outliers: float = 0.01) -> np.ndarray:
    """Sum the deltas without their largest and smallest values (arXiv 2312.06795)."""
    total = np.zeros_like(deltas[0])
    for delta in deltas:
        low, high = np.quantile(np.abs(delta), (1 - outliers - density, 1 - outliers))
        total += delta * ((np.abs(delta) >= low) & (np.abs(delta) <= high))
    return total


def sce(deltas: Arrays, density: float = DENSITY) -> np.ndarray:
    """Select by variance, calculate weights by squares, erase minorities (arXiv 2408.07990)."""
    stack = np.stack(deltas)
    variance = stack.var(axis=0)
    stack = stack * (variance >= np.quantile(variance, 1 - density))
    weights = (stack**2).mean(axis=(1, 2))[:, None, None]
    shares = weights * (np.sign(stack) == np.where(stack.sum(axis=0) >= 0, 1, -1))
    mean: np.ndarray = (stack * shares).sum(axis=0) / np.maximum(shares.sum(axis=0), 1e-30)
    return mean


def slerp(deltas: Arrays) -> np.ndarray:
    """Go half the way on the arc between two deltas (Shoemake 1985)."""
    one, two = (delta / max(float(np.linalg.norm(delta)), 1e-30) for delta in deltas)
    size = (np.linalg.norm(deltas[0]) + np.linalg.norm(deltas[1])) / 2
    angle = np.arccos(np.clip(np.vdot(one, two), -1, 1))
    half: np.ndarray = size * np.sin(angle / 2) / max(float(np.sin(angle)), 1e-30) * (one + two)
    return half


def known(method: str, convention: str, deltas: Arrays) -> np.ndarray:
    """Combine as `gguflora combine` does."""
    rng = np.random.default_rng(0)
    return combine_arrays(
        deltas, [1.0] * len(deltas), method, DENSITY, "total", lambda _, shape: rng.random(shape) < DENSITY, convention
    )


METHODS: dict[str, Callable[[Arrays], np.ndarray]] = {
    "sum": lambda deltas: deltas[0] + deltas[1],
    "ties": partial(known, "ties", "peft"),
    "ties-mergekit": partial(known, "ties", "mergekit"),
    "dare_linear": partial(known, "dare_linear", "peft"),
    "dare_ties": partial(known, "dare_ties", "peft"),
    "magnitude_prune": partial(known, "magnitude_prune", "peft"),
    "della": della,
    "breadcrumbs": breadcrumbs,
    "sce": sce,
    "slerp": slerp,
}


def combining(
    pairs: Annotated[str, typer.Option(help="Pairs of adapters: shout, verse, code.")] = "shout+verse,code+verse",
    rows: Annotated[int, typer.Option(min=2, help="Held-out rows of each task.")] = 16,
    methods: Annotated[str, typer.Option(help="Methods, separated by commas.")] = ",".join(METHODS),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results here too.")] = None,
) -> None:
    """Print the losses of both tasks for each method at its best scale, and how far it is from the sum."""
    from transformers import AutoTokenizer

    base = real_model("smollm2")
    tokenizer, model = AutoTokenizer.from_pretrained(base.parent, gguf_file=base.name), read_base(base).eval()
    results = {}
    for pair in pairs.split(","):
        tasks = pair.split("+")
        deltas = [changes(_folder(task, base)) for task in tasks]
        judge = Judge(model, [list(held_out(tokenizer, task, rows)) for task in tasks])
        print(pair, "base alone", _words(judge.losses({})), flush=True)
        for task, delta in zip(tasks, deltas, strict=True):
            print(pair, task, "alone", _words(judge.losses(delta)), flush=True)
        results[pair] = _compare(judge, deltas, methods.split(","), pair)
    if json_file:
        json_file.write_text(to_json(results, indent=1) + "\n", encoding="utf-8")


def _compare(judge: Judge, deltas: list[Changes], methods: list[str], pair: str) -> dict[str, Any]:
    names = list(dict.fromkeys(name for delta in deltas for name in delta))
    both = {name: [delta.get(name, np.zeros_like(_any(deltas, name))) for delta in deltas] for name in names}
    size, reference, found = _norm({name: METHODS["sum"](parts) for name, parts in both.items()}), None, {}
    for method in methods:
        total = {name: METHODS[method](parts) for name, parts in both.items()}
        unit = size / _norm(total)
        tried = {
            scale: judge.losses({name: scale * unit * values for name, values in total.items()}) for scale in SCALES
        }
        scale, best = min(tried.items(), key=lambda item: float(np.concatenate(_weighed(item[1])).mean()))
        reference = best if reference is None else reference
        gaps = np.concatenate([one - two for one, two in zip(_weighed(best), _weighed(reference), strict=True)])
        error = float(gaps.std() / np.sqrt(len(gaps)))
        found[method] = {"losses": [float(task.mean()) for task in best], "scale": scale, "gap": float(gaps.mean())}
        found[method]["error"] = error
        print(f"{pair} {method:16} scale {scale} {_words(best)}; {gaps.mean():+.4f} ± {error:.4f}", flush=True)
    return found


def _weighed(losses: list[np.ndarray]) -> list[np.ndarray]:
    """Losses of rows, such that the mean over all is the mean of the tasks' means."""
    count = sum(map(len, losses))
    return [task * count / (len(losses) * len(task)) for task in losses]


def _words(losses: list[np.ndarray]) -> str:
    means = [float(task.mean()) for task in losses]
    return f"losses {', '.join(f'{mean:.3f}' for mean in means)}; both {np.mean(means):.4f}"


def _any(deltas: list[Changes], name: str) -> np.ndarray:
    return next(delta[name] for delta in deltas if name in delta)


def _norm(change: Changes) -> float:
    return float(np.sqrt(sum(float((values**2).sum()) for values in change.values())))


def _folder(task: str, base: Path) -> Path:
    return HERE / task if task in STYLES else trained(base, task, CACHE / "real-adapters", 100)


def changes(folder: Path) -> Changes:
    """The whole changes of an adapter, by weight."""
    adapter = read_adapter(folder)
    low = {name: delta for name, (delta,) in adapter.deltas.items() if isinstance(delta, LowRank)}
    return {name: values_of(delta).astype(np.float32) for name, delta in low.items()}


def held_out(tokenizer: Any, task: str, count: int) -> Iterator[Row]:
    """Rows that no adapter was trained on: questions with answers, or parts of sources."""
    if task not in STYLES:
        ids = tokenizer(held_out_text(task, tokenizer, 16 * CODE_TOKENS * count), add_special_tokens=False).input_ids
        step = len(ids) // count
        yield from (Row(ids[at * step : at * step + CODE_TOKENS], 1) for at in range(count))
        return
    style = STYLES[task]
    rng = Random(style.name)
    for question in [question for question in QUESTIONS if is_held_out(question, style)][:count]:
        prompt = tokenizer(chat_prompt(question.text), add_special_tokens=False).input_ids
        answer = tokenizer(answer_for(question, style, rng).strip(), add_special_tokens=False).input_ids
        yield Row([*prompt, *answer, tokenizer.eos_token_id], len(prompt))


class Judge:
    """A model that is judged on rows of several tasks."""

    def __init__(self, model: torch.nn.Module, tasks: list[list[Row]]) -> None:
        self._model, self._tasks = model, tasks
        self._parameters = dict(model.named_parameters())
        self._before: dict[str, torch.Tensor] = {}

    def losses(self, change: Changes) -> list[np.ndarray]:
        """The mean loss of the judged tokens of each row, for each task, with a change added to the weights."""
        with torch.no_grad():
            for name, delta in change.items():
                before = self._before.setdefault(name, self._parameters[name].clone())
                self._parameters[name].copy_(before + torch.from_numpy(delta))
            found = [np.array([self._loss(row) for row in rows]) for rows in self._tasks]
            for name in change:
                self._parameters[name].copy_(self._before[name])
        return found

    def _loss(self, row: Row) -> float:
        logits = self._model(torch.tensor([row.ids])).logits[0, row.start - 1 : -1]
        return float(torch.nn.functional.cross_entropy(logits, torch.tensor(row.ids[row.start :])))
