"""The typer application, and what all commands share: consoles, progress bars, printing of reports, errors."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn, Protocol, TypeVar

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from gguflora._version import __version__
from gguflora.cli.stdout import problem_of_stdout, protect_streams
from gguflora.errors import GgufloraError, UsageError
from gguflora.files import strict_json
from gguflora.system.memory import read_bytes
from gguflora.system.terminal import LogFormatter, printable

_printed: Final[list[str]] = []
"""Holds an item once the JSON of this command is printed."""

ProgressCallback = Callable[[int, int], None]
_SHELLS: Final = ("bash", "zsh", "fish", "powershell", "pwsh")
FAILED: Final = 1
INTERRUPTED: Final = 130
_AFTER_INTERRUPT: Final = {
    "pipeline": "finished steps are kept, and the next run continues after them",
    "train": "what the run needs to go on is kept",
    "unmerge": "run it again to restore the base completely",
}
"""What a command's message says after Ctrl+C; by default, that nothing was written."""

_ClickException: Any = typer.BadParameter.mro()[2]  # some versions of typer contain their own copy of click

app = typer.Typer(
    help="LoRA for GGUF: convert PEFT adapters, merge them into quantized models, hot-swap them at run time.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


class SafeConsole(Console):
    """Prints names and texts from files with their control characters spelled out."""

    def render_str(self, text: str, **options: Any) -> Text:  # noqa: ANN401  (rich's own)
        """Turn a text, or a cell of a table, into what is printed."""
        return super().render_str(printable(text), **options)


console = SafeConsole(soft_wrap=True, highlight=False)
if not console.is_terminal:
    console.width = max(console.width, 110)  # so that tables in pipes and files are not too narrow
stderr = SafeConsole(stderr=True, soft_wrap=True, highlight=False)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Write a log to stderr.")] = False,
    max_download: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Largest remote file to fetch, such as 20G; default: 1T.")
    ] = None,
    completion: Annotated[
        str | None,
        typer.Option(metavar="SHELL", help="Print the completion script of bash, zsh, fish or powershell, and exit."),
    ] = None,
) -> None:
    if version:
        from gguflora.diagnostics.doctor import build_line  # noqa: PLC0415  (loads the kernels)

        print(f"gguflora {__version__}")
        print(build_line())
        raise typer.Exit
    if completion is not None:
        print(completion_script(completion))
        raise typer.Exit
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter("%(relativeCreated)7d ms %(name)s: %(message)s" if verbose else "%(message)s"))
    logging.basicConfig(handlers=[handler])
    if max_download is not None:
        read_bytes(max_download, "--max-download")
        os.environ["GGUFLORA_MAX_DOWNLOAD"] = max_download  # for processes of jobs, too
    if verbose:
        logging.getLogger("gguflora").setLevel(logging.DEBUG)


def completion_script(shell: str) -> str:
    """Return the script that lets a shell complete commands and options of gguflora.

    Raises:
        UsageError: if there is none for this shell.
    """
    from typer.completion import get_completion_script  # type: ignore[attr-defined]  # noqa: PLC0415

    if shell not in _SHELLS:
        raise UsageError(f"--completion {shell!r:.40}: expected {', '.join(_SHELLS)}")
    return get_completion_script(prog_name="gguflora", complete_var="_GGUFLORA_COMPLETE", shell=shell)


@contextmanager
def progress_bar(title: str, unit: str = "bytes") -> Iterator[ProgressCallback | None]:
    """Show a progress bar on stderr while the block runs.

    Yields:
        A function that takes the bytes (or another ``unit``) done and in total; None if stderr is not a terminal.
    """
    if not stderr.file.isatty():  # is_terminal would be true for FORCE_COLOR, also in a log
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        *((DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(), TextColumn(unit))),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr, transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class Report(Protocol):
    """The result of a command."""

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, ready for JSON."""


R = TypeVar("R", bound=Report)


def print_report(report: R, as_text: Callable[[R], None], *, as_json: bool) -> None:
    """Print a report's warnings to stderr, and the report to stdout, as JSON or by calling ``as_text``."""
    print_warnings(getattr(report, "warnings", ()))
    if as_json:
        print_json(to_json(report))
    else:
        as_text(report)


def print_json(text: str) -> None:
    """Print the one JSON object of a command; an error after it is told on stderr only."""
    print(text)
    _printed.append(text[:0])


def print_warnings(warnings: tuple[str, ...]) -> None:
    """Print warnings to stderr."""
    for warning in warnings:
        stderr.print(f"warning: {warning}", markup=False)


def to_json(report: Report, *, indent: int | None = 2) -> str:
    """Return a report as JSON. Numbers that are not finite become null, with a text beside them."""
    return strict_json.to_json(report.to_dict(), indent=indent)


def span(ranks: tuple[int, int]) -> str:
    """Return the smallest and largest rank in words."""
    low, high = ranks
    return f"rank {low}" if low == high else f"ranks {low} to {high}"


def print_errors(errors: Mapping[str, float], label: str = "relative error ") -> None:
    """Print the error of each approximated delta, the largest first."""
    for name, error in sorted(errors.items(), key=lambda item: -item[1]):
        console.print(f"  {name}: {label}{error:.2g}", markup=False)


def main() -> None:
    """Run the command line and exit: code 0 for success, 1 for an error, 2 for wrong usage, 130 after Ctrl+C.

    Errors go to stderr; with ``--json`` also to stdout, as ``{"error": {"type", "message", "exit_code"}}``.
    """
    protect_streams()
    _printed.clear()
    signal.signal(signal.SIGTERM, _interrupt)  # so that a terminated merge removes its temporary file
    try:
        code = app(prog_name="gguflora", standalone_mode=False)
    except GgufloraError as error:
        _fail(error, str(error))
    except MemoryError as error:
        _fail(error, "not enough memory")
    except OSError as error:
        _fail(error, f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except _ClickException as error:
        error.show()
        _end(error, error.format_message(), error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except Exception as error:  # the last resort: a user never sees a traceback
        _fail(error, _unexpected(error))
    if code == INTERRUPTED:  # typer turns KeyboardInterrupt into this code
        command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
        message = _AFTER_INTERRUPT.get(command, "nothing was written")
        print(f"interrupted; {message}", file=sys.stderr)
        _end(KeyboardInterrupt(), message, INTERRUPTED)
    _exit(code or 0)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _fail(error: Exception, message: str) -> NoReturn:
    print(f"error: {printable(message)}", file=sys.stderr)
    _end(error, message, FAILED)


def _unexpected(error: Exception) -> str:
    """Return one line about a fault in gguflora itself: what was raised where, and how to report it."""
    logging.getLogger("gguflora").debug("unexpected error", exc_info=error)
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "gguflora" in Path(frame.filename).parts] or frames
    place = f" in {Path(ours[-1].filename).name}, line {ours[-1].lineno}" if ours else ""
    words = " ".join(str(error).split())
    return (
        f"unexpected {type(error).__name__}{place}: {words:.300}; this is a fault of gguflora {__version__}: please "
        "report it with the command, the output of `gguflora doctor`, and the log that `gguflora -v` writes"
    )


def _end(error: BaseException, message: str, code: int) -> NoReturn:
    if "--json" in sys.argv and not _printed:
        print(strict_json.to_json({"error": {"type": type(error).__name__, "message": message, "exit_code": code}}))
    _exit(code)


def _exit(code: int) -> NoReturn:
    """End the process; if its output was lost, say so, and do not call that a success."""
    problem = problem_of_stdout()
    if problem is not None:
        print(f"error: the output cannot be written: {problem.strerror}", file=sys.stderr)
        code = code or FAILED
    sys.exit(code)
