"""Merge into the base file itself, such that the base can be had again: ``merge(..., in_place=True)``, ``unmerge``.

Beside ``model.gguf`` lie ``model.gguf.undo``, a patch file (see `gguflora.merging.patch`) of what was merged, and,
while the model is being changed, ``model.gguf.journal``. A merge

1. locks the model and writes the undo file, whole and synced, before any byte of the model changes;
2. changes the model chunk by chunk: the chunk's present bytes go into the journal, which is synced; then the new ones
   go into the model, which is synced;
3. removes the journal.

So at every moment each stretch of bytes that the undo file names is as it was, as it shall be, or, in one chunk, in the
journal with a checksum. The undo file has checksums of both, so that they can be told apart whatever else happened. A
journal that is damaged was being written, so its chunk had not been begun.

``unmerge`` works out the base from the three, and goes on only if its SHA-256 is right; then it puts the journal's
chunk back and changes the others in the same way, chunk by chunk with a journal, so that it can be stopped at any
moment, too, and called again. Last it removes the journal, then the undo file.

Metadata cannot grow in place: the undo file is the record of what was merged.
"""

from gguflora.merging.in_place.apply import check_in_place, merge_in_place
from gguflora.merging.in_place.unmerge import UnmergeReport, unmerge

__all__ = ["UnmergeReport", "check_in_place", "merge_in_place", "unmerge"]
