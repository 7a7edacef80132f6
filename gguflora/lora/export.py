"""``export``: write a GGUF LoRA as a PEFT directory."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gguflora.architectures.base_model import read_base
from gguflora.errors import OutputError
from gguflora.files.remote import remote_inputs
from gguflora.lora.factored import read_factored
from gguflora.lora.output import check_output, is_gguf, write_adapter


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What `export` did.

    Attributes:
        output: path of the PEFT directory.
        adapter: name of the adapter.
        architecture: GGUF name of the base's architecture.
        modules: number of adapted modules and parameters.
        ranks: smallest and largest rank of the factors.
        size: bytes of the factors.
        warnings: messages for the user.
    """

    output: Path
    adapter: str
    architecture: str
    modules: int
    ranks: tuple[int, int]
    size: int
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, ready for JSON."""
        return {**asdict(self), "output": str(self.output)}


@remote_inputs(lora="adapter", base="config")
def export(
    lora: str | os.PathLike[str],
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base_model_name: str | None = None,
    force: bool = False,
) -> ExportReport:
    """Write a GGUF LoRA as a PEFT directory that PEFT loads on the Hugging Face model.

    Args:
        lora: GGUF LoRA file, or another low-rank adapter to write as plain LoRA.
        base: its base model: a GGUF file or a directory with ``config.json``; only metadata is read.
        out: the directory to write.
        base_model_name: hub id or path of the base model for ``adapter_config.json``.
        force: overwrite a PEFT directory at ``out``.

    Raises:
        GgufloraError: if something cannot be read, does not fit together or cannot be written.
    """
    target, model = Path(out), read_base(base)
    if is_gguf(target):
        raise OutputError(f"{target}: export writes a PEFT directory; for a GGUF LoRA use convert")
    check_output(target, [Path(lora), Path(base)], outtype="auto", force=force)
    adapter = read_factored(lora, model)
    if base_model_name is not None:
        adapter = replace(adapter, fields={**adapter.fields, "base_model_name_or_path": base_model_name})
    written = write_adapter(adapter, target, model, "auto", {})
    return ExportReport(
        output=target,
        adapter=adapter.name,
        architecture=model.architecture,
        modules=written.tensors,
        ranks=written.ranks,
        size=written.size,
        warnings=written.warnings,
    )
