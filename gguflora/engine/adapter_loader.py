"""Load the adapters of an engine into llama.cpp, and free them after their last request."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from gguflora.adapters.soft_prompt import is_soft_prompt, read_soft_prompt
from gguflora.architectures.base_model import BaseModel
from gguflora.engine.context import Context, ContextOptions
from gguflora.engine.embedding import Embedder
from gguflora.engine.model import Model
from gguflora.engine.registry import AdapterRegistry, LoadedAdapter, RegisteredAdapter, ResolvedSet
from gguflora.engine.scheduler import Scheduler
from gguflora.engine.texts import check_length
from gguflora.errors import EngineClosedError, HotSwapError
from gguflora.placement.prefix import Prefix, fit_prefix
from gguflora.runtime.adapter_files import AdapterReading, AdapterSource
from gguflora.runtime.bindings import Pointer, free_lora, invocation_of, load_lora, put_prefix
from gguflora.runtime.concatenated_adapters import ConcatenatedAdapters
from gguflora.runtime.mixed_adapters import MixedAdapters


@dataclass(frozen=True, slots=True)
class Order:
    """An adapter that is to be loaded.

    Attributes:
        location: a GGUF LoRA file or PEFT directory.
        number: its id.
        name: its name.
        load_id: number of loads before.
        scale: scale in adapter sets that do not give one.
        task: number of the task of a MULTITASK_PROMPT_TUNING adapter.
        reading: how its files are read.
    """

    location: Path
    number: int
    name: str
    load_id: int
    scale: float
    task: int | None
    reading: AdapterReading


class AdapterFiles:
    """The files of loaded adapters, which are read again as they were read first.

    Args:
        base: the base model.
        reading: how adapters are read that no other way is noted for.
    """

    def __init__(self, base: BaseModel, reading: AdapterReading) -> None:
        self.base = base
        self.reading = reading
        self._others: dict[Path, AdapterReading] = {}

    def open(self, location: Path, reading: AdapterReading) -> AdapterSource:
        """Return the GGUF LoRA file of an adapter, converted if need be."""
        return reading.open(location, self.base)

    def note(self, location: Path, reading: AdapterReading) -> None:
        """Note how a loaded adapter was read."""
        if reading == self.reading:
            self._others.pop(location, None)
        else:
            self._others[location] = reading

    def lora_file(self, location: Path) -> Path:
        """Return the GGUF LoRA file of a loaded adapter."""
        return self.open(location, self._others.get(location, self.reading)).file


@dataclass(slots=True)
class AdapterLoader:
    """Loads and frees the adapters of one model. All calls into llama.cpp are made in the scheduler's thread.

    Attributes:
        model: the model.
        options: options of the engine's context.
        files: opens adapters.
        registry: knows the loaded adapters and their users.
        scheduler: owns the thread and the context.
        mixed: decodes different adapters in one batch.
        concatenated: applies large sets.
        embedder: embeds texts under adapters.
    """

    model: Model
    options: ContextOptions
    files: AdapterFiles
    registry: AdapterRegistry
    scheduler: Scheduler
    mixed: MixedAdapters
    concatenated: ConcatenatedAdapters
    embedder: Embedder
    _is_prepared: bool = field(default=False, init=False)

    def load(self, order: Order) -> RegisteredAdapter:
        """Load an adapter; it is not in the registry yet.

        Raises:
            GgufloraError: if it cannot be loaded; see `gguflora.engine.Engine.load`.
        """
        if order.location.is_dir() and is_soft_prompt(order.location):
            return self._load_soft_prompt(order)
        return self._load_lora(order)

    def prepare(self) -> None:
        """Prepare to mix the adapters loaded so far, and each one from now on when it is loaded."""
        self._is_prepared = True
        self.scheduler.call(lambda: self.mixed.prepare(self.options.n_parallel))

    def _load_lora(self, order: Order) -> RegisteredAdapter:
        if order.task is not None:
            raise HotSwapError(f"{order.location}: is not a soft prompt, so it has no task {order.task}")
        source = self.files.open(order.location, order.reading)
        pointer = self.scheduler.call(lambda: self._load_pointer(source.file))
        self.files.note(order.location, order.reading)
        adapter = LoadedAdapter(
            order.number,
            order.name,
            order.location,
            source.sha256,
            source.size,
            source.method,
            order.load_id,
            order.scale,
            source.warnings,
        )
        return RegisteredAdapter(adapter, pointer, invocation=invocation_of(pointer))

    def _load_pointer(self, file: Path) -> Pointer:
        """Load a LoRA, and prepare to mix it with those loaded already."""
        pointer = load_lora(self.model.pointer, file)
        if self.mixed.add(pointer, file) and self._is_prepared:
            self.mixed.prepare(self.options.n_parallel)
        return pointer

    def _load_soft_prompt(self, order: Order) -> RegisteredAdapter:
        """Read a soft prompt and check that it fits."""
        prompt = read_soft_prompt(order.location, order.task)
        prefix = fit_prefix(prompt, self.files.base)
        check_length(prefix.n_tokens, self.options.n_ctx)
        if prefix.embeddings is None:
            self.scheduler.call(lambda: self._try_prefix(prefix))
        size = prompt.path.stat().st_size
        adapter = LoadedAdapter(
            order.number,
            order.name,
            order.location,
            prompt.sha256,
            size,
            prompt.method,
            order.load_id,
            order.scale,
        )
        return RegisteredAdapter(adapter, None, prefix)

    def _try_prefix(self, prefix: Prefix) -> None:
        """Raise unless the keys and values of a soft prompt can be written to a context's cache."""
        context = Context(self.model, self.options, self.concatenated)
        try:
            put_prefix(context.pointer, prefix)
        finally:
            context.free()

    def forget(self, registered: RegisteredAdapter) -> None:
        """Free an adapter that has been removed, unless requests still use it: the last of them will free it."""
        self.scheduler.call(lambda: None if registered.users else self._free(registered))

    def give_back(self, taken: ResolvedSet) -> None:
        """Call `release` in the scheduler's thread."""
        with suppress(EngineClosedError):  # closing frees everything anyway
            self.scheduler.call(lambda: self.release(taken))

    def release(self, taken: ResolvedSet) -> None:
        """End the use of a set by a request, in the scheduler's thread; free what nobody can use any more."""
        for registered in self.registry.give_back(taken):
            self._free(registered)

    def _free(self, registered: RegisteredAdapter) -> None:
        """Free an adapter that no request uses, in the scheduler's thread; do nothing the second time.

        The last request may end between the removal and `forget`, and then both free it.
        """
        if registered.freed:
            return
        registered.freed = True
        self.scheduler.context.drop(registered.adapter.load_id)
        self.embedder.forget_adapters()
        self.mixed.drop(registered.pointer)
        self.concatenated.drop(registered.adapter.sha256)
        free_lora(registered.pointer)

    def close(self) -> None:
        """Free everything but the model, after the scheduler is closed."""
        self.scheduler.context.free()
        self.embedder.free()
        self.mixed.close()
        self.concatenated.free()
        for registered in self.registry.all():
            free_lora(self.registry.remove(registered.adapter.name).pointer)
