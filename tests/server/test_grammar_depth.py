"""Grammars that go as deep as allowed are read by llguidance in a thread of 8 MiB; deeper ones are seen before."""

import json
import threading

import pytest
from llguidance import LLMatcher

from gguflora.server.grammar_depth import MAX_LEVELS, MAX_RULES, is_too_deep

NESTS = {
    "items": ('{"items":', "}", 1),
    "properties": ('{"properties":{"a":', "}}", 2),
    "allOf": ('{"allOf":[', "]}", 2),
    "anyOf": ('{"anyOf":[{"type":"null"},', "]}", 2),
    "prefixItems": ('{"prefixItems":[', "]}", 2),
}


def schema(nest, n_levels, per_reference):
    """A schema with so many levels: definitions that nest and end in a reference to the next one."""
    begin, end, n_each = NESTS[nest]
    definitions, level = {}, 2
    while level + n_each * per_reference + 1 < n_levels:
        reference = f'{{"$ref":"#/$defs/a{len(definitions) + 1}"}}'
        definitions[f"a{len(definitions)}"] = json.loads(begin * per_reference + reference + end * per_reference)
        level += n_each * per_reference + 1
    return {"$ref": "#/$defs/a0", "$defs": {**definitions, f"a{len(definitions)}": {"type": "null"}}}


def rules(n_rules, begin="", end=""):
    chain = "".join(f"r{i}: {begin}r{i + 1}{end}\n" for i in range(n_rules - 2))
    return f'start: r0\n{chain}r{n_rules - 2}: "a"'


def answer_of(grammar):
    """What llguidance says of a grammar, in a thread with the usual stack."""
    said = []
    before = threading.stack_size(8 << 20)
    try:
        thread = threading.Thread(target=lambda: said.append(LLMatcher.validate_grammar(grammar)))
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    return said[0]


@pytest.mark.parametrize("per_reference", [1, 5, 30])
@pytest.mark.parametrize("nest", NESTS)
def test_schemas(nest, per_reference):
    deepest = schema(nest, MAX_LEVELS, per_reference)
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(deepest))
    assert not is_too_deep(grammar)
    assert answer_of(grammar) == ""
    deeper = schema(nest, 2 * MAX_LEVELS, per_reference)
    assert is_too_deep(LLMatcher.grammar_from_json_schema(json.dumps(deeper)))
    assert is_too_deep(f"start: %json {json.dumps(deeper)}")


@pytest.mark.parametrize(("begin", "end"), [("", ""), ("(" * 20, ")" * 20), ('("x" | ', ")+")])
def test_rules(begin, end):
    deepest = rules(MAX_RULES, begin, end)
    assert not is_too_deep(deepest)
    assert answer_of(deepest) == ""
    assert is_too_deep(rules(MAX_RULES + 2, begin, end))


@pytest.mark.parametrize(
    "grammar",
    [
        'start: item*\nitem: "x" | "(" start ")"',  # without end, but not deep
        "start: " + " | ".join(f"r{i}" for i in range(500)) + "\n" + "\n".join(f"r{i}: /a{i}/" for i in range(500)),
        'start: "' + " ".join(f"r{i}:" for i in range(100)) + '"',  # names in a text
    ],
    ids=["recursive", "wide", "text"],
)
def test_grammars_that_are_not_deep(grammar):
    assert not is_too_deep(grammar)
    assert answer_of(grammar) == ""


def test_a_schema_that_refers_to_itself():
    tree = {"properties": {"left": {"$ref": "#"}, "right": {"$ref": "#"}, "other": {"$ref": "#/$defs/none"}}}
    assert not is_too_deep(LLMatcher.grammar_from_json_schema(json.dumps(tree)))
