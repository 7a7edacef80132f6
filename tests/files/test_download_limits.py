"""Remote servers that send more than they should, and a cache that someone else has written to."""

import gzip
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gguflora.errors import RemoteError, UsageError
from gguflora.files.remote import cache, fetch
from support.cli import run_process

CONTENT = b"right" * 1000


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.asked.append(self.command)
        packed = gzip.compress(bytes(50_000_000)) if self.path == "/bomb" else CONTENT
        self.send_response(200)
        self.send_header("ETag", '"one"')
        if self.path == "/bomb":
            self.send_header("Content-Encoding", "gzip")
        if self.path == "/endless":
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(packed)))
        self.end_headers()
        if self.command == "GET":
            self.send(packed)

    def send(self, packed):
        try:
            while self.path == "/endless":
                self.wfile.write(bytes(1 << 20))
                self.server.sent += 1 << 20
            self.wfile.write(packed)
        except OSError:
            self.close_connection = True

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.setenv("GGUFLORA_CACHE", str(tmp_path / "cache"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.asked, server.sent, server.daemon_threads = [], 0, True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    server.server_close()


def test_encoded_answers_are_refused(site, tmp_path):
    with pytest.raises(RemoteError, match="encode"):
        fetch(f"{site.url}/bomb")
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 1_000_000


def test_bodies_without_end(site, monkeypatch, tmp_path):
    monkeypatch.setenv("GGUFLORA_MAX_DOWNLOAD", "3M")
    with pytest.raises(RemoteError, match="--max-download"):
        fetch(f"{site.url}/endless")
    assert site.sent < 64 << 20
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 1_000_000


def test_announced_sizes(site, monkeypatch):
    monkeypatch.setenv("GGUFLORA_MAX_DOWNLOAD", "4K")
    with pytest.raises(RemoteError, match=r"5,000 bytes, more than the 4,096 bytes"):
        fetch(f"{site.url}/x.gguf")
    monkeypatch.setenv("GGUFLORA_MAX_DOWNLOAD", "5K")
    assert fetch(f"{site.url}/x.gguf").read_bytes() == CONTENT
    monkeypatch.setenv("GGUFLORA_MAX_DOWNLOAD", "much")
    with pytest.raises(UsageError, match="GGUFLORA_MAX_DOWNLOAD"):
        cache.max_download()


def test_the_option():
    assert run_process("--max-download", "1G", "doctor", "--json").returncode == 0
    refused = run_process("--max-download", "much", "doctor")
    assert (refused.returncode, "--max-download is 'much'" in refused.stderr) == (1, True)


def forge(path: Path) -> None:
    """Change a file of the cache and its record, as another user of a shared cache can."""
    path.write_bytes(b"wrong" * 1000)
    [record] = (cache.cache_folder() / "checksums").glob("*.json")
    told = json.loads(record.read_text())
    stat = path.stat()
    record.write_text(json.dumps({**told, "stamp": [stat.st_size, stat.st_mtime_ns]}))


def test_pinned_files_are_hashed_again(site, monkeypatch):
    pinned = f"{site.url}/x.gguf#sha256={hashlib.sha256(CONTENT).hexdigest()}"
    path = fetch(pinned)
    assert path.read_bytes() == CONTENT
    forge(path)
    assert fetch(pinned).read_bytes() == CONTENT
    forge(path)
    with pytest.raises(RemoteError, match="SHA-256"):
        fetch(pinned, offline=True)
