"""What every command shares: the typer application, the consoles, the progress bar, the way an error ends."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Final, NoReturn, Protocol

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from gguflora._version import __version__
from gguflora.errors import GgufloraError

ProgressCallback = Callable[[int, int], None]
INTERRUPTED: Final = 130
_AFTER_INTERRUPT: Final = {
    "pipeline": "the steps that were done are kept, and the next run goes on from them",
    "unmerge": "run it again to have the whole base back",
}

app = typer.Typer(
    help="LoRA for GGUF: convert PEFT adapters, merge them into quantized models, hot-swap them at run time.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console(soft_wrap=True, highlight=False)
if not console.is_terminal:
    console.width = max(console.width, 110)  # for tables in pipes and files
stderr = Console(stderr=True, soft_wrap=True, highlight=False)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        print(f"gguflora {__version__}")
        raise typer.Exit


@contextmanager
def progress_bar(title: str) -> Iterator[ProgressCallback | None]:
    """A bar on stderr while the block runs; None where stderr is no terminal."""
    if not stderr.is_terminal:
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr, transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class Report(Protocol):
    """What every command's result can do."""

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""


def print_json(report: Report) -> None:
    """The report on stdout, for scripts."""
    print(json.dumps(report.to_dict(), indent=2))


def print_warnings(warnings: tuple[str, ...]) -> None:
    """What the user should know, on stderr."""
    for warning in warnings:
        stderr.print(f"warning: {warning}", markup=False)


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
            command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
            print(f"interrupted; {_AFTER_INTERRUPT.get(command, 'nothing was written')}", file=sys.stderr)
        raise
