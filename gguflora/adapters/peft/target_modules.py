"""Decide which modules a configuration adapts, by PEFT's rules; needed for methods whose files do not list them."""

from __future__ import annotations

import re

from gguflora.adapters.peft.config import PeftConfig
from gguflora.adapters.peft.patterns import is_plain


def is_target(config: PeftConfig, module: str) -> bool:
    """Whether PEFT adapts a linear module of this name.

    Raises:
        AdapterError: if the configuration's patterns are invalid.
    """
    saved = config.fields.get("modules_to_save") or []
    if _matches(config, "exclude_modules", module) or any(
        _fits(config, "modules_to_save", rf"(^|.*\.){name}($|\..*)", module, is_plain=is_plain(name)) for name in saved
    ):
        return False
    targets = config.fields.get("target_modules") or []
    if not _matches(config, "target_modules", module):
        return False
    return isinstance(targets, str) or module in targets or _in_target_layer(config, module)


def _in_target_layer(config: PeftConfig, module: str) -> bool:
    layers = config.fields.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = config.fields.get("layers_pattern") or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        with config.explained("layers_pattern"):
            found = config.matcher.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module)
        if found:
            if not (found[1] or "").isdecimal():  # a group in the pattern comes first, in PEFT, too
                raise config.error("layers_pattern", "a pattern without groups", pattern)
            return int(found[1] or 0) in (layers if isinstance(layers, list) else [layers])
    return False


def _matches(config: PeftConfig, name: str, module: str) -> bool:
    """Whether a field, which is a list of name suffixes or one regular expression, matches a module."""
    patterns = config.fields.get(name) or []
    if patterns == "all-linear":
        return module != "lm_head"
    if isinstance(patterns, str):
        return _fits(config, name, patterns, module)
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise config.error(name, "a regular expression or a list of module names", patterns)
    return any(module == pattern or module.endswith(f".{pattern}") for pattern in patterns)


def _fits(config: PeftConfig, name: str, pattern: str, module: str, *, is_plain: bool = False) -> bool:
    with config.explained(name):
        if is_plain:
            return re.fullmatch(pattern, module) is not None
        return config.matcher.match(rf"(?:{pattern})\Z", module) is not None
