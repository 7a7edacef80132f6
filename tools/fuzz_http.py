"""Send damaged and strange requests to a server, and say what it must not do: ``python -m tools.fuzz http``."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tools import watch_health

SILENT = 1.0
"""Seconds in which /health must be answered, whatever is sent. (A machine under load is slow itself.)"""
KEPT = 200 << 20
"""Bytes by which the server may have grown at the end."""
_PATIENCE = 0.3
_START_SECONDS = 120.0
_EVERY = 20
_EXPECTED = {503, 504, 501}


@dataclass(frozen=True)
class Usage:
    """What a server holds.

    Attributes:
        memory: bytes in memory, those of its processes for templates included.
        own: bytes in memory without them.
        files: open files, sockets included.
        threads: threads.
        processes: processes for templates.
    """

    memory: int = 0
    own: int = 0
    files: int = 0
    threads: int = 0
    processes: int = 0


@dataclass
class Server:
    """A server to fuzz.

    Attributes:
        port: its port on 127.0.0.1.
        pid: its process; None if it runs in this one, whose memory is not the server's.
        said: the end of its log if it has a traceback; known when it has ended.
    """

    port: int
    pid: int | None = None
    said: str = ""

    def send(self, raw: bytes, patience: float = _PATIENCE) -> bytes:
        """Send bytes and return what comes back until the server is silent or closes the connection.

        Args:
            raw: the bytes.
            patience: seconds without a byte after which the server counts as silent.
        """
        received = bytearray()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=10) as stream:
            stream.sendall(raw)
            stream.settimeout(patience)
            while part := stream.recv(1 << 16):
                received += part
        return bytes(received)

    def health(self) -> float:
        """Return the seconds that /health took; of a server in a process of its own, without waiting for a core.

        Raises:
            OSError: if it is not answered at all.
        """
        before = ({} if self.pid is None else watch_health.waits(self.pid), watch_health.my_wait())
        started = time.monotonic()
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        client.request("GET", "/health")
        status = client.getresponse().status
        client.close()
        if status != 200:
            raise OSError(f"/health has the status {status}")
        took = time.monotonic() - started
        return took if self.pid is None else watch_health.own_part(took, self.pid, before)

    def description(self) -> dict[str, Any]:
        """Return the server's OpenAPI description."""
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        client.request("GET", "/openapi.json")
        described: dict[str, Any] = json.loads(client.getresponse().read())
        client.close()
        return described

    def memory(self) -> int:
        """Return the bytes that the server has in memory; 0 in this process."""
        return 0 if self.pid is None else self.usage().memory

    def usage(self) -> Usage:
        """Return what the server holds, with the processes that it has started; nothing if it has ended."""
        assert self.pid is not None
        try:
            folder = Path(f"/proc/{self.pid}")
            children = [pid for path in folder.glob("task/*/children") for pid in path.read_text().split()]
            own = _resident(folder)
            memory = own + sum(_resident(Path(f"/proc/{pid}")) for pid in children)
            files, threads = (len(list((folder / name).iterdir())) for name in ("fd", "task"))
            return Usage(memory, own, files, threads, len(children))
        except OSError:
            return Usage()


def _resident(folder: Path) -> int:
    """Return the bytes that a process has in memory."""
    try:
        return int(re.findall(r"VmRSS:\s+(\d+)", (folder / "status").read_text())[0]) << 10
    except (OSError, IndexError):  # it has ended
        return 0


@contextlib.contextmanager
def command(*options: str) -> Iterator[Server]:
    """``gguflora serve`` with the demo's model in a process of its own.

    Args:
        *options: further options of the command.

    Yields:
        The server; at the end, `Server.said` is what it has logged with a traceback.
    """
    from gguflora.diagnostics import demo  # noqa: PLC0415  (loads numpy)

    adapters = [f"--lora={name}={demo.HERE / name}" for name in demo.ADAPTERS]
    arguments = ["serve", str(demo.BASE), *adapters, "--port=0", *(options or ("--timeout=5",))]
    with tempfile.TemporaryFile("w+") as log:  # a pipe that nobody reads would stop the server
        process = subprocess.Popen([sys.executable, "-P", "-m", "gguflora", *arguments], stderr=log)
        server = Server(_port(process, log), process.pid)
        try:
            yield server
        finally:
            process.terminate()
            process.wait(30)
            log.seek(0)
            said = log.read()
            server.said = said[-4000:] if "Traceback" in said else ""


def _port(process: subprocess.Popen[bytes], log: IO[str]) -> int:
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        log.seek(0)
        if found := re.search(r"http://127\.0\.0\.1:(\d+)", log.read()):
            return int(found[1])
        time.sleep(0.05)
    process.kill()
    log.seek(0)
    raise SystemExit(f"the server did not start: {log.read()}")


def fuzz(server: Server, seconds: float, seed: int) -> tuple[int, list[str]]:
    """Send requests for some time.

    Returns:
        The number of requests, and what was found.
    """
    dice, found = random.Random(seed), dict[str, None]()
    described = server.description()
    for raw in [strange_request(described, dice, kind) for kind in range(20)]:  # loads what is loaded late
        server.send(raw)
    before, end, trials = server.memory(), time.monotonic() + seconds, 0
    while time.monotonic() < end:
        raw = strange_request(described, dice, trials)
        trials += 1
        if what := judge(server.send(raw)):
            found[f"{what} after {raw[:300]!r}"] = None
        if trials % _EVERY == 0:
            try:
                took = server.health()
            except (OSError, http.client.HTTPException) as error:
                found[f"the server is gone ({error}) after {raw[:300]!r}"] = None
                break
            if took > SILENT:
                found[f"/health took {took:.1f} s after {raw[:300]!r}"] = None
    if (kept := server.memory() - before) > KEPT:
        found[f"the server keeps {kept >> 20} MB"] = None
    return trials, list(found)


def judge(answer: bytes) -> str | None:
    """Return what is wrong with an answer; an empty one is right."""
    if not answer:
        return None
    status = re.match(rb"HTTP/1\.1 (\d{3}) ", answer)
    if status is None:
        return f"no HTTP: {answer[:80]!r}"
    if int(status[1]) >= 500 and int(status[1]) not in _EXPECTED:
        return f"status {int(status[1])}"
    if b"Traceback" in answer:
        return "a traceback"
    return None


def strange_request(described: dict[str, Any], dice: random.Random, number: int) -> bytes:
    """Return a request that follows the description more or less; every second one is damaged."""
    path, method, body = _described(described, dice)
    raw = request_of(method.encode(), path.encode(), json.dumps(body).encode() if method == "POST" else b"")
    return raw if number % 2 else _damaged(raw, dice)


def request_of(method: bytes, path: bytes, body: bytes) -> bytes:
    """Return a sound request in HTTP."""
    head = b"%s %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n" % (
        method,
        path,
    )
    return head + (b"Content-Length: %d\r\n\r\n" % len(body)) + body


# -- JSON by the description --

_SCALARS: list[Any] = [
    None, True, False, 0, 1, -1, 2, 16, 1 << 31, 1 << 63, 1 << 64, -(1 << 63), 0.5, 1e308, -0.0, "", "a", "base",
    "shout", "shout@0.5", "shout@1e9", "shout+shout", "\x00", "\x1b[2J", "\ud800", "é中😀", "a" * 5000,
    "../../etc/passwd", "\n",
]  # fmt: skip


def _described(described: dict[str, Any], dice: random.Random) -> tuple[str, str, Any]:
    """Return a path, a method and a body that follows the description more or less."""
    path, methods = dice.choice(sorted(described["paths"].items()))
    method = dice.choice(sorted(methods))
    schema = (methods[method].get("requestBody") or {}).get("content", {}).get("application/json", {}).get("schema", {})
    path = re.sub(r"\{[^}]*\}", lambda _: dice.choice(["0", "1", "x", "base", "shout", "%00", "..%2f", "9" * 30]), path)
    return path, method.upper(), _value(schema, described, dice, 0)


def _value(schema: dict[str, Any], described: dict[str, Any], dice: random.Random, depth: int) -> Any:  # noqa: ANN401
    """Return a value for a schema, or anything."""
    if "$ref" in schema:
        schema = described["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    choices = schema.get("anyOf") or schema.get("oneOf")
    if dice.random() < 0.15 or depth > 5:
        return _strange(dice)
    if choices:
        return _value(dice.choice(choices), described, dice, depth + 1)
    if "const" in schema or "enum" in schema:
        return schema.get("const", dice.choice(schema.get("enum", [None])))
    kind = schema.get("type")
    if kind == "object" or "properties" in schema:
        given = schema.get("properties", {})
        needed = set(schema.get("required", ()))
        chosen = [name for name in given if name in needed or dice.random() < 0.25]
        return {name: _value(given[name], described, dice, depth + 1) for name in chosen}
    if kind == "array":
        return [_value(schema.get("items", {}), described, dice, depth + 1) for _ in range(dice.randrange(4))]
    plain: dict[str | None, Any] = {
        "string": dice.choice(["base", "shout", "user", "Q: What?", "text", ""]),
        "integer": dice.choice([0, 1, 3, 8, -1, 100]),
        "number": dice.choice([0, 0.5, 1, 2]),
        "boolean": dice.random() < 0.5,
    }
    return plain[kind] if kind in plain else _strange(dice)


def _strange(dice: random.Random) -> Any:  # noqa: ANN401
    kind = dice.randrange(6)
    if kind == 0:
        return [dice.choice(_SCALARS)] * dice.choice([1, 3, 1000])
    if kind == 1:
        return {str(dice.choice(_SCALARS)): dice.choice(_SCALARS) for _ in range(3)}
    if kind == 2:
        value: Any = dice.choice(_SCALARS)
        for _ in range(dice.choice([3, 50, 200])):
            value = [value] if dice.random() < 0.5 else {"a": value}
        return value
    return dice.choice(_SCALARS)


# -- raw bytes --

_INSERTED = [
    b"\r\n", b"\r\n\r\n", b"\n", b"\0", b" ", b":", b"Host: evil.example\r\n", b"Origin: http://[\r\n", b"Host: [\r\n",
    b"Content-Length: 5\r\n", b"Content-Length: -1\r\n", b"Transfer-Encoding: chunked\r\n", b"Expect: 100-continue\r\n",
    b"Upgrade: websocket\r\nConnection: upgrade\r\n", b"Authorization: Bearer \xff\r\n", b"a" * 70_000,
    b"a: b\r\n" * 300, b"Content-Encoding: gzip\r\n", b"X-Forwarded-For: \x01,,\r\n", b"HTTP/1.1",
    b"?%zz=%", b"{", b'"', b"[" * 2000,
]  # fmt: skip


def _damaged(raw: bytes, dice: random.Random) -> bytes:
    """Change some bytes, mostly of the head."""
    for _ in range(dice.choice([1, 1, 2, 5])):
        end = raw.find(b"\r\n\r\n") + 4 if dice.random() < 0.7 else len(raw)
        at = dice.randrange(max(min(end, len(raw)), 1))
        kind = dice.randrange(5)
        if kind == 0:
            raw = raw[:at] + bytes([dice.randrange(256)]) + raw[at + 1 :]
        elif kind == 1:
            raw = raw[:at]
        elif kind == 2:
            raw = raw[:at] + raw[at + dice.randrange(1, 20) :]
        elif kind == 3:
            line = raw.rfind(b"\n", 0, at) + 1
            raw = raw[:line] + dice.choice(_INSERTED) + raw[line:]
        else:
            raw = raw[:at] + dice.choice(_INSERTED) + raw[at:]
    return raw
