"""The control groups of Linux (v1 and v2) that limit this process: how a container gets its share of a machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple


class ControlGroup(NamedTuple):
    """One control group that holds this process, directly or through a group inside it.

    Attributes:
        folder: directory with the files of the group.
        is_v2: whether the files have the names of version 2.
    """

    folder: Path
    is_v2: bool

    def read_numbers(self, name: str) -> list[int | None]:
        """Return the numbers of a one-line file, with None for ``max``; an empty list if the file cannot be read."""
        with suppress(OSError, ValueError):
            words = (self.folder / name).read_text(encoding="ascii").split()
            return [None if word == "max" else int(word) for word in words]
        return []

    def read_number(self, name: str) -> int | None:
        """Return the only number of a file; None for ``max``, and if the file cannot be read."""
        numbers = self.read_numbers(name)
        return numbers[0] if len(numbers) == 1 else None

    def read_row(self, name: str, key: str) -> int | None:
        """Return the number after ``key`` in a file of keys and numbers; None if there is none."""
        with suppress(OSError, ValueError):
            rows = (self.folder / name).read_text(encoding="ascii").splitlines()
            return next((int(row.split()[1]) for row in rows if row.split()[:1] == [key]), None)
        return None


def control_groups(controller: str, root: Path = Path("/")) -> list[ControlGroup]:
    """Return the groups whose limits hold for this process, from its own up to the outermost that is visible.

    Args:
        controller: ``cpu`` or ``memory``.
        root: where the file system of the machine begins; only tests have another.
    """
    with suppress(OSError, ValueError):
        paths = _paths(controller, (root / "proc/self/cgroup").read_text(encoding="utf-8"))
        mounts = (root / "proc/self/mountinfo").read_text(encoding="utf-8")
        return [group for is_v2, path in paths for group in _visible(controller, mounts, path, root, is_v2=is_v2)]
    return []


def _paths(controller: str, memberships: str) -> list[tuple[bool, str]]:
    """Lines of cgroups(7): ``0::/path`` for version 2, ``4:cpu,cpuacct:/path`` for version 1."""
    found = []
    for line in memberships.splitlines():
        number, names, path = line.split(":", 2)
        if number == "0" or controller in names.split(","):
            found.append((number == "0", path))
    return found


def _visible(controller: str, mounts: str, path: str, root: Path, *, is_v2: bool) -> Iterator[ControlGroup]:
    """Yield the group at ``path`` and those around it, up to the mount of their hierarchy (proc(5), mountinfo)."""
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = [*after.split(), "", "", ""][:3]
        if kind != ("cgroup2" if is_v2 else "cgroup") or not (is_v2 or controller in options.split(",")):
            continue
        mount_root, mount_point = before.split()[3:5]
        top = root / mount_point.lstrip("/")
        inside = path[len(mount_root.rstrip("/")) :].lstrip("/") if path.startswith(mount_root) else ""
        folder = top / inside
        if ".." in Path(inside).parts or not folder.is_dir():  # of another namespace: what is mounted is our own
            folder = top
        while True:
            yield ControlGroup(folder, is_v2)
            if folder == top:
                return
            folder = folder.parent
