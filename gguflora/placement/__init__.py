"""Fit an adapter to a base: map each delta to rows of a GGUF tensor, and a soft prompt to the base's embeddings."""
