"""Llamas of realistic size out of random weights, for benchmarks that need the bytes and not the answers.

The weights are heavy-tailed and their rows of different size, as trained ones are. A tensor's rows are drawn from a few
hundred of its type and width, so that a file of any size is written at the speed of the disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import save_file

import gguflora
from gguflora import quants
from gguflora.files.strict_json import to_json

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gguflora" / "bench"
"""Where models and adapters of benchmarks are kept."""

POOL_WEIGHTS = 1 << 21
SPREAD = 0.02
"""Size of a weight."""
CHANGE = 0.02
"""Size of an adapter's change, relative to the weight: that of an adapter well trained."""
RANK, FACTOR = 16, 2.0


@dataclass(frozen=True)
class Llama:
    """Sizes of a llama."""

    name: str
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    rope_base: float

    def linears(self) -> dict[str, tuple[str, int, int]]:
        """Each linear layer: its name in GGUF, n_out, n_in."""
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": ("attn_q", self.hidden, self.hidden),
            "self_attn.k_proj": ("attn_k", kv, self.hidden),
            "self_attn.v_proj": ("attn_v", kv, self.hidden),
            "self_attn.o_proj": ("attn_output", self.hidden, self.hidden),
            "mlp.gate_proj": ("ffn_gate", self.ffn, self.hidden),
            "mlp.up_proj": ("ffn_up", self.ffn, self.hidden),
            "mlp.down_proj": ("ffn_down", self.hidden, self.ffn),
        }


LLAMAS = {
    "tiny": Llama("tiny", 256, 512, 8, 8, 2, 2000, 10000.0),  # for tests
    "0.1b": Llama("0.1b", 768, 2048, 4, 12, 4, 32000, 10000.0),
    "1.1b": Llama("1.1b", 2048, 5632, 22, 32, 4, 32000, 10000.0),  # TinyLlama
    "8b": Llama("8b", 4096, 14336, 32, 32, 8, 128256, 500000.0),  # Llama 3 8B
}


def base_file(folder: Path, llama: Llama, recipe: str) -> Path:
    """The GGUF file of a llama in "Q4_K_M" or "F16", written unless it is there."""
    path = folder / f"llama-{llama.name}-{recipe}.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        _write_base(unfinished, llama, recipe)
        unfinished.rename(path)
    return path


def adapter_files(folder: Path, llama: Llama) -> tuple[Path, Path]:
    """A LoRA on all linear layers: the PEFT directory, and the same as GGUF LoRA; made unless they are there."""
    peft = folder / f"lora-{llama.name}-r{RANK}"
    lora = peft.with_suffix(f"{peft.suffix}.gguf")
    if not lora.exists():
        peft.mkdir(parents=True, exist_ok=True)
        _write_adapter(peft, llama)
        gguflora.convert(peft, base_file(folder, llama, "Q4_K_M"), lora)
    return peft, lora


def _tensors(llama: Llama, recipe: str) -> Iterator[tuple[str, Kind, tuple[int, ...]]]:
    """Name, type and shape of every tensor, in the order of llama.cpp's converter."""
    matrix, better = (Kind.Q4_K, Kind.Q6_K) if recipe == "Q4_K_M" else (Kind[recipe], Kind[recipe])
    yield "token_embd.weight", matrix, (llama.vocabulary, llama.hidden)
    for layer in range(llama.layers):
        yield f"blk.{layer}.attn_norm.weight", Kind.F32, (llama.hidden,)
        yield f"blk.{layer}.ffn_norm.weight", Kind.F32, (llama.hidden,)
        for name, n_out, n_in in llama.linears().values():
            more = name in {"attn_v", "ffn_down"} and _gets_more_bits(layer, llama.layers)
            yield f"blk.{layer}.{name}.weight", better if more else matrix, (n_out, n_in)
    yield "output_norm.weight", Kind.F32, (llama.hidden,)
    yield "output.weight", better, (llama.vocabulary, llama.hidden)


def _gets_more_bits(layer: int, layers: int) -> bool:
    """Whether Q4_K_M stores attn_v and ffn_down of this layer as Q6_K (llama.cpp's llama-quant.cpp)."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _write_base(path: Path, llama: Llama, recipe: str) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    _add_metadata(writer, llama, recipe)
    tensors = list(_tensors(llama, recipe))
    for name, kind, shape in tensors:
        n_bytes = int(np.prod(shape[:-1], dtype=np.int64)) * quants.resolve_type(kind).row_bytes(shape[-1])
        writer.add_tensor_info(name, shape, np.dtype(np.float32), n_bytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    file, rng = writer.fout[0], np.random.default_rng(1)
    for _, kind, shape in tensors:
        writer.write_padding(file, file.tell())
        if len(shape) == 1:
            file.write(rng.uniform(0.5, 1.5, shape).astype(np.float32).tobytes())
            continue
        pool = _pool(kind, shape[1])
        for first in range(0, shape[0], len(pool)):
            rows = rng.integers(len(pool), size=min(len(pool), shape[0] - first))
            file.write(pool[rows].tobytes())
    writer.write_padding(file, file.tell())
    os.fsync(file.fileno())
    writer.close()


@cache
def _pool(kind: Kind, n_in: int) -> np.ndarray:
    """Quantized rows to draw from."""
    rng = np.random.default_rng([kind, n_in])
    n_rows = POOL_WEIGHTS // n_in
    weights = rng.standard_t(5, (n_rows, n_in)).astype(np.float32)
    weights *= SPREAD * rng.uniform(0.5, 1.5, (n_rows, 1)).astype(np.float32)
    return quants.quantize(weights, kind).view(np.uint8)


def _add_metadata(writer: gguf.GGUFWriter, llama: Llama, recipe: str) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(f"random llama {llama.name}")
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{recipe}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(2048)
    writer.add_embedding_length(llama.hidden)
    writer.add_block_count(llama.layers)
    writer.add_feed_forward_length(llama.ffn)
    writer.add_head_count(llama.heads)
    writer.add_head_count_kv(llama.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(llama.hidden // llama.heads)
    writer.add_rope_freq_base(llama.rope_base)
    writer.add_vocab_size(llama.vocabulary)
    _add_tokenizer(writer, llama.vocabulary)


def _add_tokenizer(writer: gguf.GGUFWriter, size: int) -> None:
    """A tokenizer that falls back to bytes, its other tokens being fillers."""
    special, bytes_ = ["<unk>", "<s>", "</s>"], [f"<0x{byte:02X}>" for byte in range(256)]
    fillers = [f"filler{number}" for number in range(size - len(special) - len(bytes_))]
    kinds = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*special, *bytes_, *fillers])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([*kinds, *[gguf.TokenType.NORMAL] * len(fillers)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _write_adapter(folder: Path, llama: Llama) -> None:
    rng = np.random.default_rng(2)
    tensors = {}
    for layer in range(llama.layers):
        for name, (_, n_out, n_in) in llama.linears().items():
            spread_a = (3 * n_in) ** -0.5  # as PEFT draws A
            spread_b = CHANGE * SPREAD / (FACTOR * RANK**0.5 * spread_a)
            where = f"base_model.model.model.layers.{layer}.{name}"
            for part, shape, spread in (("A", (RANK, n_in), spread_a), ("B", (n_out, RANK), spread_b)):
                values = rng.standard_normal(shape, dtype=np.float32) * np.float32(spread)
                tensors[f"{where}.lora_{part}.weight"] = values.astype(np.float16)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": f"random-llama-{llama.name}",
        "r": RANK,
        "lora_alpha": FACTOR * RANK,
        "target_modules": sorted(name.split(".")[-1] for name in llama.linears()),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(to_json(config, indent=2) + "\n", encoding="utf-8")
