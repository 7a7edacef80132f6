"""A bounded number of contexts on one model, each with the adapter set that used it last."""

from __future__ import annotations

from collections.abc import Callable

from gguflora.engine.adapter_sets import AdapterSet
from gguflora.engine.context import Context
from gguflora.engine.registry import RegisteredAdapter, ResolvedSet
from gguflora.errors import EngineError
from gguflora.placement.prefix import Prefix
from gguflora.runtime.bindings import put_prefix


class ContextPool:
    """Contexts by adapter set; the one unused for longest is given to another set. For one thread.

    Attributes:
        contexts: all of them.
        saved_bytes: memory that KV cells of suspended requests may take outside of the contexts.
        swaps: how often a context was given to another set.
        names: of the set that each context has or last had.
    """

    def __init__(self, make: Callable[[], Context], max_contexts: int, max_kv_bytes: int | None) -> None:
        self._make = make
        self.names: dict[Context, AdapterSet] = {}
        self.contexts = [make()]
        self._most = max_contexts
        told = self.contexts[0].kv_bytes
        kv_bytes = self.saved_bytes = told or 0
        if max_kv_bytes is not None and told is None:
            self.close()
            raise EngineError("this llama.cpp does not tell how large a KV cache is, so max_kv_bytes cannot be kept")
        if max_kv_bytes is not None and kv_bytes:
            if kv_bytes > max_kv_bytes:
                self.close()
                raise EngineError(
                    f"one context needs {kv_bytes} bytes of KV cache, more than the {max_kv_bytes} allowed; lower n_ctx"
                )
            self._most = min(max_contexts, max_kv_bytes // kv_bytes)
            self.saved_bytes = min(kv_bytes, max_kv_bytes - self._most * kv_bytes)
        self.swaps = 0

    def context_of(self, adapters: ResolvedSet) -> Context | None:
        """The context with this set's ground, given to it if need be; None if all others are at work."""
        identity = adapters.base_phase.identity
        for context in self.contexts:
            if context.identity == identity:
                return context
        unused = self._unused()
        if unused is not None:
            self.swaps += 1
            unused.reset_to(identity)
            self.names[unused] = adapters.names
        return unused

    def _unused(self) -> Context | None:
        fresh = [context for context in self.contexts if context.identity is None and context.is_idle]
        if fresh:
            return fresh[0]
        if len(self.contexts) < self._most:
            self.contexts.append(self._make())
            return self.contexts[-1]
        idle = [context for context in self.contexts if context.is_idle]
        return min(idle, key=lambda context: context.used) if idle else None

    def try_prefix(self, prefix: Prefix) -> None:
        """Raise unless a context's cache can be given the keys and values of a soft prompt.

        Raises:
            UnsupportedAdapterError: if not.
        """
        context = self._make()
        try:
            put_prefix(context.pointer, prefix)
        finally:
            context.free()

    def drop(self, resident: RegisteredAdapter) -> None:
        """Take an adapter that no request uses out of all contexts."""
        for context in self.contexts:
            if context.knows(resident.adapter.generation):
                context.reset_to(None)
                self.names.pop(context, None)

    def close(self) -> None:
        """Free all contexts. Idempotent."""
        self.names.clear()
        while self.contexts:
            self.contexts.pop().free()
