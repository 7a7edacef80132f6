"""All JSON that gguflora and its tools write can be read by parsers that know RFC 8259 and nothing more."""

import ast
import json
import math

import pytest
import torch

from gguflora.files.strict_json import is_strict, restored, to_json
from gguflora.server.events import data_event, named_event
from gguflora.server.json_response import JSONResponse
from gguflora.training.checkpoints import STATE, Checkpoint, Progress, read_checkpoint, save_checkpoint
from support import ROOT

OWN = {
    "gguflora/files/strict_json.py",  # the one function
    "gguflora/runtime/template_process.py",  # a program that imports only the standard library, and writes prompts
    "gguflora/system/regexes.py",  # texts and a number to a program that imports only the standard library
    "tools/fuzz_http.py",  # sends what is no JSON, too
}
MODULES = {"json", "orjson", "simplejson", "ujson"}
WRITERS = {"dump", "dumps", "JSONEncoder", "model_dump_json"}
FILES = [path for room in ("gguflora", "tools", "examples") for path in sorted((ROOT / room).rglob("*.py"))]


def plain_writers(source):
    """Lines that write JSON past `to_json`: uses of ``json.dumps`` under any name, and of what else would write it."""
    nodes = list(ast.walk(ast.parse(source)))
    imported = [name for node in nodes if isinstance(node, ast.Import) for name in node.names]
    modules = {name.asname or name.name for name in imported if name.name in MODULES}
    for node in nodes:
        if isinstance(node, ast.Attribute) and node.attr in WRITERS:
            is_module = isinstance(node.value, ast.Name) and node.value.id in modules
            if is_module or node.attr == "model_dump_json":
                yield node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            yield from (name.lineno for name in node.names if name.name in WRITERS)


def test_nothing_writes_json_past_it():
    found = {str(path.relative_to(ROOT)): list(plain_writers(path.read_text("utf-8"))) for path in FILES}
    assert {name for name, lines in found.items() if lines} == OWN
    assert len(found) > 300


@pytest.mark.parametrize(
    "source",
    [
        "import json\njson.dumps(1)",
        "import json as j\nj.dump(1, f)",
        "def f():\n    from json import dumps as d",
        "from json import JSONEncoder",
        "x.model_dump_json()",
    ],
)
def test_the_rule_can_fail(source):
    assert list(plain_writers(source))


VALUE = {"a": math.inf, "b": [1.5, {"c": -math.inf, "d": "NaN"}], "e": math.nan, "f": None, "g": (2, True)}


@pytest.mark.parametrize("options", [{}, {"indent": 2}, {"sort_keys": True, "separators": (",", ":")}])
def test_numbers_that_are_not_finite(options):
    text = to_json(VALUE, **options)
    read = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in {text}"))
    assert (read["a"], read["a_text"], read["b"][1]["c"], read["b"][1]["c_text"]) == (None, "inf", None, "-inf")
    again = restored(read)
    assert math.isnan(again.pop("e"))
    assert again == {"a": math.inf, "b": [1.5, {"c": -math.inf, "d": "NaN"}], "f": None, "g": [2, True]}
    assert not is_strict(VALUE)
    assert is_strict(read)


def test_what_is_finite_is_as_json_has_it():
    value = {"ä": [1, 2.5, "\udc80\n"], "b": {"c": None}}
    for options in ({}, {"indent": 1, "sort_keys": True}, {"ensure_ascii": False, "separators": (",", ":")}):
        assert to_json(value, **options) == json.dumps(value, **options)


def parsed(text):
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in {text}"))


def test_events_and_bodies_of_the_server():
    fields = {"logprob": -math.inf, "text": "ä"}
    expected = {"logprob": None, "logprob_text": "-inf", "text": "ä"}
    assert parsed(data_event(fields).removeprefix(b"data: ")) == expected
    assert parsed(named_event("delta", fields).splitlines()[1].removeprefix(b"data: ")) == {"type": "delta"} | expected
    assert parsed(JSONResponse(fields).body) == expected
    assert parsed(JSONResponse({"path": "\udc80"}).body) == {"path": "?"}


def test_a_checkpoint_whose_loss_is_infinite(tmp_path):
    progress = Progress(best_loss=math.inf, curve=[{"step": 1, "loss": -math.inf}])
    save_checkpoint(tmp_path, Checkpoint({"lr": 1.0}, progress, {"a": torch.zeros(2)}, {}, {}))
    content = (tmp_path / STATE).read_bytes()
    header = parsed(content[8 : 8 + int.from_bytes(content[:8], "little")])
    [meta] = header["__metadata__"].values()
    assert parsed(meta)["progress"]["best_loss_text"] == "inf"
    assert read_checkpoint(tmp_path, {"lr": 1.0}).progress == progress
