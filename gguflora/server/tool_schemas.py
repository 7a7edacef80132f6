"""What a tool's schema says of arguments that a model writes as bare text, without JSON's quotes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

Schema = Mapping[str, Any]

_DEFINITIONS: Final = ("$defs", "definitions")
_TYPES: Final[dict[type, str]] = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}
_MAX_DEPTH: Final = 32


def properties_of(schema: Schema) -> dict[str, dict[str, Any]]:
    """Return the schema of each argument, with the definitions that it may refer to."""
    shared = {key: schema[key] for key in _DEFINITIONS if key in schema}
    properties = schema.get("properties")
    if not isinstance(properties, dict):
        return {}
    return {name: {**(each if isinstance(each, dict) else {}), **shared} for name, each in properties.items()}


def is_text(schema: Schema) -> bool:
    """Return whether an argument may be any text, which stands without quotes."""
    return "string" in _kinds(schema, schema, 0) and texts_of(schema) is None


def texts_of(schema: Schema) -> list[str] | None:
    """Return the texts that an argument may be; None if it may be others, too, or is no text."""
    found = _resolved(schema, schema)
    choices = [found["const"]] if "const" in found else found.get("enum")
    if isinstance(choices, list) and choices and all(isinstance(each, str) for each in choices):
        return choices
    return None


def value_of(text: str, schema: Schema) -> Any:  # noqa: ANN401  (any JSON value)
    """Return the value of an argument that stands as text.

    Text that is JSON of another type that the schema allows is that value: ``3`` is a number, unless the argument can
    only be a text. Everything else is text.
    """
    kinds = _kinds(schema, schema, 0) - {"string"}
    try:
        value = json.loads(text)
    except ValueError:
        return text
    kind = _TYPES.get(type(value), "array" if isinstance(value, list) else "object")
    return value if kind in kinds or (kind == "integer" and "number" in kinds) else text


def _resolved(schema: Schema, root: Schema, depth: int = 0) -> Schema:
    """Return what a reference stands for."""
    reference = schema.get("$ref")
    if not isinstance(reference, str) or not reference.startswith("#/") or depth > _MAX_DEPTH:
        return schema
    found: Any = root
    for part in reference[2:].split("/"):
        found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
    return _resolved(found, root, depth + 1) if isinstance(found, dict) else {}


def _kinds(schema: Any, root: Schema, depth: int) -> set[str]:  # noqa: ANN401  (any JSON value)
    """Return the types that a schema allows; all of them if it does not say."""
    every = {*_TYPES.values(), "array", "object"}
    if not isinstance(schema, dict) or depth > _MAX_DEPTH:
        return every
    schema = _resolved(schema, root)
    kinds = schema.get("type")
    if kinds is not None:
        return set(kinds) if isinstance(kinds, list) else {kinds}
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            return set().union(*(_kinds(each, root, depth + 1) for each in schema[key]))
    if isinstance(schema.get("allOf"), list):
        return set.intersection(every, *(_kinds(each, root, depth + 1) for each in schema["allOf"]))
    choices = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(choices, list):
        return {_TYPES.get(type(each), "array" if isinstance(each, list) else "object") for each in choices}
    return {"object"} if "properties" in schema else every
