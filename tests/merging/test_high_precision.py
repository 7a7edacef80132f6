"""Weights of high precision at their places: from GGUF files and Hugging Face directories, of every architecture."""

import json
import re

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from gguflora.architectures.base_model import read_base
from gguflora.errors import FormatError, GgufError, MismatchError, SafetensorsError
from gguflora.files.gguf import GgufFile
from gguflora.merging.high_precision import UnquantizedBase
from support import builders, zoo
from support.oracles.gguf_files import read_tensors
from support.oracles.llama_cpp import convert_model


def all_rows(source, name, tensor):
    """A tensor put together from blocks of 7 rows."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    blocks = [source.rows(name, first, min(first + 7, len(flat))) for first in range(0, len(flat), 7)]
    return np.concatenate(blocks).reshape(tensor.shape)


@pytest.mark.parametrize("name", [name for name, made in zoo.MODELS.items() if not made.transposes])
def test_hf_directory_equals_the_converters_f32(name):
    """Every tensor that the converter wrote, in GGUF's order and with GGUF's values."""
    gguf = zoo.gguf_model(name)
    with UnquantizedBase.open(zoo.checkpoint(name), read_base(gguf)) as source, GgufFile(gguf) as file:
        tensors = zoo.tensors(gguf)
        followed = [tensor for tensor in tensors if not re.search(zoo.REFUSED.get(name, "^$"), tensor)]
        for tensor in followed:
            expected = tensors[tensor]
            found = all_rows(source, tensor, expected)
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6, err_msg=tensor)
        source.check(file, followed)


def test_transposed_stacks_are_refused():
    """Files of Qwen3-VL-MoE on the Hub; a GGUF file of floats serves in their place."""
    gguf = zoo.gguf_model("qwen3vlmoe")
    with UnquantizedBase.open(zoo.checkpoint("qwen3vlmoe"), read_base(gguf)) as source, GgufFile(gguf) as file:
        with pytest.raises(MismatchError, match="down_proj"):
            source.check(file, ["blk.0.ffn_down_exps.weight"])
        source.check(file, ["blk.0.attn_q.weight"])


@pytest.mark.parametrize("outtype", ["F32", "F16", "BF16", "Q8_0", "Q4_K_M"])
def test_gguf_of_any_type(outtype):
    path = builders.gguf_model("llama", "wide", outtype)
    with UnquantizedBase.open(path, read_base(builders.gguf_model("llama", "wide", "Q4_0"))) as source:
        for tensor, expected in read_tensors(path).items():
            np.testing.assert_array_equal(all_rows(source, tensor, expected), expected, err_msg=tensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_shards_of_any_float(dtype, tmp_path):
    """As convert_hf_to_gguf.py widens them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(builders.hf_model("llama"), dtype=dtype)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((builders.hf_model("llama") / name).read_bytes())
    gguf = convert_model(tmp_path, tmp_path / "model.gguf")
    with UnquantizedBase.open(tmp_path, read_base(gguf)) as source:
        for tensor, expected in read_tensors(gguf).items():
            np.testing.assert_array_equal(all_rows(source, tensor, expected), expected, err_msg=tensor)


def test_output_of_a_tied_model(tmp_path):
    """A GGUF file may hold the embedding twice."""
    directory = builders.hf_model("gemma3")
    model = read_base(builders.gguf_model("gemma3"))
    embedding = model.shapes["token_embd.weight"]
    twice = type(model)(**{**vars(model), "shapes": {**model.shapes, "output.weight": embedding}})
    with UnquantizedBase.open(directory, twice) as source:
        np.testing.assert_array_equal(source.rows("output.weight", 3, 9), source.rows("token_embd.weight", 3, 9))


# -- what does not fit --


@pytest.fixture
def weights(tmp_path):
    """The directory of a llama and its weights, to be changed and written again."""
    tensors = safetensors.torch.load_file(builders.hf_model("llama") / "model.safetensors")
    (tmp_path / "config.json").write_text((builders.hf_model("llama") / "config.json").read_text())
    return tmp_path, tensors


Q_PROJ, Q = "model.layers.1.self_attn.q_proj.weight", "blk.1.attn_q.weight"


def opened(weights, **changed):
    directory, tensors = weights
    kept = {name: tensor for name, tensor in {**tensors, **changed}.items() if tensor is not None}
    safetensors.torch.save_file(kept, directory / "model.safetensors")
    return UnquantizedBase.open(directory, read_base(builders.gguf_model("llama")))


def test_missing_weight_is_named(weights):
    with opened(weights, **{Q_PROJ: None}) as source:
        assert source.rows("blk.0.attn_q.weight", 0, 2).shape == (2, 96)
        with pytest.raises(MismatchError, match=re.escape(Q)):
            source.rows(Q, 0, 2)


@pytest.mark.parametrize("shape", [(128, 100), (100, 96), (192, 96), (96, 128), (128 * 96,)])
def test_weight_of_another_shape(shape, weights):
    source = opened(weights, **{Q_PROJ: torch.ones(shape)})
    with source, pytest.raises(MismatchError, match=str(shape[0])):
        source.rows(Q, 0, 2)


@pytest.mark.parametrize("outtype", ["F32", "Q8_0", "Q4_K_M", "Q2_K"])
def test_other_weights_of_the_same_shape(outtype):
    """Another model, or rows in another order, is no base of this one; its own weights are."""
    with GgufFile(builders.gguf_model("llama", "wide", outtype)) as file:
        model = read_base(file.path)
        with UnquantizedBase.open(builders.hf_model("llama", "wide"), model) as source:
            source.check(file, file.tensors)
        other = UnquantizedBase.open(builders.hf_model("llama", "wide", seed=1), model)
        with other, pytest.raises(MismatchError, match="same model"):
            other.check(file, [Q])


def test_whole_numbers_are_no_weights(weights):
    source = opened(weights, **{Q_PROJ: torch.ones(128, 96, dtype=torch.int8)})
    with source, pytest.raises(SafetensorsError, match="I8"):
        source.rows(Q, 0, 2)


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 7}}', "[" * 100_000])
def test_damaged_index(index, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(SafetensorsError, match=r"index\.json"):
        UnquantizedBase.open(tmp_path, read_base(builders.gguf_model("llama")))


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "no-such.safetensors"])
def test_index_that_leads_elsewhere(shard, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {Q_PROJ: shard}}))
    with pytest.raises(SafetensorsError):
        UnquantizedBase.open(tmp_path, read_base(builders.gguf_model("llama")))


def test_nothing_there(tmp_path):
    model = read_base(builders.gguf_model("llama"))
    with pytest.raises(FormatError, match="holds neither"):
        UnquantizedBase.open(tmp_path, model)
    with pytest.raises(GgufError):
        UnquantizedBase.open(tmp_path / "nowhere", model)


def test_another_architecture():
    model = read_base(builders.gguf_model("llama"))
    with pytest.raises(MismatchError, match="qwen3"):
        UnquantizedBase.open(builders.gguf_model("qwen3"), model)
    wide = UnquantizedBase.open(builders.gguf_model("llama", "wide"), model)
    with wide, pytest.raises(MismatchError, match="256"):
        wide.rows(Q, 0, 2)


def test_file_that_becomes_shorter(weights):
    with opened(weights) as source:
        path = weights[0] / "model.safetensors"
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 8)
        with pytest.raises(SafetensorsError, match="ends within"):
            for tensor in ("blk.0.ffn_up.weight", Q):
                source.rows(tensor, 0, 64)
