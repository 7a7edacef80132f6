"""Configurations of transformers from a GGUF file's metadata: the models that can be trained, an architecture a row.

What metadata does not say, llama.cpp has in its code (``src/llama-model.cpp``, ``src/models/*.cpp``); it is stated here
with the architecture. tests/training/test_architectures.py holds each against PEFT and llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from gguflora.errors import ArchitectureError, listed
from gguflora.files.gguf import OUTPUT, TOKEN_EMBEDDING
from gguflora.training.packed import PackedBase

Fields = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Header:
    """The metadata of one file, by the keys of its architecture.

    Attributes:
        packed: the file.
    """

    packed: PackedBase

    def get(self, key: str, default: Any = None) -> Any:  # noqa: ANN401  (what metadata can hold)
        """The value of ``<architecture>.<key>``."""
        value = self.packed.metadata.get(f"{self.packed.base.architecture}.{key}")
        return default if value is None else value

    def number(self, key: str) -> Any:  # noqa: ANN401
        """The same, which must be there.

        Raises:
            ArchitectureError: if it is not.
        """
        value = self.get(key)
        if isinstance(value, list) and value and all(each == value[0] for each in value):
            value = value[0]
        if not isinstance(value, int | float):
            raise ArchitectureError(
                f"{self.packed.path}: {self.packed.base.architecture}.{key} is {value!r:.80}, expected one number for "
                "all layers; without it the model cannot be built for training"
            )
        return value

    def has(self, tensor: str) -> bool:
        """Whether the first layer has a tensor (``attn_q.bias``)."""
        return self.packed.has(f"blk.0.{tensor}")

    @property
    def head_dim(self) -> int:
        """Numbers of a head's query."""
        return int(self.get("attention.key_length") or self.number("embedding_length") // self.heads)

    @property
    def heads(self) -> int:
        """Attention heads."""
        return int(self.number("attention.head_count"))

    @property
    def rotated(self) -> float:
        """Share of a head's numbers that the rotary embedding turns."""
        return float(self.get("rope.dimension_count", self.head_dim) / self.head_dim)

    @property
    def context(self) -> int:
        """Positions the model was trained with, as it is run at that length."""
        trained = int(self.get("context_length", 2048))
        if self.packed.has("rope_factors_short.weight"):
            return min(trained, int(self.get("rope.scaling.original_context_length", trained)))
        return trained


def _rope(header: Header, default_theta: float = 10000.0, key: str = "rope.freq_base") -> Fields:
    """``rope_parameters``: base and linear scaling; factors of each frequency are applied by `model`.

    Raises:
        ArchitectureError: for a scaling that training does not know.
    """
    fields: Fields = {"rope_type": "default", "rope_theta": float(header.get(key, default_theta))}
    kind, factor = header.get("rope.scaling.type", "none"), float(header.get("rope.scaling.factor", 0) or 0)
    others = {"yarn_ext_factor": 1.0, "yarn_log_multiplier": 0.0}
    is_odd_yarn = kind == "yarn" and (
        factor <= 1 or any(header.get(f"rope.scaling.{key}", usual) != usual for key, usual in others.items())
    )
    if kind not in {"none", "linear", "longrope", "yarn"} or (kind == "none" and factor not in {0, 1}) or is_odd_yarn:
        raise ArchitectureError(
            f"{header.packed.path}: its rotary embedding is scaled by {kind!r} with the factor {factor:g}, which "
            "training does not know; train with PEFT, and convert what it saves with 'gguflora convert'"
        )
    if kind == "linear" and factor not in {0, 1}:
        fields |= {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        fields |= _yarn(header, factor)
    return fields


def _yarn(header: Header, factor: float) -> Fields:
    """YaRN (https://arxiv.org/abs/2309.00071) as llama.cpp serves it: with its own ``beta_fast`` and ``beta_slow``.

    Measured: llama.cpp reads no ``yarn_beta_fast`` and no ``yarn_beta_slow`` of these architectures; it multiplies the
    paper's growth by ``rope.scaling.attn_factor`` (src/llama-context.cpp, ``yarn_attn_factor``).
    """
    original = header.get("rope.scaling.original_context_length") or header.number("context_length")
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": int(original),
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "attention_factor": (1 + 0.1 * math.log(factor)) * float(header.get("rope.scaling.attn_factor", 1.0)),
    }


def _decoder(header: Header) -> Fields:
    """What most decoders have in common."""
    packed = header.packed
    return {
        "vocab_size": packed.shape(TOKEN_EMBEDDING)[0],
        "hidden_size": int(header.number("embedding_length")),
        "intermediate_size": int(header.number("feed_forward_length")),
        "num_hidden_layers": int(header.number("block_count")),
        "num_attention_heads": header.heads,
        "num_key_value_heads": int(header.get("attention.head_count_kv") and header.number("attention.head_count_kv"))
        if header.get("attention.head_count_kv")
        else header.heads,
        "max_position_embeddings": int(header.get("context_length", 2048)),
        "tie_word_embeddings": not packed.has(OUTPUT),
        "rope_parameters": _rope(header),
        "pad_token_id": None,
    }


def _rms(header: Header) -> Fields:
    return {**_decoder(header), "rms_norm_eps": float(header.number("attention.layer_norm_rms_epsilon"))}


def _layer_norm(header: Header, key: str = "layer_norm_eps") -> Fields:
    return {**_decoder(header), key: float(header.number("attention.layer_norm_epsilon"))}


def _llama(header: Header) -> Fields:
    biases = {"attention_bias": header.has("attn_q.bias"), "mlp_bias": header.has("ffn_gate.bias")}
    return {**_rms(header), "head_dim": header.get("rope.dimension_count", header.head_dim), **biases}


def _mixtral(header: Header) -> Fields:
    return {
        **_rms(header),
        "head_dim": header.get("rope.dimension_count", header.head_dim),
        "num_local_experts": int(header.number("expert_count")),
        "num_experts_per_tok": int(header.number("expert_used_count")),
        "sliding_window": None,
    }


def _experts(header: Header) -> Fields:
    return {
        "num_experts": int(header.number("expert_count")),
        "num_experts_per_tok": int(header.number("expert_used_count")),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _qwen2moe(header: Header) -> Fields:
    return {
        **_rms(header),
        **_experts(header),
        "moe_intermediate_size": header.packed.shape("blk.0.ffn_gate_exps.weight")[-2],
        "shared_expert_intermediate_size": header.packed.shape("blk.0.ffn_gate_shexp.weight")[-2],
        "norm_topk_prob": False,
    }


def _qwen3moe(header: Header) -> Fields:
    return {
        **_qwen3(header),
        **_experts(header),
        "moe_intermediate_size": header.packed.shape("blk.0.ffn_gate_exps.weight")[-2],
        "norm_topk_prob": True,
    }


def _qwen3(header: Header) -> Fields:
    return {**_rms(header), "head_dim": header.head_dim, "attention_bias": header.has("attn_q.bias")}


def _gemma(header: Header) -> Fields:
    return {**_rms(header), "head_dim": header.head_dim, "tie_word_embeddings": True}


def _windows(header: Header, every: int) -> list[str]:
    """Which layers attend to a window only: all but each ``every``-th, unless the file says otherwise."""
    layers = int(header.number("block_count"))
    said = header.get("attention.sliding_window_pattern")
    if isinstance(said, list) and len(said) == layers:
        is_window = [bool(each) for each in said]
    else:
        every = said if isinstance(said, int) and not isinstance(said, bool) and said > 0 else every
        is_window = [layer % every < every - 1 for layer in range(layers)]
    return ["sliding_attention" if each else "full_attention" for each in is_window]


def _gemma2(header: Header) -> Fields:
    largest = header.number("block_count") == 46
    return {
        **_gemma(header),
        "query_pre_attn_scalar": header.number("embedding_length") // header.heads if largest else header.head_dim,
        "attn_logit_softcapping": float(header.get("attn_logit_softcapping", 50.0)),
        "final_logit_softcapping": float(header.get("final_logit_softcapping", 30.0)),
        "sliding_window": int(header.number("attention.sliding_window")),
        "layer_types": _windows(header, 2),
    }


def _gemma3(header: Header) -> Fields:
    largest = header.number("block_count") == 62
    window = {"rope_type": "default", "rope_theta": float(header.get("rope.freq_base_swa", 10000.0))}
    softcap = header.get("final_logit_softcapping")
    return {
        **_gemma(header),
        "query_pre_attn_scalar": header.number("embedding_length") // header.heads if largest else header.head_dim,
        "sliding_window": int(header.number("attention.sliding_window")),
        "layer_types": _windows(header, 6),
        "rope_parameters": {"full_attention": _rope(header, 1e6), "sliding_attention": window},
        "final_logit_softcapping": None if softcap is None else float(softcap),
    }


def _partial(fields: Fields, header: Header) -> Fields:
    """The same with a rotary embedding of a part of each head."""
    return {**fields, "rope_parameters": {**fields["rope_parameters"], "partial_rotary_factor": header.rotated}}


def _phi2(header: Header) -> Fields:
    return {**_partial(_layer_norm(header), header), "hidden_act": "gelu_new"}


def _phi3(header: Header) -> Fields:
    window = int(header.get("attention.sliding_window", 0) or 0)
    fields = _partial(_rms(header), header)
    original = int(header.get("rope.scaling.original_context_length", fields["max_position_embeddings"]))
    return {**fields, "sliding_window": window or None, "original_max_position_embeddings": original}


def _gpt2(header: Header) -> Fields:
    width = int(header.number("embedding_length"))
    return {
        "vocab_size": header.packed.shape(TOKEN_EMBEDDING)[0],
        "n_positions": header.packed.shape("position_embd.weight")[0],
        "n_embd": width,
        "n_layer": int(header.number("block_count")),
        "n_head": header.heads,
        "n_inner": int(header.get("feed_forward_length", 4 * width)),
        "layer_norm_epsilon": float(header.number("attention.layer_norm_epsilon")),
        "tie_word_embeddings": not header.packed.has(OUTPUT),
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    }


def _gptneox(header: Header) -> Fields:
    parallel = bool(header.get("use_parallel_residual", True))
    return {**_partial(_layer_norm(header), header), "use_parallel_residual": parallel, "hidden_act": "gelu"}


def _bloom(header: Header) -> Fields:
    return {
        "vocab_size": header.packed.shape(TOKEN_EMBEDDING)[0],
        "hidden_size": int(header.number("embedding_length")),
        "n_layer": int(header.number("block_count")),
        "n_head": header.heads,
        "layer_norm_epsilon": float(header.number("attention.layer_norm_epsilon")),
        "tie_word_embeddings": not header.packed.has(OUTPUT),
        "pad_token_id": None,
    }


def _falcon(header: Header) -> Fields:
    fields, groups = _layer_norm(header, "layer_norm_epsilon"), int(header.get("attention.head_count_kv", 1))
    two_norms = header.has("attn_norm_2.weight")
    return {
        **{key: value for key, value in fields.items() if key not in {"num_key_value_heads", "intermediate_size"}},
        "ffn_hidden_size": fields["intermediate_size"],
        "new_decoder_architecture": two_norms,
        "multi_query": groups == 1 and not two_norms,
        "num_kv_heads": groups,
        "num_ln_in_parallel_attn": 2 if two_norms else 1,
        "parallel_attn": True,
        "alibi": False,
        "bias": header.has("attn_qkv.bias"),
    }


def _starcoder2(header: Header) -> Fields:
    return {**_layer_norm(header, "norm_epsilon"), "use_bias": header.has("attn_q.bias"), "sliding_window": None}


def _stablelm(header: Header) -> Fields:
    return {
        **_partial(_layer_norm(header), header),
        "use_qkv_bias": header.has("attn_q.bias"),
        "qk_layernorm": header.has("attn_q_norm.weight"),
        "use_parallel_residual": bool(header.get("use_parallel_residual", True)) and not header.has("ffn_norm.weight"),
    }


def _olmo(header: Header) -> Fields:
    clip = float(header.get("attention.clamp_kqv", 0.0) or 0.0)
    return {**_decoder(header), "clip_qkv": clip or None}


def _olmo3(header: Header) -> Fields:
    """An ``olmo2`` whose layers attend to windows; llama.cpp scales no rotary embedding within a window."""
    full = _rope(header)
    return {
        **_rms(header),
        "sliding_window": int(header.number("attention.sliding_window")),
        "layer_types": _windows(header, 4),
        "rope_parameters": {
            "full_attention": full,
            "sliding_attention": {"rope_type": "default", "rope_theta": full["rope_theta"]},
        },
    }


def _olmoe(header: Header) -> Fields:
    width = header.packed.shape("blk.0.ffn_gate_exps.weight")[-2]
    return {**_rms(header), **_experts(header), "intermediate_size": width, "norm_topk_prob": False}


def _cohere(header: Header) -> Fields:
    scale = float(header.number("logit_scale"))
    return {**_layer_norm(header), "logit_scale": scale, "use_qk_norm": header.has("attn_q_norm.weight")}


def _cohere2(header: Header) -> Fields:
    return {
        **_layer_norm(header),
        "logit_scale": float(header.number("logit_scale")),
        "sliding_window": int(header.number("attention.sliding_window")),
        "layer_types": _windows(header, 4),
        "head_dim": header.head_dim,
    }


def _granite(header: Header) -> Fields:
    return {
        **_llama(header),
        "embedding_multiplier": float(header.get("embedding_scale", 1.0)),
        "residual_multiplier": float(header.get("residual_scale", 1.0)),
        "attention_multiplier": float(header.get("attention.scale", header.head_dim**-0.5)),
        "logits_scaling": float(header.get("logit_scale", 1.0)),
    }


def _granitemoe(header: Header) -> Fields:
    fields = {
        **_granite(header),
        "num_local_experts": int(header.number("expert_count")),
        "num_experts_per_tok": int(header.number("expert_used_count")),
        "intermediate_size": header.packed.shape("blk.0.ffn_gate_exps.weight")[-2],
    }
    if header.has("ffn_gate_shexp.weight"):
        fields["shared_intermediate_size"] = header.packed.shape("blk.0.ffn_gate_shexp.weight")[-2]
    return fields


def _nemotron(header: Header) -> Fields:
    return {
        **_partial(_layer_norm(header, "norm_eps"), header),
        "head_dim": header.head_dim,
        "attention_bias": header.has("attn_q.bias"),
        "mlp_bias": header.has("ffn_up.bias"),
    }


def _glm4(header: Header) -> Fields:
    return _partial({**_rms(header), "head_dim": header.head_dim, "attention_bias": header.has("attn_q.bias")}, header)


def _smollm3(header: Header) -> Fields:
    return {**_rms(header), "no_rope_layer_interval": 4}


def _exaone4(header: Header) -> Fields:
    layers = int(header.number("block_count"))
    if layers != 64:  # llama.cpp knows windows in the 32B only
        return {**_rms(header), "sliding_window": None, "layer_types": ["full_attention"] * layers}
    window = int(header.get("attention.sliding_window", 4096))
    return {**_rms(header), "sliding_window": window, "layer_types": _windows(header, 4)}


@dataclass(frozen=True, slots=True)
class Kind:
    """How the models of one architecture are built.

    Attributes:
        config: name of transformers' configuration class.
        fields: its fields, from the metadata.
        attention: transformers' implementation of attention: ``sdpa``, or ``eager`` where only that is right.
        tuples: whether its blocks return their state as the first of a tuple.
        packs: whether its mask and positions follow ``position_ids``, so that samples can share a row.
    """

    config: str
    fields: Callable[[Header], Fields]
    attention: str = "sdpa"
    tuples: bool = False
    packs: bool = True


KINDS: Final[Mapping[str, Kind]] = {
    "llama": Kind("LlamaConfig", _llama),
    "qwen2": Kind("Qwen2Config", _rms),
    "qwen2moe": Kind("Qwen2MoeConfig", _qwen2moe),
    "qwen3": Kind("Qwen3Config", _qwen3),
    "qwen3moe": Kind("Qwen3MoeConfig", _qwen3moe),
    "gemma": Kind("GemmaConfig", _gemma),
    "gemma2": Kind("Gemma2Config", _gemma2, "eager"),  # sdpa has no soft cap
    "gemma3": Kind("Gemma3TextConfig", _gemma3),
    "phi2": Kind("PhiConfig", _phi2),
    "phi3": Kind("Phi3Config", _phi3),
    "gpt2": Kind("GPT2Config", _gpt2),
    "gptneox": Kind("GPTNeoXConfig", _gptneox),
    "bloom": Kind("BloomConfig", _bloom, "eager", tuples=True, packs=False),
    "falcon": Kind("FalconConfig", _falcon, tuples=True),
    "starcoder2": Kind("Starcoder2Config", _starcoder2),
    "stablelm": Kind("StableLmConfig", _stablelm),
    "olmo": Kind("OlmoConfig", _olmo),
    "olmo2": Kind("Olmo2Config", _rms),
    "olmoe": Kind("OlmoeConfig", _olmoe),
    "command-r": Kind("CohereConfig", _cohere),
    "cohere2": Kind("Cohere2Config", _cohere2),
    "granite": Kind("GraniteConfig", _granite),
    "granitemoe": Kind("GraniteMoeConfig", _granitemoe),
    "arcee": Kind("ArceeConfig", _llama),
    "nemotron": Kind("NemotronConfig", _nemotron),
    "glm4": Kind("Glm4Config", _glm4),
    "smollm3": Kind("SmolLM3Config", _smollm3),
    "exaone4": Kind("Exaone4Config", _exaone4),
}
"""The architectures that can be trained."""

_MIXTRAL: Final = Kind("MixtralConfig", _mixtral)
_OLMO_3: Final = Kind("Olmo3Config", _olmo3)
_SHARED_GRANITE: Final = Kind("GraniteMoeSharedConfig", _granitemoe)


def kind_of(packed: PackedBase) -> Kind:
    """How the model of a file is built.

    Raises:
        ArchitectureError: if its architecture cannot be trained.
    """
    architecture = packed.base.architecture
    if architecture not in KINDS:
        raise ArchitectureError(
            f"{packed.path}: architecture {architecture!r} cannot be trained; these can: {listed(KINDS, len(KINDS))}"
        )
    header = Header(packed)
    if architecture == "llama" and header.get("expert_count"):
        return _MIXTRAL
    if architecture == "olmo2" and header.get("attention.sliding_window"):
        return _OLMO_3
    if architecture == "granitemoe" and header.has("ffn_gate_shexp.weight"):
        return _SHARED_GRANITE
    return KINDS[architecture]
