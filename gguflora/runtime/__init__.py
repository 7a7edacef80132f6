"""llama.cpp through llama-cpp-python: adapters of a running model, attached and swapped without a stale KV cache."""

from gguflora.runtime.attached import Adapters, attach

__all__ = ["Adapters", "attach"]
