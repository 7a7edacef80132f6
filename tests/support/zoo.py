"""Tiny random models of every architecture that gguflora knows, and their GGUF files by llama.cpp's converter.

Unlike those of `builders.py` they need no `from_pretrained`: models are built from their configuration in memory, so
configurations can be edited for the converter, and models without a class in transformers made by hand.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft
import safetensors.torch
import torch
import transformers as hf
from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import DeepseekOcr2TextModel

from support import builders, zoo_hub
from support.oracles.llama_cpp import run_script
from support.workspace import workspace

TOKENS = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257}
DECODER = {
    "vocab_size": builders.VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": False,
    **TOKENS,
}  # fmt: skip
TIED = {**DECODER, "tie_word_embeddings": True}
EXPERTS = {**DECODER, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SHARED = {"shared_expert_intermediate_size": 48}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "topk_group": 1,
    "n_group": 1,
}  # fmt: skip
FALCON = {
    "vocab_size": builders.VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "alibi": False, **TOKENS,
}  # fmt: skip
MAMBA_2 = {
    "mamba_n_heads": 8, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_d_head": 16, "mamba_expand": 2,
}  # fmt: skip
HYBRID = {"layer_types": ["mamba", "attention"]}
NEMOTRON_H = {
    "layers_block_type": ["mamba", "attention", "mlp"], "num_hidden_layers": 3, "mamba_num_heads": 8,
    "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 8, "head_dim": 16,
}  # fmt: skip
INDEXER = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 4, "num_nextn_predict_layers": 0}
M_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}
M_ROPE_3 = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
KIMI = {
    "q_lora_rank": None, "linear_head_dim": 16, "linear_num_heads": 4, "mlp_layer_types": ["dense", "sparse"],
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
MINIMAX_M3 = {
    "head_dim": 16, "rotary_dim": 8, "intermediate_size": 32, "dense_intermediate_size": 96,
    "shared_intermediate_size": 48, "index_n_heads": 2, "index_head_dim": 16, "index_block_size": 4,
    "index_topk_blocks": 2, "mlp_layer_types": ["dense", "sparse"],
    "layer_types": ["full_attention", "minimax_m3_sparse"],
}  # fmt: skip
GEMMA_3N = {
    "head_dim": 16, "num_hidden_layers": 5, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 288,
    "laurel_rank": 8, "num_kv_shared_layers": 0, "sliding_window": 8,
    "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0, 0.0],
    "layer_types": ["sliding_attention"] * 4 + ["full_attention"],
}  # fmt: skip
DBRX = {
    "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128, "vocab_size": 288, **TOKENS,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
}  # fmt: skip
STEP = {
    "head_dim": 16, "num_sliding_attention_heads": 4, "share_expert_dim": 48, "sliding_window": 8,
    "layer_types": ["full_attention", "sliding_attention"], "mlp_layer_types": ["dense", "sparse"],
}  # fmt: skip
STEP_VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8, "max_position_embeddings": 16, "mlp_ratio": 1.5,
}  # fmt: skip
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
VISION = {
    "depth": 2, "num_heads": 4, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2, "hidden_size": 32,
    "intermediate_size": 48, "out_hidden_size": 64, "num_position_embeddings": 16, "deepstack_visual_indexes": [1],
}  # fmt: skip
VQ = {
    "num_embeddings": 8, "embed_dim": 8, "latent_channels": 8, "resolution": 16, "base_channels": 32,
    "channel_multiplier": [1], "num_res_blocks": 1,
}  # fmt: skip
LABELS = {"id2label": {0: "good", 1: "bad", 2: "odd"}, "label2id": {"good": 0, "bad": 1, "odd": 2}}
GPT = {"vocab_size": builders.VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, **TOKENS}


@dataclass(frozen=True)
class Made:
    """How one model is made.

    Attributes:
        config: the class of its configuration; None if transformers has none, and `weights` makes them.
        fields: the configuration.
        weights: shapes of a model made by hand.
        auto: the class of the model.
        for_converter: fields that only llama.cpp's converter wants, or must not see (None); with a model_type that
            transformers does not know it reads them as they are.
        flags: of the converter.
        without: modules that PEFT will not adapt, or GGUF does not have.
        only: start of the names of the modules that PEFT adapts.
        transposes: part of the names of stacks that files on the Hub hold transposed, and transformers 5 does not.
        hub: changes names and shapes of the weights to those of files on the Hub, where transformers saves others.
    """

    config: Callable[..., hf.PretrainedConfig] | None
    fields: dict[str, Any]
    weights: Callable[[], dict[str, tuple[int, ...]]] | None = None
    auto: Any = hf.AutoModelForCausalLM
    for_converter: tuple[tuple[str, Any], ...] = ()
    flags: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    only: str = ""
    transposes: str = ""
    hub: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None


def _internlm2() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.tok_embeddings.weight": (288, 64), "model.norm.weight": (64,)}
    for layer in range(2):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.attention.wqkv.weight": (128, 64), f"{at}.attention.wo.weight": (64, 64)}
        shapes |= {f"{at}.feed_forward.w{n}.weight": (64, 96) if n == 2 else (96, 64) for n in (1, 2, 3)}
        shapes |= {f"{at}.attention_norm.weight": (64,), f"{at}.ffn_norm.weight": (64,)}
    return {**shapes, "output.weight": (288, 64)}


def _baichuan() -> dict[str, tuple[int, ...]]:
    return _llama_like({"self_attn.W_pack": (192, 64)})


def _minicpm() -> dict[str, tuple[int, ...]]:
    return _llama_like({f"self_attn.{name}_proj": (64 if name == "q" else 32, 64) for name in "qkv"})


def _llama_like(attention: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    modules = {**attention, "self_attn.o_proj": (64, 64)}
    modules |= {"mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64), "mlp.down_proj": (64, 96)}
    modules |= {"input_layernorm": (64,), "post_attention_layernorm": (64,)}
    shapes = {f"model.layers.{n}.{name}.weight": shape for n in range(2) for name, shape in modules.items()}
    return {"model.embed_tokens.weight": (288, 64), **shapes, "model.norm.weight": (64,), "lm_head.weight": (288, 64)}


def _by_hand(architecture: str, weights: Callable[[], dict[str, tuple[int, ...]]], **fields: Any) -> Made:
    config = {**DECODER, **fields, "architectures": [architecture], "rms_norm_eps": 1e-6, "model_type": "by-hand"}
    return Made(None, config, weights)


MODELS = {
    "llama": Made(hf.LlamaConfig, DECODER),
    "llama_biases": Made(hf.LlamaConfig, {**DECODER, "attention_bias": True, "mlp_bias": True}),
    "mistral": Made(hf.MistralConfig, {**DECODER, "head_dim": 32}),
    "ministral3": Made(hf.Ministral3Config, {**DECODER, "head_dim": 16}),
    "mixtral": Made(hf.MixtralConfig, EXPERTS),
    "qwen2": Made(hf.Qwen2Config, TIED),
    "qwen2moe": Made(hf.Qwen2MoeConfig, {**EXPERTS, **SHARED}),
    "qwen3": Made(hf.Qwen3Config, {**DECODER, "head_dim": 16}),
    "qwen3moe": Made(hf.Qwen3MoeConfig, {**EXPERTS, "head_dim": 16}),
    "qwen3next": Made(hf.Qwen3NextConfig, {**EXPERTS, **SHARED, **LINEAR}, flags=("--no-mtp",)),
    "qwen35": Made(
        hf.Qwen3_5TextConfig, {**DECODER, **LINEAR, "head_dim": 32}, flags=("--no-mtp",)
    ),
    "qwen35moe": Made(hf.Qwen3_5MoeTextConfig, {**EXPERTS, **SHARED, **LINEAR, "head_dim": 32}, flags=("--no-mtp",)),
    "gemma": Made(hf.GemmaConfig, {**TIED, "head_dim": 16}),
    "gemma2": Made(hf.Gemma2Config, {**TIED, "head_dim": 16}),
    "gemma3": Made(hf.Gemma3TextConfig, {**TIED, "head_dim": 16}),
    "phi2": Made(hf.PhiConfig, {**DECODER, "num_key_value_heads": 4, "intermediate_size": 256}),
    "phi3": Made(hf.Phi3Config, {**DECODER, "sliding_window": None}),
    "gpt2": Made(hf.GPT2Config, {**GPT, "n_ctx": 128}),
    "gptneox": Made(
        hf.GPTNeoXConfig, {**DECODER, "rotary_pct": 0.5},
        for_converter=(("rotary_pct", 0.5), ("use_parallel_residual", True), ("model_type", "read as it is")),
    ),
    "bloom": Made(hf.BloomConfig, {**GPT, "hidden_size": 64}),
    "falcon": Made(hf.FalconConfig, {**FALCON, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "falcon_7b": Made(hf.FalconConfig, {**FALCON, "num_kv_heads": 1, "multi_query": True}),
    "starcoder2": Made(hf.Starcoder2Config, DECODER),
    "stablelm": Made(hf.StableLmConfig, {**DECODER, "use_qkv_bias": True}),
    "stablelm_norms": Made(hf.StableLmConfig, {**DECODER, "qk_layernorm": True, "use_parallel_residual": True}),
    "olmo": Made(hf.OlmoConfig, DECODER),
    "olmo2": Made(hf.Olmo2Config, DECODER),
    "olmoe": Made(hf.OlmoeConfig, {**EXPERTS, "num_key_value_heads": 4}),
    "cohere": Made(hf.CohereConfig, {**TIED, "use_qk_norm": True, "logit_scale": 0.5}),
    "cohere2": Made(hf.Cohere2Config, {**TIED, "logit_scale": 0.5}, for_converter=(("rotary_pct", 1.0),)),
    "granite": Made(hf.GraniteConfig, DECODER),
    "granitemoe": Made(hf.GraniteMoeConfig, EXPERTS),
    "granitemoe_shared": Made(hf.GraniteMoeSharedConfig, {**EXPERTS, "shared_intermediate_size": 48}),
    "nemotron": Made(hf.NemotronConfig, DECODER),
    "glm4": Made(hf.Glm4Config, {**DECODER, "head_dim": 16}),
    "glm4v": Made(hf.Glm4Config, {**DECODER, "head_dim": 16}, for_converter=(("rope_parameters", M_ROPE),)),
    "arcee": Made(hf.ArceeConfig, {**DECODER, "head_dim": 16}),
    "llama_embed": Made(
        hf.LlamaConfig, DECODER, auto=hf.LlamaModel, for_converter=(("architectures", ["LlamaBidirectionalModel"]),)
    ),
    "granitehybrid": Made(
        hf.GraniteMoeHybridConfig,
        {**EXPERTS, **MAMBA_2, **HYBRID, "shared_intermediate_size": 48}, for_converter=tuple(HYBRID.items()),
    ),
    "granitehybrid_dense": Made(
        hf.GraniteMoeHybridConfig,
        {**DECODER, **MAMBA_2, **HYBRID, "num_local_experts": 0, "num_experts_per_tok": 0,
         "shared_intermediate_size": 48},
        for_converter=tuple(HYBRID.items()),
    ),
    "bamba": Made(hf.BambaConfig, {**DECODER, **MAMBA_2, "attn_layer_indices": [1]}),
    "mamba2": Made(
        hf.Mamba2Config, {**DECODER, "state_size": 8, "num_heads": 8, "head_dim": 16, "expand": 2, "n_groups": 2},
        without=("out_proj",), for_converter=(("intermediate_size", 128),),
    ),
    "nemotron_h": Made(
        hf.NemotronHConfig, {**DECODER, **NEMOTRON_H}, without=("out_proj",),
        for_converter=(
            ("num_experts_per_tok", None), ("n_routed_experts", None), ("n_group", None), ("topk_group", None),
            ("model_type", "read as it is"),
        ),
    ),
    "nemotron_h_moe": Made(hf.NemotronHConfig, {**DECODER, **NEMOTRON_H}, without=("out_proj",)),
    "nemotron_h_experts": Made(
        hf.NemotronHConfig,
        {**DECODER, **NEMOTRON_H, "layers_block_type": ["mamba", "attention", "moe"], "n_routed_experts": 4,
         "num_experts_per_tok": 2, "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 48},
        without=("out_proj",),
    ),
    "gemma_embedding": Made(hf.Gemma3TextConfig, {**TIED, "head_dim": 16}, auto=hf.Gemma3TextModel),
    "glm_dsa": Made(hf.GlmMoeDsaConfig, {**EXPERTS, **LATENT, **INDEXER}),
    "glm4_moe_lite": Made(hf.Glm4MoeLiteConfig, {**EXPERTS, **LATENT, "num_nextn_predict_layers": 0}),
    "mistral4": Made(
        hf.Mistral4Config, {**EXPERTS, **LATENT}, auto=hf.Mistral4ForCausalLM,
        for_converter=(("architectures", ["Mistral3ForConditionalGeneration"]),),
    ),
    "chameleon": Made(
        hf.ChameleonConfig, {**DECODER, "num_key_value_heads": 4, "vocabulary_map": {"<image>": 280}, "vq_config": VQ},
        auto=hf.ChameleonForConditionalGeneration, only="model.layers.",
    ),
    "qwen3vlmoe": Made(
        hf.Qwen3VLMoeConfig,
        {"text_config": {**EXPERTS, "head_dim": 16, "rope_parameters": M_ROPE_3}, "vision_config": VISION},
        auto=hf.Qwen3VLMoeForConditionalGeneration, only="model.language_model.", transposes=".mlp.experts.",
    ),
    "smollm3": Made(hf.SmolLM3Config, DECODER),
    "exaone4": Made(hf.Exaone4Config, DECODER),
    "deepseek2": Made(hf.DeepseekV2Config, {**EXPERTS, **LATENT}),
    "deepseek3": Made(hf.DeepseekV3Config, {**EXPERTS, **LATENT, "num_nextn_predict_layers": 0}),
    "gptoss": Made(hf.GptOssConfig, {**EXPERTS, "head_dim": 16}),
    "llama4": Made(
        hf.Llama4TextConfig,
        {**EXPERTS, "intermediate_size_mlp": 96, "head_dim": 16, "num_experts_per_tok": 1,
         "num_hidden_layers": 4, "interleave_moe_layer_step": 2},
    ),
    "mamba": Made(hf.MambaConfig, {**TIED, "intermediate_size": 128, "state_size": 8}, without=("out_proj",)),
    "jamba": Made(
        hf.JambaConfig,
        {**EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
         "expert_layer_offset": 1, "mamba_d_state": 8},
    ),
    "bert": Made(
        hf.BertConfig, {**DECODER, "num_key_value_heads": 4, "type_vocab_size": 2}, auto=hf.BertModel,
        without=("pooler.dense",),
    ),
    "t5": Made(
        hf.T5Config,
        {"vocab_size": 288, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 3, "num_decoder_layers": 2,
         "num_heads": 4, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
         "decoder_start_token_id": 0},
        auto=hf.T5ForConditionalGeneration,
    ),
    "kimi_linear": Made(
        hf.KimiLinearConfig, {**EXPERTS, **LATENT, **KIMI},
        for_converter=(
            ("model_type", "read as it is"), ("num_experts", 4), ("num_shared_experts", 1),
            ("moe_router_activation_func", "sigmoid"), ("first_k_dense_replace", 1),
            ("rope_parameters", {"rope_type": "default", "rope_theta": 10000.0}),
            ("linear_attn_config", {"full_attn_layers": [2], "short_conv_kernel_size": 4, "head_dim": 16}),
        ),
        hub=zoo_hub.renamed((r"block_sparse_moe\.(gate|up|down)_proj", r"mlp.\1_proj")),
    ),
    "minimax_m3": Made(
        hf.MiniMaxM3VLTextConfig, {**EXPERTS, **MINIMAX_M3}, hub=zoo_hub.minimax_m3,
        for_converter=(
            ("architectures", ["MiniMaxM3SparseForCausalLM"]), ("model_type", "read as it is"),
            ("n_shared_experts", 1), ("moe_layer_freq", [0, 1]), ("scoring_func", "sigmoid"),
            ("sparse_attention_config", {
                "sparse_num_index_heads": 2, "sparse_index_dim": 16, "sparse_topk_blocks": 2, "sparse_block_size": 4,
                "sparse_local_block": 1}),
        ),
    ),
    "hy_v4": Made(
        hf.HYV4Config, {**EXPERTS, **LATENT, **INDEXER, "hc_mult": 2, "mlp_layer_types": ["dense", "sparse"]},
        for_converter=(("first_k_dense_replace", 1),),
        hub=zoo_hub.renamed(
            (r"mlp\.(shared_experts\.)?linear_gate", r"mlp.\1gate_proj"), (r"model\.hc_pre\.hc_head", "model.hc_head"),
            (r"hc_pre\.(hc_\w+_layer)", r"\1.hc_pre"),
        ),
    ),
    "deepseek_v32": Made(
        hf.DeepseekV32Config, {**EXPERTS, **LATENT, **INDEXER, "head_dim": 8},
        for_converter=(("scoring_func", "sigmoid"),),
    ),
    "deepseek2_ocr": Made(
        hf.DeepseekOcr2TextConfig,
        {**EXPERTS, "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1, "head_dim": 16,
         "mlp_layer_types": ["dense", "sparse"]},
        auto=DeepseekOcr2TextModel, hub=zoo_hub.deepseek_ocr,
        for_converter=(
            ("architectures", ["DeepseekOCRForCausalLM"]), ("model_type", "read as it is"),
            ("first_k_dense_replace", 1), ("qk_rope_head_dim", 16),
        ),
    ),
    "gemma3n": Made(hf.Gemma3nTextConfig, {**TIED, **GEMMA_3N}),
    "dbrx": Made(hf.DbrxConfig, DBRX),
    "hrm_text": Made(hf.HrmTextConfig, {**DECODER, "head_dim": 16}),
    "granite_swa": Made(hf.GraniteSWAConfig, {**DECODER, **WINDOWS}),
    "granitemoe_swa": Made(hf.GraniteMoeSWAConfig, {**EXPERTS, **WINDOWS, "shared_intermediate_size": 48}),
    "step35": Made(
        hf.Step3p7Config, {"text_config": {**EXPERTS, **STEP}, "vision_config": STEP_VISION},
        auto=hf.Step3p7ForConditionalGeneration, only="model.language_model.",
        for_converter=(
            ("model_type", "read as it is"), ("num_attention_groups", 2), ("moe_num_experts", 4), ("moe_top_k", 2),
            ("partial_rotary_factors", [0.5, 1.0]), ("moe_layers_enum", "1"),
        ),
    ),
    "internlm2": _by_hand("InternLM2ForCausalLM", _internlm2),
    "baichuan": _by_hand("BaichuanForCausalLM", _baichuan, num_key_value_heads=4),
    "minicpm": _by_hand("MiniCPMForCausalLM", _minicpm, scale_emb=12.0, scale_depth=1.4, dim_model_base=32),
}  # fmt: skip
OTHERS = {
    "seed_oss": Made(hf.SeedOssConfig, {**DECODER, "head_dim": 16}),
    "roberta": Made(
        hf.RobertaConfig,
        {**DECODER, "num_key_value_heads": 4, "type_vocab_size": 2, "pad_token_id": 1},
        auto=hf.RobertaModel,
        without=("pooler.dense",),
    ),
    "bert_labels": Made(
        hf.BertConfig, {**DECODER, **LABELS, "num_key_value_heads": 4, "type_vocab_size": 2},
        auto=hf.BertForSequenceClassification, without=("pooler.dense",),
    ),
    "roberta_labels": Made(
        hf.RobertaConfig, {**DECODER, **LABELS, "num_key_value_heads": 4, "type_vocab_size": 2, "pad_token_id": 1},
        auto=hf.RobertaForSequenceClassification,
    ),
    "distilbert_labels": Made(
        hf.DistilBertConfig,
        {"vocab_size": 288, "dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 128,
         **TOKENS, **LABELS},
        auto=hf.DistilBertForSequenceClassification,
    ),
    "modernbert_labels": Made(
        hf.ModernBertConfig, {**DECODER, **LABELS, "num_key_value_heads": 4, "local_attention": 16},
        auto=hf.ModernBertForSequenceClassification, for_converter=(("global_attn_every_n_layers", 3),),
    ),
    "falcon_h1": Made(
        hf.FalconH1Config,
        {**DECODER, **MAMBA_2, "mamba_d_ssm": 128},
        without=("out_proj",),
        for_converter=(("head_dim", 16),),
    ),
    "gemma3n_padded": Made(hf.Gemma3nTextConfig, {**TIED, **GEMMA_3N, "vocab_size_per_layer_input": 280}),
    "gemma3_padded": Made(hf.Gemma3TextConfig, {**TIED, "head_dim": 16, "vocab_size": 320}),
    # those below are as llama.cpp computes what GGUF does not say, and with windows shorter than a prompt
    "gemma2_served": Made(
        hf.Gemma2Config, {**TIED, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
    ),
    "gemma3_served": Made(
        hf.Gemma3TextConfig,
        {**TIED, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "num_hidden_layers": 7},
    ),
    "qwen3moe_served": Made(hf.Qwen3MoeConfig, {**EXPERTS, "head_dim": 16, "norm_topk_prob": True}),
    "command_r": Made(hf.CohereConfig, {**TIED, "logit_scale": 0.5}),
    "p3": Made(hf.Phi3Config, {**DECODER, "sliding_window": None}),  # llama.cpp patches what is called phi3
    "p3_long": Made(
        hf.Phi3Config,
        {**DECODER, "sliding_window": None, "max_position_embeddings": 512, "original_max_position_embeddings": 256,
         "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 256,
            "short_factor": [1.0 + 0.1 * n for n in range(8)], "long_factor": [2.0 + 0.1 * n for n in range(8)]}},
    ),
    "llama3": Made(
        hf.LlamaConfig,
        {**DECODER, "rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0,
         "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}},
    ),
    "llama_linear": Made(
        hf.LlamaConfig, {**DECODER, "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}
    ),
    "llama_yarn": Made(hf.LlamaConfig, {**DECODER, "rope_parameters": YARN}),
    "qwen3_yarn": Made(hf.Qwen3Config, {**DECODER, "head_dim": 16, "rope_parameters": {**YARN, "factor": 2.5}}),
    "olmo3": Made(
        hf.Olmo3Config,
        {**DECODER, "num_hidden_layers": 4, "sliding_window": 8,
         "rope_parameters": {
            "full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
        for_converter=(("rope_parameters", YARN), ("model_type", "read as it is")),
    ),
    "granitemoe_scaled": Made(
        hf.GraniteMoeConfig,
        {**EXPERTS, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1,
         "logits_scaling": 4.0},
    ),
    "granite_scaled": Made(
        hf.GraniteConfig,
        {**DECODER, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1,
         "logits_scaling": 4.0},
    ),
    "smollm3_deep": Made(hf.SmolLM3Config, {**DECODER, "num_hidden_layers": 4}),
    "exaone4_deep": Made(
        hf.Exaone4Config,
        {**DECODER, "num_hidden_layers": 4, "sliding_window": None, "layer_types": ["full_attention"] * 4},
    ),
    "cohere2_deep": Made(
        hf.Cohere2Config, {**TIED, "logit_scale": 0.5, "num_hidden_layers": 4, "sliding_window": 8},
        for_converter=(("rotary_pct", 1.0),),
    ),
}  # fmt: skip
"""Architectures that gguflora has no rules for, rows for no token, and positions that GGUF leaves out."""

HAS_CLASS = [name for name, made in MODELS.items() if made.config]
UNORDERED = {
    "arcee", "llama_embed", "granitehybrid", "granitehybrid_dense", "bamba", "mamba2", "nemotron_h", "nemotron_h_moe",
    "nemotron_h_experts", "gemma_embedding", "glm_dsa", "mistral4", "chameleon", "qwen3vlmoe", "kimi_linear",
    "minimax_m3", "hy_v4", "deepseek_v32", "deepseek2_ocr", "gemma3n", "dbrx", "hrm_text", "granite_swa",
    "granitemoe_swa", "step35",
}  # fmt: skip
"""Models whose modules gguflora cannot list: it places weights by their names, but does not know all the names."""
REFUSED = {"chameleon": r"attn_[qk]_norm\."}
"""Tensors that llama.cpp's converter fills in a way that gguflora refuses to follow, by model."""
ORDERED = [name for name in HAS_CLASS if name not in UNORDERED]


def _made(name: str) -> Made:
    return MODELS[name] if name in MODELS else OTHERS[name]


def model(name: str) -> Any:
    """The model in memory, the same at every call, in float32."""
    made = _made(name)
    assert made.config is not None
    torch.manual_seed(0)
    config = made.config(**made.fields)
    if made.auto is hf.AutoModelForCausalLM:
        built = made.auto.from_config(config, attn_implementation="eager")
    else:
        built = made.auto(config)
    built = built.float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        biases = [buffer for key, buffer in built.named_buffers() if key.endswith("bias")]
        for parameter in (*built.parameters(), *biases):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return built


@cache
def checkpoint(name: str) -> Path:
    """The model as `save_pretrained` writes it."""
    path = workspace() / "architectures" / name
    if _made(name).config:
        return save(name, model(name), path)
    path.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    assert MODELS[name].weights
    weights = {key: torch.randn(shape, generator=generator) for key, shape in MODELS[name].weights().items()}
    safetensors.torch.save_file(weights, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(MODELS[name].fields))
    builders._tokenizer().save_pretrained(path)
    return path


def save(name: str, built: Any, path: Path) -> Path:
    """Save a model for the converter."""
    built.save_pretrained(path)
    builders._tokenizer().save_pretrained(path)
    if part := _made(name).transposes:
        weights = safetensors.torch.load_file(path / "model.safetensors")
        as_on_the_hub = {key: value.mT.contiguous() if part in key else value for key, value in weights.items()}
        safetensors.torch.save_file(as_on_the_hub, path / "model.safetensors", {"format": "pt"})
    if hub := _made(name).hub:
        safetensors.torch.save_file(
            hub(safetensors.torch.load_file(path / "model.safetensors")), path / "model.safetensors", {"format": "pt"}
        )
    config = path / "config.json"
    fields = json.loads(config.read_text()) | dict(_made(name).for_converter)
    config.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))
    return path


def to_gguf(name: str, path: Path, *flags: str) -> Path:
    """The checkpoint in F32 by convert_hf_to_gguf.py."""
    out = path / f"model{''.join(flags)}.gguf"
    run_script("convert_hf_to_gguf.py", path, "--outfile", out, "--outtype", "f32", *_made(name).flags, *flags)
    return out


@cache
def gguf_model(name: str, *flags: str) -> Path:
    """The model in F32 by convert_hf_to_gguf.py."""
    return to_gguf(name, checkpoint(name), *flags)


def saved_weights(name: str) -> dict[str, np.ndarray]:
    """The weights under the names of the checkpoint."""
    files = sorted(checkpoint(name).glob("*.safetensors"))
    weights = {key: value for file in files for key, value in safetensors.torch.load_file(file).items()}
    part = _made(name).transposes or " "
    return {key: (value.mT if part in key else value).float().numpy() for key, value in weights.items()}


def weights_in_memory(name: str) -> dict[str, np.ndarray]:
    """The weights under the names of the modules, which are those that PEFT sees."""
    return {key: value.detach().numpy() for key, value in model(name).state_dict(keep_vars=True).items()}


def tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a GGUF file by gguf-py."""
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


def _adapts(made: Made, module: str) -> bool:
    return module.startswith(made.only) and not module.endswith(made.without or ".")


def linear_modules(name: str, built: Any) -> str:
    """A pattern of all modules that are matrix products, but the output and those that are left out."""
    kinds = (torch.nn.Linear, hf.pytorch_utils.Conv1D)
    modules = [key for key, module in built.named_modules() if isinstance(module, kinds) and key != "lm_head"]
    return "|".join(re.escape(key) for key in modules if _adapts(_made(name), key))


def peft_model(name: str, **options: Any) -> peft.PeftModel:
    """The model with a LoRA of random numbers on all its linear layers."""
    built = model(name)
    config = peft.LoraConfig(r=3, lora_alpha=6, **{"target_modules": linear_modules(name, built), **options})
    adapted = peft.get_peft_model(built, config)
    generator = torch.Generator().manual_seed(2)
    for key, parameter in adapted.named_parameters():
        if "lora_" in key:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return adapted


TRANSPOSED = {"gpt2": ".c_", "gptoss": ".experts.", "llama4": ".experts."}
"""Weights that the Hugging Face model keeps as (n_in, n_out)."""
ELSEWHERE = ("A_log", "pooler.dense.weight", "pooler.dense.bias")
"""Weights that GGUF holds as other values, or not at all."""


def as_matrices(name, weights):
    """Matrices (n_out, n_in) by the names that `slices_of` wants: experts one by one, vectors as columns."""
    for key, values in weights.items():
        is_stack = values.ndim == 3 and "conv1d" not in key
        matrices = {f"{key}.{e}": values[e] for e in range(len(values))} if is_stack else {key: values}
        for path, matrix in matrices.items():
            transposed = matrix.ndim == 2 and TRANSPOSED.get(name, " ") in key and not key.endswith("bias")
            yield path, matrix.T if transposed else matrix.reshape(len(matrix), -1)


def adapted(name, kind, options, std, path):
    """PEFT's merge of a random adapter, which it saves."""
    built = model(name)
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(built, kind(**{"target_modules": linear_modules(name, built), **options}))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(std * torch.randn_like(parameter))
    wrapped.save_pretrained(path)
    return wrapped.merge_and_unload()
