"""Merge into the base file itself, so that the base can be restored: ``merge(..., in_place=True)`` and ``unmerge``.

Two files are created beside ``model.gguf``: ``model.gguf.undo``, a patch file (see `gguflora.merging.patch`), and,
while the model is being changed, ``model.gguf.journal``. A merge

1. locks the model, then writes and syncs the whole undo file before any byte of the model changes;
2. changes the model in chunks: it writes the chunk's old bytes to the journal and syncs it, then writes the new bytes
   to the model and syncs it;
3. removes the journal.

At every moment, each range of bytes in the undo file is therefore old or new, or belongs to the one chunk whose old
bytes are in the journal with a checksum. The undo file has checksums of the old and the new bytes, which tell them
apart. If the journal is damaged, it was still being written, so its chunk was not changed yet.

``unmerge`` computes the base from the three files and continues only if its SHA-256 is right. It then restores the
journal's chunk and changes the others in the same way, in chunks with a journal, so that it can be interrupted at any
moment and called again. Finally it removes the journal and then the undo file.

Metadata cannot grow in place, so only the undo file records what was merged.
"""

from gguflora.merging.in_place.apply import check_in_place, merge_in_place
from gguflora.merging.in_place.unmerge import UnmergeReport, unmerge

__all__ = ["UnmergeReport", "check_in_place", "merge_in_place", "unmerge"]
