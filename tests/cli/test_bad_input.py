"""Damaged and hostile input through the command line: exit code 1, one message, no traceback, no file left."""

import ctypes
import io
import json
import os
import pickle
import resource
import shutil
import struct
import subprocess
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.numpy

from gguflora.files.gguf import encode_entry
from support import builders
from support.builders import Adapter
from support.cli import run, run_process
from support.oracles.llama_cpp import convert_lora

ADAPTER = Adapter(seed=5)
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"
DOWN_PROJ = "base_model.model.model.layers.1.mlp.down_proj"
HUGE = (1 << 62, 1 << 63, (1 << 64) - 1)


# -- running and judging --


def assert_refused(result, directory, before, *words):
    """One error that says the words ("a|b": either); nothing new in the directory and nothing changed."""
    message = " ".join(result.stderr.split())
    assert result.returncode == 1, result.stdout + result.stderr
    assert message.startswith("error: "), message
    assert message.count("error: ") == 1, message
    assert "Traceback" not in result.stderr
    assert len(message) < 1500, "one message, not a dump"
    for word in words:
        assert any(part.lower() in message.lower() for part in word.split("|")), f"{word!r} is not in {message!r}"
    assert contents(directory) == before


def contents(directory):
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*")}


@pytest.fixture
def adapter(tmp_path):
    """A copy of a sound adapter, to be damaged."""
    return shutil.copytree(builders.adapter("llama", ADAPTER), tmp_path / "adapter")


@pytest.fixture
def base(tmp_path):
    """A copy of a sound base, to be damaged."""
    return shutil.copy(builders.gguf_model("llama"), tmp_path / "base.gguf")


def commands(adapter, base, tmp_path):
    yield "convert", adapter, "--base", base, "-o", tmp_path / "out.gguf"
    yield "merge", base, "--lora", adapter, "-o", tmp_path / "out.gguf"


def assert_convert_refuses(adapter, base, tmp_path, *words):
    before = contents(tmp_path)
    assert_refused(run(*next(commands(adapter, base, tmp_path))), tmp_path, before, *words)


def assert_both_refuse(adapter, base, tmp_path, *words):
    for command in commands(adapter, base, tmp_path):
        before = contents(tmp_path)
        assert_refused(run(*command), tmp_path, before, *words)


@pytest.mark.parametrize("how", [run, run_process])
def test_the_undamaged_input_is_accepted(how, adapter, base, tmp_path):
    for command in commands(adapter, base, tmp_path):
        result = how(*command, "--force")
        assert (result.returncode, result.stderr) == (0, "")


def test_a_process_refuses_alike(adapter, base, tmp_path):
    (adapter / "adapter_config.json").write_text("{")
    for command in commands(adapter, base, tmp_path):
        before = contents(tmp_path)
        assert_refused(run_process(*command), tmp_path, before, "adapter_config.json")


# -- adapter_config.json --


def without(name):
    def damage(path):
        path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != name}))

    return damage


def with_fields(**fields):
    return lambda path: builders.edit_config(path.parent, **fields)


CONFIGS = {
    "missing": (lambda path: path.unlink(), ["adapter_config.json"]),
    "empty": (lambda path: path.write_text(""), ["adapter_config.json"]),
    "garbled": (lambda path: path.write_text('{"peft_type": "LORA", "r": '), ["adapter_config.json"]),
    "no_utf8": (lambda path: path.write_bytes(b'{"peft_type": "\xff\xfe"}'), ["adapter_config.json"]),
    "a_list": (lambda path: path.write_text("[1, 2]"), ["adapter_config.json"]),
    "deeply_nested": (lambda path: path.write_text("[" * 100_000), ["adapter_config.json"]),
    "a_directory": (lambda path: (path.unlink(), path.mkdir()), ["adapter_config.json"]),
    "no_peft_type": (without("peft_type"), ["adapter_config.json", "peft_type"]),
    "prompt_tuning": (with_fields(peft_type="PROMPT_TUNING"), ["PROMPT_TUNING"]),
    "x_lora": (with_fields(peft_type="XLORA"), ["XLORA"]),
    "unknown_type": (with_fields(peft_type="NO_SUCH_METHOD"), ["NO_SUCH_METHOD"]),
    "peft_type_a_list": (with_fields(peft_type=["LORA"]), ["peft_type"]),
    "rank_a_word": (with_fields(r="four"), ["four"]),
    "rank_0": (with_fields(r=0), ["0"]),
    "rank_wrong": (with_fields(r=5), ["rank", "5"]),
    "alpha_a_word": (with_fields(lora_alpha="eight"), ["lora_alpha", "eight"]),
    "alpha_nan": (with_fields(lora_alpha=float("nan")), ["lora_alpha"]),
    "alpha_infinite": (with_fields(lora_alpha=float("inf")), ["lora_alpha"]),
    "alpha_null": (with_fields(lora_alpha=None), ["lora_alpha"]),
    "pattern_a_list": (with_fields(rank_pattern=["q_proj"]), ["rank_pattern"]),
    "pattern_no_regex": (with_fields(alpha_pattern={"q_proj(": 3}), ["alpha_pattern", "q_proj("]),
    "pattern_value": (with_fields(alpha_pattern={"q_proj": "x"}), ["alpha_pattern"]),
    "layer_replication": (with_fields(layer_replication=[[0, 2], [1, 2]]), ["layer_replication"]),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configuration(case, adapter, base, tmp_path):
    damage, words = CONFIGS[case]
    damage(adapter / "adapter_config.json")
    assert_both_refuse(adapter, base, tmp_path, *words)


# -- tensors of the adapter --


def rewritten(adapter, change):
    file = adapter / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file)


def drop(key):
    return lambda tensors: tensors.pop(key)


def reshape(key, *shape):
    return lambda tensors: tensors.update({key: np.ones(shape, np.float32)})


def rename(old, new):
    return lambda tensors: tensors.update({key.replace(old, new): tensors.pop(key) for key in list(tensors)})


def spoil(key, value, dtype=np.float32):
    def change(tensors):
        tensors[key] = tensors[key].astype(dtype)
        tensors[key][1, 2] = value

    return change


TENSORS = {
    "a_without_b": (drop(f"{Q_PROJ}.lora_B.weight"), ["layers.0.self_attn.q_proj", "lora_B"]),
    "b_without_a": (drop(f"{DOWN_PROJ}.lora_A.weight"), ["layers.1.mlp.down_proj", "lora_A"]),
    "ranks_differ": (reshape(f"{Q_PROJ}.lora_B.weight", 128, 5), ["q_proj", "(128, 5)"]),
    "n_in_wrong": (reshape(f"{Q_PROJ}.lora_A.weight", 4, 95), ["q_proj|attn_q", "95", "96"]),
    "n_out_wrong": (reshape(f"{Q_PROJ}.lora_B.weight", 127, 4), ["127", "128"]),
    "a_is_a_vector": (reshape(f"{Q_PROJ}.lora_A.weight", 384), ["q_proj"]),
    "a_is_empty": (reshape(f"{Q_PROJ}.lora_A.weight", 0, 96), ["q_proj"]),
    "b_is_3d": (reshape(f"{Q_PROJ}.lora_B.weight", 128, 4, 1), ["q_proj"]),
    "unknown_module": (rename("layers.0.self_attn.q_proj", "layers.0.self_attn.z_proj"), ["z_proj"]),
    "unknown_layer": (rename("layers.1.", "layers.7."), ["layers.7.|blk.7"]),
    "enormous_layer": (rename("layers.1.", "layers.99999999999999999999."), ["99999999999999999999"]),
    "negative_layer": (rename("layers.1.", "layers.-1."), ["-1"]),
    "unknown_part": (rename("q_proj.lora_A", "q_proj.lora_Z"), ["lora_Z"]),
    "modules_of_phi3": (rename("q_proj", "qkv_proj"), ["qkv_proj"]),
    "no_tensor": (lambda tensors: tensors.clear(), []),
    "integers": (lambda tensors: tensors.update({f"{Q_PROJ}.lora_A.weight": np.ones((4, 96), np.int32)}), ["q_proj"]),
    "nan": (spoil(f"{Q_PROJ}.lora_A.weight", np.nan), ["q_proj|attn_q", "NaN"]),
    "infinity": (spoil(f"{DOWN_PROJ}.lora_B.weight", -np.inf), ["down", "inf"]),
    "nan_float16": (spoil(f"{DOWN_PROJ}.lora_A.weight", np.nan, np.float16), ["down", "NaN"]),
}


@pytest.mark.parametrize("case", TENSORS)
def test_adapter_tensors(case, adapter, base, tmp_path):
    change, words = TENSORS[case]
    rewritten(adapter, change)
    assert_both_refuse(adapter, base, tmp_path, *words)


COPY = "base_model.model.model.embed_tokens.base_layer.weight"
EMBEDDING = Adapter(targets=("q_proj", "embed_tokens"), seed=5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.update({COPY: np.vstack([tensors[COPY]] * 2)}), ["token_embd.weight", "(288, 96)"]),
        (lambda tensors: tensors.update({COPY: tensors[COPY][::-1].copy()}), ["token_embd.weight", "low rank"]),
    ],
    ids=["resized", "trained"],
)
def test_embedding_that_is_not_the_bases(change, words, base, tmp_path):
    """PEFT saves the weight of an adapted embedding beside its factors, which is no change only if it is the base's."""
    adapter = shutil.copytree(builders.adapter("llama", EMBEDDING), tmp_path / "adapter")
    rewritten(adapter, change)
    assert_convert_refuses(adapter, base, tmp_path, *words)


@pytest.mark.parametrize("arch", ["gemma2", "gemma3"])
def test_tied_embedding(arch, tmp_path):
    """llama.cpp aborts on such an adapter; a merge unties the two."""
    assert_convert_refuses(builders.adapter(arch, EMBEDDING), builders.gguf_model(arch), tmp_path, "tied")


def test_split_base(adapter, base, tmp_path):
    """One of three files, under a name that does not say so."""
    data = base.read_bytes()
    entry = encode_entry("split.count", 3)
    shift = -(-len(entry) // 32) * 32  # what is not the entry must still be aligned
    filler = encode_entry("split.fill", "x" * (2 * shift - len(entry) - len(encode_entry("split.fill", ""))))
    (n_kv,) = struct.unpack_from("<Q", data, 16)
    base.write_bytes(data[:16] + struct.pack("<Q", n_kv + 2) + entry + filler + data[24:])
    assert_both_refuse(adapter, base, tmp_path, "base.gguf", "split", "3 files")


def test_two_adapters_name_the_one_that_is_wrong(adapter, base, tmp_path):
    wrong = shutil.copytree(adapter, tmp_path / "wrong")
    rewritten(wrong, drop(f"{Q_PROJ}.lora_B.weight"))
    before = contents(tmp_path)
    result = run("merge", base, "--lora", adapter, "--lora", wrong, "-o", tmp_path / "out.gguf")
    assert_refused(result, tmp_path, before, str(wrong))


@pytest.mark.parametrize(("arch", "other"), [("qwen3", "llama"), ("llama", "phi3"), ("phi3", "gemma3")])
def test_adapter_of_another_model(arch, other, tmp_path):
    """Shapes or modules differ; nothing else in a PEFT directory tells."""
    adapter, base = builders.adapter(arch, ADAPTER, "wide"), builders.gguf_model(other, "small")
    assert_both_refuse(adapter, base, tmp_path)


# -- adapter_model.safetensors --


def header(data, **entries):
    """The safetensors file with entries of its header replaced."""
    (length,) = struct.unpack_from("<Q", data)
    text = json.dumps(json.loads(data[8 : 8 + length]) | entries).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def entry(dtype="F32", shape=(4, 96), offsets=(0, 1536)):
    return {f"{Q_PROJ}.lora_A.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


SAFETENSORS = {
    "empty": lambda data: b"",
    "seven_bytes": lambda data: data[:7],
    "header_cut": lambda data: data[:100],
    "data_cut": lambda data: data[:-1],
    "half": lambda data: data[: len(data) // 2],
    "longer": lambda data: data + bytes(64),
    "garbage": lambda data: bytes(range(256)) * 8,
    "header_no_json": lambda data: data[:8] + b"?" + data[9:],
    "header_a_list": lambda data: struct.pack("<Q", 8) + b"[1, 2, 3" + b"]",
    "header_nested": lambda data: struct.pack("<Q", 90_000) + b"[" * 90_000,
    "entry_a_number": lambda data: header(data, **{f"{Q_PROJ}.lora_A.weight": 3}),
    "dtype_unknown": lambda data: header(data, **entry(dtype="F33")),
    "dtype_too_big": lambda data: header(data, **entry(dtype="F64")),
    "shape_too_big": lambda data: header(data, **entry(shape=(4, 97))),
    "shape_negative": lambda data: header(data, **entry(shape=(-4, -96))),
    "shape_overflow": lambda data: header(data, **entry(shape=(1 << 62, 4, 1 << 62))),
    "shape_a_word": lambda data: header(data, **entry(shape="x")),
    "offsets_past_the_end": lambda data: header(data, **entry(offsets=(1 << 40, (1 << 40) + 1536))),
    "offsets_reversed": lambda data: header(data, **entry(offsets=(1536, 0))),
    "offsets_negative": lambda data: header(data, **entry(offsets=(-1536, 0))),
    "offsets_missing": lambda data: header(data, **entry(offsets=())),
    "offsets_overlap": lambda data: header(data, **entry(offsets=(4, 1540))),
    **{f"length_{length}": lambda data, n=length: struct.pack("<Q", n) + data[8:] for length in (0, 1 << 30, *HUGE)},
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_safetensors(case, adapter, base, tmp_path):
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(SAFETENSORS[case](file.read_bytes()))
    assert_both_refuse(adapter, base, tmp_path, "adapter_model.safetensors")


@pytest.mark.parametrize("instead", [lambda file: None, Path.mkdir, os.mkfifo], ids=["nothing", "directory", "pipe"])
def test_no_weights(instead, adapter, base, tmp_path):
    file = adapter / "adapter_model.safetensors"
    file.unlink()
    instead(file)
    assert_both_refuse(adapter, base, tmp_path, "adapter_model.safetensors")


def test_named_pipe_as_gguf(adapter, base, tmp_path):
    """Opening one must not wait for a writer."""
    os.mkfifo(tmp_path / "pipe.gguf")
    assert_both_refuse(adapter, tmp_path / "pipe.gguf", tmp_path, "pipe.gguf")
    assert_both_refuse(tmp_path / "pipe.gguf", base, tmp_path, "pipe.gguf")


# -- adapter_model.bin --


class Exploit:
    """Touches a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def malicious(kind, marker):
    payload = pickle.dumps({"base_model.model.lora_A.weight": Exploit(marker)})
    if kind == "pickle":
        return payload
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["pickle", "zip"])
def test_malicious_bin_is_not_executed(kind, adapter, base, tmp_path):
    marker = tmp_path / "executed"
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(malicious(kind, marker))
    pickle.loads(pickle.dumps(Exploit(marker)))
    assert marker.exists(), "the exploit works where pickle is trusted"
    marker.unlink()
    assert_both_refuse(adapter, base, tmp_path, "adapter_model.bin")


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"PK\x03\x04 no zip"])
def test_damaged_bin(content, adapter, base, tmp_path):
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(content)
    assert_both_refuse(adapter, base, tmp_path, "adapter_model.bin")


def test_bin_without_torch(base, tmp_path):
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "torch.py").write_text("raise ImportError('no torch here')")
    path = os.pathsep.join(filter(None, [str(blocked), os.environ.get("PYTHONPATH")]))
    for command in commands(builders.adapter("llama", Adapter(bin=True)), base, tmp_path):
        before = contents(tmp_path)
        result = run_process(*command, env=os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"})
        assert_refused(result, tmp_path, before, "adapter_model.bin", "torch", "gguflora[torch]")


# -- the base --

FIRST_KEY = 24
TOUCHED = b"blk.0.attn_q.weight"


def put(at, kind, *values):
    return lambda data: data[:at] + struct.pack(kind, *values) + data[at + struct.calcsize(kind) :]


def tensor_info(field, kind, *values, name=TOUCHED):
    """Overwrite one field of a 2-D tensor's header entry: n_dims u32, dims 2 x u64, type u32, offset u64."""

    def damage(data):
        start = data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)
        at = start + {"n_dims": 0, "dims": 4, "type": 20, "offset": 24}[field]
        return put(at, kind, *values)(data)

    return damage


def key_value(key, kind, *values):
    """Overwrite what follows a key: its type u32 and value."""

    def damage(data):
        at = data.index(struct.pack("<Q", len(key)) + key) + 8 + len(key)
        return put(at, kind, *values)(data)

    return damage


def renamed(old, new):
    return lambda data: data.replace(old, new, 1)


GGUFS = {
    "empty": lambda data: b"",
    "magic_only": lambda data: data[:4],
    "header_cut": lambda data: data[:23],
    "metadata_cut": lambda data: data[:300],
    "tensor_list_cut": lambda data: data[: data.index(TOUCHED)],
    "data_cut": lambda data: data[:-1],
    "half": lambda data: data[: len(data) // 2],
    "bad_magic": put(0, "4s", b"GGML"),
    "safetensors": lambda data: (builders.hf_model("llama") / "model.safetensors").read_bytes(),
    "version_1": put(4, "<I", 1),
    "version_99": put(4, "<I", 99),
    "big_endian": put(4, ">I", 3),
    **{f"n_tensors_{n}": put(8, "<Q", n) for n in (1 << 20, *HUGE)},
    **{f"n_kv_{n}": put(16, "<Q", n) for n in (1 << 20, *HUGE)},
    **{f"key_length_{n}": put(FIRST_KEY, "<Q", n) for n in (1 << 20, *HUGE)},
    "value_type": key_value(b"general.architecture", "<I", 99),
    **{f"value_length_{n}": key_value(b"general.architecture", "<IQ", 8, n) for n in (1 << 20, *HUGE)},
    **{f"array_length_{n}": key_value(b"tokenizer.ggml.tokens", "<IIQ", 9, 8, n) for n in (1 << 20, *HUGE)},
    "array_of_unknown": key_value(b"tokenizer.ggml.tokens", "<II", 9, 99),
    "architecture_a_number": key_value(b"general.architecture", "<I", 10),
    "n_dims_0": tensor_info("n_dims", "<I", 0),
    "n_dims_200": tensor_info("n_dims", "<I", 200),
    "n_dims_max": tensor_info("n_dims", "<I", 0xFFFFFFFF),
    "dims_product_overflows": tensor_info("dims", "<QQ", 1 << 33, 1 << 33),
    "dims_negative": tensor_info("dims", "<qq", -96, 128),
    "dim_0": tensor_info("dims", "<Q", 0),
    "dims_past_the_end": tensor_info("dims", "<QQ", 96, 1 << 30),
    "type_unknown": tensor_info("type", "<I", 9999),
    "type_does_not_divide": tensor_info("type", "<I", int(gguf.GGMLQuantizationType.Q4_K)),
    "offset_past_the_end": tensor_info("offset", "<Q", 1 << 40),
    "offset_overflows": tensor_info("offset", "<Q", (1 << 64) - 32),
    "offset_unaligned": tensor_info("offset", "<Q", 4),
    "tensors_overlap": tensor_info("offset", "<Q", 0, name=b"blk.1.ffn_up.weight"),
    "duplicate_tensor": renamed(TOUCHED, b"blk.1.attn_q.weight"),
    "duplicate_key": renamed(b"tokenizer.ggml.merges", b"tokenizer.ggml.tokens"),
}


@pytest.mark.parametrize("case", GGUFS)
def test_base_gguf(case, adapter, base, tmp_path):
    data = base.read_bytes()
    damaged = GGUFS[case](data)
    assert damaged != data
    base.write_bytes(damaged)
    assert_both_refuse(adapter, base, tmp_path, "base.gguf")


def test_a_type_that_ggml_has_removed(adapter, base, tmp_path):
    """Convert needs only shapes; merge would have to read the weights."""
    base.write_bytes(tensor_info("type", "<I", 4)(base.read_bytes()))
    assert run("convert", adapter, "--base", base, "-o", tmp_path / "out.gguf").returncode == 0
    refused = run("merge", base, "--lora", adapter, "-o", tmp_path / "merged.gguf")
    assert refused.returncode == 1
    assert "base.gguf" in refused.stderr
    assert not (tmp_path / "merged.gguf").exists()


@pytest.mark.parametrize(("key", "value"), [(b"llama.attention.head_count", 5), (b"llama.attention.head_count_kv", 0)])
def test_head_counts_that_do_not_divide(key, value, adapter, base, tmp_path):
    base.write_bytes(key_value(key, "<II", int(gguf.GGUFValueType.UINT32), value)(base.read_bytes()))
    assert_both_refuse(adapter, base, tmp_path, "base.gguf")


def test_base_of_unknown_architecture(adapter, base, tmp_path):
    base.write_bytes(base.read_bytes().replace(b"llama", b"zebra"))
    assert_both_refuse(adapter, base, tmp_path, "zebra")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("outtype", ["F32", "F16", "Q8_0", "Q4_K_M"])
def test_nan_in_the_base(outtype, value, tmp_path):
    """Rows that are to be changed must be numbers; in block types the scale of a block is what can be none."""
    base = shutil.copy(builders.gguf_model("llama", "wide", outtype), tmp_path / "base.gguf")
    (tensor,) = (tensor for tensor in gguf.GGUFReader(base).tensors if tensor.name == "blk.1.attn_output.weight")
    half = outtype != "F32"
    with base.open("r+b") as file:
        file.seek(tensor.data_offset)
        file.write(np.array([value], np.float16 if half else np.float32).tobytes())
    before = contents(tmp_path)
    adapter = builders.adapter("llama", ADAPTER, "wide")
    result = run("merge", base, "--lora", adapter, "-o", tmp_path / "out.gguf")
    assert_refused(result, tmp_path, before, "base.gguf", "blk.1.attn_output.weight", "row 0")


def test_sum_that_float16_cannot_hold(tmp_path):
    """65504 is the largest; an infinity would come out without a word."""
    base, adapter = builders.gguf_model("llama", "wide", "F16"), builders.adapter("llama", ADAPTER, "wide")
    result = run("merge", base, "--lora-scaled", f"{adapter}:1e7", "-o", tmp_path / "out.gguf")
    assert_refused(result, tmp_path, {}, "blk.")


# -- GGUF LoRA as input --


@pytest.fixture
def lora(tmp_path):
    """A sound GGUF LoRA, written by llama.cpp's converter."""
    adapter, hf = builders.adapter("llama", ADAPTER), builders.hf_model("llama")
    return convert_lora(adapter, hf, tmp_path / "lora.gguf")


LORA_GGUFS = {
    "empty": (lambda data: b"", []),
    "cut": (lambda data: data[:-1], []),
    "a_model": (key_value(b"general.type", "<IQ5s", 8, 7, b"model"), []),
    "no_lora": (renamed(b"lora", b"ctrl"), []),
    "no_pair": (renamed(TOUCHED + b".lora_b", TOUCHED + b".lora_c"), ["lora_"]),
    "unknown_tensor": (lambda data: data.replace(b"blk.0.attn_q", b"blk.9.attn_q"), ["blk.9.attn_q"]),
    "other_architecture": (lambda data: data.replace(b"llama", b"qwen3"), ["qwen3", "llama"]),
    "alpha_nan": (key_value(b"adapter.lora.alpha", "<If", 6, float("nan")), ["alpha"]),
}


@pytest.mark.parametrize("case", LORA_GGUFS)
def test_lora_gguf(case, lora, base, tmp_path):
    damage, words = LORA_GGUFS[case]
    data = lora.read_bytes()
    assert damage(data) != data
    lora.write_bytes(damage(data))
    before = contents(tmp_path)
    assert_refused(
        run("merge", base, "--lora", lora, "-o", tmp_path / "out.gguf"), tmp_path, before, "lora.gguf", *words
    )


def test_the_model_as_its_own_adapter(base, tmp_path):
    before = contents(tmp_path)
    assert_refused(run("merge", base, "--lora", base, "-o", tmp_path / "out.gguf"), tmp_path, before, "base.gguf")


def test_the_adapter_as_the_base(lora, adapter, tmp_path):
    assert_both_refuse(adapter, lora, tmp_path, "lora.gguf")


# -- paths --


@pytest.mark.parametrize("missing", ["base", "adapter"])
def test_missing_input(missing, adapter, base, tmp_path):
    paths = {"adapter": adapter, "base": base} | {missing: tmp_path / "nowhere"}
    assert_both_refuse(paths["adapter"], paths["base"], tmp_path, "nowhere")


def test_empty_directories(adapter, base, tmp_path):
    (tmp_path / "empty").mkdir()
    assert_both_refuse(tmp_path / "empty", base, tmp_path, "adapter_config.json")
    assert_both_refuse(adapter, tmp_path / "empty", tmp_path, "empty")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": "llama"}', '{"model_type": "no_such_model"}', "{}"])
def test_base_configuration(text, adapter, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(text)
    before = contents(tmp_path)
    result = run("convert", adapter, "--base", tmp_path / "base", "-o", tmp_path / "out.gguf")
    assert_refused(result, tmp_path, before, "config.json")


@pytest.mark.parametrize("out", ["missing/out.gguf", "directory", "base.gguf/out.gguf"])
def test_target_that_cannot_be(out, adapter, base, tmp_path):
    (tmp_path / "directory").mkdir()
    for *command, _ in commands(adapter, base, tmp_path):
        before = contents(tmp_path)
        assert_refused(run(*command, tmp_path / out), tmp_path, before, out.split("/")[0])


def lose_root_rights():
    """Root writes everywhere; without CAP_DAC_OVERRIDE it does not. Others have nothing to lose."""
    pr_capbset_drop, cap_dac_override = 24, 1
    ctypes.CDLL(None).prctl(pr_capbset_drop, cap_dac_override, 0, 0, 0)


def test_directory_without_permission(adapter, base, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    for *command, _ in commands(adapter, base, tmp_path):
        before = contents(tmp_path)
        result = run_process(*command, locked / "out.gguf", preexec_fn=lose_root_rights)
        assert_refused(result, tmp_path, before, "locked")


@pytest.mark.parametrize("limit", [0, 4096, 100_000])
def test_write_that_fails_halfway(limit, adapter, base, tmp_path):
    """A limit on the file size stands for a full disk: the write fails, at the start or in the middle."""
    for command in commands(adapter, base, tmp_path):
        before = contents(tmp_path)
        limited = run_process(*command, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
        if command[0] == "convert" and limit == 100_000:
            assert limited.returncode == 0, "a LoRA file of 55 KB fits"
        else:
            assert_refused(limited, tmp_path, before, "out.gguf")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 32 KiB; only root can mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "none", disk], capture_output=True, check=False)
    if mount.returncode:
        pytest.skip("no permission to mount a small disk; test_write_that_fails_halfway covers the failing write")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_full_disk(small_disk, adapter, base, tmp_path):
    for *command, _ in commands(adapter, base, tmp_path):
        before = contents(tmp_path)
        assert_refused(run(*command, small_disk / "out.gguf"), tmp_path, before, "out.gguf", "free")


def test_failure_leaves_an_existing_target_alone(adapter, base, tmp_path):
    """--force replaces the target only by a whole file."""
    rewritten(adapter, spoil(f"{DOWN_PROJ}.lora_B.weight", np.nan))
    (tmp_path / "out.gguf").write_bytes(b"precious")
    for command in commands(adapter, base, tmp_path):
        before = contents(tmp_path)
        assert_refused(run(*command, "--force"), tmp_path, before)
    assert (tmp_path / "out.gguf").read_bytes() == b"precious"
