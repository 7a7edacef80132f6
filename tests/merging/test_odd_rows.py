"""Rows that are not whole blocks of the output type: each outtype falls back to what llama-quantize stores."""

import json

import gguf
import numpy as np
import pytest
import safetensors.numpy

import gguflora
from gguflora.errors import GgufloraError
from support.cli import run
from support.llama_quantize import llama_quantize

OUTTYPES = {
    **{name: name for name in ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "IQ4_XS", "IQ3_S")},
    **{name: name for name in ("IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S", "IQ1_M", "TQ1_0", "TQ2_0")},
    **{name: name for name in ("Q2_0", "Q6_K", "Q2_K")},
    **{"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"},
}
"""Types and the preset of llama-quantize that takes each for all tensors."""


def base_of(path, n, n_inner):
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(n)
    writer.add_feed_forward_length(n_inner)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("none")
    shapes = {"token_embd": (32, n), "output": (32, n), "output_norm": (n,), "blk.0.attn_norm": (n,)}
    shapes |= {"blk.0.ffn_norm": (n,), **{f"blk.0.attn_{name}": (n, n) for name in ("q", "k", "v", "output")}}
    shapes |= {"blk.0.ffn_gate": (n_inner, n), "blk.0.ffn_up": (n_inner, n), "blk.0.ffn_down": (n, n_inner)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def adapter_of(path, n, n_inner):
    path.mkdir()
    rng = np.random.default_rng(1)
    modules = {"self_attn.o_proj": (n, n), "mlp.down_proj": (n, n_inner), "mlp.up_proj": (n_inner, n)}
    tensors = {}
    for name, (n_out, n_in) in modules.items():
        at = f"base_model.model.model.layers.0.{name}"
        tensors[f"{at}.lora_A.weight"] = rng.normal(size=(2, n_in)).astype(np.float32)
        tensors[f"{at}.lora_B.weight"] = rng.normal(size=(n_out, 2)).astype(np.float32)
    safetensors.numpy.save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": sorted(modules)}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(("n", "n_inner"), [(96, 160), (80, 176), (36, 72), (50, 66)])
def test_every_outtype_falls_back_as_llama_quantize(n, n_inner, tmp_path):
    base, adapter = base_of(tmp_path / "base.gguf", n, n_inner), adapter_of(tmp_path / "adapter", n, n_inner)
    for outtype, preset in OUTTYPES.items():
        report = gguflora.merge(base, adapter, tmp_path / f"{outtype}.gguf", outtype=outtype.lower())
        assert llama_quantize(base, tmp_path / "expected.gguf", preset, pure=True) == 0
        expected = {
            tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "expected.gguf").tensors
        }
        found = {tensor.name: tensor.type for tensor in report.tensors}
        assert found == {name: expected[name] for name in found}, outtype
        for name, used in found.items():
            said = any(f"{used} instead of {outtype}" in text and name in text for text in report.warnings)
            assert said == (used != outtype), (outtype, report.warnings)


@pytest.mark.parametrize("outtype", ["NVFP4", "Q1_0"])
def test_types_without_a_fallback_are_refused(outtype, tmp_path):
    base, adapter = base_of(tmp_path / "base.gguf", 80, 176), adapter_of(tmp_path / "adapter", 80, 176)
    assert llama_quantize(base, tmp_path / "expected.gguf", outtype, pure=True) != 0
    with pytest.raises(GgufloraError, match=outtype):
        gguflora.merge(base, adapter, tmp_path / "out.gguf", outtype=outtype.lower())


def test_a_single_tensor_is_said_in_the_singular(tmp_path):
    base, adapter = base_of(tmp_path / "base.gguf", 96, 160), adapter_of(tmp_path / "adapter", 96, 160)
    result = run("merge", base, "--lora", adapter, "-o", tmp_path / "out.gguf", "--outtype", "q4_k")
    assert result.returncode == 0
    assert "1 tensor is Q5_0 instead of Q4_K, as llama-quantize stores rows of 160 weights" in result.stderr
    assert "blk.0.ffn_down.weight" in result.stderr
