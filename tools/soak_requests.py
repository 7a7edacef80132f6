"""The requests of the soak: good ones with the answers that they get alone, and hostile ones of every kind."""

from __future__ import annotations

import http.client
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from gguflora.files.strict_json import to_json
from tools import fuzz_http

SETS: Final = ("base", "shout", "verse", "shout@0.5", "shout+verse@0.5")
QUESTIONS: Final = (
    "What does the fox eat?", "What does the deer eat?", "What do you know about owls?", "What is rain?",
    "How is bread made?", "Where does the fox live?",
)  # fmt: skip
MARGIN: Final = 0.4
"""Nats between the two likeliest tokens of every step of an answer that is compared; batches move them by up to 0.1."""
NOISE: Final = 0.15
"""By how much a log probability may differ from the one that the same request gets alone."""
_TOKENS: Final = 24
_TIMEOUT: Final = 300.0

Json = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
        status: HTTP status.
        text: what the model said; of an error, the body.
        logprobs: log probabilities of the tokens, where they were asked for.
    """

    status: int
    text: str
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True)
class Good:
    """A request that has one right answer.

    Attributes:
        path: its path.
        body: its JSON.
        answer: what it gets alone.
    """

    path: str
    body: Json
    answer: Answer = field(default=Answer(0, ""))

    @property
    def kind(self) -> str:
        """A name for the summary."""
        return f"{self.path}{' streamed' if self.body.get('stream') else ''}"

    def fault(self, answer: Answer) -> str | None:
        """Return what is wrong with an answer; None if it is the one that the request gets alone."""
        if answer.status != http.client.OK:
            return f"status {answer.status}: {answer.text[:200]}"
        if answer.text != self.answer.text:
            return f"{answer.text!r} in place of {self.answer.text!r}"
        if len(answer.logprobs) != len(self.answer.logprobs):
            return "another number of log probabilities"
        off = max((abs(a - b) for a, b in zip(answer.logprobs, self.answer.logprobs, strict=True)), default=0.0)
        return f"log probabilities are off by {off:.3f}" if off > NOISE else None


def ask(port: int, path: str, body: Json) -> Answer:
    """Send a request and read its answer, streamed or not."""
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT)
    try:
        client.request("POST", path, to_json(body), {"Content-Type": "application/json"})
        response = client.getresponse()
        content = response.read().decode()
    finally:
        client.close()
    if response.status != http.client.OK:
        return Answer(response.status, content)
    if body.get("stream"):
        return Answer(response.status, "".join(map(_delta, _events(content))))
    try:
        whole = json.loads(content)
    except ValueError:
        return Answer(response.status, content)
    return Answer(response.status, _text(path, whole), _logprobs(whole))


def _events(content: str) -> Iterator[Json]:
    for line in content.splitlines():
        if line.startswith("data: {"):
            yield json.loads(line[6:])


def _delta(event: Json) -> str:
    """Return the text in an event of any of the APIs."""
    if event.get("type") == "content_block_delta":
        return str(event["delta"].get("text", ""))
    if "type" in event:
        return str(event["delta"]) if event["type"] == "response.output_text.delta" else ""
    if "choices" in event:
        return "".join(str(c.get("text") or c.get("delta", {}).get("content") or "") for c in event["choices"])
    return "" if event.get("stop") else str(event.get("content", ""))


def _text(path: str, answer: Json) -> str:
    if path == "/v1/messages":
        return "".join(part["text"] for part in answer["content"])
    if path == "/v1/responses":
        return "".join(part["text"] for item in answer["output"] for part in item["content"])
    if path == "/completion":
        return str(answer["content"])
    if path == "/tokenize":
        return str(answer["tokens"])
    choice = answer["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


def _logprobs(answer: Json) -> tuple[float, ...]:
    found = answer.get("choices", [{}])[0].get("logprobs") or {}
    return tuple(found.get("token_logprobs", ()))


def good_requests(port: int) -> list[Good]:
    """Return requests of every API, each with the answer that it gets alone; call it while nothing else is asked.

    Raises:
        RuntimeError: if too few of the answers are certain.
    """
    found = []
    for model in SETS:
        for question in QUESTIONS:
            for forms in (_texts(model, question), _chats(model, question)):  # a chat may have other tokens
                if _margin(port, *forms[0]) > MARGIN:
                    found += [Good(path, body) for path, body in forms]
    if len(found) < 4 * len(SETS):
        raise RuntimeError(f"only {len(found)} requests have one right answer")
    alone = [Good(one.path, one.body, ask(port, one.path, one.body)) for one in found]
    for one in alone:
        if one.answer.status != http.client.OK or not one.answer.text:
            raise RuntimeError(f"{one.path} {one.body}: {one.answer}")
    return alone


def _margin(port: int, path: str, body: Json) -> float:
    """Return the smallest distance of the two likeliest tokens in an answer."""
    more = {"logprobs": 2} if "prompt" in body else {"logprobs": True, "top_logprobs": 2}
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT)
    client.request("POST", path, to_json({**body, **more}), {"Content-Type": "application/json"})
    found = json.loads(client.getresponse().read())["choices"][0]["logprobs"]
    client.close()
    if "prompt" in body:
        tops: list[list[float]] = [list(top.values()) for top in found["top_logprobs"]]
    else:
        tops = [[each["logprob"] for each in token["top_logprobs"]] for token in found["content"]]
    return min(max(top) - min(top) for top in tops)


def _prompt(question: str) -> str:
    return f"Q: {question}\nA:"


def _texts(model: str, question: str) -> list[tuple[str, Json]]:
    """Return a question as requests that continue a text."""
    body: Json = {"model": model, "prompt": _prompt(question), "max_tokens": _TOKENS, "temperature": 0}
    return [
        ("/v1/completions", {**body, "logprobs": 1}),
        ("/v1/completions", {**body, "stream": True}),
        ("/completion", {**body, "stream": True}),
        ("/tokenize", {"content": _prompt(question)}),
    ]


def _chats(model: str, question: str) -> list[tuple[str, Json]]:
    """Return a question as a chat of every API, streamed and not."""
    body: Json = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": _TOKENS}
    body["temperature"] = 0
    other = {"model": model, "input": question, "max_output_tokens": _TOKENS, "temperature": 0}
    each = (("/v1/chat/completions", body), ("/v1/messages", body), ("/v1/responses", other))
    return [(path, {**form, **more}) for path, form in each for more in ({}, {"stream": True})]


# -- hostile requests --

TEMPLATE: Final = """
{%- set said = messages[-1].content -%}
{%- if said == 'loop' %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}
{%- elif said == 'double' %}{% set n = namespace(x='aaaaaaaa') %}
{%- for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}
{%- elif said == 'product' %}{{ 'x' * 99999999999 }}
{%- elif said == 'long' %}{% for i in range(99999) %}{{ said * 999 }}{% endfor %}
{%- elif said == 'refuse' %}{{ raise_exception('no') }}
{%- else %}{% for message in messages %}{% if message.role == 'user' %}Q: {{ message.content }}{{ '\\n' }}A:
{%- else %}{{ message.content }}{{ '\\n' }}{% endif %}
{%- endfor %}{% endif %}"""
"""A chat template that turns hostile when a message asks for it."""

_ZEROS: Final = b"0," * 900_000
_COSTLY: Final = (
    ("/v1/completions", b'{"prompt": [' + b"{}, " * 500_000 + b"{}]}"),
    ("/v1/completions", b'{"prompt": [' + b'"a",' * 500_000 + b'"a"]}'),
    ("/v1/completions", b'{"prompt": [' + _ZEROS + b"0]}"),
    ("/v1/completions", b'{"model": "base", "max_tokens": 1, "prompt": "' + b"a" * 30_000 + b'"}'),
    ("/v1/completions", b'{"model": "base", "max_tokens": 1, "prompt": "' + b"7" * 1_900_000 + b'"}'),
    ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": [' + _ZEROS + b"0]}]}"),
    ("/v1/messages", b'{"messages": [' + b"[" * 1_900_000 + b"]}"),
    ("/v1/responses", b'{"input": [' + b"[1]," * 400_000 + b"1]}"),
    ("/lora-adapters", b"[" + _ZEROS + b"0]"),
    ("/v1/embeddings", b'{"input": [' + b'"a",' * 400_000 + b'"a"]}'),
    ("/tokenize", b'{"content": "' + b"a" * 1_000_000 + b'"}'),
    ("/tokenize", b'{"content": "' + b" " * 1_000_000 + b'"}'),
    ("/v1/rerank", b'{"query": "a", "documents": [' + b'"a",' * 400_000 + b'"a"]}'),
    ("/detokenize", b'{"tokens": [' + b"1," * 250_000 + b"1]}"),
    ("/v1/completions", b'{"a": ' * 300_000),
    ("/v1/completions", b"\xff" * 1_000_000),
)


@dataclass
class Hostile:
    """Hostile requests of one client.

    Args:
        server: the server.
        described: its OpenAPI description, without loading and unloading.
        loadable: names of the adapters that it may load.
        number: number of the client; it loads adapters under names of its own.
        dice: random numbers.
    """

    server: fuzz_http.Server
    described: Json
    loadable: tuple[str, ...]
    number: int
    dice: random.Random
    held: list[tuple[float, socket.socket]] = field(default_factory=list)

    def kinds(self) -> dict[str, Callable[[], str | None]]:
        """Return what does each kind of request, and says what is wrong with the answer."""
        return {
            "body": self._body,
            "bytes": self._bytes,
            "head": self._head,
            "half": self._half,
            "template": self._template,
            "host": self._host,
            "cancelled": self._cancelled,
            "load": self._load,
        }

    def _post(self, path: str, body: bytes, more: bytes = b"") -> str | None:
        head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n%s" % (path.encode(), more)
        return fuzz_http.judge(self.server.send(head + b"Content-Length: %d\r\n\r\n" % len(body) + body, _TIMEOUT))

    def _body(self) -> str | None:
        path, body = self.dice.choice(_COSTLY)
        kind = self.dice.choice([b"", b"Content-Encoding: gzip\r\n", b"Expect: 100-continue\r\n"])
        return self._post(path, body, kind)

    def _bytes(self) -> str | None:
        raw = fuzz_http.strange_request(self.described, self.dice, self.dice.randrange(2))
        return fuzz_http.judge(self.server.send(raw))

    def _head(self) -> str | None:
        start = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
        raw = self.dice.choice(
            [
                start + b"a: " + b"x" * 1_000_000,
                start + b"a: b\r\n" * 300 + b"\r\n",
                b"GET /" + b"%41" * 300_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
                b"\x16\x03\x01" + b"\0" * 500,
                start * 2 + b"\r\n",
                start + b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: x\r\n\r\n",
            ]
        )
        return fuzz_http.judge(self.server.send(raw))

    def _half(self) -> None:
        """Hold requests that do not end for some seconds, or until the server closes them."""
        now = time.monotonic()
        for until, stream in self.held:
            if until < now:
                stream.close()
        self.held = [item for item in self.held if item[0] >= now]
        starts = [b"", b"GET /hea", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{"]
        while len(self.held) < 24:
            with suppress(OSError):
                stream = socket.create_connection(("127.0.0.1", self.server.port), timeout=10)
                stream.sendall(self.dice.choice(starts))
                self.held.append((now + self.dice.uniform(0, 20), stream))

    def _template(self) -> str | None:
        said = self.dice.choice(["loop", "double", "product", "long", "refuse"])
        path = self.dice.choice(["/v1/chat/completions", "/v1/messages", "/apply-template"])
        body = {"model": "base", "messages": [{"role": "user", "content": said}], "max_tokens": 4}
        answer = ask(self.server.port, path, body)
        return None if answer.status in {400, 429} else f"status {answer.status} for the template {said}"

    def _host(self) -> str | None:
        name = self.dice.choice(["Host: evil.example", "Host: [", "Host: localhost\r\nOrigin: http://evil.example"])
        raw = b"POST /v1/completions HTTP/1.1\r\n%s\r\nConnection: close\r\nContent-Length: 15\r\n\r\n" % name.encode()
        answer = self.server.send(raw + b'{"prompt": "a"}')
        return None if answer[9:12] in {b"400", b"403", b""} else f"{name!r} is answered with {answer[:60]!r}"

    def _cancelled(self) -> None:
        body = {"model": self.dice.choice(SETS), "prompt": _prompt(QUESTIONS[0]), "max_tokens": 500}
        content = to_json({**body, "stream": True, "logit_bias": {"1": -100}}).encode()
        raw = fuzz_http.request_of(b"POST", b"/v1/completions", content)
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.server.port), timeout=10) as stream:
            stream.sendall(raw)
            stream.settimeout(self.dice.choice([0.01, 0.1, 1.0]))
            stream.recv(self.dice.choice([1, 2000, 20_000]))

    def _load(self) -> str | None:
        """Load an adapter under a name of this client's, let it answer, and unload it."""
        source = self.dice.choice([*self.loadable, "missing", "../secret", "damaged"])
        name = f"client-{self.number}-{threading.get_ident()}"
        done = ask(self.server.port, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": source})
        if done.status != http.client.OK:
            return None if done.status in {400, 404} and source not in self.loadable else f"load {source}: {done}"
        if source not in self.loadable:
            return f"{source} was loaded"
        body = {"prompt": _prompt(QUESTIONS[0]), "max_tokens": _TOKENS, "temperature": 0}
        mine = ask(self.server.port, "/v1/completions", {"model": name, **body})
        other = ask(self.server.port, "/v1/completions", {"model": source, **body})
        ask(self.server.port, "/v1/unload_lora_adapter", {"lora_name": name})
        busy = {mine.status, other.status} & {429}
        return None if busy or mine.text == other.text else f"{source}, loaded again, says {mine.text!r}"

    def close(self) -> None:
        """Close what is held."""
        for _, stream in self.held:
            stream.close()
        self.held.clear()


def write_loadable(folder: Path, adapters: Path, names: tuple[str, ...]) -> None:
    """Write the directory that clients may load from: sound adapters, and a damaged one."""
    for name in (*names, "damaged"):
        (folder / name).mkdir(parents=True)
        for file in (adapters / (name if name != "damaged" else names[0])).iterdir():
            content = file.read_bytes()
            damage = name == "damaged" and file.suffix == ".safetensors"
            (folder / name / file.name).write_bytes(content[: len(content) // 2] if damage else content)
