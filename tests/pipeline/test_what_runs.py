"""Which jobs a run makes: what it says beforehand, what it is asked for, and what it leaves or removes."""

import json
import os
import shutil
import subprocess
import sys

import pytest

import gguflora
from gguflora.errors import RecipeError
from support.cli import run
from support.oracles.gguf_files import read_tensors
from support.recipes import add_inputs, outputs, run_recipe, statuses

HEAD = """
output = "out"

[sources]
base = "base.gguf"
adapters = "adapters/*"
"""
SMALL = """
[[steps]]
name = "small"
action = "resize"
for = { adapter = "sources.adapters" }
adapter = "{adapter}"
rank = 2
out = "small/{adapter}"
"""
MERGED = """
[[steps]]
name = "merged"
action = "merge"
for = { adapter = "steps.small", scale = [0.5, 1.0] }
base = "base.gguf"
adapters = [{ path = "{adapter}", scale = "{scale}" }]
out = "{adapter}-x{scale}.gguf"
"""


@pytest.fixture
def folder(tmp_path):
    return add_inputs(tmp_path, "one", "two")


def snapshot(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_dry_run_says_what_changed(folder):
    recipe = HEAD + SMALL + MERGED
    planned = run_recipe(folder, recipe, dry_run=True)
    assert {result.why for result in planned.results} == {"not made before"}
    assert planned.totals == {"planned": 6}
    run_recipe(folder, recipe)
    assert run_recipe(folder, recipe, dry_run=True).totals == {"kept": 6}

    shutil.copy(folder / "adapters/two/adapter_model.safetensors", folder / "adapters/one")
    (folder / "out/two-x0.5.gguf").unlink()
    with (folder / "out/two-x1.0.gguf").open("ab") as file:
        file.write(b"more")
    before = snapshot(folder)
    why = {result.name: result.why for result in run_recipe(folder, recipe, dry_run=True).results}
    assert snapshot(folder / "out") == {path: time for path, time in before.items() if folder / "out" in path.parents}
    assert "input" in why["small/one"]
    assert "adapters/one has changed" in why["small/one"]
    assert "out/small/one has changed" in why["one-x0.5.gguf"]
    assert why["two-x0.5.gguf"] == "its output is missing"
    assert why["two-x1.0.gguf"] == "its output was changed"
    assert why["small/two"] is None

    result = run("pipeline", folder / "recipe.toml", "--dry-run")
    assert "to do   small: small/one: input" in result.stdout
    assert "1 kept" in result.stdout
    assert "5 to do" in result.stdout


def test_a_dry_run_names_options(folder):
    run_recipe(folder, HEAD + SMALL + MERGED)
    text = HEAD + SMALL.replace("rank = 2", "rank = 1") + MERGED.replace("base = ", 'outtype = "F16"\nbase = ')
    report = run_recipe(folder, text, dry_run=True)
    assert report.results[0].why == "option rank is 1, was 2"
    assert "option outtype is 'F16', was 'keep'" in report.results[2].why
    done = run_recipe(folder, text)
    assert [result.why for result in done.results] == [result.why for result in report.results]


@pytest.mark.parametrize(
    ("targets", "made"),
    [
        (["small"], {"small/one", "small/two"}),
        (["one-x0.5.gguf"], {"small/one", "one-x0.5.gguf"}),
        (["out/two-x1.0.gguf"], {"small/two", "two-x1.0.gguf"}),
        (["*-x1.0.gguf"], {"small/one", "small/two", "one-x1.0.gguf", "two-x1.0.gguf"}),
        (["small/one", "small/two"], {"small/one", "small/two"}),
    ],
)
def test_targets(targets, made, folder, monkeypatch):
    monkeypatch.chdir(folder)
    report = run_recipe(folder, HEAD + SMALL + MERGED, targets=targets)
    assert {result.name for result in report.results if result.status == "done"} == made
    assert {
        name.removesuffix("/adapter_config.json") for name in outputs(folder / "out") if "safetensors" not in name
    } == made


def test_targets_on_the_command_line(folder):
    run_recipe(folder, HEAD + SMALL + MERGED, dry_run=True)
    result = run("pipeline", folder / "recipe.toml", folder / "out/small/one", "--json")
    assert [item["name"] for item in json.loads(result.stdout)["results"]] == ["small/one"]
    wrong = run("pipeline", folder / "recipe.toml", "smal")
    assert wrong.returncode == 1
    assert "'smal' names no output; give a step (small, merged)" in wrong.stderr


VARIABLES = """
output = "{where}"
[vars]
where = "out"
rank = 2
scales = [0.5]
[[steps]]
name = "small"
action = "resize"
adapter = "adapters/{which}"
rank = "{rank}"
out = "{which}-r{rank}"
[[steps]]
name = "merged"
action = "merge"
for = { adapter = "steps.small", scale = "vars.scales" }
base = "base.gguf"
adapters = [{ path = "{adapter}", scale = "{scale}" }]
out = "{adapter}-x{scale}.gguf"
"""


def test_variables(folder):
    report = run_recipe(folder, VARIABLES, var={"which": "one"})
    assert {result.name for result in report.results} == {"one-r2", "one-r2-x0.5.gguf"}
    options = ["--var", "which=two", "--var", "rank=3", "--var", "where=else", "--var", "scales=[1, 2]", "--json"]
    result = run("pipeline", folder / "recipe.toml", *options)
    names = {item["name"] for item in json.loads(result.stdout)["results"]}
    assert names == {"two-r3", "two-r3-x1.gguf", "two-r3-x2.gguf"}
    assert (folder / "else/two-r3-x2.gguf").is_file()


@pytest.mark.parametrize(
    ("var", "message"),
    [
        ({}, r":10: steps.1.adapter: .*uses \{which\}.*--var which=VALUE"),
        ({"which": "one", "rnk": 1}, r"--var rnk: the recipe does not use it; its variables: where, rank, scales"),
        ({"which": "one", "rank": "two"}, r":5: vars.rank: --var rank=two: expected a whole number"),
        ({"which": "one", "scales": "1"}, r"expected a list such as \[1, 2\]"),
    ],
)
def test_variables_that_do_not_fit(var, message, folder):
    with pytest.raises(RecipeError, match=message):
        run_recipe(folder, VARIABLES, var=var)


def test_parents_and_snapshots(folder):
    for place in ("runs/a/checkpoint-5", "runs/b/checkpoint-5", "hub/models--org--legal/snapshots/1f0c9e"):
        shutil.copytree(folder / "adapters/one", folder / place)
    text = HEAD.replace('"adapters/*"', '["runs/*/checkpoint-5", "hub/models--*/snapshots/*"]')
    with pytest.raises(RecipeError, match=r"runs/a/checkpoint-5.*runs/b/checkpoint-5.*\{parent\}"):
        run_recipe(folder, text + SMALL)
    report = run_recipe(folder, text + SMALL.replace("small/{adapter}", "{parent2}-{parent}-{adapter}"))
    names = {result.name for result in report.results}
    assert names == {"runs-a-checkpoint-5", "runs-b-checkpoint-5", "hub-org-legal"}
    two = MERGED.replace("steps.small", "sources.adapters").replace("scale = [", 'base = "sources.base", scale = [')
    with pytest.raises(RecipeError, match=r"\{NAME.parent\}"):
        run_recipe(folder, text + two.replace("{adapter}-x", "{parent}-x"))
    report = run_recipe(folder, text + two.replace("{adapter}-x", "{adapter.parent}-{base}-x"), dry_run=True)
    assert "a-base-x0.5.gguf" in {result.name for result in report.results}


def test_all_keywords_of_merge(folder):
    step = (
        MERGED.replace("steps.small", "sources.adapters")
        .replace(", scale = [0.5, 1.0]", "")
        .replace('"{scale}"', "0.5")
    )
    typed = step.replace("-x{scale}", "").replace(
        "base = ", 'type = { "*attn_q*" = "F16" }\ntrust_names = true\nbase = ', 1
    )
    patch = step.replace('"merged"', '"patch"').replace('out = "{adapter}-x{scale}.gguf"', 'patch = "{adapter}.patch"')
    report = run_recipe(folder, HEAD + typed + patch)
    assert statuses(report) == ["done"] * 4, [result.error for result in report.results]
    gguflora.apply_patch(folder / "base.gguf", folder / "out/one.patch", folder / "applied.gguf")
    gguflora.merge(folder / "base.gguf", [(folder / "adapters/one", 0.5)], folder / "plain.gguf")
    gguflora.merge(
        folder / "base.gguf", [(folder / "adapters/one", 0.5)], folder / "typed.gguf", type={"*attn_q*": "F16"}
    )
    assert (folder / "applied.gguf").read_bytes() == (folder / "plain.gguf").read_bytes()
    found, expected = read_tensors(folder / "out/one.gguf"), read_tensors(folder / "typed.gguf")
    assert all((found[name] == values).all() for name, values in expected.items())
    assert statuses(run_recipe(folder, HEAD + typed + patch)) == ["kept"] * 4
    with pytest.raises(RecipeError, match="give either out, for a model, or patch"):
        run_recipe(folder, HEAD + step.replace('out = "{adapter}-x{scale}.gguf"', ""))


def test_orphans(folder):
    run_recipe(folder, HEAD + SMALL + MERGED)
    (folder / "out/mine.gguf").write_text("of the user")
    (folder / "out/two-x0.5.gguf").write_text("changed by the user")
    shutil.rmtree(folder / "adapters/two")
    recipe = HEAD + SMALL + MERGED.replace("1.0", "0.25")
    report = run_recipe(folder, recipe)
    assert set(report.orphans) == {"small/two", "one-x1.0.gguf", "two-x1.0.gguf"}
    assert "orphan  small/two: the recipe no longer makes it" in run("pipeline", folder / "recipe.toml").stdout
    assert run_recipe(folder, recipe, prune=True, dry_run=True).orphans == report.orphans
    pruned = run_recipe(folder, recipe, prune=True)
    assert set(pruned.pruned) == set(report.orphans)
    assert outputs(folder / "out") == {
        "small/one/adapter_config.json", "small/one/adapter_model.safetensors", "one-x0.5.gguf", "one-x0.25.gguf",
        "mine.gguf", "two-x0.5.gguf",
    }  # fmt: skip
    assert not (folder / "out/small/two").exists()
    again = run_recipe(folder, recipe)
    assert again.orphans == ()
    assert set(statuses(again)) == {"kept"}


def test_pruning_leaves_what_the_pipeline_did_not_make(folder):
    """A README in an output's folder, and files that have the names of an output's beside the link in its place."""
    run_recipe(folder, HEAD + SMALL)
    (folder / "out/small/one/README.md").write_text("of the user")
    assert statuses(run_recipe(folder, HEAD + SMALL, resume=False)) == ["done"] * 2
    shutil.move(folder / "out/small/two", folder / "store")
    (folder / "out/small/two").symlink_to(folder / "store")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / "out/small" / name).write_text("of the user")
    stored = {path.name: path.read_bytes() for path in (folder / "store").iterdir()}
    report = run_recipe(folder, HEAD + SMALL.replace("small/", "tiny/"), prune=True)
    assert set(report.pruned) == {"small/one", "small/two"}
    assert {name for name in outputs(folder / "out") if name.startswith("small/")} == {
        "small/one/README.md", "small/adapter_config.json", "small/adapter_model.safetensors",
    }  # fmt: skip
    assert not (folder / "out/small/two").is_symlink()
    assert {path.name: path.read_bytes() for path in (folder / "store").iterdir()} == stored


def test_nothing_is_pruned_after_a_failure(folder):
    """The old output may be the last good one."""
    run_recipe(folder, HEAD + SMALL)
    (folder / "adapters/two/adapter_model.safetensors").write_bytes(b"damaged")
    recipe = HEAD + SMALL.replace("small/", "tiny/")
    failed = run_recipe(folder, recipe, prune=True, keep_going=True)
    assert sorted(statuses(failed)) == ["done", "failed"]
    assert failed.pruned == ()
    assert set(failed.orphans) == {"small/one", "small/two"}
    assert (folder / "out/small/two/adapter_model.safetensors").exists()


def test_orphans_are_of_one_recipe(folder):
    run_recipe(folder, HEAD + SMALL)
    (folder / "other.toml").write_text(HEAD + SMALL.replace("small/", "tiny/").replace("rank = 2", "rank = 1"))
    report = gguflora.run_pipeline(folder / "other.toml", prune=True)
    assert report.orphans == report.pruned == ()


def test_a_recipe_from_stdin(folder):
    command = [sys.executable, "-P", "-m", "gguflora", "pipeline", "-", "--json"]
    result = subprocess.run(command, input=HEAD + SMALL, capture_output=True, text=True, cwd=folder, check=True)
    assert json.loads(result.stdout)["totals"] == {"done": 2}
    assert (folder / "out/small/one").is_dir()
    wrong = subprocess.run(
        command, check=False, input=HEAD + SMALL.replace("rank", "rang"), capture_output=True, text=True, cwd=folder
    )
    assert "<stdin>:13: steps.1.rang: unknown key; did you mean 'rank'?" in wrong.stderr


def test_pruning_by_a_recipe_from_stdin_needs_its_name(folder):
    """All such recipes have one path, so only a name tells them from each other."""
    command = [sys.executable, "-P", "-m", "gguflora", "pipeline", "-", "--prune"]

    def piped(text):
        return subprocess.run(command, check=False, input=text, capture_output=True, text=True, cwd=folder)

    assert "a recipe from stdin needs a name for --prune" in piped(HEAD + SMALL).stderr
    assert piped(f'name = "small"\n{HEAD}{SMALL}').returncode == 0
    other = SMALL.replace("small/", "tiny/")
    assert "pruned" not in piped(f'name = "tiny"\n{HEAD}{other}').stdout
    assert "pruned  small/one" in piped(f'name = "small"\n{HEAD}{SMALL.replace("small/", "new/")}').stdout
    assert (folder / "out/tiny/one").is_dir()


def test_a_run_with_nothing_to_do_writes_nothing(folder):
    run_recipe(folder, HEAD + SMALL + MERGED)
    before = snapshot(folder)
    for _ in range(2):
        assert set(statuses(run_recipe(folder, HEAD + SMALL + MERGED))) == {"kept"}
        assert {path: time for path, time in snapshot(folder).items() if path.name != "recipe.toml"} == {
            path: time for path, time in before.items() if path.name != "recipe.toml"
        }


def test_names_of_environment_and_home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("WHERE", "adapters")
    text = HEAD.replace('"adapters/*"', '"~/$WHERE/on?"').replace('"out"', '"~/${WHERE}-out"') + SMALL
    assert statuses(run_recipe(folder, text)) == ["done"]
    assert (folder / "adapters-out/small/one").is_dir()
    assert not (folder / "~").exists()
    with pytest.raises(RecipeError, match=r":6: sources.adapters: .*the environment has no NOWHERE"):
        run_recipe(folder, text.replace("$WHERE/on?", "$NOWHERE/*"))
    with pytest.raises(RecipeError, match=r"steps.1.out: '~/x' is not in the output folder"):
        run_recipe(folder, HEAD + SMALL.replace("small/{adapter}", "~/x"))
    with pytest.raises(RecipeError, match="no such home folder"):
        run_recipe(folder, text.replace("~/$WHERE", "~nobody-of-this-name/$WHERE"))


def test_without_a_home(folder):
    environment = {name: value for name, value in os.environ.items() if name != "HOME"}
    (folder / "recipe.toml").write_text(HEAD + SMALL)
    code = "import os, sys; os.path.expanduser = lambda path: path; from gguflora.cli import main; main()"
    command = [sys.executable, "-P", "-c", code, "pipeline", "recipe.toml"]
    result = subprocess.run(command, check=False, capture_output=True, text=True, cwd=folder, env=environment)
    assert result.returncode == 0, result.stderr
