"""JSON as RFC 8259 has it, without ``Infinity`` and ``NaN``: a number that is not finite is null, and told as text."""

from __future__ import annotations

import json
import math
from typing import Any, Final

_SUFFIX: Final = "_text"


def strict(value: Any) -> Any:  # noqa: ANN401  (any JSON value)
    """Return a JSON value in which numbers are finite: of an object, ``snr_db`` is null and ``snr_db_text`` "inf"."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        texts = {f"{key}{_SUFFIX}": str(item) for key, item in value.items() if _is_not_finite(item)}
        return {key: strict(item) for key, item in value.items()} | texts
    return [strict(item) for item in value] if isinstance(value, list | tuple) else value


def to_json(value: Any, *, indent: int | None = None) -> str:  # noqa: ANN401  (any JSON value)
    """Return a JSON value as text, after `strict`."""
    return json.dumps(strict(value), indent=indent, allow_nan=False)


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
