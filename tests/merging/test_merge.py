"""`gguflora.merge` against PEFT's merge, ggml's own quantization, and logits of llama.cpp."""

import contextlib
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

import gguflora
from support import builders
from support.builders import ARCHITECTURES, Adapter
from support.oracles import libggml
from support.oracles.gguf_files import dequantized, lora_changes, read_metadata, read_tensors
from support.oracles.llama_cpp import convert_lora, llama_logits
from support.oracles.peft import merged_gguf, peft_logits

EXACT = Adapter(exact=True, seed=3)
RANDOM = Adapter(seed=4)
PATTERNS = Adapter(
    options=(
        ("use_rslora", True),
        ("rank_pattern", (("down_proj", 8), (r"layers\.1\.self_attn\..*", 6))),
        ("alpha_pattern", (("o_proj", 5.0), (r"model\.layers\.0\..*", 20.0))),
    )
)
QUANTIZED = ["F16", "BF16", "Q8_0", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K"]
ARCHITECTURES_BY_TYPES = [("llama", outtype) for outtype in QUANTIZED] + [
    (arch, outtype) for arch in ARCHITECTURES if arch != "llama" for outtype in ("Q8_0", "Q4_K_M")
]


def reader_of(path):
    return gguf.GGUFReader(path)


def data_of(path):
    """Every tensor's bytes as (rows, bytes per row), by name."""
    return {tensor.name: tensor.data.view(np.uint8) for tensor in reader_of(path).tensors}


def changes_of(arch, spec, size):
    """The change of each tensor in float64 at scale 1: PEFT's merge for anything llama.cpp's converter gets wrong."""
    hf, adapter = builders.hf_model(arch, size), builders.adapter(arch, spec, size)
    return lora_changes(convert_lora(adapter, hf, adapter / "oracle.gguf"))


def requantized(tensor, change):
    """The bytes ggml makes of a base tensor plus a change, the sum taken in float32."""
    values = dequantized(tensor) + change.astype(np.float32)
    return libggml.quantize(values, int(tensor.tensor_type))


def assert_same_but_for(base, merged, touched):
    """Untouched tensors, old metadata, order and layout are those of the base."""
    old, new = reader_of(base), reader_of(merged)
    assert [tensor.name for tensor in new.tensors] == [tensor.name for tensor in old.tensors]
    for before, after in zip(old.tensors, new.tensors, strict=True):
        assert after.tensor_type == before.tensor_type
        assert list(after.shape) == list(before.shape)
        assert after.data_offset - new.data_offset == before.data_offset - old.data_offset
        if before.name not in touched:
            np.testing.assert_array_equal(after.data.view(np.uint8), before.data.view(np.uint8), err_msg=before.name)
    for name, field in old.fields.items():
        if name.startswith("GGUF."):
            continue
        assert new.fields[name].types == field.types
        assert new.fields[name].contents() == field.contents(), name
    added = [name for name in new.fields if name not in old.fields]
    assert all(name.startswith("gguflora.") for name in added), added


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


# -- numbers --


@pytest.mark.parametrize("spec", [RANDOM, PATTERNS], ids=["plain", "patterns_rslora"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_f32_equals_pefts_merge(arch, spec, tmp_path):
    base, adapter = builders.gguf_model(arch), builders.adapter(arch, spec)
    gguflora.merge(base, adapter, tmp_path / "out.gguf")
    before, found = read_tensors(base), read_tensors(tmp_path / "out.gguf")
    expected = read_tensors(merged_gguf(builders.hf_model(arch), adapter))
    touched = {name for name in before if not np.array_equal(before[name], expected[name])}
    assert len(touched) == 2 * len(ARCHITECTURES[arch].linear)
    for name in touched:
        change = expected[name].astype(np.float64) - before[name]
        error = np.linalg.norm(found[name].astype(np.float64) - expected[name]) / np.linalg.norm(change)
        assert error <= 1e-5, f"{name}: relative error of the change is {error:.1e}"
    assert_same_but_for(base, tmp_path / "out.gguf", touched)


def test_f32_with_embedding_and_head_equals_pefts_merge(tmp_path):
    spec = Adapter(targets=("q_proj", "embed_tokens", "lm_head"), dtype=torch.bfloat16)
    base, adapter = builders.gguf_model("llama"), builders.adapter("llama", spec)
    gguflora.merge(base, adapter, tmp_path / "out.gguf")
    found = read_tensors(tmp_path / "out.gguf")
    for name, expected in read_tensors(merged_gguf(builders.hf_model("llama"), adapter)).items():
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("outtype", ["BF16", "Q8_0", "Q4_0", "Q4_K_M"])
def test_embedding_of_a_quantized_base(outtype, tmp_path):
    """PEFT's copy of the embedding is not exactly the quantized one; that is no reason to refuse."""
    spec = Adapter(targets=("embed_tokens", "lm_head"), exact=True)
    base, changes = builders.gguf_model("qwen2", "wide", outtype), changes_of("qwen2", spec, "wide")
    gguflora.merge(base, builders.adapter("qwen2", spec, "wide"), tmp_path / "out.gguf", rounding="nearest")
    found = data_of(tmp_path / "out.gguf")
    assert changes.keys() == {"token_embd.weight", "output.weight"}
    for tensor in reader_of(base).tensors:
        if tensor.name in changes:
            np.testing.assert_array_equal(found[tensor.name], requantized(tensor, changes[tensor.name]))
    assert_same_but_for(base, tmp_path / "out.gguf", changes)


@pytest.mark.parametrize(("arch", "outtype"), ARCHITECTURES_BY_TYPES)
def test_quantized_bytes_are_ggmls(arch, outtype, tmp_path):
    """B@A is exact in float32 here, so every byte must be the one ggml_quantize_chunk writes."""
    base, changes = builders.gguf_model(arch, "wide", outtype), changes_of(arch, EXACT, "wide")
    gguflora.merge(base, builders.adapter(arch, EXACT, "wide"), tmp_path / "out.gguf", rounding="nearest")
    found = data_of(tmp_path / "out.gguf")
    tensors = {tensor.name: tensor for tensor in reader_of(base).tensors}
    for name, change in changes.items():
        np.testing.assert_array_equal(found[name], requantized(tensors[name], change), err_msg=name)
    assert_same_but_for(base, tmp_path / "out.gguf", changes)


def test_quantized_bases_hold_the_types_they_are_here_for():
    types = {
        outtype: {tensor.tensor_type for tensor in reader_of(builders.gguf_model("llama", "wide", outtype)).tensors}
        for outtype in QUANTIZED
    }
    assert {Type.Q4_K, Type.Q6_K} < types["Q4_K_M"]
    assert {Type.Q5_K, Type.Q6_K} < types["Q5_K_M"]
    for outtype in ("F16", "BF16", "Q8_0", "Q4_0", "Q6_K"):
        assert Type[outtype] in types[outtype]


@pytest.mark.parametrize("outtype", QUANTIZED)
def test_random_adapter_differs_in_hardly_a_code(outtype, tmp_path):
    """A product's last bit may round differently than in float64, and then ggml's search for scales may end elsewhere.

    Where it does, the result must be as close to the merged weights.
    """
    base, changes = builders.gguf_model("llama", "wide", outtype), changes_of("llama", RANDOM, "wide")
    gguflora.merge(base, builders.adapter("llama", RANDOM, "wide"), tmp_path / "out.gguf", rounding="nearest")
    found, same = data_of(tmp_path / "out.gguf"), []
    for tensor in reader_of(base).tensors:
        if tensor.name not in changes:
            continue
        target = dequantized(tensor) + changes[tensor.name]
        expected = requantized(tensor, changes[tensor.name])
        same.append(found[tensor.name] == expected)
        errors = [
            np.linalg.norm(libggml.dequantize(data, int(tensor.tensor_type), int(tensor.shape[0])) - target)
            for data in (found[tensor.name], expected)
        ]
        assert errors[0] <= 1.001 * errors[1], tensor.name
    assert np.concatenate([part.ravel() for part in same]).mean() >= 0.995


@pytest.mark.parametrize("outtype", ["F16", "Q8_0", "Q4_0"])
def test_narrow_rows(outtype, tmp_path):
    """Rows that are multiples of 32 only."""
    base, changes = builders.gguf_model("qwen3", "small", outtype), changes_of("qwen3", EXACT, "small")
    gguflora.merge(base, builders.adapter("qwen3", EXACT), tmp_path / "out.gguf", rounding="nearest")
    found = data_of(tmp_path / "out.gguf")
    for tensor in reader_of(base).tensors:
        if tensor.name in changes:
            np.testing.assert_array_equal(found[tensor.name], requantized(tensor, changes[tensor.name]))


@pytest.mark.parametrize("outtype", ["F32", "Q8_0", "Q4_K_M"])
def test_several_adapters_are_summed_and_rounded_once(outtype, tmp_path):
    base, other = builders.gguf_model("llama", "wide", outtype), Adapter(exact=True, seed=9, rank=3, alpha=6)
    pairs = [(builders.adapter("llama", EXACT, "wide"), 0.5), (builders.adapter("llama", other, "wide"), -1.0)]
    gguflora.merge(base, pairs, tmp_path / "out.gguf", rounding="nearest")
    one, two = changes_of("llama", EXACT, "wide"), changes_of("llama", other, "wide")
    found = data_of(tmp_path / "out.gguf")
    for tensor in reader_of(base).tensors:
        if tensor.name in one:
            expected = requantized(tensor, 0.5 * one[tensor.name] - two[tensor.name])
            np.testing.assert_array_equal(found[tensor.name], expected, err_msg=tensor.name)


def test_adapters_of_different_tensors(tmp_path):
    """Each adapter changes its own tensors; one given twice counts twice."""
    q, v = (Adapter(exact=True, targets=(target,)) for target in ("q_proj", "v_proj"))
    base, paths = builders.gguf_model("llama"), [builders.adapter("llama", spec) for spec in (q, v, v)]
    gguflora.merge(base, paths, tmp_path / "out.gguf")
    before, found = read_tensors(base), read_tensors(tmp_path / "out.gguf")
    expected = {**changes_of("llama", q, "small")}
    expected |= {name: 2 * change for name, change in changes_of("llama", v, "small").items()}
    for name in before:
        np.testing.assert_array_equal(found[name], before[name] + np.float32(expected.get(name, 0)), err_msg=name)


@pytest.mark.parametrize("outtype", ["F32", "Q4_K_M"])
def test_scale_0_is_the_base(outtype, tmp_path):
    base = builders.gguf_model("llama", "wide", outtype)
    gguflora.merge(base, [(builders.adapter("llama", RANDOM, "wide"), 0.0)], tmp_path / "out.gguf")
    assert_same_but_for(base, tmp_path / "out.gguf", ())


@pytest.mark.parametrize("spec", [RANDOM, PATTERNS], ids=["plain", "patterns_rslora"])
@pytest.mark.parametrize("arch", ["llama", "phi3"])
def test_gguf_lora_merges_like_the_peft_directory(arch, spec, tmp_path):
    base, adapter = builders.gguf_model(arch, "wide", "Q4_K_M"), builders.adapter(arch, spec, "wide")
    gguflora.convert(adapter, base, tmp_path / "lora.gguf")
    gguflora.merge(base, [(adapter, 0.75)], tmp_path / "from_peft.gguf")
    gguflora.merge(base, [(tmp_path / "lora.gguf", 0.75)], tmp_path / "from_gguf.gguf")
    expected = data_of(tmp_path / "from_peft.gguf")
    same = [(data == expected[name]).mean() for name, data in data_of(tmp_path / "from_gguf.gguf").items()]
    assert min(same) >= 0.999
    assert spec is PATTERNS or min(same) == 1  # patterns: the factor was rounded into B


def test_gguf_lora_of_llama_cpps_converter(tmp_path):
    base, adapter = builders.gguf_model("llama", "wide", "Q8_0"), builders.adapter("llama", RANDOM, "wide")
    theirs = convert_lora(adapter, builders.hf_model("llama", "wide"), tmp_path / "theirs.gguf")
    gguflora.merge(base, adapter, tmp_path / "from_peft.gguf")
    gguflora.merge(base, theirs, tmp_path / "from_gguf.gguf")
    expected = data_of(tmp_path / "from_peft.gguf")
    for name, data in data_of(tmp_path / "from_gguf.gguf").items():
        np.testing.assert_array_equal(data, expected[name], err_msg=name)


@pytest.mark.parametrize(("outtype", "tolerance"), [("F32", 1e-4), ("Q8_0", 0.1), ("Q4_K_M", 0.5)])
def test_merged_file_answers_like_the_hot_adapter(outtype, tolerance, tmp_path):
    base, adapter = builders.gguf_model("llama", "wide", outtype), builders.adapter("llama", RANDOM, "wide")
    gguflora.convert(adapter, base, tmp_path / "lora.gguf")
    gguflora.merge(base, adapter, tmp_path / "out.gguf")
    hot, cold = llama_logits(base, tmp_path / "lora.gguf"), llama_logits(base)
    error = llama_logits(tmp_path / "out.gguf") - hot
    assert np.linalg.norm(error) < tolerance * np.linalg.norm(hot - cold)


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch != "llama"])
def test_merged_file_loads(arch, tmp_path):
    gguflora.merge(builders.gguf_model(arch), builders.adapter(arch, RANDOM), tmp_path / "out.gguf")
    expected = peft_logits(builders.hf_model(arch), builders.adapter(arch, RANDOM))
    assert np.abs(llama_logits(tmp_path / "out.gguf") - expected).max() < 1e-2


# -- files --


@pytest.mark.parametrize("outtype", ["F32", "Q4_K_M"])
def test_same_bytes_for_every_number_of_threads(outtype, tmp_path):
    base, adapter = builders.gguf_model("llama", "wide", outtype), builders.adapter("llama", RANDOM, "wide")
    digests = set()
    for threads in (None, 1, 2, 7):
        gguflora.merge(base, adapter, tmp_path / f"{threads}.gguf", threads=threads)
        digests.add(digest(tmp_path / f"{threads}.gguf"))
    assert len(digests) == 1


def test_metadata_records_what_was_merged(tmp_path):
    base, one, two = builders.gguf_model("llama"), *(builders.adapter("llama", spec) for spec in (RANDOM, EXACT))
    gguflora.merge(base, [(one, 0.5)], tmp_path / "one.gguf")
    gguflora.merge(tmp_path / "one.gguf", [(two, -2.0)], tmp_path / "two.gguf")
    old = read_metadata(base)
    added = {name: value for name, value in read_metadata(tmp_path / "two.gguf").items() if name not in old}
    hashes = [digest(adapter / "adapter_model.safetensors") for adapter in (one, two)]
    assert hashes in added.values(), "both merges, in their order"
    assert [0.5, -2.0] in added.values()
    assert gguflora.__version__ in added.values()


def test_base_and_adapter_are_not_touched(tmp_path):
    base, adapter = builders.gguf_model("llama"), builders.adapter("llama", RANDOM)
    files = [base, *sorted(adapter.iterdir())]
    before = [(digest(path), path.stat().st_mtime_ns) for path in files]
    gguflora.merge(base, adapter, tmp_path / "out.gguf")
    assert [(digest(path), path.stat().st_mtime_ns) for path in files] == before
    assert list(tmp_path.iterdir()) == [tmp_path / "out.gguf"]


def test_dry_run_writes_nothing(tmp_path):
    base, adapter = builders.gguf_model("llama"), builders.adapter("llama", RANDOM)
    report = gguflora.merge(base, adapter, tmp_path / "out.gguf", dry_run=True)
    assert list(tmp_path.iterdir()) == []
    assert report.dry_run
    assert len(report.tensors) == 14


def test_overwrites_only_with_force(tmp_path):
    base, adapter, out = builders.gguf_model("llama"), builders.adapter("llama", RANDOM), tmp_path / "out.gguf"
    out.write_bytes(b"precious")
    with pytest.raises(gguflora.GgufloraError, match=r"out\.gguf"):
        gguflora.merge(base, adapter, out)
    assert out.read_bytes() == b"precious"
    gguflora.merge(base, adapter, out, force=True)
    assert out.read_bytes()[:4] == b"GGUF"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("how", ["same", "symlink", "hardlink", "dotted"])
def test_never_writes_onto_the_base(how, tmp_path):
    base, other = tmp_path / "base.gguf", tmp_path / "other.gguf"
    base.write_bytes(builders.gguf_model("llama").read_bytes())
    if how == "symlink":
        other.symlink_to(base)
    elif how == "hardlink":
        os.link(base, other)
    out = {"same": base, "dotted": tmp_path / ".." / tmp_path.name / "base.gguf"}.get(how, other)
    with pytest.raises(gguflora.GgufloraError):
        gguflora.merge(base, builders.adapter("llama", RANDOM), out, force=True)
    assert digest(base) == digest(builders.gguf_model("llama"))


def test_relative_paths(tmp_path, monkeypatch):
    """A bare file name has the current directory as its directory."""
    monkeypatch.chdir(tmp_path)
    gguflora.merge(builders.gguf_model("llama"), builders.adapter("llama", RANDOM), "out.gguf")
    assert (tmp_path / "out.gguf").is_file()


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e39])
def test_scale_must_be_finite(scale, tmp_path):
    with pytest.raises(gguflora.GgufloraError, match="scale"):
        gguflora.merge(builders.gguf_model("llama"), [(builders.adapter("llama", RANDOM), scale)], tmp_path / "o.gguf")
    assert list(tmp_path.iterdir()) == []


# -- command line --


def run(*arguments):
    command = [sys.executable, "-P", "-m", "gguflora", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_command_line_equals_the_function(tmp_path):
    """Options as llama.cpp spells them; a colon in a path is no scale."""
    base, one = builders.gguf_model("llama", "wide", "Q4_K_M"), builders.adapter("llama", EXACT, "wide")
    two = tmp_path / "tone:v2"
    two.symlink_to(builders.adapter("llama", RANDOM, "wide"))
    gguflora.merge(base, [one, (two, 0.5), (one, -1)], tmp_path / "function.gguf")
    out = tmp_path / "command.gguf"
    result = run(
        *("merge", base, "--lora", one, "--lora-scaled", f"{two}:0.5", "--lora-scaled", f"{one}:-1"),
        *("-o", out, "--threads", 2),
    )
    assert result.returncode == 0, result.stderr
    assert digest(out) == digest(tmp_path / "function.gguf")
    assert re.search(r"14 tensors", result.stdout)


def test_dry_run_and_force_of_the_command_line(tmp_path):
    arguments = [
        "merge",
        builders.gguf_model("llama"),
        "--lora",
        builders.adapter("llama", RANDOM),
        "-o",
        tmp_path / "o.gguf",
    ]
    assert run(*arguments, "--dry-run").returncode == 0
    assert list(tmp_path.iterdir()) == []
    assert [run(*arguments).returncode for _ in range(2)] == [0, 1]
    assert run(*arguments, "--force").returncode == 0


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("merge", "base.gguf"),
        ("merge", "base.gguf", "-o", "out.gguf"),
        ("merge", "base.gguf", "--lora", "a", "-o", "out.gguf", "--threads", "0"),
        ("merge", "base.gguf", "--lora-scaled", "a", "-o", "out.gguf"),
        ("merge", "base.gguf", "--lora-scaled", "a:half", "-o", "out.gguf"),
        ("merge", "base.gguf", "--lora", "a", "-o", "out.gguf", "--no-such-option"),
        ("convert", "a", "--base", "base.gguf", "-o", "out.gguf", "--outtype", "q9_9"),
        ("convert", "a", "-o", "out.gguf"),
        ("transmogrify",),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments, tmp_path):
    result = run(*(tmp_path / word if word.endswith(".gguf") else word for word in arguments))
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


# -- size --


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path):
    """A sparse F16 model of 1.6 GB, every tensor touched: under 300 MB at its peak."""
    base, adapter = big_model(tmp_path), tmp_path / "lora.gguf"
    big_adapter(base, adapter)
    arguments = repr([str(path) for path in (base, adapter, tmp_path / "out.gguf")])
    # VmHWM and not ru_maxrss, which goes on from the process that started this one
    program = f"import gguflora; gguflora.merge(*{arguments}); print(open('/proc/self/status').read())"
    result = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    peak = 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", result.stdout)[1])
    assert peak < 300e6 + adapter.stat().st_size, f"peak memory is {peak / 1e6:.0f} MB"


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted(stop, tmp_path):
    """Neither the target nor anything else is there, not even after kill -9."""
    base, adapter = big_model(tmp_path, layers=2), tmp_path / "lora.gguf"
    big_adapter(base, adapter)
    command = [sys.executable, "-P", "-m", "gguflora", "merge", base, "--lora", adapter, "-o", tmp_path / "out.gguf"]
    with subprocess.Popen([*command, "--threads", "1"], stderr=subprocess.PIPE, text=True) as process:
        while not is_writing(process.pid, tmp_path):
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(stop)
        _, message = process.communicate(timeout=60)
    assert {path.name for path in tmp_path.iterdir()} == {"big.gguf", "lora.gguf"}
    if stop != signal.SIGKILL:
        assert process.returncode == 130
        assert message == "interrupted; nothing was written\n"


def is_writing(pid, directory):
    """Whether the process has opened its output, a file without a name."""
    with contextlib.suppress(FileNotFoundError):
        opened = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]
        return any(path.startswith(f"{directory}/#") for path in opened)
    return False


def big_model(directory, layers=4):
    """Header by gguf-py, tensor data a hole in the file: zeros."""
    writer = gguf.GGUFWriter(directory / "big.gguf", "llama")
    writer.add_block_count(layers)
    writer.add_head_count(32)
    writer.add_head_count_kv(32)
    for layer in range(layers):
        for name, shape in {"ffn_up": (14336, 4096), "ffn_gate": (14336, 4096), "ffn_down": (4096, 14336)}.items():
            size = 2 * shape[0] * shape[1]
            writer.add_tensor_info(f"blk.{layer}.{name}.weight", shape, np.dtype(np.float16), size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with (directory / "big.gguf").open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.truncate(-(-end // 32) * 32 + layers * 3 * 2 * 4096 * 14336)
    return directory / "big.gguf"


def big_adapter(base, out):
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 16)
    random = np.random.default_rng(0)
    for tensor in reader_of(base).tensors:
        n_in, n_out = (int(dimension) for dimension in tensor.shape)
        writer.add_tensor(f"{tensor.name}.lora_a", random.standard_normal((16, n_in), np.float32).astype(np.float16))
        writer.add_tensor(f"{tensor.name}.lora_b", random.standard_normal((n_out, 16), np.float32).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
