"""Endpoints for adapters: llama-server's ``/lora-adapters``, vLLM's load and unload, and what an adapter changes."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
from pathlib import Path
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import PlainTextResponse

from gguflora.engine import LoadedAdapter
from gguflora.errors import AdapterNameError
from gguflora.server.errors import Failure
from gguflora.server.schemas import LoadBody, LoraScale, UnloadBody
from gguflora.server.service import BASE_MODEL, DEFAULT_MODEL, Service, service_of

router = APIRouter()
Offered = Annotated[Service, Depends(service_of)]

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")
_OUTSIDE: Final = "lora_path is not inside the directory that the server loads adapters from"


@router.get("/lora-adapters")
def list_adapters(service: Offered) -> list[dict[str, Any]]:
    """All loaded adapters, with the scales of requests that name no adapter set."""
    return [_entry(adapter, service.scales.get(adapter.name, 0.0)) for adapter in service.engine.adapters()]


def _entry(adapter: LoadedAdapter, scale: float) -> dict[str, Any]:
    """As llama-server, but the path is only the file's name."""
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
def set_scales(scales: list[LoraScale], service: Offered) -> dict[str, bool]:
    """Set the scales of requests that name no adapter set; adapters left out are off."""
    wanted = service.by_id(scales)
    service.engine.adapter_set(list(wanted.items()))  # refuses what the engine could not apply
    service.scales = wanted
    return {"success": True}


@router.get("/lora-adapters/{adapter_id}/changes")
async def show_changes(adapter_id: int, service: Offered) -> dict[str, Any]:
    """How much an adapter changes each tensor at scale 1, relative to the tensor's norm."""
    adapter = service.find(adapter_id)
    measured = asyncio.wrap_future(service.adapter_stats.measure(adapter.path, adapter.sha256))
    rows = await asyncio.shield(measured)  # others may wait for the same
    return {"id": adapter.id, "name": adapter.name, "changes": rows}


@router.post("/v1/load_lora_adapter")
async def load_adapter(body: LoadBody, service: Offered) -> PlainTextResponse:
    """Load an adapter from the directory given with ``--allow-load``."""
    folder = _loading_folder(service)
    if not _NAME.fullmatch(body.lora_name) or body.lora_name in {BASE_MODEL, DEFAULT_MODEL, service.engine.model_name}:
        raise Failure(
            400, "lora_name needs letters, digits, '.', '_', '-' or '/', and is no model's name", param="lora_name"
        )
    if not body.load_inplace and body.lora_name in {adapter.name for adapter in service.engine.adapters()}:
        raise Failure(
            400,
            f"the adapter {body.lora_name!r} has already been loaded; set 'load_inplace' to true to replace it",
            "already_loaded",
            "lora_name",
        )
    await run_in_threadpool(_load, service, body, folder)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter")
async def unload_adapter(body: UnloadBody, service: Offered) -> PlainTextResponse:
    """Unload an adapter."""
    _loading_folder(service)
    await run_in_threadpool(service.engine.unload, body.lora_name)
    service.scales.pop(body.lora_name, None)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _loading_folder(service: Service) -> Path:
    if service.settings.allow_load is None:
        raise Failure(403, "loading is off; the server allows it when started with --allow-load DIR", "loading_is_off")
    return service.settings.allow_load.resolve()


def _load(service: Service, body: LoadBody, folder: Path) -> None:
    path = path_inside(folder, body.lora_path)
    try:
        service.engine.load(path, body.lora_name, task=body.task, replace=body.load_inplace)
    except AdapterNameError as error:  # another client loads one of this name
        raise Failure(400, str(error), "already_loaded", "lora_name") from error


def path_inside(folder: Path, text: str) -> Path:
    """The path, links resolved, if it and all that it holds lie inside the folder; relative paths start there.

    Only files and directories can be loaded: whoever opened a pipe would wait for its other end.

    Raises:
        Failure: if not, whether it exists or not.
    """
    try:
        path = (folder / text).resolve()
        inside = path.is_relative_to(folder) and path.exists() and _all_inside(path, folder)
    except (OSError, ValueError, RuntimeError):  # a name too long, a NUL, a loop of links
        inside = False
    if not inside:
        raise Failure(400, f"{_OUTSIDE}, or does not exist", "bad_path", "lora_path")
    return path


def _all_inside(path: Path, folder: Path) -> bool:
    """Whether a file, or every file of a directory, lies inside the folder when links are followed."""
    files = (Path(root, name).resolve() for root, folders, names in os.walk(path) for name in folders + names)
    return all(
        file.is_relative_to(folder) and (file.is_file() or file.is_dir()) for file in itertools.chain([path], files)
    )
