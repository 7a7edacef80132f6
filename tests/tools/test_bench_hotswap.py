"""The benchmark of adapters at run time, in its smallest setting."""

import json
from pathlib import Path

import pytest

from tools.benchmarks import hotswap as bench


def test_hotswap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = type(bench.LLAMAS["0.1b"])("tiny", 256, 512, 2, 4, 2, 512, 10000.0)
    monkeypatch.setattr("tools.benchmarks.models.POOL_WEIGHTS", 1 << 15)
    monkeypatch.setitem(bench.LLAMAS, "tiny", tiny)
    out = tmp_path / "report.json"
    bench.hotswap(model="tiny", tokens=3, repeats=1, threads=1, folder=tmp_path, out=out)
    report = json.loads(out.read_text())
    speeds = report["speeds"]
    assert speeds.keys() == {"base", "f32", "f16", "q8_0", "merged file", bench.PEER}
    assert all(number > 0 for speed in speeds.values() for number in speed.values())
    loads = report["engine"]["loads"]
    assert loads["f32"]["file_bytes"] > loads["f16"]["file_bytes"] > loads["q8_0"]["file_bytes"]
    assert report["attached"]["apply"] < report["rebuilding_first_token"]
    assert "Llama(lora_path=)" in capsys.readouterr().out
