"""``gguflora combine``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

import gguflora
from gguflora.cli.app import app, console, print_report, span
from gguflora.cli.options import AdapterBase, AdapterOut, AsJson, Force, OutType
from gguflora.lora.combine import CombineReport
from gguflora.lora.layer_weights import Weight, describe_weight, parse_weight

Method = Literal[
    "cat",
    "svd",
    "linear",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_ties",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]


@app.command()
def combine(
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER[:WEIGHT]...", help="PEFT directories and GGUF LoRA files, with weights."),
    ],
    out: AdapterOut,
    method: Annotated[
        Method, typer.Option(help="cat: the exact sum, of all ranks. svd: its best approximation. Others as in PEFT.")
    ] = "cat",
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of the result, for methods with svd.")] = None,
    density: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Share of the values that ties, dare and prune keep.")
    ] = None,
    sign: Annotated[
        Literal["total", "frequency"] | None, typer.Option(help="How ties chooses a sign; total by default.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed for the values that dare drops; 0 by default.")] = None,
    ties: Annotated[
        Literal["peft", "mergekit"] | None,
        typer.Option(help="Whose ties and dare: signs elected before (peft, the default) or after weighting."),
    ] = None,
    base: AdapterBase = None,
    outtype: OutType = "auto",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Combine adapters into one, by default into their exact weighted sum. Weights may be negative.

    A weight is a number, a gradient over the layers (0,0.5,1), or either by pattern of names ('*mlp*=0.5;*=0,1').

    **Examples**

    gguflora combine legal.gguf tone.gguf:0.5 -o both.gguf

    gguflora combine legal.gguf tone.gguf:0.5 -o both.gguf --method svd --rank 16

    gguflora combine ./legal ./tone:-0.3 -o ./both --method ties_svd --density 0.5 --rank 16

    gguflora combine ./legal ./tone:0.5 -o ./both --method ties_svd --ties mergekit --density 0.5 --rank 16

    gguflora combine ./legal:1,0.5,0 './tone:*self_attn*=0;*=0,1' -o ./both
    """
    report = gguflora.combine(
        [_split_weight(text) for text in adapters],
        out,
        method=method,
        rank=rank,
        density=density,
        sign=sign,
        seed=seed,
        ties=ties,
        base=base,
        outtype=outtype,
        force=force,
    )
    print_report(report, _print_combination, as_json=as_json)


def _print_combination(report: CombineReport) -> None:
    combined = " + ".join(f"{name} x {describe_weight(weight)}" for name, _, weight in report.adapters)
    console.print(
        f"wrote {report.output}: {report.method} of {combined}; {report.tensors} changes, {span(report.ranks)}, "
        f"{report.size / 1e6:.2f} MB",
        markup=False,
    )
    if report.relative_error is not None:
        console.print(
            f"relative error by the lower rank {report.relative_error:.2g}, "
            f"at most {max(report.errors.values()):.2g} of a change",
            markup=False,
        )


def _split_weight(text: str) -> tuple[str, Weight]:
    """Split ADAPTER:WEIGHT; the weight is 1 by default, and the path may contain colons."""
    path, _, weight = text.rpartition(":")
    if not path or Path(text).exists():
        return text, 1.0
    try:
        return path, parse_weight(weight)
    except ValueError:
        return text, 1.0
