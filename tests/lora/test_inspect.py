"""`gguflora.inspect` and the options of the command line that approximate."""

import json
import re

import numpy as np
import peft
import pytest

import gguflora
from gguflora.architectures.base_model import read_base
from gguflora.lora.preflight import check_loadable
from support import builders, zoo
from support.adapters import VARIANTS
from support.asserts import merged_changes
from support.builders import Adapter, Trained
from support.cli import run
from support.hotswap import write_lora
from support.oracles.gguf_files import read_tensors


def test_norms_are_those_of_pefts_merge():
    spec, base = VARIANTS["patterns_rslora"], builders.gguf_model("llama")
    report = gguflora.inspect(builders.adapter("llama", spec), base)
    expected, weights = merged_changes("llama", spec), read_tensors(base)
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


Q, V, TIED = "blk.0.attn_q.weight", "blk.1.attn_v.weight", "token_embd.weight"


def ones(name, rows, columns, rank=2):
    return {f"{name}.lora_a": np.ones((rank, columns), np.float32), f"{name}.lora_b": np.ones((rows, rank), np.float32)}


def problems(report):
    return {change.name: change.problem for change in report.changes if change.problem}


def test_every_pair_of_a_gguf_lora_is_held_against_the_base(tmp_path):
    """What is sound is measured; what llama.cpp would refuse, ignore or abort on is named, tensor by tensor."""
    tensors = ones(Q, 128, 96) | ones(V, 64, 97) | ones("blk.9.attn_q.weight", 128, 96)
    tensors |= ones("blk.1.ffn_up.weight", 160, 96) | ones("output_norm.weight", 96, 1)
    tensors["blk.1.ffn_up.weight.lora_b"][3, 1] = np.nan
    report = gguflora.inspect(write_lora(tmp_path / "odd.gguf", tensors), builders.gguf_model("llama"))
    found = problems(report)
    assert found.keys() == {V, "blk.9.attn_q.weight", "blk.1.ffn_up.weight", "output_norm.weight"}
    for name, said in [
        (V, "expected (2, 96)"),
        ("blk.9.attn_q.weight", "no such tensor"),
        ("output_norm.weight", "vector"),
    ]:
        assert said in found[name]
    assert "NaN" in found["blk.1.ffn_up.weight"]
    (sound,) = (change for change in report.changes if not change.problem)
    assert (sound.name, sound.rank) == (Q, 2)
    assert sound.norm == pytest.approx(8 / 2 * 2 * np.sqrt(128 * 96))
    assert sound.relative == pytest.approx(sound.norm / np.linalg.norm(read_tensors(builders.gguf_model("llama"))[Q]))
    assert report.to_dict()["problems"] == 4


def test_gguf_lora_of_another_architecture(tmp_path):
    report = gguflora.inspect(write_lora(tmp_path / "l.gguf", ones(Q, 128, 96)), builders.gguf_model("qwen2"))
    assert "'qwen2'" in report.warnings[0]
    assert [change.relative for change in report.changes] == [None]
    assert report.problems == 1


def test_gguf_lora_of_a_tied_embedding(tmp_path):
    tensors = {f"{TIED}.lora_a": np.ones((288, 2), np.float32), f"{TIED}.lora_b": np.ones((96, 2), np.float32)}
    lora = write_lora(tmp_path / "tied.gguf", tensors, general__architecture="gemma2")
    assert "aborts" in problems(gguflora.inspect(lora, builders.gguf_model("gemma2")))[TIED]


def test_what_llama_cpp_ignores_is_foreseen_and_refused(tmp_path):
    """Latent attention is computed without adapters, so a GGUF LoRA of it would be applied in part."""
    model = zoo.peft_model("deepseek2", target_modules=["q_b_proj", "o_proj"])
    model.save_pretrained(tmp_path / "adapter")
    base = zoo.gguf_model("deepseek2")
    gguflora.convert(tmp_path / "adapter", base, tmp_path / "lora.gguf")
    for source in ("adapter", "lora.gguf"):
        found = problems(gguflora.inspect(tmp_path / source, base))
        assert found.keys() == {f"blk.{layer}.attn_q_b.weight" for layer in range(2)}
        assert all("without adapters" in said for said in found.values())
    with pytest.raises(gguflora.GgufloraError, match=r"attn_q_b.*without adapters"):
        check_loadable(tmp_path / "lora.gguf", read_base(base))


def test_biases_that_the_base_does_not_have():
    config = {"lora_bias": True, "lora_alpha": 8}
    adapter = builders.trained_adapter("llama", Trained(peft.LoraConfig, ("q_proj",), config))
    report = gguflora.inspect(adapter, builders.gguf_model("llama"))
    biases = [change for change in report.changes if change.name.endswith(".bias")]
    assert len(biases) == 2
    assert all(change.norm and change.relative is None and "vector" in change.problem for change in biases)
