"""State that the endpoints share: the engine, the settings, and the default scales of adapters."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request

from gguflora.engine import AdapterSet, Engine, LoadedAdapter
from gguflora.server.adapter_stats import AdapterStats
from gguflora.server.errors import Failure
from gguflora.server.metrics import Metrics
from gguflora.server.names import ModelNames
from gguflora.server.private_copies import PrivateCopies
from gguflora.server.schemas import LoraScale
from gguflora.server.settings import Settings


@dataclass(slots=True)
class Service:
    """The state of one server.

    Attributes:
        engine: the engine.
        base: file of the engine's weights.
        settings: limits and permissions.
        metrics: Prometheus metrics.
        adapter_stats: measures adapters.
        names: what the names of models stand for. POST /lora-adapters sets the scales of its default set, as in
            llama-server; unlike there, all adapters are off at first.
        copies: private copies of the adapters that clients have loaded.
        loading: names of the adapters that clients are loading; only the event loop changes it.
        created: start of the server in seconds since the epoch.
    """

    engine: Engine
    base: Path
    settings: Settings
    metrics: Metrics
    adapter_stats: AdapterStats
    names: ModelNames
    copies: PrivateCopies = field(default_factory=PrivateCopies)
    loading: set[str] = field(default_factory=set)
    created: int = field(default_factory=lambda: int(time.time()))

    def adapter_set(self, model: str | None, lora: Sequence[LoraScale] | None) -> AdapterSet:
        """Return the adapter set that a request names, with llama-server's ``lora`` or else with ``model``.

        Raises:
            AdapterNameError: if ``model`` names no adapter.
            Failure: if ``lora`` has an unknown id.
        """
        named = self.names.find(model)
        return named if lora is None else self.engine.adapter_set(list(self.by_id(lora).items()))

    def by_id(self, lora: Sequence[LoraScale]) -> dict[str, float]:
        """Return scales by adapter name; if an id is given twice, the last scale counts.

        Raises:
            Failure: if an id is unknown.
        """
        names = {adapter.id: adapter.name for adapter in self.engine.adapters()}
        for item in lora:
            if item.id not in names:
                known = ", ".join(map(str, sorted(names))) or "none"
                raise Failure(400, f"no adapter has the id {item.id}; known: {known}", "unknown_adapter", "lora")
        return {names[item.id]: item.scale for item in lora}

    def find(self, adapter_id: int) -> LoadedAdapter:
        """Return the loaded adapter with this id.

        Raises:
            Failure: if there is none.
        """
        for adapter in self.engine.adapters():
            if adapter.id == adapter_id:
                return adapter
        raise Failure(404, f"no adapter has the id {adapter_id}", "unknown_adapter")

    def folders(self) -> list[Path]:
        """Return the directories whose names clients must not learn."""
        files = [self.base, *(adapter.path for adapter in self.engine.adapters())]
        allowed = [] if self.settings.allow_load is None else [self.settings.allow_load]
        return [*allowed, *(file.parent for file in files)]


def service_of(request: Request) -> Service:
    """Return the service behind an endpoint, for FastAPI's ``Depends``."""
    service: Service = request.app.state.service
    return service


ServiceDep = Annotated[Service, Depends(service_of)]
"""The type of an endpoint's parameter that FastAPI fills with the service."""
