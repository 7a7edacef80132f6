"""A server on the demo's model and adapters, in a thread of the test, and what llama.cpp itself answers."""

import contextlib
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import llama_cpp
import openai
import uvicorn

import gguflora
from gguflora.diagnostics import demo
from gguflora.engine import Engine
from gguflora.server.app import create_app
from gguflora.server.connections import server_config
from gguflora.server.settings import Settings
from support.workspace import workspace

QUESTION = "What does the fox eat?"
PROMPT = f"Q: {QUESTION}\nA:"
LONG = {"model": "base", "prompt": PROMPT, "max_tokens": 300, "logit_bias": {"1": -100}}  # never ends by itself


@cache
def lora_file(name: str) -> Path:
    """One of the demo's adapters as a GGUF LoRA file."""
    path = workspace() / f"{name}.gguf"
    gguflora.convert(demo.HERE / name, demo.BASE, path)
    return path


@contextlib.contextmanager
def engine(base: Path = demo.BASE, **options: Any) -> Iterator[Engine]:
    """The demo's model with both adapters: ids 0 and 1."""
    adapters = {} if "adapters" in options else {name: lora_file(name) for name in demo.ADAPTERS}
    with Engine(base, **{"adapters": adapters, "n_ctx": 512, "threads": 2, **options}) as opened:
        yield opened


@contextlib.contextmanager
def serving(settings: Settings | None = None, base: Path = demo.BASE, **options: Any) -> Iterator[httpx.Client]:
    """A server at work, by default on the demo's model and adapters; a client of it."""
    with engine(base, **options) as opened:
        app = create_app(opened, base, settings)
        server = uvicorn.Server(server_config(app, port=0, timeout_graceful_shutdown=5))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        wait_until(lambda: server.started)
        host, port = server.servers[0].sockets[0].getsockname()
        try:
            with httpx.Client(base_url=f"http://{host}:{port}", timeout=60) as client:
                client.engine = opened  # type: ignore[attr-defined]
                client.changes = app.state.service.adapter_stats  # type: ignore[attr-defined]
                yield client
        finally:
            server.should_exit = True
            thread.join()


def openai_client(client: httpx.Client, key: str = "none") -> openai.OpenAI:
    """OpenAI's own client of the same server."""
    return openai.OpenAI(base_url=str(client.base_url.join("/v1")), api_key=key, max_retries=0, timeout=60)


def wait_until(is_true: Any, seconds: float = 20) -> None:
    """Wait for something that another thread does."""
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@cache
def llama(lora: str | None = None, scale: float = 1.0) -> llama_cpp.Llama:
    """llama-cpp-python with one adapter from its construction on."""
    path = None if lora is None else str(lora_file(lora))
    return llama_cpp.Llama(str(demo.BASE), n_ctx=512, lora_path=path, lora_scale=scale, logits_all=True, verbose=False)


@cache
def expected(lora: str | None = None, scale: float = 1.0, max_tokens: int = 60, **options: Any) -> dict[str, Any]:
    """What llama-cpp-python answers to PROMPT, greedily."""
    return llama(lora, scale)(PROMPT, max_tokens=max_tokens, temperature=0, **options)


def expected_text(lora: str | None = None, scale: float = 1.0) -> str:
    """Its text."""
    return str(expected(lora, scale)["choices"][0]["text"])
