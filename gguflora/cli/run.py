"""``gguflora run``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from gguflora.cli.app import app, console, stderr
from gguflora.cli.model_options import context_size, named_adapters, scaled_adapters

if TYPE_CHECKING:
    from gguflora.chat import Answer

_COLUMNS = 3


@app.command()
def run(
    base: Annotated[Path, typer.Argument(help="Base model, a GGUF file.")],
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]PATH", help="Adapter, on at scale 1: GGUF LoRA or PEFT directory. Repeatable."),
    ] = None,
    lora_scaled: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]PATH:SCALE", help="Adapter with a scale of its own; 0 is off. Repeatable."),
    ] = None,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="Answer this and end.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is; no chat template.")] = False,
    ctx: Annotated[
        int | None, typer.Option(min=8, help="Tokens of context; by default the model's, at most 4096.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of one answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")] = 0.8,
    seed: Annotated[int | None, typer.Option(help="Of the random numbers.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="Threads; by default one for each core.")] = None,
) -> None:
    """Chat with a model, and switch its adapters while you do; /help lists the commands.

    Lines come from the terminal or from a pipe. Answers go to stdout, everything else to stderr.

    **Examples**

    gguflora run model-Q4_K_M.gguf --lora legal=legal.gguf

    gguflora run model.gguf --lora legal.gguf --lora-scaled tone=./tone-peft:0.5 -p "Dear Sir" --raw

    echo "/compare What is a contract?" | gguflora run model.gguf --lora legal.gguf
    """
    from gguflora.chat import Chat  # noqa: PLC0415  (loads llama_cpp)
    from gguflora.engine import Engine, Sampling  # noqa: PLC0415

    scaled = scaled_adapters(lora_scaled or ())
    paths = named_adapters([*(lora or ()), *(f"{name}={path}" for name, (path, _) in scaled.items())])
    with Engine(base, adapters=paths, n_ctx=context_size(base, ctx), n_parallel=1, threads=threads) as engine:
        chat = Chat(
            engine,
            write=_write,
            tell=lambda line: stderr.print(line, markup=False),
            show=_show,
            raw=raw,
            max_tokens=max_tokens,
            sampling=Sampling(temperature=temperature, seed=seed),
            scales=dict.fromkeys(paths, 1.0) | {name: scale for name, (_, scale) in scaled.items()},
        )
        if prompt is not None:
            chat.say(prompt)
            return
        for line in _lines():
            if not chat.handle(line):
                return


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _lines() -> Iterator[str]:
    """Lines from the terminal, with its history and editing, or from a pipe; ends at the end of input or Ctrl+C."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401, PLC0415  (gives input() its editing)

    stderr.print("/help lists the commands")
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


def _show(answers: list[Answer]) -> None:
    from gguflora.chat import describe  # noqa: PLC0415

    for first in range(0, len(answers), _COLUMNS):
        table = Table(box=box.SIMPLE_HEAD, expand=True)
        some = answers[first : first + _COLUMNS]
        for answer in some:
            table.add_column(answer.adapters, ratio=1, overflow="fold")
        table.add_row(*(escape(answer.text.strip()) for answer in some))
        table.add_row(*(describe(answer) for answer in some), style="dim")
        console.print(table)
