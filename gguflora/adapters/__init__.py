"""Adapters: a PEFT or mlx-lm directory or a GGUF LoRA file, read into deltas of weights."""

from gguflora.adapters.adapter import Adapter, read_adapter

__all__ = ["Adapter", "read_adapter"]
