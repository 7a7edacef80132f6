"""What the endpoints share: the engine, its limits, and the adapter set of requests that name none."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fastapi import Request

from gguflora.engine import AdapterSet, Engine, LoadedAdapter
from gguflora.server.adapter_stats import AdapterStats
from gguflora.server.errors import Failure
from gguflora.server.metrics import Metrics
from gguflora.server.schemas import LoraScale
from gguflora.server.settings import Settings

BASE_MODEL: Final = "base"
DEFAULT_MODEL: Final = "default"
"""``model`` of requests that take the scales set by POST /lora-adapters."""


@dataclass(slots=True)
class Service:
    """One engine on offer.

    Attributes:
        base: the file of the engine's weights.
        scales: by adapter name, of requests that name no adapter set; as in llama-server set by POST /lora-adapters,
            but at first all are off.
        created: seconds since the epoch.
    """

    engine: Engine
    base: Path
    settings: Settings
    metrics: Metrics
    adapter_stats: AdapterStats
    scales: dict[str, float] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))

    def adapter_set(self, model: str | None, lora: Sequence[LoraScale] | None) -> AdapterSet:
        """The adapter set that a request names: by llama-server's ``lora``, else by ``model``.

        Raises:
            AdapterNameError: if ``model`` names an adapter that is not loaded.
            Failure: if ``lora`` has an unknown id.
        """
        named = self._default_set() if model in {None, DEFAULT_MODEL} else self.engine.adapter_set(str(model))
        return named if lora is None else self.engine.adapter_set(list(self.by_id(lora).items()))

    def by_id(self, lora: Sequence[LoraScale]) -> dict[str, float]:
        """Scales by name; of an id given twice, the last."""
        names = {adapter.id: adapter.name for adapter in self.engine.adapters()}
        for item in lora:
            if item.id not in names:
                known = ", ".join(map(str, sorted(names))) or "none"
                raise Failure(400, f"no adapter has the id {item.id}; known: {known}", "unknown_adapter", "lora")
        return {names[item.id]: item.scale for item in lora}

    def find(self, adapter_id: int) -> LoadedAdapter:
        """A loaded adapter by its id."""
        for adapter in self.engine.adapters():
            if adapter.id == adapter_id:
                return adapter
        raise Failure(404, f"no adapter has the id {adapter_id}", "unknown_adapter")

    def folders(self) -> list[Path]:
        """Directories whose names are nobody's business."""
        files = [self.base, *(adapter.path for adapter in self.engine.adapters())]
        own = [] if self.settings.allow_load is None else [self.settings.allow_load]
        return [*own, *(file.parent for file in files)]

    def _default_set(self) -> AdapterSet:
        loaded = {adapter.name for adapter in self.engine.adapters()}
        return self.engine.adapter_set([(name, scale) for name, scale in self.scales.items() if name in loaded])


def service_of(request: Request) -> Service:
    """The service behind an endpoint, for FastAPI's ``Depends``."""
    service: Service = request.app.state.service
    return service
