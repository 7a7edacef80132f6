"""Read and write whole buffers at an offset of a file descriptor."""

from __future__ import annotations

import os

from gguflora.errors import PatchError


def write_at(handle: int, content: bytes | memoryview, offset: int) -> None:
    """Write all bytes of a buffer at an offset."""
    view = memoryview(content).cast("B")
    while view:
        count = os.pwrite(handle, view, offset)
        view, offset = view[count:], offset + count


def read_into(handle: int, buffer: memoryview, offset: int) -> None:
    """Fill a buffer with the bytes at an offset.

    Raises:
        PatchError: if the file ends before the buffer is full.
    """
    view = buffer.cast("B")
    while view:
        count = os.preadv(handle, [view], offset)
        if count == 0:
            raise PatchError(f"the file ends at byte {offset}, {len(view)} bytes before it should; was it changed?")
        view, offset = view[count:], offset + count
