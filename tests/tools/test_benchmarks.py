"""The benchmarks run at their smallest setting, and an adaptive merge keeps what a naive one loses."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gguf
import gguf.quants
import llama_cpp
import numpy as np
import pytest
from typer.main import get_command

import gguflora
from support import ROOT, builders
from tools.bench import app
from tools.benchmarks import fidelity_real, models, real_adapters

DEMO = Path(gguflora.__file__).parent / "diagnostics" / "demo_files"


def bench(*arguments):
    command = [sys.executable, "-m", "tools.bench", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def demo_model(tmp_path_factory):
    """The demo as the directory that `python -m tools.bench fidelity --model` takes: F32.gguf and the adapters."""
    home = tmp_path_factory.mktemp("demo")
    reader, writer = gguf.GGUFReader(DEMO / "base.gguf"), gguf.GGUFWriter(home / "F32.gguf", "llama")
    for name, entry in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture", "general.file_type")):
            writer.add_key_value(name, entry.contents(), entry.types[0], entry.types[-1])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name in ("shout", "verse"):
        (home / name).symlink_to(DEMO / name)
    return home


@pytest.mark.slow
def test_fidelity_of_real_models_on_the_demo(demo_model, tmp_path):
    """Its parts, on the demo in place of a model that has to be fetched and an adapter that has to be trained."""
    base, texts = tmp_path / "base.gguf", [tmp_path / "one.txt", tmp_path / "two.txt"]
    precise = fidelity_real.with_noise(DEMO / "base.gguf", tmp_path / "precise.gguf")
    exact, moved = (
        {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
        for path in (demo_model / "F32.gguf", precise)
    )
    for name, values in exact.items():
        assert (np.abs(moved[name] - values).max() > 0) == (values.ndim == 2)
        assert np.abs(moved[name] - values).mean() < 0.01 * max(np.abs(values).max(), 1e-9)
    gguflora.quantize(precise, base, "Q4_0")
    for text in texts:
        text.write_text("THE FOX EATS MICE. ITS HOME IS IN THE FOREST. " * 12)
    cells = list(fidelity_real.cells_of(base, DEMO / "shout", texts, ("demo", "Q4_0", "shout"), 0.1, threads=1))
    assert [(cell.text, cell.rounding) for cell in cells] == [
        (text, rounding) for text in ("domain", "other") for rounding in (*fidelity_real.ROUNDINGS, fidelity_real.FLOOR)
    ]
    nearest, adaptive, calibrated, floor = cells[:4]
    assert 0 < floor.kl < calibrated.kl < adaptive.kl
    assert nearest.kl > 0
    assert 0 < calibrated.kl_half < calibrated.kl
    assert fidelity_real.table_of(cells).row_count == 8
    saved = tmp_path / "cells.json"
    saved.write_text(json.dumps([dataclasses.asdict(cell) for cell in cells]))
    assert fidelity_real.read_cells(saved) == cells
    assert not list(fidelity_real.quality_of_predictions(cells))
    three = [
        dataclasses.replace(adaptive, predicted_noise=0.4 - noise, strength=noise, snr_db=0.0, kl=50 * noise**2)
        for noise in (0.1, 0.3, 0.2)
    ]
    (line,) = fidelity_real.quality_of_predictions(three)
    assert "predicted_noise -1.00, with relative_noise 1.00; KL over relative_noise squared 50 to 50, median 50" in line
    assert fidelity_real.rank_correlation([1, 5, 2], [10, 90, 20]) == pytest.approx(1)


def test_texts_of_real_adapters():
    for adapter in real_adapters.ADAPTERS:
        held_out = real_adapters.held_out_text(adapter, SimpleNamespace(chat_template=None), 4000)
        assert 3000 < len(held_out) <= 4000
    assert not set(real_adapters.answers(held_out=True)) & set(real_adapters.answers(held_out=False))
    assert not set(real_adapters.code(held_out=True)) & set(real_adapters.code(held_out=False))
    telegram = real_adapters.telegrams(held_out=True)[0]
    assert telegram.isupper()
    assert " STOP " in telegram
    assert len(real_adapters.general_text(5000)) > 3000


def test_fidelity_on_the_demo(demo_model, tmp_path):
    out = tmp_path / "out.json"
    arguments = ("--types", "Q4_K", "--scales", "0.25", "--seeds", 2, "--samples", 16)
    shown = bench("fidelity", *arguments, "--model", demo_model, "--json", out)
    cells = json.loads(out.read_text())
    assert [(cell["type"], cell["adapter"], cell["scale"]) for cell in cells] == [
        ("Q4_K", "shout", 0.25),
        ("Q4_K", "verse", 0.25),
    ]
    for cell in cells:
        assert cell["gain"] > 0.01
        assert cell["kl_adaptive"] < cell["kl_naive"] / 5 < cell["kl_base"] / 5
        assert cell["kept_naive"] < 0.5
        assert cell["kept_adaptive"] == pytest.approx(1, abs=0.15)
        assert cell["kept_ideal"] == pytest.approx(1, abs=0.15)
    assert "goals missed in 2 cells" in shown


def test_merge_of_a_tiny_llama(tmp_path):
    out = tmp_path / "out.json"
    shown = bench("merge", "--model", "tiny", "--no-peers", "--repeats", 1, "--folder", tmp_path, "--json", out)
    results = {result["who"]: result for result in json.loads(out.read_text())["results"]}
    assert results.keys() == {"plain copy", "gguflora adaptive", "gguflora nearest"}
    assert all(who in shown for who in results)
    base = tmp_path / "llama-tiny-Q4_K_M.gguf"
    for who in ("gguflora adaptive", "gguflora nearest"):
        assert results[who]["cpu_seconds"] > 0
        assert 20e6 < results[who]["peak_bytes"] < 300e6
        assert results[who]["output_bytes"] == pytest.approx(base.stat().st_size, abs=4096)
    assert {path.name for path in tmp_path.iterdir()} == {base.name, "lora-tiny-r16", "lora-tiny-r16.gguf", out.name}


@pytest.mark.llama
def test_quantizing_a_tiny_llama(tmp_path):
    out = tmp_path / "out.json"
    options = ("--presets", "Q4_K_M,IQ4_XS", "--folder", tmp_path, "--json", out)
    shown = bench("quantize", "--model", "tiny", *options)
    results = json.loads(out.read_text())["results"]
    assert [(found["preset"], found["imatrix"]) for found in results] == [
        (preset, imatrix) for preset in ("Q4_K_M", "IQ4_XS") for imatrix in (False, True)
    ]
    for found in results:
        assert found["cpu_ratio"] == pytest.approx(found["llama.cpp"]["cpu_seconds"] / found["gguflora"]["cpu_seconds"])
        assert 20e6 < found["gguflora"]["peak_bytes"] < 300e6
    assert "IQ4_XS, imatrix" in shown
    assert {path.name for path in tmp_path.iterdir()} == {"llama-tiny-F16.gguf", out.name}


def test_the_random_llama_loads_and_has_the_types_of_q4_k_m(tmp_path):
    """llama.cpp's own quantizer, given the same shapes, chooses the same types."""

    llama = models.LLAMAS["tiny"]
    half, mixed = (models.base_file(tmp_path, llama, recipe) for recipe in ("F16", "Q4_K_M"))
    quantized = tmp_path / "quantized.gguf"
    builders._quantize(half, quantized, "Q4_K_M")
    types = [{t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors} for path in (mixed, quantized)]
    assert types[0] == types[1]
    assert len(set(types[0].values())) == 3
    llm = llama_cpp.Llama(str(mixed), n_ctx=64, n_threads=1, n_threads_batch=1, verbose=False)
    assert llm.tokenize(b"ab") == [1, *llm.tokenize(b"ab", add_bos=False)]
    llm.close()


def test_the_table_of_benchmarks_is_complete():
    """Each command with options that it has, each module, and pages that name the command."""
    rows = re.findall(
        r"^\| (`.+`) \| (`.+`) \| .* \| (.+) \|$", (ROOT / "tools/benchmarks/README.md").read_text(), re.M
    )
    commands = get_command(app).commands
    assert {re.match(r"`(\w+)", row[0])[1] for row in rows} == set(commands)
    for shown, _, pages in rows:
        for words in re.findall(r"`(.+?)`", shown):
            name, *arguments = words.split()
            known = {option for parameter in commands[name].params for option in parameter.opts}
            assert {word for word in arguments if word.startswith("--")} <= known
            page = re.match(r"docs/[\w-]+\.md", pages)[0]
            assert f"tools.bench {name}" in (ROOT / page).read_text()
    modules = {name for _, shown, _ in rows for name in re.findall(r"\w+\.py", shown)}
    found = {path.name for path in (ROOT / "tools/benchmarks").glob("*.py")}
    assert found - modules == {"__init__.py", "models.py", "peers.py", "timing.py"}


def test_training_beside_peft_and_ggml(tmp_path):
    arguments = ("--model", "tiny", "--tokens", 32, "--steps", 2, "--types", "Q4_K", "--folder", tmp_path)
    lines = bench("train", *arguments).splitlines()
    ours, theirs = (line.split("losses ")[1].split() for line in lines[1:3])
    assert [float(loss) for loss in ours] == pytest.approx([float(loss) for loss in theirs], abs=0.01)
    assert ours[0] == theirs[0]
    assert float(lines[3].split("differ by ")[1].rstrip(")")) < 1e-5


def test_algebra_beside_peft(tmp_path):
    out = tmp_path / "out.json"
    arguments = ("--model", "tiny", "--ranks", 4, "--methods", "cat,ties_svd", "--quick", "--folder", tmp_path)
    shown = bench("algebra", *arguments, "--json", out)
    results = json.loads(out.read_text())["results"]
    assert [(result["method"], result["layers"]) for result in results] == [("cat", 8), ("ties_svd", 2)]
    assert all(result[f"{who}_peak_bytes"] > 20e6 for result in results for who in ("our", "peft"))
    assert "of PEFT's time" in shown
    assert list(tmp_path.iterdir()) == [out]
