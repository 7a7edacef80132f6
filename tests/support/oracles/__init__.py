"""Truth that nobody here wrote: PEFT and torch, llama.cpp's converters, libggml-base, llama.cpp's logits."""

import atexit
import contextlib
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import peft
import torch
import transformers

PROMPT = tuple(range(40, 64))

transformers.utils.logging.disable_progress_bar()


# -- llama.cpp's converters --


def llama_cpp_dir() -> Path:
    """vendor/llama.cpp of the llama-cpp-python sdist, as tools/fetch_oracles leaves it.

    Raises:
        FileNotFoundError: when it was not fetched; a skipped oracle would be a test that cannot fail.
    """
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    default = cache_home / "gguflora" / f"llama-cpp-python-{version('llama-cpp-python')}"
    path = Path(os.environ.get("GGUFLORA_LLAMA_CPP_SDIST") or default) / "vendor/llama.cpp"
    if not (path / "convert_hf_to_gguf.py").is_file():
        raise FileNotFoundError(f"no llama.cpp converters in {path}: run tools/fetch_oracles first")
    return path


@cache
def _scripts() -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__).with_name("llama_cpp_scripts.py")), str(llama_cpp_dir())]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(process.communicate)
    return process


def run_script(*arguments: str | Path) -> None:
    """Run one of llama.cpp's scripts with arguments, in the process that keeps torch loaded."""
    process = _scripts()
    assert process.stdin and process.stdout
    process.stdin.write(json.dumps([str(argument) for argument in arguments]) + "\n")
    process.stdin.flush()
    error = json.loads(process.stdout.readline())
    if error:
        raise RuntimeError(error)


def convert_model(hf_dir: Path, out: Path, outtype: str = "f32") -> Path:
    """convert_hf_to_gguf.py."""
    run_script("convert_hf_to_gguf.py", hf_dir, "--outfile", out, "--outtype", outtype)
    return out


def convert_lora(adapter_dir: Path, hf_dir: Path, out: Path, outtype: str = "f32") -> Path:
    """convert_lora_to_gguf.py; right for plain LoRA only (it knows neither rsLoRA nor the patterns)."""
    run_script("convert_lora_to_gguf.py", adapter_dir, "--base", hf_dir, "--outfile", out, "--outtype", outtype)
    return out


# -- PEFT --


def peft_model(hf_dir: Path, adapter_dir: Path) -> peft.PeftModel:
    """The base in float32 with the adapter read from its files."""
    base = transformers.AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32, attn_implementation="eager")
    return peft.PeftModel.from_pretrained(base, adapter_dir).float().eval()


@cache
def merged_gguf(hf_dir: Path, adapter_dir: Path) -> Path:
    """merge_and_unload in float32, written by convert_hf_to_gguf.py as F32."""
    out = Path(tempfile.mkdtemp(dir=adapter_dir.parent, prefix="merged-"))
    peft_model(hf_dir, adapter_dir).merge_and_unload().save_pretrained(out / "hf")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / "hf" / name).write_bytes((hf_dir / name).read_bytes())
    return convert_model(out / "hf", out / "merged.gguf")


@cache
def peft_logits(hf_dir: Path, adapter_dir: Path | None = None, scale: float = 1.0) -> np.ndarray:
    """Logits (n_prompt, n_vocab) of the torch model for PROMPT, with the adapter at `scale` if one is given."""
    if adapter_dir:
        model: Any = peft_model(hf_dir, adapter_dir)
        for module in model.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                module.scale_layer(scale)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            hf_dir, dtype=torch.float32, attn_implementation="eager"
        )
    with torch.inference_mode():
        return model(torch.tensor([PROMPT])).logits[0].float().numpy()


# -- llama.cpp --


_LOG: list[str] = []

_COLLECT = llama_cpp.llama_log_callback(lambda level, text, user_data: _LOG.append(text.decode(errors="replace")))
"""Never freed: an engine's thread may be about to call it when the block that set it ends."""


@contextlib.contextmanager
def quiet_llama_cpp() -> Iterator[None]:
    """llama.cpp's log off the terminal; into the exception, if the block raises one."""
    _LOG.clear()
    llama_cpp.llama_log_set(_COLLECT, ctypes.c_void_p(0))
    try:
        yield
    except Exception as error:
        raise RuntimeError(f"{error}: {''.join(_LOG)[-2000:]}") from error
    finally:
        llama_cpp.llama_log_set(llama_cpp._logger.llama_log_callback, ctypes.c_void_p(0))


def llama_logits(model: Path, lora: Path | None = None, scale: float = 1.0) -> np.ndarray:
    """Logits (n_prompt, n_vocab) of llama.cpp for PROMPT, on the CPU with a float32 KV cache."""
    with quiet_llama_cpp():
        llm = llama_cpp.Llama(
            str(model), n_ctx=64, n_batch=64, n_threads=2, n_threads_batch=2, n_gpu_layers=0, verbose=False,
            logits_all=True, type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
            lora_path=str(lora) if lora else None, lora_scale=scale,
        )  # fmt: skip
        try:
            llm.eval(list(PROMPT))
            return llm.scores[: len(PROMPT)].copy()
        finally:
            llm.close()


# -- GGUF by gguf-py --


def llama_embeddings(model: Path, lora: Path | None = None) -> np.ndarray:
    """Embeddings (n_prompt, width) of an encoder in llama.cpp for each token of PROMPT."""
    options = {"embedding": True, "pooling_type": llama_cpp.LLAMA_POOLING_TYPE_NONE}
    with _low_level(model, lora, **options) as (llm, context):
        assert llama_cpp.llama_encode(context, _batch(PROMPT)) == 0
        return _rows(llama_cpp.llama_get_embeddings_ith, context, len(PROMPT), llm.n_embd())


def llama_decoder_logits(model: Path, lora: Path | None = None) -> np.ndarray:
    """Logits (4, n_vocab) of the decoder of an encoder-decoder model in llama.cpp, whose encoder has read PROMPT."""
    with _low_level(model, lora) as (llm, context):
        assert llama_cpp.llama_encode(context, _batch(PROMPT)) == 0
        assert llama_cpp.llama_decode(context, _batch((0, *PROMPT[:3]))) == 0
        return _rows(llama_cpp.llama_get_logits_ith, context, 4, llm.n_vocab())


@contextlib.contextmanager
def _low_level(model: Path, lora: Path | None, **options: Any) -> Iterator[tuple[llama_cpp.Llama, Any]]:
    with quiet_llama_cpp():
        llm = llama_cpp.Llama(
            str(model), n_ctx=64, n_batch=64, n_ubatch=64, n_threads=2, n_threads_batch=2, verbose=False,
            type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, logits_all=True,
            lora_path=str(lora) if lora else None, **options,
        )  # fmt: skip
        try:
            yield llm, llm._ctx.ctx
        finally:
            llm.close()


def _batch(tokens: tuple[int, ...]) -> Any:
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for place, token in enumerate(tokens):
        batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
    return batch


def _rows(getter: Any, context: Any, n_rows: int, width: int) -> np.ndarray:
    return np.stack([np.ctypeslib.as_array(getter(context, row), (width,)).copy() for row in range(n_rows)])


def tensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor as float32 in numpy order, dequantized by ggml."""
    return {tensor.name: dequantize(tensor) for tensor in gguf.GGUFReader(path).tensors}


def lora_changes(path: Path) -> dict[str, np.ndarray]:
    """The change (n_out, n_in) in float64 of each tensor by a GGUF LoRA at scale 1, as llama.cpp computes it.

    Source: llama-adapter.h `get_scale` (alpha 0 or absent means no alpha/rank) and the transposed token_embd.
    """
    reader = gguf.GGUFReader(path)
    field = reader.get_field("adapter.lora.alpha")
    alpha = float(field.contents()) if field else 0.0
    parts = {tensor.name: dequantize(tensor).astype(np.float64) for tensor in reader.tensors}
    changes = {}
    for name in sorted({name.rpartition(".")[0] for name in parts}):
        a, b = parts.pop(f"{name}.lora_a"), parts.pop(f"{name}.lora_b")
        factor = alpha / b.shape[-1] if alpha else 1.0
        changes[name] = factor * (a @ b.T if name == "token_embd.weight" else b @ a)
    assert not parts, f"{path.name} has tensors that are no pair: {sorted(parts)}"
    return changes


def metadata(path: Path) -> dict[str, Any]:
    """Every key-value pair of the file."""
    fields = gguf.GGUFReader(path).fields.values()
    return {field.name: field.contents() for field in fields if not field.name.startswith("GGUF.")}


# -- libggml-base --


class _TypeTraits(ctypes.Structure):
    # ggml.h, struct ggml_type_traits, as far as needed
    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    ]


@cache
def libggml() -> ctypes.CDLL:
    """libggml-base of llama-cpp-python, with the few prototypes that the tests call."""
    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib/libggml-base.so"))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    library.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    library.ggml_get_type_traits.argtypes = [ctypes.c_int]
    return library


def ggml_quantize(values: np.ndarray, qtype: int) -> np.ndarray:
    """ggml_quantize_chunk of (n_rows, n_columns) float32: (n_rows, bytes per row) of uint8."""
    values = np.ascontiguousarray(values, np.float32)
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(qtype)]
    rows, columns = values.shape
    out = np.empty((rows, columns // block * size), np.uint8)
    written = libggml().ggml_quantize_chunk(int(qtype), values.ctypes.data, out.ctypes.data, 0, rows, columns, None)
    assert written == out.nbytes
    return out


def ggml_dequantize(data: np.ndarray, qtype: int) -> np.ndarray:
    """to_float of ggml for (n_rows, bytes per row) of uint8: (n_rows, n_columns) float32."""
    data = np.ascontiguousarray(data)
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(qtype)]
    out = np.empty((*data.shape[:-1], data.shape[-1] // size * block), np.float32)
    to_float = libggml().ggml_get_type_traits(int(qtype)).contents.to_float
    to_float(data.ctypes.data, out.ctypes.data, out.size)
    return out


def dequantize(tensor: gguf.ReaderTensor) -> np.ndarray:
    """A tensor of gguf-py as float32."""
    if tensor.tensor_type == gguf.GGMLQuantizationType.F32:
        return np.array(tensor.data)
    return ggml_dequantize(tensor.data.view(np.uint8), tensor.tensor_type)
