"""`gguflora.convert` against PEFT's merge, llama.cpp's own LoRA converter, and logits of llama.cpp and torch."""

import hashlib
import json
import math
import shutil

import gguf
import numpy as np
import pytest
import torch

import gguflora
from support import builders
from support.adapters import PLAIN, UNTIED, VARIANTS, with_embeddings
from support.asserts import assert_same_changes, assert_same_content, merged_changes
from support.builders import ARCHITECTURES, Adapter
from support.oracles import libggml
from support.oracles.gguf_files import lora_changes, read_metadata, read_tensors
from support.oracles.llama_cpp import convert_lora, llama_logits
from support.oracles.peft import peft_logits
from support.workspace import workspace

TYPE_OF = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def convert(arch, spec, out, **options):
    gguflora.convert(builders.adapter(arch, spec), builders.gguf_model(arch), out, **options)
    return out


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_change_equals_pefts_merge(arch, variant, tmp_path):
    out = convert(arch, VARIANTS[variant], tmp_path / "lora.gguf")
    assert_same_changes(lora_changes(out), merged_changes(arch, VARIANTS[variant]))


@pytest.mark.parametrize("variant", ["plain", "rslora", "alpha_pattern", "bfloat16"])
@pytest.mark.parametrize("arch", UNTIED)
def test_embedding_and_head_equal_pefts_merge(arch, variant, tmp_path):
    spec = with_embeddings(arch, dtype=VARIANTS[variant].dtype, options=VARIANTS[variant].options)
    changes = lora_changes(convert(arch, spec, tmp_path / "lora.gguf"))
    assert {"token_embd.weight", "output.weight"} <= changes.keys()
    assert_same_changes(changes, merged_changes(arch, spec))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_plain_lora_equals_llama_cpps_converter(arch, tmp_path):
    """Same names, same factors bit for bit, same alpha: llama.cpp is right about plain LoRA."""
    spec = PLAIN if ARCHITECTURES[arch].tied else with_embeddings(arch, options=(("init_lora_weights", False),))
    ours = gguf.GGUFReader(convert(arch, spec, tmp_path / "ours.gguf", outtype="f32"))
    adapter = builders.adapter(arch, spec)
    theirs = gguf.GGUFReader(convert_lora(adapter, builders.hf_model(arch), tmp_path / "theirs.gguf"))
    found = {tensor.name: np.array(tensor.data) for tensor in ours.tensors}
    expected = {tensor.name: np.array(tensor.data) for tensor in theirs.tensors}
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    for key in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"):
        assert ours.get_field(key).contents() == theirs.get_field(key).contents()


@pytest.mark.parametrize("variant", ["plain", "patterns_rslora"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_configuration_alone_is_a_base(arch, variant, tmp_path):
    """A directory with nothing but config.json gives the same factors as the GGUF file."""
    spec = VARIANTS[variant]
    (tmp_path / "base").mkdir()
    shutil.copy(builders.hf_model(arch) / "config.json", tmp_path / "base")
    gguflora.convert(builders.adapter(arch, spec), tmp_path / "base", tmp_path / "config.gguf")
    assert_same_content(tmp_path / "config.gguf", convert(arch, spec, tmp_path / "gguf.gguf"))


@pytest.mark.parametrize("outtype", ["Q4_K_M", "Q8_0"])
def test_quantized_base_gives_the_same_content(outtype, tmp_path):
    adapter = builders.adapter("llama", PLAIN, "wide")
    gguflora.convert(adapter, builders.gguf_model("llama", "wide", "F32"), tmp_path / "a.gguf")
    gguflora.convert(adapter, builders.gguf_model("llama", "wide", outtype), tmp_path / "b.gguf")
    assert_same_content(tmp_path / "a.gguf", tmp_path / "b.gguf")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_hot_logits_equal_peft(arch, tmp_path):
    spec = VARIANTS["patterns_rslora"]
    out = convert(arch, spec, tmp_path / "lora.gguf")
    hf, adapter, base = builders.hf_model(arch), builders.adapter(arch, spec), builders.gguf_model(arch)
    for scale in (1.0, 0.5):
        expected = peft_logits(hf, adapter, scale)
        assert np.abs(expected - peft_logits(hf)).max() > 0.5, "the adapter must matter"
        assert np.abs(llama_logits(base, out, scale) - expected).max() < 1e-2


@pytest.mark.parametrize(("outtype", "tolerance"), [("f32", 1e-2), ("f16", 1e-2), ("auto", 1e-2), ("bf16", 3e-2)])
def test_hot_logits_with_embedding_and_head(outtype, tolerance, tmp_path):
    """With bfloat16 factors ggml rounds activations to bfloat16, too: auto does not choose them."""
    spec = with_embeddings("llama", dtype=torch.bfloat16)
    out = convert("llama", spec, tmp_path / "lora.gguf", outtype=outtype)
    expected = peft_logits(builders.hf_model("llama"), builders.adapter("llama", spec))
    assert np.abs(llama_logits(builders.gguf_model("llama"), out) - expected).max() < tolerance


@pytest.mark.parametrize("dtype", TYPE_OF)
def test_auto_takes_f16_where_it_is_exact(dtype, tmp_path):
    """Small bfloat16 numbers are not float16 numbers."""
    out = convert("llama", Adapter(dtype=dtype), tmp_path / "lora.gguf")
    stored = {tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors}
    assert stored <= {"float32": {"F32"}, "float16": {"F16"}, "bfloat16": {"F16", "F32"}}[str(dtype).split(".")[1]]
    assert_same_changes(lora_changes(out), merged_changes("llama", Adapter(dtype=dtype)))


def test_auto_shrinks_float32_that_f16_holds(tmp_path):
    """`exact`: multiples of 1/16 up to 3/16."""
    out = convert("llama", Adapter(exact=True), tmp_path / "lora.gguf")
    assert {tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors} == {"F16"}
    assert_same_changes(lora_changes(out), merged_changes("llama", Adapter(exact=True)))


@pytest.mark.parametrize(("outtype", "tolerance"), [("f32", 1e-6), ("f16", 1e-3), ("bf16", 1e-2)])
def test_float_outtypes(outtype, tolerance, tmp_path):
    out = convert("llama", VARIANTS["rank_pattern"], tmp_path / "lora.gguf", outtype=outtype)
    assert {tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors} == {outtype.upper()}
    assert_same_changes(lora_changes(out), merged_changes("llama", VARIANTS["rank_pattern"]), tolerance)


@pytest.mark.parametrize("variant", ["plain", "patterns_rslora"])  # with an alpha, and with folded factors
@pytest.mark.parametrize("scale", [0.5, -2.0, 0.0])
def test_scaled(variant, scale, tmp_path):
    """Also of a GGUF LoRA, stored again."""
    first = convert("llama", VARIANTS[variant], tmp_path / "first.gguf")
    gguflora.convert(first, builders.gguf_model("llama"), tmp_path / "scaled.gguf", scale=scale)
    expected = {name: scale * change for name, change in lora_changes(first).items()}
    found = lora_changes(tmp_path / "scaled.gguf")
    assert found.keys() == expected.keys()
    assert all(np.allclose(found[name], expected[name], rtol=1e-5, atol=1e-6) for name in expected)


@pytest.mark.parametrize("rank", [4, 32])
def test_q8_0_outtype(rank, tmp_path):
    """A factor whose rows are whole blocks of 32 has ggml's own Q8_0 bytes; the others stay close enough."""
    spec = Adapter(rank=rank, alpha=rank)
    exact = read_tensors(convert("llama", spec, tmp_path / "f32.gguf", outtype="f32"))
    out = convert("llama", spec, tmp_path / "q8_0.gguf", outtype="q8_0")
    for tensor in gguf.GGUFReader(out).tensors:
        values = exact[tensor.name]
        if values.shape[1] % 32 == 0:
            assert tensor.tensor_type.name == "Q8_0"
            np.testing.assert_array_equal(tensor.data, libggml.quantize(values, int(tensor.tensor_type)))
    assert_same_changes(lora_changes(out), merged_changes("llama", spec), 1e-2)
    hf, adapter = builders.hf_model("llama"), builders.adapter("llama", spec)
    error = llama_logits(builders.gguf_model("llama"), out) - peft_logits(hf, adapter)
    effect = peft_logits(hf, adapter) - peft_logits(hf)
    assert np.linalg.norm(error) < 0.05 * np.linalg.norm(effect)


@pytest.mark.parametrize(
    ("variant", "alpha"),
    [
        ("plain", 8),
        ("other_rank", 10.5),
        ("rslora", 8 * math.sqrt(6)),
        ("rank_pattern", 8),
        ("alpha_pattern", 0),
        ("patterns_rslora", 0),
    ],
)
def test_metadata(variant, alpha, tmp_path):
    """One alpha if it says all, else 0, which llama.cpp reads as "the factors are in B"."""
    adapter = builders.adapter("qwen3", VARIANTS[variant])
    metadata = read_metadata(convert("qwen3", VARIANTS[variant], tmp_path / "lora.gguf"))
    assert metadata["general.type"] == "adapter"
    assert metadata["general.architecture"] == "qwen3"
    assert metadata["general.name"]
    assert metadata["adapter.type"] == "lora"
    assert metadata["adapter.lora.alpha"] == pytest.approx(alpha, rel=1e-7)
    digest = hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert digest in metadata.values()
    assert gguflora.__version__ in metadata.values()


def test_alpha_is_a_float32(tmp_path):
    out = convert("qwen3", PLAIN, tmp_path / "lora.gguf")
    assert gguf.GGUFReader(out).get_field("adapter.lora.alpha").types == [gguf.GGUFValueType.FLOAT32]


def test_same_bytes_twice_and_anywhere(tmp_path):
    first = convert("llama", PLAIN, tmp_path / "one.gguf").read_bytes()
    assert convert("llama", PLAIN, tmp_path / "two.gguf").read_bytes() == first
    assert str(tmp_path).encode() not in first
    assert str(workspace()).encode() not in first


def test_dry_run_writes_nothing(tmp_path):
    out = tmp_path / "lora.gguf"
    report = gguflora.convert(builders.adapter("llama", PLAIN), builders.gguf_model("llama"), out, dry_run=True)
    assert list(tmp_path.iterdir()) == []
    assert report.dry_run
    assert report.tensors == 14


def test_overwrites_only_with_force(tmp_path):
    out = tmp_path / "lora.gguf"
    out.write_bytes(b"precious")
    with pytest.raises(gguflora.GgufloraError, match=r"lora\.gguf"):
        convert("llama", PLAIN, out)
    assert out.read_bytes() == b"precious"
    convert("llama", PLAIN, out, force=True)
    assert out.read_bytes()[:4] == b"GGUF"
    assert list(tmp_path.iterdir()) == [out]


def test_keys_may_name_the_adapter(tmp_path):
    """Other writers leave the adapter's name in the keys, as PEFT has it in memory."""
    import safetensors.torch

    adapter = tmp_path / "adapter"
    shutil.copytree(builders.adapter("llama", PLAIN), adapter)
    file = adapter / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    renamed = {key.replace(".weight", ".default.weight"): tensor for key, tensor in tensors.items()}
    safetensors.torch.save_file(renamed, file)
    gguflora.convert(adapter, builders.gguf_model("llama"), tmp_path / "lora.gguf")
    assert_same_changes(lora_changes(tmp_path / "lora.gguf"), merged_changes("llama", PLAIN))


def test_partial_targets_touch_nothing_else(tmp_path):
    spec = Adapter(targets=("q_proj", "v_proj"), options=(("layers_to_transform", (1,)),))
    changes = lora_changes(convert("mistral", spec, tmp_path / "lora.gguf"))
    assert changes.keys() == {"blk.1.attn_q.weight", "blk.1.attn_v.weight"}
    assert_same_changes(changes, merged_changes("mistral", spec))


def test_report_is_ready_for_json(tmp_path):
    adapter, base = builders.adapter("llama", VARIANTS["rank_pattern"]), builders.gguf_model("llama")
    report = gguflora.convert(adapter, base, tmp_path / "lora.gguf")
    assert json.loads(json.dumps(report.to_dict()))["tensors"] == 14
    assert report.ranks == (2, 8)
