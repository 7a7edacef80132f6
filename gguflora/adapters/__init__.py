"""Read adapters (PEFT and mlx-lm directories, GGUF LoRA files) into deltas of weights."""

from gguflora.adapters.adapter import Adapter, read_adapter

__all__ = ["Adapter", "read_adapter"]
