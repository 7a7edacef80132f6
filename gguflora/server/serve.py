"""Run a server: ``serve``."""

from __future__ import annotations

import gc
import importlib.util
import math
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from gguflora.engine import Engine, describe_set
from gguflora.engine.context_size import context_size
from gguflora.engine.engine import AdapterPath
from gguflora.errors import MissingExtraError, ServerError
from gguflora.files.remote import remote_inputs
from gguflora.runtime.llama_internals import has_gpu
from gguflora.runtime.templates import RENDERER
from gguflora.server.names import check_names
from gguflora.server.settings import KEY_VARIABLE, Settings
from gguflora.system.memory import bound_free_memory, read_bytes

_REQUIRED: Final = ("fastapi", "uvicorn", "prometheus_client")
_BACKLOG: Final = 512


@dataclass(frozen=True, slots=True)
class ServeReport:
    """A running server.

    Attributes:
        url: address of the server.
        model: name of the base model in requests.
        adapters: names of the adapters.
        warnings: warnings for the user.
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
    adapters: Mapping[str, AdapterPath | tuple[AdapterPath, float]] | None = None,
    tasks: Mapping[str, int] | None = None,
    adapter_dir: str | os.PathLike[str] | None = None,
    adapter_memory: int | str | None = "2G",
    default_adapters: str | None = None,
    aliases: Mapping[str, str | None] | None = None,
    accept_any_model: bool = False,
    chat_template: str | None = None,
    chat_template_file: str | os.PathLike[str] | None = None,
    host: str = "127.0.0.1",
    port: int = 8080,
    ctx: int | None = None,
    parallel: int = 4,
    contexts: int = 2,
    queue: int = 64,
    threads: int | None = None,
    gpu_layers: int | None = None,
    api_key: str | None = None,
    api_key_file: str | os.PathLike[str] | None = None,
    private_cache: bool = False,
    cors: Sequence[str] = (),
    allow_load: str | os.PathLike[str] | None = None,
    max_tokens: int = 2048,
    timeout: float = 600.0,
    text_only: bool = False,
    trust_names: bool = False,
    ready: Callable[[ServeReport], None] = lambda _: None,
) -> ServeReport:
    """Serve a model until SIGINT or SIGTERM; each request selects its adapters.

    The server finishes the running answers before it stops. If the environment variable GGUFLORA_API_KEY is set,
    clients must send its value as their API key.

    Args:
        base: GGUF file of the base model.
        adapters: GGUF LoRA files or PEFT directories, by name, each alone or in a tuple with its scale. One with a
            scale other than 0 also belongs to the default set, unless ``default_adapters`` is given.
        tasks: task number of each MULTITASK_PROMPT_TUNING adapter in ``adapters``, by name.
        adapter_dir: directory whose adapters, subdirectories and GGUF files, are served by their names; each is loaded
            when a request first names it, and again when its files have changed.
        adapter_memory: most memory of the adapters from ``adapter_dir``, in bytes or such as ``2G``. The least recently
            used ones leave for others, but never under a request. None sets no limit.
        default_adapters: adapter set of requests that name none, such as ``legal@0.5+tone``; at first the base.
        aliases: further names of adapter sets; None stands for the default set.
        accept_any_model: answer requests for unknown models with the default set instead of status 404.
        chat_template: ``adapter``, ``base`` or a template in Jinja; see `gguflora.engine.Engine`.
        chat_template_file: file with a template.
        host: address to listen on.
        port: port to listen on; 0 selects a free one.
        ctx: size of the context in tokens, for all requests decoded together; by default the model's training length,
            up to 4096.
        parallel: largest number of requests decoded together.
        contexts: has no effect any more, since all adapter sets share one context.
        queue: largest number of waiting requests; further requests get status 429.
        threads: number of threads; by default one less than the cores that this process may use.
        gpu_layers: number of layers that llama.cpp computes on a GPU, -1 for all; by default llama.cpp's own choice.
        api_key: key that clients must send; by default the value of GGUFLORA_API_KEY.
        api_key_file: file of further keys, on each line a key, a space, and the name of its holder for the log.
        private_cache: let requests continue only what requests with the same key have computed; otherwise the time and
            ``cached_tokens`` of an answer tell what others have asked.
        cors: origins whose web pages may use the server, such as ``https://example.org``; ``*`` allows all.
        allow_load: directory from which clients may load adapters.
        max_tokens: largest number of tokens of one answer.
        timeout: seconds after which a request is aborted.
        text_only: take only the part of a multimodal model's adapters that changes the language model.
        trust_names: apply adapters by name and shape where the order of a tensor's rows is not known.
        ready: called when the server accepts requests.

    Raises:
        MissingExtraError: if the extra ``server`` is not installed.
        ServerError: if the server cannot listen on the address.
        GgufloraError: if an input cannot be read, or inputs do not fit together.
    """
    missing = [name for name in _REQUIRED if not importlib.util.find_spec(name)]
    if missing:
        raise MissingExtraError("serve", ", ".join(missing), "server")
    from gguflora.server.keys import read_keys  # noqa: PLC0415  (needs starlette)

    key = api_key or os.environ.get(KEY_VARIABLE) or None
    keys = {} if api_key_file is None else read_keys(api_key_file)
    if private_cache and not (key or keys):
        raise ServerError("private_cache needs keys, because it keeps the caches of different keys apart")
    warnings = _warnings(host, key or next(iter(keys), None), cors, gpu_layers)
    folder = None if allow_load is None else Path(allow_load)
    if folder is not None and not folder.is_dir():
        raise ServerError(f"{folder}: is not a directory, so no adapters can be loaded from it")
    settings = Settings(
        api_key=key,
        api_keys=keys,
        private_cache=private_cache,
        allow_load=folder,
        max_tokens=max_tokens,
        timeout=timeout,
        aliases=dict(aliases or {}),
        default_adapters=default_adapters or _scaled(adapters or {}),
        accept_any_model=accept_any_model,
        cors=tuple(cors),
        host=host,
    )
    memory = read_bytes(adapter_memory, "adapter_memory") if isinstance(adapter_memory, str) else adapter_memory
    bound_free_memory()
    with (
        listen(host, port) as listener,
        Engine(
            base,
            adapters=adapters or {},
            tasks=tasks,
            adapter_dir=adapter_dir,
            adapter_memory=memory,
            chat_template=chat_template,
            chat_template_file=chat_template_file,
            n_ctx=context_size(base, ctx),
            n_parallel=parallel,
            max_contexts=contexts,
            queue_size=queue,
            threads=threads,
            gpu_layers=gpu_layers,
            text_only=text_only,
            trust_names=trust_names,
        ) as engine,
    ):
        check_names(engine, settings)
        names = tuple(engine.adapter_names())
        report = ServeReport(url_of(listener), engine.model_name, names, (*warnings, *engine.warnings))
        ready(report)
        run_server(engine, Path(base), listener, settings)
    return report


def _warnings(host: str, key: str | None, cors: Sequence[str], gpu_layers: int | None) -> tuple[str, ...]:
    from gguflora.server.hosts import is_loopback  # noqa: PLC0415  (needs starlette)

    warnings = []
    if key is None and not is_loopback(host):
        warnings.append(f"anyone who can reach {host} can use this server; set {KEY_VARIABLE} to require a key")
    if key is None and cors:
        warnings.append(f"web pages of {', '.join(cors)} can use this server; set {KEY_VARIABLE} to require a key")
    if gpu_layers and not has_gpu():
        warnings.append("--gpu-layers has no effect: this llama-cpp-python was built without support for a GPU")
    return tuple(warnings)


def _scaled(adapters: Mapping[str, object]) -> str | None:
    """Return the set of the adapters that are given with a scale."""
    scaled = [(name, float(item[1])) for name, item in adapters.items() if isinstance(item, tuple)]
    return describe_set(tuple((name, scale) for name, scale in scaled if scale)) if scaled else None


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket; port 0 selects a free one.

    Raises:
        ServerError: if the address is not available.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ServerError(f"cannot listen on {host}, port {port}: {error.strerror}; try another --port") from error


def run_server(engine: Engine, base: Path, listener: socket.socket, settings: Settings) -> None:
    """Answer requests until SIGINT or SIGTERM, then finish running ones for up to ``settings.timeout`` seconds.

    Args:
        engine: the engine; it stays open.
        base: file of the engine's weights.
        listener: socket from `listen`.
        settings: limits and permissions.
    """
    import uvicorn  # noqa: PLC0415  (in the extra ``server``)

    from gguflora.server.app import create_app  # noqa: PLC0415  (needs FastAPI)
    from gguflora.server.connections import server_config  # noqa: PLC0415  (needs uvicorn)

    RENDERER.warm()
    app = create_app(engine, base, settings)
    config = server_config(app, timeout_graceful_shutdown=math.ceil(settings.timeout))
    app.openapi()  # made at the first request for it otherwise, while others wait
    gc.collect()
    gc.freeze()  # what is there stays; looking through it takes 0.3 s, in which no client is answered
    with suppress(KeyboardInterrupt):  # uvicorn raises the signal again after it has stopped
        uvicorn.Server(config).run(sockets=[listener])


def url_of(listener: socket.socket) -> str:
    """Return the URL of a server that listens on ``listener``."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
