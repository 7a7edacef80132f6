"""What an answer must look like: OpenAI's, llama-server's, vLLM's and TGI's fields, turned into one grammar.

All are matched by llguidance, which bounds its own time and memory. llama.cpp's own matcher of GBNF is not asked: a
grammar with many parentheses overflows its stack, and one with many optional parts keeps it busy for minutes.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final, Literal

from pydantic import ConfigDict, Field

from gguflora.engine import Grammar
from gguflora.files.strict_json import to_json
from gguflora.server.errors import Failure
from gguflora.server.fields import Body
from gguflora.server.grammar_depth import MAX_LEVELS, MAX_RULES, is_too_deep
from gguflora.server.sampling import SamplingFields

WHITESPACE: Final = r"[ ]?|\n[ \t]{0,20}"
"""What may stand between the parts of JSON, as in llama.cpp: bounded, so that no model writes blanks for ever."""

_MAX_INTEGER: Final = 2**53 - 1
"""Largest whole number where a schema sets no bound: the largest that every reader of JSON keeps."""

_BOUNDS: Final = frozenset(
    {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "enum", "const", "not", "$ref"}
)

_MAX_GRAMMAR: Final = 1 << 16
"""Largest number of characters of a grammar in GBNF."""

_LAST_CHARACTER: Final = 0x10FFFF
_ESCAPE: Final = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|.)", re.DOTALL)

_ANY_OBJECT: Final[dict[str, Any]] = {"type": "object"}


class JsonSchema(Body):
    """OpenAI's ``response_format.json_schema``."""

    model_config = ConfigDict(protected_namespaces=())
    name: str | None = Field(None, max_length=256)
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """OpenAI's ``response_format``; ``schema`` beside ``json_object`` is llama-server's."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class StructuredOutputs(Body):
    """vLLM's ``structured_outputs``."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = Field(None, min_length=1, max_length=4096)
    grammar: str | None = None
    json_object: bool | None = None


class StructureFields(SamplingFields):
    """The fields that say what an answer must look like."""

    response_format: ResponseFormat | None = None
    json_schema: dict[str, Any] | None = None
    grammar: str | dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = Field(None, min_length=1, max_length=4096)
    guided_grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None

    def structure(self) -> Grammar | None:
        """Return the grammar of the answer; None if anything may be answered.

        Raises:
            Failure: if a field cannot be read, or several fields ask for something.
        """
        asked = {name: value for name, value in self._asked().items() if value is not None}
        if len(asked) > 1:
            first, second = [*asked][:2]
            raise Failure(400, f"{first!r} and {second!r} both say what the answer must look like", param=first)
        for name, grammar in asked.items():
            return checked(name, grammar)
        return None

    def _asked(self) -> dict[str, Grammar | None]:
        found = {
            "response_format": self._response_format(),
            "json_schema": json_grammar("json_schema", self.json_schema or None),
            "grammar": self._grammar(),
            "guided_json": json_grammar("guided_json", self.guided_json),
            "guided_regex": regex_grammar(self.guided_regex),
            "guided_choice": choice_grammar(self.guided_choice),
            "guided_grammar": text_grammar("guided_grammar", self.guided_grammar),
        }
        outputs = self.structured_outputs
        if outputs is None:
            return found
        found |= {
            "structured_outputs.json": json_grammar("structured_outputs.json", outputs.json_),
            "structured_outputs.regex": regex_grammar(outputs.regex),
            "structured_outputs.choice": choice_grammar(outputs.choice),
            "structured_outputs.grammar": text_grammar("structured_outputs.grammar", outputs.grammar),
            "structured_outputs.json_object": json_grammar("", _ANY_OBJECT) if outputs.json_object else None,
        }
        return found

    def _response_format(self) -> Grammar | None:
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return None
        name = "response_format"
        if wanted.type == "json_object":
            return json_grammar(name, _ANY_OBJECT if wanted.schema_ is None else wanted.schema_)
        if wanted.json_schema is None:
            if wanted.schema_ is None:
                raise Failure(400, "'response_format' of type 'json_schema' needs 'json_schema'", param=name)
            return json_grammar(name, wanted.schema_)
        schema = wanted.json_schema.schema_
        return json_grammar(name, _ANY_OBJECT if schema is None else schema, strict=bool(wanted.json_schema.strict))

    def _grammar(self) -> Grammar | None:
        """Read llama-server's ``grammar``, GBNF; or TGI's, an object."""
        if not isinstance(self.grammar, dict):
            return text_grammar("grammar", self.grammar)
        kind, value = self.grammar.get("type"), self.grammar.get("value")
        if kind in {"json", "json_object"} and isinstance(value, dict | str):
            return json_grammar("grammar", value)
        if kind == "regex" and isinstance(value, str):
            return regex_grammar(value)
        raise Failure(
            400, "'grammar' is a text in GBNF, or an object with 'type' json or regex and a 'value'", param="grammar"
        )


def json_grammar(field: str, schema: dict[str, Any] | bool | str | None, *, strict: bool = True) -> Grammar | None:
    """Return the grammar of a JSON schema, an object or its text.

    Args:
        field: name of the field, for errors.
        schema: the schema. Objects get only the properties that it names, unless it says that others may follow.
        strict: whether a keyword that cannot be enforced is an error; otherwise it is left out.

    Raises:
        Failure: if the text is not JSON.
    """
    if schema is None or schema == "":
        return None
    from llguidance import LLMatcher  # noqa: PLC0415  (loads a library)

    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise Failure(400, f"{field!r} is not a JSON schema: {error}", "invalid_grammar", field) from error
    if not isinstance(schema, dict | bool):
        raise Failure(400, f"{field!r} is not a JSON schema: it must be an object", "invalid_grammar", field)
    closed = closed_schema(schema)
    options: Any = {"whitespace_pattern": WHITESPACE, "lenient": not strict}
    text = to_json(closed if isinstance(closed, dict) else {"anyOf": [closed]})
    return Grammar(LLMatcher.grammar_from_json_schema(text, overrides=options), kind="llguidance")


def closed_schema(schema: Any) -> Any:  # noqa: ANN401  (any JSON value)
    """Return a schema whose objects have no other properties than those it names, and whose integers have bounds.

    Where the schema itself says otherwise, it stays, and so does one with ``allOf``, whose parts may name different
    properties of one object. All that fits the result also fits the schema. Small models would add properties and
    digits for ever.
    """
    return schema if '"allOf"' in to_json(schema) else _closed(schema)


def _closed(schema: Any) -> Any:  # noqa: ANN401  (any JSON value)
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {
        key: {name: _closed(each) for name, each in value.items()}
        if key in {"properties", "$defs", "definitions"} and isinstance(value, dict)
        else value
        if key in {"const", "enum", "default", "examples"}
        else _closed(value)
        for key, value in schema.items()
    }
    others = {
        "additionalProperties",
        "unevaluatedProperties",
        "patternProperties",
        "anyOf",
        "oneOf",
        "$ref",
        "not",
        "if",
    }
    if isinstance(schema.get("properties"), dict) and not others & schema.keys():
        closed["additionalProperties"] = False
    kinds = schema.get("type")
    if "integer" in (kinds if isinstance(kinds, list) else [kinds]) and not _BOUNDS & schema.keys():
        closed |= {"minimum": -_MAX_INTEGER, "maximum": _MAX_INTEGER}
    return closed


def regex_grammar(pattern: str | None) -> Grammar | None:
    """Return the grammar of answers that a regular expression matches as a whole."""
    if not pattern:
        return None
    from llguidance import LLMatcher  # noqa: PLC0415

    return Grammar(LLMatcher.grammar_from_regex(pattern), kind="llguidance")


def choice_grammar(texts: list[str] | None) -> Grammar | None:
    """Return the grammar of answers that are one of some texts."""
    if not texts:
        return None
    return Grammar("start: " + " | ".join(to_json(text, ensure_ascii=False) for text in texts), kind="llguidance")


def text_grammar(field: str, text: str | None) -> Grammar | None:
    """Return a grammar in GBNF, or in Lark's syntax if it has none of GBNF's ``::=``.

    Raises:
        Failure: if GBNF cannot be read.
    """
    if not text:
        return None
    return Grammar(_lark_of(field, text) if "::=" in text else text, kind="llguidance")


def _lark_of(field: str, gbnf: str) -> str:
    """Return a grammar in GBNF in Lark's syntax."""
    from llguidance.gbnf_to_lark import gbnf_to_lark  # noqa: PLC0415

    if len(gbnf) > _MAX_GRAMMAR:
        raise Failure(400, f"{field!r} has {len(gbnf)} characters, more than {_MAX_GRAMMAR}", "invalid_grammar", field)
    try:
        lark: str = gbnf_to_lark(_ESCAPE.sub(_plain, gbnf))
    except Exception as error:  # the converter raises bare exceptions, and RecursionError
        reason = "its parentheses are nested too deeply" if isinstance(error, RecursionError) else str(error)[:300]
        raise Failure(400, f"{field!r} cannot be enforced: {reason}", "invalid_grammar", field) from error
    return lark


def _plain(escape: re.Match[str]) -> str:
    """Return a character that is escaped by its number as itself, or by two digits if it has a meaning of its own."""
    digits = escape[1] or escape[2]
    number = int(digits, 16) if digits else -1
    if not 0 <= number <= _LAST_CHARACTER or 0xD800 <= number < 0xE000:
        return escape[0]
    return f"\\x{number:02x}" if number < 0x80 else chr(number)


def checked(field: str, grammar: Grammar) -> Grammar:
    """Return a grammar that llguidance can read.

    Raises:
        Failure: if it cannot.
    """
    from llguidance import LLMatcher  # noqa: PLC0415

    if is_too_deep(grammar.text):
        reason = f"its rules or references go deeper than {MAX_RULES} rules or {MAX_LEVELS} levels of a schema"
        raise Failure(400, f"{field!r} cannot be enforced: {reason}", "invalid_grammar", field)
    error = LLMatcher.validate_grammar(grammar.text)
    if error and not error.startswith("WARNING"):
        reason = error.strip().split("\n", 1)[0][:300]
        raise Failure(400, f"{field!r} cannot be enforced: {reason}", "invalid_grammar", field)
    return grammar
