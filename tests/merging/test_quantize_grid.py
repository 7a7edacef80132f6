"""`quantize` against llama.cpp on every architecture's tensors, with options combined and on files in parts."""

import gguf
import numpy as np
import pytest

import gguflora
from support import shards
from support.llama_quantize import imatrix_of, is_same, layered_model, llama_quantize

pytestmark = pytest.mark.llama
N_IN, N_OUT = 256, 32
PRESETS = ("Q4_K_M", "Q3_K_M", "IQ3_M", "IQ2_M", "Q2_K", "MXFP4_MOE")
UNKNOWN = {"clip"}  # no language model
MIXED = {
    "types": [("attn_v", "Q8_0"), ("ffn_down", "Q6_K"), ("ffn_(gate|up)", "IQ4_XS")],
    "output_tensor_type": "Q5_K",
    "token_embedding_type": "Q8_0",
}
OPTIONS = {"mixed": MIXED, "mixed_pure": {**MIXED, "pure": True}, "pure": {"pure": True}}


def model_of(architecture, path, n_layers, n_expert):
    """A model with all tensors that gguf-py knows for an architecture; random, and not to be run."""
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_block_count(n_layers)
    writer.add_context_length(128)
    writer.add_embedding_length(N_IN)
    writer.add_feed_forward_length(N_IN)
    writer.add_head_count(8)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    writer.add_rope_dimension_count(32)
    writer.add_vocab_size(64)
    if n_expert:
        writer.add_expert_count(n_expert)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(N_IN)
    random = np.random.default_rng(0)
    for name, shape in shapes_of(architecture, n_layers, n_expert).items():
        writer.add_tensor(name, random.standard_normal(shape, np.float32) * 0.05)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def shapes_of(architecture, n_layers, n_expert):
    shapes = {}
    for tensor in gguf.MODEL_TENSORS[architecture]:
        pattern = gguf.TENSOR_NAMES[tensor]
        if "{xid}" in pattern or ("_exps" in pattern and not n_expert):
            continue
        for layer in range(n_layers if "{bid}" in pattern else 1):
            name = f"{pattern.format(bid=layer)}.weight"
            stack = (n_expert, N_OUT, N_IN) if "_exps" in name else (N_OUT, N_IN)
            shapes[name] = (N_IN,) if "norm" in name else stack
    return shapes


@pytest.mark.full
@pytest.mark.parametrize("n_expert", [0, 8], ids=["dense", "experts"])
@pytest.mark.parametrize("architecture", gguf.MODEL_ARCH, ids=gguf.MODEL_ARCH_NAMES.get)
def test_every_architecture(architecture, n_expert, tmp_path):
    """Some 50 need more metadata before llama.cpp reads them: see test_quantize_converted.py."""
    if gguf.MODEL_ARCH_NAMES[architecture] in UNKNOWN:
        return
    source = model_of(architecture, tmp_path / "source.gguf", 9 if n_expert else 16, n_expert)
    for preset in PRESETS:
        if not is_same(source, tmp_path, preset) and preset == PRESETS[0]:
            return


@pytest.mark.parametrize("with_imatrix", [False, True], ids=["plain", "imatrix"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("preset", ["Q4_K_M", "IQ4_XS"])
def test_options_combined(preset, options, with_imatrix, tmp_path):
    source = layered_model(tmp_path / "source.gguf", n_layers=8)
    imatrix = imatrix_of(source, tmp_path / "imatrix.gguf") if with_imatrix else None
    assert is_same(source, tmp_path, preset, imatrix=imatrix, **OPTIONS[options])


@pytest.mark.parametrize("preset", ["Q4_K_M", "Q3_K_M"])
def test_files_in_parts(preset, tmp_path):
    """As llama-quantize ``--keep-split`` writes them."""
    whole = layered_model(tmp_path / "whole.gguf", n_layers=8)
    source, *_ = shards.split(whole, tmp_path / "source.gguf", 3)
    assert llama_quantize(source, tmp_path / "theirs", preset, keep_split=True) == 0
    gguflora.quantize(source, tmp_path / "ours.gguf", preset)
    theirs, ours = (sorted(tmp_path.glob(f"{who}-0000*.gguf")) for who in ("theirs", "ours"))
    assert len(ours) == len(theirs) == 3
    for found, wanted in zip(ours, theirs, strict=True):
        assert found.read_bytes() == wanted.read_bytes()
