"""Which adapter set the ``model`` of a request stands for, and which names a server lists."""

from __future__ import annotations

from contextlib import suppress
from typing import Final

from gguflora.engine import AdapterSet, Engine, describe_set
from gguflora.engine.adapter_sets import checked_scale
from gguflora.errors import AdapterNameError, RequestError, ServerError
from gguflora.server.settings import Settings

BASE_MODEL: Final = "base"
DEFAULT_MODEL: Final = "default"
"""Value of ``model`` in requests that use the default set, which POST /lora-adapters can change."""


def check_names(engine: Engine, settings: Settings) -> None:
    """Check that every adapter and alias can be reached by its name.

    Raises:
        ServerError: if one cannot, or if an alias or the default set names no adapter.
    """
    known = engine.adapter_names()
    if DEFAULT_MODEL in known:
        raise ServerError(
            f"no adapter can be named {DEFAULT_MODEL!r}: requests use this name for the server's default set; "
            "give the adapter another name with --lora NAME=PATH"
        )
    taken = {BASE_MODEL, DEFAULT_MODEL, *known}
    for alias in settings.aliases:
        if alias in taken or not alias.strip():
            raise ServerError(f"the alias {alias!r:.80} is the name of a model or adapter already; use another one")
    for text in filter(None, [settings.default_adapters, *settings.aliases.values()]):
        try:
            engine.adapter_set(text)
        except RequestError as error:
            raise ServerError(f"the adapter set {text!r:.80} cannot be served: {error}") from error


class ModelNames:
    """The names of one server's adapter sets.

    Args:
        engine: the engine with the adapters.
        settings: aliases, and what happens with unknown names.

    Attributes:
        scales: scales of the default set, by adapter name.
    """

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._aliases = settings.aliases
        self._accepts_any = settings.accept_any_model
        self.scales = dict(engine.adapter_set(settings.default_adapters)) if settings.default_adapters else {}

    def all(self) -> list[str]:
        """Return the names that ``/v1/models`` lists: the base, the adapters, the aliases."""
        return [BASE_MODEL, *self._engine.adapter_names(), *self._aliases]

    def forget(self, name: str) -> None:
        """Take an adapter out of the default set; the dict is replaced, because other threads may be reading it."""
        self.scales = {other: scale for other, scale in self.scales.items() if other != name}

    def default_set(self) -> AdapterSet:
        """Return the set of requests that name none, without adapters that have been unloaded."""
        known = [(name, scale) for name, scale in self.scales.items() if self._engine.knows(name)]
        return self._engine.adapter_set(known)

    def find(self, model: str | None) -> AdapterSet:
        """Return the adapter set of a request's ``model``.

        Raises:
            AdapterNameError: if no adapter has this name; the message lists those that have one.
            RequestError: if a scale is wrong.
        """
        if model is not None and model != DEFAULT_MODEL:
            try:
                return self._named(model)
            except RequestError as error:
                is_known = any(self._engine.knows(part.partition("@")[0].strip()) for part in model.split("+"))
                if not self._accepts_any or is_known:
                    raise self._with_names(error) from error
        return self.default_set()

    def of(self, model: str | None, adapters: AdapterSet) -> str:
        """Return the name of the set that answers a request: its ``model``, unless that stands for another set."""
        if model is not None and model != DEFAULT_MODEL:
            with suppress(RequestError):
                if self._named(model) == adapters:
                    return model
        return self.describe(adapters)

    def describe(self, adapters: AdapterSet) -> str:
        """Return the name of an adapter set: ``base``, ``legal``, ``legal@0.5+tone``."""
        scales = {each.name: checked_scale(each.name, each.scale) for each in self._engine.adapters()}
        return (
            "+".join(
                name if scale == scales.get(name, 1.0) else describe_set(((name, scale),)) for name, scale in adapters
            )
            or BASE_MODEL
        )

    def _named(self, model: str) -> AdapterSet:
        if model not in self._aliases:
            return self._engine.adapter_set(model)
        target = self._aliases[model]
        return self._engine.adapter_set(target) if target else self.default_set()

    def _with_names(self, error: RequestError) -> RequestError:
        if not isinstance(error, AdapterNameError):
            return error
        others = ", ".join(map(repr, [BASE_MODEL, *self._aliases]))
        return AdapterNameError(f"{error}; this server also answers to {others}")
