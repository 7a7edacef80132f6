"""Adapters of mlx-lm, written by hand as it lays them out, against its formula in numpy."""

import json

import architecture_models as zoo
import builders
import numpy as np
import oracles
import pytest
import safetensors.numpy
from test_convert import assert_same_changes
from test_methods_exact import changes

import gguflora
from gguflora.errors import UnsupportedAdapterError

V_PROJ, DOWN = "model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"
RNG = np.random.default_rng(3)


def normal(*shape):
    return (0.2 * RNG.standard_normal(shape)).astype(np.float32)


def write(folder, tensors, **config):
    fields = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 2.5, "dropout": 0.0}, **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    safetensors.numpy.save_file(tensors, folder / "adapters.safetensors")
    return folder


def test_linear_layers_and_embedding(tmp_path):
    tensors = {
        f"{V_PROJ}.lora_a": normal(96, 4), f"{V_PROJ}.lora_b": normal(4, 64),
        f"{DOWN}.lora_a": normal(160, 4), f"{DOWN}.lora_b": normal(4, 96),
        "model.embed_tokens.lora_a": normal(288, 4), "model.embed_tokens.lora_b": normal(4, 96),
    }  # fmt: skip
    product = {name: 2.5 * tensors[f"{name}.lora_a"] @ tensors[f"{name}.lora_b"] for name in (V_PROJ, DOWN)}
    expected = {
        "blk.0.attn_v.weight": product[V_PROJ].T, "blk.1.ffn_down.weight": product[DOWN].T,
        "token_embd.weight": 2.5 * tensors["model.embed_tokens.lora_a"] @ tensors["model.embed_tokens.lora_b"],
    }  # fmt: skip
    adapter, base = write(tmp_path, tensors), builders.gguf_model("llama")
    gguflora.convert(adapter, base, tmp_path / "lora.gguf")
    assert_same_changes(oracles.lora_changes(tmp_path / "lora.gguf"), expected)
    gguflora.merge(base, adapter, tmp_path / "merged.gguf")
    assert_same_changes(changes(base, tmp_path / "merged.gguf"), expected, 1e-4)


def test_dora(tmp_path):
    a, b, m = normal(96, 4), normal(4, 64), 1 + normal(64)
    tensors = {f"{V_PROJ}.lora_a": a, f"{V_PROJ}.lora_b": b, f"{V_PROJ}.m": m}
    base = builders.gguf_model("llama")
    w = oracles.tensors(base)["blk.0.attn_v.weight"].astype(np.float64)
    v = w + 2.5 * (a @ b).T
    expected = {"blk.0.attn_v.weight": (m / np.linalg.norm(v, axis=1))[:, None] * v - w}
    gguflora.merge(base, write(tmp_path, tensors, fine_tune_type="dora"), tmp_path / "merged.gguf")
    assert_same_changes(changes(base, tmp_path / "merged.gguf"), expected, 1e-4)


def test_experts(tmp_path):
    module = "model.layers.1.block_sparse_moe.switch_mlp.gate_proj"
    a, b = normal(4, 3, 64), normal(4, 96, 3)
    base = zoo.gguf_model("mixtral")
    adapter = write(tmp_path, {f"{module}.lora_a": a, f"{module}.lora_b": b})
    gguflora.convert(adapter, base, tmp_path / "lora.gguf")
    assert_same_changes(oracles.lora_changes(tmp_path / "lora.gguf"), {"blk.1.ffn_gate_exps.weight": 2.5 * b @ a})


@pytest.mark.parametrize(
    ("config", "word"),
    [({"fine_tune_type": "full"}, "full"), ({"lora_parameters": {"rank": 4, "alpha": 16, "scale": 10}}, "alpha")],
)
def test_refused(config, word, tmp_path):
    adapter = write(tmp_path, {f"{V_PROJ}.lora_a": normal(96, 4), f"{V_PROJ}.lora_b": normal(4, 64)}, **config)
    with pytest.raises(UnsupportedAdapterError, match=word):
        gguflora.read_adapter(adapter)
