"""Does the adapter survive the merge? ``python -m tools.bench fidelity [--types Q4_K,Q2_K] [--scales 1,0.1]``.

A small llama and two adapters are trained once (torch, minutes), and the llama is quantized to each type. For each
adapter at each scale, four models are held against the quantized base with the adapter hot: that base alone, a naive
merge (nearest rounding), the adaptive merge (mean of some seeds, and their spread), and the ideal, which had the
weights before they were quantized. Shown are the KL divergence from the hot adapter on held-out answers, and the share
of the loss that the hot adapter gains over the base which the merge keeps.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import gguf
import typer
from gguf import GGMLQuantizationType as Kind
from rich.console import Console
from rich.table import Table

import gguflora
from gguflora import quants
from gguflora.files.strict_json import to_json
from tools.benchmarks.fidelity_real import AS_IT_IS, STEPS, measure_real
from tools.benchmarks.models import CACHE

if TYPE_CHECKING:
    from tools.benchmarks.held_out import Predictions

TYPES = (
    *(
        "F16",
        "BF16",
        "Q8_0",
        "Q6_K",
        "Q5_K",
        "Q5_1",
        "Q5_0",
        "Q4_K",
        "Q4_1",
        "Q4_0",
        "IQ4_NL",
        "IQ4_XS",
        "MXFP4",
        "NVFP4",
    ),
    *("Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S", "IQ1_M"),
)
EMBEDDINGS = ("token_embd.weight", "output.weight")


@dataclass(frozen=True)
class Cell:
    """One type, adapter and scale: KL divergences from the hot adapter in nats, and shares of its gain that are kept.

    Mean and standard deviation of the adaptive merge over the seeds.
    """

    type: str
    adapter: str
    scale: float
    gain: float
    kl_base: float
    kl_naive: float
    kl_adaptive: float
    kl_adaptive_spread: float
    kl_ideal: float
    kept_naive: float
    kept_adaptive: float
    kept_adaptive_spread: float
    kept_ideal: float

    def misses(self) -> Iterator[str]:
        """The goals that this cell misses."""
        if self.kept_naive < 0.95 and self.kl_adaptive > self.kl_naive / 5:
            yield f"KL {self.kl_adaptive:.2e} is more than a fifth of naive's {self.kl_naive:.2e}"
        if not 0.95 <= self.kept_adaptive <= 1.05:
            yield f"keeps {self.kept_adaptive:.1%} (spread {self.kept_adaptive_spread:.1%}) of the gain"
        if self.kl_adaptive - 2 * self.kl_adaptive_spread > self.kl_naive * 1.02:
            yield f"KL {self.kl_adaptive:.2e} is worse than naive's {self.kl_naive:.2e}"


def quantize_model(source: Path, target: Path, kind: Kind) -> Path:
    """A model with its matrices in one type, by gguflora's kernels (ggml's bytes), embeddings at least in Q8_0."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for name, entry in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture", "general.file_type")):
            writer.add_key_value(name, entry.contents(), entry.types[0], entry.types[-1])
    for tensor in reader.tensors:
        matrix = len(tensor.shape) == 2
        as_kind = Kind.Q8_0 if tensor.name in EMBEDDINGS and kind not in (Kind.F16, Kind.BF16, Kind.F32) else kind
        stored = quants.quantize(tensor.data, as_kind) if matrix else tensor.data
        writer.add_tensor(tensor.name, stored, raw_dtype=as_kind if matrix else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


class Experiment:
    """Cells of one adapter."""

    def __init__(self, home: Path, adapter: str, samples: int, seeds: int, scratch: Path) -> None:
        from tools.benchmarks.held_out import HeldOut

        self._precise = home / "F32.gguf"
        self._adapter = home / adapter
        self._held_out = HeldOut(home, adapter, samples)
        self._seeds = range(seeds)
        self._scratch = scratch

    def cells(self, kind: Kind, base: Path, scales: list[float]) -> Iterator[Cell]:
        """One for each scale."""
        from tools.benchmarks.held_out import add_adapter

        weights = self._held_out.weights_of(base)
        plain = self._held_out.predict(weights)
        for scale in scales:
            hot = self._held_out.predict(add_adapter(weights, self._adapter, scale))
            naive = self._judge(base, scale, plain, hot, rounding="nearest")
            ideal = self._judge(base, scale, plain, hot, rounding="nearest", base_f16=self._precise)
            adaptive = [self._judge(base, scale, plain, hot, rounding="adaptive", seed=seed) for seed in self._seeds]
            kls, kept = zip(*adaptive, strict=True)
            yield Cell(
                type=kind.name,
                adapter=self._adapter.name,
                scale=scale,
                gain=plain.loss - hot.loss,
                kl_base=hot.divergence_of(plain),
                kl_naive=naive[0],
                kl_adaptive=statistics.mean(kls),
                kl_adaptive_spread=statistics.stdev(kls) if len(kls) > 1 else 0.0,
                kl_ideal=ideal[0],
                kept_naive=naive[1],
                kept_adaptive=statistics.mean(kept),
                kept_adaptive_spread=statistics.stdev(kept) if len(kept) > 1 else 0.0,
                kept_ideal=ideal[1],
            )

    def _judge(
        self, base: Path, scale: float, plain: Predictions, hot: Predictions, **options: Any
    ) -> tuple[float, float]:
        """A merge's divergence from the hot adapter, and the share of the gain that it keeps."""
        out = self._scratch / "merged.gguf"
        gguflora.merge(base, [(self._adapter, scale)], out, force=True, **options)
        merged = self._held_out.predict(self._held_out.weights_of(out))
        return hot.divergence_of(merged), (plain.loss - merged.loss) / (plain.loss - hot.loss)


def _table(cells: list[Cell]) -> Table:
    table = Table(title="KL divergence from the hot adapter, nats x 1e3; share of its gain that is kept")
    for heading in ("type", "adapter", "scale", "base", "naive", "", "adaptive", "", "ideal", "", "naive / adaptive"):
        table.add_column(heading, justify="left" if heading in {"type", "adapter"} else "right")
    for cell in cells:
        table.add_row(
            cell.type,
            cell.adapter,
            f"{cell.scale:g}",
            f"{cell.kl_base * 1e3:.3g}",
            f"{cell.kl_naive * 1e3:.3g}",
            f"{cell.kept_naive:.1%}",
            f"{cell.kl_adaptive * 1e3:.3g} ± {cell.kl_adaptive_spread * 1e3:.1g}",
            f"{cell.kept_adaptive:.1%}",
            f"{cell.kl_ideal * 1e3:.3g}",
            f"{cell.kept_ideal:.1%}",
            f"{cell.kl_naive / cell.kl_adaptive:.1f}x",
        )
    return table


def fidelity(
    types: Annotated[
        str | None,
        typer.Option(help="Quant types, or presets of a real model ('file': as it is), separated by commas."),
    ] = None,
    scales: Annotated[
        str | None, typer.Option(help="Scales of the adapters, separated by commas; one for a real model.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of the adaptive merge.")] = 3,
    samples: Annotated[int, typer.Option(min=1, help="Held-out answers of each adapter.")] = 120,
    model: Annotated[
        str | None,
        typer.Option(
            help="smollm2, gemma3 or trained: judge merges in llama.cpp. Or a directory with F32.gguf and the "
            "adapters, instead of a model trained here."
        ),
    ] = None,
    adapters: Annotated[str, typer.Option(help="Adapters of a real model, separated by commas.")] = "code,chat,style",
    characters: Annotated[int, typer.Option(min=500, help="Length of each text for a real model.")] = 8000,
    folder: Annotated[Path, typer.Option(help="Where the trained model is kept.")] = CACHE,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results here too.")] = None,
    resume: Annotated[bool, typer.Option(help="Keep the cells that the JSON file of a real model has.")] = False,
) -> None:
    """Train a small llama and two adapters; measure what merges into each quant type keep of them."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads would starve each other on a busy machine
    from tools.benchmarks.small_llama import ADAPTERS, trained

    if model in {*STEPS, "trained"}:
        wanted = types or ("Q4_K_M,Q3_K_M,IQ4_XS" if model == "trained" else AS_IT_IS)
        scale = float(scales or (0.05 if model == "trained" else 1))
        lists = wanted.split(","), adapters.split(",")
        measure_real(str(model), *lists, scale, characters, folder, json_file, resume=resume)
        return
    home = trained(folder) if model is None else Path(model)
    cells: list[Cell] = []
    wanted_scales = [float(scale) for scale in (scales or "1,0.5,0.25,0.1").split(",")]
    with tempfile.TemporaryDirectory(prefix="gguflora-") as scratch:
        experiments = [Experiment(home, adapter, samples, seeds, Path(scratch)) for adapter in ADAPTERS]
        for kind in (Kind[name] for name in (types or ",".join(TYPES)).split(",")):
            base = quantize_model(home / "F32.gguf", Path(scratch) / f"{kind.name}.gguf", kind)
            for experiment in experiments:
                for cell in experiment.cells(kind, base, wanted_scales):
                    cells.append(cell)
                    print(cell, file=sys.stderr, flush=True)
            if json_file:
                json_file.write_text(to_json([asdict(cell) for cell in cells], indent=1) + "\n", encoding="utf-8")
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(_table(cells))
    missed = [f"{cell.type} {cell.adapter} x {cell.scale:g}: {what}" for cell in cells for what in cell.misses()]
    console.print(f"{len(missed)} goals missed in {len(cells)} cells", *missed, sep="\n", highlight=False)
