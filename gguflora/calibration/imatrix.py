"""``imatrix``: measure how much each column of a model's weights matters, in llama.cpp's format.

The file holds what llama-imatrix writes on the same tokens (llama.cpp's ``tools/imatrix/imatrix.cpp``): for each weight
``<name>.in_sum2``, the sums of the squared inputs, and ``<name>.counts``, the number of inputs.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gguflora.architectures.base_model import describe
from gguflora.errors import FormatError, MissingExtraError, UsageError, listed
from gguflora.files.atomic import atomic_output
from gguflora.files.gguf import OUTPUT, TOKEN_EMBEDDING, GgufFile
from gguflora.files.output_checks import check_target
from gguflora.files.remote import remote_inputs
from gguflora.merging.sinks import Progress
from gguflora.system.cpus import thread_count
from gguflora.system.nameless import path_of


@dataclass(frozen=True, slots=True)
class ImatrixReport:
    """What `imatrix` did.

    Attributes:
        output: the importance matrix.
        text: the file that was evaluated, or "built-in text".
        chunks: number of windows of the text.
        ctx: number of tokens in each.
        tensors: names of the weights in the matrix.
        partial: stacks of experts that hold an expert without any token.
        size: size of the file in bytes.
        seconds: wall time.
        threads: number of threads used.
        warnings: messages for the user.
    """

    output: Path
    text: str
    chunks: int
    ctx: int
    tensors: tuple[str, ...]
    partial: tuple[str, ...]
    size: int
    seconds: float
    threads: int
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, ready for JSON."""
        return {**asdict(self), "output": str(self.output)}


@remote_inputs(base="file", text="file")
def imatrix(
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    text: str | os.PathLike[str] | None = None,
    ctx: int = 512,
    chunks: int | None = None,
    process_output: bool = False,
    threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> ImatrixReport:
    """Compute the importance matrix of a model from the inputs that its weights have on a text.

    Needs llama-cpp-python. Counts and sums equal those of llama-imatrix on the same tokens.

    Args:
        base: a GGUF file, best in F16, BF16 or Q8_0.
        out: the GGUF file to write, for `gguflora.quantize`, `gguflora.merge` and llama-quantize.
        text: a UTF-8 file; by default a built-in text of prose, code and dialogue.
        ctx: number of tokens in each window of the text, at most what the model was trained for; each window is
            evaluated on its own.
        chunks: number of windows to evaluate; by default all of the text.
        process_output: also measure the output weight.
        threads: number of threads; by default one for each core that this process may use.
        force: overwrite ``out``.
        progress: called with (tokens done, tokens in total).

    Raises:
        MissingExtraError: if llama-cpp-python is not installed.
        UsageError: if ``ctx`` or ``chunks`` is too small.
        FormatError: if the text is too short or cannot be read.
        HotSwapError: if llama.cpp cannot run the model, or an input is NaN or infinite.
        GgufloraError: if the model cannot be read, or ``out`` cannot be written.
    """
    try:
        from gguflora.calibration.observe import observe, windows_of  # noqa: PLC0415  (needs llama_cpp)
        from gguflora.runtime.logits import LogitsModel  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtraError("measuring importance", "llama-cpp-python", "runtime") from error
    started, used_threads, target = time.perf_counter(), thread_count(threads), Path(out)
    location = None if text is None else Path(text)
    with GgufFile(base) as file:
        describe(file)  # refuses files that hold no model
        check_target(target, [*file.paths, *([] if location is None else [location])], force=force, size=0)
        weights = _watched(file, process_output=process_output)
        path = file.path
    with LogitsModel(path, used_threads) as model:
        window = min(ctx, model.n_ctx_train)
        windows = windows_of(model, location, window)[: _at_least_one(chunks)]
        inputs = observe(model, windows, weights, progress=progress)
    sums = {name: (found.squares, found.counts) for name, found in sorted(inputs.items()) if found.counts.any()}
    if not sums:
        raise FormatError(f"{path}: no weight of its layers was multiplied with anything; is it a text generator?")
    with atomic_output(target, force=force) as output:
        _write(path_of(output), sums, str(text) if text is not None else "gguflora", len(windows), window)
        size = path_of(output).stat().st_size
    partial = tuple(name for name, (_, counts) in sums.items() if not counts.all())
    return ImatrixReport(
        target,
        "built-in text" if text is None else str(text),
        len(windows),
        window,
        tuple(sums),
        partial,
        size,
        time.perf_counter() - started,
        used_threads,
        tuple(_warnings(partial)),
    )


def _at_least_one(chunks: int | None) -> int | None:
    if chunks is not None and chunks < 1:
        raise UsageError(f"chunks is {chunks}, expected at least 1")
    return chunks


def _watched(file: GgufFile, *, process_output: bool) -> dict[str, tuple[int, int]]:
    """Return the size of all weights that llama-imatrix looks at: those of the layers, and the output if asked for."""
    output = {OUTPUT if OUTPUT in file.tensors else TOKEN_EMBEDDING} if process_output else set()
    return {
        name: (math.prod(tensor.shape[:-2]), tensor.n_in)
        for name, tensor in file.tensors.items()
        if len(tensor.shape) > 1 and (name.startswith("blk.") or name in output)
    }


def _write(path: Path, sums: Mapping[str, Any], dataset: str, chunks: int, ctx: int) -> None:
    import gguf  # noqa: PLC0415  (slow to import)

    writer = gguf.GGUFWriter(path, "")
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", [dataset])
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", ctx)
    for name, (squares, counts) in sums.items():
        both = np.asarray(squares, np.float32).reshape(len(counts), -1), counts.astype(np.float32)[:, None]
        for what, values in zip(("in_sum2", "counts"), both, strict=True):
            writer.add_tensor(f"{name}.{what}", values[0] if len(values) == 1 else values)  # ggml drops sizes of 1
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _warnings(partial: tuple[str, ...]) -> list[str]:
    if not partial:
        return []
    return [
        f"{len(partial)} stacks have experts that saw no token and count evenly; evaluate a longer text: "
        f"{listed(partial, 3)}"
    ]
