"""Store a merged model as a patch of its base: ``merge(..., patch=...)`` writes it, ``apply_patch`` applies it.

`coding` documents how differences are stored, `format` how the file is laid out.
"""

from gguflora.merging.patch.create import Merged, write_patch

__all__ = ["Merged", "write_patch"]
