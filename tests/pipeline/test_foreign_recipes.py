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
from gguflora.pipeline.job_process import run_job
from gguflora.pipeline.scheduler_address import warn_of_plain_address
from support.cli import run
from support.recipes import CONVERTED, outputs, statuses

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


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"out"', f'"{"x" * 300}"', "too long"),
        ('base = "base.gguf"', 'base = "/dev/zero"', "not a regular file|no regular file|is not a file"),
        ('base = "base.gguf"', 'base = "loop"', "loop|[Tt]oo many"),
    ],
)
def test_paths_that_the_system_refuses(cloned, old, new, message):
    file = recipe(cloned)
    (cloned / "loop").symlink_to("loop")
    file.write_text(file.read_text().replace(old, new))
    try:
        report = gguflora.run_pipeline(file)
    except (RecipeError, OutputError) as error:
        assert re.search(message, str(error))
    else:
        assert re.search(message, report.results[0].error)


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


def test_a_trained_file_is_waited_for(cloned):
    """A step that reads what lies beside, or in, the folder that another step makes."""
    (cloned / "data.jsonl").write_text('{"text": "one"}\n')
    for read in ("out/tuned.gguf", "out/tuned/adapter_model.safetensors"):
        merge = f'[[steps]]\nname = "m"\naction = "merge"\nbase = "base.gguf"\nadapters = ["{read}"]\nout = "m.gguf"\n'
        (cloned / "recipe.toml").write_text(TRAIN.replace("[[steps]]", merge + "\n[[steps]]"))
        report = gguflora.run_pipeline(cloned / "recipe.toml", targets=["m"], dry_run=True)
        assert [(result.step, result.status) for result in report.results] == [("m", "planned"), ("tune", "planned")]
    for target in ("tuned.gguf", "tuned.g*"):
        report = gguflora.run_pipeline(cloned / "recipe.toml", targets=[target], dry_run=True)
        assert [result.step for result in report.results] == ["tune"]


def appearing(monkeypatch, path, content, *, then=lambda: None):
    """Somebody writes a file to an output's place while its job runs."""
    real = local_workers.Workers.run

    def run(self, request):
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(content)
        then()
        return real(self, request)

    monkeypatch.setattr(local_workers.Workers, "run", run)


@pytest.mark.parametrize(
    ("out", "name"), [("lora.gguf", "lora.gguf"), ("lora", "lora/notes"), ("a/b.gguf", "a/b.gguf")]
)
def test_a_file_that_appears_during_a_job_stays(cloned, out, name, monkeypatch):
    file = recipe(cloned, out=out)
    if out == "lora":
        file.write_text(file.read_text().replace("convert", "resize").replace('base = "base.gguf"', "rank = 2"))
    appearing(monkeypatch, cloned / "out" / name, b"mine")
    for _ in range(2):
        report = gguflora.run_pipeline(file)
        assert statuses(report) == ["failed"]
        assert "no record of this pipeline names it" in report.results[0].error
        assert (cloned / "out" / name).read_bytes() == b"mine"
        assert outputs(cloned / "out") == {name}
        assert not claims(cloned)
    assert statuses(gguflora.run_pipeline(file, force=True)) == ["done"]
    monkeypatch.undo()
    assert statuses(gguflora.run_pipeline(file)) == ["kept"]


def test_a_file_that_appears_before_a_kill_stays(cloned, monkeypatch):
    def kill():
        raise SystemExit

    file = recipe(cloned)
    appearing(monkeypatch, cloned / "out" / "lora.gguf", b"mine", then=kill)
    with pytest.raises(SystemExit):
        gguflora.run_pipeline(file)
    monkeypatch.undo()
    assert len(claims(cloned)) == 1
    assert statuses(gguflora.run_pipeline(file)) == ["failed"]
    assert (cloned / "out" / "lora.gguf").read_bytes() == b"mine"


def test_what_was_put_aside_replaces_no_file_of_the_user(cloned):
    file = recipe(cloned)
    text = file.read_text()
    file.write_text(f"{text}checks = {{ size = {{ max = 1 }} }}\n")
    assert statuses(gguflora.run_pipeline(file)) == ["failed"]
    aside = cloned / "out/.gguflora/failed/lora.gguf"
    made = aside.read_bytes()
    (cloned / "out" / "lora.gguf").write_bytes(b"mine")
    file.write_text(text)
    for options in ({}, {"adopt": True}):
        assert statuses(gguflora.run_pipeline(file, **options)) == ["failed"]
        assert (cloned / "out" / "lora.gguf").read_bytes() == b"mine"
        assert aside.read_bytes() == made
    (cloned / "out" / "lora.gguf").unlink()
    assert statuses(gguflora.run_pipeline(file)) == ["done"]
    assert (cloned / "out" / "lora.gguf").read_bytes() == made


def test_a_job_that_goes_on_after_its_run_makes_nothing(cloned, monkeypatch):
    """As a worker of a cluster does that hears of Ctrl+C too late."""
    file, requests, real = recipe(cloned), [], local_workers.Workers.run

    def interrupt(self, request):
        requests.append(request)
        return {"error": "interrupted"}

    monkeypatch.setattr(local_workers.Workers, "run", interrupt)
    assert statuses(gguflora.run_pipeline(file)) == ["failed"]
    assert run_job(requests[0])["error"].startswith("interrupted: the run that wanted this output has ended")
    assert not outputs(cloned / "out")

    def late(self, request):  # while another run holds the folder
        assert "interrupted" in run_job(requests[0])["error"]
        return real(self, request)

    monkeypatch.setattr(local_workers.Workers, "run", late)
    assert statuses(gguflora.run_pipeline(file)) == ["done"]


ADOPTED = CONVERTED.replace("adapters/*", "adapter*")


@pytest.mark.parametrize("lost", ["deleted", "damaged"])
def test_outputs_are_adopted_after_their_records_were_lost(cloned, lost):
    file = cloned / "recipe.toml"
    file.write_text(ADOPTED)
    shutil.copytree(cloned / "adapter", cloned / "adapter2")
    assert statuses(gguflora.run_pipeline(file)) == ["done"] * 4
    shutil.copytree(cloned, cloned.parent / "copy")
    copied = gguflora.run_pipeline(cloned.parent / "copy" / "recipe.toml")
    assert statuses(copied) == ["kept"] * 4
    if lost == "deleted":
        shutil.rmtree(cloned / "out/.gguflora")
    else:
        for record in (cloned / "out/.gguflora").glob("*.json"):
            record.write_bytes(record.read_bytes()[:20])
    (cloned / "out/adapter/README.md").write_text("of the user")
    (cloned / "out/adapter2.gguf").write_bytes(b"changed")
    before = {path: path.stat().st_mtime_ns for path in (cloned / "out").rglob("*") if ".gguflora" not in path.parts}
    refused = gguflora.run_pipeline(file, keep_going=True)
    assert set(statuses(refused)) == {"failed", "left"}
    assert "--adopt keeps it if it is what the recipe makes, byte for byte" in refused.results[0].error
    assert "planned" in statuses(gguflora.run_pipeline(file, adopt=True, dry_run=True))
    adopted = gguflora.run_pipeline(file, adopt=True, keep_going=True)
    assert statuses(adopted) == ["done", "done", "done", "failed"]
    assert "is not what this job makes" in adopted.results[3].error
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (cloned / "out/adapter2.gguf").read_bytes() == b"changed"
    assert statuses(gguflora.run_pipeline(file, force=True)) == ["kept", "kept", "kept", "done"]
    assert "--adopt" in run("pipeline", "--help").stdout


@pytest.mark.parametrize("data", [".", "out", "../cloned"])
def test_training_data_do_not_hold_outputs(cloned, data):
    """They would be read as data in the next run."""
    (cloned / "out").mkdir()
    (cloned / "recipe.toml").write_text(TRAIN.replace("data.jsonl", data))
    with pytest.raises(RecipeError, match=r":8: steps.1.data: .*all files in it are inputs, but it holds .*tuned"):
        gguflora.run_pipeline(cloned / "recipe.toml")


@pytest.mark.parametrize(
    ("line", "name"),
    [("rank = 0", "rank"), ("lr = -1.0", "lr"), ("dropout = 1.5", "dropout"), ("epochs = 0", "epochs"),
     ("hours = inf", "hours"), ("steps = 0", "steps"), ("method = 'prompt'\nrslora = true", "method")],
)  # fmt: skip
def test_impossible_options_of_training_before_any_work(cloned, line, name):
    (cloned / "data.jsonl").write_text('{"text": "one"}\n')
    (cloned / "recipe.toml").write_text(f"{TRAIN}{line}\n")
    with pytest.raises(RecipeError, match=rf"steps.1.{name}: "):
        gguflora.run_pipeline(cloned / "recipe.toml")
    (cloned / "recipe.toml").write_text(f"{TRAIN}accumulate = 'auto'\nlength = 'auto'\nprecision = 'auto'\nlr = 0.1\n")
    assert statuses(gguflora.run_pipeline(cloned / "recipe.toml", dry_run=True)) == ["planned"]


def test_a_recipe_has_a_largest_size(tmp_path):
    sparse(tmp_path / "recipe.toml")
    with pytest.raises(RecipeError, match="more than the 1048576 bytes"):
        gguflora.run_pipeline(tmp_path / "recipe.toml")
