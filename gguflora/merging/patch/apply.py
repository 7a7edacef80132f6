"""Apply a patch file: ``apply_patch``."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gguflora.errors import MismatchError, PatchError
from gguflora.files.atomic import atomic_outputs
from gguflora.files.gguf import GgufFile, part_paths
from gguflora.files.output_checks import check_targets
from gguflora.files.remote import remote_inputs
from gguflora.merging.patch.chain import Chain
from gguflora.merging.patch.format import Facts, open_patch
from gguflora.merging.patch.stream import FilePiece, files_sha256, result, with_progress
from gguflora.merging.sinks import Progress
from gguflora.system.cpus import thread_count


@dataclass(frozen=True, slots=True)
class ApplyReport:
    """What `apply_patch` did.

    Attributes:
        output: path of the merged GGUF file; for a split model, of its first file.
        size: size of all files of the model in bytes.
        patch_size: size of the patch in bytes.
        facts: metadata of the patch: base, result, adapters, rounding, seed.
        seconds: wall time.
        threads: number of threads used.
    """

    output: Path
    size: int
    patch_size: int
    facts: Facts
    seconds: float
    threads: int

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, ready for JSON."""
        facts = {**asdict(self.facts), "merged_size": self.facts.merged_size}
        names = ("name", "sha256", "scale")
        facts["adapters"] = [dict(zip(names, adapter, strict=True)) for adapter in self.facts.adapters]
        return {
            "output": str(self.output),
            "size": self.size,
            "patch_size": self.patch_size,
            **facts,
            "seconds": self.seconds,
            "threads": self.threads,
        }


@remote_inputs(base="file", patch="file")
def apply_patch(
    base: str | os.PathLike[str],
    patch: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> ApplyReport:
    """Apply a patch to its base and write the merged model, byte for byte as `merge` would have written it.

    Args:
        base: the GGUF file that the patch was made for, or any file of a split model.
        patch: the patch file, written by `merge` with ``patch=``.
        out: the file to write. For a split base, the same number of files with names like
            ``out-00001-of-00003.gguf``.
        force: overwrite ``out``.
        threads: number of threads; by default one for each core that this process may use.
        progress: called with (bytes written, bytes in total).

    Raises:
        MismatchError: if the patch was made for another base.
        PatchError: if the patch is damaged.
        GgufloraError: if something cannot be read or written; ``out`` is then unchanged.
    """
    started = time.perf_counter()
    used_threads = thread_count(threads)
    with open_patch(Path(patch)) as opened, GgufFile(base) as file:
        facts = opened.facts
        targets, files = part_paths(Path(out), len(facts.merged_sizes)), Chain.from_model(file)
        check_targets(targets, [*file.paths, opened.path], force=force, size=facts.merged_size)
        check_base(file, facts, opened.path)
        with atomic_outputs(targets, force=force) as outputs:
            pieces = with_progress(result(opened, files, used_threads), facts.merged_size, progress)
            digest = _write_all(Chain([output.fileno() for output in outputs], facts.merged_sizes), pieces)
            file.check_unchanged()
            if digest != facts.merged_sha256:
                raise PatchError(
                    f"{opened.path}: makes SHA-256 {digest}, expected {facts.merged_sha256}; get the patch again"
                )
        size = os.fstat(opened.handle).st_size
    return ApplyReport(targets[0], facts.merged_size, size, facts, time.perf_counter() - started, used_threads)


def check_base(file: GgufFile, facts: Facts, patch: Path) -> None:
    """Raise ``MismatchError`` unless the file is the base that a patch was made for."""
    actual = f"{file.size:,} bytes"
    if file.size == facts.base_size:
        digest = files_sha256(Chain.from_model(file))
        if digest == facts.base_sha256:
            return
        actual = f"SHA-256 {digest}"
    raise MismatchError(
        f"{patch}: was made for {facts.base_name} ({facts.base_size:,} bytes, SHA-256 {facts.base_sha256}), but "
        f"{file.path} is another file ({actual}); give the base that the patch was made for"
    )


def _write_all(outputs: Chain, pieces: Iterable[FilePiece]) -> str:
    digest = hashlib.sha256()
    for to, content in pieces:
        digest.update(content.data)
        outputs.write(content, to)
    return digest.hexdigest()
