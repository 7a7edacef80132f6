"""Choose an adapter's rank by what it loses on a text when it is applied at run time."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from gguflora.architectures.base_model import BaseModel
from gguflora.errors import AdapterError, listed
from gguflora.lora.loss_meter import load_loss_meter
from gguflora.lora.low_rank import RankRule, cut, highest_rank
from gguflora.lora.output import is_gguf, rounding, write_adapter
from gguflora.lora.uncut import UncutAdapter

_BASE: Final = "base"
_WHOLE: Final = "whole"


@dataclass(frozen=True, slots=True)
class LossLimit:
    """What an adapter may lose.

    Attributes:
        most: highest increase of the mean loss of a token, in nats.
        texts: the texts, in UTF-8.
        threads: number of threads that run the model.
    """

    most: float
    texts: tuple[Path, ...]
    threads: int | None

    def check(self, base: BaseModel | None) -> None:
        """Raise ``AdapterError`` if a rank cannot be chosen by loss."""
        if not 0 <= self.most < math.inf:
            raise AdapterError(f"max_loss is {self.most}, expected nats a token from 0, for example 0.01")
        if not self.texts:
            raise AdapterError("max_loss needs a text like those that the adapter is for: give it with --text")
        if base is None or base.path.is_dir():
            raise AdapterError("max_loss needs the base as a GGUF file, to run it: give it with --base")


def choose_rank(
    adapter: UncutAdapter, limit: LossLimit, base: BaseModel, out: Path, outtype: str
) -> tuple[int, dict[str, float]]:
    """Return the lowest rank whose loss is within the limit, and the mean losses that were measured.

    It is found by bisection, which takes for granted that the loss falls as the rank grows. The loss of the rank that
    is returned was measured.

    Args:
        adapter: the adapter, with the names of the output.
        limit: what it may lose.
        base: its base model, a GGUF file.
        out: the output, for the type of the factors.
        outtype: type of the factors in a GGUF file.

    Returns:
        The rank, and losses by "base", "whole" (the adapter before) and ranks.

    Raises:
        AdapterError: if the adapter cannot be applied at run time, or no rank is within the limit.
        GgufloraError: if the model cannot be run.
    """
    _check_hot(adapter)
    highest = max(highest_rank(delta) for delta in adapter.deltas.values())
    losses: dict[str, float] = {}
    with (
        tempfile.TemporaryDirectory(prefix="gguflora-") as scratch,
        load_loss_meter()(base.path, limit.texts, limit.threads) as measure,
    ):
        file = Path(scratch) / "adapter.gguf"

        def loss(rank: int, outtype: str) -> float:
            pairs = {
                name: cut(delta, RankRule(rank), rounding(name, out, outtype))[0]
                for name, delta in adapter.deltas.items()
            }
            write_adapter(replace(adapter.source, pairs=pairs, saved={}), file, base, outtype, {})
            return measure(file)

        losses[_BASE], losses[_WHOLE] = measure(None), loss(highest, "auto")
        stored = outtype if is_gguf(out) else "auto"
        low, high = 1, highest
        while low < high:
            rank = (low + high) // 2
            losses[str(rank)] = loss(rank, stored)
            low, high = (low, rank) if losses[str(rank)] - losses[_WHOLE] <= limit.most else (rank + 1, high)
        if str(high) not in losses:
            losses[str(high)] = loss(high, stored)
    found = losses[str(high)] - losses[_WHOLE]
    if found > limit.most:
        raise AdapterError(
            f"{adapter.source.path}: loses {found:.2g} nats a token even at rank {high} by the type {outtype} of its "
            f"factors, expected at most {limit.most:g}: give another outtype, or a higher max_loss"
        )
    return high, losses


def _check_hot(adapter: UncutAdapter) -> None:
    source = adapter.source
    if adapter.saved:
        raise AdapterError(
            f"{source.path}: holds whole weights ({listed(list(adapter.saved), 3)}), which cannot be applied at run "
            "time to measure a loss: give a rank or an energy"
        )
    if source.invocation_tokens:
        raise AdapterError(
            f"{source.path}: is active only after its invocation tokens, so its loss on a text says little: give a "
            "rank or an energy"
        )
