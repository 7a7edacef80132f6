"""Hot-swapping: load, apply, rescale and remove adapters of a running ``llama_cpp.Llama``.

    adapters = gguflora.attach(llm)
    adapters.load("legal", "legal.gguf")
    adapters.apply(legal=0.75)
    llm("Dear Sir")                        # answers with the adapter
    with adapters.using(legal=1.0, tone=-0.5):
        ...
    adapters.close()                       # the base model again

Changing the set forgets the tokens evaluated so far (``llm.n_tokens`` is 0): none of them may answer for another set.
"""

from __future__ import annotations

import math
import numbers
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gguflora.adapters.soft_prompt import is_soft_prompt
from gguflora.architectures.base_model import BaseModel, read_whole_base
from gguflora.errors import GgufloraError, HotSwapError, MissingExtraError
from gguflora.files.checksum import sha256_of
from gguflora.files.remote import remote_inputs
from gguflora.placement.prefix import read_prefix
from gguflora.runtime.adapter_files import open_adapter

if TYPE_CHECKING:
    from gguflora.runtime.adapter_set import AttachedSet
    from gguflora.runtime.bindings import HotAdapter


def attach(llm: Any) -> Adapters:  # noqa: ANN401  (llama_cpp is imported only where it is used, and has no types)
    """Adapters of ``llm``, a ``llama_cpp.Llama``; attached twice, the same ones.

    The adapter of ``Llama(lora_path=...)`` is taken over under the file's stem, loaded and active with its scale.

    Raises:
        HotSwapError: if ``llm`` is no open Llama.
        MissingExtraError: if llama-cpp-python is not installed.
    """
    try:
        import llama_cpp  # noqa: PLC0415  (import gguflora does not load it)

        from gguflora.runtime import guarded_llama, llama_internals  # noqa: PLC0415
        from gguflora.runtime.adapter_set import AttachedSet  # noqa: PLC0415
        from gguflora.runtime.concatenated_adapters import ConcatenatedAdapters  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtraError("hot-swapping", "llama-cpp-python", "runtime") from error
    if not isinstance(llm, llama_cpp.Llama):
        raise HotSwapError(f"attach needs a llama_cpp.Llama, found {type(llm).__name__}")
    llama_internals.check_internals(llm)
    if not llama_internals.is_open(llm):
        raise HotSwapError("attach needs an open Llama; this one is closed")
    before = guarded_llama.attached_set(llm)
    if before is not None and not before.closed:
        return Adapters(llm, before)
    base = cache(partial(read_whole_base, Path(llm.model_path)))
    fused = ConcatenatedAdapters(
        llm.model, llm.metadata.get("general.architecture", ""), lambda path: open_adapter(path, base()).file
    )
    adapters = AttachedSet(*llama_internals.wrappers_of(llm), fused)
    _adopt(llm, adapters, active=before is None)
    guarded_llama.guard(llm, adapters)
    return Adapters(llm, adapters)


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
    except OSError:  # the file has gone since: like no other
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
    """The adapters of one ``llama_cpp.Llama``, made by `attach`; a context manager that closes them.

    A change of the adapter set (`apply`, `remove`, `unload`, `using`) forgets the tokens evaluated so far, unless the
    new set is equal to the one in force (same files, same scales). Entries of ``llm.set_cache`` are kept apart by set.
    A state from ``llm.save_state`` can be loaded under its own set only, and ``llm.generate`` cannot go on across a
    change: both raise `HotSwapError`. After `close` nothing is checked any more.

    Calls from several threads take turns: one call or generation at a time uses the Llama, the others wait. A
    generation whose adapters another thread changes between its tokens raises `HotSwapError` when it goes on.

    Closing the Llama frees its adapters first; a method called after that, or after `close`, raises `HotSwapError`.
    """

    def __init__(self, llm: Any, adapters: AttachedSet) -> None:  # noqa: ANN401
        self._llm = llm
        self._set = adapters
        self._base: BaseModel | None = None

    @property
    def active(self) -> dict[str, float]:
        """Scale of each adapter that is applied; those at scale 0 are not."""
        return dict(self._set.active)

    @property
    def loaded(self) -> list[str]:
        """Names of the loaded adapters, in the order of loading."""
        return list(self._set.loaded)

    @remote_inputs(path="adapter")
    def load(self, name: str, path: str | os.PathLike[str], *, task: int | None = None) -> None:
        """Load an adapter without applying it.

        Args:
            name: what to call it from now on.
            path: a GGUF LoRA file, or a PEFT directory: a soft prompt is read, anything else is converted first.
            task: which task of a MULTITASK_PROMPT_TUNING adapter; may be left out where there is one.

        Raises:
            HotSwapError: if the name is taken, or the adapter does not fit the base, or llama.cpp refuses it or would
                abort.
            GgufError: if the adapter is damaged, or the file of the base cannot be read any more.
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
            raise HotSwapError(f"{location}: is no soft prompt, so it has no task {task}")
        source = open_adapter(location, self._base)
        pointer = load_lora(self._llm.model, source.file)
        return HotAdapter(name, source.sha256, pointer, location, invocation=invocation_of(pointer))

    def apply(self, scales: Mapping[str, float] | None = None, /, **more: float) -> None:
        """Make these adapters, each at its scale, the complete set; without arguments the base model answers.

        Negative scales are allowed, 0 means off. A soft prompt is on (1) or off (0), and only one can be on. If this
        raises, the set before stays in force.

        Raises:
            HotSwapError: if a name is unknown or given twice, or a scale is no finite number.
        """
        with self._open() as adapters:
            active = _checked_scales(scales, more, adapters)
            _check_soft_prompts({name: scale for name, scale in active.items() if adapters.loaded[name].prefix})
            self._change(active)

    def remove(self, name: str) -> None:
        """Take an adapter out of the set; it stays loaded.

        Raises:
            HotSwapError: if no adapter of this name is loaded.
        """
        with self._open() as adapters:
            _find(name, adapters)
            self._change({other: scale for other, scale in adapters.active.items() if other != name})

    def unload(self, name: str) -> None:
        """Take an adapter out of the set and free it.

        Raises:
            HotSwapError: if no adapter of this name is loaded.
        """
        with self._open() as adapters:
            self.remove(name)
            adapters.free(name)

    @contextmanager
    def using(self, scales: Mapping[str, float] | None = None, /, **more: float) -> Iterator[Adapters]:
        """`apply` for the length of a ``with`` block; the set before is back afterwards, whatever happens inside.

        Adapters of the set before that were unloaded inside the block do not come back.
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
        """Unset and free all adapters: ``llm`` is the base model again. Idempotent, also after ``llm.close()``."""
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

        before = self._set.active
        if not self._set.set_active(active):
            return
        self._forget()
        prefix = self._set.prefix
        if prefix is None:
            return
        try:
            self._set.set_started(frozenset())  # an activated LoRA does not compute the soft prompt
            bindings.put_prefix(self._llm.ctx, prefix)
        except GgufloraError:
            self._set.set_active(before)
            self._forget()
            raise

    def _forget(self) -> None:
        """Forget the tokens evaluated so far."""
        from gguflora.runtime.bindings import clear_memory  # noqa: PLC0415
        from gguflora.runtime.llama_internals import set_room  # noqa: PLC0415

        clear_memory(self._llm.ctx, self._llm.n_vocab())
        self._llm.reset()
        prefix = self._set.prefix
        set_room(self._llm, self._llm.n_ctx() - (prefix.n_tokens if prefix else 0))


def _check_new_name(name: str, adapters: AttachedSet) -> None:
    if not isinstance(name, str) or not name:
        raise HotSwapError(f"the name of an adapter is a non-empty string, found {name!r}")
    if name in adapters.loaded:
        raise HotSwapError(f"an adapter named {name!r} is loaded already; unload it first, or take another name")


def _find(name: str, adapters: AttachedSet) -> HotAdapter:
    try:
        return adapters.loaded[name]
    except (KeyError, TypeError):
        known = ", ".join(map(repr, adapters.loaded)) or "none"
        raise HotSwapError(f"no adapter named {name!r} is loaded; loaded: {known}") from None


def _checked_scales(
    scales: Mapping[str, float] | None, more: Mapping[str, float], adapters: AttachedSet
) -> dict[str, float]:
    """Names and scales of the adapters to switch on."""
    if scales is not None and not isinstance(scales, Mapping):
        raise HotSwapError(f"apply needs scales by name, such as {{'legal': 0.75}} or legal=0.75, found {scales!r:.80}")
    first = dict(scales or {})
    twice = sorted(first.keys() & more.keys())
    if twice:
        raise HotSwapError(f"the scale of {twice[0]!r} is given twice")
    wanted = {**first, **more}
    for name, scale in wanted.items():
        _find(name, adapters)
        _check_scale(name, scale)
    return {name: float(scale) for name, scale in wanted.items() if _is_on(scale)}


def _check_soft_prompts(scales: Mapping[str, float]) -> None:
    for name, scale in scales.items():
        if scale != 1:
            raise HotSwapError(f"{name!r} is a soft prompt, which is on (1) or off (0); found the scale {scale:g}")
    if len(scales) > 1:
        raise HotSwapError(f"only one soft prompt can precede the prompt, found {', '.join(map(repr, scales))}")


def _check_prefix_fits(location: Path, n_tokens: int, n_ctx: int) -> None:
    if n_tokens >= n_ctx:
        raise HotSwapError(
            f"{location}: a soft prompt of {n_tokens} tokens does not fit into the context of {n_ctx}; open the model "
            "with a larger n_ctx"
        )


def _check_scale(name: str, scale: float) -> None:
    if not isinstance(scale, numbers.Real) or isinstance(scale, bool) or not math.isfinite(_as_float32(scale)):
        raise HotSwapError(
            f"the scale of {name!r} is {scale!r:.80}, expected a finite number that a 32-bit float can hold"
        )


def _is_on(scale: float) -> bool:
    return _as_float32(scale) != 0


def _as_float32(scale: float) -> float:
    """What llama.cpp makes of a scale."""
    try:
        with np.errstate(over="ignore"):
            return float(np.float32(float(scale)))
    except OverflowError:  # an int larger than any float
        return math.inf
