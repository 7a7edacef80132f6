"""The ASGI application: middleware, endpoints, web page and metrics for one engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from fastapi import APIRouter, FastAPI, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from gguflora.engine import Engine
from gguflora.errors import GgufloraError
from gguflora.server import adapters, anthropic, completions, embeddings, native, responses
from gguflora.server.adapter_stats import AdapterStats
from gguflora.server.errors import handle_exception
from gguflora.server.freed_memory import FreedMemory
from gguflora.server.http_methods import HttpMethods
from gguflora.server.json_response import JSONResponse
from gguflora.server.metrics import CONTENT_TYPE, Metrics, RequestTimer
from gguflora.server.middleware import RequestGuard
from gguflora.server.names import ModelNames, check_names
from gguflora.server.service import Service, ServiceDep
from gguflora.server.settings import Settings

_PAGE: Final = Path(__file__).parent / "page"
_FILES: Final = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/client.js": ("client.js", "text/javascript; charset=utf-8"),
    "/maps.js": ("maps.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
router = APIRouter()
_MODULES: Final = (completions, adapters, embeddings, native, anthropic, responses)


def create_app(engine: Engine, base: Path, settings: Settings | None = None) -> FastAPI:
    """Make the ASGI application that serves an engine.

    Args:
        engine: the engine; the caller closes it after the server has ended.
        base: file of the engine's weights.
        settings: limits and permissions.
    """
    settings = settings or Settings()
    check_names(engine, settings)
    metrics = Metrics(engine)
    app = FastAPI(
        title="gguflora", docs_url=None, redoc_url=None, strict_content_type=False, default_response_class=JSONResponse
    )
    app.state.service = Service(engine, base, settings, metrics, AdapterStats(base), ModelNames(engine, settings))
    for part in (router, *(module.router for module in _MODULES)):
        app.include_router(part)
        _add_short_paths(app, part)
    for path, (name, kind) in _FILES.items():
        app.add_api_route(path, _file(_PAGE / name, kind), include_in_schema=False)
    for error in (GgufloraError, HTTPException, RequestValidationError):
        app.add_exception_handler(error, handle_exception)
    app.add_middleware(HttpMethods)
    app.add_middleware(RequestGuard, settings=settings)
    app.add_middleware(RequestTimer, metrics=metrics)
    app.add_middleware(FreedMemory)
    if settings.cors:  # it must be the outermost: preflight requests carry no key
        app.add_middleware(CORSMiddleware, allow_origins=settings.cors, allow_methods=["*"], allow_headers=["*"])
    return app


def _add_short_paths(app: FastAPI, part: APIRouter) -> None:
    """Offer every endpoint under /v1 without it, too, as llama-server does."""
    for route in part.routes:
        if isinstance(route, APIRoute) and route.path.startswith("/v1/"):
            path = route.path.removeprefix("/v1")
            app.add_api_route(path, route.endpoint, methods=list(route.methods or ()), include_in_schema=False)


def _file(path: Path, kind: str) -> Any:  # noqa: ANN401  (FastAPI reads the endpoint's own annotation)
    def send_file() -> FileResponse:
        return FileResponse(path, media_type=kind, headers={"Cache-Control": "no-cache"})

    return send_file


@router.get("/health")
def health() -> dict[str, str]:
    """Report that the server is running."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(service: ServiceDep) -> JSONResponse:
    """Report whether a request would be taken now, with status 503 if not."""
    is_ready = service.engine.is_ready
    return JSONResponse({"status": "ready" if is_ready else "busy"}, 200 if is_ready else 503)


@router.get("/metrics")
def metrics(service: ServiceDep) -> Response:
    """Return the metrics in Prometheus' text format."""
    return Response(service.metrics.render(), media_type=CONTENT_TYPE)
