"""The sources of a recipe: locations, and globs with the files that they match."""

from __future__ import annotations

import fnmatch
import glob
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from gguflora.errors import RecipeError, RemoteError
from gguflora.files import remote
from gguflora.files.shard_names import part_names
from gguflora.pipeline.locations import STATE, Location, in_place
from gguflora.pipeline.recipe import RecipeFile

_NEVER: Final = {STATE, ".ipynb_checkpoints"}
"""Folders that no glob enters: the records of pipelines, and old copies of notebooks."""


class Sources:
    """Looks up the sources of a recipe.

    Args:
        file: the recipe.
        folder: its output folder.
        own: outputs of the recipe, which globs leave out.
        allow_empty: whether a glob may match nothing.
        keep_missing: whether to return locations that do not exist; otherwise they are errors.

    Attributes:
        globbed: the paths that globs matched.
    """

    def __init__(
        self, file: RecipeFile, folder: Location, own: frozenset[Location], *, allow_empty: bool, keep_missing: bool
    ) -> None:
        self._file, self._folder, self._own = file, folder, own
        self._allow_empty, self._keep_missing = allow_empty, keep_missing
        self._known: dict[str, list[Location]] = {}
        self.globbed: set[Path] = set()

    def locations(self, name: str) -> list[Location]:
        """Return the locations of a source, in the order of the recipe.

        Raises:
            RecipeError: if there is none.
        """
        if name not in self._known:
            given = self._file.recipe.sources[name]
            patterns = [given] if isinstance(given, str) else given
            self._known[name] = [location for pattern in patterns for location in self._look_up(name, pattern)]
        return self._known[name]

    def _look_up(self, name: str, pattern: str) -> Sequence[Location]:
        try:
            matches = self._matches(pattern)
        except RemoteError as error:
            raise self._file.error(("sources", name), str(error)) from error
        if not matches and not self._allow_empty:
            raise self._nothing(name, pattern)
        problems = [problem for path in matches if isinstance(path, Path) and (problem := problem_with(path))]
        if problems and not self._keep_missing:
            raise self._file.error(("sources", name), f"{pattern!r}: {problems[0]}")
        return matches

    def _nothing(self, name: str, pattern: str) -> RecipeError:
        where = "" if remote.is_remote(pattern) else f" in {self._file.root}"
        return self._file.error(
            ("sources", name),
            f"{pattern!r}: no such file or directory: nothing{where} matches it; --allow-empty goes on without",
        )

    def _matches(self, pattern: str) -> Sequence[Location]:
        pattern = str(remote.local_path(pattern) or pattern)
        if remote.is_remote(pattern):  # in a web address a question mark is not a wildcard
            is_web = pattern.startswith(("http://", "https://"))
            if not re.search(r"[*\[]" if is_web else r"[*?\[]", pattern):
                return [pattern]
            start = re.split(r"[*?\[]", pattern, maxsplit=1)[0].rpartition("/")[0]
            return [url for url in remote.list_matching(pattern) if not self._is_left_out(url, url[len(start) :])]
        root = self._file.root
        if not re.search(r"[*?\[]", pattern):
            return [root / pattern]
        hidden = self._file.recipe.include_hidden
        names = glob.glob(pattern, root_dir=root, recursive=True, include_hidden=hidden)  # noqa: PTH207  (may be absolute)
        named = set(re.split(r"/", pattern))  # a folder that the pattern names is meant
        paths = [
            path
            for name in names
            if not self._is_left_out(name, "/".join(part for part in name.split("/") if part not in named))
            and not self._is_own(path := root / name)
        ]
        self.globbed |= {in_place(path) for path in paths}
        return _without_later_parts(paths)

    def _is_left_out(self, location: str, matched: str) -> bool:
        """Whether a match is hidden or excluded.

        Args:
            location: the match.
            matched: the part of it that wildcards stand for.
        """
        parts = [part for part in matched.split("/") if part]
        if not _NEVER.isdisjoint(parts):
            return True
        if not self._file.recipe.include_hidden and any(part.startswith(".") for part in parts if part != ".."):
            return True
        return _is_excluded(location, self._file.recipe.exclude)

    def _is_own(self, path: Path) -> bool:
        """Whether a match is an output of this recipe, or the folder of all outputs; a glob leaves them out."""
        path = in_place(path)
        return path == self._folder or not self._own.isdisjoint((path, *path.parents))


def problem_with(path: Path) -> str | None:
    """Return what is wrong with a path that leads to no file or folder; None if it leads to one."""
    try:
        path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            return f"{path}: is a link to {path.readlink()}, which does not exist"
        return f"{path}: no such file or directory"
    except OSError as error:  # a circle of links, a folder that may not be entered
        return f"{path}: cannot be read: {error.strerror}"
    return None


def _is_excluded(location: str, patterns: Iterable[str]) -> bool:
    """Whether a location, or a folder that holds it, matches a pattern. One without a slash is for names anywhere."""
    parts = location.rstrip("/").split("/")
    ways = ["/".join(parts[:length]) for length in range(1, len(parts) + 1)]
    for pattern in patterns:
        found = pattern.rstrip("/").removeprefix("./")
        if "/" not in found:
            if any(fnmatch.fnmatchcase(part, found) for part in parts):
                return True
        elif any(re.fullmatch(_translated(found), way) for way in ways):
            return True
    return False


def _translated(pattern: str) -> str:
    """Return the regular expression of a glob in which a star stays inside a folder and two stars do not."""
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern)
    special = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        special.get(piece) or (piece.replace("[!", "[^") if number % 2 else re.escape(piece))
        for number, piece in enumerate(pieces)
    )


def _without_later_parts(paths: Sequence[Path]) -> list[Path]:
    """Sort paths, and keep only the first file of a split model."""
    all_paths = set(paths)
    firsts = {path: path.with_name(part_names(path.name)[0]) for path in paths}
    return sorted(path for path, first in firsts.items() if path == first or first not in all_paths)
