"""Adapters of mlx-lm: written by hand as it lays them out, against its formulas in numpy; and by itself, where it is.

``pip install gguflora[mlx]`` brings mlx-lm, whose fused models are the truth of the tests at the end.
"""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy

import gguflora
from gguflora.errors import UnsupportedAdapterError
from support import builders, zoo
from support.asserts import assert_same_changes, changes
from support.oracles.gguf_files import lora_changes, read_tensors

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
    assert_same_changes(lora_changes(tmp_path / "lora.gguf"), expected)
    gguflora.merge(base, adapter, tmp_path / "merged.gguf")
    assert_same_changes(changes(base, tmp_path / "merged.gguf"), expected, 1e-4)


def test_dora(tmp_path):
    a, b, m = normal(96, 4), normal(4, 64), 1 + normal(64)
    tensors = {f"{V_PROJ}.lora_a": a, f"{V_PROJ}.lora_b": b, f"{V_PROJ}.m": m}
    base = builders.gguf_model("llama")
    w = read_tensors(base)["blk.0.attn_v.weight"].astype(np.float64)
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
    assert_same_changes(lora_changes(tmp_path / "lora.gguf"), {"blk.1.ffn_gate_exps.weight": 2.5 * b @ a})


@pytest.mark.parametrize(
    ("config", "word"),
    [({"fine_tune_type": "vera"}, "'vera'"), ({"lora_parameters": {"rank": 4, "alpha": 16, "scale": 10}}, "alpha")],
)
def test_refused(config, word, tmp_path):
    adapter = write(tmp_path, {f"{V_PROJ}.lora_a": normal(96, 4), f"{V_PROJ}.lora_b": normal(4, 64)}, **config)
    with pytest.raises(UnsupportedAdapterError, match=word):
        gguflora.read_adapter(adapter)


def test_whole_weights(tmp_path):
    """``fine_tune_type`` "full": the trained weights themselves, experts stacked."""
    base, stack = zoo.gguf_model("mixtral"), "model.layers.1.block_sparse_moe.switch_mlp.up_proj.weight"
    tensors = {"model.layers.0.self_attn.v_proj.weight": normal(32, 64), "model.norm.weight": normal(64)}
    config = {"fine_tune_type": "full", "lora_parameters": None}
    gguflora.merge(base, write(tmp_path, tensors | {stack: normal(4, 96, 64)}, **config), tmp_path / "out.gguf")
    found = read_tensors(tmp_path / "out.gguf")
    assert changes(base, tmp_path / "out.gguf").keys() == {
        "blk.0.attn_v.weight", "output_norm.weight", "blk.1.ffn_up_exps.weight"
    }  # fmt: skip
    np.testing.assert_array_equal(found["blk.0.attn_v.weight"], tensors["model.layers.0.self_attn.v_proj.weight"])


# -- against mlx-lm --

LINEAR = ["self_attn.q_proj", "self_attn.v_proj", "self_attn.qkv_proj", "mlp.down_proj"]
EMBEDDING = ["model.embed_tokens", *(f"model.layers.{layer}.{name}" for layer in range(2) for name in LINEAR)]
CASES = [
    *((name, kind, None) for name in ("llama", "phi3", "starcoder2") for kind in ("lora", "dora")),
    *((name, kind, EMBEDDING) for name in ("qwen2", "gemma3", "llama") for kind in ("lora", "dora")),
    *((name, "lora", None) for name in ("mixtral", "olmoe", "qwen2moe")),
]


def fused(name, kind, keys, folder):
    """Save a random adapter of mlx-lm; the weights that its fusion changes, by mlx-lm's names, before and after."""
    mx = pytest.importorskip("mlx.core")
    pytest.importorskip("mlx_lm")
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    model, _ = load_model(zoo.checkpoint(name))
    before = {key: np.array(value) for key, value in tree_flatten(model.parameters())}
    parameters = {"rank": 3, "scale": 2.5, "dropout": 0.0} | ({"keys": keys} if keys else {})
    linear_to_lora_layers(model, len(model.layers), parameters, use_dora=kind == "dora")
    tensors = {}
    for key, value in tree_flatten(model.parameters()):
        leaf = key.rpartition(".")[2]
        if leaf in {"lora_a", "lora_b"}:
            tensors[key] = mx.array(normal(*value.shape))
        elif leaf == "m":
            tensors[key] = value * mx.array(1 + 0.3 * normal(*value.shape))
    model.load_weights(list(tensors.items()), strict=False)
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
    fields = {"fine_tune_type": kind, "num_layers": len(model.layers), "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    fusions = [(key, module.fuse()) for key, module in model.named_modules() if hasattr(module, "fuse")]
    model.update_modules(tree_unflatten(fusions))
    after = {key: np.array(value) for key, value in tree_flatten(model.parameters())}
    return before, after


@pytest.mark.parametrize(("name", "kind", "keys"), CASES)
def test_equals_mlx_lms_fusion(name, kind, keys, tmp_path):
    before, after = fused(name, kind, keys, tmp_path / "adapter")
    base = zoo.gguf_model(name)
    gguflora.merge(base, tmp_path / "adapter", tmp_path / "out.gguf")
    found = changes(base, tmp_path / "out.gguf")
    stacks = {key for key in after if ".switch_mlp." in key}
    if stacks:
        assert_stacks_changed_alike(found, {key: after[key].astype(np.float64) - before[key] for key in stacks})
        return
    shutil.copytree(zoo.checkpoint(name), tmp_path / "fused", ignore=shutil.ignore_patterns("*.gguf"))
    safetensors.numpy.save_file(after, tmp_path / "fused/model.safetensors", {"format": "pt"})
    expected = changes(base, zoo.to_gguf(name, tmp_path / "fused"))
    assert ("token_embd.weight" in expected) == bool(keys)
    assert_same_changes(found, expected, 1e-4)


def assert_stacks_changed_alike(found, expected):
    kinds = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
    for key, change in expected.items():
        layer, kind = key.split(".")[2], key.split(".")[-2]
        tensor = f"blk.{layer}.ffn_{kinds[kind]}_exps.weight"
        assert np.linalg.norm(found[tensor] - change) <= 1e-5 * np.linalg.norm(change), tensor
