"""Stand-ins of what the tests fetch from: the Hugging Face Hub's protocol and a web server, with faults on demand."""

import hashlib
import json
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE = 1000  # bytes from which a file is one of LFS, as on the Hub by its kind


@dataclass
class Repository:
    """A repository at one commit: its files by name."""

    files: dict
    names: list = field(default_factory=list)  # what it says it holds, if that is something else

    @property
    def commit(self):
        listed = [f"{name} {hashlib.sha1(content).hexdigest()}" for name, content in sorted(self.files.items())]
        return hashlib.sha1("\n".join(listed).encode()).hexdigest()


@dataclass
class Site:
    """What a server has, how it fails, and what it was asked.

    Attributes:
        repositories: by ``org/name`` and by revision.
        files: of the web server, by path.
        token: that clients must send.
        cut: bytes of a body after which the connection is closed, by path's end; as often as the number beside it.
        headers: sent in place of the true ones, by path's end.
        status: answered to everything under a path's end.
        ranges: whether it knows them.
        asked: method, path and Range of each request.
    """

    repositories: dict = field(default_factory=dict)
    files: dict = field(default_factory=dict)
    token: str = ""
    cut: dict = field(default_factory=dict)
    headers: dict = field(default_factory=dict)
    status: dict = field(default_factory=dict)
    ranges: bool = True
    asked: list = field(default_factory=list)
    url: str = ""

    def bodies(self, end):
        """The Range of each GET of a file."""
        return [span for method, path, span in self.asked if method == "GET" and path.endswith(end)]


def etag_of(content):
    if len(content) >= LARGE:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serving(site):
    """The site at ``site.url`` while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_GET(self):
            answer(self, site, body=True)

        def do_HEAD(self):
            answer(self, site, body=False)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    site.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()


def answer(request, site, *, body):
    path = unquote(urlsplit(request.path).path)
    site.asked.append((request.command, path, request.headers.get("Range")))
    for end, status in site.status.items():
        if path.endswith(end):
            return send(request, site, status, b"", {"Location": request.path} if 300 <= status < 400 else {}, body)
    if site.token and request.headers.get("Authorization") != f"Bearer {site.token}":
        return send(request, site, 401, b"", {"X-Error-Code": "RepoNotFound"}, body)
    if path.lstrip("/") in site.files:
        content = site.files[path.lstrip("/")]
        return send_file(request, site, content, {"ETag": f'"{hashlib.md5(content).hexdigest()}"'}, body)
    return answer_hub(request, site, path, body)


def answer_hub(request, site, path, body):
    parts = path.strip("/").split("/")
    api = parts[:2] == ["api", "models"]
    org, name, *rest = parts[2:] if api else parts if len(parts) > 1 else (*parts, "", "")
    revisions = site.repositories.get(f"{org}/{name}")
    if revisions is None:
        return send(request, site, 404, b"", {"X-Error-Code": "RepoNotFound"}, body)
    wanted = rest[1] if len(rest) > 1 else "main"
    by_commit = {repository.commit: repository for repository in revisions.values()}
    repository = revisions.get(wanted) or by_commit.get(wanted)
    if repository is None:
        return send(request, site, 404, b"", {"X-Error-Code": "RevisionNotFound"}, body)
    if api:
        names = repository.names or list(repository.files)
        siblings = [sibling(name, repository.files.get(name, b"")) for name in names]
        content = json.dumps({"id": f"{org}/{name}", "sha": repository.commit, "siblings": siblings}).encode()
        return send(request, site, 200, content, {"Content-Type": "application/json"}, body)
    inside = "/".join(rest[2:])
    if inside not in repository.files:
        headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repository.commit}
        return send(request, site, 404, b"", headers, body)
    content = repository.files[inside]
    headers = {"X-Repo-Commit": repository.commit, "ETag": f'"{etag_of(content)}"'}
    if len(content) >= LARGE:
        headers |= {"X-Linked-Etag": f'"{etag_of(content)}"', "X-Linked-Size": str(len(content))}
    return send_file(request, site, content, headers, body)


def sibling(name, content):
    entry = {"rfilename": name, "size": len(content), "blobId": hashlib.sha1(content).hexdigest()}
    if len(content) >= LARGE:
        entry["lfs"] = {"sha256": etag_of(content), "size": len(content), "pointerSize": 130}
    return entry


def send_file(request, site, content, headers, body):
    span, status = request.headers.get("Range"), 200
    if span and site.ranges:
        first, _, last = span.removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last) + 1 if last else len(content), len(content))
        if start >= len(content):
            return send(request, site, 416, b"", headers, body)
        headers = {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(content)}"}
        content, status = content[start:end], 206
    return send(request, site, status, content, {**headers, "Accept-Ranges": "bytes" if site.ranges else "none"}, body)


def send(request, site, status, content, headers, body):
    path = unquote(urlsplit(request.path).path)
    headers = {"Content-Length": str(len(content)), **headers}
    for end, others in site.headers.items():
        if path.endswith(end):
            headers |= others
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name, value)
    request.end_headers()
    if not body:
        return
    for end, (size, times) in site.cut.items():
        if path.endswith(end) and times:
            site.cut[end] = size, times - 1
            content = content[:size]
            request.close_connection = True
    request.wfile.write(content)
    request.wfile.flush()
    if request.close_connection:  # aiohttp drops what it has not handed on when the connection breaks
        time.sleep(0.3)
