"""What makes a job run again, and what does not."""

import json
import math
import os
import shutil

import pytest

import gguflora
from gguflora.errors import OutputError
from gguflora.files.strict_json import restored, strict
from support.recipes import add_inputs, outputs, statuses

RECIPE = """
output = "{output}"

[sources]
bases = "{bases}"

[[steps]]
name = "merged"
action = "merge"
for = {{ base = "sources.bases" }}
base = "{{base}}"
adapters = ["adapters/one"]
out = "{{base}}-merged.gguf"
checks = {{ "total.snr_db" = {{ min = -1000 }} }}
"""


@pytest.fixture
def folder(tmp_path):
    return add_inputs(tmp_path, "one", "two")


def pipeline(folder, output="out", bases="*.gguf", **options):
    (folder / "recipe.toml").write_text(RECIPE.format(output=output, bases=bases))
    return statuses(gguflora.run_pipeline(folder / "recipe.toml", **options))


@pytest.mark.parametrize("output", [".", "out"])
def test_a_glob_takes_no_output(output, folder):
    assert pipeline(folder, output, "**/*.gguf") == ["done"]
    assert pipeline(folder, output, "**/*.gguf") == ["kept"]
    shutil.rmtree(folder / output / ".gguflora")
    assert pipeline(folder, output, "**/*.gguf") == ["failed"]  # without its record, it may be anyone's
    assert pipeline(folder, output, "**/*.gguf", force=True) == ["done"]
    assert outputs(folder / output) & {"base-merged.gguf", "base-merged-merged.gguf"} == {"base-merged.gguf"}


def test_the_same_size_and_time(folder):
    weights = folder / "adapters/one/adapter_model.safetensors"
    stat = weights.stat()
    pipeline(folder)
    weights.write_bytes((folder / "adapters/two/adapter_model.safetensors").read_bytes())
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert weights.stat().st_size == stat.st_size
    assert pipeline(folder) == ["done"]


def test_a_changed_output_is_made_again(folder):
    pipeline(folder)
    out = folder / "out/base-merged.gguf"
    content, stat = out.read_bytes(), out.stat()
    out.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(out, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert pipeline(folder) == ["done"]
    assert out.read_bytes() == content


def test_times_copies_and_files_that_are_not_read(folder, tmp_path_factory):
    pipeline(folder)
    (folder / "adapters/one/README.md").write_text("new")
    (folder / "adapters/one/optimizer.pt").write_text("new")
    for path in folder.rglob("*"):
        os.utime(path)
    assert pipeline(folder) == ["kept"]
    copy = tmp_path_factory.mktemp("copy") / "of"
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)
    assert pipeline(copy) == ["kept"]
    before = {path: path.stat().st_mtime_ns for path in (copy / "out").rglob("*.json")}
    assert pipeline(copy) == ["kept"]
    assert {path: path.stat().st_mtime_ns for path in (copy / "out").rglob("*.json")} == before


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/tools.jinja"])
def test_a_chat_template_is_an_input(name, folder):
    assert pipeline(folder) == ["done"]
    template = folder / "adapters/one" / name
    template.parent.mkdir(exist_ok=True)
    for text in ("{{ messages }}", "{{ messages[0] }}"):
        template.write_text(text)
        assert pipeline(folder) == ["done"]
    assert pipeline(folder) == ["kept"]


def test_names_reach_the_output(folder):
    pipeline(folder)
    (folder / "adapters/one").rename(folder / "adapters/three")
    text = (folder / "recipe.toml").read_text().replace("adapters/one", "adapters/three")
    (folder / "recipe.toml").write_text(text)
    assert statuses(gguflora.run_pipeline(folder / "recipe.toml")) == ["done"]


@pytest.mark.parametrize("form", ["file://{}", "file:{}", "file://localhost{}"])
def test_an_output_named_by_a_url_is_waited_for(form, folder):
    (folder / "a b").mkdir()
    shutil.move(folder / "base.gguf", folder / "a b/base.gguf")
    url = form.format(str(folder / "a b/base.gguf").replace(" ", "%20"))
    first = form.format(folder / "out/base-merged.gguf")
    step = (
        f'[[steps]]\nname = "next"\naction = "merge"\nbase = "{first}"\nadapters = ["adapters/two"]\nout = "next.gguf"'
    )
    text = RECIPE.format(output="out", bases=url)
    head, rest = text.split("[[steps]]")
    (folder / "recipe.toml").write_text(f"{head}{step}\n[[steps]]{rest}")
    assert statuses(gguflora.run_pipeline(folder / "recipe.toml")) == ["done", "done"]
    merged = gguflora.merge(folder / "out/base-merged.gguf", [folder / "adapters/two"], folder / "expected.gguf")
    assert (folder / "out/next.gguf").stat().st_size == merged.size


def test_links_for_the_folder_of_records_and_the_lock_are_refused(folder):
    (folder / "out").mkdir()
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere/x.part").write_text("kept")
    (folder / "out/.gguflora").symlink_to(folder / "elsewhere")
    with pytest.raises(OutputError, match="is a link"):
        pipeline(folder)
    (folder / "out/.gguflora").unlink()
    (folder / "out/.gguflora").mkdir()
    (folder / "out/.gguflora/lock").symlink_to(folder / "elsewhere/x.part")
    with pytest.raises(OutputError):
        pipeline(folder)
    assert (folder / "elsewhere/x.part").read_text() == "kept"


def test_json_is_strict_and_an_exact_merge_passes(folder):
    value = {"a": [math.inf, {"snr_db": math.inf, "min": -math.inf, "b_text": "inf and more"}], "c": math.nan, "d": 1.5}
    text = json.dumps(strict(value), allow_nan=False)
    assert json.loads(text)["a"][1]["snr_db_text"] == "inf"
    again = restored(json.loads(text))
    assert again["a"][1] == value["a"][1]
    assert math.isnan(again["c"])
    assert set(again) == set(value)
