"""The Hugging Face weights of a base, from its tensors: the names that `pieces_of` is asked for, the other way round.

Names are those of transformers 5, which PEFT sees; where gguf maps several of them to one tensor (``up_proj`` and
``gate_up_proj``, for example), the architecture decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from gguflora.architectures.modules import BLOCKS, LLAMA
from gguflora.base_model import BaseModel
from gguflora.errors import ArchitectureError

_EXPERTS: Final = ("mlp.gate", "mlp.experts.gate_up_proj", "mlp.experts.down_proj")
_SHARED: Final = tuple(f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down"))
_LINEAR: Final = tuple(f"linear_attn.{name}" for name in ("in_proj_a", "in_proj_b", "in_proj_qkv", "in_proj_z"))
_NEXT: Final = tuple(f"linear_attn.{name}" for name in ("in_proj_qkvz", "in_proj_ba", "out_proj"))
_FEED_FORWARD: Final = tuple(f"feed_forward.{name}_proj" for name in ("gate", "up", "down"))
_LATENT: Final = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
_GRANITE: Final = (
    *("shared_mlp.input_linear", "shared_mlp.output_linear", "block_sparse_moe.router.layer"),
    *("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"),
)
_OF_EXPERTS: Final = (".experts.gate_up_proj", ".experts.down_proj")

_ROOT: Final = LLAMA[0]
_LLAMA: Final = LLAMA[1]
_BERT: Final = (
    *(f"attention.self.{name}" for name in ("query", "key", "value")),
    *("attention.output.dense", "intermediate.dense", "output.dense"),
)
_T5: Final = tuple(f"layer.0.SelfAttention.{name}" for name in "qkvo")
_T5_DENSE: Final = ("wi", "wi_0", "wi_1", "wo")
_T5_DECODER: Final = (
    *_T5,
    *(f"layer.1.EncDecAttention.{name}" for name in "qkvo"),
    *(f"layer.2.DenseReluDense.{name}" for name in _T5_DENSE),
)

_MORE: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    **dict.fromkeys(("llama", "mistral3", "minicpm", "qwen3moe", "olmoe", "olmo"), (_ROOT, (*_LLAMA, *_EXPERTS))),
    "llama4": (
        _ROOT,
        (
            *(*_LLAMA[:4], *_FEED_FORWARD, "feed_forward.router"),
            *(f"feed_forward.shared_expert.{name}_proj" for name in ("gate", "up", "down")),
            *(f"feed_forward{name}" for name in _OF_EXPERTS),
        ),
    ),
    "qwen2moe": (_ROOT, (*_LLAMA, *_EXPERTS, *_SHARED, "mlp.shared_expert_gate")),
    "qwen3next": (_ROOT, (*_LLAMA, *_EXPERTS, *_SHARED, "mlp.shared_expert_gate", *_NEXT)),
    **dict.fromkeys(
        ("qwen35", "qwen35moe"),
        (_ROOT, (*_LLAMA, *_EXPERTS, *_SHARED, "mlp.shared_expert_gate", *_LINEAR, "linear_attn.out_proj")),
    ),
    **dict.fromkeys(("granite", "granitemoe"), (_ROOT, (*_LLAMA, *_GRANITE))),
    "deepseek2": (
        _ROOT,
        (
            *(*_LLAMA, *_EXPERTS, *(f"self_attn.{name}" for name in _LATENT)),
            *(f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")),
        ),
    ),
    "gpt-oss": (_ROOT, (*_LLAMA[:4], "mlp.router", *_EXPERTS[1:])),
    "baichuan": (_ROOT, ("self_attn.W_pack", *_LLAMA[3:])),
    "internlm2": (
        _ROOT,
        ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    ),
    "mamba": ("backbone.layers", ("mixer.in_proj", "mixer.x_proj", "mixer.dt_proj", "mixer.out_proj")),
    "jamba": (
        _ROOT,
        (
            *(*_LLAMA[:4], *_FEED_FORWARD, "feed_forward.router"),
            *(f"mamba.{name}_proj" for name in ("in", "x", "dt", "out")),
            *(f"feed_forward{name}" for name in _OF_EXPERTS),
        ),
    ),
    "bert": ("encoder.layer", _BERT),
}
"""Where a layer may have more than `BLOCKS` says, or the architecture is not listed there."""

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
    """Names of the weights that a model of the base's architecture and size may have.

    Raises:
        ArchitectureError: if the names of the architecture's modules are not known.
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
            elif not _stands_for_others(base, layer, module):
                yield f"{module}.weight"


def _stands_for_others(base: BaseModel, layer: int, module: str) -> bool:
    """Whether `pieces_of` would take a module that this layer does not have for others that it has."""
    if ".self_attn." in module:
        return f"blk.{layer}.ssm_a" in base.shapes  # a layer of linear attention, whose qkv is one weight
    if ".shared_mlp." in module:
        return f"blk.{layer}.ffn_gate_inp.weight" not in base.shapes
    if ".DenseReluDense.wi" in module:
        half = "enc" if module.startswith("encoder.") else "dec"
        is_gated = f"{half}.blk.{layer}.ffn_gate.weight" in base.shapes
        return is_gated == module.endswith(".wi")
    return False


def _modules(base: BaseModel, layer: int) -> list[str]:
    if base.architecture == "t5":
        encoder = [*_T5, *(f"layer.1.DenseReluDense.{name}" for name in _T5_DENSE)]
        in_both = {"encoder": encoder, "decoder": list(_T5_DECODER)}
        return [f"{half}.block.{layer}.{module}" for half, modules in in_both.items() for module in modules]
    known = _MORE.get(base.architecture) or BLOCKS.get(base.architecture)
    if known is None:
        raise ArchitectureError(
            f"{base.path}: the Hugging Face names of the modules of architecture {base.architecture!r} are not known"
        )
    root, modules = known
    return [f"{root}.{layer}.{module}" for module in modules]
