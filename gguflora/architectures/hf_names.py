"""Names of the Hugging Face weights that a base model can have: the inverse of `slices_of`.

The names are those of transformers 5, which PEFT uses. Where gguf maps several of them to one tensor (``up_proj`` and
``gate_up_proj``, for example), the architecture decides which one applies.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from gguflora.architectures.base_model import BaseModel
from gguflora.architectures.modules import BLOCKS, LLAMA, is_alternative, t5_modules
from gguflora.errors import ArchitectureError

_OF_EXPERTS: Final = (".experts.gate_up_proj", ".experts.down_proj")
_MLP_EXPERTS: Final = tuple(f"mlp{name}" for name in _OF_EXPERTS)
_FEED_FORWARD_EXPERTS: Final = ("feed_forward.router", *(f"feed_forward{name}" for name in _OF_EXPERTS))

_NOT_LINEAR: Final[dict[str, tuple[str, ...]]] = {
    **dict.fromkeys(
        (
            *("llama", "mistral3", "minicpm", "olmo", "olmoe", "qwen2moe", "qwen3moe", "qwen3next", "qwen35"),
            *("qwen35moe", "deepseek2"),
        ),
        ("mlp.gate", *_MLP_EXPERTS),
    ),
    **dict.fromkeys(
        ("granite", "granitemoe"),
        ("block_sparse_moe.router", *(f"block_sparse_moe{name}" for name in _OF_EXPERTS)),
    ),
    **dict.fromkeys(("llama4", "jamba"), _FEED_FORWARD_EXPERTS),
    "gpt-oss": ("mlp.router", *_MLP_EXPERTS),
}
"""Modules and parameters of a layer that transformers 5 does not implement as ``Linear``."""

_REMOTE_CODE: Final[dict[str, tuple[str, ...]]] = {
    "baichuan": ("self_attn.W_pack", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "internlm2": ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
}
"""Modules below ``model.layers`` of models whose code is not part of transformers."""

_EMBEDDINGS: Final = {
    "gpt2": ("transformer.wte", "transformer.wpe"),
    "gptneox": ("gpt_neox.embed_in",),
    "bloom": ("transformer.word_embeddings",),
    "falcon": ("transformer.word_embeddings",),
    "internlm2": ("model.tok_embeddings",),
    "mamba": ("backbone.embeddings",),
    "bert": tuple(f"embeddings.{name}_embeddings" for name in ("word", "position", "token_type")),
    "t5": ("shared",),
}
_OUTPUTS: Final = {"internlm2": "output"}


def candidates(base: BaseModel) -> Iterator[str]:
    """Yield the names of all weights that a model of the base's architecture and size may have.

    Raises:
        ArchitectureError: if gguflora does not know the modules of the architecture.
    """
    for module in (
        *_EMBEDDINGS.get(base.architecture, ("model.embed_tokens",)),
        _OUTPUTS.get(base.architecture, "lm_head"),
    ):
        yield f"{module}.weight"
    stacks = [base.shapes.get(f"blk.{layer}.ffn_down_exps.weight", (0,))[0] for layer in range(base.n_layers)]
    for layer in range(base.n_layers):
        for module in _modules(base, layer):
            if module.endswith(_OF_EXPERTS):
                yield from (f"{module}.{expert}" for expert in range(stacks[layer]))
            elif not is_alternative(base, layer, module):
                yield f"{module}.weight"


def _modules(base: BaseModel, layer: int) -> list[str]:
    if base.architecture == "t5":
        return t5_modules([layer])
    if base.architecture in _REMOTE_CODE:
        root, modules = LLAMA[0], _REMOTE_CODE[base.architecture]
    elif base.architecture in BLOCKS:
        root, modules = BLOCKS[base.architecture]
    else:
        raise ArchitectureError(
            f"{base.path}: the Hugging Face names of the modules of architecture {base.architecture!r} are not known"
        )
    return [f"{root}.{layer}.{module}" for module in (*modules, *_NOT_LINEAR.get(base.architecture, ()))]
