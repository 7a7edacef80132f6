"""``gguflora resize``."""

from __future__ import annotations

from typing import Annotated

import typer

import gguflora
from gguflora.cli.app import app, console, print_errors, print_report
from gguflora.cli.options import AdapterBase, AdapterOut, AsJson, Force, OutType, Threads
from gguflora.lora.resize import ResizeReport


@app.command()
def resize(
    adapter: Annotated[str, typer.Argument(help="PEFT adapter directory or GGUF LoRA file.")],
    out: AdapterOut,
    rank: Annotated[int | None, typer.Option(min=1, help="Highest rank of a delta.")] = None,
    energy: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Keep this share of each delta's squared norm, say 0.99.")
    ] = None,
    sv_ratio: Annotated[
        float | None, typer.Option(min=1.0, help="Keep the singular values above the largest one divided by this.")
    ] = None,
    sv_fro: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Keep this share of each delta's Frobenius norm.")
    ] = None,
    max_loss: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="Take the lowest rank that raises the loss on --text by at most so many nats a token."
        ),
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(metavar="PATH", help="Text to measure the loss on, for --max-loss. Repeatable.")
    ] = None,
    threads: Threads = None,
    base: AdapterBase = None,
    outtype: OutType = "auto",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write the closest adapter of a lower rank, and report the error of each delta.

    **Examples**

    gguflora resize my-adapter.gguf --rank 8 -o small.gguf

    gguflora resize ./my-adapter --energy 0.99 -o ./my-smaller-adapter

    gguflora resize ./my-adapter --max-loss 0.01 --text held-out.txt --base model.gguf -o small.gguf
    """
    chosen = {"rank": rank, "energy": energy, "sv_ratio": sv_ratio, "sv_fro": sv_fro, "max_loss": max_loss}
    if len([name for name, value in chosen.items() if value is not None]) != 1:
        raise typer.BadParameter("give one of --rank, --energy, --sv-ratio, --sv-fro and --max-loss")
    report = gguflora.resize(
        adapter,
        out,
        rank=rank,
        energy=energy,
        sv_ratio=sv_ratio,
        sv_fro=sv_fro,
        max_loss=max_loss,
        text=text,
        threads=threads,
        base=base,
        outtype=outtype,
        force=force,
    )
    print_report(report, _print_resized, as_json=as_json)


def _print_resized(report: ResizeReport) -> None:
    low, high = report.ranks
    console.print(
        f"wrote {report.output}: {report.tensors} changes, ranks {report.old_ranks[0]} to {report.old_ranks[1]} "
        f"before, {low} to {high} now, {report.old_size / 1e6:.2f} MB before, {report.size / 1e6:.2f} MB now",
        markup=False,
    )
    for name, loss in report.losses.items():
        label = {"base": "the base alone", "whole": "the adapter as it was"}.get(name, f"rank {name}")
        more = "" if label != f"rank {name}" else f" ({loss - report.losses['whole']:+.4f})"
        console.print(f"loss with {label}: {loss:.4f} nats a token{more}", markup=False)
    print_errors(report.errors)
