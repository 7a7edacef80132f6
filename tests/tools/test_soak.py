"""The soak: some seconds of it without a finding, and what it takes for one."""

import pytest

from gguflora.diagnostics import demo
from tools import fuzz_http, soak, soak_requests, watch_health
from tools.soak_requests import Answer, Good


def test_some_seconds(monkeypatch, tmp_path):
    monkeypatch.setattr(soak_requests, "SETS", ("base", "verse"))
    monkeypatch.setattr(soak_requests, "QUESTIONS", soak_requests.QUESTIONS[3:5])
    monkeypatch.setattr(soak, "GROWTH", 1 << 30)  # it is not warm after seconds
    monkeypatch.setattr(soak, "SILENT", 2.0)
    monkeypatch.setattr(soak, "_SETTLE", 1.0)
    (tmp_path / "template").write_text(soak_requests.TEMPLATE)
    soak_requests.write_loadable(tmp_path / "loadable", demo.HERE, ("shout", "verse"))
    options = (f"--chat-template-file={tmp_path / 'template'}", f"--allow-load={tmp_path / 'loadable'}")
    with fuzz_http.command(*options, "--threads=1", "--ctx-size=1024", "--timeout=300") as server:
        report = soak.soak(server, 3, 1, clients=8, seed=1)
    assert report.found == []
    assert report.good.total()
    assert report.hostile.total()
    assert "good answers" in report.lines()[0]


GOOD = Good("/v1/completions", {}, Answer(200, "THE FOX", (-0.1, -0.2)))


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (Answer(200, "THE FOX", (-0.12, -0.2)), None),
        (Answer(200, "the fox", (-0.1, -0.2)), "in place of 'THE FOX'"),
        (Answer(200, "THE FOX", (-0.9, -0.2)), "off by 0.800"),
        (Answer(200, "THE FOX", (-0.1,)), "another number"),
        (Answer(500, "internal"), "status 500"),
    ],
)
def test_wrong_answers(answer, what):
    fault = GOOD.fault(answer)
    assert fault is None if what is None else what in fault


def test_what_is_wrong_at_the_end():
    usage = fuzz_http.Usage
    fine = soak.Report(warm=usage(1, 1 << 30, 20, 9, 1), end=usage(9 << 30, (1 << 30) + (1 << 20), 28, 12, 4))
    assert soak._faults(fine) == []
    worse = soak.Report(warm=usage(1, 1 << 30, 20, 9), end=usage(1, 3 << 29, 60, 12))
    worse.silences = watch_health.Silences(9, 3.0, 0.9, ["status 500"])
    faults = "; ".join(soak._faults(worse))
    assert all(text in faults for text in ("status 500", "silent for 0.90 s", "grown by 512 MB", "60 at the end"))
    assert "the server is gone" in soak._faults(soak.Report(warm=usage(1, 1, 1, 1)))


def test_memory_must_be_level():
    usage = fuzz_http.Usage(1, 1, 1, 1)
    up, flat = [(300 + i) << 20 for i in range(60)], [300 << 20] * 60
    spikes = [value + (400 << 20) * (i % 5 == 0) for i, value in enumerate(flat)]
    warming = [min(value, 310 << 20) for value in up]
    assert [soak._faults(soak.Report(warm=usage, end=usage, memory=m)) for m in (flat, spikes, warming)] == [[], [], []]
    report = soak.Report(warm=usage, end=usage, memory=up)
    assert "memory is not level: 25 MB more" in "; ".join(soak._faults(report))
    assert "302, 308" in report.lines()[-2]


@pytest.mark.parametrize(
    ("path", "event", "text"),
    [
        ("/v1/completions", {"choices": [{"text": "a"}, {"text": "b"}]}, "ab"),
        ("/v1/chat/completions", {"choices": [{"delta": {"content": "a"}}]}, "a"),
        ("/v1/messages", {"type": "content_block_delta", "delta": {"text": "a"}}, "a"),
        ("/v1/messages", {"type": "message_stop"}, ""),
        ("/v1/responses", {"type": "response.output_text.delta", "delta": "a"}, "a"),
        ("/completion", {"content": "a", "stop": False}, "a"),
        ("/completion", {"content": "all", "stop": True}, ""),
    ],
)
def test_texts_of_events(path, event, text):
    assert soak_requests._delta(event) == text


def test_waiting_for_a_core_is_not_the_servers(monkeypatch):
    monkeypatch.setattr(watch_health, "waits", lambda pid: {"7": 1.5, "8": 0.3})
    monkeypatch.setattr(watch_health, "my_wait", lambda: 0.1)
    assert watch_health.own_part(2.0, 7, ({"7": 1.0, "8": 0.3}, 0.0)) == pytest.approx(1.4)
    assert watch_health.own_part(0.2, 7, ({"7": 1.0}, 0.0)) == 0
