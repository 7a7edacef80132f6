"""A server under load, beside its peers: ``python -m tools.bench serve [--model 1.1b] [--type Q8_0] [--clients 1,4]``.

gguflora, llama.cpp's ``llama-server`` and ``python -m llama_cpp.server`` (one adapter, fixed at its start) offer the
same model and adapters, with the same threads, and are asked in turns. Every client asks one question after another,
each of another text, of its own adapter; answers are streamed and have the same number of tokens. Medians over turns.
CPU seconds are the server's own: on a machine that has other work, they tell more than the wall clock. What llama.cpp
itself gains by decoding several sequences in one batch, with the same file, adapter and threads, is printed below: no
server on it can gain more.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.table import Table

import gguflora
from gguflora.files.strict_json import to_json
from tools.benchmarks.batches import Costs, measure_batches
from tools.benchmarks.models import CACHE, LLAMAS, Llama, adapter_files, base_file
from tools.benchmarks.peers import llama_cpp_tools

INSTALLED = Path(gguflora.__file__).resolve().parent.parent
MODELS = LLAMAS | {"0.2b": Llama("0.2b", 1024, 2816, 12, 16, 4, 32000, 10000.0)}
CORES = len(os.sched_getaffinity(0))
OURS, LLAMA_SERVER, LLAMA_CPP_PYTHON = "gguflora", "llama-server", "llama_cpp.server"
END_OF_TEXT = {"2": -100}  # of models.py's vocabulary: nobody may end early
PROMPT_LETTERS = 64
START_SECONDS = 120
KINDS = ("Q4_K_M", "Q8_0", "F16")


@dataclass(frozen=True)
class Load:
    """How many clients use how many adapters, and what each of them asks for."""

    clients: int
    adapters: int
    requests: int
    tokens: int


@dataclass(frozen=True)
class Answered:
    """One request: seconds to its first text, and to its end."""

    first: float
    whole: float


@dataclass(frozen=True)
class Rates:
    """What a server did under one load: times in seconds, and bytes of memory that no file backs."""

    requests: float
    tokens: float
    cpu: float
    first: float
    first_worst: float
    memory: float


@dataclass(frozen=True)
class Server:
    """A server at work; its most adapters."""

    name: str
    url: str
    most_adapters: int
    pid: int


@contextmanager
def _running(name: str, command: list[object], port: int, most_adapters: int) -> Iterator[Server]:
    """A server as a process of its own, ready to answer."""
    url = f"http://127.0.0.1:{port}"
    environment = os.environ | {"PYTHONPATH": str(INSTALLED)}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env=environment)
        try:
            end = time.monotonic() + START_SECONDS
            while not _answers(url):
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise SystemExit(f"{name} does not start:\n{log.read().decode(errors='replace')[-3000:]}")
                time.sleep(0.1)
            yield Server(name, url, most_adapters, process.pid)
        finally:
            process.terminate()
            process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v1/models", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _gguflora(base: Path, loras: list[Path], most_clients: int, context: int, threads: int) -> tuple[list[object], int]:
    port = _free_port()
    named = [item for number, lora in enumerate(loras) for item in ("--lora", f"a{number}={lora}")]
    limits = ["--ctx", context, "--parallel", most_clients, "--contexts", len(loras), "--threads", threads]
    return [sys.executable, "-P", "-m", "gguflora", "serve", base, *named, *limits, "--port", port], port


def _llama_server(
    base: Path, loras: list[Path], most_clients: int, context: int, threads: int
) -> tuple[list[object], int]:
    port = _free_port()
    adapters = ["--lora", ",".join(map(str, loras)), "--lora-init-without-apply"]
    # it does not give up what its idle slots hold before a request needs it
    limits = ["-c", 2 * context, "-np", most_clients, "--kv-unified", "-t", threads, "-tb", threads]
    tool = llama_cpp_tools(LLAMA_SERVER) / LLAMA_SERVER
    return [tool, "-m", base, *adapters, *limits, "--host", "127.0.0.1", "--port", port], port


def _llama_cpp_python(base: Path, loras: list[Path], context: int, threads: int) -> tuple[list[object], int]:
    port = _free_port()
    limits = ["--n_ctx", context, "--n_threads", threads, "--n_threads_batch", threads, "--interrupt_requests", "false"]
    command = [sys.executable, "-m", "llama_cpp.server", "--model", base, "--lora_path", loras[0]]
    return [*command, *limits, "--host", "127.0.0.1", "--port", port], port


@contextmanager
def _servers(
    names: list[str], base: Path, loras: list[Path], clients: int, context: int, threads: int
) -> Iterator[list[Server]]:
    """Those asked for, all at work; one that cannot be had is left out, and that is said."""
    with ExitStack() as stack:
        running = []
        for name in names:
            if name == OURS:
                (command, port), most = _gguflora(base, loras, clients, context, threads), len(loras)
            elif name == LLAMA_SERVER:
                (command, port), most = _llama_server(base, loras, clients, context, threads), len(loras)
            elif importlib.util.find_spec("sse_starlette"):
                (command, port), most = _llama_cpp_python(base, loras, context, threads), 1
            else:
                print(f"left out: {name}; pip install 'llama-cpp-python[server]'", file=sys.stderr)
                continue
            running.append(stack.enter_context(_running(name, command, port, most)))
        yield running


def ask(client: httpx.Client, body: dict[str, Any]) -> Answered:
    """Ask for a streamed completion.

    Raises:
        SystemExit: if the answer is not as long as asked for.
    """
    started, first, ending = time.perf_counter(), 0.0, None
    with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        if response.status_code != 200:
            raise SystemExit(f"{response.status_code}: {response.read().decode()}")
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            (choice,) = json.loads(line[6:])["choices"]
            if choice["text"] and not first:
                first = time.perf_counter() - started
            ending = choice["finish_reason"] or ending
    if ending != "length":
        raise SystemExit(f"an answer ended by {ending!r}, expected 'length'")
    return Answered(first or time.perf_counter() - started, time.perf_counter() - started)


def _body(server: str, adapter: int, prompt: str, tokens: int) -> dict[str, Any]:
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "logit_bias": END_OF_TEXT}
    return body if server == LLAMA_CPP_PYTHON else body | {"lora": [{"id": adapter, "scale": 1.0}]}


def _cpu_seconds(pid: int) -> float:
    """What a process has used up, all its threads, in the system and outside."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _memory(pid: int) -> float:
    """What a process holds in memory that no file backs."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024.0 for line in lines if line.startswith("RssAnon:"))


def measure(server: Server, load: Load, seed: int) -> Rates:
    """Let the clients of ``load`` ask; every server is asked the same with the same seed."""

    def client(number: int) -> list[Answered]:
        letters = random.Random(f"{seed} {number}")
        # llama-server now and then closes a connection after a stream that it had said to keep
        with httpx.Client(base_url=server.url, timeout=600, headers={"Connection": "close"}) as http:
            return [
                ask(http, _body(server.name, number % load.adapters, _prompt(letters), load.tokens))
                for _ in range(load.requests)
            ]

    with ThreadPoolExecutor(load.clients) as pool:
        started, cpu = time.perf_counter(), _cpu_seconds(server.pid)
        answers = [answer for answers in pool.map(client, range(load.clients)) for answer in answers]
        seconds, cpu = time.perf_counter() - started, _cpu_seconds(server.pid) - cpu
    firsts = sorted(answer.first for answer in answers)
    rate = len(answers) / seconds
    times = cpu / (len(answers) * load.tokens), statistics.median(firsts), firsts[-1]
    return Rates(rate, rate * load.tokens, *times, _memory(server.pid))


def _prompt(letters: random.Random) -> str:
    return "".join(letters.choices("abcdefghij ", k=PROMPT_LETTERS))


def _medians(turns: list[Rates]) -> Rates:
    return Rates(*(statistics.median(getattr(turn, name) for turn in turns) for name in Rates.__annotations__))


def _limits(costs: Costs, clients: list[int], tokens: int) -> list[str]:
    """llama.cpp's own gains, in words."""
    return [
        f"llama.cpp itself, {n} sequences in a batch: {costs.gain(n, tokens, prompts=0):.2f} x the tokens/s of one, "
        f"with prompts and answers as here {costs.gain(n, tokens):.2f} x (by CPU time)"
        for n in clients
        if n > 1
    ]


def _table(results: list[tuple[str, Load, Rates]], model: str, threads: int) -> Table:
    table = Table(title=f"{model}, threads: {threads}, answers of {results[0][1].tokens} tokens")
    for heading in (
        "adapters",
        "clients",
        "server",
        "requests/s",
        "tokens/s",
        "x 1 client",
        "CPU/token",
        "x 1 client",
        "first token",
        "worst",
        "memory",
    ):
        table.add_column(heading, justify="left" if heading == "server" else "right")
    alone = {name: rates for name, load, rates in results if load.clients == load.adapters == 1}
    for name, load, rates in results:
        one = alone.get(name, rates)
        cells = (f"{rates.requests:.2f}", f"{rates.tokens:.1f}", f"{rates.tokens / one.tokens:.2f}")
        times = (f"{rates.cpu * 1e3:.2f} ms", f"{rates.cpu / one.cpu:.2f}", f"{rates.first * 1e3:.0f} ms")
        last = (f"{rates.first_worst * 1e3:.0f} ms", f"{rates.memory / 1e6:.0f} MB")
        table.add_row(str(load.adapters), str(load.clients), name, *cells, *times, *last)
    return table


def _loads(clients: list[int], adapters: list[int], requests: int, tokens: int) -> list[Load]:
    """Without those in which an adapter has no client."""
    return [Load(c, a, requests, tokens) for a in adapters for c in clients if a <= c]


def serve(
    model: Annotated[str, typer.Option(help=f"Random llama: {', '.join(MODELS)}.")] = "0.2b",
    kind: Annotated[str, typer.Option("--type", help=f"Of its weights: {', '.join(KINDS)}.")] = "Q4_K_M",
    clients: Annotated[str, typer.Option(help="Numbers of clients, separated by commas.")] = "1,4,16",
    adapters: Annotated[str, typer.Option(help="Numbers of adapters, separated by commas.")] = "1,4,8",
    servers: Annotated[str, typer.Option(help="Who serves.")] = f"{OURS},{LLAMA_SERVER},{LLAMA_CPP_PYTHON}",
    requests: Annotated[int, typer.Option(min=1, help="Requests of each client in a turn.")] = 2,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 48,
    repeats: Annotated[int, typer.Option(min=1, help="Turns that each one takes; the median counts.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each server.")] = CORES,
    folder: Annotated[Path, typer.Option(help="Where models and adapters are kept.")] = CACHE,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers here too.")] = None,
) -> None:
    """Requests per second and time to the first token: gguflora, llama-server and llama_cpp.server in turns."""
    if model not in MODELS:
        raise typer.BadParameter(f"{model!r} is no model; there are {', '.join(MODELS)}", param_hint="--model")
    if kind not in KINDS:
        raise typer.BadParameter(f"{kind!r} is not offered; there are {', '.join(KINDS)}", param_hint="--type")
    loads = _loads([int(n) for n in clients.split(",")], [int(n) for n in adapters.split(",")], requests, tokens)
    most_clients, most_adapters = max(load.clients for load in loads), max(load.adapters for load in loads)
    base, (_, lora) = base_file(folder, MODELS[model], kind), adapter_files(folder, MODELS[model])
    context = 64 * -(-most_clients * (PROMPT_LETTERS + tokens + 8) // 64)
    turns: dict[tuple[str, Load], list[Rates]] = {}
    with _servers(servers.split(","), base, [lora] * most_adapters, most_clients, context, threads) as running:
        for turn in range(repeats + 1):  # the first one warms up
            for load in loads:
                for server in running:
                    if load.adapters > server.most_adapters:
                        continue
                    rates = measure(server, load, seed=turn)
                    turns.setdefault((server.name, load), []).append(rates)
                    print(f"turn {turn} of {repeats}: {server.name}: {load}: {rates}", file=sys.stderr, flush=True)
    numbers = sorted({load.clients for load in loads})
    costs = measure_batches(base, lora, numbers, PROMPT_LETTERS + 1, threads)
    results = [(name, load, _medians(rates[1:])) for (name, load), rates in turns.items()]
    Console(width=None if sys.stdout.isatty() else 150).print(_table(results, f"{model} {kind}", threads))
    print(*_limits(costs, numbers, tokens), sep="\n")
    if json_file:
        rows = [{"server": name, **vars(load), **vars(rates)} for name, load, rates in results]
        report = {"model": model, "type": kind, "threads": threads, "llama.cpp": vars(costs), "results": rows}
        json_file.write_text(to_json(report, indent=1) + "\n")
