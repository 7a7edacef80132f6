"""Pages of the site that are not in docs/: the README in front, and files of the repository that pages link to."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any, Final

from mkdocs.structure.files import File, Files

ROOT: Final = Path(__file__).resolve().parent.parent
PAGES: Final = {
    "README.md": "index.md",
    **{name: name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")},
}
_LINK: Final = re.compile(r"(\]\()(?!\w+:|#)([^)#\s]+)")


def on_files(files: Files, config: Any, **_: Any) -> None:  # noqa: ANN401  (of mkdocs, which has its own types)
    """Add the pages, and what any page links to outside of docs/."""
    for source, target in PAGES.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text(encoding="utf-8")))
    linked = {
        path
        for file in files.documentation_pages()
        for link in _LINK.findall(file.content_string)
        if not (path := _in_repository(file.src_uri, link[1])).startswith(("docs/", *PAGES))
    }
    for path in sorted(linked):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:  # noqa: ANN401
    """Let links lead where the site has their targets."""
    own = posixpath.dirname(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        path = _in_repository(page.file.src_uri, link[2])
        target = PAGES.get(path, path.removeprefix("docs/"))
        return link[1] + posixpath.relpath(target, own or ".")

    return _LINK.sub(moved, markdown)


def _in_repository(page: str, link: str) -> str:
    """The path in the repository that a link on a page of the site means."""
    sources = {target: source for source, target in PAGES.items()}
    source = sources.get(page, f"docs/{page}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
