"""Check that adapters that are combined were trained on the same model, as far as they say it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from gguflora.errors import MismatchError
from gguflora.lora.uncut import UncutAdapter

_LAYER: Final = re.compile(r"^(?P<stack>(?:[^.\d][^.]*\.)+)\d+\.")
_NAME: Final = "base_model_name_or_path"


def check_same_model(adapters: Sequence[UncutAdapter]) -> tuple[str, ...]:
    """Return a warning if the adapters name different base models.

    Raises:
        MismatchError: if the names of their weights show that their models are built differently.
    """
    first = adapters[0]
    for other in adapters[1:]:
        ours, theirs = _stacks(first), _stacks(other)
        if ours and theirs and not ours & theirs:
            raise MismatchError(
                f"{first.source.path} changes layers named {sorted(ours)[0]}*, {other.source.path} layers named "
                f"{sorted(theirs)[0]}*: they were trained on models of different architectures"
            )
    sources = [adapter.source for adapter in adapters]
    names = {str(source.fields[_NAME]): source for source in sources if source.fields.get(_NAME)}
    if len({name.rstrip("/").rpartition("/")[2] for name in names}) < 2:
        return ()
    listed = ", ".join(f"{source.path}: {name}" for name, source in names.items())
    return (f"the adapters name different base models ({listed}); a sum makes sense only on one model",)


def _stacks(adapter: UncutAdapter) -> set[str]:
    """Return what comes before the number of a layer in the names of the changed weights."""
    found = (_LAYER.match(name) for name in adapter.deltas)
    return {match["stack"] for match in found if match}
