"""Whatever is edited between runs: one more run makes what a run from scratch makes, and a second one does nothing."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

import gguflora
from support import builders
from support.builders import Adapter

RECIPE = """
output = "out"
[vars]
rank = 2
[sources]
adapters = "adapters/*"
bases = "bases/*.gguf"
"""
STEPS = [
    ("small", 'action = "resize"\nfor = { adapter = "sources.adapters" }\nadapter = "{adapter}"\nrank = "{rank}"\n'
     'out = "small/{adapter}"'),
    ("tiny", 'action = "resize"\nfor = { adapter = "steps.small" }\nadapter = "{adapter}"\nrank = 1\n'
     'out = "tiny/{adapter}"'),
    ("lora", 'action = "convert"\nfor = { adapter = "steps.small", base = "sources.bases" }\nadapter = "{adapter}"\n'
     'base = "{base}"\nscale = SCALE\nout = "{adapter}-{base}.gguf"'),
    ("both", 'action = "combine"\nadapters = ["adapters/one", { path = "out/small/two", scale = SCALE }]\n'
     'method = "cat"\nout = "both"'),
    ("merged", 'action = "merge"\nfor = { lora = "steps.lora" }\nbase = "bases/base.gguf"\n'
     'adapters = [{ path = "{lora}", scale = SCALE }]\nout = "{lora}-merged.gguf"'),
    ("patch", 'action = "merge"\nbase = "bases/base.gguf"\nadapters = ["out/both"]\npatch = "both.patch"'),
    ("again", 'action = "merge"\nbase = "out/one-base-merged.gguf"\nadapters = ["out/tiny/two"]\nseed = 3\n'
     'out = "again.gguf"'),
    ("back", 'action = "export"\nlora = "out/one-base.gguf"\nbase = "bases/base.gguf"\nout = "back"'),
    ("facts", 'action = "inspect"\nfor = { adapter = "steps.tiny" }\nadapter = "{adapter}"\n'
     'out = "facts/{adapter}.json"'),
    ("f16", 'action = "merge"\nbase = "out/again.gguf"\nadapters = ["out/back"]\nouttype = "F16"\nout = "f16.gguf"'),
]  # fmt: skip


class Folder:
    """A recipe of ten steps and its inputs, with edits that somebody could make."""

    def __init__(self, path, chance):
        self.path, self.chance, self.scale, self.rank = path, chance, 0.5, 2
        (path / "bases").mkdir()
        shutil.copyfile(builders.gguf_model("llama"), path / "bases/base.gguf")
        for seed, name in enumerate(("one", "two", "three")):
            self.adapter(name, seed)
        self.write()

    def adapter(self, name, seed):
        source = builders.adapter("llama", Adapter(targets=("q_proj",), seed=seed))
        shutil.copytree(source, self.path / "adapters" / name, dirs_exist_ok=True, copy_function=shutil.copyfile)

    def write(self):
        steps = "".join(f'[[steps]]\nname = "{name}"\n{keys}\n' for name, keys in STEPS)
        text = RECIPE.replace("rank = 2", f"rank = {self.rank}") + steps.replace("SCALE", str(self.scale))
        (self.path / "recipe.toml").write_text(text)

    def outputs(self):
        return [
            path for path in sorted((self.path / "out").rglob("*")) if path.is_file() and ".gguflora" not in path.parts
        ]

    def edit(self):
        edits = [self.content, self.same_size_and_time, self.time, self.name, self.option, self.delete, self.damage,
                 self.link, self.kill, self.state, self.move]  # fmt: skip
        edit = self.chance.choice(edits)
        edit()
        return edit.__name__

    def content(self):
        self.adapter(self.chance.choice(["one", "two", "three"]), self.chance.randrange(6))

    def same_size_and_time(self):
        weights = self.path / "adapters/one/adapter_model.safetensors"
        stat = weights.stat()
        self.adapter("one", self.chance.randrange(6))
        os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    def time(self):
        for path in self.path.rglob("*"):
            if self.chance.random() < 0.5 and not path.is_symlink():
                os.utime(path)

    def name(self):
        extra = sorted(path for path in (self.path / "adapters").iterdir() if path.name not in {"one", "two"})
        if extra:
            extra[0].rename(self.path / "adapters" / f"n{self.chance.randrange(1000)}")

    def option(self):
        self.scale, self.rank = self.chance.choice([0.5, 0.75, 1.0]), self.chance.choice([1, 2, 3])
        self.write()

    def delete(self):
        for path in self.outputs():
            if self.chance.random() < 0.3:
                path.unlink()

    def damage(self):
        paths = [path for path in self.outputs() if not path.is_symlink()]
        if paths:
            path = self.chance.choice(paths)
            path.write_bytes(path.read_bytes()[:-1] + b"\xff")

    def link(self):
        """An output moves elsewhere and a link takes its place, as DVC does it."""
        paths = [path for path in self.outputs() if not path.is_symlink()]
        if paths:
            path, store = self.chance.choice(paths), self.path / "store"
            store.mkdir(exist_ok=True)
            target = store / str(len(list(store.iterdir())))
            path.rename(target)
            path.symlink_to(target)

    def kill(self):
        code = "import gguflora; gguflora.run_pipeline('recipe.toml', resume=False)"
        process = subprocess.Popen([sys.executable, "-P", "-c", code], cwd=self.path)
        time.sleep(self.chance.uniform(0.5, 2.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(0.3)  # the job that was running ends with its pipeline

    def state(self):
        records = sorted((self.path / "out/.gguflora").glob("*.json"))
        if records:
            record = self.chance.choice(records)
            record.write_bytes(record.read_bytes()[: self.chance.randrange(40)])

    def move(self):
        copy = self.path.with_name(f"{self.path.name}-{self.chance.randrange(1 << 30)}")
        self.path.rename(copy)
        for path in (copy / "out").rglob("*"):
            if path.is_symlink():  # links to the old place are broken now, as after any move
                path.unlink()
        self.path = copy

    def made(self, report):
        """The bytes of all outputs of a run, by name."""
        found = {}
        for result in report.results:
            assert result.status in {"done", "kept"}, result.error
            files = sorted(result.out.iterdir()) if result.out.is_dir() else [result.out]
            found |= {f"{result.name}/{file.name}": content_of(file) for file in files}
        return found


def content_of(file):
    return file.read_bytes() if file.suffix != ".json" or file.parent.name != "facts" else b""  # which names its folder


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 6))])
def test_edits(seed, tmp_path):
    chance = random.Random(seed)
    (tmp_path / "work").mkdir()
    folder = Folder(tmp_path / "work", chance)
    history = []
    for number in range(3):
        history += [folder.edit() for _ in range(chance.randrange(1, 4))]
        # without its record an output is not known to be the pipeline's
        report = gguflora.run_pipeline(folder.path / "recipe.toml", force="state" in history)
        found = folder.made(report)
        again = gguflora.run_pipeline(folder.path / "recipe.toml")
        assert again.totals == {"kept": len(report.results)}, history
        scratch = tmp_path / f"scratch-{number}"
        shutil.copytree(folder.path, scratch, ignore=shutil.ignore_patterns("out", "store"))
        fresh = gguflora.run_pipeline(scratch / "recipe.toml")
        assert set(fresh.totals) == {"done"}
        expected = folder.made(fresh)
        assert found.keys() == expected.keys(), history
        assert [name for name in expected if found[name] != expected[name]] == [], history
