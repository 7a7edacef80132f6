"""Messages about what people really bring: no traceback, and the way out."""

import json
import shutil

import pytest
import safetensors.numpy

import gguflora
from support import builders
from support.asserts import assert_same_changes, changes
from support.builders import Adapter
from support.cli import run
from support.oracles.gguf_files import lora_changes


@pytest.fixture
def adapter(tmp_path):
    return shutil.copytree(builders.adapter("llama", Adapter(seed=5)), tmp_path / "adapter")


def edit_tensors(directory, edit):
    path = directory / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file(edit(tensors), path)


PLACES = ["lora_A", "lora_B", "modules_to_save", "token_adapter"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shape", [(0,), (0, 64)])
def test_tensors_without_values_name_zero_3(adapter, tmp_path, place, shape):
    added = {
        "modules_to_save": "base_model.model.model.embed_tokens.weight",
        "token_adapter": "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
    }

    def edit(tensors):
        key = added.get(place) or next(name for name in tensors if place in name)
        return tensors | {key: next(iter(tensors.values())).flatten()[:0].reshape(shape)}

    edit_tensors(adapter, edit)
    for words in (
        ["convert", adapter, "--base", builders.gguf_model("llama"), "-o", tmp_path / "out.gguf"],
        ["merge", builders.gguf_model("llama"), "--lora", adapter, "-o", tmp_path / "out.gguf"],
        ["inspect", adapter],
    ):
        result = run(*words)
        assert result.returncode == 1
        assert "ZeRO-3" in result.stderr
        assert "zero_to_fp32.py" in result.stderr
        assert result.stderr.count("error: ") == 1


def test_a_fault_of_the_program_is_one_line(monkeypatch, adapter):
    def fail(*_, **__):
        raise KeyError("a fault\nof two lines")

    monkeypatch.setattr(gguflora, "inspect", fail, raising=False)
    result = run("inspect", adapter, "--json")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "KeyError" in result.stderr
    assert "gguflora doctor" in result.stderr
    error = json.loads(result.stdout)["error"]
    assert error["type"] == "KeyError"
    assert error["exit_code"] == 1
    assert error["message"] in result.stderr


def test_a_change_of_zero_is_a_warning(adapter, tmp_path):
    edit_tensors(adapter, lambda tensors: {k: v * 0 if "lora_B" in k else v for k, v in tensors.items()})
    base = builders.gguf_model("llama")
    assert "all of its changes are zero" in run("inspect", adapter).stderr
    for words in (
        ["convert", adapter, "--base", base, "-o", tmp_path / "out.gguf"],
        ["merge", base, "--lora", adapter, "-o", tmp_path / "merged.gguf"],
    ):
        result = run(*words)
        assert result.returncode == 0, result.stderr
        assert "all of its changes are zero" in result.stderr


def test_a_scale_of_zero_is_a_warning(adapter, tmp_path):
    base = builders.gguf_model("llama")
    report = gguflora.merge(base, [(adapter, 0.0)], tmp_path / "merged.gguf")
    assert any("scale is 0" in text for text in report.warnings)
    assert any("scale is 0" in text for text in gguflora.convert(adapter, base, tmp_path / "a.gguf", scale=0).warnings)


def test_a_misspelt_weight_names_the_nearest(adapter, tmp_path):
    edit_tensors(adapter, lambda tensors: {k.replace("q_proj", "q_projj"): v for k, v in tensors.items()})
    result = run("convert", adapter, "--base", builders.gguf_model("llama"), "-o", tmp_path / "out.gguf")
    assert result.returncode == 1
    assert (
        "nearest to model.layers.0.self_attn.q_projj.weight is model.layers.0.self_attn.q_proj.weight" in result.stderr
    )
    assert "right base" not in result.stderr


def test_q4_k_falls_back_as_llama_quantize(adapter, tmp_path):
    base = builders.gguf_model("llama")  # rows of 96 and 160 weights
    for outtype, expected in (("q4_k", "Q5_0"), ("q6_k", "Q8_0"), ("q2_k", "Q4_0")):
        report = gguflora.merge(base, adapter, tmp_path / f"{outtype}.gguf", outtype=outtype)
        assert {tensor.type for tensor in report.tensors} == {expected}
        assert any(f"{expected} instead of {outtype.upper()}" in text for text in report.warnings)
    result = run("merge", base, "--lora", adapter, "-o", tmp_path / "named.gguf", "--type", "attn_q=q4_k")
    assert result.returncode == 1
    assert "multiple of 256" in result.stderr


@pytest.mark.parametrize(("number", "named"), [
        (139, "IQ4_K of ik_llama.cpp"), (97, "Q8_0_X4 of ik_llama.cpp"), (339, "IQ4_K_R4 of ik_llama.cpp"),
        (31, "Q4_0_4_4 of llama.cpp of 2024"), (36, "I2_S of bitnet.cpp and ik_llama.cpp, or IQ4_NL_4_4"),
        (144, "IQ4_KS of ik_llama.cpp"), (77, "type 77 of a newer llama.cpp or of another program"),
    ],
)  # fmt: skip
def test_types_of_other_programs_convert_and_are_named_by_a_merge(adapter, tmp_path, number, named):
    sound = builders.gguf_model("llama")
    entry = b"blk.0.attn_v.weight" + (2).to_bytes(4, "little") + (96).to_bytes(8, "little") + (64).to_bytes(8, "little")
    content = sound.read_bytes()
    assert content.count(entry) == 1
    base = tmp_path / "base.gguf"
    base.write_bytes(content.replace(entry + bytes(4), entry + number.to_bytes(4, "little")))
    gguflora.convert(adapter, base, tmp_path / "found.gguf")
    gguflora.convert(adapter, sound, tmp_path / "expected.gguf")
    assert (tmp_path / "found.gguf").read_bytes() == (tmp_path / "expected.gguf").read_bytes()
    result = run("merge", base, "--lora", adapter, "-o", tmp_path / "merged.gguf")
    assert result.returncode == 1
    assert named in result.stderr
    report = gguflora.inspect(adapter, base)
    (unread,) = [change for change in report.changes if change.norm is None]
    assert unread.name == "blk.0.attn_v.weight"
    assert any(named in text for text in report.warnings)


VISION = [
    "model.visual.blocks.0.attn.qkv", "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj",
    "model.multi_modal_projector.linear_1", "vision_model.encoder.layers.0.mlp.fc1", "audio_tower.layers.0.fc1",
]  # fmt: skip


@pytest.mark.parametrize("module", VISION)
def test_text_only_takes_the_language_part(adapter, tmp_path, module):
    base = builders.gguf_model("llama")
    gguflora.convert(adapter, base, tmp_path / "expected.gguf")
    gguflora.merge(base, adapter, tmp_path / "expected-merged.gguf")
    plain_spectra = gguflora.inspect(adapter, base, ranks=True).spectra

    def edit(tensors):
        inner = {key.replace("model.model.", "model.model.language_model."): value for key, value in tensors.items()}
        pair = {side: next(v for k, v in tensors.items() if f"lora_{side}" in k) for side in "AB"}
        return inner | {f"base_model.model.{module}.lora_{side}.weight": value for side, value in pair.items()}

    edit_tensors(adapter, edit)
    for words in (
        ["convert", adapter, "--base", base, "-o", tmp_path / "lora.gguf"],
        ["merge", base, "--lora", adapter, "-o", tmp_path / "merged.gguf"],
        ["inspect", adapter, "--base", base],
        ["inspect", adapter, "--base", base, "--ranks"],
    ):
        plain, result = run(*words), run(*words, "--text-only")
        assert plain.returncode == 1
        assert "--text-only" in plain.stderr
        assert "right base" not in plain.stderr
        assert result.returncode == 0, result.stderr
        assert "left out 1 of" in " ".join(result.stderr.split())
        assert f"{module}.weight" in result.stderr
        if "--ranks" in words:
            report = json.loads(run(*words, "--text-only", "--json").stdout)
            found = {entry["name"].partition(".layers.")[2] for entry in report["spectra"]}
            assert found == {spectrum.name.partition(".layers.")[2] for spectrum in plain_spectra}
    assert_same_changes(lora_changes(tmp_path / "lora.gguf"), lora_changes(tmp_path / "expected.gguf"), 0)
    assert_same_changes(*(changes(base, tmp_path / name) for name in ("merged.gguf", "expected-merged.gguf")), 0)
