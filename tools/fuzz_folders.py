"""Run recipes and folders of strangers in a home with files of its own: ``python -m tools.fuzz recipes``, ``folders``.

Nothing that a recipe says and nothing that lies in a cloned folder may change, remove or add a file outside of that
folder, raise anything but an error of gguflora's, or take longer than `SECONDS`.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import gguflora
from gguflora.errors import GgufloraError
from support import fuzzing

SECONDS: Final = 60
"""Time of one trial; a busy machine is slow itself."""
_MEMORY: Final = 2 << 30
_BATCH: Final = 25
_VICTIMS: Final = (".bashrc", "notes.gguf", "a.part", "hashes.json", "model.gguf.journal", "state.safetensors")

RECIPE: Final = """
output = "{output}"

[sources]
tunes = "{source}"

[[steps]]
name = "convert"
action = "convert"
for = {{ tune = "sources.tunes" }}
adapter = "{{tune}}"
base = "{base}"
out = "{out}"

[[steps]]
name = "merge"
action = "merge"
base = "base.gguf"
adapters = [{{ path = "adapter", scale = {scale} }}]
out = "{merged}"
"""
SOUND: Final = {
    "output": "out", "source": "adapters/*", "base": "base.gguf", "out": "lora-{tune}.gguf", "scale": "1.0",
    "merged": "merged.gguf",
}  # fmt: skip
_NAMES: Final = (
    "..", ".", "", "/", "../x.gguf", ".bashrc", "../.bashrc", "{home}/.bashrc", "{home}", "~", "~/.bashrc", "$HOME/x",
    "link/x.gguf", "link", "link/../.bashrc", "out/../../.bashrc", "x$(touch pwned)", "`touch pwned`", "a\\\\nb",
    "a\\u001b[2J", "a\\u0000b", "x" * 300, "{tune}", "{nothing}", "{tune}/{tune}", "**/*", "[", ".gguflora/lock",
    ".gguflora/x.json",
    "file:///etc/passwd", "memory://x", "http://127.0.0.1:9/x", "hf://a/b", "/dev/null", "/dev/zero", "/proc/self/mem",
    "fifo", "s3://", "-rf", "con\\u202efdp.exe", "é中", "base.gguf", "adapters", "recipe.toml",
)  # fmt: skip
_VALUES: Final = (
    "0", "-1", "1e400", "nan", "inf", "true", '""', "[]", "{}", '"x"', "[[1]]", "1979-05-27", "9" * 400, '"{tune}"',
    "0x10", "{ a = { b = 1 } }", "[1, 'a']",
)  # fmt: skip


def home(folder: Path) -> Path:
    """Write a home with files of the user, and a cloned folder with a base, an adapter and room for a recipe."""
    cloned = folder / "cloned"
    (cloned / "adapters/one").mkdir(parents=True)
    for name in _VICTIMS:
        (folder / name).write_text("the user's own")
    (folder / "victims").mkdir()
    for name in (*_VICTIMS, "lock"):
        (folder / "victims" / name).write_text("the user's own")
    fuzzing.write_lora_directory(cloned / "adapters/one")
    shutil.copytree(cloned / "adapters/one", cloned / "adapter")
    shutil.copyfile(fuzzing.base(), cloned / "base.gguf")
    return cloned


def _outside(folder: Path, cloned: Path) -> dict[str, bytes]:
    """Return all files outside of the cloned folder, with what they hold."""
    found = {}
    for path in folder.rglob("*"):
        if not path.is_relative_to(cloned) and (path.is_symlink() or not path.is_dir()):
            found[str(path)] = path.read_bytes() if path.is_file() else b""
    return found


# -- recipes --


def recipe(dice: random.Random) -> str:
    """Return a recipe: a sound one with some of its names and values replaced, sometimes with damaged text."""
    words = dict(SOUND)
    for _ in range(dice.choice([1, 1, 2, 3])):
        key = dice.choice(list(words))
        words[key] = dice.choice(_VALUES) if key == "scale" else dice.choice(_NAMES)
    text = RECIPE.format(**words)
    for _ in range(dice.choice([0, 0, 0, 1, 2])):
        lines = text.splitlines()
        at = dice.randrange(len(lines))
        key = lines[at].partition(" = ")[0]
        change = [
            f"{key} = {dice.choice(_VALUES)}",
            lines[at] * 2,
            dice.choice(lines),
            f"x{lines[at]}",
            "[[steps]]",
            "",
        ]
        text = "\n".join([*lines[:at], dice.choice(change), *lines[at + 1 :]])
    if dice.random() < 0.1:
        at = dice.randrange(len(text))
        text = text[:at] + dice.choice(["\0", "\x1b", '"', "[" * 3000, "\ufeff", "'''", "\\"]) + text[at:]
    return text


def try_recipe(cloned: Path, dice: random.Random) -> str:
    """Run a recipe; return its text."""
    text = recipe(dice).replace("{home}", str(cloned.parent))
    (cloned / "recipe.toml").write_text(text, encoding="utf-8", errors="replace")
    (cloned / "link").symlink_to(cloned.parent)
    os.mkfifo(cloned / "fifo")
    options: dict[str, Any] = {"dry_run": dice.random() < 0.7, "keep_going": dice.random() < 0.5}
    with suppress(GgufloraError):
        gguflora.run_pipeline(cloned / "recipe.toml", **options)
    return f"{options} {text}"


# -- cloned folders --

_OWN: Final = (
    "out/.gguflora", "out/.gguflora/lock", "out/.gguflora/hashes.json", "out/.gguflora/failed", "out/.gguflora/drafts",
    "out/.gguflora/drafts/x", "out/.gguflora/x.part", "out/.gguflora/0.json", "out/.gguflora/0.claim", "out",
    "out/lora-one.gguf", "out/merged.gguf", "out/.merged.gguf.0.partial", "out/.lora-one.gguf.01234567.partial",
    "base.gguf.journal", "base.gguf.undo", "peft/adapter_config.json", "peft", "peft/adapter_model.safetensors",
    "new.gguf", ".new.gguf.00000000.partial", "new.patch", "adapter/adapter_config.json", "adapter/tokenizer.json",
    "adapter/chat_template.jinja", "adapter/additional_chat_templates", "adapters/two", "base.gguf",
    "report/report.json", "report",
)  # fmt: skip


def _plant(cloned: Path, dice: random.Random) -> list[str]:
    """Put links, FIFOs, sockets, folders and large files where gguflora writes or reads; say what."""
    planted = []
    for _ in range(dice.choice([1, 1, 2, 4])):
        name = dice.choice(_OWN)
        path = cloned / name
        if not Path(os.path.realpath(path.parent)).is_relative_to(cloned.resolve()):  # in a link just planted
            continue
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            kind = dice.choice(list(_KINDS))
            _KINDS[kind](path, cloned.parent, dice)
            planted.append(f"{kind} at {name}")
    return planted


def _sparse(path: Path, folder: Path, dice: random.Random) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


def _bind(path: Path, folder: Path, dice: random.Random) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


_KINDS: Final[dict[str, Callable[[Path, Path, random.Random], Any]]] = {
    "link to a file": lambda path, folder, dice: path.symlink_to(folder / dice.choice(_VICTIMS)),
    "link to a folder": lambda path, folder, dice: path.symlink_to(folder / "victims"),
    "link to the home": lambda path, folder, dice: path.symlink_to(folder),
    "link to nothing": lambda path, folder, dice: path.symlink_to(folder / "new"),
    "link to itself": lambda path, folder, dice: path.symlink_to(path),
    "link to a device": lambda path, folder, dice: path.symlink_to("/dev/zero"),
    "FIFO": lambda path, folder, dice: os.mkfifo(path),
    "socket": _bind,
    "folder": lambda path, folder, dice: (path / "inner").mkdir(parents=True),
    "large file": _sparse,
    "bytes": lambda path, folder, dice: path.write_bytes(dice.randbytes(dice.choice([0, 1, 100, 5000]))),
    "JSON": lambda path, folder, dice: path.write_text(dice.choice(["[]", "{}", "[" * 99999, '{"a": 1e999}', "null"])),
}

_ACTIONS: Final[dict[str, Callable[[Path], Any]]] = {
    "pipeline": lambda cloned: gguflora.run_pipeline(cloned / "recipe.toml", keep_going=True),
    "pipeline --dry-run": lambda cloned: gguflora.run_pipeline(cloned / "recipe.toml", dry_run=True),
    "pipeline --force": lambda cloned: gguflora.run_pipeline(cloned / "recipe.toml", force=True),
    "pipeline --prune": lambda cloned: gguflora.run_pipeline(cloned / "recipe.toml", prune=True),
    "convert": lambda cloned: gguflora.convert(
        cloned / "adapter", cloned / "base.gguf", cloned / "new.gguf", force=True
    ),
    "merge": lambda cloned: gguflora.merge(
        cloned / "base.gguf", [(cloned / "adapter", 1.0)], cloned / "new.gguf", force=True
    ),
    "patch": lambda cloned: gguflora.merge(
        cloned / "base.gguf", [(cloned / "adapter", 1.0)], patch=cloned / "new.patch", force=True
    ),
    "in place": lambda cloned: gguflora.merge(cloned / "base.gguf", [(cloned / "adapter", 1.0)], in_place=True),
    "unmerge": lambda cloned: gguflora.unmerge(cloned / "base.gguf"),
    "combine": lambda cloned: gguflora.combine([(cloned / "adapter", 1.0)], cloned / "peft", force=True),
    "inspect": lambda cloned: gguflora.inspect(cloned / "adapter"),
}


def try_folder(cloned: Path, dice: random.Random) -> str:
    """Run a command in a cloned folder; return what it was."""
    (cloned / "recipe.toml").write_text(RECIPE.format(**SOUND))
    name = dice.choice(list(_ACTIONS))
    if dice.random() < 0.2:  # what a run leaves is there, too
        with suppress(GgufloraError):
            _ACTIONS["in place" if name == "unmerge" else name](cloned)
    planted = _plant(cloned, dice)
    with suppress(GgufloraError):
        _ACTIONS[name](cloned)
    return f"{name}: {', '.join(planted)}"


# -- trials --

TARGETS: Final = {"recipes": try_recipe, "folders": try_folder}


class TooSlowError(BaseException):
    """A trial took longer than `SECONDS`."""


def fuzz(target: str, seconds: float, seed: int) -> tuple[int, list[str]]:
    """Try recipes or folders for some time.

    Returns:
        The number of trials, and what was found.
    """
    trials, found, end, batch = 0, dict[str, None](), time.monotonic() + seconds, 0
    fuzzing.base()
    with tempfile.TemporaryDirectory(prefix="gguflora-fuzz-") as folder:
        while time.monotonic() < end:
            done, what = _batch(Path(folder), target, f"{seed}-{batch}", end)
            trials += done
            found |= dict.fromkeys(what)
            batch += 1
    return trials, list(found)


def _batch(folder: Path, target: str, dice: str, end: float) -> tuple[int, list[str]]:
    """Run trials in a process of their own: how many there were, and what was found."""
    said = folder / "said"
    said.write_text("0\n")
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setsid()
            _trials(folder, target, dice, said, end)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    deadline = time.monotonic() + _BATCH * SECONDS
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
        time.sleep(0.02)
    count, *lines = said.read_text().splitlines()
    found = [line.replace("\\n", "\n") for line in lines]
    return int(count), [*found, *([f"{target} {dice}-{count}: status {ended[1]}"] if ended[1] else [])]


def _trials(folder: Path, target: str, dice: str, said: Path, end: float) -> None:
    fuzzing.limit_memory()
    found: list[str] = []
    for number in range(_BATCH):
        scratch = folder / "home"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        os.environ["HOME"] = str(scratch)
        os.environ["GGUFLORA_CACHE"] = str(folder / "cache")
        cloned = home(scratch)
        os.chdir(cloned)
        what = _trial(scratch, cloned, target, random.Random(f"{dice}-{number}"))
        if what:
            found.append(f"{target} {dice}-{number}: {what}".replace("\n", "\\n"))
        said.write_text("\n".join([str(number + 1), *found]) + "\n", encoding="utf-8", errors="replace")
        if time.monotonic() > end:
            return


def _trial(scratch: Path, cloned: Path, target: str, dice: random.Random) -> str | None:
    """Return what one trial has shown that must not be."""

    def stop(number: int, frame: object) -> None:
        raise TooSlowError

    before = _outside(scratch, cloned)
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    said = ""
    try:
        said = TARGETS[target](cloned, dice)
        what = ""
    except (Exception, TooSlowError) as error:
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if "/gguflora/" in frame.filename]
        place = f"{Path(own[-1].filename).name}:{own[-1].name}" if own else "?"
        what = f"{type(error).__name__} in {place}: {error!s:.200}"
    finally:
        signal.alarm(0)
    after = _outside(scratch, cloned)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed:
        what += f" files outside have changed: {changed[:3]}"
    return f"{what} ({said})" if what else None
