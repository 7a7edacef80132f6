"""Norms beside a LoRA: complete vectors in a PEFT directory or in a GGUF LoRA file of llama.cpp's converter."""

import shutil

import gguf
import numpy as np
import pytest
import safetensors.numpy

import gguflora
from gguflora.architectures.base_model import read_base
from gguflora.errors import HotSwapError, UnsupportedAdapterError
from gguflora.lora.preflight import check_loadable
from support import builders
from support.asserts import assert_same_changes, changes
from support.builders import Adapter
from support.oracles.gguf_files import lora_changes
from support.oracles.llama_cpp import convert_lora

NAMES = {"model.layers.1.input_layernorm": "blk.1.attn_norm.weight", "model.norm": "output_norm.weight"}


@pytest.fixture(params=["same", "other"])
def norms(request, tmp_path):
    """A PEFT directory with norms as the base has them or not, and the deltas of these in GGUF."""
    folder = shutil.copytree(builders.adapter("llama", Adapter(seed=5)), tmp_path / "adapter")
    weights = safetensors.numpy.load_file(builders.hf_model("llama") / "model.safetensors")
    added = {name: weights[f"{name}.weight"] + (0.25 if request.param == "other" else 0) for name in NAMES}
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file(
        tensors | {f"base_model.model.{name}.weight": values.astype(np.float32) for name, values in added.items()}, path
    )
    expected = {NAMES[name]: np.full(96, 0.25) for name in NAMES} if request.param == "other" else {}
    return request.param, folder, expected


def test_norms_of_a_peft_directory(norms, tmp_path):
    kind, folder, expected = norms
    base = builders.gguf_model("llama")
    gguflora.merge(base, folder, tmp_path / "merged.gguf")
    found = changes(base, tmp_path / "merged.gguf")
    assert_same_changes({name: found[name] for name in found if "norm" in name}, expected, 1e-6)
    if kind == "other":
        with pytest.raises(UnsupportedAdapterError, match="norms"):
            gguflora.convert(folder, base, tmp_path / "lora.gguf")
        return
    gguflora.convert(folder, base, tmp_path / "lora.gguf")
    gguflora.convert(builders.adapter("llama", Adapter(seed=5)), base, tmp_path / "plain.gguf")
    assert_same_changes(lora_changes(tmp_path / "lora.gguf"), lora_changes(tmp_path / "plain.gguf"), 0)


def test_norms_of_a_gguf_lora(norms, tmp_path):
    _, folder, expected = norms
    base = builders.gguf_model("llama")
    lora = convert_lora(folder, builders.hf_model("llama"), tmp_path / "norms.gguf")
    assert {tensor.name for tensor in gguf.GGUFReader(lora).tensors} >= set(NAMES.values()), "llama.cpp keeps the norms"
    gguflora.merge(base, lora, tmp_path / "merged.gguf")
    found = changes(base, tmp_path / "merged.gguf")
    assert_same_changes({name: found[name] for name in found if "norm" in name}, expected, 1e-6)
    assert len(found) > len(NAMES)
    assert gguflora.inspect(lora, base).problems == len(expected)
    if not expected:
        gguflora.convert(lora, base, tmp_path / "again.gguf")
        check_loadable(lora, read_base(base))
        return
    with pytest.raises(HotSwapError, match="ignore it"):
        check_loadable(lora, read_base(base))
