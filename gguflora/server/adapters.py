"""Endpoints for adapters: llama-server's ``/lora-adapters``, vLLM's load and unload, and statistics of an adapter."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import re
from pathlib import Path
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import PlainTextResponse

from gguflora.engine import LoadedAdapter
from gguflora.errors import AdapterNameError
from gguflora.server.errors import Failure
from gguflora.server.hosts import check_may_load
from gguflora.server.names import BASE_MODEL, DEFAULT_MODEL
from gguflora.server.schemas import LoadBody, LoraScales, UnloadBody
from gguflora.server.service import Service, ServiceDep

router = APIRouter()
_LOG: Final = logging.getLogger(__name__)

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")


@router.get("/lora-adapters")
def list_adapters(service: ServiceDep) -> list[dict[str, Any]]:
    """List the loaded adapters, with the scales for requests that name no adapter set."""
    scales = service.names.scales
    return [_entry(adapter, scales.get(adapter.name, 0.0)) for adapter in service.engine.adapters()]


def _entry(adapter: LoadedAdapter, scale: float) -> dict[str, Any]:
    """Describe an adapter as llama-server does, but with the file's name in place of its path."""
    return {
        "id": adapter.id,
        "path": adapter.path.name,
        "scale": scale,
        "name": adapter.name,
        "method": adapter.method,
        "size": adapter.size,
        "sha256": adapter.sha256,
    }


@router.post("/lora-adapters")
def set_scales(scales: LoraScales, service: ServiceDep) -> dict[str, bool]:
    """Set the scales for requests that name no adapter set; adapters that are not listed are off."""
    by_name = service.by_id(scales)
    service.engine.adapter_set(list(by_name.items()))  # raises if the engine could not apply them
    service.names.scales = by_name
    return {"success": True}


@router.get("/lora-adapters/{adapter_id}/changes")
async def show_changes(adapter_id: int, service: ServiceDep) -> dict[str, Any]:
    """Return how much an adapter changes each tensor at scale 1, relative to the tensor's norm."""
    adapter = service.find(adapter_id)
    measured = asyncio.wrap_future(service.adapter_stats.measure(adapter.path, adapter.sha256))
    rows = await asyncio.shield(measured)  # other requests may wait for the same future
    return {"id": adapter.id, "name": adapter.name, "changes": rows}


@router.post("/v1/load_lora_adapter")
async def load_adapter(body: LoadBody, request: Request, service: ServiceDep) -> PlainTextResponse:
    """Load an adapter from the directory given with ``--allow-load``."""
    folder = _loading_folder(service, request)
    reserved = {BASE_MODEL, DEFAULT_MODEL, service.engine.model_name, *service.settings.aliases}
    if not _NAME.fullmatch(body.lora_name) or body.lora_name in reserved:
        raise Failure(
            400,
            "lora_name must consist of letters, digits, '.', '_', '-' and '/', and must not be the name of a model",
            param="lora_name",
        )
    loaded = {adapter.name for adapter in service.engine.adapters()}
    if not body.load_inplace and body.lora_name in loaded:
        raise Failure(
            400,
            f"the adapter {body.lora_name!r} has already been loaded; set 'load_inplace' to true to replace it",
            "already_loaded",
            "lora_name",
        )
    limit = service.settings.max_adapters
    if len(loaded | service.loading | {body.lora_name}) > max(limit, len(loaded)):
        raise Failure(
            400, f"{limit} adapters are loaded, which is this server's limit; unload one", "too_many_adapters"
        )
    is_first = body.lora_name not in service.loading
    service.loading.add(body.lora_name)  # others count it before it is loaded
    try:
        await run_in_threadpool(_load, service, body, folder)
    finally:
        if is_first:
            service.loading.discard(body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter")
async def unload_adapter(body: UnloadBody, request: Request, service: ServiceDep) -> PlainTextResponse:
    """Unload an adapter."""
    _loading_folder(service, request)
    await run_in_threadpool(service.engine.unload, body.lora_name)
    service.copies.forget(body.lora_name)
    service.names.forget(body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _loading_folder(service: Service, request: Request) -> Path:
    if service.settings.allow_load is None:
        raise Failure(403, "loading is off; start the server with --allow-load DIR to allow it", "loading_is_off")
    check_may_load(request, service.settings)
    return service.settings.allow_load.resolve()


def _load(service: Service, body: LoadBody, folder: Path) -> None:
    copy = service.copies.make(path_inside(folder, body.lora_path), folder)
    try:
        adapter = service.engine.load(copy, body.lora_name, task=body.task, replace=body.load_inplace)
    except AdapterNameError as error:  # another client is loading an adapter of this name
        service.copies.remove(copy)
        raise Failure(400, str(error), "already_loaded", "lora_name") from error
    except BaseException:
        service.copies.remove(copy)
        raise
    service.copies.keep(body.lora_name, copy)
    for text in adapter.warnings:
        _LOG.warning("%s: %s", adapter.name, text)


def path_inside(folder: Path, text: str) -> Path:
    """Resolve a path that a client has sent.

    Args:
        folder: the directory that the server loads adapters from; relative paths start here.
        text: path of a file or directory. It and all files in it must lie inside the folder after links are followed.
            Other kinds of files, such as pipes, are refused, because reading them could block.

    Raises:
        Failure: if the path is not inside the folder or does not exist; the message does not tell which.
    """
    try:
        path = (folder / text).resolve()
        inside = path.is_relative_to(folder) and path.exists() and _all_inside(path, folder)
    except (OSError, ValueError, RuntimeError):  # a name that is too long, a NUL character, a loop of links
        inside = False
    if not inside:
        raise Failure(
            404,
            "lora_path is not inside the directory that the server loads adapters from, or does not exist",
            "bad_path",
            "lora_path",
        )
    return path


def _all_inside(path: Path, folder: Path) -> bool:
    """Return whether a file, or every file of a directory, lies inside the folder after links are followed."""
    files = (Path(root, name).resolve() for root, folders, names in os.walk(path) for name in folders + names)
    return all(
        file.is_relative_to(folder) and (file.is_file() or file.is_dir()) for file in itertools.chain([path], files)
    )
