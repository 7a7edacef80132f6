"""The application: gates, endpoints, page, metrics around one engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, FastAPI, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse
from starlette.exceptions import HTTPException

from gguflora.engine import Engine
from gguflora.errors import GgufloraError
from gguflora.server import adapters, completions
from gguflora.server.adapter_stats import AdapterStats
from gguflora.server.errors import answer_failure
from gguflora.server.metrics import CONTENT_TYPE, Metrics, Timed
from gguflora.server.middleware import Gates
from gguflora.server.service import Service, service_of
from gguflora.server.settings import Settings

_PAGE: Final = Path(__file__).parent / "page"
_FILES: Final = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
router = APIRouter()
Offered = Annotated[Service, Depends(service_of)]


def create_app(engine: Engine, base: Path, settings: Settings | None = None) -> FastAPI:
    """The ASGI application that offers ``engine``, whose weights are those of the file ``base``.

    The engine stays open: whoever made it closes it when the server has ended.
    """
    settings = settings or Settings()
    metrics = Metrics(engine)
    app = FastAPI(title="gguflora", docs_url=None, redoc_url=None, strict_content_type=False)  # curl -d sends a form
    app.state.service = Service(engine, base, settings, metrics, AdapterStats(base))
    for part in (router, completions.router, adapters.router):
        app.include_router(part)
    for path, (name, kind) in _FILES.items():
        app.add_api_route(path, _file(_PAGE / name, kind), include_in_schema=False)
    for error in (GgufloraError, HTTPException, RequestValidationError):
        app.add_exception_handler(error, answer_failure)
    app.add_middleware(Gates, settings=settings)
    app.add_middleware(Timed, metrics=metrics)
    return app


def _file(path: Path, kind: str) -> Any:  # noqa: ANN401  (FastAPI reads the endpoint's own annotation)
    def send_file() -> FileResponse:
        return FileResponse(path, media_type=kind, headers={"Cache-Control": "no-cache"})

    return send_file


@router.get("/health")
def health() -> dict[str, str]:
    """Whether the server answers."""
    return {"status": "ok"}


@router.get("/metrics")
def metrics(service: Offered) -> Response:
    """Prometheus metrics."""
    return Response(service.metrics.render(), media_type=CONTENT_TYPE)
