"""Proxies and passwords of the environment, as curl takes them."""

import base64
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from gguflora.errors import RemoteError
from gguflora.files import remote


class Handler(BaseHTTPRequestHandler):
    """A proxy, or a server that wants a password."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        is_open = self.server.password is None or self.headers.get("Authorization") == self.server.password
        self.send_response(200 if is_open else 401)
        self.send_header("Content-Length", "7")
        self.send_header("ETag", '"1"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(b"content")

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("GGUFLORA_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.password = [], None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_proxy(server, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
    path = remote.fetch("http://models.invalid/base.gguf")
    assert path.read_bytes() == b"content"
    assert {asked for asked, _ in server.asked} == {"http://models.invalid/base.gguf"}
    monkeypatch.setenv("no_proxy", "models.invalid")
    with pytest.raises(RemoteError, match=r"http://models\.invalid/other\.gguf: cannot be reached"):
        remote.fetch("http://models.invalid/other.gguf")


def test_a_password_in_netrc(server, tmp_path, monkeypatch):
    server.password = f"Basic {base64.b64encode(b'me:secret').decode()}"
    url = f"http://127.0.0.1:{server.server_port}/base.gguf"
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(RemoteError, match="not authorized"):
        remote.fetch(url)
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert remote.fetch(url).read_bytes() == b"content"
