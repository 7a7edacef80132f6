"""Two servers behind nginx, as docs/scaling.md sets them up: nothing is lost while one of them ends and comes back."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from gguflora.diagnostics import demo
from support import ROOT
from support.serving import LONG, PROMPT, engine, lora_file, serving, wait_until

DEPLOY = ROOT / "examples/deploy"
GREEDY = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0}


# -- readiness --


def test_ready_and_alive_are_two_things():
    with serving(n_parallel=1, queue_size=2) as http, ThreadPoolExecutor(5) as pool:
        assert http.get("/ready").json() == {"status": "ready"}
        many = [pool.submit(http.post, "/v1/completions", json=LONG | {"max_tokens": 80}) for _ in range(5)]
        wait_until(lambda: http.get("/ready").status_code == 503)
        assert http.get("/health").status_code == 200
        codes = [answer.result().status_code for answer in many]
        assert codes.count(200) >= 3
        assert set(codes) <= {200, 429}
        assert http.get("/ready").status_code == 200


def test_a_closed_engine_is_not_ready():
    with engine() as opened:
        assert opened.is_ready
    assert not opened.is_ready


# -- manifests --


def test_compose_and_nginx_say_the_same():
    content = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert set(content["services"]) == {"replica-1", "replica-2", "proxy"}
    assert content["services"]["replica-1"] == content["services"]["replica-2"]
    one, other = ((DEPLOY / name).read_text() for name in ("nginx.conf", "nginx-compose.conf"))
    for place, in_compose in (
        ("pid nginx.pid", "pid /run/nginx.pid"),
        ("server 127.0.0.1:8081", "server replica-1:8080"),
        ("server 127.0.0.1:8082", "server replica-2:8080"),
        ("listen 127.0.0.1:8080", "listen 8080"),
    ):
        assert place in one
        one = one.replace(place, in_compose)
    assert one == other


def test_kubernetes_takes_the_manifests():
    validate = pytest.importorskip("kubernetes_validate", reason="needs the package kubernetes-validate")
    for manifest in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()):
        validate.validate(manifest, "1.30", strict=True)


def test_probes_ask_for_what_there_is():
    deployment = next(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    probes = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")}
    assert probes == {"startup": "/health", "liveness": "/health", "readiness": "/ready"}
    with serving() as http:
        assert {http.get(path).status_code for path in probes.values()} == {200}


# -- behind nginx --


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class Replica:
    """One ``gguflora serve`` on a port of its own, which ends and comes back."""

    def __init__(self):
        self.port = free_port()
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)
        self.process = None

    def start(self):
        loras = [word for name in demo.ADAPTERS for word in ("--lora", f"{name}={lora_file(name)}")]
        command = [sys.executable, "-P", "-m", "gguflora", "serve", str(demo.BASE), *loras, "--threads", "1"]
        self.process = subprocess.Popen([*command, "--port", str(self.port)], stderr=subprocess.DEVNULL)
        wait_until(self.is_ready, 120)

    def is_ready(self):
        with contextlib.suppress(httpx.TransportError):
            return self.http.get("/ready").status_code == 200
        return False

    def end(self, number):
        self.process.send_signal(number)
        return self.process.wait(timeout=120)

    def count(self):
        """Completions that it has answered, from its metrics."""
        return sum(
            sample.value
            for family in text_string_to_metric_families(self.http.get("/metrics").text)
            for sample in family.samples
            if sample.name == "gguflora_requests_total" and sample.labels["endpoint"] == "/v1/completions"
        )


@pytest.fixture(scope="module")
def replicas():
    both = [Replica(), Replica()]
    try:
        for replica in both:
            replica.start()
        yield both
    finally:
        for replica in both:
            if replica.process:
                replica.process.kill()
                replica.process.wait()


@pytest.fixture(scope="module")
def proxy(replicas, tmp_path_factory):
    """nginx with the example's configuration, on free ports; its URL."""
    nginx = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if nginx is None:
        pytest.skip("needs nginx")
    folder, port = tmp_path_factory.mktemp("nginx"), free_port()
    text = (DEPLOY / "nginx.conf").read_text()
    for place, number in (("8081", replicas[0].port), ("8082", replicas[1].port), ("8080", port)):
        text = text.replace(f"127.0.0.1:{place}", f"127.0.0.1:{number}")
    scratch = "".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off; master_process off;\n{text.replace('http {', f'http {{ {scratch}', 1)}"
    )
    process = subprocess.Popen([nginx, "-p", folder, "-e", folder / "error.log", "-c", folder / "nginx.conf"])
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: answers(url))
        yield url
    finally:
        process.terminate()
        process.wait()


def answers(url):
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/health").status_code == 200
    return False


def ask(url, model, **more):
    answer = httpx.post(
        f"{url}/v1/completions", json=GREEDY | {"model": model} | more, headers={"X-Adapter": model}, timeout=120
    )
    return answer.status_code, answer.headers.get("X-Replica", ""), answer.json()


@pytest.mark.full
def test_requests_of_an_adapter_stay_on_a_replica(proxy, replicas):
    before = sum(replica.count() for replica in replicas)
    where = {}
    for model in ("shout", "verse", "shout@0.5", "shout+verse", "base", "verse@0.5", "shout@0.25", "verse@0.75"):
        found = [ask(proxy, model) for _ in range(3)]
        assert {code for code, _, _ in found} == {200}
        where[model] = {replica for _, replica, _ in found}
        assert len(where[model]) == 1, "a header keeps them together"
    assert len(set.union(*where.values())) == 2, "and different ones are spread"
    assert sum(replica.count() for replica in replicas) - before == 3 * len(where), "metrics add up"
    assert httpx.get(f"{proxy}/metrics").status_code == 404


class Load:
    """Clients that ask without a pause, and what they got."""

    def __init__(self, url):
        self.url, self.codes, self.stopped = url, [], threading.Event()
        self.pool = ThreadPoolExecutor()

    def __enter__(self):
        self.clients = [self.pool.submit(self.work, model) for model in ("shout", "verse", "base", "shout+verse")]
        return self

    def work(self, model):
        while not self.stopped.is_set():
            code, _, body = ask(self.url, model)
            self.codes.append(code)
            assert body["usage"]["completion_tokens"] > 0

    def __exit__(self, *_):
        self.stopped.set()
        for client in self.clients:
            client.result(timeout=120)
        self.pool.shutdown()

    def wait_for(self, more):
        target = len(self.codes) + more
        wait_until(lambda: len(self.codes) >= target or any(client.done() for client in self.clients), 120)


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_lost_while_one_ends_and_comes_back(number, proxy, replicas):
    with Load(proxy) as load:
        for replica in replicas:
            load.wait_for(6)
            replica.end(number)
            load.wait_for(6)
            replica.start()
        load.wait_for(6)
    assert set(load.codes) == {200}
    assert len(load.codes) >= 30


@pytest.mark.full
def test_a_stream_ends_before_its_server_does(proxy, replicas):
    """SIGTERM in the middle of a streamed answer: all of it comes, and the next request goes to the other replica."""
    body = LONG | {"stream": True, "model": "shout"}
    headers = {"X-Adapter": "shout"}
    with httpx.stream("POST", f"{proxy}/v1/completions", json=body, headers=headers, timeout=120) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data:")
        port = int(re.search(r":(\d+)$", answer.headers["X-Replica"])[1])
        mine = next(replica for replica in replicas if replica.port == port)
        mine.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        code, other, _ = ask(proxy, "shout", max_tokens=4)
        assert code == 200
        assert not other.endswith(f":{port}") or ", " in other
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason": "length"' in rest[-2] or '"finish_reason": "length"' in rest[-3]
    assert mine.process.wait(timeout=60) == 0
    mine.start()
