"""An HTTP server around one engine: OpenAI's API, adapters by request, a page; needs the extra ``server``."""

from gguflora.server.app import create_app
from gguflora.server.running import listen, serve, url_of
from gguflora.server.settings import KEY_VARIABLE, Settings

__all__ = ["KEY_VARIABLE", "Settings", "create_app", "listen", "serve", "url_of"]
