"""The server's fuzzer: what it takes for a finding, and some hundred requests without one."""

import pytest

from support import serving
from tools import fuzz_http


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (b"", None),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", None),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", None),
        (b"HTTP/1.1 500 Internal Server Error\r\n\r\n", "status 500"),
        (b"HTTP/1.1 200 OK\r\n\r\nTraceback (most recent call last)", "a traceback"),
        (b"Segmentation fault", "no HTTP"),
    ],
)
def test_findings(answer, what):
    found = fuzz_http.judge(answer)
    assert found is None if what is None else found.startswith(what)


def test_some_requests():
    with serving.serving() as http:
        trials, found = fuzz_http.fuzz(fuzz_http.Server(http.base_url.port), 5, seed=1)
        assert trials > 20
        assert found == []
        assert http.get("/health").status_code == 200


def test_a_fault_is_found(monkeypatch):
    with serving.serving() as http:
        monkeypatch.setattr(http.engine, "adapters", lambda: 1 / 0)
        assert "status 500" in "".join(fuzz_http.fuzz(fuzz_http.Server(http.base_url.port), 4, seed=1)[1])
