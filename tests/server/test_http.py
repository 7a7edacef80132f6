"""What HTTP itself asks of a server: HEAD, OPTIONS, Allow; and what curl sends when it is told nothing."""

import json
import subprocess

import pytest

from gguflora.server.settings import Settings
from support import serving
from support.serving import PROMPT, expected_text

GREEDY = {"prompt": PROMPT, "max_tokens": 60, "temperature": 0}


@pytest.fixture(scope="module")
def http():
    with serving.serving() as client:
        yield client


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/lora-adapters", "/metrics", "/v1/models/shout"])
def test_head_is_get_without_a_body(http, path):
    got, head = http.get(path), http.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == got.headers["content-type"]
    assert got.content


def test_head_of_what_is_not_there(http):
    assert http.head("/v1/nothing").status_code == 404
    assert http.head("/v1/models/nothing").status_code == 404
    assert http.head("/v1/completions").status_code == 405


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/completions", "POST, OPTIONS"),
        ("/v1/models", "GET, HEAD, OPTIONS"),
        ("/lora-adapters", "GET, POST, HEAD, OPTIONS"),
    ],
)
def test_allowed_methods(http, path, allowed):
    options = http.options(path)
    assert (options.status_code, options.headers["allow"], options.content) == (204, allowed, b"")
    refused = http.request("DELETE", path)
    assert (refused.status_code, refused.headers["allow"]) == (405, allowed)
    assert refused.json()["error"]["type"] == "invalid_request_error"


def test_options_of_what_is_not_there(http):
    assert http.options("/v1/nothing").status_code == 404


def test_keys_are_asked_for_by_every_method():
    with serving.serving(Settings(api_key="k")) as http:
        for method in ("GET", "HEAD", "OPTIONS", "DELETE"):
            assert http.request(method, "/v1/models").status_code == 401


def test_curl_without_a_header(http):
    url = str(http.base_url.join("/v1/completions"))
    sent = subprocess.run(["curl", "-sS", url, "-d", json.dumps(GREEDY)], capture_output=True, check=True, timeout=60)
    assert json.loads(sent.stdout)["choices"][0]["text"] == expected_text()
    assert http.post("/v1/completions", data={"prompt": "x"}).json()["error"]["code"] == "invalid_json"


def test_overflow_as_clients_look_for_it(http):
    for path, body in (
        ("/v1/completions", {"prompt": [5] * 600}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "fox " * 600}]}),
    ):
        error = http.post(path, json=body).json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert "this model's maximum context length is 512 tokens" in error["message"]


def test_a_missing_adapter_is_404(tmp_path):
    with serving.serving(Settings(allow_load=tmp_path)) as http:
        missing = http.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "missing"})
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "bad_path")
