"""Feed damaged files to every reader, and keep what is neither read nor refused: ``python -m tools.fuzz --help``.

Trials run in a process of their own under a limit of memory and time; one that dies is a finding, too. Findings go to
tests/corpus, one directory for each place in the code, and tests/tools/test_corpus.py replays them.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import shutil
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from support import fuzzing
from tools import ROOT, fuzz_folders, fuzz_http, fuzz_openapi, fuzz_templates, fuzz_tokens

BATCH = 200
"""Trials of one process."""


app = typer.Typer(add_completion=False)


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    seconds: Annotated[float, typer.Option(help="How long to go on.")] = 60,
    seed: Annotated[int, typer.Option(help="Seed of the random numbers; the same seed tries the same files.")] = 0,
    target: Annotated[list[str] | None, typer.Option(help="Only these: " + ", ".join(fuzzing.SEEDS))] = None,
    methods: Annotated[bool, typer.Option(help="Adapters of all PEFT methods, too (needs torch and peft).")] = True,
    corpus: Annotated[Path, typer.Option(help="Where findings go.")] = ROOT / "tests/corpus",
) -> None:
    """Fuzz the readers of GGUF, safetensors, imatrix, GGUF LoRA and PEFT files; the commands fuzz other things."""
    if context.invoked_subcommand is not None:
        return
    names = target or list(fuzzing.SEEDS)
    found: dict[str, str] = {}
    tried: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="gguflora-fuzz-") as work:
        seeds = write_seeds(Path(work) / "seeds", names, methods=methods)
        end, batch = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            alike = sorted(name for name in seeds if target_of(name) == names[batch % len(names)])
            name = alike[batch // len(names) % len(alike)]
            results, trials = run_batch(name, seeds[name], f"{seed}-{batch}", Path(work), end)
            tried[target_of(name)] += trials
            for what, folder in results:
                if keep(corpus, target_of(name), what, folder):
                    found[what] = name
                    typer.echo(f"{name}: {what}")
            batch += 1
    typer.echo(f"{sum(tried.values())} trials ({', '.join(f'{n} {name}' for name, n in sorted(tried.items()))})")
    typer.echo(f"{len(found)} new findings")
    raise typer.Exit(bool(found))


def write_seeds(folder: Path, names: list[str], *, methods: bool) -> dict[str, Path]:
    """Directories of sound files by name; see `target_of`."""
    fuzzing.base()
    for name in names:
        (folder / name).mkdir(parents=True)
        fuzzing.SEEDS[name][0](folder / name)
    if methods and "peft" in names:  # in a process of its own, so that trials are not those of a process with torch
        command = multiprocessing.get_context("spawn").Process(target=write_methods, args=(folder,))
        command.start()
        command.join()
        if command.exitcode:
            raise SystemExit("adapters of PEFT's methods could not be made; --no-methods leaves them out")
    return {path.name: path for path in folder.iterdir()}


def target_of(name: str) -> str:
    """The target of a seed: what follows an underscore is not part of its name."""
    return name.partition("_")[0]


def write_methods(folder: Path) -> None:
    """Adapters of all PEFT methods."""
    from support import fuzz_seeds  # noqa: PLC0415

    fuzz_seeds.write_all(folder)


def run_batch(name: str, seed: Path, dice: str, work: Path, end: float) -> tuple[list[tuple[str, Path]], int]:
    """Trials in a process of their own: what was found, the files that did it, and how many there were."""
    out = work / "found"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            trials(name, seed, dice, work / "scratch", out, end)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    deadline = time.monotonic() + BATCH * fuzzing.SECONDS / 10
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, 9)
        time.sleep(0.01)
    results = [((folder / "what").read_text(), folder / "files") for folder in sorted(out.glob("*/"))]
    if ended[1]:
        results.append((f"process ended with status {ended[1]}", work / "scratch"))
    return results, int((out / "count").read_text())


def trials(name: str, seed: Path, dice: str, scratch: Path, out: Path, end: float) -> None:
    """A batch, in the child."""
    fuzzing.limit_memory()
    reader = fuzzing.SEEDS[target_of(name)][1]
    for number in range(BATCH):
        (out / "count").write_text(str(number + 1))
        what = fuzzing.trial(seed, scratch, random.Random(f"{dice}-{number}"), reader)
        if what:
            (out / str(number)).mkdir()
            (out / str(number) / "what").write_text(what)
            shutil.copytree(scratch, out / str(number) / "files")
        if time.monotonic() > end:
            return


def keep(corpus: Path, target: str, what: str, folder: Path) -> bool:
    """Store a finding, unless there is one of its kind."""
    place = corpus / target / re.sub(r"\W+", "-", what.partition(": ")[0])[:80]
    if place.exists():
        return False
    shutil.copytree(folder, place)
    return True


Seconds = Annotated[float, typer.Option(help="How long to go on.")]
Seed = Annotated[int, typer.Option(help="Seed of the random numbers; the same seed tries the same.")]


def _tell(trials: int, found: list[str], what: str) -> NoReturn:
    """Print findings and a summary, and end with status 1 if there are findings."""
    for text in found:
        typer.echo(text.encode("unicode_escape").decode())
    typer.echo(f"{trials} {what}, {len(found)} findings")
    raise typer.Exit(bool(found))


@app.command()
def http(seconds: Seconds = 60, seed: Seed = 0) -> None:
    """Fuzz a server of the demo's model: raw bytes, and JSON by its OpenAPI description.

    A status of 500, an answer that is no HTTP, and a server that is silent for a second, ends, or keeps 200 MB are
    findings.
    """
    with fuzz_http.command() as server:
        trials, found = fuzz_http.fuzz(server, seconds, seed)
    _tell(trials, [*found, *filter(None, [server.said])], "requests")


@app.command()
def openapi(seconds: Seconds = 60, seed: Seed = 0) -> None:
    """Let schemathesis fuzz a server of the demo's model by its OpenAPI description.

    A status of 500, an answer that does not come, and a traceback in the server's log are findings.
    """
    with fuzz_http.command() as server:
        trials, found = fuzz_openapi.fuzz(server, seconds, seed)
    _tell(trials, [*found, *filter(None, [server.said])], "requests")


@app.command()
def templates(seconds: Seconds = 60, seed: Seed = 0) -> None:
    """Fuzz chat templates.

    An exception, a text or a time beyond the limits, and a look at the environment are findings.
    """
    _tell(*fuzz_templates.fuzz(seconds, seed), "templates")


@app.command()
def tokens(seconds: Seconds = 60, seed: Seed = 0) -> None:
    """Fuzz the splitting of texts into tokens with every pre-tokenizer.

    A process that dies or hangs, and tokens other than llama.cpp's are findings.
    """
    _tell(*fuzz_tokens.fuzz(seconds, seed), "texts")


@app.command()
def recipes(seconds: Seconds = 60, seed: Seed = 0) -> None:
    """Fuzz recipes of pipelines.

    A file outside of the recipe's folder that has changed, an exception and a job that hangs are findings.
    """
    _tell(*fuzz_folders.fuzz("recipes", seconds, seed), "recipes")


@app.command()
def folders(seconds: Seconds = 60, seed: Seed = 0) -> None:
    """Fuzz cloned folders: links, FIFOs, sockets and odd files wherever a command reads or writes.

    A file outside of the folder that has changed, an exception and a command that hangs are findings.
    """
    _tell(*fuzz_folders.fuzz("folders", seconds, seed), "folders")


if __name__ == "__main__":
    app()
