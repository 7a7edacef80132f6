"""Recipes and output folders that came from elsewhere replace no file of the user, and follow no link."""

import os
import re
import shutil
import socket

import pytest

import gguflora
from gguflora.diagnostics import demo
from gguflora.errors import OutputError, RecipeError
from gguflora.pipeline import local_workers, runner
from gguflora.pipeline.scheduler_address import warn_of_plain_address
from support.cli import run
from support.recipes import outputs, statuses

RECIPE = """
output = "{output}"

[sources]
adapter = "adapter"

[[steps]]
name = "convert"
action = "convert"
adapter = "adapter"
base = "base.gguf"
out = "{out}"
"""


@pytest.fixture
def cloned(tmp_path):
    """A cloned folder in a home with files of the user."""
    folder = tmp_path / "home" / "cloned"
    folder.mkdir(parents=True)
    shutil.copytree(demo.HERE / "shout", folder / "adapter")
    shutil.copy(demo.BASE, folder / "base.gguf")
    for name in (".bashrc", "notes.gguf"):
        (tmp_path / "home" / name).write_text("the user's own")
    return folder


def recipe(folder, output="out", out="lora.gguf"):
    text = RECIPE.format(output=output, out=out).replace('[sources]\nadapter = "adapter"\n', "")
    (folder / "recipe.toml").write_text(text)
    return folder / "recipe.toml"


def bound(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def sparse(path):
    with path.open("wb") as file:
        file.truncate(1 << 40)


def own_files(folder):
    return [(folder.parent / name).read_text() for name in (".bashrc", "notes.gguf")]


@pytest.mark.parametrize("output", ["..", "../elsewhere", "{root}", "link"])
@pytest.mark.parametrize("out", [".bashrc", "notes.gguf", "new.gguf"])
def test_an_output_folder_elsewhere_needs_an_option(cloned, output, out):
    (cloned / "link").symlink_to(cloned.parent)
    file = recipe(cloned, output.format(root=cloned.parent), out)
    for dry_run in (True, False):
        with pytest.raises(RecipeError, match="--allow-outside"):
            gguflora.run_pipeline(file, dry_run=dry_run)
    assert own_files(cloned) == ["the user's own"] * 2
    assert not (cloned.parent / ".gguflora").exists()
    report = gguflora.run_pipeline(file, allow_outside=True)
    free = output == "../elsewhere" or out == "new.gguf"
    assert statuses(report) == (["done"] if free else ["failed"])
    assert own_files(cloned) == ["the user's own"] * 2


def test_only_files_of_its_own_are_replaced(cloned):
    file = recipe(cloned)
    (cloned / "out").mkdir()
    (cloned / "out" / "lora.gguf").write_text("mine")
    for options in ({}, {"resume": False}, {"dry_run": True}):
        report = gguflora.run_pipeline(file, **options)
        assert statuses(report) == ["failed"]
        assert "no record of this pipeline names it" in report.results[0].error
        assert (cloned / "out" / "lora.gguf").read_text() == "mine"
    assert statuses(gguflora.run_pipeline(file, force=True)) == ["done"]
    assert statuses(gguflora.run_pipeline(file)) == ["kept"]
    assert statuses(gguflora.run_pipeline(file, resume=False)) == ["done"]  # its own by now


def test_folders_and_parts_in_the_way(cloned):
    file = recipe(cloned, out="lora")
    (cloned / "out" / "lora").mkdir(parents=True)
    (cloned / "out" / "lora" / "diary").write_text("mine")
    assert statuses(gguflora.run_pipeline(file)) == ["failed"]
    assert outputs(cloned / "out") == {"lora/diary"}


def test_a_failed_job_leaves_no_claim(cloned):
    file = recipe(cloned)
    content = (cloned / "adapter" / "adapter_model.safetensors").read_bytes()
    (cloned / "adapter" / "adapter_model.safetensors").write_bytes(content[:100])
    assert statuses(gguflora.run_pipeline(file)) == ["failed"]
    (cloned / "adapter" / "adapter_model.safetensors").write_bytes(content)
    (cloned / "out" / "lora.gguf").write_text("mine")
    assert statuses(gguflora.run_pipeline(file)) == ["failed"]
    assert (cloned / "out" / "lora.gguf").read_text() == "mine"


LINKS = {
    ".gguflora": "victims",
    ".gguflora/lock": "victims/a.part",
    ".gguflora/hashes.json": "victims/a.part",
    ".gguflora/failed": "victims",
    ".gguflora/x.part": "victims/a.part",
    ".gguflora/0123.json": "victims/a.part",
}


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("options", [{}, {"force": True}, {"resume": False}, {"prune": True}, {"dry_run": True}])
def test_links_in_a_cloned_output_folder(cloned, name, options):
    file = recipe(cloned)
    victims = cloned.parent / "victims"
    victims.mkdir()
    for victim in ("a.part", "lock", "hashes.json"):
        (victims / victim).write_text("mine")
    link = cloned / "out" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(cloned.parent / LINKS[name])
    with pytest.raises(OutputError, match="is a link"):
        gguflora.run_pipeline(file, **options)
    assert sorted(path.name for path in victims.iterdir()) == ["a.part", "hashes.json", "lock"]
    assert {path.read_text() for path in victims.iterdir()} == {"mine"}


def test_an_output_that_is_a_link(cloned):
    file = recipe(cloned)
    (cloned / "out").mkdir()
    (cloned / "out" / "lora.gguf").symlink_to(cloned.parent / "notes.gguf")
    assert statuses(gguflora.run_pipeline(file, force=True)) == ["failed"]
    (cloned / "out" / "lora.gguf").unlink()
    (cloned / "out" / "sub").symlink_to(cloned.parent)
    with pytest.raises(RecipeError, match="not in the output folder"):
        gguflora.run_pipeline(recipe(cloned, out="sub/notes.gguf"), force=True)
    assert own_files(cloned) == ["the user's own"] * 2


def test_options_of_the_command(cloned):
    file = recipe(cloned, "..", "notes.gguf")
    assert run("pipeline", file).returncode == 1
    assert run("pipeline", file, "--allow-outside").returncode == 1
    assert own_files(cloned) == ["the user's own"] * 2
    assert run("pipeline", file, "--allow-outside", "--force").returncode == 0
    assert (cloned.parent / "notes.gguf").read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("lora.gguf", "a\\u0000b"),
        ('"out"', '"o\\u0000"'),
        ('base = "base.gguf"', 'base = "\\u0000"'),
        ('base = "base.gguf"', "rank = " + "9" * 5000),
        ('base = "base.gguf"', "base = " + "[" * 5000 + "]" * 5000),
        ('base = "base.gguf"', "base = " + "{a=" * 5000 + "1" + "}" * 5000),
    ],
)
def test_values_that_python_refuses(cloned, old, new):
    file = recipe(cloned)
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(RecipeError, match=r"U\+0000|is not TOML"):
        gguflora.run_pipeline(file, dry_run=True)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.mkdir(), bound, sparse])
@pytest.mark.parametrize("name", ["lock", "hashes.json", "0123.json", "x.part", ""])
def test_other_things_in_a_cloned_output_folder(cloned, make, name):
    """FIFOs would block, and a sparse file of a terabyte would fill the memory."""
    file = recipe(cloned)
    path = cloned / "out" / ".gguflora" / name
    path.parent.mkdir(parents=True)
    make(path)
    try:
        report = gguflora.run_pipeline(file)
    except OutputError as error:
        assert re.search(r"is no regular file|is a file, expected|cannot be written", str(error))
    else:
        assert statuses(report) in (["done"], ["failed"])


def test_schedulers_that_others_can_reach():
    for address in ("tcp://head:8786", "head:8786", "ws://10.0.0.1:1", "tcp://[fe80::1]:8786"):
        assert "without TLS" in warn_of_plain_address(address)[0]
    for fine in (
        "tcp://127.0.0.1:8786",
        "tcp://localhost:1",
        "tls://head:8786",
        "tcp://[::1]:1",
        "inproc://x",
        None,
        5,
    ):
        assert warn_of_plain_address(fine) == ()


def claims(folder):
    return list((folder / "out" / ".gguflora").glob("*.claim"))


def killed_after(monkeypatch, target, name):
    """The function still does its work, and then the process is gone."""
    real = getattr(target, name)

    def kill(*args, **options):
        real(*args, **options)
        raise SystemExit

    monkeypatch.setattr(target, name, kill)


@pytest.mark.parametrize("limit", [1, 1e12])
def test_killed_between_an_output_and_its_record(cloned, limit, monkeypatch):
    """It is the pipeline's still, whether it was just made or had been put aside and now takes its place."""
    file = recipe(cloned)
    text = file.read_text()
    if limit == 1:
        file.write_text(f"{text}checks = {{ size = {{ max = 1 }} }}\n")
        assert statuses(gguflora.run_pipeline(file)) == ["failed"]
        file.write_text(text)
        killed_after(monkeypatch, runner, "publish_alone")
    else:
        killed_after(monkeypatch, local_workers.Workers, "run")
    with pytest.raises(SystemExit):
        gguflora.run_pipeline(file)
    monkeypatch.undo()
    assert outputs(cloned / "out") == {"lora.gguf"}
    assert len(claims(cloned)) == 1
    assert statuses(gguflora.run_pipeline(file)) == ["done"]
    assert not claims(cloned)
    assert statuses(gguflora.run_pipeline(file)) == ["kept"]


def test_a_job_that_dies_after_its_output_is_made(cloned, monkeypatch):
    """As when Ctrl+C ends a job's process before it has answered."""
    file, real = recipe(cloned), local_workers.Workers.run

    def die(self, request):
        assert "report" in real(self, request)
        return {"error": "its process ended", "died": True}

    monkeypatch.setattr(local_workers.Workers, "run", die)
    assert statuses(gguflora.run_pipeline(file)) == ["failed"]
    monkeypatch.undo()
    assert statuses(gguflora.run_pipeline(file)) == ["done"]
    assert not claims(cloned)


def test_force_claims_nothing_before_it_replaces_it(cloned, monkeypatch):
    file = recipe(cloned)
    (cloned / "out").mkdir()
    (cloned / "out" / "lora.gguf").write_text("mine")

    def kill(*_):
        raise SystemExit

    monkeypatch.setattr(local_workers.Workers, "run", kill)
    with pytest.raises(SystemExit):
        gguflora.run_pipeline(file, force=True)
    monkeypatch.undo()
    assert statuses(gguflora.run_pipeline(file)) == ["failed"]
    assert (cloned / "out" / "lora.gguf").read_text() == "mine"


TRAIN = """
output = "out"

[[steps]]
name = "tune"
action = "train"
base = "base.gguf"
data = "data.jsonl"
out = "tuned"
"""


def test_the_file_beside_a_trained_adapter_is_an_output_too(cloned):
    (cloned / "data.jsonl").write_text('{"text": "one"}\n')
    (cloned / "recipe.toml").write_text(TRAIN)
    (cloned / "out").mkdir()
    (cloned / "out" / "tuned.gguf").write_text("mine")
    for form, status in ((TRAIN, "failed"), (TRAIN + 'method = "dora"\n', "planned")):  # which makes no such file
        (cloned / "recipe.toml").write_text(form)
        assert statuses(gguflora.run_pipeline(cloned / "recipe.toml", dry_run=True)) == [status]
    convert = RECIPE.partition("[[steps]]")[2].format(out="tuned.gguf")
    for steps in ([TRAIN, convert], [f'output = "out"\n[[steps]]{convert}', TRAIN.partition("[[steps]]")[2]]):
        (cloned / "recipe.toml").write_text("[[steps]]".join(steps))
        with pytest.raises(RecipeError, match="but so does step"):
            gguflora.run_pipeline(cloned / "recipe.toml")
    assert (cloned / "out" / "tuned.gguf").read_text() == "mine"
