"""What a pipeline does when something goes wrong: what stays, what goes on, what is said."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

import gguflora
from gguflora.errors import OutputError, RecipeError
from gguflora.pipeline.results import PipelineInterrupted
from support.cli import run
from support.recipes import SMALL, add_inputs, outputs, run_recipe, statuses

MERGE = """
output = "out"
[[steps]]
name = "merged"
action = "merge"
base = "base.gguf"
adapters = [{ path = "adapters/one", scale = 0.5 }]
out = "merged.gguf"
checks = { size = { max = MAX } }
"""


@pytest.fixture
def folder(tmp_path):
    return add_inputs(tmp_path, "one", "two", "three")


def test_a_failed_check_keeps_the_last_good_output(folder):
    assert statuses(run_recipe(folder, MERGE.replace("MAX", "1e12"))) == ["done"]
    good = (folder / "out/merged.gguf").read_bytes()
    changed = MERGE.replace("0.5", "0.75")
    for _ in range(2):  # the second time it need not be made
        report = run_recipe(folder, changed.replace("MAX", "1"))
        assert statuses(report) == ["failed"]
        aside = folder / "out/.gguflora/failed/merged.gguf"
        assert str(aside) in report.results[0].error
        assert "stays as it was" in report.results[0].error
        assert (folder / "out/merged.gguf").read_bytes() == good
        assert outputs(folder / "out") == {"merged.gguf"}
    gguflora.merge(folder / "base.gguf", [(folder / "adapters/one", 0.75)], folder / "expected.gguf")
    expected, time = (folder / "expected.gguf").read_bytes(), aside.stat().st_mtime_ns
    assert aside.read_bytes() == expected
    assert statuses(run_recipe(folder, MERGE.replace("MAX", "1e12"))) == ["kept"]  # the last good one is known still
    assert statuses(run_recipe(folder, changed.replace("MAX", "1e12"))) == ["done"]  # the other limit lets it through
    assert (folder / "out/merged.gguf").read_bytes() == expected
    assert (folder / "out/merged.gguf").stat().st_mtime_ns == time
    assert not aside.exists()
    assert statuses(run_recipe(folder, changed.replace("MAX", "1e12"))) == ["kept"]


def test_what_was_put_aside_goes_when_a_later_output_passes(folder):
    for text in (MERGE, SMALL + 'checks = { "errors.*" = { max = MAX } }\n'):
        aside = folder / "out/.gguflora/failed"
        for limit, count in (("0.0001", True), ("1e12", False)):
            # another option each time, so that what was put aside is of no use
            changed = text.replace("MAX", limit).replace("0.5", limit).replace("rank = 2", f"rank = {1 + count}")
            report = run_recipe(folder, changed, keep_going=True)
            assert set(statuses(report)) == {"failed" if count else "done"}
            assert bool([path for path in aside.rglob("*") if path.is_file()]) == count


def test_a_failed_check_of_a_folder(folder):
    check = 'checks = { "errors.*" = { max = LIMIT } }\n'
    run_recipe(folder, SMALL + check.replace("LIMIT", "2"))
    (folder / "out/one/README.md").write_text("of the user")
    good = (folder / "out/one/adapter_model.safetensors").read_bytes()
    text = (SMALL + check).replace("rank = 2", "rank = 1")
    report = run_recipe(folder, text.replace("LIMIT", "0.01"), keep_going=True)
    assert statuses(report) == ["failed"] * 3
    assert (folder / "out/one/adapter_model.safetensors").read_bytes() == good
    assert statuses(run_recipe(folder, text.replace("LIMIT", "2"))) == ["done"] * 3
    assert (folder / "out/one/adapter_model.safetensors").read_bytes() != good
    assert (folder / "out/one/README.md").read_text() == "of the user"


def test_a_failed_job_keeps_the_last_good_output(folder):
    run_recipe(folder, SMALL)
    good = (folder / "out/one/adapter_model.safetensors").read_bytes()
    config = folder / "adapters/one/adapter_config.json"
    text = config.read_text()
    config.write_text(text.replace('"r": 4', '"r": 5'))
    report = run_recipe(folder, SMALL, keep_going=True)
    assert statuses(report) == ["failed", "kept", "kept"]
    assert ".gguflora" not in report.results[0].error
    assert (folder / "out/one/adapter_model.safetensors").read_bytes() == good
    config.write_text(text)
    assert statuses(run_recipe(folder, SMALL)) == ["kept"] * 3
    assert not list((folder / "out/.gguflora").glob("drafts/*"))


def test_warnings_of_steps_are_printed(folder):
    extra = folder / "adapters/one/adapter_config.json"
    config = json.loads(extra.read_text()) | {"a_key_of_tomorrow": 1}
    extra.write_text(json.dumps(config))
    warned = gguflora.merge(folder / "base.gguf", folder / "adapters/one", folder / "x.gguf").warnings
    report = run_recipe(folder, MERGE.replace("MAX", "1e12"))
    assert report.warnings == tuple(f"merged: merged.gguf: {text}" for text in warned)
    shutil.rmtree(folder / "out")
    result = run("pipeline", folder / "recipe.toml")
    assert result.stderr.count("warning: merged: merged.gguf: ") == len(warned)


@pytest.mark.parametrize("given", ["[]", '"nothing/*"'])
def test_empty_sources(given, folder):
    text = SMALL.replace('"adapters/*"', given)
    if given == "[]":
        report = run_recipe(folder, text)
        assert "step 'small' has no jobs: sources.adapters is empty" in report.warnings[0]
        assert "--allow-empty" in run("pipeline", folder / "recipe.toml").stderr
    else:
        with pytest.raises(RecipeError, match=rf"nothing in {folder} matches it; --allow-empty"):
            run_recipe(folder, text)
    assert run_recipe(folder, text, allow_empty=True).warnings == ()
    result = run("pipeline", folder / "recipe.toml", "--allow-empty")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("no jobs; outputs in")


def test_a_matrix_without_items(folder):
    report = run_recipe(folder, SMALL.replace("for = {", "for = { rank = [],"))
    assert "its list 'rank' is empty" in report.warnings[0]


def test_keep_going_past_inputs_that_are_not_there(folder):
    (folder / "adapters/broken").symlink_to("nowhere")
    (folder / "adapters/circle").symlink_to("circle")
    with pytest.raises(RecipeError, match="broken: is a link to nowhere, which does not exist"):
        run_recipe(folder, SMALL)
    named = '[[steps]]\nname = "named"\naction = "resize"\nadapter = "absent"\nrank = 1\nout = "named"\n'
    report = run_recipe(folder, SMALL + named, keep_going=True)
    found = {result.name: (result.status, result.error) for result in report.results}
    assert found["broken"] == ("failed", f"{folder}/adapters/broken: is a link to nowhere, which does not exist")
    assert found["circle"][0] == "failed"
    assert "cannot be read" in found["circle"][1]
    assert found["named"][0] == "failed"
    assert {found[name][0] for name in ("one", "two", "three")} == {"done"}


@pytest.mark.skipif(os.getuid() == 0, reason="root reads everything")
def test_keep_going_past_an_unreadable_file(folder):
    (folder / "adapters/one/adapter_model.safetensors").chmod(0)
    report = run_recipe(folder, SMALL, keep_going=True)
    assert statuses(report) == ["failed", "done", "done"]
    assert "adapter_model.safetensors: cannot be read: Permission denied" in report.results[0].error


def test_keep_going_past_a_file_that_cannot_be_hashed(folder, monkeypatch):
    from gguflora.pipeline import keys

    real = keys.sha256_of

    def failing(path):
        if path.parent.name == "two":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    run_recipe(folder, SMALL)
    for path in folder.glob("adapters/*/*"):
        os.utime(path)
    monkeypatch.setattr(keys, "sha256_of", failing)
    report = run_recipe(folder, SMALL, keep_going=True)
    assert sorted(statuses(report)) == ["failed", "kept", "kept"]
    assert report.failed == 1
    assert "cannot be read: Permission denied" in next(result.error for result in report.results if result.error)


def test_the_folder_of_a_report_is_checked_first(folder):
    (folder / "file").write_text("")
    for place in (folder / "file", folder / "file/report"):
        with pytest.raises(OutputError, match="cannot be written"):
            run_recipe(folder, SMALL, report=place)
    (folder / "report/report.json").mkdir(parents=True)
    with pytest.raises(OutputError, match="is a directory"):
        run_recipe(folder, SMALL, report=folder / "report")
    assert not (folder / "out").exists()


MANY = """
output = "out"
[[steps]]
name = "merged"
action = "merge"
for = { scale = [SCALES] }
base = "base.gguf"
adapters = [{ path = "adapters/one", scale = "{scale}" }]
out = "{scale}.gguf"
""".replace("SCALES", ", ".join(str(number) for number in range(1, 61)))


@pytest.mark.parametrize(("sent", "form"), [(signal.SIGINT, "--json"), (signal.SIGTERM, "--no-resume")])
def test_an_interrupted_run_reports_what_was_done(sent, form, folder):
    (folder / "recipe.toml").write_text(MANY)
    command = [sys.executable, "-P", "-m", "gguflora", "pipeline", "recipe.toml", "--report", "report", form]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if form == "--json":
        deadline = time.monotonic() + 60
        while not list((folder / "out/.gguflora").glob("*.json")) and time.monotonic() < deadline:
            time.sleep(0.02)
        first = ""
    else:
        first = process.stdout.readline()  # which appears while the rest is being made
        assert first.startswith("done    merged: 1.gguf")
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; finished steps are kept" in err
    report = json.loads((folder / "report/report.json").read_text())
    assert report["interrupted"]
    assert report["totals"]["done"] >= 1
    assert report["totals"]["left"] >= 1
    if form == "--json":
        assert json.loads(out)["totals"] == report["totals"]
    kept = gguflora.run_pipeline(folder / "recipe.toml", jobs=2).totals
    assert kept["kept"] == report["totals"]["done"]
    assert kept["done"] == report["totals"]["left"]


def test_an_interruption_in_python(folder):
    seen = []

    def stop(result):
        seen.append(result)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(PipelineInterrupted) as caught:
        run_recipe(folder, MANY, watch=stop)
    assert caught.value.report.totals == {"done": 2, "left": 58}


def test_a_report_replaces_only_a_report(folder):
    (folder / "report").mkdir()
    (folder / "report/report.json").write_text('{"mine": 1}')
    with pytest.raises(OutputError, match="already exists"):
        run_recipe(folder, SMALL, report=folder / "report")
    assert not (folder / "out").exists()
    assert (folder / "report/report.json").read_text() == '{"mine": 1}'
    run_recipe(folder, SMALL, report=folder / "report", force=True)
    assert run_recipe(folder, SMALL, report=folder / "report").totals == {"kept": 3}
    named = MERGE.replace("MAX", "1e12").replace('"merged.gguf"', '"report.json"')
    with pytest.raises(OutputError, match="would replace"):
        run_recipe(folder, named, report=folder / "out")


@pytest.mark.parametrize(
    ("limits", "message"),
    [("", "give min, max or both"), ("min = 2, max = 1", "min is 2 and max 1, so no number passes")],
)
def test_limits_that_make_no_sense(limits, message, folder):
    with pytest.raises(RecipeError, match=message):
        run_recipe(folder, MERGE.replace("max = MAX", limits))
