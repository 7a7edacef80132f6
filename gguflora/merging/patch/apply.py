"""Apply a patch file: ``apply_patch``."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Iterator
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
from gguflora.merging.patch.stream import Piece, files_sha256, result
from gguflora.merging.sinks import Progress
from gguflora.system.cpus import thread_count


@dataclass(frozen=True, slots=True)
class ApplyReport:
    """What `apply_patch` did.

    Attributes:
        output: the merged GGUF file, or the first of a split model.
        size: of all its files, in bytes.
        patch_size: of the patch, in bytes.
        facts: what the patch states: base, result, adapters, rounding, seed.
        seconds: wall time.
        threads: used.
    """

    output: Path
    size: int
    patch_size: int
    facts: Facts
    seconds: float
    threads: int

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
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
    """Write the merged file that a patch makes of its base, byte for byte as the merge would have written it.

    Args:
        base: the GGUF file that the patch was made for, or any file of a split model.
        patch: what `merge` wrote with ``patch=``.
        out: the file to write; of a split base as many files, named like it (``out-00001-of-00003.gguf``).
        force: overwrite ``out``.
        threads: number of threads; by default one for each core this process may use.
        progress: called with (bytes done, bytes in all), of the base's check and of the output together.

    Raises:
        MismatchError: if the base is another file than the patch was made for.
        PatchError: if the patch is damaged.
        GgufloraError: if something cannot be read or written; ``out`` is then as it was.
    """
    started = time.perf_counter()
    used_threads = thread_count(threads)
    with open_patch(Path(patch)) as opened, GgufFile(base) as file:
        facts = opened.facts
        targets, files = part_paths(Path(out), len(facts.merged_sizes)), Chain.from_model(file)
        check_targets(targets, [*file.paths, opened.path], force=force, size=facts.merged_size)
        check_base(file, facts, opened.path)
        with atomic_outputs(targets, force=force) as outputs:
            pieces = _reported(result(opened, files, used_threads), facts.merged_size, progress)
            digest = _write_all(Chain([output.fileno() for output in outputs], facts.merged_sizes), pieces)
            file.check_unchanged()
            if digest != facts.merged_sha256:
                raise PatchError(
                    f"{opened.path}: makes SHA-256 {digest}, expected {facts.merged_sha256}; get the file again"
                )
        size = os.fstat(opened.handle).st_size
    return ApplyReport(targets[0], facts.merged_size, size, facts, time.perf_counter() - started, used_threads)


def check_base(file: GgufFile, facts: Facts, patch: Path) -> None:
    """Raise ``MismatchError`` unless the file is the base of a patch."""
    found = f"{file.size:,} bytes"
    if file.size == facts.base_size:
        digest = files_sha256(Chain.from_model(file))
        if digest == facts.base_sha256:
            return
        found = f"SHA-256 {digest}"
    raise MismatchError(
        f"{patch}: was made for {facts.base_name} ({facts.base_size:,} bytes, SHA-256 {facts.base_sha256}), but "
        f"{file.path} is another file ({found}); give the base that the patch was made for"
    )


def _write_all(outputs: Chain, pieces: Iterable[Piece]) -> str:
    digest = hashlib.sha256()
    for to, content in pieces:
        digest.update(content.data)
        outputs.write(content, to)
    return digest.hexdigest()


def _reported(pieces: Iterable[Piece], total: int, progress: Progress | None) -> Iterator[Piece]:
    for to, content in pieces:
        yield to, content
        if progress:
            progress(to + len(content), total)
