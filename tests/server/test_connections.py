"""Raw sockets against a server: heads without end, halves of requests, more connections than it has room for."""

import contextlib
import socket
import time

import httpx
import pytest

from gguflora.server.connections import HEAD_BYTES, GuardedProtocol
from support import serving
from support.serving import PROMPT, expected_text

GREEDY = {"model": "base", "prompt": PROMPT, "max_tokens": 60, "temperature": 0}


@pytest.fixture
def http(monkeypatch):
    monkeypatch.setattr(GuardedProtocol, "head_seconds", 0.5)
    monkeypatch.setattr(GuardedProtocol, "max_connections", 8)
    with serving.serving() as client:
        yield client
        assert client.post("/v1/completions", json=GREEDY).json()["choices"][0]["text"] == expected_text()


def connect(http):
    return contextlib.closing(socket.create_connection((http.base_url.host, http.base_url.port), timeout=10))


def answer(raw):
    """Everything until the server closes the connection."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while part := raw.recv(1 << 16):
            received += part
    return received


def test_a_head_without_end(http):
    with connect(http) as raw:
        sent = 0
        with contextlib.suppress(ConnectionError):
            raw.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
            while sent < 1 << 24:
                raw.sendall(b"a: " + b"x" * 1000 + b"\r\n")
                sent += 1005
        assert sent < 1 << 23
        assert answer(raw)[:12] in {b"", b"HTTP/1.1 400"}


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /" + b"a" * (HEAD_BYTES - 1000) + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", b"404"),
        (b"GET /" + b"a" * (1 << 20) + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", b"400"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"a:1\r\n" * 200 + b"Connection: close\r\n\r\n", b"431"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", b"400"),
        (b"GET /health HTTP/1.1\r\n\r\n", b"400"),
        (b"GET /health HTTP/1.0\r\n\r\n", b"400"),
        (b"\x00\x01\x02\r\n\r\n", b"400"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n", b"400"),
        (
            b"POST /lora-adapters HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999\r\nConnection: close\r\n\r\n",
            b"413",
        ),
        (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"400"),
    ],
)
def test_bad_heads(http, head, status):
    with connect(http) as raw:
        with contextlib.suppress(ConnectionError):
            raw.sendall(head)
        got = answer(raw)
        assert got[9:12] in {status, b""} if len(head) > HEAD_BYTES else got[9:12] == status, got[:200]


@pytest.mark.parametrize("start", [b"", b"GET /hea", b"GET /health HTTP/1.1\r\nHost: localh"])
def test_half_a_head_is_given_up(http, start):
    with connect(http) as raw:
        raw.sendall(start)
        assert answer(raw).startswith(b"HTTP/1.1 408")


def test_a_head_that_drips_is_given_up(http):
    with connect(http) as raw, contextlib.suppress(ConnectionError):
        begun = time.monotonic()
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        while time.monotonic() < begun + 8:
            raw.sendall(b"a")
            time.sleep(0.05)
        pytest.fail("the server waited for 8 s")


def test_a_second_head_is_given_up(http):
    with connect(http) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea")
        begun = time.monotonic()
        assert answer(raw).count(b"HTTP/1.1 200") == 1
        assert time.monotonic() < begun + 9  # uvicorn's own time for a connection that it keeps is 5 s


def test_waiting_connections_make_room(http):
    with contextlib.ExitStack() as stack:
        held = []
        for _ in range(40):  # five times as many as there is room for
            raw = stack.enter_context(connect(http))
            raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nhalf")
            held.append(raw)
        with httpx.Client(base_url=http.base_url) as fresh:
            assert fresh.get("/health").status_code == 200
        held[0].settimeout(5)
        with contextlib.suppress(ConnectionError):
            assert held[0].recv(1) == b""


def test_running_answers_do_not_make_room(http):
    body = {"model": "base", "prompt": PROMPT, "max_tokens": 300, "logit_bias": {"1": -100}, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as response, contextlib.ExitStack() as stack:
        lines = response.iter_lines()
        next(lines)
        for _ in range(20):
            stack.enter_context(connect(http))
        assert "data: [DONE]" in list(lines)
        assert response.status_code == 200


def test_long_bodies_in_pieces_and_requests_in_a_row(http):
    body = b'{"model": "base", "prompt": "' + b"a b " * 200_000 + b'"}'
    request = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
    chunked = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunked += b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:10], body[10:100_000], body[100_000:]))
    last = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with connect(http) as raw:
        raw.sendall(request + body + chunked + b"0\r\n\r\n" + last)
        got = answer(raw)
        assert got.count(b"HTTP/1.1 400") == got.count(b"context_length_exceeded") == 2
        assert got.count(b"HTTP/1.1 200") == 1
        assert got.endswith(b'{"status":"ok"}')


def test_answers_before_the_end_of_a_long_request(http):
    """The answer ends while received bytes still wait: they are parsed once, and their end is no end of input."""
    for size in (20_000, 50_000, 200_000, 900_000):
        for head in (b"POST /nothing", b"POST /lora-adapters", b"GET /health"):
            with connect(http) as raw, contextlib.suppress(ConnectionError):
                raw.sendall(head + b" HTTP/1.1\r\nHost: evil.example\r\nContent-Length: %d\r\n\r\n" % size)
                raw.sendall(b"x" * size + b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                answer(raw)
            assert http.get("/health").status_code == 200


BODY = b'{"model": "base", "prompt": "a", "max_tokens": 1}'
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"


def chunks(extension=b"", trailers=b""):
    return b"%x%s\r\n%s\r\n0%s\r\n%s\r\n" % (len(BODY), extension, BODY, extension, trailers)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (POST + CHUNKED + b"\r\n" + chunks(b";a=b"), b"200"),
        (POST + CHUNKED + b"\r\n" + chunks(b"", b"X-Api-Key: a\r\nHost: evil.example\r\n"), b"200"),
        (POST + CHUNKED + b"\r\n" + chunks(b";a=" + b"x" * 1_000_000), b"400"),
        (POST + CHUNKED + b"\r\n" + chunks(b"", b"a: " + b"x" * 1_000_000), b"400"),
        (POST + CHUNKED + b"\r\n" + chunks(b"", b"a: b\r\n" * 100_000), b"400"),
        (POST + CHUNKED + b"\r\n" + b"F" * 30 + b"\r\n", b"400"),
        (POST + CHUNKED + b"\r\n-1\r\n", b"400"),
        (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + chunks(), b"400"),
        (POST + b"Content-Length: 5\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY, b"400"),
        (POST + b"Content-Length: +%d\r\n\r\n" % len(BODY) + BODY, b"400"),
        (POST.replace(b"1.1", b"1.0") + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY, b"200"),
        (POST.replace(b"1.1", b"1.0") + b"\r\n" + BODY, b"400"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n", b"400"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"400"),
    ],
)
def test_odd_bodies(http, request_, status):
    with connect(http) as raw:
        with contextlib.suppress(ConnectionError):
            raw.sendall(request_.replace(b"Host: localhost\r\n", b"Host: localhost\r\nConnection: close\r\n", 1))
        got = b""
        with contextlib.suppress(ConnectionError):
            got = answer(raw)
        assert got.startswith(b"HTTP/1.1 " + status) or (status == b"400" and not got)
    assert http.get("/health").status_code == 200


def test_two_lengths_of_one_body_end_the_connection(http):
    """A proxy that goes by the other length would take the rest for a request of someone else."""
    hidden = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connect(http) as raw:
        raw.sendall(POST + CHUNKED + b"Content-Length: %d\r\n\r\n" % (len(chunks()) + len(hidden)) + chunks() + hidden)
        got = answer(raw)
    assert got.startswith(b"HTTP/1.1 400")
    assert b"not both" in got
    assert got.count(b"HTTP/1.1 ") == 1
