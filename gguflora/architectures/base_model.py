"""Read the description of a base model from a GGUF file or a Hugging Face ``config.json``."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from gguflora.errors import ArchitectureError
from gguflora.files.gguf import OUTPUT, TOKEN_EMBEDDING, GgufFile, Shape, layer_of
from gguflora.files.small_files import CONFIG_BYTES, read_small_text

_LOG = logging.getLogger(__name__)
_ENCODERS: Final = {"bert", "eurobert", "jina-bert-v2", "jina-bert-v3", "modern-bert", "neo-bert", "nomic-bert", "clip"}
"""Architectures that have no output weight."""


@dataclass(frozen=True)
class BaseModel:
    """The description of a base model, without its weights.

    Attributes:
        path: path of the GGUF file (for a split model, of its first file) or of the Hugging Face directory.
        architecture: GGUF's name of the architecture.
        shapes: shape of each weight by its GGUF name, (n_out, n_in) for a matrix; for a Hugging Face directory, only
            of the weights whose shape follows from the configuration.
        n_layers: number of blocks.
        n_head: number of attention heads of each layer.
        n_head_kv: number of key and value heads of each layer.
        n_groups: number of key heads of linear attention, or of groups of a state-space layer; 0 if there are none.
        n_mrope: number of rows of each head that M-RoPE rotates; 0 if the model does not use M-RoPE.
        absent: names in ``shapes`` that the file does not hold, but llama.cpp would read; their values count as zeros.
        types: name of the quant type of each tensor of a GGUF file.
        projector: type of the projector of an mmproj file, such as "pixtral"; empty for a language model.
        trust_names: whether tensors may be matched by name where the order of their rows is not known.
    """

    path: Path
    architecture: str
    shapes: Mapping[str, Shape]
    n_layers: int
    n_head: tuple[int, ...]
    n_head_kv: tuple[int, ...]
    n_groups: int = 0
    n_mrope: int = 0
    absent: frozenset[str] = frozenset()
    types: Mapping[str, str] = field(default_factory=dict)
    projector: str = ""
    trust_names: bool = False

    @property
    def is_tied(self) -> bool:
        """Whether the token embedding is also the output weight."""
        return OUTPUT not in self.shapes and self.architecture not in _ENCODERS


def read_base(path: str | os.PathLike[str], *, trust_names: bool = False) -> BaseModel:
    """Read the description of a base model.

    Args:
        path: a GGUF file, or a directory with ``config.json``.
        trust_names: see `BaseModel`.

    Raises:
        GgufError: if the GGUF file is damaged.
        ArchitectureError: if the file is not a language model, or the configuration cannot be used.
    """
    location = Path(path)
    if location.is_dir():
        return replace(_read_config(location / "config.json"), trust_names=trust_names)
    with GgufFile(location) as file:
        return replace(describe(file), trust_names=trust_names)


def describe(file: GgufFile, *, mmproj: bool = False) -> BaseModel:
    """Return the description of the base model in an open GGUF file.

    Args:
        file: the file.
        mmproj: whether it may hold the vision part of a multimodal model.

    Raises:
        ArchitectureError: if the file does not hold a language model (or a vision part, with ``mmproj``).
    """
    kind = file.metadata.get("general.type", "model")
    if is_mmproj(file):
        if mmproj:
            return _describe_vision(file)
        raise ArchitectureError(
            f"{file.path}: holds the vision part of a multimodal model (mmproj), and a language model is expected. "
            "llama.cpp computes the vision part without adapters, so no LoRA can be applied to it at run time; merge "
            f"the adapter into it: gguflora merge {file.path.name} --lora ADAPTER -o OUT"
        )
    if kind != "model":
        raise ArchitectureError(f"{file.path}: general.type is {kind!r}, expected a model as the base")
    _LOG.debug("read %s: %s, %d tensors", file.path, file.metadata.get("general.architecture"), len(file.tensors))
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    n_layers = 1 + max((layer for name in shapes if (layer := layer_of(name)) is not None), default=-1)
    if n_layers > len(shapes):
        raise ArchitectureError(
            f"{file.path}: has a tensor of layer {n_layers - 1}, but only {len(shapes)} tensors in all"
        )
    n_head = _per_layer(file, "attention.head_count", n_layers)
    n_head_kv = _per_layer(file, "attention.head_count_kv", n_layers) or n_head
    n_groups = file.metadata.get(f"{file.architecture}.ssm.group_count")
    return BaseModel(
        file.path,
        file.architecture,
        shapes,
        n_layers,
        n_head,
        n_head_kv,
        n_groups if isinstance(n_groups, int) else 0,
        _rows_of_mrope(file),
        types={name: tensor.type.name for name, tensor in file.tensors.items()},
    )


def is_mmproj(file: GgufFile) -> bool:
    """Whether a file holds the vision part (or audio part) of a multimodal model."""
    return file.metadata.get("general.type") == "mmproj" or file.metadata.get("general.architecture") == "clip"


_CLIP_SIZES: Final = ("block_count", "attention.head_count")


def _describe_vision(file: GgufFile) -> BaseModel:
    names = [f"clip.{part}.{key}" for key in _CLIP_SIZES for part in ("vision", "audio")]
    values = [file.metadata.get(name) for name in names]
    for name, value in zip(names, values, strict=True):
        if value is not None and (not isinstance(value, int) or not 0 <= value < _SIZES["num_attention_heads"]):
            raise ArchitectureError(f"{file.path}: {name} is {value!r:.80}, expected a small whole number")
    keys = ("clip.projector_type", "clip.vision.projector_type", "clip.audio.projector_type")
    projector = next((found for key in keys if (found := file.metadata.get(key))), None)
    n_layers, n_head = (max(value or 0 for value in pair) for pair in (values[:2], values[2:]))
    return BaseModel(
        file.path,
        "clip",
        {name: tensor.shape for name, tensor in file.tensors.items()},
        n_layers,
        (n_head,) * n_layers,
        (n_head,) * n_layers,
        types={name: tensor.type.name for name, tensor in file.tensors.items()},
        projector=projector if isinstance(projector, str) else "",
    )


def _rows_of_mrope(file: GgufFile) -> int:
    sections = file.metadata.get(f"{file.architecture}.rope.dimension_sections")
    n_rotated = file.metadata.get(f"{file.architecture}.rope.dimension_count")
    return n_rotated if isinstance(sections, list) and any(sections) and isinstance(n_rotated, int) else 0


def _per_layer(file: GgufFile, key: str, n_layers: int) -> tuple[int, ...]:
    key = f"{file.architecture}.{key}"
    value = file.metadata.get(key)
    if value is None:
        return ()
    numbers = value if isinstance(value, list) else [value] * n_layers
    if len(numbers) < n_layers or not all(isinstance(number, int) for number in numbers):
        raise ArchitectureError(f"{file.path}: {key} is {value!r:.80}, expected a whole number, or one for each layer")
    return tuple(numbers[:n_layers])


_MODEL_TYPES: Final = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "gemma": "gemma",
    "phi": "phi2",
    "olmo": "olmo",
    "olmo2": "olmo2",
    "granite": "granite",
    "smollm3": "smollm3",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
    "nemotron": "nemotron",
    "cohere": "command-r",
    "cohere2": "cohere2",
    "exaone4": "exaone4",
    "glm4": "glm4",
}
"""GGUF's name of the architecture, by ``model_type`` of a configuration."""

_GEMMA: Final = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True}
_TIED: Final = {"tie_word_embeddings": True}
_DEFAULTS: Final[dict[str, dict[str, Any]]] = {
    "gemma": {"head_dim": 256, **_TIED},
    "cohere": _TIED,
    "cohere2": _TIED,
    "starcoder2": {"num_key_value_heads": 2, **_TIED},
    "smollm3": {"num_key_value_heads": 4, **_TIED},
    "glm4": {"num_key_value_heads": 2, "head_dim": 128},
    "mistral": {"num_key_value_heads": 8},
    "qwen3": {"head_dim": 128},
    "gemma2": {**_GEMMA, "vocab_size": 256000},
    "gemma3": {**_GEMMA, "vocab_size": 262208},
    "gemma3_text": {**_GEMMA, "vocab_size": 262208},
}
"""transformers' defaults, by ``model_type``, for fields that configurations on the Hub leave out."""

_SIZES: Final = {
    "hidden_size": 1 << 24,
    "intermediate_size": 1 << 24,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "num_hidden_layers": 1 << 14,
    "head_dim": 1 << 16,
    "vocab_size": 1 << 28,
}
"""Required fields of a configuration, each with an upper bound far above that of any model."""


def _read_config(path: Path) -> BaseModel:
    try:
        config = json.loads(read_small_text(path, CONFIG_BYTES))
        model_type = config.get("model_type")
        config = {**_DEFAULTS.get(model_type, {}), **config, **config.get("text_config", {})}
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ArchitectureError(f"{path}: cannot be read as a model's configuration: {error}") from error
    if model_type not in _MODEL_TYPES:
        raise ArchitectureError(
            f"{path}: model_type {model_type!r} is not supported; supported: {', '.join(_MODEL_TYPES)}"
        )
    sizes = _read_sizes(path, config)
    architecture, layers = _MODEL_TYPES[model_type], sizes["num_hidden_layers"]
    return BaseModel(
        path.parent,
        architecture,
        _shapes_of(architecture, sizes, tied=bool(config.get("tie_word_embeddings"))),
        layers,
        (sizes["num_attention_heads"],) * layers,
        (sizes["num_key_value_heads"],) * layers,
        n_mrope=_rows_of_mrope_in(config, sizes["head_dim"]),
    )


def _rows_of_mrope_in(config: Mapping[str, Any], head_dim: int) -> int:
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(rope, dict) or "mrope_section" not in rope:
        return 0
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 0.5))
    return int(head_dim * share) if isinstance(share, int | float) else 0


def _read_sizes(path: Path, config: dict[str, Any]) -> dict[str, int]:
    sizes = {name: config.get(name) for name in _SIZES}
    sizes["num_key_value_heads"] = sizes["num_key_value_heads"] or sizes["num_attention_heads"]
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    if sizes["head_dim"] is None and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        sizes["head_dim"] = hidden // heads
    checked = {}
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < _SIZES[name]:
            raise ArchitectureError(
                f"{path}: {name} is {value!r:.80}, expected a whole number from 1 to {_SIZES[name] - 1}"
            )
        checked[name] = value
    return checked


def _shapes_of(architecture: str, sizes: Mapping[str, int], *, tied: bool) -> dict[str, Shape]:
    """Return the shapes of the matrices of a decoder with an architecture of `_MODEL_TYPES`."""
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    q, kv = (sizes[heads] * sizes["head_dim"] for heads in ("num_attention_heads", "num_key_value_heads"))
    block = {"attn_output": (hidden, q), "ffn_down": (hidden, inner)}
    if architecture == "phi3":
        block |= {"attn_qkv": (q + 2 * kv, hidden), "ffn_up": (2 * inner, hidden)}
    else:
        block |= {"attn_q": (q, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden)}
        block |= {"ffn_up": (2 * inner if architecture == "glm4" else inner, hidden)}
        if architecture not in {"glm4", "nemotron", "phi2", "starcoder2"}:
            block |= {"ffn_gate": (inner, hidden)}
    shapes: dict[str, Shape] = {TOKEN_EMBEDDING: (sizes["vocab_size"], hidden)}
    if not tied:
        shapes[OUTPUT] = (sizes["vocab_size"], hidden)
    for layer in range(sizes["num_hidden_layers"]):
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    return shapes


def read_whole_base(path: Path) -> BaseModel:
    """Read the description of a GGUF model, including the tensors of all files of a split model.

    Raises:
        GgufError: if a file is damaged or missing.
    """
    with GgufFile(path) as file:
        return describe(file)


def flat_shape(shape: Shape) -> tuple[int, int]:
    """Return the number of rows and columns of a tensor with its leading dimensions flattened; a vector is a column."""
    return (shape[0], 1) if len(shape) == 1 else (int(np.prod(shape[:-1])), shape[-1])
