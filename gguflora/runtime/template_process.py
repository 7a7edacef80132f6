"""Renders chat templates in a process that does nothing else; `gguflora.runtime.templates` runs this file.

Templates come from strangers. Jinja's sandbox keeps them from Python's internals, not from endless loops and texts
that double; so this process has limits of time and memory, opens no files, and is replaced when it dies. It imports
only the standard library, Jinja, and one module of gguflora that imports no other. Messages are JSON after their
length in 4 bytes: first the paths to import from, then requests.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

SAFE_JINJA = (3, 1, 6)
"""The first version whose sandbox has no known hole (CVE-2024-56326, CVE-2025-27516)."""


def read_message(stream: BinaryIO) -> Any | None:  # noqa: ANN401  (any JSON value)
    """Return the next message; None at the end."""
    size = stream.read(4)
    return json.loads(stream.read(int.from_bytes(size, "big"))) if len(size) == 4 else None


def write_message(stream: BinaryIO, message: Any) -> None:  # noqa: ANN401
    """Write a message."""
    content = json.dumps(message).encode()
    stream.write(len(content).to_bytes(4, "big") + content)
    stream.flush()


def _tojson(
    value: Any,  # noqa: ANN401
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON as in transformers' chat templates: not escaped for HTML, as Jinja's own filter does."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise ValueError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)  # the user's own time, as in transformers


def environment() -> Any:  # noqa: ANN401  (a jinja2.Environment)
    """Return Jinja's sandbox with the statements and filters of transformers' chat templates."""
    import jinja2.ext  # noqa: PLC0415  (its place comes with the first message)
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415

    class Generation(jinja2.ext.Extension):
        """transformers' ``{% generation %}``, which marks the answer's text and changes nothing."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:  # noqa: ANN401
            """Return the statements inside."""
            parser.stream.skip(1)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    sandbox.filters["tojson"] = _tojson
    return sandbox


@lru_cache(maxsize=16)
def _compiled(template: str) -> Any:  # noqa: ANN401  (a jinja2.Template)
    return environment().from_string(template)


def render(request: dict[str, Any]) -> dict[str, Any]:
    """Return ``{"text"}``, or ``{"error"}`` if the template refuses the variables or is too long.

    ``is_spent`` says that this process has grown to its limit, and should be replaced.
    """
    functions = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    try:
        parts, left = [], request["max_chars"]
        for part in _compiled(request["template"]).generate(**request["variables"], **functions):
            left -= len(part)
            if left < 0:
                return {"error": f"it makes more than {request['max_chars']} characters"}
            parts.append(part)
        return {"text": "".join(parts)}
    except MemoryError:
        return {"error": "it needs too much memory", "is_spent": True}
    except Exception as error:  # a foreign template can raise anything
        return {"error": str(error)[:1000]}


def main() -> None:
    """Answer requests until the end of the input."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    setup = read_message(source)
    if setup is None:
        return
    sys.path[:] = setup["path"]
    import jinja2.debug  # noqa: PLC0415  (Jinja itself imports it when a template fails)

    sys.path.append(str(Path(__file__).resolve().parents[2]))
    from gguflora.system.processes import confine, set_alarm  # noqa: PLC0415  (its place was not known before)

    version = tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdigit())
    if version < SAFE_JINJA:
        write_message(sink, {"error": f"Jinja {jinja2.__version__} is not safe; pip install 'jinja2>=3.1.6'"})
        return
    render({"template": "{{ strftime_now('%Y') }}{{ x }}", "variables": {"x": 1}, "max_chars": 9})  # loads all there is
    confine(setup["memory"])
    write_message(sink, {"ready": True})
    while (request := read_message(source)) is not None:
        set_alarm(request["seconds"])  # SIGPROF ends this process, even if the other one is gone
        answer = render(request)
        set_alarm(0)
        write_message(sink, answer)


if __name__ == "__main__":
    main()
