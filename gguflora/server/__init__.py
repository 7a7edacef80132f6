"""An HTTP server for one engine: OpenAI's API, adapters by request, a web page. Needs the extra ``server``."""

from typing import TYPE_CHECKING, Final

from gguflora.errors import MissingExtraError
from gguflora.system.extras import lazy_face

if TYPE_CHECKING:
    from gguflora.server.app import create_app
    from gguflora.server.serve import listen, run_server, url_of
    from gguflora.server.settings import KEY_VARIABLE, Settings

__all__ = ["KEY_VARIABLE", "Settings", "create_app", "listen", "run_server", "url_of"]

_HOMES: Final = {
    "KEY_VARIABLE": "gguflora.server.settings",
    "Settings": "gguflora.server.settings",
    "create_app": "gguflora.server.app",
    "listen": "gguflora.server.serve",
    "run_server": "gguflora.server.serve",
    "url_of": "gguflora.server.serve",
}
"""The module of each public name."""

__getattr__ = lazy_face(__name__, _HOMES, "fastapi", MissingExtraError("a server", "fastapi", "server"))
