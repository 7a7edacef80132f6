"""Tiny vision-language models, PEFT adapters of their vision part, and the mmproj files of llama.cpp's converter."""

import copy
import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import peft
import safetensors.torch
import torch
import transformers as hf

from support import builders
from support.oracles.llama_cpp import run_script
from support.workspace import workspace

TEXT = {
    "vocab_size": builders.VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
    "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257,
}  # fmt: skip
TOWER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
QWEN_TOWER = {"depth": 3, "num_heads": 4, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}
M_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
HEARING = {
    "d_model": 32, "hidden_size": 32, "encoder_layers": 3, "num_hidden_layers": 3, "encoder_attention_heads": 4,
    "num_attention_heads": 4, "encoder_ffn_dim": 48, "num_mel_bins": 16, "max_source_positions": 20,
}  # fmt: skip
LANGUAGE = ("language_model", "text_model", "lm_head")
IMAGE = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


@dataclass(frozen=True)
class Made:
    """How one model is made: its configuration, the parts of the vision tower and its fields, and the model's own."""

    config: Any
    text: dict[str, Any]
    vision: dict[str, Any]
    model: Any = hf.AutoModelForImageTextToText
    more: dict[str, Any] = field(default_factory=dict)


MODELS = {
    "gemma3": Made(
        hf.Gemma3Config, {**TEXT, "model_type": "gemma3_text"},
        {**TOWER, "model_type": "siglip_vision_model", "vision_use_head": False},
        more={"mm_tokens_per_image": 4},
    ),
    "qwen2vl": Made(
        hf.Qwen2VLConfig, {**TEXT, "rope_parameters": M_ROPE},
        {**QWEN_TOWER, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
    ),
    "qwen2.5vl": Made(
        hf.Qwen2_5_VLConfig, {**TEXT, "rope_parameters": M_ROPE},
        {**QWEN_TOWER, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "window_size": 32,
         "fullatt_block_indexes": [1]},
    ),
    "qwen3vl": Made(
        hf.Qwen3VLConfig, {**TEXT, "rope_parameters": M_ROPE},
        {**QWEN_TOWER, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64,
         "num_position_embeddings": 16, "deepstack_visual_indexes": [1]},
    ),
    "pixtral": Made(
        hf.LlavaConfig, {**TEXT, "model_type": "mistral"},
        {**TOWER, "model_type": "pixtral", "head_dim": 8, "hidden_act": "gelu"},
        more={"vision_feature_layer": -1, "vision_feature_select_strategy": "full", "image_token_index": 258},
    ),
    "mistral3": Made(
        hf.Mistral3Config, {**TEXT, "model_type": "mistral"},
        {**TOWER, "model_type": "pixtral", "head_dim": 8, "hidden_act": "silu"},
        more={"spatial_merge_size": 2, "image_token_index": 258, "vision_feature_layer": -1},
    ),
    "idefics3": Made(
        hf.Idefics3Config, {**TEXT, "model_type": "llama"}, TOWER, more={"scale_factor": 2, "image_token_id": 258}
    ),
    "internvl": Made(
        hf.InternVLConfig, {**TEXT, "model_type": "qwen2"},
        {**TOWER, "num_hidden_layers": 4, "image_size": [32, 32], "patch_size": [8, 8],
         "model_type": "internvl_vision"},
        more={"downsample_ratio": 0.5, "image_token_id": 258},
    ),
    "qwen2audio": Made(
        hf.Qwen2AudioConfig, {**TEXT, "model_type": "qwen2"}, {}, model=hf.Qwen2AudioForConditionalGeneration,
        more={"audio_config": {**HEARING, "model_type": "qwen2_audio_encoder"}, "audio_token_index": 258},
    ),
    "voxtral": Made(
        hf.VoxtralConfig, {**TEXT, "model_type": "llama"}, {}, model=hf.VoxtralForConditionalGeneration,
        more={"audio_config": {**HEARING, "intermediate_size": 128, "model_type": "voxtral_encoder"},
              "audio_token_id": 258},
    ),
    "ultravox": Made(  # a class of the Hub: Whisper's encoder, as Voxtral's, and norms in the projector
        hf.VoxtralConfig, {**TEXT, "model_type": "llama"}, {}, model=hf.VoxtralForConditionalGeneration,
        more={"audio_config": {**HEARING, "intermediate_size": 128, "model_type": "voxtral_encoder"},
              "audio_token_id": 258},
    ),
    "llama4": Made(
        hf.Llama4Config,
        {**TEXT, "num_local_experts": 2, "intermediate_size_mlp": 96, "num_experts_per_tok": 1},
        {**TOWER, "vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64,
         "pixel_shuffle_ratio": 0.5},
    ),
}  # fmt: skip


def model(name: str) -> Any:
    """The model in memory, the same at every call, in float32."""
    made = MODELS[name]
    torch.manual_seed(0)
    parts = {"text_config": made.text, **({"vision_config": made.vision} if made.vision else {})}
    config = made.config(**parts, **made.more)
    create = getattr(made.model, "from_config", None) or made.model._from_config
    built = create(config, attn_implementation="eager").float().eval()
    if name == "ultravox":
        projector = next(part for key, part in built.named_modules() if key.endswith("multi_modal_projector"))
        projector.ln_pre, projector.ln_mid = torch.nn.RMSNorm(128), torch.nn.RMSNorm(64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return built


def mmproj(name: str, built: Any, path: Path) -> Path:
    """Save the model, and convert its vision part to F32 by convert_hf_to_gguf.py --mmproj."""
    built.save_pretrained(path)
    if name == "internvl":  # the converter knows the tower by the name of its class on the Hub
        config = json.loads((path / "config.json").read_text())
        config["vision_config"]["architectures"] = ["InternVisionModel"]
        (path / "config.json").write_text(json.dumps(config))
        weights = safetensors.torch.load_file(path / "model.safetensors")
        named = {f"model.{key.removeprefix('model.')}": value for key, value in weights.items()}
        safetensors.torch.save_file(named, path / "model.safetensors", {"format": "pt"})
    if name == "ultravox":
        config = json.loads((path / "config.json").read_text())
        config |= {"architectures": ["UltravoxModel"], "model_type": "ultravox", "stack_factor": 4, "hidden_size": 64}
        (path / "config.json").write_text(json.dumps(config))
    if name == "gemma3":
        _name_as_on_the_hub(path / "model.safetensors")
    tokenizer = copy.deepcopy(builders._tokenizer())
    tokenizer.add_tokens(["[IMG_BREAK]"])
    tokenizer.save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps(IMAGE))
    out = path / "mmproj.gguf"
    run_script("convert_hf_to_gguf.py", path, "--outfile", out, "--outtype", "f32", "--mmproj")
    return out


def _name_as_on_the_hub(file: Path) -> None:
    """transformers 5 saves SigLIP without the "vision_model" that llama.cpp's converter knows."""
    weights = safetensors.torch.load_file(file)
    named = {key.replace("vision_tower.", "vision_tower.vision_model."): value for key, value in weights.items()}
    safetensors.torch.save_file(named, file, {"format": "pt"})


@cache
def base(name: str) -> Path:
    """The mmproj file of the model."""
    return mmproj(name, model(name), workspace() / "vision" / name)


def adapted(name: str, path: Path, **options: Any) -> tuple[Path, Path]:
    """A random LoRA on every linear layer of the vision part: its directory, and the mmproj of PEFT's merge."""
    built = model(name)
    linear = [
        key for key, module in built.named_modules()
        if isinstance(module, torch.nn.Linear) and not any(part in key for part in LANGUAGE)
    ]  # fmt: skip
    config = {"r": 4, "lora_alpha": 8, "target_modules": linear, **options}
    adapter = peft.get_peft_model(built, peft.LoraConfig(**config))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapter.save_pretrained(path / "adapter")
    return path / "adapter", mmproj(name, adapter.merge_and_unload(), path / "merged")
