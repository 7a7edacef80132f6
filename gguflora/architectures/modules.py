"""The linear modules of Hugging Face models, in the order in which transformers defines them.

The order matters only for adapters whose file does not name the adapted modules (UNILORA).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from gguflora.architectures.base_model import BaseModel
from gguflora.errors import ArchitectureError

_QKV: Final = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_ATTENTION: Final = (*_QKV, "self_attn.o_proj")
_LATENT: Final = (
    *("self_attn.q_proj", "self_attn.q_a_proj", "self_attn.q_b_proj", "self_attn.kv_a_proj_with_mqa"),
    *("self_attn.kv_b_proj", "self_attn.o_proj"),
)
_MAMBA: Final = ("in_proj", "x_proj", "dt_proj", "out_proj")
_GATED: Final = ("gate_proj", "up_proj", "down_proj")
_DENSE: Final = ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
_GATE_UP: Final = ("mlp.gate_up_proj", "mlp.down_proj")
_ENCODER: Final = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")


def _in(owner: str, modules: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{owner}.{module}" for module in modules)


_MLP: Final = _in("mlp", _GATED)
_SHARED_EXPERT: Final = (*_in("mlp.shared_expert", _GATED), "mlp.shared_expert_gate")
_QWEN_NEXT: Final = ("in_proj_qkvz", "in_proj_ba", "out_proj")
_QWEN_35: Final = ("out_proj", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
LLAMA: Final = ("model.layers", (*_ATTENTION, *_MLP))
_LLAMA_LIKE: Final = (
    *("llama", "mistral3", "qwen2", "qwen3", "qwen3moe", "gemma", "gemma2", "gemma3", "stablelm", "olmo", "olmo2"),
    *("olmoe", "command-r", "cohere2", "smollm3", "exaone4", "minicpm", "gpt-oss"),
)

BLOCKS: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    **dict.fromkeys(_LLAMA_LIKE, LLAMA),
    **dict.fromkeys(
        ("granite", "granitemoe"), ("model.layers", (*LLAMA[1], "shared_mlp.input_linear", "shared_mlp.output_linear"))
    ),
    "bert": ("encoder.layer", (*_ENCODER, "intermediate.dense", "output.dense")),
    "bloom": ("transformer.h", ("self_attention.query_key_value", "self_attention.dense", *_DENSE)),
    "deepseek2": ("model.layers", (*_LATENT, *_MLP, *_in("mlp.shared_experts", _GATED))),
    "falcon": ("transformer.h", ("self_attention.query_key_value", "self_attention.dense", *_DENSE)),
    "glm4": ("model.layers", (*_ATTENTION, *_GATE_UP)),
    "gpt2": ("transformer.h", ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
    "gptneox": ("gpt_neox.layers", ("attention.query_key_value", "attention.dense", *_DENSE)),
    "jamba": ("model.layers", (*_in("mamba", _MAMBA), *_ATTENTION, *_in("feed_forward", _GATED))),
    "llama4": (
        "model.layers",
        (*_ATTENTION, *_in("feed_forward", ("router", *_GATED)), *_in("feed_forward.shared_expert", _GATED)),
    ),
    "mamba": ("backbone.layers", _in("mixer", _MAMBA)),
    "nemotron": ("model.layers", (*_ATTENTION, "mlp.up_proj", "mlp.down_proj")),
    "phi2": ("model.layers", (*_QKV, "self_attn.dense", "mlp.fc1", "mlp.fc2")),
    "phi3": ("model.layers", ("self_attn.o_proj", "self_attn.qkv_proj", *_GATE_UP)),
    "qwen2moe": ("model.layers", (*_ATTENTION, *_MLP, *_SHARED_EXPERT)),
    "qwen3next": ("model.layers", (*_in("linear_attn", _QWEN_NEXT), *_ATTENTION, *_MLP, *_SHARED_EXPERT)),
    "qwen35": ("model.layers", (*_in("linear_attn", _QWEN_35), *_ATTENTION, *_MLP)),
    "qwen35moe": ("model.layers", (*_in("linear_attn", _QWEN_35), *_ATTENTION, *_SHARED_EXPERT)),
    "starcoder2": ("model.layers", (*_ATTENTION, "mlp.c_fc", "mlp.c_proj")),
}
"""By architecture: path of the list of blocks, and the linear modules that a block may have (transformers 5)."""

_T5_STACKS: Final = {
    "encoder": (("SelfAttention", ("q", "k", "v", "o")), ("DenseReluDense", ("wi", "wi_0", "wi_1", "wo"))),
    "decoder": (
        *(("SelfAttention", ("q", "k", "v", "o")), ("EncDecAttention", ("q", "k", "v", "o"))),
        ("DenseReluDense", ("wi", "wi_0", "wi_1", "wo")),
    ),
}


def linear_modules(base: BaseModel) -> list[str]:
    """Return the names of the base's linear modules, without experts.

    Raises:
        ArchitectureError: if gguflora does not know the modules of the architecture.
    """
    if base.architecture == "t5":
        return [*t5_modules(range(base.n_layers)), "lm_head"]
    if base.architecture not in BLOCKS:
        raise ArchitectureError(
            f"{base.path}: the modules of architecture {base.architecture!r} are not known, and the adapter does not "
            "name those that it adapts; save it with save_indices=True"
        )
    blocks, modules = BLOCKS[base.architecture]
    heads = {"gptneox": "embed_out", "bert": "pooler.dense"}
    names = [
        f"{blocks}.{layer}.{module}"
        for layer in range(base.n_layers)
        for module in modules
        if not is_alternative(base, layer, f"{blocks}.{layer}.{module}")
    ]
    return [*names, heads.get(base.architecture, "lm_head")]


def t5_modules(layers: Iterable[int]) -> list[str]:
    """Return the names of the linear modules that T5 may have in these layers of its encoder and decoder."""
    numbers = list(layers)
    return [
        f"{stack}.block.{number}.layer.{part}.{owner}.{module}"
        for stack, parts in _T5_STACKS.items()
        for number in numbers
        for part, (owner, modules) in enumerate(parts)
        for module in modules
    ]


def is_alternative(base: BaseModel, layer: int, module: str) -> bool:
    """Whether this layer has other modules instead, to whose tensors `slices_of` would map this one."""
    if ".self_attn." in module:
        return f"blk.{layer}.ssm_a" in base.shapes  # linear attention, with q, k and v in one weight
    if ".shared_mlp." in module:
        return f"blk.{layer}.ffn_gate_inp.weight" not in base.shapes
    if ".DenseReluDense.wi" in module:
        half = "enc" if module.startswith("encoder.") else "dec"
        is_gated = f"{half}.blk.{layer}.ffn_gate.weight" in base.shapes
        return is_gated == module.endswith(".wi")
    return False
