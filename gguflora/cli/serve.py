"""``gguflora serve``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import gguflora
from gguflora.cli.app import app, print_warnings, stderr, to_json
from gguflora.cli.options import (
    AsJson,
    ChatTemplate,
    ChatTemplateFile,
    Task,
    TextOnly,
    Threads,
    TrustNames,
    named_adapters,
    named_aliases,
    named_and_scaled,
    named_tasks,
)

if TYPE_CHECKING:
    from gguflora.server.serve import ServeReport


@app.command()
def serve(
    base: Annotated[str | None, typer.Argument(help="Base model: a GGUF file.")] = None,
    model: Annotated[
        str | None, typer.Option("-m", "--model", metavar="PATH", help="Base model, in place of the argument.")
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]PATH", help="Adapter: GGUF LoRA or PEFT directory. Repeatable."),
    ] = None,
    lora_scaled: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]PATH:SCALE",
            help="Adapter with its scale, also for requests that name no model, as in llama-server. Repeatable.",
        ),
    ] = None,
    task: Task = None,
    adapter_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Serve every adapter in this directory by its name; load it at first use."),
    ] = None,
    adapter_memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Most memory of the adapters from --adapter-dir.")
    ] = "2G",
    default_adapters: Annotated[
        str | None,
        typer.Option(metavar="SET", help="Adapters of requests that name no model, such as legal@0.5+tone."),
    ] = None,
    alias: Annotated[
        list[str] | None,
        typer.Option(
            "-a", "--alias", metavar="NAME[=SET]", help="Another name of a set; alone, of the default set. Repeatable."
        ),
    ] = None,
    accept_any_model: Annotated[
        bool, typer.Option("--accept-any-model", help="Answer unknown models with the default set.")
    ] = False,
    chat_template: ChatTemplate = None,
    chat_template_file: ChatTemplateFile = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 accepts other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 selects a free one.")] = 8080,
    ctx: Annotated[
        int | None,
        typer.Option(
            "-c", "--ctx", "--ctx-size", min=8, help="Size of the context in tokens; default: the model's, up to 4096."
        ),
    ] = None,
    parallel: Annotated[
        int, typer.Option("-np", "--parallel", min=1, max=256, help="Largest number of requests decoded together.")
    ] = 4,
    contexts: Annotated[int, typer.Option(min=1, max=64, help="No longer used: all adapter sets share a context.")] = 2,
    queue: Annotated[
        int, typer.Option(min=1, help="Largest number of waiting requests; further ones get status 429.")
    ] = 64,
    threads: Threads = None,
    gpu_layers: Annotated[
        int | None,
        typer.Option(
            "-ngl", "--gpu-layers", "--n-gpu-layers", min=-1, help="Layers on a GPU, -1 for all; default: llama.cpp's."
        ),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(metavar="KEY", help="Key that clients must send; default: GGUFLORA_API_KEY.")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="More keys: on each line a key, a space, and its holder's name.")
    ] = None,
    private_cache: Annotated[
        bool, typer.Option("--private-cache", help="Keep the KV caches of different keys apart.")
    ] = False,
    cors: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Let web pages of this origin use the server; * lets all. Repeatable."),
    ] = None,
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

    gguflora serve -m model.gguf -c 8192 --adapter-dir /srv/adapters --adapter-memory 2G --alias gpt-4o=legal@0.5+tone

    GGUFLORA_API_KEY=secret gguflora serve model.gguf --host 0.0.0.0 --allow-load /srv/adapters
    """
    if (base is None) == (model is None):
        raise typer.BadParameter("name the base model once: as the argument or with --model", param_hint="BASE")
    scaled = named_and_scaled(lora, lora_scaled)
    adapters = {name: path if name in named_adapters(lora) else (path, scale) for name, (path, scale) in scaled.items()}
    if allow_load is not None and not allow_load.is_dir():
        raise typer.BadParameter(f"{allow_load} is not a directory", param_hint="--allow-load")
    gguflora.serve(
        base or model or "",
        adapters=adapters,
        tasks=named_tasks(task),
        adapter_dir=adapter_dir,
        adapter_memory=adapter_memory,
        default_adapters=default_adapters,
        aliases=named_aliases(alias),
        accept_any_model=accept_any_model,
        chat_template=chat_template,
        chat_template_file=chat_template_file,
        host=host,
        port=port,
        ctx=ctx,
        parallel=parallel,
        contexts=contexts,
        queue=queue,
        threads=threads,
        gpu_layers=gpu_layers,
        api_key=api_key,
        api_key_file=api_key_file,
        private_cache=private_cache,
        cors=cors or (),
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
