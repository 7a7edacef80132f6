"""Where inputs and outputs are: links, hidden files, long names, URLs of files; and messages that name the place."""

import os
import shutil

import pytest

import gguflora
from gguflora.errors import RecipeError
from gguflora.files.remote.location import local_path
from gguflora.pipeline.toml_lines import line_of
from support.recipes import CONVERTED, SMALL, add_inputs, outputs, run_recipe, statuses


@pytest.fixture
def folder(tmp_path):
    return add_inputs(tmp_path, "one", "two")


@pytest.mark.parametrize("inside", [True, False])
def test_links_in_the_place_of_outputs(inside, folder):
    """What DVC does with outputs: each file moves to a store, and a link takes its place."""
    run_recipe(folder, CONVERTED)
    store = folder / ("out/.cache" if inside else "cache")
    store.mkdir()
    for number, path in enumerate(sorted((folder / "out").rglob("*"))):
        if path.is_file() and not {".gguflora", ".cache"} & set(path.parts):
            path.rename(store / str(number))
            path.symlink_to(store / str(number))
    assert (folder / "out/one.gguf").is_symlink()
    assert statuses(run_recipe(folder, CONVERTED)) == ["kept"] * 4
    stored = {path: path.read_bytes() for path in store.iterdir()}
    shutil.copy(folder / "adapters/two/adapter_model.safetensors", folder / "adapters/one")
    assert sorted(statuses(run_recipe(folder, CONVERTED))) == ["done", "done", "kept", "kept"]
    assert {path: path.read_bytes() for path in store.iterdir()} == stored  # links are replaced, not followed
    assert not (folder / "out/one.gguf").is_symlink()
    assert (folder / "out/two.gguf").is_symlink()
    (folder / "x").mkdir()
    gguflora.resize(folder / "adapters/one", folder / "x/one", rank=2)
    gguflora.convert(folder / "x/one", folder / "base.gguf", folder / "x/one.gguf")
    assert (folder / "out/one.gguf").read_bytes() == (folder / "x/one.gguf").read_bytes()


def test_a_folder_that_became_a_link(folder):
    run_recipe(folder, CONVERTED)
    (folder / "cache").mkdir()
    (folder / "out/one").rename(folder / "cache/one")
    (folder / "out/one").symlink_to(folder / "cache/one")
    assert statuses(run_recipe(folder, CONVERTED)) == ["kept"] * 4
    before = (folder / "cache/one/adapter_model.safetensors").read_bytes()
    run_recipe(folder, CONVERTED.replace("rank = 2", "rank = 1"))
    assert not (folder / "out/one").is_symlink()
    assert (folder / "cache/one/adapter_model.safetensors").read_bytes() == before


def test_a_link_of_the_user_is_refused(folder):
    (folder / "out").mkdir()
    (folder / "mine").write_text("of the user")
    (folder / "out/one").symlink_to(folder / "mine")
    report = run_recipe(folder, SMALL, keep_going=True)
    assert statuses(report) == ["failed", "done"]
    assert "is a link" in report.results[0].error
    assert (folder / "mine").read_text() == "of the user"


def test_an_output_that_is_no_file_is_refused(folder):
    (folder / "out").mkdir()
    os.mkfifo(folder / "out/one.gguf")
    report = run_recipe(folder, CONVERTED, keep_going=True)
    assert "is a FIFO" in next(result.error for result in report.results if result.name == "one.gguf")
    assert (folder / "out/one.gguf").is_fifo()


def test_hidden_and_excluded(folder):
    for name in (".hidden", ".ipynb_checkpoints", "old-one"):
        shutil.copytree(folder / "adapters/one", folder / "adapters" / name)
    shutil.copytree(folder / "adapters/one", folder / "adapters/.ipynb_checkpoints/one")
    names = lambda text: {result.name for result in run_recipe(folder, text, dry_run=True).results}  # noqa: E731
    assert names(SMALL) == {"one", "two", "old-one"}
    assert names("include_hidden = true\n" + SMALL) == {"one", "two", "old-one", ".hidden"}
    for pattern in ("old-*", "adapters/old-*", "**/old-one"):
        assert names(f'exclude = ["{pattern}"]\n' + SMALL) == {"one", "two"}
    deep = SMALL.replace('"adapters/*"', '"adapters/**/"').replace("{adapter}", "{parent}-{adapter}")
    found = names('exclude = ["adapters/old-one"]\n' + deep.replace('adapter = "{parent}-', 'adapter = "'))
    assert not [name for name in found if name.endswith("old-one") or "ipynb" in name or ".hidden" in name]


def test_a_byte_order_mark(folder):
    (folder / "recipe.toml").write_bytes(b"\xef\xbb\xbf" + SMALL.replace("\n", "\r\n").encode())
    assert statuses(gguflora.run_pipeline(folder / "recipe.toml")) == ["done"] * 2


def test_names_of_255_bytes(folder):
    long = "ü" * 120
    text = CONVERTED.replace('out = "{adapter}"', f'out = "{{adapter}}{long}"').replace(
        '"{adapter}.gguf"', '"{adapter}.gguf"'
    )
    text = text.replace("{adapter}" + long, "{adapter}" + long + "x" * (255 - 240 - 3 - 5))
    for status in ("done", "kept"):
        assert statuses(run_recipe(folder, text)) == [status] * 4
    assert max(len(os.fsencode(name.rpartition("/")[2])) for name in outputs(folder / "out")) == 255
    name = "n" * 250 + ".gguf"
    gguflora.convert(folder / "adapters/one", folder / "base.gguf", folder / name)
    gguflora.convert(folder / "adapters/one", folder / "base.gguf", folder / name, force=True)
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("form", ["file://{}", "file:{}", "FILE://{}", "file://localhost{}", "file://LOCALHOST{}"])
def test_urls_of_files(form, folder):
    (folder / "a b").mkdir()
    shutil.copytree(folder / "adapters", folder / "a b/ad%20apters")
    place = str(folder / "a b/ad%20apters/one").replace("%", "%25").replace(" ", "%20")
    assert local_path(form.format(place)) == folder / "a b/ad%20apters/one"
    made = gguflora.convert(form.format(place), folder / "base.gguf", folder / "x.gguf")
    plain = gguflora.convert(folder / "adapters/one", folder / "base.gguf", folder / "y.gguf")
    assert made.tensors == plain.tensors
    text = SMALL.replace('"adapters/*"', f'"{form.format(place[:-3])}*"').replace(
        '"out"', f'"{form.format(folder)}/o%20t"'
    )
    assert statuses(run_recipe(folder, text)) == ["done"] * 2
    assert (folder / "o t/one").is_dir()


TOML = '''\
output = "out" # a comment = [
text = """
[[steps]]
name = 3
"""
sources.a = ["x", "y",
  "z"]
[[steps]]
name = 'one'
for = { rank = [1,
  2], "a.b" = 3 }
[steps.checks]
"errors.*" = { max = 1, mx = 2 }
[[steps]]
name = "two"
'''


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (("output",), 1), (("sources", "a"), 6), (("sources", "a", 2), 7), (("steps", 0, "name"), 9),
        (("steps", 0, "for", "rank", 1), 11), (("steps", 0, "for", "a.b"), 11),
        (("steps", 0, "checks", "errors.*", "mx"), 13),
        (("steps", 1, "name"), 15), (("steps", 1, "missing"), 14), (("steps",), 8), (("nothing",), 1),
    ],
)  # fmt: skip
def test_lines_of_keys(keys, line):
    assert line_of(TOML, keys) == line


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[[steps]]", "[[step]]", r":7: step: unknown key; did you mean 'steps'\?"),
        ("[sources]", "[source]", r":4: source: unknown key; did you mean 'sources'\?"),
        ("rank = 2", "rang = 2", r":12: steps.1.rang: unknown key; did you mean 'rank'\?"),
        ("rank = 2", "rank = 0", r":12: steps.1.rank: input should be greater than or equal to 1, found 0"),
        ("rank = 2", "rank = 2\nenergy = 0.5", r":13: steps.1.energy: rank is 2 and energy 0.5, expected only one"),
        ("rank = 2", "energy = nan", r":12: steps.1.energy: .*found nan"),
        ("rank = 2", "energy = 1.5", r":12: steps.1.energy: .*less than or equal to 1"),
        ("rank = 2", "", r":7: steps.1: resize needs either a rank or an energy"),
        ('base = "base.gguf"', 'base = "base.gguf"\nscale = nan', r":21: steps.2.scale: .*finite"),
        ('base = "base.gguf"', 'base = "base.gguf"\nscale = inf', r":21: steps.2.scale: .*finite"),
        ('base = "base.gguf"', 'base = "base.gguf"\nchecks = { size = { mx = 1 } }', r":21: .*mx: unknown"),
        ('"adapters/*"', '["adapters/*", "adapters/on?"]', r"writes .*out/one, but so does step 'small'"),
    ],
)  # fmt: skip
def test_messages(old, new, message, folder):
    assert old in CONVERTED
    with pytest.raises(RecipeError, match=message):
        run_recipe(folder, CONVERTED.replace(old, new), dry_run=True)


OPTIONS = {
    "merge": ['outtype = "Q9"', 'type = { "x" = "Q9" }', "seed = -1", 'rounding = "up"', "adapters = []"],
    "combine": ['method = "tise"', 'method = "ties"', "density = 0.5", 'method = "svd"\nrank = 0', 'sign = "x"'],
    "quantize": ['preset = "Q9"', 'preset = "Q4_K_M"\ntensor_types = { "(" = "Q8_0" }'],
    "convert": ["rank = 2\nenergy = 0.5", 'outtype = "Q4_K"', "energy = 0"],
}


@pytest.mark.parametrize(("action", "keys"), [(action, keys) for action, all_ in OPTIONS.items() for keys in all_])
def test_impossible_options_before_any_work(action, keys, folder):
    inputs = {"convert": 'adapter = "adapters/one"\nbase = "base.gguf"', "quantize": 'base = "base.gguf"'}
    given = inputs.get(action, 'base = "base.gguf"' + ("" if "adapters" in keys else '\nadapters = ["adapters/one"]'))
    step = f'output = "out"\n[[steps]]\nname = "x"\naction = "{action}"\nout = "x"\n{given}\n{keys}\n'
    with pytest.raises(RecipeError, match=r"recipe.toml:\d+: steps.1"):
        run_recipe(folder, step)
    assert not (folder / "out").exists()


def test_overlapping_sources_are_told(folder):
    for run in "ab":
        shutil.copytree(folder / "adapters", folder / "runs" / run)
    with pytest.raises(
        RecipeError, match=r"once made from .*runs/a/one, once from .*runs/b/one; .*\{parent\} or \{parent2\}"
    ):
        run_recipe(folder, SMALL.replace("adapters/*", "runs/*/one"))
    text = SMALL.replace("rank = 2", 'rank = "{rank}"').replace("for = {", "for = { rank = [1, 2],")
    with pytest.raises(RecipeError, match=r"put more variables into its name: \{rank\}"):
        run_recipe(folder, text)
