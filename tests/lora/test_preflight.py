"""What is refused before llama.cpp sees it, and that the refusals are needed: llama.cpp aborts or ignores."""

import re
import struct
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from gguflora.architectures.base_model import BaseModel, read_whole_base
from gguflora.errors import GgufError, HotSwapError
from gguflora.lora.preflight import check_loadable
from support import builders
from support.hotswap import A, gguf_lora, kill_python, run_python, write_lora

Q = "blk.0.attn_q.weight"  # (128, 96) in the llama of `builders`
EXPERTS = "blk.0.ffn_up_exps.weight"


@pytest.fixture(scope="module")
def base():
    return read_whole_base(builders.gguf_model("llama"))


def pair(name=Q, n_out=128, n_in=96, rank=4, rank_b=None, stack=(), dtype=np.float32):
    a, b = (*stack, rank, n_in), (*stack, n_out, rank_b or rank)
    return {f"{name}.lora_a": np.full(a, 0.1, dtype), f"{name}.lora_b": np.full(b, 0.1, dtype)}


def refuses(path: Path, base: BaseModel, *said: str) -> None:
    with pytest.raises(HotSwapError) as caught:
        check_loadable(path, base)
    for words in (str(path), *said):
        assert words in str(caught.value)


def test_sound_adapters_pass(base, tmp_path):
    check_loadable(gguf_lora(A), base)
    for number, (metadata, tensors) in enumerate(
        [
            ({}, pair()),
            ({"adapter__lora__alpha": None}, pair()),
            ({"adapter__lora__alpha": np.float32(0)}, pair(dtype=np.float16)),
            ({}, pair("token_embd.weight", n_out=96, n_in=4, rank=288, rank_b=4)),
            ({}, pair("output.weight", n_out=288)),
        ]
    ):
        check_loadable(write_lora(tmp_path / f"{number}.gguf", tensors, **metadata), base)


METADATA = [
    ({"general__type": None}, "general.type is None", False),
    ({"general__type": 3}, "general.type is 3", True),
    ({"general__type": "model"}, "not a LoRA adapter", False),
    ({"adapter__type": None}, "adapter.type None", False),
    ({"adapter__type": "ia3"}, "adapter.type 'ia3'", False),
    ({"adapter__type": [1, 2]}, "adapter.type [1, 2]", True),
    ({"general__architecture": "qwen2"}, "'qwen2'", False),
    ({"adapter__lora__alpha": 8}, "expected a finite number stored as FLOAT32", True),
    ({"adapter__lora__alpha": 8.0}, "expected a finite number stored as FLOAT32", True),
    ({"adapter__lora__alpha": "8"}, "expected a finite number stored as FLOAT32", True),
    ({"adapter__lora__alpha": np.float32("nan")}, "adapter.lora.alpha is nan", False),
    ({"adapter__lora__alpha": np.float32("inf")}, "adapter.lora.alpha is inf", False),
    ({"adapter__alora__invocation_tokens": [1, 2]}, "expected tokens in an array of UINT32", False),
    ({"adapter__alora__invocation_tokens": 3}, "expected tokens in an array of UINT32", False),
]


@pytest.mark.parametrize(("metadata", "said"), [case[:2] for case in METADATA])
def test_metadata(base, tmp_path, metadata, said):
    refuses(write_lora(tmp_path / "odd.gguf", pair(), **metadata), base, said)


TENSORS = [
    ({}, "holds no LoRA tensors", False),
    ({f"{Q}.lora_a": np.ones((4, 96), np.float32)}, "has no .lora_b", False),
    ({f"{Q}.lora_b": np.ones((128, 4), np.float32)}, "has no .lora_a", False),
    (pair() | {"blk.0.attn_norm.weight": np.ones(96, np.float32)}, "silently ignore", False),
    (pair() | {"x": np.ones(96, np.float32), "y": np.ones(96, np.float32)}, "nor are 1 others", False),
    (pair("blk.2.attn_q.weight"), "no such tensor", False),
    (pair("blk.0.attn_norm.weight", n_out=1), "is a vector in the base", False),
    (pair(n_in=128), "'blk.0.attn_q.weight': .lora_a has shape (4, 128), expected (4, 96)", False),
    (pair(n_out=96), ".lora_b has shape (96, 4), expected (128, 4)", False),
    (
        pair(rank=4, rank_b=8),
        ".lora_a has shape (4, 96), expected (8, 96) to fit the base's (128, 96) at rank 8",
        False,
    ),
    (pair(stack=(2,)), ".lora_a has shape (2, 4, 96), expected (4, 96)", True),
    (pair(stack=(2, 1)), ".lora_a has shape (2, 1, 4, 96), expected (4, 96)", True),
    (pair("token_embd.weight", n_out=288), ".lora_a has shape (4, 96), expected (288, 4)", False),
    (pair("token_embd.weight", n_out=96, n_in=4, rank=288, rank_b=8), "expected (288, 8)", True),
    (pair(dtype=np.int32), "is stored as I32", True),
    (pair(dtype=np.float64), "is stored as F64", True),
]


@pytest.mark.parametrize(("tensors", "said"), [case[:2] for case in TENSORS])
def test_tensors(base, tmp_path, tensors, said):
    refuses(write_lora(tmp_path / "odd.gguf", tensors), base, said)


ABORTS = [({}, metadata) for metadata, _, aborts in METADATA if aborts]
ABORTS += [(tensors, {}) for tensors, _, aborts in TENSORS if aborts]


@pytest.mark.slow
@pytest.mark.parametrize(("tensors", "metadata"), ABORTS)
def test_llama_cpp_aborts_on_these(tmp_path, tensors, metadata):
    """Each of these refusals saves the process; one that does not abort any more can be left to llama.cpp."""
    path = write_lora(tmp_path / "odd.gguf", tensors or pair(), **metadata)
    code = """
import sys, llama_cpp
llm = llama_cpp.Llama(sys.argv[1], n_ctx=64, n_threads=1, verbose=False, lora_path=sys.argv[2])
llm.eval([1, 2, 3])
"""
    kill_python(code, builders.gguf_model("llama"), path)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite(base, tmp_path, dtype, value):
    kind = gguf.GGMLQuantizationType[dtype]
    tensors = pair()
    tensors[f"{Q}.lora_b"][127, 3] = value
    writer = gguf.GGUFWriter(tmp_path / "nan.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    for name, array in tensors.items():
        raw = gguf.quantize(array, kind)
        if dtype == "BF16" and name.endswith("b") and value != value:
            raw[127, 6:8] = (0xC0, 0x7F)
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refuses(tmp_path / "nan.gguf", base, f"'{Q}.lora_b' holds NaN or infinity")


def test_experts(tmp_path):
    base = BaseModel(Path("moe.gguf"), "llama", {EXPERTS: (8, 160, 96), "output.weight": (288, 96)}, 1, (4,), (4,))
    check_loadable(write_lora(tmp_path / "good.gguf", pair(EXPERTS, 160, 96, stack=(8,))), base)
    for number, tensors in enumerate([pair(EXPERTS, 160, 96), pair(EXPERTS, 160, 96, stack=(4,))]):
        refuses(write_lora(tmp_path / f"{number}.gguf", tensors), base, "expected (8, 4, 96)")
    halved = pair(EXPERTS, 160, 96, stack=(8,)) | {f"{EXPERTS}.lora_b": np.ones((4, 160, 4), np.float32)}
    refuses(write_lora(tmp_path / "halved.gguf", halved), base, ".lora_b has shape (4, 160, 4), expected (8, 160, 4)")


def test_nvfp4_with_a_scale(tmp_path):
    """llama.cpp asserts that such a feed-forward weight has no LoRA (llama-graph.cpp, build_ffn)."""
    up, scale = "blk.0.ffn_up.weight", "blk.0.ffn_up.scale"
    lora = write_lora(tmp_path / "up.gguf", pair(up, 160, 64))
    shapes = {up: (160, 64), "output.weight": (288, 64)}
    plain = BaseModel(Path("nvfp4.gguf"), "llama", shapes, 1, (4,), (4,), types={up: "NVFP4"})
    check_loadable(lora, plain)
    refuses(lora, replace(plain, shapes={**shapes, scale: (1,)}), "NVFP4")


def test_tied_embeddings(tmp_path):
    tied = read_whole_base(builders.gguf_model("gemma3"))
    embedding = pair("token_embd.weight", n_out=96, n_in=4, rank=288, rank_b=4)
    for number, (tensors, said) in enumerate(
        [
            (embedding, "merge the adapter into the base instead"),
            (pair("output.weight", n_out=288), "merge the adapter instead"),
        ]
    ):
        refuses(write_lora(tmp_path / f"{number}.gguf", tensors, general__architecture="gemma3"), tied, said)


def test_a_tensor_twice(base, tmp_path):
    other = Q.replace("attn_q", "attn_k")
    path = write_lora(tmp_path / "twice.gguf", pair(n_out=64) | pair(other, n_out=64))
    path.write_bytes(path.read_bytes().replace(other.encode(), Q.encode()))
    with pytest.raises(GgufError, match="two tensors are named"):
        check_loadable(path, base)


def test_an_empty_key(base, tmp_path):
    """Built by hand, for no writer writes one: a string entry whose key has no bytes, before all others."""
    path = write_lora(tmp_path / "key.gguf", {})
    content = bytearray(path.read_bytes())
    struct.pack_into("<Q", content, 16, struct.unpack_from("<Q", content, 16)[0] + 1)
    path.write_bytes(bytes(content[:24]) + struct.pack("<QIQ4s", 0, 8, 4, b"void") + bytes(content[24:]))
    refuses(path, base, "a metadata entry without a key")


def test_a_split_base(tmp_path):
    """llama.cpp loads all parts of a split model; so the check must know all their tensors."""
    whole = gguf.GGUFReader(builders.gguf_model("llama"))
    for number in (1, 2):
        writer = gguf.GGUFWriter(tmp_path / f"base-{number:05}-of-00002.gguf", "llama")
        writer.add_uint16("split.no", number - 1)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(whole.tensors))
        for tensor in whole.tensors[number - 1 :: 2]:
            writer.add_tensor(tensor.name, tensor.data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    base = read_whole_base(tmp_path / "base-00001-of-00002.gguf")
    assert base.shapes.keys() == {tensor.name for tensor in whole.tensors}
    check_loadable(gguf_lora(A), base)
    (tmp_path / "base-00002-of-00002.gguf").unlink()
    with pytest.raises(GgufError, match=re.escape("base-00002-of-00002.gguf")):
        read_whole_base(tmp_path / "base-00001-of-00002.gguf")


@pytest.mark.slow
def test_damaged_headers_never_abort(tmp_path):
    """300 files with damaged headers, in one process: each is refused or loaded, none ends the process."""
    code = """
import pathlib, sys, llama_cpp, numpy as np
from gguflora import runtime, errors
llm = llama_cpp.Llama(sys.argv[1], n_ctx=64, n_threads=1, verbose=False)
adapters, content = runtime.attach(llm), pathlib.Path(sys.argv[2]).read_bytes()
chance, path, loaded = np.random.default_rng(0), pathlib.Path(sys.argv[3]), 0
for number in range(300):
    damaged = bytearray(content)
    for _ in range(chance.integers(1, 4)):
        damaged[chance.integers(0, int(sys.argv[4]))] = chance.integers(0, 256)
    path.write_bytes(damaged)
    try:
        adapters.load("x", path)
        adapters.apply(x=1.0)
        llm.eval([1, 2, 3])
        adapters.unload("x")
        loaded += 1
    except errors.GgufloraError:
        assert adapters.loaded == []
print(loaded)
"""
    lora = gguf_lora(A)
    header = min(tensor.data_offset for tensor in gguf.GGUFReader(lora).tensors)
    loaded = int(run_python(code, builders.gguf_model("llama"), lora, tmp_path / "damaged.gguf", header))
    assert 0 < loaded < 300
