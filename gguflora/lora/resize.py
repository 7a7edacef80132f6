"""``resize``: reduce the rank of an adapter."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gguflora.architectures.base_model import read_base
from gguflora.errors import AdapterError
from gguflora.files.remote import remote_inputs
from gguflora.lora.low_rank import RankRule, approximation_warnings, cut, highest_rank, sum_fits
from gguflora.lora.output import check_output, for_output, is_gguf, rounding, write_adapter
from gguflora.lora.rank_by_loss import LossLimit, choose_rank
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
        losses: mean loss of a text's token in nats, if the rank was chosen by it: of the base alone ("base"), with the
            adapter as it was ("whole"), and with each rank that was tried ("8").
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
    losses: dict[str, float]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, ready for JSON."""
        return {**asdict(self), "output": str(self.output)}


@remote_inputs(adapter="adapter", base="config", text="file")
def resize(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    sv_ratio: float | None = None,
    sv_fro: float | None = None,
    max_loss: float | None = None,
    text: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    threads: int | None = None,
    base: str | os.PathLike[str] | None = None,
    outtype: str = "auto",
    force: bool = False,
) -> ResizeReport:
    """Write the closest adapter of a lower rank (Eckart and Young 1936).

    Give one of ``rank``, ``energy``, ``sv_ratio``, ``sv_fro`` and ``max_loss``. Deltas of low rank are computed from
    their factors alone, others (DoRA, IA3, trained tokens) from the base's weights. Fused weights are cut as the output
    holds them: as GGUF tensors, or as modules of the Hugging Face model.

    Args:
        adapter: PEFT directory or GGUF LoRA file.
        out: path to write: a GGUF LoRA file if the name ends with ``.gguf``, else a PEFT directory.
        rank: highest rank of a delta; deltas of this rank or lower are kept unchanged.
        energy: use for each delta the lowest rank that keeps this share of its squared norm.
        sv_ratio: keep of each delta the singular values above its largest one divided by this number.
        sv_fro: use for each delta the lowest rank that keeps this share of its Frobenius norm.
        max_loss: use the lowest rank with which the adapter's mean loss of a token of ``text`` is at most this many
            nats higher than before. The base is run with the adapter in llama.cpp, once for every rank that is tried.
        text: UTF-8 files for ``max_loss``; up to 8192 tokens of them are evaluated.
        threads: number of threads that run the base for ``max_loss``.
        base: its base model; needed to write one format from the other, for deltas that are not of low rank, and for
            ``max_loss``, which needs a GGUF file.
        outtype: type of the factors in a GGUF file.
        force: overwrite ``out``.

    Raises:
        AdapterError: if not exactly one of the five numbers is given, or it is impossible.
        MissingExtraError: if a loss is to be measured and llama-cpp-python is not installed.
        GgufloraError: if something cannot be read, does not fit together or cannot be written.
    """
    rule, texts = RankRule(rank, energy, sv_ratio, sv_fro), _paths(text)
    check_options(rule, max_loss, texts)
    target, model = Path(out), None if base is None else read_base(base)
    limit = None if max_loss is None else LossLimit(max_loss, texts, threads)
    if limit is not None:
        limit.check(model)
    inputs = [Path(adapter), *texts, *([] if base is None else [Path(base)])]
    check_output(target, inputs, outtype=outtype, force=force)
    losses: dict[str, float] = {}
    with ExitStack() as files:
        whole = for_output(read_uncut(adapter, model, files, keep_saved=not is_gguf(target)), model, target)
        if limit is not None and model is not None:
            rank, losses = choose_rank(whole, limit, model, target, outtype)
            rule = RankRule(rank)
        cuts = {name: cut(delta, rule, rounding(name, target, outtype)) for name, delta in whole.deltas.items()}
        ranks = [highest_rank(delta) for delta in whole.deltas.values()]
    source = whole.source
    fits = {name: fit for name, (_, fit) in cuts.items()}
    warnings = (*source.warnings, *approximation_warnings(whole.deltas, fits))
    new = replace(
        source, pairs={name: delta for name, (delta, _) in cuts.items()}, saved=as_saved(whole.saved), warnings=warnings
    )
    fit = sum_fits(fits.values())
    made_from = {"source": source.path.name, "source.sha256": source.sha256, "resized": _describe(rule)}
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
        losses=losses,
        warnings=written.warnings,
    )


def check_options(rule: RankRule, max_loss: float | None, texts: Sequence[Path]) -> None:
    """Check how the rank is to be chosen.

    Raises:
        AdapterError: if nothing says it, or two options do, or a number is impossible.
    """
    given = [*rule.given, *([] if max_loss is None else ["max_loss"])]
    if not given:
        raise AdapterError(
            "resize needs either a rank or an energy, for example rank=8 or energy=0.99; "
            "or sv_ratio, sv_fro or max_loss"
        )
    if len(given) > 1:
        raise AdapterError(f"resize got {' and '.join(given)}, expected only one of them")
    if max_loss is None:
        rule.check()
        if texts:
            raise AdapterError(f"a text has no use with {given[0]}: leave it out, or give max_loss")


def _paths(text: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None) -> tuple[Path, ...]:
    if text is None:
        return ()
    return (Path(text),) if isinstance(text, str | os.PathLike) else tuple(map(Path, text))


def _describe(rule: RankRule) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in rule.given.items())
