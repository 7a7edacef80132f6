"""Remote files: fsspec URLs (``s3://``, ``https://``, ``memory://``, ...) and Hugging Face ids (``hf://org/name``).

`fetch` downloads an input to a local cache; `put` uploads an output. fsspec and huggingface_hub are imported when the
first remote location is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gguflora.files.remote.inputs import input_kinds, remote_inputs
from gguflora.files.remote.location import (
    Kind,
    file_name,
    is_remote,
    join,
    local_path,
    redacted,
)

if TYPE_CHECKING:
    from gguflora.files.remote.fetching import (
        Found,
        fetch,
        list_matching,
        stat,
    )
    from gguflora.files.remote.outputs import (
        create_bytes,
        put,
        read_all,
        read_bytes,
        remove,
        stamps_of,
        writable,
        write_bytes,
    )

__all__ = [
    "Found",
    "Kind",
    "create_bytes",
    "fetch",
    "file_name",
    "input_kinds",
    "is_remote",
    "join",
    "list_matching",
    "local_path",
    "put",
    "read_all",
    "read_bytes",
    "redacted",
    "remote_inputs",
    "remove",
    "stamps_of",
    "stat",
    "writable",
    "write_bytes",
]

_FETCHING = {"Found", "fetch", "list_matching", "stat"}


def __getattr__(name: str) -> Any:  # noqa: ANN401  (a function or a class)
    if name not in __all__:
        raise AttributeError(f"module 'gguflora.files.remote' has no attribute {name!r}")
    module = "fetching" if name in _FETCHING else "outputs"
    return getattr(import_module(f"gguflora.files.remote.{module}"), name)
