"""Tiny seeded models of each architecture, their GGUF files, and real PEFT adapters for them.

Models are random but large enough in effect that a wrong tensor shows in the logits. The GGUF files are written by
llama.cpp itself (`convert_model`, `llama_model_quantize`), so names, row order and values are its own.
Everything is built once per process, below one temporary directory; callers must not write into it.
"""

import ctypes
import json
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import llama_cpp
import peft
import tokenizers
import torch
import transformers

from support.oracles.llama_cpp import convert_model, quiet_llama_cpp
from support.workspace import workspace

VOCABULARY = 288
MERGES = [("t", "h"), ("th", "e"), ("i", "n"), ("e", "r"), ("a", "n"), ("an", "d"), ("Ġ", "t"), ("Ġ", "a"), ("o", "u")]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")

# hidden, heads, kv heads, head_dim, ffn. In `wide` every row is a multiple of 256, the super-block of the K-quants.
SIZES = {"small": (96, 4, 2, 32, 160), "wide": (256, 4, 2, 128, 512)}


@dataclass(frozen=True)
class Arch:
    """One architecture: its transformers config class, its linear layers, and what makes it special."""

    config: type[transformers.PretrainedConfig]
    linear: tuple[str, ...] = ATTENTION + MLP
    tied: bool = False
    free_head_dim: bool = True
    extra: tuple[tuple[str, Any], ...] = ()


ARCHITECTURES = {
    "llama": Arch(transformers.LlamaConfig),
    "mistral": Arch(transformers.MistralConfig, extra=(("sliding_window", None),)),
    "qwen2": Arch(transformers.Qwen2Config, free_head_dim=False),
    "qwen3": Arch(transformers.Qwen3Config),
    "gemma2": Arch(transformers.Gemma2Config, tied=True, extra=(("sliding_window", 64),)),
    "gemma3": Arch(transformers.Gemma3TextConfig, tied=True, extra=(("sliding_window", 64),)),
    "phi3": Arch(
        transformers.Phi3Config,
        linear=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
        free_head_dim=False,
        extra=(("original_max_position_embeddings", 128), ("sliding_window", None)),
    ),
}


@dataclass(frozen=True)
class Adapter:
    """What `make_adapter` builds; hashable, so that each is built once.

    `options` are further fields of LoraConfig. With `exact`, A and B hold small multiples of powers of two, so that B@A
    and its sum in any order are exact in float32.
    """

    targets: tuple[str, ...] = ()
    rank: int = 4
    alpha: float = 8
    options: tuple[tuple[str, Any], ...] = ()
    dtype: torch.dtype = torch.float32
    seed: int = 0
    exact: bool = False
    bin: bool = False
    edited: tuple[tuple[str, Any], ...] = ()


@cache
def hf_model(arch: str, size: str = "small", seed: int = 0) -> Path:
    """A Hugging Face directory: float32 safetensors, config.json, byte-level tokenizer."""
    # The directory's name becomes general.name, and llama.cpp looks for "phi3" in it to patch that vocabulary.
    path = workspace() / arch / f"{size}-{seed}"
    model = _random_model(arch, size, seed)
    model.save_pretrained(path)
    _tokenizer().save_pretrained(path)
    return path


def _random_model(arch: str, size: str, seed: int) -> transformers.PreTrainedModel:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(_config(arch, size)).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def _config(arch: str, size: str) -> transformers.PretrainedConfig:
    kind = ARCHITECTURES[arch]
    hidden, heads, kv_heads, head_dim, ffn = SIZES[size]
    fields = {
        "vocab_size": VOCABULARY, "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": 2,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": 128,
        "tie_word_embeddings": kind.tied, "initializer_range": 0.08,
        "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257,
    }  # fmt: skip
    if kind.free_head_dim:
        fields["head_dim"] = fields["query_pre_attn_scalar"] = head_dim
    return kind.config(**fields, **dict(kind.extra))


@cache
def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, "<s>", "<|endoftext|>", *("".join(pair) for pair in MERGES)]
    # Qwen2's tokenizer class would add its end of text as one token more.
    words += [f"<filler{number}>" for number in range(VOCABULARY - len(words))]
    model = tokenizers.models.BPE({word: number for number, word in enumerate(words)}, MERGES)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|endoftext|>")


@cache
def gguf_model(arch: str, size: str = "small", outtype: str = "F32", seed: int = 0) -> Path:
    """The same model as GGUF: F32, F16, BF16, Q8_0 by llama.cpp's converter; Q4_0, Q4_K_M ... by its quantizer."""
    path = hf_model(arch, size, seed).with_name(f"{size}-{seed}-{outtype}.gguf")
    if outtype in ("F32", "F16", "BF16", "Q8_0"):
        convert_model(hf_model(arch, size, seed), path, outtype.lower())
    else:
        _quantize(gguf_model(arch, size, "F32", seed), path, outtype)
    return path


def _quantize(source: Path, target: Path, outtype: str) -> None:
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{outtype}")
    parameters.nthread = 2
    with quiet_llama_cpp():
        status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters))
    assert status == 0, f"llama_model_quantize gave {status} for {target.name}"


@cache
def adapter(arch: str, spec: Adapter, size: str = "small", seed: int = 0) -> Path:
    """A directory that PEFT's save_pretrained wrote for `spec` on `hf_model(arch, size, seed)`."""
    model_dir = hf_model(arch, size, seed)
    path = Path(tempfile.mkdtemp(prefix="adapter-", dir=model_dir.parent))
    targets = list(spec.targets or ARCHITECTURES[arch].linear)
    options = {name: thaw(value) for name, value in spec.options}
    config = peft.LoraConfig(target_modules=targets, r=spec.rank, lora_alpha=spec.alpha, **options)
    return make_adapter(model_dir, path, config, spec)


def make_adapter(model_dir: Path, out_dir: Path, config: peft.PeftConfig, spec: Adapter) -> Path:
    """Put `config` on the model, fill every LoRA matrix with seeded random numbers, save it as PEFT does."""
    base = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model = peft.get_peft_model(base, config)
    _randomise(model, spec)
    model.save_pretrained(out_dir, safe_serialization=not spec.bin)
    if spec.edited:
        edit_config(out_dir, **{name: thaw(value) for name, value in spec.edited})
    return out_dir


def _randomise(model: peft.PeftModel, spec: Adapter) -> None:
    generator = torch.Generator().manual_seed(spec.seed)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            continue
        if spec.exact:
            values = torch.randint(-3, 4, parameter.shape, generator=generator) / 16
        else:
            values = 0.1 * torch.randn(parameter.shape, generator=generator)
        parameter.data = values.to(spec.dtype)


def edit_config(adapter_dir: Path, **fields: Any) -> None:
    """Overwrite fields of an adapter_config.json."""
    path = adapter_dir / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def thaw(value: Any) -> Any:
    """A tuple of pairs as the dict that it stands for; anything else as it is."""
    if isinstance(value, tuple) and value and all(isinstance(item, tuple) and len(item) == 2 for item in value):
        return dict(value)
    return value


@dataclass(frozen=True)
class Trained:
    """What `trained_adapter` builds: an adapter of any PEFT method, its tensors moved away from where they began.

    `std` is that of the noise added to every trainable number.
    """

    config: type[peft.PeftConfig]
    targets: tuple[str, ...]
    options: dict[str, Any]
    std: float = 0.1
    seed: int = 0

    def __hash__(self) -> int:
        return hash((self.config, self.targets, repr(self.options), self.std, self.seed))


@cache
def trained_adapter(arch: str, spec: Trained, size: str = "small", seed: int = 0) -> Path:
    """A directory that PEFT's save_pretrained wrote for `spec` on `hf_model(arch, size, seed)`."""
    model_dir = hf_model(arch, size, seed)
    path = Path(tempfile.mkdtemp(prefix="trained-", dir=model_dir.parent))
    torch.manual_seed(spec.seed)
    base = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model = peft.get_peft_model(base, spec.config(target_modules=list(spec.targets), **spec.options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(spec.std * torch.randn_like(parameter))
    model.save_pretrained(path)
    return path
