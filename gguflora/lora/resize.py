"""``resize``: reduce the rank of an adapter."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gguflora.adapters.deltas import LowRank
from gguflora.architectures.base_model import read_base
from gguflora.errors import AdapterError
from gguflora.files.remote import remote_inputs
from gguflora.lora.low_rank import approximation_warnings, cut, sum_fits
from gguflora.lora.output import check_output, for_output, is_gguf, rounding, write_adapter
from gguflora.lora.saved_weights import as_saved
from gguflora.lora.uncut import read_uncut


@dataclass(frozen=True, slots=True)
class ResizeReport:
    """What `resize` did.

    Attributes:
        output: path of the GGUF LoRA file or PEFT directory.
        adapter: name of the adapter.
        tensors: number of weights that the adapter changes.
        old_ranks: smallest and largest rank before.
        ranks: smallest and largest rank now.
        old_size: bytes of the adapter's weights before.
        size: bytes of the factors now.
        errors: relative error (Frobenius norm) of each delta that lost something, by name, as it was written.
        relative_error: relative error of all deltas together.
        energy: share of the squared norm of all deltas that is kept.
        warnings: messages for the user.
    """

    output: Path
    adapter: str
    tensors: int
    old_ranks: tuple[int, int]
    ranks: tuple[int, int]
    old_size: int
    size: int
    errors: dict[str, float]
    relative_error: float
    energy: float
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, ready for JSON."""
        return {**asdict(self), "output": str(self.output)}


@remote_inputs(adapter="adapter", base="config")
def resize(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    base: str | os.PathLike[str] | None = None,
    outtype: str = "auto",
    force: bool = False,
) -> ResizeReport:
    """Write the closest adapter of a lower rank (Eckart and Young 1936).

    Give either ``rank`` or ``energy``. Deltas of low rank are computed from their factors alone, others (DoRA, IA3,
    trained tokens) from the base's weights. Fused weights are cut as the output holds them: as GGUF tensors, or as
    modules of the Hugging Face model.

    Args:
        adapter: PEFT directory or GGUF LoRA file.
        out: path to write: a GGUF LoRA file if the name ends with ``.gguf``, else a PEFT directory.
        rank: highest rank of a delta; deltas of this rank or lower are kept unchanged.
        energy: use for each delta the lowest rank that keeps this share of its squared norm.
        base: its base model; needed to write one format from the other, and for deltas that are not of low rank.
        outtype: type of the factors in a GGUF file.
        force: overwrite ``out``.

    Raises:
        AdapterError: if not exactly one of ``rank`` and ``energy`` is given.
        GgufloraError: if something cannot be read, does not fit together or cannot be written.
    """
    if (rank is None) == (energy is None):
        raise AdapterError("resize needs either a rank or an energy, for example rank=8 or energy=0.99")
    target, model = Path(out), None if base is None else read_base(base)
    inputs = [Path(adapter), *([] if base is None else [Path(base)])]
    check_output(target, inputs, outtype=outtype, force=force)
    with ExitStack() as files:
        whole = for_output(read_uncut(adapter, model, files, keep_saved=not is_gguf(target)), model, target)
        cuts = {name: cut(delta, rank, energy, rounding(name, target, outtype)) for name, delta in whole.deltas.items()}
        ranks = [delta.rank if isinstance(delta, LowRank) else min(delta.shape) for delta in whole.deltas.values()]
    source = whole.source
    fits = {name: fit for name, (_, fit) in cuts.items()}
    warnings = (*source.warnings, *approximation_warnings(whole.deltas, fits))
    new = replace(
        source, pairs={name: delta for name, (delta, _) in cuts.items()}, saved=as_saved(whole.saved), warnings=warnings
    )
    fit = sum_fits(fits.values())
    made_from = {"source": source.path.name, "source.sha256": source.sha256, "resized": _describe_target(rank, energy)}
    written = write_adapter(new, target, model, outtype, made_from)
    return ResizeReport(
        output=target,
        adapter=source.name,
        tensors=written.tensors,
        old_ranks=(min(ranks), max(ranks)),
        ranks=written.ranks,
        old_size=source.path.stat().st_size,
        size=written.size,
        errors={name: fit.error for name, fit in fits.items() if fit.lost},
        relative_error=fit.error,
        energy=fit.energy,
        warnings=written.warnings,
    )


def _describe_target(rank: int | None, energy: float | None) -> str:
    return f"rank {rank}" if rank is not None else f"energy {energy}"
