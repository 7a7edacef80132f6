"""The serving engine: one base model in memory, and any adapter set for each request.

    with Engine("base.gguf", adapters={"legal": "legal.gguf", "tone": "tone-peft/"}) as engine:
        request = Request(engine.tokenize("Dear Sir"), engine.adapter_set("legal@0.5+tone"))
        for piece in engine.submit(request):
            print(piece.text, end="")

Needs llama-cpp-python.
"""

from typing import TYPE_CHECKING, Final

from gguflora.errors import MissingExtraError
from gguflora.system.extras import lazy_face

if TYPE_CHECKING:
    from gguflora.engine.adapter_sets import BASE, AdapterSet, describe_set
    from gguflora.engine.engine import Engine
    from gguflora.engine.registry import LoadedAdapter
    from gguflora.engine.requests import Generation, Grammar, Piece, Request, Sampling, Timings, TokenLogprob, Usage
    from gguflora.engine.stats import ContextStats, EngineStats

__all__ = [
    "BASE",
    "AdapterSet",
    "ContextStats",
    "Engine",
    "EngineStats",
    "Generation",
    "Grammar",
    "LoadedAdapter",
    "Piece",
    "Request",
    "Sampling",
    "Timings",
    "TokenLogprob",
    "Usage",
    "describe_set",
]

_HOMES: Final = {
    "BASE": "gguflora.engine.adapter_sets",
    "AdapterSet": "gguflora.engine.adapter_sets",
    "ContextStats": "gguflora.engine.stats",
    "Engine": "gguflora.engine.engine",
    "EngineStats": "gguflora.engine.stats",
    "Generation": "gguflora.engine.requests",
    "Grammar": "gguflora.engine.requests",
    "LoadedAdapter": "gguflora.engine.registry",
    "Piece": "gguflora.engine.requests",
    "Request": "gguflora.engine.requests",
    "Sampling": "gguflora.engine.requests",
    "Timings": "gguflora.engine.requests",
    "TokenLogprob": "gguflora.engine.requests",
    "Usage": "gguflora.engine.requests",
    "describe_set": "gguflora.engine.adapter_sets",
}
"""The module of each public name."""

__getattr__ = lazy_face(__name__, _HOMES, "llama_cpp", MissingExtraError("the engine", "llama-cpp-python", "runtime"))
