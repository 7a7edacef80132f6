"""What docs/distributed.md says of thousands of adapters: its programs run, its recipe is one."""

import shutil
import subprocess
import sys

import numpy as np

import gguflora
from gguflora.diagnostics import demo
from support import builders
from support.builders import Adapter
from support.oracles.gguf_files import read_tensors
from support.pages import texts

PAGE = "docs/distributed.md"


def blocks(language):
    return texts(PAGE, language)


def test_parts_in_python(tmp_path, monkeypatch, capsys):
    shutil.copy(demo.HERE / "base.gguf", tmp_path)
    shutil.copytree(demo.HERE / "shout", tmp_path / "shout")
    monkeypatch.chdir(tmp_path)
    exec(blocks("python")[0], {})
    gguflora.merge("base.gguf", "shout", "plain.gguf")
    assert (tmp_path / "merged.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()
    assert float(capsys.readouterr().out) > 0.9


def test_the_sums_are_what_the_formulas_give():
    said = subprocess.run([sys.executable, "-c", blocks("python")[1]], check=True, capture_output=True, text=True)
    assert said.stdout == blocks("text")[0]


def test_the_recipe(tmp_path):
    """Each adapter converted once, and some merged into each base."""
    for folder, names in (("adapters", range(5)), ("popular", range(2))):
        for name in names:
            (tmp_path / folder / str(name)).mkdir(parents=True)
    (tmp_path / "bases").mkdir()
    for name in ("Q4_K_M", "Q6_K", "Q8_0"):
        (tmp_path / f"bases/model-{name}.gguf").touch()
    (tmp_path / "recipe.toml").write_text(blocks("toml")[-1])
    report = gguflora.run_pipeline(tmp_path / "recipe.toml", dry_run=True)
    assert [result.step for result in report.results] == ["lora"] * 5 + ["merged"] * 2 * 3


def test_one_lora_fits_all_types_of_its_model(tmp_path):
    adapter = builders.adapter("llama", Adapter(seed=3), "wide")
    for name in ("Q4_K_M", "Q8_0"):
        gguflora.convert(adapter, builders.gguf_model("llama", "wide", name), tmp_path / name)
    found, expected = read_tensors(tmp_path / "Q4_K_M"), read_tensors(tmp_path / "Q8_0")
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
