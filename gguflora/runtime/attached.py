"""Hot-swapping: load, apply, rescale and remove adapters of a running ``llama_cpp.Llama``.

::

    adapters = gguflora.attach(llm)
    adapters.load("legal", "legal.gguf")
    adapters.apply(legal=0.75)
    llm("Dear Sir")                        # answers with the adapter
    with adapters.using(legal=1.0, tone=-0.5):
        ...
    adapters.close()                       # the base model again

A change of the adapter set discards the tokens evaluated so far (``llm.n_tokens`` becomes 0), because their keys and
values were computed with other adapters.
"""

from __future__ import annotations

import logging
import math
import numbers
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from gguflora.adapters.soft_prompt import is_soft_prompt
from gguflora.architectures.base_model import BaseModel, read_whole_base
from gguflora.errors import GgufloraError, HotSwapError, MissingExtraError
from gguflora.files.checksum import sha256_of
from gguflora.files.remote import remote_inputs
from gguflora.placement.prefix import read_prefix
from gguflora.runtime.adapter_files import AdapterReading

if TYPE_CHECKING:
    from gguflora.runtime.adapter_set import AttachedSet
    from gguflora.runtime.bindings import HotAdapter

_LOG: Final = logging.getLogger(__name__)


def attach(
    llm: Any,  # noqa: ANN401  (llama_cpp is imported only where it is used, and has no types)
    *,
    text_only: bool = False,
    trust_names: bool = False,
    chat_template: str | None = None,
) -> Adapters:
    """Make the adapters of a ``llama_cpp.Llama`` swappable; a second call returns the same set of adapters.

    An adapter given as ``Llama(lora_path=...)`` becomes a loaded adapter named after its file's stem, active at its
    scale.

    Args:
        llm: an open ``llama_cpp.Llama``.
        text_only: take only the part of a multimodal model's adapters that changes the language model; what is left
            out is logged.
        trust_names: apply adapters by name and shape where the order of a tensor's rows is not known.
        chat_template: what ``create_chat_completion`` renders chats with: ``base``, ``adapter`` (the template in the
            directory of the applied adapters) or a template in Jinja. None takes the template of a directory while it
            is the only applied adapter, if it differs from the base's, and logs it.

    Raises:
        HotSwapError: if ``llm`` is not an open Llama, or its version of llama-cpp-python lacks what is needed.
        MissingExtraError: if llama-cpp-python is not installed.
    """
    try:
        import llama_cpp  # noqa: PLC0415  (import gguflora does not load it)

        from gguflora.runtime import guarded_llama, llama_internals  # noqa: PLC0415
        from gguflora.runtime.adapter_set import AttachedSet  # noqa: PLC0415
        from gguflora.runtime.concatenated_adapters import ConcatenatedAdapters  # noqa: PLC0415
    except (ImportError, AttributeError) as error:
        raise _without_llama_cpp(error) from error
    if not isinstance(llm, llama_cpp.Llama):
        raise HotSwapError(f"attach needs a llama_cpp.Llama, found {type(llm).__name__}")
    llama_internals.check_internals(llm)
    if not llama_internals.is_open(llm):
        raise HotSwapError("attach needs an open Llama; this one is closed")
    before, reading = guarded_llama.attached_set(llm), AdapterReading(text_only, trust_names)
    if before is not None and not before.closed:
        if chat_template is not None:
            before.template = chat_template
            Adapters(llm, before, reading)._follow_template()
        return Adapters(llm, before, reading)
    base = cache(partial(read_whole_base, Path(llm.model_path)))
    concatenated = ConcatenatedAdapters(
        llm.model, llm.metadata.get("general.architecture", ""), lambda path: reading.open(path, base()).file
    )
    adapters = AttachedSet(*llama_internals.wrappers_of(llm), concatenated)
    adapters.template = chat_template
    try:
        _adopt(llm, adapters, active=before is None)
        guarded_llama.guard(llm, adapters)
    except AttributeError as error:
        raise _without_llama_cpp(error) from error
    attached = Adapters(llm, adapters, reading)
    attached._follow_template()
    return attached


def _without_llama_cpp(error: Exception) -> GgufloraError:
    """Return the error for a llama-cpp-python that is not installed, or lacks what is used of it, such as a fork."""
    if isinstance(error, ModuleNotFoundError) and error.name == "llama_cpp":
        return MissingExtraError("hot-swapping", "llama-cpp-python", "runtime")
    return HotSwapError(
        f"this llama-cpp-python lacks something that hot-swapping needs: {error}; "
        "0.3.36 is known to work: pip install 'llama-cpp-python==0.3.36'"
    )


def _adopt(llm: Any, adapters: AttachedSet, *, active: bool) -> None:  # noqa: ANN401
    """Take over the adapter of ``Llama(lora_path=...)``, which the Llama frees itself."""
    from gguflora.runtime.bindings import HotAdapter, clear_memory, invocation_of  # noqa: PLC0415
    from gguflora.runtime.llama_internals import own_adapter  # noqa: PLC0415

    pointer = own_adapter(llm)
    if not pointer:
        return
    path = Path(llm.lora_path)
    try:
        sha256 = sha256_of(path)
    except OSError:  # the file is gone: treat the adapter as different from every other
        sha256 = uuid.uuid4().hex
    invocation = invocation_of(pointer)
    adapters.loaded[path.stem] = HotAdapter(path.stem, sha256, pointer, path, owned=False, invocation=invocation)
    if active and _is_on(llm.lora_scale):
        adapters.set_active({path.stem: float(llm.lora_scale)})
        adapters.origin = f"whole {sha256}" if invocation else adapters.identity
        if invocation:  # llama-cpp-python let it begin at the first token
            clear_memory(llm.ctx, llm.n_vocab())
            llm.reset()


class Adapters:
    """The adapters of one ``llama_cpp.Llama``, made by `attach`. As a context manager it closes them on exit.

    A change of the adapter set (`apply`, `remove`, `unload`, `using`) discards the tokens evaluated so far, unless the
    new set equals the current one (same files, same scales). ``llm.set_cache`` keeps separate entries for each set. A
    state from ``llm.save_state`` can be loaded only under the set it was saved with, and ``llm.generate`` cannot
    continue after a change: both raise `HotSwapError`. After `close` these checks end.

    Threads take turns: one call or one generation uses the Llama, the others wait. If another thread changes the
    adapters between two tokens of a generation, the generation raises `HotSwapError` when it continues.

    Closing the Llama frees its adapters first. A method called after that, or after `close`, raises `HotSwapError`.
    """

    def __init__(self, llm: Any, adapters: AttachedSet, reading: AdapterReading = AdapterReading()) -> None:  # noqa: ANN401, B008
        self._llm = llm
        self._reading = reading
        self._set = adapters
        self._base: BaseModel | None = None

    @property
    def active(self) -> dict[str, float]:
        """Scale of each applied adapter, by name. An adapter at scale 0 is not applied."""
        return dict(self._set.active)

    @property
    def loaded(self) -> list[str]:
        """Names of the loaded adapters, in the order of loading."""
        return list(self._set.loaded)

    @remote_inputs(path="adapter")
    def load(self, name: str, path: str | os.PathLike[str], *, task: int | None = None) -> None:
        """Load an adapter without applying it.

        Args:
            name: name of the adapter in later calls.
            path: a GGUF LoRA file, or a PEFT directory: a soft prompt is read, any other adapter is converted first.
            task: number of the task of a MULTITASK_PROMPT_TUNING adapter; optional if it has only one.

        Raises:
            HotSwapError: if the name is taken, the adapter does not fit the base, or llama.cpp refuses it or would
                abort.
            GgufError: if the adapter is damaged, or the base's file can no longer be read.
            AdapterError, ArchitectureError, MismatchError: if the PEFT directory cannot be converted for this base.
        """
        location = Path(path)
        with self._open() as adapters:
            _check_new_name(name, adapters)
            adapters.loaded[name] = self._load(name, location, task)

    def _load(self, name: str, location: Path, task: int | None) -> HotAdapter:
        from gguflora.runtime.bindings import HotAdapter, invocation_of, load_lora  # noqa: PLC0415

        if self._base is None:
            self._base = read_whole_base(Path(self._llm.model_path))
        if location.is_dir() and is_soft_prompt(location):
            prefix = read_prefix(location, self._base, task)
            _check_prefix_fits(location, prefix.n_tokens, self._llm.n_ctx())
            return HotAdapter(name, prefix.sha256, None, location, prefix=prefix)
        if task is not None:
            raise HotSwapError(f"{location}: is not a soft prompt, so it has no task {task}")
        source = self._reading.open(location, self._base)
        for text in source.warnings:
            _LOG.warning("%s: %s", name, text)
        pointer = load_lora(self._llm.model, source.file)
        return HotAdapter(name, source.sha256, pointer, location, invocation=invocation_of(pointer))

    def apply(self, scales: Mapping[str, float] | None = None, /, **more: float) -> None:
        """Apply exactly these adapters, each at its scale; without arguments, no adapter.

        Negative scales are allowed, and 0 means off. A soft prompt is on (1) or off (0), and only one can be on. If
        this raises, the previous set stays applied.

        Args:
            scales: scale by adapter name, for names that are not Python identifiers.
            **more: scales of further adapters, by name.

        Raises:
            HotSwapError: if a name is unknown or given twice, or a scale is not a finite number.
        """
        with self._open() as adapters:
            active = _checked_scales(scales, more, adapters)
            _check_soft_prompts({name: scale for name, scale in active.items() if adapters.loaded[name].prefix})
            self._change(active)

    def remove(self, name: str) -> None:
        """Stop applying an adapter; it stays loaded.

        Raises:
            HotSwapError: if no adapter of this name is loaded.
        """
        with self._open() as adapters:
            _find(name, adapters)
            self._change({other: scale for other, scale in adapters.active.items() if other != name})

    def unload(self, name: str) -> None:
        """Stop applying an adapter and free it.

        Raises:
            HotSwapError: if no adapter of this name is loaded.
        """
        with self._open() as adapters:
            self.remove(name)
            adapters.free(name)

    @contextmanager
    def using(self, scales: Mapping[str, float] | None = None, /, **more: float) -> Iterator[Adapters]:
        """`apply` the adapters for the length of a ``with`` block, and apply the previous set at its end.

        The previous set returns even if the block raises, except for adapters that the block has unloaded.
        """
        with self._open() as adapters:
            before = {name: (adapters.loaded[name], scale) for name, scale in adapters.active.items()}
            self.apply(scales, **more)
        try:
            yield self
        finally:
            with adapters.lock:
                if not adapters.closed and self._llm.ctx is not None:
                    self._change(
                        {
                            name: scale
                            for name, (adapter, scale) in before.items()
                            if adapters.loaded.get(name) is adapter
                        }
                    )

    def close(self) -> None:
        """Free all adapters, so that ``llm`` is the base model again. Idempotent, also after ``llm.close()``."""
        from gguflora.runtime import guarded_llama  # noqa: PLC0415

        with self._set.lock:
            identity = self._set.identity
            self._set.release()
            if self._set.identity != identity:
                self._forget()
            if guarded_llama.attached_set(self._llm) is self._set:
                guarded_llama.unguard(self._llm)

    def __enter__(self) -> Adapters:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        from gguflora.runtime.adapter_set import describe  # noqa: PLC0415

        state = (
            "closed"
            if self._set.closed
            else f"active: {describe(self._set.active)}; loaded: {', '.join(self.loaded) or 'none'}"
        )
        return f"<gguflora.Adapters {state}>"

    @contextmanager
    def _open(self) -> Iterator[AttachedSet]:
        with self._set.lock:
            if self._set.closed or self._llm.ctx is None:
                raise HotSwapError("these adapters are closed, or their Llama is; attach to an open Llama again")
            yield self._set

    def _change(self, active: Mapping[str, float]) -> None:
        from gguflora.runtime import bindings  # noqa: PLC0415

        before, handler = self._set.active, self._handler_for(active)
        changed = self._set.set_active(active)
        self._set.chat_handler = handler
        if not changed:
            return
        self._forget()
        prefix = self._set.prefix
        if prefix is None:
            return
        try:
            self._set.set_started(frozenset())  # activated LoRAs must not take part in computing the soft prompt
            bindings.put_prefix(self._llm.ctx, prefix)
        except GgufloraError:
            self._set.set_active(before)
            self._set.chat_handler = self._handler_for(before)
            self._forget()
            raise

    def _follow_template(self) -> None:
        self._set.chat_handler = self._handler_for(self._set.active)

    def _handler_for(self, active: Mapping[str, float]) -> Any:  # noqa: ANN401
        """Return what answers chats under these adapters; None if the Llama itself does."""
        from gguflora.runtime.attached_template import handler_of  # noqa: PLC0415

        paths = [self._set.loaded[name].path for name in active]
        return handler_of(self._llm, self._set.template, [path for path in paths if path is not None])

    def _forget(self) -> None:
        """Discard the tokens evaluated so far."""
        from gguflora.runtime.bindings import clear_memory  # noqa: PLC0415
        from gguflora.runtime.llama_internals import set_room  # noqa: PLC0415

        clear_memory(self._llm.ctx, self._llm.n_vocab())
        self._llm.reset()
        prefix = self._set.prefix
        set_room(self._llm, self._llm.n_ctx(), prefix.n_tokens if prefix else 0)


def _check_new_name(name: str, adapters: AttachedSet) -> None:
    if not isinstance(name, str) or not name:
        raise HotSwapError(f"the name of an adapter must be a non-empty string, found {name!r}")
    if name in adapters.loaded:
        raise HotSwapError(f"an adapter named {name!r} is loaded already; unload it first, or use another name")


def _find(name: str, adapters: AttachedSet) -> HotAdapter:
    try:
        return adapters.loaded[name]
    except (KeyError, TypeError):
        known = ", ".join(map(repr, adapters.loaded)) or "none"
        raise HotSwapError(f"no adapter named {name!r} is loaded; loaded: {known}") from None


def _checked_scales(
    scales: Mapping[str, float] | None, more: Mapping[str, float], adapters: AttachedSet
) -> dict[str, float]:
    """Return the scales of the adapters to apply, by name, without those at scale 0."""
    if scales is not None and not isinstance(scales, Mapping):
        raise HotSwapError(f"apply needs scales by name, such as {{'legal': 0.75}} or legal=0.75, found {scales!r:.80}")
    first = dict(scales or {})
    repeated = sorted(first.keys() & more.keys())
    if repeated:
        raise HotSwapError(f"the scale of {repeated[0]!r} is given twice")
    requested = {**first, **more}
    for name, scale in requested.items():
        _find(name, adapters)
        _check_scale(name, scale)
    return {name: float(scale) for name, scale in requested.items() if _is_on(scale)}


def _check_soft_prompts(scales: Mapping[str, float]) -> None:
    for name, scale in scales.items():
        if scale != 1:
            raise HotSwapError(f"{name!r} is a soft prompt, which is on (1) or off (0); found the scale {scale:g}")
    if len(scales) > 1:
        raise HotSwapError(f"only one soft prompt can be applied at once, found {', '.join(map(repr, scales))}")


def _check_prefix_fits(location: Path, n_tokens: int, n_ctx: int) -> None:
    if n_tokens >= n_ctx:
        raise HotSwapError(
            f"{location}: a soft prompt of {n_tokens} tokens does not fit into the context of {n_ctx} tokens; open the "
            "model with a larger n_ctx"
        )


def _check_scale(name: str, scale: float) -> None:
    if not isinstance(scale, numbers.Real) or isinstance(scale, bool) or not math.isfinite(_as_float32(scale)):
        raise HotSwapError(
            f"the scale of {name!r} is {scale!r:.80}, expected a finite number that a 32-bit float can hold"
        )


def _is_on(scale: float) -> bool:
    return _as_float32(scale) != 0


def _as_float32(scale: float) -> float:
    """Round a scale as llama.cpp does; infinite if a 32-bit float cannot hold it."""
    try:
        with np.errstate(over="ignore"):
            return float(np.float32(float(scale)))
    except OverflowError:  # an int larger than any float
        return math.inf
