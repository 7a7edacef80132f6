"""What llama.cpp's converter does to the tensors of each architecture, apart from renaming them.

Source: llama.cpp's ``conversion/*.py``; tests/architectures/ runs it on a model of each architecture.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from gguflora.architectures.orders import (
    Order,
    halves_k,
    halves_q,
    qkv_by_kind,
    qkv_of_groups,
    qkv_of_linear_attention,
    qkv_with_tiled_values,
    rotary_k,
    rotary_q,
    tiled_values,
    unchanged,
)
from gguflora.architectures.splits import (
    ROTARY_QKV,
    Split,
    concatenated,
    convolution_of_kinds,
    experts_of_blocks,
    grouped_norm,
    grouped_qkv,
    grouped_qkvz,
    latent_keys_and_values,
    shared_down,
    shared_gate_up,
)


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules of one architecture.

    Attributes:
        rows: orders of rows that differ from Hugging Face's, by GGUF name of the tensor in a layer.
        columns: orders of columns that differ, by GGUF name of the tensor in a layer.
        splits: weights that are split into several tensors, by Hugging Face name of the module in a layer.
        plus_one: pattern of tensors that are stored as 1 + w.
        interleaved: whether the rows of gate and up alternate in a stack of experts.
        experts_transposed: whether Hugging Face stores a stack of experts as (n_experts, n_in, n_out).
        cuts_vocabulary: whether rows of the token embedding that do not belong to a token are dropped.
        has_output: whether a model can have a separate output weight.
        conv1d: pattern of weights that Hugging Face stores as (n_in, n_out).
    """

    rows: Mapping[str, Order] = field(default_factory=dict)
    columns: Mapping[str, Order] = field(default_factory=dict)
    splits: Mapping[str, Split] = field(default_factory=dict)
    plus_one: re.Pattern[str] | None = None
    interleaved: bool = False
    experts_transposed: bool = False
    cuts_vocabulary: bool = False
    has_output: bool = True
    conv1d: re.Pattern[str] | None = None


PLAIN: Final = Rules()
_ROTARY: Final = {"attn_q": rotary_q, "attn_k": rotary_k}
_NORMS: Final = re.compile(r"norm\.weight$")
_NORMS_EXCEPT_SSM: Final = re.compile(r"(?<!ssm_)norm\.weight$")
_MLA: Final = {"self_attn.kv_b_proj": latent_keys_and_values}
_HRM_QKV: Final = concatenated(dict.fromkeys(("attn_gate", "attn_q", "attn_k", "attn_v"), unchanged))
_HRM_GATE_UP: Final = concatenated(dict.fromkeys(("ffn_gate", "ffn_up"), unchanged))
_MAMBA_2: Final = {"mixer.norm": grouped_norm, "mamba.norm": grouped_norm}
_SHARED_MLP: Final = {"shared_mlp.input_linear": shared_gate_up, "shared_mlp.output_linear": shared_down}
_TILED_VALUES: Final = Rules(
    rows={
        "attn_qkv": qkv_of_linear_attention,
        "ssm_conv1d": qkv_with_tiled_values,
        "attn_gate": tiled_values,
        "ssm_alpha": tiled_values,
        "ssm_beta": tiled_values,
        "ssm_dt": tiled_values,
    },
    columns={"ssm_out": tiled_values},
    plus_one=_NORMS_EXCEPT_SSM,
)

KNOWN: Final[Mapping[str, Rules]] = {
    "llama": Rules(rows=_ROTARY),  # mistral and mixtral too
    "mistral3": Rules(rows=_ROTARY),
    "llama4": Rules(experts_transposed=True),
    "smollm3": Rules(rows=_ROTARY),
    "arcee": Rules(rows=_ROTARY),
    "llama-embed": Rules(rows=_ROTARY),
    "granite": Rules(rows=_ROTARY, splits=_SHARED_MLP),
    "granitehybrid": Rules(rows=_ROTARY, splits={**_SHARED_MLP, **_MAMBA_2}),  # Bamba too
    "granite_swa": Rules(rows=_ROTARY),
    "granitemoe": Rules(rows=_ROTARY, splits={"shared_mlp.input_linear": shared_gate_up}),
    "minicpm": Rules(rows=_ROTARY),
    "chameleon": Rules(rows=_ROTARY),
    "baichuan": Rules(splits={"self_attn.W_pack": concatenated(ROTARY_QKV)}),
    "internlm2": Rules(splits={"attention.wqkv": grouped_qkv}),
    "qwen2": PLAIN,
    "qwen2moe": PLAIN,
    "qwen3": PLAIN,
    "qwen3moe": PLAIN,
    "qwen3vlmoe": PLAIN,  # transformers 5 holds the experts as GGUF does; files on the Hub have them transposed
    "qwen3next": Rules(splits={"linear_attn.in_proj_qkvz": grouped_qkvz}, plus_one=_NORMS_EXCEPT_SSM),
    "qwen35": _TILED_VALUES,
    "qwen35moe": _TILED_VALUES,
    "gemma": Rules(plus_one=_NORMS, has_output=False),
    "gemma2": Rules(plus_one=_NORMS, has_output=False),
    "gemma3": Rules(plus_one=_NORMS, cuts_vocabulary=True),
    "gemma3n": PLAIN,
    "gemma-embedding": Rules(plus_one=_NORMS, cuts_vocabulary=True),
    "dbrx": Rules(
        splits={
            "ffn.experts.mlp.w1": experts_of_blocks("ffn_gate_exps", transposed=False),
            "ffn.experts.mlp.v1": experts_of_blocks("ffn_up_exps", transposed=False),
            "ffn.experts.mlp.w2": experts_of_blocks("ffn_down_exps", transposed=True),
        }
    ),
    "hrm_text": Rules(splits={"attn.gqkv_proj": _HRM_QKV, "mlp.gate_up_proj": _HRM_GATE_UP}),
    "step35": Rules(plus_one=_NORMS),
    "phi2": PLAIN,
    "phi3": PLAIN,
    "gpt2": Rules(conv1d=re.compile(r"\.c_\w+\.weight$")),
    "gptneox": Rules(rows={"attn_qkv": qkv_by_kind}),
    "bloom": Rules(rows={"attn_qkv": qkv_by_kind}),
    "falcon": Rules(rows={"attn_qkv": qkv_of_groups}),
    "starcoder2": PLAIN,
    "stablelm": PLAIN,
    "olmo": Rules(rows=_ROTARY),
    "olmo2": PLAIN,
    "olmoe": PLAIN,
    "command-r": Rules(has_output=False),
    "cohere2": Rules(has_output=False),
    "nemotron": Rules(plus_one=_NORMS),
    "glm4": Rules(rows={"attn_q": halves_q, "attn_k": halves_k}),  # GLM-4.1V and GLM-4V too
    "exaone4": PLAIN,
    "deepseek2": Rules(splits=_MLA),
    "glm-dsa": Rules(splits=_MLA),
    "deepseek2-ocr": PLAIN,  # multi-head attention, not latent
    "deepseek32": Rules(splits=_MLA),
    "hy_v4": Rules(splits=_MLA),
    "kimi-linear": Rules(splits={**_MLA, "self_attn.conv1d": convolution_of_kinds}),
    "minimax-m3": Rules(plus_one=_NORMS),
    "mistral4": Rules(splits=_MLA),
    "gpt-oss": Rules(interleaved=True, experts_transposed=True),
    "mamba": PLAIN,
    "mamba2": Rules(splits=_MAMBA_2),
    "nemotron_h": Rules(rows=_ROTARY, splits=_MAMBA_2),
    "nemotron_h_moe": Rules(rows=_ROTARY, splits=_MAMBA_2),
    "jamba": PLAIN,
    "bert": PLAIN,
    "t5": PLAIN,
}
"""The rules of the architectures that gguflora knows, by GGUF's name."""
