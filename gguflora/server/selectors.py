"""Which adapters a request names: ``model``, and the fields that other servers have for it."""

from __future__ import annotations

from typing import Final

from gguflora.engine import AdapterSet
from gguflora.errors import AdapterNameError
from gguflora.server.errors import Failure
from gguflora.server.schemas import GenerationBody, LoraRequest
from gguflora.server.service import Service

_NAMES: Final = ("adapter_id", "adapter_name", "lora_path", "lora_request")


def requested_set(service: Service, body: GenerationBody) -> AdapterSet:
    """Return the adapter set of a request.

    ``lora`` is llama-server's list of ids and scales. ``adapter_id`` (LoRAX and TGI), ``adapter_name``, ``lora_path``
    (SGLang) and ``lora_request`` (vLLM) name a loaded adapter, or a set such as ``legal@0.5+tone``.

    Raises:
        AdapterNameError: if no adapter of a name is loaded.
        Failure: if fields name different sets.
    """
    named = {name: _value(getattr(body, name)) for name in _NAMES if getattr(body, name) is not None}
    found = {name: _by_name(service, value) for name, value in named.items()}
    if not found:
        return service.adapter_set(body.model, body.lora)
    from_model = service.adapter_set(body.model, body.lora)
    if body.lora is not None:
        found["lora"] = from_model
    elif from_model not in {(), service.names.default_set()}:
        found["model"] = from_model
    first, *others = found.items()
    for name, adapters in others:
        if adapters != first[1]:
            raise Failure(400, f"{first[0]!r} and {name!r} name different adapters", "conflicting_adapters", first[0])
    return first[1]


def _value(field: str | LoraRequest) -> str:
    return field.lora_name if isinstance(field, LoraRequest) else field


def _by_name(service: Service, text: str) -> AdapterSet:
    """Return the set that a text names: names and scales, or else the path of a loaded adapter."""
    if text in service.settings.aliases:
        return service.names.find(text)
    try:
        return service.engine.adapter_set(text)
    except AdapterNameError:
        by_path = [each for each in service.engine.adapters() if text in {str(each.path), each.path.name}]
        if len(by_path) != 1:
            raise
        return service.engine.adapter_set([(by_path[0].name, by_path[0].scale)])
