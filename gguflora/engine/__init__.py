"""The serving engine: one base model in memory, any adapter set for each request, nothing stale.

::

    with Engine("base.gguf", adapters={"legal": "legal.gguf", "tone": "tone-peft/"}) as engine:
        request = Request(engine.tokenize("Dear Sir"), engine.adapter_set("legal@0.5+tone"))
        for piece in engine.submit(request):
            print(piece.text, end="")

Needs llama-cpp-python.
"""

try:
    import llama_cpp as _llama_cpp  # noqa: F401
except ImportError as error:
    from gguflora.errors import HotSwapError

    raise HotSwapError(f"the engine needs llama-cpp-python: pip install 'gguflora[runtime]' ({error})") from error

from gguflora.engine.adapter_sets import BASE, AdapterSet, describe_set
from gguflora.engine.engine import ContextStats, Engine, EngineStats
from gguflora.engine.registry import LoadedAdapter
from gguflora.engine.requests import (
    Generation,
    Piece,
    Request,
    Sampling,
    Timings,
    TokenLogprob,
    Usage,
)

__all__ = [
    "BASE",
    "AdapterSet",
    "ContextStats",
    "Engine",
    "EngineStats",
    "Generation",
    "LoadedAdapter",
    "Piece",
    "Request",
    "Sampling",
    "Timings",
    "TokenLogprob",
    "Usage",
    "describe_set",
]
