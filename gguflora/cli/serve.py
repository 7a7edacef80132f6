"""``gguflora serve``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import gguflora
from gguflora.cli.app import app, print_warnings, stderr, to_json
from gguflora.cli.options import AsJson, Context, Task, TextOnly, Threads, TrustNames, named_adapters, named_tasks

if TYPE_CHECKING:
    from gguflora.server.serve import ServeReport


@app.command()
def serve(
    base: Annotated[str, typer.Argument(help="Base model: a GGUF file.")],
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="Adapter: GGUF LoRA or PEFT directory. Repeatable."),
    ] = None,
    task: Task = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 accepts other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 selects a free one.")] = 8080,
    ctx: Context = None,
    parallel: Annotated[int, typer.Option(min=1, max=256, help="Largest number of requests decoded together.")] = 4,
    contexts: Annotated[int, typer.Option(min=1, max=64, help="No longer used: all adapter sets share a context.")] = 2,
    queue: Annotated[
        int, typer.Option(min=1, help="Largest number of waiting requests; further ones get status 429.")
    ] = 64,
    threads: Threads = None,
    allow_load: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Let clients load adapters from this directory.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Largest number of tokens of one answer.")] = 2048,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds after which a request is aborted.")] = 600.0,
    text_only: TextOnly = False,
    trust_names: TrustNames = False,
    as_json: AsJson = False,
) -> None:
    r"""Serve a model with OpenAI's API and a web page; each request selects its adapters.

    The `model` of a request names an adapter set, such as `base`, `legal` or `legal@0.5+tone@0.3`. If the environment
    variable GGUFLORA_API_KEY is set, clients must send its value as their API key. This command needs an extra: pip
    install 'gguflora\[server]'.

    **Examples**

    gguflora serve model-Q4_K_M.gguf --lora legal=legal.gguf --lora tone=./tone-peft

    GGUFLORA_API_KEY=secret gguflora serve model.gguf --host 0.0.0.0 --allow-load /srv/adapters
    """
    adapters = named_adapters(lora)
    if allow_load is not None and not allow_load.is_dir():
        raise typer.BadParameter(f"{allow_load} is not a directory", param_hint="--allow-load")
    gguflora.serve(
        base,
        adapters=adapters,
        tasks=named_tasks(task),
        host=host,
        port=port,
        ctx=ctx,
        parallel=parallel,
        contexts=contexts,
        queue=queue,
        threads=threads,
        allow_load=allow_load,
        max_tokens=max_tokens,
        timeout=timeout,
        text_only=text_only,
        trust_names=trust_names,
        ready=partial(_say_ready, as_json=as_json),
    )


def _say_ready(report: ServeReport, *, as_json: bool) -> None:
    print_warnings(report.warnings)
    if as_json:
        print(to_json(report, indent=None), flush=True)
    names = ", ".join(report.adapters) or "no adapters"
    stderr.print(f"serving {report.model} with {names} at {report.url} (press Ctrl+C to stop)", markup=False)
