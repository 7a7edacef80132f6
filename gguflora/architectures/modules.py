"""The linear modules of Hugging Face models, in the order of their definition.

Needed only where an adapter's file does not name the modules that it adapts (UNILORA).
"""

from __future__ import annotations

from typing import Final

from gguflora.base_model import BaseModel
from gguflora.errors import ArchitectureError

_QKV: Final = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_ATTENTION: Final = (*_QKV, "self_attn.o_proj")
LLAMA: Final = ("model.layers", (*_ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"))
_LLAMA_LIKE: Final = (
    *("llama", "qwen2", "qwen3", "qwen3moe", "gemma", "gemma2", "gemma3", "stablelm", "olmo2", "olmoe", "command-r"),
    *("cohere2", "granite", "smollm3", "exaone4", "minicpm"),
)
_DENSE: Final = ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
_GATE_UP: Final = ("mlp.gate_up_proj", "mlp.down_proj")

BLOCKS: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    **dict.fromkeys(_LLAMA_LIKE, LLAMA),
    "bloom": ("transformer.h", ("self_attention.query_key_value", "self_attention.dense", *_DENSE)),
    "falcon": ("transformer.h", ("self_attention.query_key_value", "self_attention.dense", *_DENSE)),
    "glm4": ("model.layers", (*_ATTENTION, *_GATE_UP)),
    "gpt2": ("transformer.h", ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
    "gptneox": ("gpt_neox.layers", ("attention.query_key_value", "attention.dense", *_DENSE)),
    "nemotron": ("model.layers", (*_ATTENTION, "mlp.up_proj", "mlp.down_proj")),
    "phi2": ("model.layers", (*_QKV, "self_attn.dense", "mlp.fc1", "mlp.fc2")),
    "phi3": ("model.layers", ("self_attn.o_proj", "self_attn.qkv_proj", *_GATE_UP)),
    "starcoder2": ("model.layers", (*_ATTENTION, "mlp.c_fc", "mlp.c_proj")),
}
"""By architecture: the list of blocks, and the linear modules of a block."""


def linear_modules(base: BaseModel) -> list[str]:
    """The base's linear modules but for those it may have in place of these (experts).

    Raises:
        ArchitectureError: if they are not known for the base's architecture.
    """
    if base.architecture not in BLOCKS:
        raise ArchitectureError(
            f"{base.path}: the modules of architecture {base.architecture!r} are not known, and the adapter does not "
            "name those that it adapts; save it with save_indices=True"
        )
    blocks, modules = BLOCKS[base.architecture]
    head = "embed_out" if base.architecture == "gptneox" else "lm_head"
    return [f"{blocks}.{number}.{module}" for number in range(base.n_layers) for module in modules] + [head]
