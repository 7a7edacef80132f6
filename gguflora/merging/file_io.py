"""Read whole buffers at an offset of a file descriptor."""

from __future__ import annotations

from gguflora.errors import PatchError
from gguflora.system.descriptors import read_some


def read_into(handle: int, buffer: memoryview, offset: int) -> None:
    """Fill a buffer with the bytes at an offset.

    Raises:
        PatchError: if the file ends before the buffer is full.
    """
    view = buffer.cast("B")
    while view:
        count = read_some(handle, view, offset)
        if count == 0:
            raise PatchError(f"the file ends at byte {offset}, {len(view)} bytes before it should; was it changed?")
        view, offset = view[count:], offset + count
