"""What a server refuses, gives up, and survives: full queue, clients that go, time, size, keys, other web pages."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest

from gguflora import errors
from gguflora.diagnostics import demo
from gguflora.errors import GgufloraError
from gguflora.server import freed_memory
from gguflora.server.app import create_app
from gguflora.server.errors import as_failure
from gguflora.server.settings import Settings
from support import serving
from support.serving import LONG, PROMPT, expected_text, lora_file, wait_until

ENDLESS = {**LONG, "max_tokens": 30_000}
GREEDY = {"model": "base", "prompt": PROMPT, "max_tokens": 60, "temperature": 0}
CROWDED = {"n_parallel": 1, "queue_size": 1, "n_ctx": 32_768}


@contextlib.contextmanager
def answering(http, **change):
    """A stream that has begun."""
    with http.stream("POST", "/v1/completions", json={**ENDLESS, "stream": True, **change}) as response:
        lines = response.iter_lines()
        next(lines)
        yield lines


def stats(http):
    return http.engine.stats()


def test_full_queue_is_429():
    with (
        serving.serving(Settings(max_tokens=30_000), **CROWDED) as http,
        answering(http),
        http.stream("POST", "/v1/completions", json={**ENDLESS, "stream": True}) as waiting,
    ):
        assert waiting.status_code == 200
        assert stats(http).queued == 1
        for stream in (False, True):
            refused = http.post("/v1/completions", json={**GREEDY, "stream": stream})
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert refused.json()["error"]["type"] == "rate_limit_error"
        with pytest.raises(openai.RateLimitError):
            serving.openai_client(http).completions.create(**GREEDY)
        assert http.get("/health").status_code == 200
        assert "gguflora_queued 1.0" in http.get("/metrics").text


def test_more_answers_than_the_queue_holds_take_no_place():
    with serving.serving(Settings(max_tokens=30_000), **CROWDED) as http:
        with answering(http):
            assert http.post("/v1/completions", json={**GREEDY, "n": 2}).status_code == 429
            wait_until(lambda: stats(http).queued == 0)
        assert http.post("/v1/completions", json=GREEDY).json()["choices"][0]["text"] == expected_text()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_ends_its_answer(stream):
    with serving.serving(Settings(max_tokens=30_000), n_ctx=32_768) as http:
        if stream:
            with answering(http, n=2):
                assert stats(http).running == 2
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/completions", json={**ENDLESS, "n": 2}, timeout=2.0)
        wait_until(lambda: stats(http).running == stats(http).queued == 0)
        assert stats(http).requests["cancelled"] == 2
        assert stats(http).completion_tokens < 30_000
        assert http.post("/v1/completions", json=GREEDY).json()["choices"][0]["text"] == expected_text()


def test_timeouts():
    with serving.serving(Settings(timeout=1.0, max_tokens=30_000), n_ctx=32_768) as http:
        late = http.post("/v1/completions", json=ENDLESS)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        client = serving.openai_client(http)
        pieces = []
        with pytest.raises(openai.APIError, match="longer than the server allows"):
            pieces.extend(client.completions.create(stream=True, **ENDLESS))
        assert pieces
        assert stats(http).running == 0


@pytest.fixture(scope="module")
def locked():
    """A server with a key, a small limit on bodies, and one name."""
    settings = Settings(api_key="s3cret-ключ", max_body=2000, hosts=frozenset({"127.0.0.1"}))
    with serving.serving(settings) as client:
        yield client


BEARER = {"Authorization": "Bearer s3cret-ключ".encode()}


def test_key(locked):
    for path in ("/v1/models", "/lora-adapters", "/metrics", "/openapi.json", "/lora-adapters/0/changes", "/nothing"):
        assert locked.get(path).status_code == 401
        for wrong in ("Bearer s3cret", "Bearer", "Basic s3cret", "s3cret", "Bearer s3cret-ключ1"):
            refused = locked.get(path, headers={"Authorization": wrong.encode()})
            assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
    assert locked.get("/v1/models", headers=BEARER).status_code == 200
    assert locked.post("/v1/completions", json=GREEDY).status_code == 401
    assert locked.post("/v1/completions", json=GREEDY, headers=BEARER).status_code == 200
    for path in ("/", "/page.js", "/client.js", "/maps.js", "/page.css", "/icon.svg", "/health"):
        assert locked.get(path).status_code == 200
    with pytest.raises(openai.AuthenticationError, match="GGUFLORA_API_KEY"):
        serving.openai_client(locked, key="wrong").models.list()


def test_body_limit(locked):
    large = {**GREEDY, "prompt": "x" * 3000}
    told = locked.post("/v1/completions", json=large, headers=BEARER)
    assert (told.status_code, told.json()["error"]["code"]) == (413, "body_too_large")

    def chunks():  # without Content-Length
        yield b'{"prompt": "'
        for _ in range(30):
            yield b"x" * 100
        yield b'"}'

    assert locked.post("/v1/completions", content=chunks(), headers=BEARER).status_code == 413
    assert locked.post("/v1/completions", json=GREEDY, headers=BEARER).status_code == 200


def test_other_web_pages_are_refused(locked):
    own = str(locked.base_url).rstrip("/")
    for origin, status in ((own, 200), ("https://evil.example", 403), ("null", 403), ("http://127.0.0.1:1", 403)):
        reply = locked.post("/v1/completions", json=GREEDY, headers={**BEARER, "Origin": origin})
        assert reply.status_code == status
        assert "access-control-allow-origin" not in reply.headers
    rebound = locked.get("/v1/models", headers={**BEARER, "Host": "evil.example"})
    assert (rebound.status_code, rebound.json()["error"]["code"]) == (403, "wrong_host")
    asked = locked.options("/v1/completions", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in asked.headers


def test_headers(locked):
    for path in ("/", "/health", "/nothing"):
        headers = locked.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


def test_unforeseen_errors_tell_nothing(monkeypatch, caplog):
    with serving.serving() as http:
        monkeypatch.setattr(http.engine, "tokenize", lambda *_, **__: 1 / 0)
        for stream in (False, True):
            reply = http.post("/v1/completions", json={**GREEDY, "stream": stream})
            assert reply.status_code == 500
            assert reply.json()["error"]["message"].startswith("internal error")
        monkeypatch.undo()
        monkeypatch.setattr("gguflora.server.openai_format.TextForm.delta", lambda *_: 1 / 0)
        body = http.post("/v1/completions", json={**GREEDY, "stream": True}).text
        assert body.startswith('data: {"error": {"message": "internal error')
        assert "[DONE]" not in body
        monkeypatch.undo()
        wait_until(lambda: stats(http).running == 0)
        assert http.post("/v1/completions", json=GREEDY).json()["choices"][0]["text"] == expected_text()
    assert [record.exc_info[0] for record in caplog.records] == [ZeroDivisionError] * 3  # but the operator is told


def test_a_scale_beyond_all_bounds_is_the_clients_error():
    with serving.serving() as http:
        reply = http.post("/v1/completions", json={**GREEDY, "model": "shout@1e9"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "diverged")
        assert http.post("/v1/completions", json=GREEDY).json()["choices"][0]["text"] == expected_text()


def test_messages_lose_their_directories():
    error = GgufloraError("/srv/a/a.gguf: no fit for /home/my models/x/b.gguf (expected 3/4), '/tmp/c/d' and/or /e/f")
    message = as_failure(error, [Path("/home/my models")]).message
    assert message == "a.gguf: no fit for x/b.gguf (expected 3/4), 'd' and/or f"


def test_metrics(locked):
    locked.post("/v1/completions", json=GREEDY, headers=BEARER)
    locked.get("/made/up/path", headers=BEARER)
    text = locked.get("/metrics", headers=BEARER).text
    numbers = dict(re.findall(r"^(gguflora_\S+) (\S+)$", text, flags=re.MULTILINE))
    now = stats(locked)
    assert float(numbers["gguflora_prompt_tokens_total"]) == now.prompt_tokens > 0
    assert float(numbers["gguflora_completion_tokens_total"]) == now.completion_tokens > 0
    assert float(numbers["gguflora_reused_tokens_total"]) == now.reused_tokens
    assert float(numbers["gguflora_kv_bytes"]) == now.kv_bytes > 0
    assert float(numbers["gguflora_swaps_total"]) == now.swaps
    assert float(numbers["gguflora_mixed_steps_total"]) == now.mixed_steps
    assert float(numbers["gguflora_single_steps_total"]) == now.single_steps > 0
    assert float(numbers["gguflora_queued"]) == 0
    assert float(numbers['gguflora_answers_total{reason="stop"}']) == now.requests["stop"]
    assert float(numbers["gguflora_time_to_first_token_seconds_count"]) == now.requests["stop"]
    assert float(numbers['gguflora_requests_total{endpoint="/v1/completions",status="200"}']) == now.requests["stop"]
    assert "made" not in text


@contextlib.contextmanager
def command(*options, **environment):
    """``gguflora serve`` in a process of its own, and its URL."""
    arguments = [demo.BASE, "--lora", f"shout={lora_file('shout')}", "--port", "0", *options]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "gguflora", "serve", *map(str, arguments)],
        stderr=subprocess.PIPE, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    try:
        said = process.stderr.readline()
        found = re.fullmatch(r"serving base with shout at (http://\S+) \(press Ctrl\+C to stop\)\n", said)
        assert found, said
        with httpx.Client(base_url=found[1], timeout=60) as client:
            yield process, client
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_terminated_server_ends_its_answers_first(number):
    with command() as (process, http):
        with answering(http, max_tokens=450) as lines:
            process.send_signal(number)
            rest = list(lines)
        assert rest[-2] == "data: [DONE]"
        assert '"finish_reason": "length"' in rest[-4]
        assert process.wait(timeout=20) == 0
        assert process.stderr.read() == ""
        with pytest.raises(httpx.ConnectError):
            http.get("/health")


def test_command_with_a_key_and_other_limits(tmp_path):
    options = ("--allow-load", tmp_path, "--max-tokens", "5", "--timeout", "30", "--queue", "1", "--parallel", "1")
    with command(*options, GGUFLORA_API_KEY="k") as (_, http):
        assert http.get("/v1/models").status_code == 401
        http.headers["Authorization"] = "Bearer k"
        assert http.post("/v1/completions", json=GREEDY).json()["usage"]["completion_tokens"] == 5
        loaded = http.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "x.gguf"})
        assert loaded.json()["error"]["code"] == "bad_path"


def failed_command(*arguments):
    done = subprocess.run(
        [sys.executable, "-P", "-m", "gguflora", "serve", *map(str, arguments)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


def test_command_says_why_it_cannot_start(tmp_path):
    code, said = failed_command(tmp_path / "missing.gguf")
    assert (code, "missing.gguf" in said) == (1, True)
    code, said = failed_command(demo.BASE, "--lora", f"x={demo.BASE}", "--port", "0")
    assert (code, "base.gguf" in said) == (1, True)
    code, said = failed_command(demo.BASE, "--lora", "a=x", "--lora", "a=y")
    assert (code, "two adapters" in said) == (2, True)
    with command() as (_, http):
        code, said = failed_command(demo.BASE, "--port", http.base_url.port)
    assert (code, "cannot listen on 127.0.0.1" in said) == (1, True)


def test_command_names_the_missing_extra():
    code = "import sys; sys.modules['fastapi'] = None; from gguflora.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, "serve", str(demo.BASE)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (1, "error: serve needs fastapi: pip install 'gguflora[server]'\n")


def test_app_has_settings_of_its_own():
    with serving.engine() as engine:
        app = create_app(engine, demo.BASE)
        assert app.state.service.settings == Settings()
        started = time.monotonic()
        assert app.openapi()["info"]["title"] == "gguflora"
        assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.RequestError("top_p is 2"), 400),
        (errors.AdapterNameError("no such adapter"), 404),
        (errors.DivergedError("too large"), 400),
        (errors.GenerationError("llama.cpp failed"), 500),
        (errors.EngineError("no context could be made"), 500),
        (errors.EngineClosedError("closed"), 503),
        (errors.MissingExtraError("a grammar", "llguidance", "server"), 501),
        (errors.HotSwapError("does not fit"), 400),
        (KeyError("x"), 500),
    ],
)
def test_whose_fault_an_error_is(error, status):
    assert as_failure(error).status == status


def test_freed_memory_is_given_back_after_requests(monkeypatch):
    given = []
    monkeypatch.setattr(freed_memory, "EVERY", 0.2)
    monkeypatch.setattr(freed_memory, "give_back_memory", lambda: given.append(time.monotonic()))
    with serving.serving(Settings()) as http:
        for _ in range(3):
            assert http.post("/v1/completions", json={**GREEDY, "max_tokens": 1}).status_code == 200
        wait_until(lambda: given)
        done = len(given)
        time.sleep(0.5)
        assert len(given) <= done + 1, "an idle server has nothing to give back"
