"""`gguflora.inspect` and the options of the command line that approximate."""

import json
import re

import builders
import numpy as np
import oracles
import peft
import pytest
from builders import Adapter, Trained
from test_bad_input import run
from test_convert import VARIANTS, merged_changes

import gguflora


def test_norms_are_those_of_pefts_merge():
    spec, base = VARIANTS["patterns_rslora"], builders.gguf_model("llama")
    report = gguflora.inspect(builders.adapter("llama", spec), base)
    expected, weights = merged_changes("llama", spec), oracles.tensors(base)
    assert {change.name for change in report.changes} == expected.keys()
    assert (report.method, report.architecture, report.problems) == ("LORA", "llama", 0)
    for change in report.changes:
        norm = np.linalg.norm(expected[change.name])
        assert change.norm == pytest.approx(norm, rel=1e-4)
        assert change.relative == pytest.approx(norm / np.linalg.norm(weights[change.name]), rel=1e-4)
        assert change.shape == weights[change.name].shape
        assert change.rank in (2, 4, 6, 8)


def test_without_a_base_it_tells_what_the_file_does():
    spec = Adapter(rank=4, alpha=6)
    report = gguflora.inspect(builders.adapter("llama", spec))
    norms = {change.name: change.norm for change in report.changes}
    expected = merged_changes("llama", spec)["blk.1.ffn_down.weight"]
    assert norms["model.layers.1.mlp.down_proj.weight"] == pytest.approx(np.linalg.norm(expected), rel=1e-4)
    assert {(change.rank, change.factor) for change in report.changes} == {(4, 1.5)}


def test_problems_at_run_time_are_foreseen():
    spec = Adapter(targets=("q_proj", "embed_tokens"))
    report = gguflora.inspect(builders.adapter("gemma2", spec), builders.gguf_model("gemma2"))
    problems = {change.name: change.problem for change in report.changes if change.problem}
    assert problems.keys() == {"token_embd.weight"}
    assert "tied" in problems["token_embd.weight"]


def test_change_that_is_not_of_low_rank():
    adapter = builders.trained_adapter("llama", Trained(peft.LoraConfig, ("q_proj",), {"use_dora": True}))
    report = gguflora.inspect(adapter, builders.gguf_model("llama"))
    assert all(change.rank is None and "low rank" in change.problem and change.norm for change in report.changes)


@pytest.mark.parametrize("with_base", [False, True])
def test_command_line(with_base):
    options = ["--base", builders.gguf_model("llama")] if with_base else []
    result = run("inspect", builders.adapter("llama", Adapter()), *options, "--json")
    assert result.returncode == 0
    assert len(json.loads(result.stdout)["changes"]) == 14
    assert "LORA, 14 tensors" in run("inspect", builders.adapter("llama", Adapter()), *options).stdout


@pytest.mark.parametrize("option", [("--rank", 3), ("--energy", 0.9)])
def test_approximation_is_reported(option, tmp_path):
    adapter = builders.trained_adapter("llama", Trained(peft.LoraConfig, ("q_proj",), {"use_dora": True}))
    result = run("convert", adapter, "--base", builders.gguf_model("llama"), "-o", tmp_path / "lora.gguf", *option)
    assert result.returncode == 0, result.stderr
    assert re.search(r"blk\.1\.attn_q\.weight: 0\.\d+", result.stdout)
