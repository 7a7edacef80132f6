"""Attach and swap adapters of a running llama-cpp-python model without leaving a stale KV cache."""

from gguflora.runtime.attached import Adapters, attach

__all__ = ["Adapters", "attach"]
