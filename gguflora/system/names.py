"""Names that some systems do not take for a file."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

_DEVICES: Final = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[1-9¹²³])\s*(\..*|:.*)?", re.IGNORECASE)
_FORBIDDEN: Final = re.compile(r'[<>:"/\\|?*\x00-\x1f]')
CHECKS_NAMES: bool = os.name == "nt"
"""Whether this system has names that mean something else than a file."""


def problem_of_name(name: str) -> str | None:
    """Return why Windows takes no file of this name; None if it does.

    Windows gives a device, or a file without the last characters of its name, and no error (Microsoft, "Naming Files,
    Paths, and Namespaces").
    """
    if _DEVICES.fullmatch(name):
        return "is the name of a device in Windows"
    if found := _FORBIDDEN.search(name):
        return f"has the character {found[0]!r}, which Windows does not allow"
    return "ends in a dot or a space, which Windows drops" if name.endswith((".", " ")) else None


def ignores_case(folder: Path) -> bool:
    """Whether a directory's file system takes names that differ in case only for one, as those of Windows and macOS.

    A directory whose own name and all names above it have no letters counts as one that tells them apart.
    """
    for path in (folder, *folder.parents):
        other = path.with_name(path.name.swapcase()) if path.name else path
        if other.name != path.name:
            try:
                return other.samefile(path)
            except OSError:
                return False
    return False
