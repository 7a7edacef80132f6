"""llama.cpp: its converters, which tools/fetch_oracles.py fetches, and its logits through llama-cpp-python."""

import atexit
import contextlib
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from support.oracles import PROMPT

# -- converters --


def llama_cpp_dir() -> Path:
    """vendor/llama.cpp of the llama-cpp-python sdist, as tools/fetch_oracles.py leaves it.

    Raises:
        FileNotFoundError: when it was not fetched; a skipped oracle would be a test that cannot fail.
    """
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    default = cache_home / "gguflora" / f"llama-cpp-python-{version('llama-cpp-python')}"
    path = Path(os.environ.get("GGUFLORA_LLAMA_CPP_SDIST") or default) / "vendor/llama.cpp"
    if not (path / "convert_hf_to_gguf.py").is_file():
        raise FileNotFoundError(f"no llama.cpp converters in {path}: run python -m tools.fetch_oracles first")
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


# -- inference --

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
            scores: np.ndarray = llm.scores[: len(PROMPT)].copy()
            return scores
        finally:
            llm.close()


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
