"""llama.cpp's own quantizer with the options of llama-quantize, and models of many layers to try it on."""

import ctypes
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

import gguflora
from gguflora.merging.imatrix import read_imatrix
from support.oracles.llama_cpp import quiet_llama_cpp

N_EMBD = 256
INT, TEXT = 0, 3  # LLAMA_KV_OVERRIDE_TYPE_INT, _STR


class ImatrixEntry(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.POINTER(ctypes.c_float)), ("size", ctypes.c_size_t))


class TensorType(ctypes.Structure):
    _fields_ = (("pattern", ctypes.c_char_p), ("type", ctypes.c_int))


def file_type(preset: str) -> int:
    if preset == "F32":
        return 0
    if preset == "MXFP4_MOE":
        return 38
    return int(getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{preset}", None) or {"Q1_0": 40, "Q2_0": 41}[preset])


def llama_quantize(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    preset: str,
    *,
    imatrix: str | os.PathLike[str] | None = None,
    origin: tuple[str, int] = ("words.txt", 7),
    types: Sequence[tuple[str, str]] = (),
    **options: Any,
) -> int:
    """Quantize as llama-quantize does, metadata about the imatrix included (tools/quantize/quantize.cpp)."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread, parameters.allow_requantize = file_type(preset), 2, True
    for name, value in options.items():
        setattr(parameters, name, gguf.GGMLQuantizationType[value] if name.endswith("_type") else value)
    if types:
        kinds = [TensorType(pattern.encode(), gguf.GGMLQuantizationType[kind]) for pattern, kind in types]
        overrides = (TensorType * (len(kinds) + 1))(*kinds, TensorType(None, 0))
        parameters.tt_overrides = ctypes.cast(overrides, type(parameters.tt_overrides))
    if imatrix is not None:
        weights = {name: np.ascontiguousarray(values.ravel()) for name, values in read_imatrix(imatrix).items()}
        rows = [
            ImatrixEntry(name.encode(), values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), values.size)
            for name, values in weights.items()
        ]
        entries = (ImatrixEntry * (len(rows) + 1))(*rows, ImatrixEntry(None, None, 0))
        parameters.imatrix = ctypes.cast(entries, type(parameters.imatrix))
        overrides_kv = origin_overrides(str(imatrix), *origin, len(weights))
        parameters.kv_overrides = ctypes.cast(overrides_kv, type(parameters.kv_overrides))
    with quiet_llama_cpp():
        names = str(source).encode(), str(target).encode()
        return int(llama_cpp.llama_model_quantize(*names, ctypes.byref(parameters)))


def is_same(source: Path, folder: Path, preset: str, **options: Any) -> bool:
    """Whether llama.cpp writes the preset; then gguflora has written the same bytes."""
    theirs, ours = folder / "theirs.gguf", folder / "ours.gguf"
    if llama_quantize(source, theirs, preset, **options):
        return False
    types = options.pop("types", ())
    gguflora.quantize(source, ours, preset, tensor_types=types, force=True, **options)
    if ours.read_bytes() != theirs.read_bytes():
        wanted, found = (
            {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
            for path in (theirs, ours)
        )
        assert found == wanted
        raise AssertionError(f"{preset}: the types are equal, the bytes are not")
    return True


def origin_overrides(path: str, dataset: str, chunks: int, n_entries: int) -> Any:
    values: dict[str, str | int] = {
        "file": path,
        "dataset": dataset,
        "entries_count": n_entries,
        "chunks_count": chunks,
    }
    rows = (llama_cpp.llama_model_kv_override * (len(values) + 1))()
    for row, (key, value) in zip(rows, values.items(), strict=False):
        row.key = f"quantize.imatrix.{key}".encode()
        row.tag = TEXT if isinstance(value, str) else INT
        if isinstance(value, str):
            row.value.val_str = value.encode()[:127]
        else:
            row.value.val_i64 = value
    return rows


def layered_model(
    path: Path,
    architecture: str = "llama",
    n_layers: int = 16,
    n_expert: int = 0,
    n_head: int = 8,
    n_head_kv: int = 2,
    n_in: int = N_EMBD,
    tied: bool = False,
) -> Path:
    """A model of many layers with random weights: what position, experts and heads decide. It cannot be run."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("layered")
    writer.add_block_count(n_layers)
    writer.add_context_length(128)
    writer.add_embedding_length(n_in)
    writer.add_feed_forward_length(n_in)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_head_kv)
    writer.add_key_length(32)
    writer.add_value_length(32)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    writer.add_rope_dimension_count(32)
    writer.add_file_type(0)
    writer.add_vocab_size(64)
    if n_expert:
        writer.add_expert_count(n_expert)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(n_in)
    random = np.random.default_rng(n_layers)
    for name, shape in layered_tensors(architecture, n_layers, n_expert, n_in, tied).items():
        writer.add_tensor(name, random.standard_normal(shape, np.float32) * 0.05)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def layered_tensors(
    architecture: str, n_layers: int, n_expert: int, n_in: int, tied: bool
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (64, n_in), "output_norm.weight": (n_in,)}
    if not tied:
        shapes["output.weight"] = (64, n_in)
    fused = architecture in {"falcon", "phi3"}
    for layer in range(n_layers):
        block: dict[str, tuple[int, ...]] = {"attn_norm": (n_in,), "attn_output": (32, n_in), "ffn_norm": (n_in,)}
        block |= {"attn_qkv": (96, n_in)} if fused else {f"attn_{x}": (32, n_in) for x in "qkv"}
        if n_expert:
            block |= {f"ffn_{x}_exps": (n_expert, 32, n_in) for x in ("gate", "up", "down")}
            block["ffn_gate_inp"] = (n_expert, n_in)
        else:
            block |= {f"ffn_{x}": (32, n_in) for x in (("up", "down") if fused else ("gate", "up", "down"))}
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    return shapes


def imatrix_of(model: Path, path: Path) -> Path:
    """An importance matrix for every matrix of a model but its embedding."""
    from support.imatrix import CHUNK, write_imatrix

    random = np.random.default_rng(5)
    entries = {}
    for tensor in gguf.GGUFReader(model).tensors:
        n_in, n_matrices = int(tensor.shape[0]), int(tensor.shape[2]) if len(tensor.shape) > 2 else 1
        if len(tensor.shape) > 1 and not re.match("token_embd", tensor.name):
            sums = random.chisquare(3, (n_matrices, n_in)).astype(np.float32) * 100
            entries[tensor.name] = sums, [CHUNK * (1 + number) for number in range(n_matrices)]
    return write_imatrix(path, entries)
