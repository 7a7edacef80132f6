"""JSON as RFC 8259 has it, without ``Infinity`` and ``NaN``: a number that is not finite is null, and told as text.

All JSON that gguflora writes goes through `to_json`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, Final

_SUFFIX: Final = "_text"


def strict(value: Any) -> Any:  # noqa: ANN401  (any JSON value)
    """Return a JSON value in which numbers are finite: of an object, ``snr_db`` is null and ``snr_db_text`` "inf"."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        texts = {f"{key}{_SUFFIX}": str(float(item)) for key, item in value.items() if _is_not_finite(item)}
        return {key: strict(item) for key, item in value.items()} | texts
    return [strict(item) for item in value] if isinstance(value, list | tuple) else value


def to_json(
    value: Any,  # noqa: ANN401  (any JSON value)
    *,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
    ensure_ascii: bool = True,
    default: Callable[[Any], Any] | None = None,
) -> str:
    """Return a JSON value as text, after `strict`. The options are those of ``json.dumps``."""
    encoder = json.JSONEncoder(
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
        ensure_ascii=ensure_ascii,
        default=default,
        allow_nan=False,
    )
    return encoder.encode(value if is_strict(value) else strict(value))


def is_strict(value: Any) -> bool:  # noqa: ANN401  (any JSON value)
    """Return whether all numbers of a JSON value are finite."""
    if isinstance(value, dict):
        return all(map(is_strict, value.values()))
    return all(map(is_strict, value)) if isinstance(value, list | tuple) else not _is_not_finite(value)


def restored(value: Any) -> Any:  # noqa: ANN401  (any JSON value)
    """Return what `strict` was given: numbers that are not finite take the place of null and text."""
    if isinstance(value, list):
        return [restored(item) for item in value]
    if not isinstance(value, dict):
        return value
    texts = {key for key, item in value.items() if key.endswith(_SUFFIX) and item in {"inf", "-inf", "nan"}}
    told = {key.removesuffix(_SUFFIX): float(value[key]) for key in texts}
    return {key: told.get(key, restored(item)) for key, item in value.items() if key not in texts}


def _is_not_finite(value: Any) -> bool:  # noqa: ANN401  (any JSON value)
    return isinstance(value, float) and not math.isfinite(value)
