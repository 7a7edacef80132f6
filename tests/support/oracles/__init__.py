"""Truth that nobody here wrote: PEFT and torch, llama.cpp's converters and logits, libggml-base."""

PROMPT = tuple(range(40, 64))
"""The tokens of every comparison of logits."""
