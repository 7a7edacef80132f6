"""A server from start to end: ``serve``."""

from __future__ import annotations

import importlib.util
import math
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from gguflora.engine import Engine
from gguflora.engine.context_size import context_size
from gguflora.errors import MissingExtraError, ServerError
from gguflora.files.remote import remote_inputs
from gguflora.server.settings import KEY_VARIABLE, Settings

_NEEDED: Final = ("fastapi", "uvicorn", "prometheus_client")
_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_BACKLOG: Final = 512


@dataclass(frozen=True, slots=True)
class ServeReport:
    """A server that takes requests.

    Attributes:
        url: where.
        model: name of the base model in requests.
        adapters: names of the adapters.
        warnings: what the user should know.
    """

    url: str
    model: str
    adapters: tuple[str, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)


@remote_inputs(base="file", adapters="adapter")
def serve(
    base: str | os.PathLike[str],
    *,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    tasks: Mapping[str, int] | None = None,
    host: str = "127.0.0.1",
    port: int = 8080,
    ctx: int | None = None,
    parallel: int = 4,
    contexts: int = 2,
    queue: int = 64,
    threads: int | None = None,
    allow_load: str | os.PathLike[str] | None = None,
    max_tokens: int = 2048,
    timeout: float = 600.0,
    ready: Callable[[ServeReport], None] = lambda _: None,
) -> ServeReport:
    """Serve a model with any adapters per request until SIGINT or SIGTERM; then running answers end first.

    Clients need the key in the environment variable GGUFLORA_API_KEY, if there is one.

    Args:
        base: the base model, a GGUF file.
        adapters: GGUF LoRA files or PEFT directories by name.
        tasks: of those that are MULTITASK_PROMPT_TUNING: which task, by name.
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
        ctx: tokens of context, for all requests decoded together; by default the model's, at most 4096.
        parallel: requests decoded together in one context.
        contexts: adapter sets that keep a KV cache.
        queue: requests that may wait; more are answered 429.
        threads: number of threads; by default one for each core this process may use, but one.
        allow_load: directory from which clients may load adapters.
        max_tokens: most tokens of one answer.
        timeout: seconds after which a request is given up.
        ready: called when requests are taken.

    Raises:
        MissingExtraError: if the extra ``server`` is not installed.
        ServerError: if nothing can listen at the address.
        GgufloraError: if something cannot be read or does not fit together.
    """
    missing = [name for name in _NEEDED if not importlib.util.find_spec(name)]
    if missing:
        raise MissingExtraError("serve", ", ".join(missing), "server")
    key = os.environ.get(KEY_VARIABLE) or None
    warnings: tuple[str, ...] = ()
    if key is None and host not in _LOOPBACK:
        warnings = (f"whoever reaches {host} can use this server; set {KEY_VARIABLE} to ask for a key",)
    folder = None if allow_load is None else Path(allow_load)
    if folder is not None and not folder.is_dir():
        raise ServerError(f"{folder}: is no directory to load adapters from")
    settings = Settings(api_key=key, allow_load=folder, max_tokens=max_tokens, timeout=timeout)
    with (
        listen(host, port) as listener,
        Engine(
            base,
            adapters=adapters or {},
            tasks=tasks,
            n_ctx=context_size(base, ctx),
            n_parallel=parallel,
            max_contexts=contexts,
            queue_size=queue,
            threads=threads,
        ) as engine,
    ):
        names = tuple(adapter.name for adapter in engine.adapters())
        report = ServeReport(url_of(listener), engine.model_name, names, warnings)
        ready(report)
        run_server(engine, Path(base), listener, settings)
    return report


def listen(host: str, port: int) -> socket.socket:
    """A socket at this address; port 0 takes a free one.

    Raises:
        ServerError: if the address cannot be had.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ServerError(f"cannot listen on {host}, port {port}: {error.strerror}; try another --port") from error


def run_server(engine: Engine, base: Path, listener: socket.socket, settings: Settings) -> None:
    """Answer requests until SIGINT or SIGTERM, then let running ones end, for ``settings.timeout`` seconds at most.

    Args:
        engine: stays open.
        base: the file of its weights.
        listener: from `listen`.
        settings: limits and permissions.
    """
    import uvicorn  # noqa: PLC0415  (no other command needs it)

    from gguflora.server.app import create_app  # noqa: PLC0415  (nor FastAPI)

    if settings.api_key is None and listener.getsockname()[0] in _LOOPBACK:
        settings = replace(settings, hosts=_LOOPBACK)
    config = uvicorn.Config(
        create_app(engine, base, settings),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(settings.timeout),
    )
    with suppress(KeyboardInterrupt):  # uvicorn raises the signal again when it has ended
        uvicorn.Server(config).run(sockets=[listener])


def url_of(listener: socket.socket) -> str:
    """Where clients find the server."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
