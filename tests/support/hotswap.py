"""A small Llama to swap adapters on, and what torch and PEFT say it must answer."""

import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import peft
import torch
import transformers
from peft.tuners.lora import LoraLayer

from support import builders
from support.oracles import PROMPT
from support.oracles.llama_cpp import convert_lora, quiet_llama_cpp

A, B, C = (builders.Adapter(seed=seed) for seed in (1, 2, 3))

OTHER = (*PROMPT[:20], 70, 71, 72, 73)  # a long prefix in common with PROMPT

TOLERANCE = 1e-2
VISIBLE = 0.5  # every change of the adapter set in these tests moves some logit by more than this


def gguf_lora(spec: builders.Adapter, arch: str = "llama") -> Path:
    """The adapter as a GGUF LoRA, written by llama.cpp's own converter."""
    return _gguf_lora(builders.adapter(arch, spec), arch)


@cache
def _gguf_lora(adapter_dir: Path, arch: str) -> Path:
    out = adapter_dir.with_suffix(".lora.gguf")
    return convert_lora(adapter_dir, builders.hf_model(arch), out)


def open_llama(arch: str = "llama", **options: Any) -> llama_cpp.Llama:
    """A Llama on the CPU with float32 weights and KV cache."""
    settings: dict[str, Any] = {
        "n_ctx": 128, "n_batch": 128, "n_threads": 2, "n_threads_batch": 2, "n_gpu_layers": 0, "logits_all": True,
        "verbose": False, "type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32,
    }  # fmt: skip
    with quiet_llama_cpp():
        return llama_cpp.Llama(str(builders.gguf_model(arch)), **settings | options)


def logits(llm: llama_cpp.Llama, prompt: Sequence[int] = PROMPT) -> np.ndarray:
    """Logits of the prompt, evaluated from its first token."""
    llm.reset()
    llm.eval(list(prompt))
    return llm.scores[: len(prompt)].copy()


def last_logits(llm: llama_cpp.Llama, prompt: Sequence[int] = PROMPT) -> np.ndarray:
    """Logits of the last token of the prompt by way of generate, which reuses whatever it can."""
    next(llm.generate(list(prompt), temp=0.0))
    return llm.scores[len(prompt) - 1].copy()


def expected(
    *adapters: tuple[builders.Adapter, float], arch: str = "llama", prompt: Sequence[int] = PROMPT
) -> np.ndarray:
    """Logits of PEFT's model in torch with these adapters at these scales."""
    return _expected(adapters, arch, tuple(prompt))


@cache
def _expected(adapters: tuple[tuple[builders.Adapter, float], ...], arch: str, prompt: tuple[int, ...]) -> np.ndarray:
    model, scales = _peft_model(arch), {str(spec.seed): scale for spec, scale in adapters}
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name in module.scaling:
                module.set_scale(name, scales.get(name, 0))
    with torch.inference_mode():
        return model(torch.tensor([list(prompt)])).logits[0].numpy()


@cache
def _peft_model(arch: str) -> peft.PeftModel:
    """The base with A, B and C, all switched on."""
    base = transformers.AutoModelForCausalLM.from_pretrained(
        builders.hf_model(arch), dtype=torch.float32, attn_implementation="eager"
    )
    first, *others = (A, B, C)
    model = peft.PeftModel.from_pretrained(base, builders.adapter(arch, first), adapter_name=str(first.seed))
    for spec in others:
        model.load_adapter(builders.adapter(arch, spec), adapter_name=str(spec.seed))
    model.base_model.set_adapter([str(spec.seed) for spec in (A, B, C)])
    return model.eval()


def assert_answers(
    llm: llama_cpp.Llama, *adapters: tuple[builders.Adapter, float], arch: str = "llama", prompt: Sequence[int] = PROMPT
) -> None:
    """The Llama's logits are those of PEFT's model with exactly these adapters."""
    wanted = expected(*adapters, arch=arch, prompt=prompt)
    if adapters:
        assert np.abs(wanted - expected(arch=arch, prompt=prompt)).max() > VISIBLE
    np.testing.assert_allclose(logits(llm, prompt), wanted, atol=TOLERANCE, rtol=0)


def write_lora(path: Path, tensors: dict[str, np.ndarray], **metadata: Any) -> Path:
    """A GGUF LoRA for llama of these tensors; None for a metadata key (dots as `__`) leaves it out."""
    entries = {"general__type": "adapter", "adapter__type": "lora", "adapter__lora__alpha": np.float32(8)} | metadata
    writer = gguf.GGUFWriter(path, entries.pop("general__architecture", "llama"))
    kinds = {str: "string", np.float32: "float32", int: "uint32", float: "float64", list: "array"}
    for key, value in entries.items():
        if value is not None:
            getattr(writer, f"add_{kinds[type(value)]}")(key.replace("__", "."), value)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tied_lora(folder: Path) -> Path:
    """A LoRA of gemma3's token embedding, which is its output weight too."""
    shapes = {"token_embd.weight.lora_a": (builders.VOCABULARY, 4), "token_embd.weight.lora_b": (96, 4)}
    tensors = {name: np.full(shape, 0.1, np.float32) for name, shape in shapes.items()}
    return write_lora(folder / "tied.gguf", tensors, general__architecture="gemma3")


def run_python(code: str, *arguments: object) -> str:
    """Run code in a process of its own, which must end well and complain of nothing; its standard output."""
    done = _run(code, *arguments)
    said = [line for line in done.stderr.splitlines() if "possible training context overflow" not in line]
    assert done.returncode == 0 and not said, f"ended with {done.returncode}: {done.stderr[-3000:]}"
    return done.stdout


def kill_python(code: str, *arguments: object) -> None:
    """Run code in a process of its own, which a failed assertion of llama.cpp or a segmentation fault must end."""
    done = _run("import resource\nresource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n" + code, *arguments)
    assert done.returncode in (-signal.SIGABRT, -signal.SIGSEGV), f"ended with {done.returncode}: {done.stderr[-3000:]}"


def _run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
