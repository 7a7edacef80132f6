"""`gguflora.run_pipeline`: recipes run, resume, fail and report as they say."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import gguflora
from gguflora.errors import OutputError, RecipeError
from gguflora.pipeline import local_workers, runner
from gguflora.system.locks import try_lock
from support import zoo
from support.cli import run
from support.oracles.gguf_files import read_tensors
from support.recipes import add_inputs, outputs, statuses
from support.shards import split

ACTIONS = ("convert", "merge", "inspect")

RECIPE = """
output = "out"

[sources]
base = "base.gguf"
adapters = "adapters/*"

[[steps]]
name = "small"
action = "resize"
for = { adapter = "sources.adapters", rank = [1, 2] }
adapter = "{adapter}"
rank = "{rank}"
out = "peft/{adapter}-r{rank}"

[[steps]]
name = "lora"
action = "convert"
for = { adapter = "steps.small", base = "sources.base" }
adapter = "{adapter}"
base = "{base}"
out = "{adapter}-{base}.gguf"

[[steps]]
name = "merged"
action = "merge"
for = { lora = "steps.lora", scale = [0.5, 1] }
base = "base.gguf"
adapters = [{ path = "{lora}", scale = "{scale}" }]
out = "merged/{lora}-x{scale}.gguf"

[[steps]]
name = "both"
action = "combine"
adapters = ["adapters/one", { path = "adapters/two", scale = -0.5 }]
method = "ties"
density = 0.5
out = "both"

[[steps]]
name = "report"
action = "inspect"
adapter = "adapters/one"
base = "base.gguf"
out = "one.json"
checks = { "changes.*.rank" = { max = 4 }, problems = { max = 0 } }
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return add_inputs(tmp_path, "one", "two")


def only(folder, *names):
    """The recipe with some of its steps."""
    head, *steps = RECIPE.split("[[steps]]")
    chosen = [step for step in steps if re.search(r'name = "(\w+)"', step)[1] in names]
    (folder / "recipe.toml").write_text("[[steps]]".join([head, *chosen]))
    return folder / "recipe.toml"


def test_matrices_order_and_what_is_kept(folder):
    report = gguflora.run_pipeline(folder / "recipe.toml", jobs=2, report=folder / "report")
    assert statuses(report) == ["done"] * (4 + 4 + 8 + 1 + 1), [result.error for result in report.results]
    assert len(outputs(folder / "out")) == 4 * 2 + 4 + 8 + 2 + 1
    gguflora.resize(folder / "adapters/one", folder / "small", rank=2)
    gguflora.convert(folder / "small", folder / "base.gguf", folder / "lora.gguf")
    gguflora.merge(folder / "base.gguf", [(folder / "lora.gguf", 0.5)], folder / "merged.gguf")

    found = read_tensors(folder / "out/merged/one-r2-base-x0.5.gguf")
    for name, values in read_tensors(folder / "merged.gguf").items():
        assert (found[name] == values).all(), name
    page = (folder / "report/report.html").read_text()
    assert "18 done" in page
    assert not re.search(r"(?:src|href)=|https?://", page)
    assert json.loads((folder / "report/report.json").read_text())["failed"] == 0
    again = gguflora.run_pipeline(folder / "recipe.toml")
    assert statuses(again) == ["kept"] * 18
    assert again.results[0].report == report.results[0].report


def test_only_what_has_changed_is_done_again(folder):
    recipe = only(folder, "small", "lora", "both")
    gguflora.run_pipeline(recipe, jobs=2)
    shutil.copy(folder / "adapters/two/adapter_model.safetensors", folder / "adapters/one")
    (folder / "out/two-r1-base.gguf").unlink()
    recipe.write_text(recipe.read_text().replace("density = 0.5", "density = 0.6"))
    done = {result.out.name for result in gguflora.run_pipeline(recipe).results if result.status == "done"}
    assert done == {"one-r1", "one-r2", "one-r1-base.gguf", "one-r2-base.gguf", "two-r1-base.gguf", "both"}
    os.utime(folder / "base.gguf")
    assert set(statuses(gguflora.run_pipeline(recipe))) == {"kept"}
    assert set(statuses(gguflora.run_pipeline(recipe, resume=False))) == {"done"}


SPLIT_RECIPE = """
output = "out"

[sources]
bases = "bases/*.gguf"

[[steps]]
name = "merged"
action = "merge"
for = { base = "sources.bases" }
base = "{base}"
adapters = ["adapters/one"]
out = "{base}-one.gguf"

[[steps]]
name = "twice"
action = "merge"
for = { base = "steps.merged" }
base = "{base}"
adapters = ["adapters/two"]
out = "{base}-two.gguf"
"""


def test_split_models_are_one_each(folder):
    (folder / "bases").mkdir()
    parts = split(folder / "base.gguf", folder / "bases" / "big.gguf", 2)
    recipe = folder / "recipe.toml"
    recipe.write_text(SPLIT_RECIPE)
    report = gguflora.run_pipeline(recipe)
    assert [(result.out.name, result.status) for result in report.results] == [
        ("big-one-00001-of-00002.gguf", "done"),
        ("big-one-two-00001-of-00002.gguf", "done"),
    ]
    names = {f"big-one{more}-0000{number}-of-00002.gguf" for more in ("", "-two") for number in (1, 2)}
    assert {Path(name).name for name in outputs(folder / "out")} == names
    assert statuses(gguflora.run_pipeline(recipe)) == ["kept"] * 2
    (folder / "out" / "big-one-two-00002-of-00002.gguf").unlink()
    assert statuses(gguflora.run_pipeline(recipe)) == ["kept", "done"]
    content = bytearray(parts[1].read_bytes())
    content[-1] ^= 1
    parts[1].write_bytes(content)
    assert statuses(gguflora.run_pipeline(recipe)) == ["done"] * 2


def test_a_failure_takes_nothing_else_down(folder):
    recipe = only(folder, "small", "lora", "both")
    config = folder / "adapters/one/adapter_config.json"
    config.write_text(config.read_text().replace('"r": 4', '"r": 5'))
    report = gguflora.run_pipeline(recipe, keep_going=True)
    found = {result.out.name: result for result in report.results}
    assert {name: result.status for name, result in found.items()} == {
        "one-r1": "failed", "one-r2": "failed", "two-r1": "done", "two-r2": "done", "one-r1-base.gguf": "left",
        "one-r2-base.gguf": "left", "two-r1-base.gguf": "done", "two-r2-base.gguf": "done", "both": "failed",
    }  # fmt: skip
    assert "expected rank 5" in found["one-r1"].error
    assert "needs" in found["one-r1-base.gguf"].error
    assert report.failed == 5
    (folder / "out/two-r1-base.gguf").unlink()
    stopped = gguflora.run_pipeline(recipe)
    assert "done" not in statuses(stopped)
    assert run("pipeline", recipe).returncode == 1


def test_checks_fail_a_step_and_what_depends_on_it(folder):
    recipe = only(folder, "small", "lora")
    recipe.write_text(recipe.read_text().replace('out = "peft', 'checks = { "errors.*" = { max = 0.7 } }\nout = "peft'))
    for _ in range(2):  # also when its output is kept
        report = gguflora.run_pipeline(recipe, keep_going=True)
        by_status = {result.out.name: result.status for result in report.results}
        assert by_status["one-r1"] == "failed"
        assert by_status["one-r2"] in {"done", "kept"}
        assert by_status["one-r1-base.gguf"] == "left"
    assert "allowed at most 0.7" in report.results[0].error
    aside = folder / "out/.gguflora/failed/peft/one-r1"
    assert aside.is_dir()
    assert str(aside) in report.results[0].error
    assert not (folder / "out/peft/one-r1").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            'action = "resize"',
            'action = "resise"',
            r"recipe.toml:10: steps.1.action: is 'resise', expected one of combine",
        ),
        (
            'adapter = "{adapter}"\nrank',
            'adaptor = "x"\nadapter = "{adapter}"\nrank',
            r":12: steps.1.adaptor: unknown key",
        ),
        ('rank = "{rank}"', 'rank = "{range}"', r":13: steps.1.rank: .*the variables of its matrix: adapter, rank"),
        ("rank = [1, 2]", 'rank = [1, "two"]', r":13: steps.1.rank: .*'two'"),
        ("-r{rank}", "", r":14: steps.1.out: writes .*/peft/one, but so does step 'small'"),
        ("peft/{adapter}", "../{adapter}", r":14: steps.1.out: .* is not in the output folder"),
        ("peft/{adapter}", ".gguflora/{adapter}", r":14: steps.1.out: .* is not in the output folder"),
        ('"sources.adapters"', '"sources.adaptors"', r":11: steps.1.for.adapter: 'sources.adaptors' is unknown"),
        ('"sources.adapters"', '"steps.lora"', r"wait for each other: small -> lora -> small"),
        ('"adapters/*"', '"nowhere/*"', r":6: sources.adapters: 'nowhere/\*': no such file"),
        ('name = "lora"', 'name = "small"', r":17: steps.2.name: another step is named 'small', too"),
        ('["adapters/one",', '["adapters/three",', r"steps.4.adapters: .*three: no such file or directory"),
        ('output = "out"', "output = ", r"is not TOML: .*line 2"),
        ('output = "out"', "", r"output: field required"),
    ],
)
def test_what_makes_no_sense_is_said_before_anything_runs(folder, old, new, message):
    text = RECIPE.replace(old, new, 1)
    assert text != RECIPE
    (folder / "recipe.toml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        gguflora.run_pipeline(folder / "recipe.toml")
    assert not (folder / "out").exists()


def test_outputs_made_from_each_other(folder):
    (folder / "recipe.toml").write_text(
        "\n".join(
            ['output = "out"']
            + [
                f'[[steps]]\nname = "{own}"\naction = "resize"\nrank = 1\nadapter = "out/{other}"\nout = "{own}"'
                for own, other in (("a", "b"), ("b", "a"))
            ]
        )
    )
    with pytest.raises(RecipeError, match="outputs are made from each other"):
        gguflora.run_pipeline(folder / "recipe.toml")


def test_dry_run_writes_nothing(folder):
    report = gguflora.run_pipeline(folder / "recipe.toml", dry_run=True)
    assert statuses(report) == ["planned"] * 18
    assert not (folder / "out").exists()


def test_two_runs_on_one_folder_do_not_meet(folder):
    (folder / "out/.gguflora").mkdir(parents=True)
    with (folder / "out/.gguflora/lock").open("w") as lock:
        assert try_lock(lock.fileno())
        with pytest.raises(OutputError, match="another pipeline"):
            gguflora.run_pipeline(only(folder, "small"))
    assert set(statuses(gguflora.run_pipeline(only(folder, "small")))) == {"done"}


def test_no_space(folder, monkeypatch):
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutputError, match="but only 1,000 are free"):
        gguflora.run_pipeline(only(folder, "small", "lora", "merged"))
    assert not outputs(folder / "out")


def test_killed_and_resumed(folder):
    """SIGKILL in the middle: no half output, and the next run does only the rest."""
    command = [sys.executable, "-m", "gguflora", "pipeline", "recipe.toml"]
    process = subprocess.Popen(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(Path(gguflora.__file__).parents[1])}
    )
    deadline = time.monotonic() + 60
    while not list((folder / "out").glob("peft/one-r2")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.5)  # the job that was running is stopped
    made = set((folder / "out/.gguflora").glob("*.json"))
    report = gguflora.run_pipeline(folder / "recipe.toml", jobs=2)
    assert report.failed == 0
    assert 1 <= statuses(report).count("kept") == len(made - {folder / "out/.gguflora/hashes.json"}) < 18


def test_a_job_that_needs_all_memory_runs_alone(folder):
    recipe = only(folder, "small")
    recipe.write_text(recipe.read_text().replace('out = "peft', 'memory = 4000\nout = "peft'))
    assert statuses(gguflora.run_pipeline(recipe, jobs=4, memory=1000)) == ["done"] * 4


def test_memory_is_asked_for_when_jobs_end(folder, monkeypatch):
    """Room for one job when it begins, for many when the first ends: the others run at once then."""
    answers = iter([1 << 30])
    monkeypatch.setattr(local_workers, "available_memory", lambda: next(answers, 64 << 30))
    monkeypatch.setattr(runner, "_LOOK_SECONDS", 600.0)  # on a busy machine the first job takes longer than a look
    most, real = [], local_workers.Workers.run

    def counted(self, request, *more):
        most.append(request["key"])
        answer = real(self, request, *more)
        most.remove(request["key"])
        seen.append(len(most) + 1)
        return answer

    seen = []
    monkeypatch.setattr(local_workers.Workers, "run", counted)
    assert statuses(gguflora.run_pipeline(only(folder, "small"), jobs=4)) == ["done"] * 4
    assert seen[0] == 1
    assert max(seen) > 1


def test_command_line_and_schema(folder):
    recipe = only(folder, "small", "report")
    result = run("pipeline", recipe, "--json", "--report", folder / "report")
    assert result.returncode == 0, result.stderr
    assert len(json.loads(result.stdout)["results"]) == 5
    assert "5 kept; outputs in" in run("pipeline", recipe).stdout
    schema = json.loads(run("pipeline", "--schema").stdout)
    assert schema["properties"].keys() == {"name", "output", "vars", "sources", "exclude", "include_hidden", "steps"}
    assert "Merge" in schema["$defs"]


def test_without_pydantic_it_says_what_to_install():
    code = (
        "import sys, gguflora\n"
        "sys.modules['pydantic'] = None\n"
        "try: gguflora.run_pipeline('recipe.toml')\n"
        "except gguflora.GgufloraError as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True).stdout
    assert "gguflora[pipeline]" in said


def test_steps_that_compare_and_extract(folder):
    """The way back from a merged file, and a ceiling for its divergence from the adapter at run time."""
    (folder / "recipe.toml").write_text(
        """
output = "out"
[[steps]]
name = "merged"
action = "merge"
base = "base.gguf"
adapters = ["adapters/one"]
rounding = "nearest"
out = "merged.gguf"

[[steps]]
name = "lora"
action = "extract"
finetuned = "out/merged.gguf"
base = "base.gguf"
rank = 4
out = "lora.gguf"
checks = { "errors.*" = { max = 1e-3 } }

[[steps]]
name = "peft"
action = "export"
lora = "out/lora.gguf"
base = "base.gguf"
out = "peft"

[[steps]]
name = "compared"
action = "compare"
base = "base.gguf"
merged = "out/merged.gguf"
adapters = ["adapters/one"]
n_ctx = 64
out = "compared.json"
checks = { "divergences.merged.kl" = { max = 1e-3 }, "divergences.base.kl" = { min = 1e-9 } }
"""
    )
    report = gguflora.run_pipeline(folder / "recipe.toml")
    assert [(result.status, result.error) for result in report.results] == [("done", None)] * 4
    assert gguflora.diff(folder / "adapters/one", folder / "out/peft").cosine == pytest.approx(1, abs=1e-6)


def test_names_are_trusted_in_recipes(tmp_path):
    """falcon-h1's converter scales tensors, and gguflora has no rule for it."""
    adapter = tmp_path / "adapter"
    zoo.peft_model("falcon_h1", target_modules=["in_proj"]).save_pretrained(adapter)
    shutil.copy(zoo.gguf_model("falcon_h1"), tmp_path / "base.gguf")
    step = '[[steps]]\nname = "{action}"\naction = "{action}"\nbase = "base.gguf"\n{adapter}\nout = "{action}.out"\n'
    one, many = 'adapter = "adapter"', 'adapters = ["adapter"]'
    steps = [step.format(action=action, adapter=many if action == "merge" else one) for action in ACTIONS]
    recipe = tmp_path / "recipe.toml"
    for step in steps:
        for keys, status in (("", "failed"), ("trust_names = true\ntext_only = true\n", "done")):
            recipe.write_text(f'output = "out"\n{step}{keys}')
            assert statuses(gguflora.run_pipeline(recipe)) == [status]
