"""A limited number of contexts on one model, each assigned to the adapter set that used it last."""

from __future__ import annotations

from collections.abc import Callable

from gguflora.engine.adapter_sets import AdapterSet
from gguflora.engine.context import Context
from gguflora.engine.registry import RegisteredAdapter, ResolvedSet
from gguflora.errors import EngineError
from gguflora.placement.prefix import Prefix
from gguflora.runtime.bindings import put_prefix


class ContextPool:
    """Assigns contexts to adapter sets; a new set gets the least recently used idle context. Not thread-safe.

    Args:
        make: makes a context.
        max_contexts: largest number of contexts.
        max_kv_bytes: largest size of all KV caches in bytes; None for no limit.

    Attributes:
        contexts: the contexts made so far.
        saved_bytes: memory in bytes for the KV cells of suspended requests, outside of the contexts.
        swaps: number of times that a context was assigned to another set.
        names: current or last adapter set of each context.

    Raises:
        EngineError: if the limit is too small for one context.
    """

    def __init__(self, make: Callable[[], Context], max_contexts: int, max_kv_bytes: int | None) -> None:
        self._make = make
        self.names: dict[Context, AdapterSet] = {}
        self.contexts = [make()]
        self._max_contexts = max_contexts
        reported = self.contexts[0].kv_bytes
        kv_bytes = self.saved_bytes = reported or 0
        if max_kv_bytes is not None and reported is None:
            self.close()
            raise EngineError(
                "this llama.cpp does not report the size of a KV cache, so max_kv_bytes cannot be enforced"
            )
        if max_kv_bytes is not None and kv_bytes:
            if kv_bytes > max_kv_bytes:
                self.close()
                raise EngineError(
                    f"one context needs {kv_bytes} bytes of KV cache, more than the {max_kv_bytes} allowed; lower n_ctx"
                )
            self._max_contexts = min(max_contexts, max_kv_bytes // kv_bytes)
            self.saved_bytes = min(kv_bytes, max_kv_bytes - self._max_contexts * kv_bytes)
        self.swaps = 0

    def context_of(self, adapters: ResolvedSet) -> Context | None:
        """Return the context of this set, assigning one if necessary; None if all contexts are busy with others."""
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
        if len(self.contexts) < self._max_contexts:
            self.contexts.append(self._make())
            return self.contexts[-1]
        idle = [context for context in self.contexts if context.is_idle]
        return min(idle, key=lambda context: context.used) if idle else None

    def try_prefix(self, prefix: Prefix) -> None:
        """Check that the keys and values of a soft prompt can be written to a context's cache.

        Raises:
            UnsupportedAdapterError: if they cannot.
        """
        context = self._make()
        try:
            put_prefix(context.pointer, prefix)
        finally:
            context.free()

    def drop(self, registered: RegisteredAdapter) -> None:
        """Remove an adapter that no request uses from all contexts."""
        for context in self.contexts:
            if context.knows(registered.adapter.load_id):
                context.reset_to(None)
                self.names.pop(context, None)

    def close(self) -> None:
        """Free all contexts. Idempotent."""
        self.names.clear()
        while self.contexts:
            self.contexts.pop().free()
