"""Who may use a server without a key: no foreign web page by any name, and no other machine to load adapters."""

import logging
import re

import pytest
from starlette.datastructures import Headers

from gguflora.server import hosts
from gguflora.server.errors import Failure
from gguflora.server.settings import Settings
from gguflora.system.terminal import LogFormatter
from support import serving

OPEN = Settings(host="models.lan")


@pytest.fixture(scope="module")
def http():
    with serving.serving(OPEN) as client:
        yield client


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2:80", "[::1]:8080", "localhost", "LOCALHOST:1", "localhost.",
                                  "192.168.1.7:8080", "[fe80::1]", "models.lan:8080", "Models.LAN"])  # fmt: skip
def test_own_names(http, host):
    assert http.get("/v1/models", headers={"Host": host}).status_code == 200
    origin = http.post("/lora-adapters", json=[], headers={"Host": host, "Origin": f"http://{host}"})
    assert origin.status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8080", "127.0.0.1.evil", "localhost.evil", "127.1",
                                  "0x7f000001", "2130706433", "models.lan.evil", "xn--lcalhost-8ya"])  # fmt: skip
def test_names_of_strangers(http, host):
    reply = http.get("/v1/models", headers={"Host": host})
    assert (reply.status_code, reply.json()["error"]["code"]) == (403, "wrong_host")
    reply = http.post(
        "/v1/unload_lora_adapter", json={"lora_name": "shout"}, headers={"Host": host, "Origin": f"http://{host}"}
    )
    assert (reply.status_code, reply.json()["error"]["code"]) == (403, "wrong_host")


@pytest.mark.parametrize(
    "host", ["", "[", "[::1", "a b", "a:b", "localhost:99999", "user@localhost", "a/b", "[zz]", "local\\host", "é"]
)
def test_hosts_that_are_none(http, host):
    reply = http.get("/v1/models", headers={"Host": host.encode("latin-1")})
    assert reply.status_code == 400, reply.text


@pytest.mark.parametrize("origin", ["http://[", "x", "http://", "http://a b", "//localhost", "http://localhost:x"])
def test_origins_that_are_none(http, origin):
    for method in ("GET", "POST"):
        reply = http.request(method, "/v1/models", headers={"Origin": origin})
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "bad_origin")


def test_a_key_allows_other_names():
    headers = Headers({"host": "models.example"})
    hosts.check_host(headers, Settings(api_key="k"))
    with pytest.raises(Failure, match="without a key"):
        hosts.check_host(headers, Settings())


@pytest.mark.parametrize("address", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1", "localhost"])
def test_this_machine(address):
    assert hosts.is_loopback(address)


@pytest.mark.parametrize("address", ["10.0.0.1", "0.0.0.0", "::", "::ffff:10.0.0.1", "example.com", "", "128.0.0.1"])
def test_other_machines(address):
    assert not hosts.is_loopback(address)


@pytest.mark.parametrize("key", [None, "k"])
def test_other_machines_load_only_with_a_key(tmp_path, key):
    with serving.serving(Settings(api_key=key, allow_load=tmp_path)) as http:
        away = {"X-Forwarded-For": "203.0.113.9", "Authorization": f"Bearer {key}"}  # as a proxy on this machine says
        for path, body in (
            ("/v1/unload_lora_adapter", {"lora_name": "shout"}),
            ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "missing.gguf"}),
        ):
            reply = http.post(path, json=body, headers=away)
            assert (reply.json() if key is None else {}).get("error", {}).get("code") == (
                None if key else "key_required"
            )
            assert (reply.status_code == 403) is (key is None)
        assert ("shout" in {adapter.name for adapter in http.engine.adapters()}) is (key is None)


def test_errors_are_logged_without_v_and_no_client_forges_a_line(monkeypatch):
    lines = []
    handler = logging.Handler()
    handler.setFormatter(LogFormatter("%(levelname)s %(name)s: %(message)s"))
    handler.emit = lambda record: lines.extend(handler.format(record).splitlines())
    logging.getLogger("gguflora").addHandler(handler)
    try:
        with serving.serving() as http:
            monkeypatch.setattr(http.engine, "adapter_set", lambda *_: 1 / 0)
            path = "/v1/models/x%0DERROR%20gguflora:%20forged%1B[2J"
            reply = http.get(path)
            assert (reply.status_code, "the server's log" in reply.json()["error"]["message"]) == (500, True)
    finally:
        logging.getLogger("gguflora").removeHandler(handler)
    assert "ZeroDivisionError" in lines[-1]
    records = [line for line in lines if not line.startswith("    ")]
    assert len(records) == 1
    assert re.fullmatch(
        r"ERROR gguflora\.server\.\w+: GET /v1/models/x\\x0dERROR gguflora: forged\\x1b\[2J failed", records[0]
    )
