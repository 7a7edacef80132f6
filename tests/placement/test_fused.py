"""Gate and up, or q, k and v, fused on one side only; and vocabularies with fewer rows than a padded base."""

import json

import numpy as np
import pytest
import safetensors.numpy

import gguflora
from support import builders
from support.asserts import assert_same_changes, changes
from support.oracles.gguf_files import lora_changes, read_tensors

LAYER = "model.layers.1"


def write(folder, shapes):
    """A LoRA of modules with weights of these shapes; its deltas."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    rng, tensors, deltas = np.random.default_rng(1), {}, {}
    for module, (n_out, n_in) in shapes.items():
        a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, n_in), (n_out, 4)))
        tensors |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
        deltas[module] = 2.0 * b.astype(np.float64) @ a
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    return folder, deltas


def rotated(delta, heads):
    """The rows of q or k in the order of llama.cpp's converter (LlamaModel.permute)."""
    return delta.reshape(heads, 2, -1, delta.shape[1]).swapaxes(1, 2).reshape(delta.shape)


def assert_changes(base, adapter, expected, tmp_path):
    gguflora.convert(adapter, base, tmp_path / "lora.gguf")
    assert_same_changes(lora_changes(tmp_path / "lora.gguf"), expected)
    gguflora.merge(base, adapter, tmp_path / "merged.gguf")
    assert_same_changes(changes(base, tmp_path / "merged.gguf"), expected, 1e-4)


@pytest.mark.parametrize("halves", [("gate_proj", "up_proj"), ("up_proj",), ("gate_proj",)])
def test_separate_gate_and_up_against_a_fused_tensor(tmp_path, halves):
    base = builders.gguf_model("phi3")
    width, hidden = read_tensors(base)["blk.1.ffn_up.weight"].shape
    adapter, deltas = write(tmp_path / "a", {f"{LAYER}.mlp.{half}": (width // 2, hidden) for half in halves})
    zeros = np.zeros((width // 2, hidden))
    parts = [deltas.get(f"{LAYER}.mlp.{half}", zeros) for half in ("gate_proj", "up_proj")]
    assert_changes(base, adapter, {"blk.1.ffn_up.weight": np.concatenate(parts)}, tmp_path)


def test_fused_weights_against_separate_tensors(tmp_path):
    base = builders.gguf_model("llama")
    shapes = {name: tensor.shape for name, tensor in read_tensors(base).items()}
    q, k, v, gate = (shapes[f"blk.1.{name}.weight"][0] for name in ("attn_q", "attn_k", "attn_v", "ffn_gate"))
    fused = {f"{LAYER}.self_attn.qkv_proj": (q + k + v, 96), f"{LAYER}.mlp.gate_up_proj": (2 * gate, 96)}
    adapter, deltas = write(tmp_path / "a", fused)
    qkv, gate_up = deltas.values()
    expected = {
        "blk.1.attn_q.weight": rotated(qkv[:q], 4), "blk.1.attn_k.weight": rotated(qkv[q : q + k], 2),
        "blk.1.attn_v.weight": qkv[q + k :],
        "blk.1.ffn_gate.weight": gate_up[:gate], "blk.1.ffn_up.weight": gate_up[gate:],
    }  # fmt: skip
    assert_changes(base, adapter, expected, tmp_path)


@pytest.mark.parametrize(("module", "tensor"), [("lm_head", "output.weight")])
def test_fewer_rows_than_a_padded_base(tmp_path, module, tensor):
    base = builders.gguf_model("llama")
    rows, hidden = read_tensors(base)[tensor].shape
    adapter, deltas = write(tmp_path / "a", {module: (rows - 23, hidden)})
    expected = np.zeros((rows, hidden))
    expected[: rows - 23] = deltas[module]
    assert_changes(base, adapter, {tensor: expected}, tmp_path)
