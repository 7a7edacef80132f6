"""The command line: options in, one function of the library called, its report printed."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

import gguflora
from gguflora.convert import ConvertReport
from gguflora.doctor import describe_machine
from gguflora.errors import GgufloraError
from gguflora.inspect import InspectReport
from gguflora.merge import MergeReport
from gguflora.rewrite import Progress as ProgressCallback

if TYPE_CHECKING:
    from gguflora.demo import DemoReport

app = typer.Typer(
    help="LoRA for GGUF: convert PEFT adapters, merge them into quantized models, hot-swap them at run time.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
_out = Console(soft_wrap=True, highlight=False)
if not _out.is_terminal:
    _out.width = max(_out.width, 110)  # for tables in pipes and files
_err = Console(stderr=True, soft_wrap=True, highlight=False)

INTERRUPTED: Final = 130
OutType = Literal["auto", "f32", "f16", "bf16", "q8_0"]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        print(f"gguflora {gguflora.__version__}")
        raise typer.Exit


@app.command()
def convert(
    adapter: Annotated[Path, typer.Argument(help="PEFT adapter directory (or a GGUF LoRA file, to store it again).")],
    base: Annotated[Path, typer.Option(help="Base model: a GGUF file, or a directory with config.json.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="GGUF LoRA file to write.")],
    outtype: Annotated[
        OutType, typer.Option(help="Type of the stored factors; auto: f16 where that is exact, else f32.")
    ] = "auto",
    rank: Annotated[
        int | None, typer.Option(min=1, help="Approximate changes that are not of this rank by the closest that are.")
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="The same, with the lowest rank that keeps this share, for example 0.999."),
    ] = None,
    scale: Annotated[float, typer.Option(help="Multiply the adapter's change.")] = 1.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the output file.")] = False,
) -> None:
    """Convert a PEFT adapter into a GGUF LoRA file for llama.cpp.

    Needs no torch and no Hugging Face model: names, shapes and head counts come from the base's GGUF file.

    **Examples**

    gguflora convert ./my-adapter --base model-Q4_K_M.gguf -o my-adapter.gguf

    gguflora convert ./my-adapter --base model.gguf -o small.gguf --outtype q8_0

    gguflora convert ./my-dora --base model.gguf -o my-dora.gguf --rank 64
    """
    if rank is not None and energy is not None:
        raise typer.BadParameter("give --rank or --energy, not both")
    _print_conversion(
        gguflora.convert(
            adapter,
            base,
            out,
            outtype=outtype,
            rank=rank,
            energy=energy,
            scale=scale,
            dry_run=dry_run,
            force=force,
        )
    )


@app.command()
def merge(
    base: Annotated[Path, typer.Argument(help="Base model, a GGUF file of any quantization.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Merged GGUF file to write.")],
    lora: Annotated[list[str] | None, typer.Option(help="Adapter: PEFT directory or GGUF LoRA. Repeatable.")] = None,
    lora_scaled: Annotated[
        list[str] | None, typer.Option(metavar="PATH:SCALE", help="Adapter with a scale of its own. Repeatable.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="Threads; by default one for each core.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the output file.")] = False,
) -> None:
    """Merge adapters into a quantized GGUF file; every tensor keeps its type, untouched ones keep their bytes.

    **Examples**

    gguflora merge model-Q4_K_M.gguf --lora ./my-adapter -o merged-Q4_K_M.gguf

    gguflora merge model-Q8_0.gguf --lora legal.gguf --lora-scaled tone.gguf:0.5 -o merged.gguf
    """
    adapters = [(path, 1.0) for path in lora or ()] + [_split_scale(text) for text in lora_scaled or ()]
    if not adapters:
        raise typer.BadParameter("give at least one adapter with --lora or --lora-scaled")
    with _progress_bar("merging") as progress:
        report = gguflora.merge(base, adapters, out, threads=threads, dry_run=dry_run, force=force, progress=progress)
    _print_merge(report)


@app.command()
def inspect(
    adapter: Annotated[Path, typer.Argument(help="PEFT or mlx-lm adapter directory, or GGUF LoRA file.")],
    base: Annotated[Path | None, typer.Option(help="Base model: measure the changes, foresee llama.cpp's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Say what an adapter is, what it changes, and what llama.cpp could not apply at run time.

    **Examples**

    gguflora inspect ./my-adapter

    gguflora inspect ./my-adapter --base model-Q4_K_M.gguf --json
    """
    report = gguflora.inspect(adapter, base)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        _print_inspection(report)


@app.command()
def demo(
    keep: Annotated[Path | None, typer.Option(help="Directory to keep the demo's GGUF files in.")] = None,
) -> None:
    """Convert, merge and hot-swap two small adapters on an embedded model (needs llama-cpp-python).

    **Example**

    gguflora demo --keep ./demo-files
    """
    from gguflora.demo import run_demo  # noqa: PLC0415  (nothing else needs it)

    if keep:
        keep.mkdir(parents=True, exist_ok=True)
        _print_demo(run_demo(keep))
        _out.print(f"\nThe files are in {keep}", markup=False)
        return
    with tempfile.TemporaryDirectory(prefix="gguflora-demo-") as folder:
        _print_demo(run_demo(Path(folder)))


@app.command()
def doctor() -> None:
    """Say what this machine offers and what is installed.

    **Example**

    gguflora doctor
    """
    for line in describe_machine():
        _out.print(line, markup=False)


def _split_scale(text: str) -> tuple[str, float]:
    path, _, scale = text.rpartition(":")
    try:
        return path, float(scale) if path else _refuse_scale(text)
    except ValueError:
        _refuse_scale(text)


def _refuse_scale(text: str) -> NoReturn:
    raise typer.BadParameter(f"--lora-scaled is {text!r}, expected PATH:SCALE, for example adapter.gguf:0.5")


@contextmanager
def _progress_bar(title: str) -> Iterator[ProgressCallback | None]:
    """A bar on stderr while the block runs; None where stderr is no terminal."""
    if not _err.is_terminal:
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_err, transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print_warnings(warnings: tuple[str, ...]) -> None:
    for warning in warnings:
        _err.print(f"warning: {warning}", markup=False)


def _print_conversion(report: ConvertReport) -> None:
    _print_warnings(report.warnings)
    low, high = report.ranks
    rank = f"rank {low}" if low == high else f"ranks {low} to {high}"
    scale = f"alpha {report.alpha:g}" if report.alpha else "factors folded into B (alpha 0)"
    types = ", ".join(f"{count} {name}" for name, count in report.types.items())
    verb = "would write" if report.dry_run else "wrote"
    _out.print(
        f"{verb} {report.output}: adapter {report.adapter!r} for {report.architecture}, {report.tensors} tensors, "
        f"{rank}, {scale}, factors {types}, {report.size / 1e6:.2f} MB",
        markup=False,
    )
    if report.errors:
        worst = max(report.errors.values())
        _out.print(f"approximated {len(report.errors)} changes, relative error at most {worst:.2g}:", markup=False)
        for name, error in sorted(report.errors.items(), key=lambda item: -item[1]):
            _out.print(f"  {name}: {error:.2g}", markup=False)


def _print_inspection(report: InspectReport) -> None:
    _print_warnings(report.warnings)
    _out.print(
        f"{report.adapter}: {report.method}, {len(report.changes)} tensors changed, {report.size / 1e6:.2f} MB",
        markup=False,
    )
    if report.invocation_tokens:
        _out.print(f"activated by the tokens {', '.join(map(str, report.invocation_tokens))}", markup=False)
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("tensor", "shape", "rank", "factor", "norm", "relative", "problem at run time"):
        table.add_column(title)
    for change in report.changes:
        shape = "x".join(map(str, change.shape or ())) or "?"
        numbers = (change.rank, change.factor, change.norm, change.relative)
        cells = ("-" if number is None else f"{number:.4g}" for number in numbers)
        table.add_row(escape(change.name), shape, *cells, escape(change.problem or ""))
    _out.print(table)
    if report.problems:
        _out.print(f"{report.problems} of {len(report.changes)} changes cannot be applied at run time", markup=False)


def _print_merge(report: MergeReport) -> None:
    _print_warnings(report.warnings)
    merged = ", ".join(f"{name} x {scale:g}" for name, _, scale in report.adapters)
    types = ", ".join(f"{count} {name}" for name, count in report.tensors.items()) or "none"
    verb = "would write" if report.dry_run else "wrote"
    _out.print(
        f"{verb} {report.output}: {merged}; {sum(report.tensors.values())} tensors changed ({types}), "
        f"{report.weights / 1e6:.1f} M weights, {report.size / 1e6:.1f} MB",
        markup=False,
    )
    if not report.dry_run:
        rate = report.weights_per_second / 1e6
        _out.print(f"took {report.seconds:.2f} s on {report.threads} threads, {rate:.0f} M weights/s", markup=False)


def _print_demo(report: DemoReport) -> None:
    _out.print(f"Prompt: {report.prompt!r}\n", markup=False)
    table = Table(box=box.SIMPLE_HEAD, show_lines=True)
    for title in ("weights", "answer (greedy)", "swap", "answer time"):
        table.add_column(title, justify="right" if "time" in title or title == "swap" else "left")
    for answer in report.answers:
        swap = "" if answer.swap_seconds is None else f"{answer.swap_seconds * 1e3:.2f} ms"
        table.add_row(answer.weights, escape(answer.text.strip()), swap, f"{answer.answer_seconds:.2f} s")
    _out.print(table)
    for name, seconds in report.convert_seconds.items():
        _out.print(f"convert {name}: {seconds * 1e3:.0f} ms")
    for name, seconds in report.load_seconds.items():
        _out.print(f"load {name}: {seconds * 1e3:.0f} ms")
    merged = report.merge
    _out.print(
        f"merge {merged.adapters[0][0]} into {', '.join(merged.tensors)}: {merged.seconds * 1e3:.0f} ms "
        f"({merged.weights / 1e6:.1f} M weights)"
    )
    _out.print(
        f"KL divergence from the hot adapter, nats per token: merged file {report.kl:.1e}, base {report.kl_base:.1e}"
    )


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


def _stop(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> None:
    """Run the command line: exit code 0, 1 for an error, 2 for wrong usage, 130 when interrupted."""
    signal.signal(signal.SIGTERM, _stop)  # so that a terminated merge removes its temporary file
    try:
        app(prog_name="gguflora")
    except GgufloraError as error:
        _fail(str(error))
    except MemoryError:
        _fail("not enough memory")
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except SystemExit as stop:
        if stop.code == INTERRUPTED:  # typer has turned KeyboardInterrupt into this
            print("interrupted; nothing was written", file=sys.stderr)
        raise
