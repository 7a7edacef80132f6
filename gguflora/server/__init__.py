"""An HTTP server around one engine: OpenAI's API, adapters by request, a page; needs the extra ``server``."""
