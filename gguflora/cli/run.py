"""``gguflora run``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

import gguflora
from gguflora.cli.app import app, console, print_report, stderr
from gguflora.cli.options import (
    AsJson,
    ChatTemplate,
    ChatTemplateFile,
    Context,
    Task,
    TextOnly,
    Threads,
    TrustNames,
    named_and_scaled,
    named_tasks,
)
from gguflora.system.terminal import printable

if TYPE_CHECKING:
    from gguflora.engine.chat import ChatAnswer
    from gguflora.engine.run import RunReport

_COLUMNS = 3


@app.command()
def run(
    base: Annotated[str, typer.Argument(help="Base model: a GGUF file.")],
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]PATH", help="Adapter at scale 1: GGUF LoRA or PEFT directory. Repeatable."),
    ] = None,
    lora_scaled: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]PATH:SCALE", help="Adapter and its scale; 0 is off. Repeatable."),
    ] = None,
    task: Task = None,
    prompt: Annotated[
        str | None, typer.Option("-p", "--prompt", help="Answer this prompt and exit, instead of a chat.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as plain text, without chat template.")
    ] = False,
    ctx: Context = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Largest number of tokens of one answer.")] = 512,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Sampling temperature; 0 always takes the most likely token.")
    ] = 0.8,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling; default: random.")] = None,
    threads: Threads = None,
    text_only: TextOnly = False,
    trust_names: TrustNames = False,
    chat_template: ChatTemplate = None,
    chat_template_file: ChatTemplateFile = None,
    as_json: AsJson = False,
) -> None:
    """Chat with a model and switch its adapters between prompts; type /help for the commands.

    The chat reads lines from the terminal or a pipe. Answers go to stdout, everything else goes to stderr.

    **Examples**

    gguflora run model-Q4_K_M.gguf --lora legal=legal.gguf

    gguflora run model.gguf --lora legal.gguf --lora-scaled tone=./tone-peft:0.5 -p "Dear Sir" --raw

    echo "/compare What is a contract?" | gguflora run model.gguf --lora legal.gguf
    """
    adapters = named_and_scaled(lora, lora_scaled)
    if prompt is None and as_json:
        raise typer.BadParameter("--json needs --prompt, because a chat has no single report")
    if prompt is not None:
        report = gguflora.run(
            base,
            prompt,
            adapters=adapters,
            tasks=named_tasks(task),
            raw=raw,
            ctx=ctx,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            threads=threads,
            text_only=text_only,
            trust_names=trust_names,
            chat_template=chat_template,
            chat_template_file=chat_template_file,
            write=(lambda _: None) if as_json else _write,
        )
        print_report(report, _print_run, as_json=as_json)
        return
    from gguflora.engine.run import open_chat  # noqa: PLC0415  (loads llama_cpp)

    with open_chat(
        base,
        adapters,
        named_tasks(task),
        raw=raw,
        ctx=ctx,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        threads=threads,
        text_only=text_only,
        trust_names=trust_names,
        chat_template=chat_template,
        chat_template_file=chat_template_file,
        write=_write,
        tell=lambda line: stderr.print(line, markup=False),
        show=_show,
    ) as chat:
        for line in _lines():
            if not chat.handle(line):
                return


def _print_run(report: RunReport) -> None:
    from gguflora.engine.chat import describe  # noqa: PLC0415

    stderr.print(f"[{report.adapters}: {describe(report)}]", markup=False)


def _write(text: str) -> None:
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def _lines() -> Iterator[str]:
    """Yield lines from the terminal, with history and editing, or from a pipe, until end of input or Ctrl+C."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401, PLC0415  (adds history and editing to input())

    stderr.print("/help lists the commands")
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


def _show(answers: list[ChatAnswer]) -> None:
    from gguflora.engine.chat import describe  # noqa: PLC0415

    for start in range(0, len(answers), _COLUMNS):
        table = Table(box=box.SIMPLE_HEAD, expand=True)
        row = answers[start : start + _COLUMNS]
        for answer in row:
            table.add_column(answer.adapters, ratio=1, overflow="fold")
        table.add_row(*(escape(answer.text.strip()) for answer in row))
        table.add_row(*(describe(answer) for answer in row), style="dim")
        console.print(table)
