"""The fuzzers of recipes, folders, templates, tokens and of the server by its description: they run, and they find."""

import os
import re

import pytest
from typer.testing import CliRunner

import gguflora
from gguflora.runtime import tokenizing
from support import ROOT, serving
from tools import fuzz, fuzz_folders, fuzz_http, fuzz_openapi, fuzz_templates, fuzz_tokens

SECONDS = 3.0


@pytest.mark.parametrize("target", fuzz_folders.TARGETS)
def test_recipes_and_folders(target):
    trials, found = fuzz_folders.fuzz(target, SECONDS, seed=1)
    assert found == []
    assert trials


def test_templates():
    trials, found = fuzz_templates.fuzz(SECONDS, seed=1)
    assert found == []
    assert trials


def test_tokens():
    trials, found = fuzz_tokens.fuzz(SECONDS, seed=1)
    assert found == []
    assert trials


def test_a_server_by_its_description(monkeypatch):
    with serving.serving() as http:
        server = fuzz_http.Server(http.base_url.port)
        trials, found = fuzz_openapi.fuzz(server, 0, seed=1, examples=1)
        assert found == []
        assert trials > 20
        monkeypatch.setattr(http.engine, "adapters", lambda: 1 / 0)
        assert "/lora-adapters" in "".join(fuzz_openapi.fuzz(server, 0, seed=1, examples=1)[1])


def test_a_file_outside_that_changes_is_found(monkeypatch):
    real = gguflora.run_pipeline

    def run(path, **options):
        (path.parent.parent / "notes.gguf").write_text("overwritten")
        return real(path, **{**options, "dry_run": True})

    monkeypatch.setattr(gguflora, "run_pipeline", run)
    found = fuzz_folders.fuzz("recipes", 1, seed=1)[1]
    assert "notes.gguf" in "".join(found)


def test_an_exception_is_found(monkeypatch):
    def crash(path, **options):
        raise KeyError("x")

    monkeypatch.setattr(gguflora, "run_pipeline", crash)
    assert "KeyError" in "".join(fuzz_folders.fuzz("recipes", 1, seed=1)[1])


def test_limits_that_do_not_hold_are_found(monkeypatch):
    class Renderer:
        def render(self, template, variables):
            return "x" * (fuzz_templates.MAX_CHARS + 1)

    assert fuzz_templates.judge(Renderer(), "") == f"{fuzz_templates.MAX_CHARS + 1} characters"
    monkeypatch.setattr(Renderer, "render", lambda self, template, variables: 1 / 0)
    assert "ZeroDivisionError" in fuzz_templates.judge(Renderer(), "")


def test_other_tokens_are_found(monkeypatch):
    monkeypatch.setattr(tokenizing, "tokenize", lambda *_, **__: [0])
    assert "other tokens" in "".join(fuzz_tokens.fuzz(0.5, seed=1)[1])


def test_a_process_that_dies_is_found(monkeypatch):

    monkeypatch.setattr(tokenizing, "tokenize", lambda *_, **__: os.abort())
    assert "ended with status" in "".join(fuzz_tokens.fuzz(0.5, seed=1)[1])


def test_every_command_is_in_the_table():
    rows = set(re.findall(r"^\| `(\w+)` \| `fuzz_\w+.py` \|", (ROOT / "tools/README.md").read_text(), re.M))
    assert rows == {command.name or command.callback.__name__ for command in fuzz.app.registered_commands}


def test_the_summary():
    ran = CliRunner().invoke(fuzz.app, ["templates", "--seconds", "0.2", "--seed", "3"])
    assert (ran.exit_code, bool(re.fullmatch(r"\d+ templates, 0 findings\n", ran.output))) == (0, True), ran.output
