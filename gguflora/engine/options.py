"""Check the options of an engine."""

from __future__ import annotations

from gguflora.engine.context import KV_TYPES, Context, ContextOptions
from gguflora.errors import EngineError
from gguflora.system.cpus import usable_cpus


def check_kv_bytes(context: Context, limit: int | None) -> None:
    """Check that the KV cache of a context has at most ``limit`` bytes; free the context if it has more.

    Raises:
        EngineError: if it has more, or if llama.cpp does not tell.
    """
    if limit is None or context.kv_bytes == 0:
        return
    if context.kv_bytes is None:
        context.free()
        raise EngineError("this llama.cpp does not report the size of a KV cache, so max_kv_bytes cannot be enforced")
    if context.kv_bytes > limit:
        context.free()
        raise EngineError(
            f"the context needs {context.kv_bytes} bytes of KV cache, more than the {limit} allowed; lower n_ctx"
        )


def context_options(n_ctx: int, n_parallel: int, n_batch: int, threads: int | None, kv_type: str) -> ContextOptions:
    """Return the options of an engine's context; by default one processor is left to other threads.

    Raises:
        EngineError: if a number is out of range, or there is no such ``kv_type``.
    """
    expect("n_ctx", n_ctx, 1, 1 << 24)
    expect("n_parallel", n_parallel, 1, 256)
    expect("n_batch", n_batch, 1, 1 << 16)
    if threads is not None:
        expect("threads", threads, 1, 1024)
    if kv_type not in KV_TYPES:
        raise EngineError(f"kv_type is {kv_type!r:.80}, expected one of {', '.join(KV_TYPES)}")
    spare_one = max(usable_cpus() - 1, 1)
    return ContextOptions(n_ctx, n_parallel, max(n_batch, n_parallel), threads or spare_one, kv_type)


def expect(name: str, value: int, low: int, high: int) -> None:
    """Check an option that is a whole number.

    Raises:
        EngineError: if it is not between ``low`` and ``high``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise EngineError(f"{name} is {value!r:.80}, expected a whole number from {low} to {high}")
