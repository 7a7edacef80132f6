"""What merges keep of real adapters: the models' answers in llama.cpp, with 95 % intervals.

A real model (or the small llama of ``small_llama.py``), adapters that PEFT trained on it (``real_adapters.py``), and
for each type of the base the merges that `gguflora.compare` makes with ``--all``: nearest, adaptive, calibrated on the
built-in text. They are judged on held-out text of the adapter's domain and on other text. ``predicted`` is what the
adaptive merge's report predicts of its noise; below the table stands how well that ranks the measured divergences.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import gguflora
from gguflora import quants
from gguflora.architectures.base_model import read_whole_base
from gguflora.diagnostics.comparison import TextComparison
from gguflora.diagnostics.side_by_side import measure, summed_up, windows_of_text
from gguflora.errors import QuantizationError
from gguflora.files.gguf import GgufFile, TensorEntry
from gguflora.files.strict_json import to_json
from gguflora.quants import kernels
from gguflora.runtime.adapter_files import AdapterReading
from gguflora.runtime.logits import LogitsModel
from gguflora.system.cpus import thread_count
from tools.benchmarks import real_adapters
from tools.real_models import real_model

AS_IT_IS = "file"
NORMAL = 1.96
STEPS = {"smollm2": 100, "gemma3": 60}
ROUNDINGS = ("nearest", "adaptive", "calibrated")
FLOOR = "hot x 1.0003"
WINDOW = 256


@dataclass(frozen=True)
class RealCell:
    """One model, type, adapter, text and rounding; half widths of 95 % intervals beside the numbers.

    ``kept`` and its half width are None where the hot adapter gains nothing on this text.
    """

    model: str
    type: str
    adapter: str
    text: str
    rounding: str
    positions: int
    strength: float
    delta_per_step: float | None
    predicted_noise: float | None
    snr_db: float | None
    kl: float
    kl_half: float
    kl_base: float
    kept: float | None
    kept_half: float | None
    ratio: float
    ratio_half: float

    @property
    def relative_noise(self) -> float:
        """The norm of the adaptive merge's noise over that of the weights."""
        return self.strength * 10 ** (-(self.snr_db or 0.0) / 20)


def with_noise(source: Path, target: Path) -> Path:
    """The model in F32, its quantized weights moved by up to half a step: a model that lies on no grid.

    A model that was quantized and dequantized comes back unchanged from its own type, and nearly so from others.
    """
    import gguf

    reader, random = gguf.GGUFReader(source), np.random.default_rng(0)
    with GgufFile(source) as file:
        writer = gguf.GGUFWriter(target, str(file.metadata["general.architecture"]))
        for name, entry in reader.fields.items():
            if not name.startswith(("GGUF.", "general.architecture", "general.file_type")):
                writer.add_key_value(name, entry.contents(), entry.types[0], entry.types[-1])
        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, _off_the_grid(file, file.tensors[tensor.name], random))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _off_the_grid(file: GgufFile, tensor: TensorEntry, random: np.random.Generator) -> np.ndarray:
    rows = file.read_rows(tensor, 0, tensor.n_rows)
    values = quants.dequantize(rows, tensor.type)
    if kernels.has_steps(tensor.type):
        steps = np.array([kernels.mean_step(rows[row : row + 1], tensor.type) for row in range(len(rows))])
        values = values + random.uniform(-0.5, 0.5, values.shape).astype(np.float32) * steps[:, None].astype(np.float32)
    return np.ascontiguousarray(values.reshape(tensor.shape), dtype=np.float32)


def cells_of(
    base: Path,
    adapter: Path,
    texts: Sequence[Path],
    names: tuple[str, str, str],
    scale: float = 1.0,
    threads: int | None = None,
) -> Iterator[RealCell]:
    """Judge the three merges of one adapter; names are those of the model, the type and the adapter.

    A fourth row of each text, `FLOOR`, is the hot adapter at a scale that differs by 0.03 %: what llama.cpp's rounding
    of activations makes of the smallest change, and so the least that a merge can differ by.
    """
    with tempfile.TemporaryDirectory(prefix="gguflora-") as folder:
        merged = {rounding: Path(folder) / f"{rounding}.gguf" for rounding in ROUNDINGS}
        pair = (adapter, scale)
        gguflora.merge(base, [pair], merged["nearest"], rounding="nearest", threads=threads)
        total = gguflora.merge(base, [pair], merged["adaptive"], threads=threads).total
        try:
            gguflora.merge(base, [pair], merged["calibrated"], calibrate=True, threads=threads)
        except QuantizationError:  # no tensor of the file has a type that is calibrated
            del merged["calibrated"]
        found = list(_judged(base, pair, merged, texts, thread_count(threads)))
    for label, text in zip(("domain", "other"), found, strict=True):
        for rounding in (*merged, FLOOR):
            divergence, ratio = text.divergences[rounding], text.perplexity_ratios[rounding]
            kept = text.kept.get(rounding)
            yield RealCell(
                *names,
                label,
                rounding,
                text.positions,
                total.relative_change or 0.0,
                total.delta_per_step,
                total.predicted_noise,
                total.snr_db,
                divergence.kl,
                NORMAL * divergence.error,
                text.divergences["base"].kl,
                None if kept is None else kept.value,
                None if kept is None else NORMAL * kept.error,
                ratio.value,
                NORMAL * ratio.error,
            )


def _judged(
    base: Path, adapter: tuple[Path, float], merged: Mapping[str, Path], texts: Sequence[Path], threads: int
) -> Iterator[TextComparison]:
    """Evaluate each text with the base, the hot adapter, the same a little stronger, and merged files."""
    (path, scale), contexts = adapter, {}
    lora = AdapterReading().open(path, read_whole_base(base)).file
    with ExitStack() as models:
        model = models.enter_context(LogitsModel(base, threads))
        for name, loras in {"hot": [(lora, scale)], "base": [], FLOOR: [(lora, scale * 1.0003)]}.items():
            contexts[name] = model.context(WINDOW, loras)
        for name, file in merged.items():
            contexts[name] = models.enter_context(LogitsModel(file, threads)).context(WINDOW)
        for text in texts:
            windows = windows_of_text(model.tokenize(text.read_bytes()), model.first_tokens, WINDOW)
            yield summed_up(text.name, measure(list(windows), contexts))


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's: 1 where both rank alike."""
    ranks = np.array([np.argsort(np.argsort(values)) for values in (x, y)], np.float64)
    return float(np.asarray(np.corrcoef(ranks))[0, 1])


def quality_of_predictions(cells: Sequence[RealCell]) -> Iterator[str]:
    """How well the noise of adaptive merges predicts what they were measured to do.

    ``predicted_noise`` is in units of the base's quantization error, so it can rank merges into one type alone;
    ``relative_noise`` is in units of the weights.
    """
    for text in ("domain", "other"):
        some = [cell for cell in cells if (cell.rounding, cell.text) == ("adaptive", text) and cell.predicted_noise]
        if len(some) < 3:
            continue
        kl, relative = [cell.kl for cell in some], [cell.relative_noise for cell in some]
        ranks = rank_correlation([cell.predicted_noise or 0 for cell in some], kl), rank_correlation(relative, kl)
        nats = sorted(cell.kl / cell.relative_noise**2 for cell in some)
        yield (
            f"{len(some)} adaptive merges on {text} text: rank correlation of their KL with predicted_noise "
            f"{ranks[0]:.2f}, with relative_noise {ranks[1]:.2f}; KL over relative_noise squared {nats[0]:.0f} to "
            f"{nats[-1]:.0f}, median {np.median(nats):.0f}"
        )


def table_of(cells: Sequence[RealCell]) -> Table:
    """The README's table."""
    table = Table(title="KL divergence from the hot adapter, nats x 1e3; gain kept; perplexity over the hot adapter's")
    for heading in ("type", "adapter", "|change|/|W|", "text", "merge", "KL", "kept", "perplexity", "predicted"):
        table.add_column(heading, justify="left" if heading in {"type", "adapter", "text", "merge"} else "right")
    for cell in cells:
        kept = "-" if cell.kept is None else f"{cell.kept:.0%} ± {cell.kept_half:.0%}"
        table.add_row(
            cell.type,
            cell.adapter,
            f"{cell.strength:.2%}",
            cell.text,
            cell.rounding,
            f"{cell.kl * 1e3:.3g} ± {cell.kl_half * 1e3:.1g}",
            kept,
            f"{cell.ratio:.3f} ± {cell.ratio_half:.3f}",
            "" if cell.predicted_noise is None else f"{cell.predicted_noise:.2f}",
        )
    return table


def _texts(adapter: str, base: Path, characters: int, folder: Path) -> list[Path]:
    import transformers

    tokenizer = None
    if adapter == "chat":
        tokenizer = transformers.AutoTokenizer.from_pretrained(base.parent, gguf_file=base.name)
    contents = real_adapters.held_out_text(adapter, tokenizer, characters), real_adapters.general_text(characters)
    paths = [folder / f"{adapter}-domain.txt", folder / f"{adapter}-other.txt"]
    for path, content in zip(paths, contents, strict=True):
        path.write_text(content, encoding="utf-8")
    return paths


def _small_llama(folder: Path, scratch: Path, characters: int) -> tuple[Path, dict[str, tuple[Path, list[Path]]]]:
    """The small llama, whose rows are multiples of 256; its adapters with their texts."""
    from random import Random

    from tools import make_demo
    from tools.benchmarks.held_out import held_out_samples
    from tools.benchmarks.small_llama import ADAPTERS, trained

    home = trained(folder)
    found = {}
    for adapter in ADAPTERS:
        mixes = (make_demo.SHOUT_MIX if adapter == "shout" else make_demo.VERSE_MIX), make_demo.BASE_MIX
        paths = [scratch / f"{adapter}-{number}.txt" for number in range(2)]
        for path, mix in zip(paths, mixes, strict=True):
            samples = ["".join(sample) for sample in held_out_samples(mix)]
            Random(make_demo.SEED).shuffle(samples)
            path.write_text("\n".join(samples)[:characters], encoding="utf-8")
        found[adapter] = (home / adapter, paths)
    return home / "F32.gguf", found


def measure_real(
    model: str,
    types: Sequence[str],
    adapters: Sequence[str],
    scale: float,
    characters: int,
    folder: Path,
    json_file: Path | None,
    *,
    resume: bool = False,
) -> None:
    """Print the table of a model: ``smollm2``, ``gemma3`` or ``trained``; resumed, with the cells of the JSON file."""
    cells = read_cells(json_file) if resume and json_file and json_file.exists() else []
    done = {(cell.model, cell.type, cell.adapter) for cell in cells}
    with tempfile.TemporaryDirectory(prefix="gguflora-") as scratch:
        if model == "trained":
            precise, found = _small_llama(folder, Path(scratch), characters)
            file = None
        else:
            file, precise = real_model(model), Path(scratch) / "precise.gguf"
            home = folder / "real-adapters"
            found = {
                name: (
                    real_adapters.trained(file, name, home, STEPS[model]),
                    _texts(name, file, characters, Path(scratch)),
                )
                for name in adapters
            }
        for type_name in types:
            left = [name for name in found if (model, type_name, name) not in done]
            if not left:
                continue
            base = file
            if base is None or type_name != AS_IT_IS:
                base = Path(scratch) / f"{type_name}.gguf"
                if file and not precise.exists():
                    with_noise(file, precise)
                gguflora.quantize(precise, base, type_name, force=True)
            for name in left:
                cells += cells_of(base, *found[name], (model, type_name, name), scale)
                if json_file:
                    json_file.write_text(to_json([asdict(cell) for cell in cells], indent=1) + "\n", encoding="utf-8")
    console = Console(width=150)
    console.print(table_of(cells))
    for line in quality_of_predictions(cells):
        console.print(line)


def read_cells(path: Path) -> list[RealCell]:
    """The cells of a JSON file that `measure_real` wrote."""
    return [RealCell(**cell) for cell in json.loads(path.read_text(encoding="utf-8"))]
