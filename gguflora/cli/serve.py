"""``gguflora serve``."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Annotated

import typer

from gguflora.cli.app import app, print_warnings, stderr
from gguflora.cli.model_options import context_size, named_adapters
from gguflora.errors import GgufloraError


@app.command()
def serve(
    base: Annotated[Path, typer.Argument(help="Base model, a GGUF file.")],
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="Adapter: GGUF LoRA or PEFT directory. Repeatable."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8080,
    ctx: Annotated[
        int | None,
        typer.Option(
            min=8, help="Tokens of context, for all requests decoded together; by default the model's, at most 4096."
        ),
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, max=256, help="Requests decoded together in one context.")] = 4,
    contexts: Annotated[int, typer.Option(min=1, max=64, help="Adapter sets that keep a KV cache.")] = 2,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are answered 429.")] = 64,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="Threads; by default one for each core.")] = None,
    allow_load: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Let clients load adapters from this directory.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of one answer.")] = 2048,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds after which a request is given up.")] = 600.0,
) -> None:
    r"""Serve a base model with any adapters per request, as OpenAI's API, and a page to try them.

    A request's `model` names an adapter set: `base`, `legal`, `legal@0.5+tone@0.3`. Clients need the key in the
    environment variable GGUFLORA_API_KEY, if there is one. Needs the extra: pip install 'gguflora\[server]'.

    **Examples**

    gguflora serve model-Q4_K_M.gguf --lora legal=legal.gguf --lora tone=./tone-peft

    GGUFLORA_API_KEY=secret gguflora serve model.gguf --host 0.0.0.0 --allow-load /srv/adapters
    """
    adapters = named_adapters(lora or ())
    if allow_load is not None and not allow_load.is_dir():
        raise typer.BadParameter(f"{allow_load} is no directory", param_hint="--allow-load")
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if not importlib.util.find_spec(name)]
    if missing:
        raise GgufloraError(f"serve needs {', '.join(missing)}: pip install 'gguflora[server]'")
    from gguflora import server  # noqa: PLC0415  (no other command needs FastAPI)
    from gguflora.engine import Engine  # noqa: PLC0415

    key = os.environ.get(server.KEY_VARIABLE) or None
    if key is None and host not in {"127.0.0.1", "localhost", "::1"}:
        print_warnings((f"whoever reaches {host} can use this server; set {server.KEY_VARIABLE} to ask for a key",))
    settings = server.Settings(api_key=key, allow_load=allow_load, max_tokens=max_tokens, timeout=timeout)
    with (
        server.listen(host, port) as listener,
        Engine(
            base,
            adapters=adapters,
            n_ctx=context_size(base, ctx),
            n_parallel=parallel,
            max_contexts=contexts,
            queue_size=queue,
            threads=threads,
        ) as engine,
    ):
        names = ", ".join(adapter.name for adapter in engine.adapters()) or "no adapters"
        url = server.url_of(listener)
        stderr.print(f"serving {engine.model_name} with {names} at {url} (Ctrl+C ends it)", markup=False)
        server.serve(engine, base, listener, settings)
