"""How deep grammars go, before llguidance reads them.

It follows references by recursion: a chain of a few thousand overflows the stack of the thread, which ends the process.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeVar

Node = TypeVar("Node")

MAX_LEVELS: Final = 200
"""Levels of a JSON schema, references followed."""

MAX_RULES: Final = 50
"""Rules of a Lark grammar that name each other in a chain."""

_RULE: Final = re.compile(
    r"^[ \t]*[?!]*([A-Za-z_]\w*)(?:\.-?\d+)?(?:\[[^\]\n]*\])?[ \t]*(?:\{[^}\n]*\}[ \t]*)?:", re.MULTILINE
)
_SCHEMA: Final = re.compile(r"%json\s*")
_QUOTED: Final = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/|//[^\n]*')
_NAME: Final = re.compile(r"[A-Za-z_]\w*")


def is_too_deep(text: str) -> bool:
    """Whether a grammar, in Lark's syntax or as llguidance's own JSON, goes deeper than llguidance can follow."""
    if not text.lstrip().startswith("{"):
        return _lark_is_too_deep(text)
    try:
        grammars = json.loads(text).get("grammars", ())
    except (ValueError, RecursionError):
        return False  # llguidance says what is wrong
    return any(
        _schema_is_too_deep(grammar["json_schema"])
        if "json_schema" in grammar
        else _lark_is_too_deep(grammar.get("lark_grammar", ""))
        for grammar in grammars
    )


def _lark_is_too_deep(text: str) -> bool:
    for match in _SCHEMA.finditer(text):
        try:
            schema, _ = json.JSONDecoder().raw_decode(text, match.end())
        except (ValueError, RecursionError):
            continue  # llguidance says what is wrong
        if _schema_is_too_deep(schema):
            return True
    bare = _QUOTED.sub(" ", text)
    rules = list(_RULE.finditer(bare))
    ends = [rule.start() for rule in rules[1:]] + [len(bare)]
    bodies = {rule[1]: bare[rule.end() : end] for rule, end in zip(rules, ends, strict=True)}
    named = {name: {other for other in _NAME.findall(body) if other in bodies} for name, body in bodies.items()}
    return _is_longer(named, named.__getitem__, MAX_RULES)


def _schema_is_too_deep(schema: Any) -> bool:  # noqa: ANN401  (any JSON)
    """Whether a schema has more than `MAX_LEVELS` levels; a reference that leads elsewhere counts as one."""
    nodes: dict[int, Any] = {}

    def below(key: int) -> Iterable[int]:
        node = nodes[key]
        parts = list(node.values()) if isinstance(node, dict) else node
        if isinstance(node, dict) and isinstance(node.get("$ref"), str):
            parts.append(_target(schema, node["$ref"]))
        for part in parts:
            if isinstance(part, dict | list):
                nodes[id(part)] = part
                yield id(part)

    nodes[id(schema)] = schema
    return isinstance(schema, dict | list) and _is_longer([id(schema)], below, MAX_LEVELS)


def _target(schema: Any, reference: str) -> Any:  # noqa: ANN401
    """What a JSON pointer leads to; None if nothing."""
    node = schema
    for step in reference.lstrip("#").split("/")[1:]:
        part = step.replace("~1", "/").replace("~0", "~")
        if isinstance(node, dict):
            node = node.get(part)
        elif isinstance(node, list) and part.isdecimal() and int(part) < len(node):
            node = node[int(part)]
        else:
            return None
    return node


def _is_longer(starts: Iterable[Node], below: Callable[[Node], Iterable[Node]], limit: int) -> bool:
    """Whether a chain of more than ``limit`` different nodes begins at one of ``starts``."""
    lengths: dict[Node, int] = {}
    for start in starts:
        if start in lengths:
            continue
        chain = [(start, iter(below(start)))]
        on_chain = {start}
        longest = {start: 1}
        while chain:
            if len(chain) > limit:
                return True
            node, rest = chain[-1]
            for other in rest:
                if other in on_chain:
                    continue
                if other not in lengths:
                    chain.append((other, iter(below(other))))
                    on_chain.add(other)
                    longest[other] = 1
                    break
                longest[node] = max(longest[node], 1 + lengths[other])
            else:
                chain.pop()
                on_chain.discard(node)
                lengths[node] = longest[node]
                if len(chain) + lengths[node] > limit:
                    return True
                if chain:
                    above = chain[-1][0]
                    longest[above] = max(longest[above], 1 + lengths[node])
    return False
