"""The kernels where Python cannot load them: NEON under qemu; by other compilers; under sanitizers."""

import os
import re
import shutil
import struct
import subprocess
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from gguflora.merging.calibrated import can_calibrate
from gguflora.quants import kernels
from gguflora.quants._lib import isa_names
from gguflora.quants.types import TYPES, GgmlType
from support import ROOT, weights
from support.oracles import dither as reference
from support.oracles import libggml

EXTENSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"][0]
SOURCES = [ROOT / source for source in EXTENSION["sources"] if source.startswith("csrc/")]
ISA_NUMBERS = {"scalar": 0, "avx2": 1, "avx512": 2, "neon": 3}
QUANTIZE, QUANTIZE_MEASURED, DEQUANTIZE, MERGE, DITHER, SEARCH = range(6)
CROSS_COMPILER, EMULATORS = "aarch64-linux-gnu-gcc", ("qemu-aarch64-static", "qemu-aarch64")

Request = tuple[bytes, bytes]
"""What goes to the driver, and the output that it must answer."""

pytestmark = pytest.mark.full


def build(folder: Path, compiler: str, flags: list[str]) -> Path:
    command = [compiler, *EXTENSION["extra-compile-args"], *flags, f"-I{ROOT / 'csrc'}"]
    driver = Path(__file__).with_name("kernel_driver.c")

    def run(*arguments: str) -> None:
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stderr, done.stderr

    def compile_one(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        run("-c", str(source), "-o", target)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, [driver, *SOURCES]))
    run(*objects, "-lm", "-o", str(folder / "kernels"))
    return folder / "kernels"


def request(
    operation: int, isa: str, kind: GgmlType, data: np.ndarray, expected: np.ndarray, n_in: int, *extra
) -> Request:
    rank = len(extra[-1 if operation == SEARCH else 0]) if operation in {MERGE, DITHER, SEARCH} else 0
    head = struct.pack("8q", operation, ISA_NUMBERS[isa], kind.id, len(data), n_in, data.nbytes, expected.nbytes, rank)
    return head + data.tobytes() + b"".join(array.tobytes() for array in extra), expected.tobytes()


def requests(kind: GgmlType, isa: str) -> Iterator[Request]:
    rng = np.random.default_rng(7)
    n_in = max(768, 3 * kind.block_weights)
    imatrix = weights.importance("measured", n_in)
    for name in weights.KINDS:
        x = weights.rows(name, 2, n_in, seed=2)
        packed = libggml.quantize(x, kind.id, imatrix)
        yield request(QUANTIZE_MEASURED, isa, kind, x, packed, n_in, imatrix)
        if kind.quantizes:
            yield request(QUANTIZE, isa, kind, x, libggml.quantize(x, kind.id), n_in)
        yield request(DEQUANTIZE, isa, kind, packed, libggml.dequantize(packed, kind.id, n_in), n_in)
    if kind.quantizes or kind.supports_stochastic:
        packed = libggml.quantize(weights.rows("model-like", 7, n_in), kind.id, imatrix if kind.needs_imatrix else None)
        a, b = (rng.standard_normal(shape).astype(np.float32) for shape in [(3, n_in), (7, 3)])
        delta = (b[:, :1] * a[0] + b[:, 1:2] * a[1]) + b[:, 2:] * a[2]
    if kind.quantizes:
        merged = libggml.quantize(libggml.dequantize(packed, kind.id, n_in) + delta, kind.id)
        yield request(MERGE, isa, kind, packed, merged, n_in, a, b)
    if kind.supports_stochastic:
        for size in (0.003, 0.1, 1.0):
            scaled = b * np.float32(size * 0.02)
            delta = (scaled[:, :1] * a[0] + scaled[:, 1:2] * a[1]) + scaled[:, 2:] * a[2]
            if kind.name in reference.CODECS:
                headers = reference.choose_scales(packed, kind, delta)[0]
                written = reference.round_stochastic(packed, kind, headers, delta, 1.25, 99, 7)[0]
            else:
                written = np.empty_like(packed)
                kernels.choose_scales(packed, kind, written, delta, isa="scalar")
                kernels.round_stochastic(packed, kind, written, delta, gain=1.25, key=99, first_row=7, isa="scalar")
            yield request(DITHER, isa, kind, packed, written, n_in, a, scaled)
    if can_calibrate(kind):
        yield from searches(kind, isa, packed, np.float32(0.02) * delta)


def searches(kind: GgmlType, isa: str, packed: np.ndarray, delta: np.ndarray) -> Iterator[Request]:
    """Calibrated rounding, also with an odd number of stripes and with infinite moments; scalar code is the reference.

    tests/calibration compares that with its objective in numpy.
    """
    rng = np.random.default_rng(8)
    n_rows, n_in = delta.shape
    target = (libggml.dequantize(packed, kind.id, n_in) + delta).astype(np.float32)
    v = (rng.standard_normal((kernels.DIRECTIONS, n_in)) * 0.1).astype(np.float32)
    u = rng.standard_normal((n_rows, kernels.KEPT)).astype(np.float32)
    order, limits = rng.permutation(n_rows).astype(np.int32), np.float32([0, 4, 1, 0.5, 0])
    for diagonal in (0.5, np.inf):
        d = np.full(n_in, diagonal, np.float32)
        found = packed.copy()
        moves = kernels.search_codes(packed, kind, found, target, v, d, u, order, limits.tolist(), isa="scalar")
        assert bool(moves) == np.isfinite(diagonal)
        yield request(SEARCH, isa, kind, packed, found, n_in, target, v, d, u, order, limits)


def assert_answers(command: list[str], made: list[Request]) -> None:
    done = subprocess.run(command, input=b"".join(sent for sent, _ in made), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    assert not done.stderr, done.stderr.decode()[-4000:]
    start = 0
    for sent, expected in made:
        assert struct.unpack_from("q", done.stdout, start) == (0,), struct.unpack_from("8q", sent)
        assert done.stdout[start + 8 : start + 8 + len(expected)] == expected, struct.unpack_from("8q", sent)
        start += 8 + len(expected)
    assert start == len(done.stdout)


@pytest.fixture(scope="module")
def neon(tmp_path_factory):
    emulator = next(filter(None, map(shutil.which, EMULATORS)), None)
    if emulator is None or shutil.which(CROSS_COMPILER) is None:
        pytest.skip(f"needs {CROSS_COMPILER} and {EMULATORS[0]} (Debian: gcc-aarch64-linux-gnu, qemu-user-static)")
    return [emulator, str(build(tmp_path_factory.mktemp("neon"), CROSS_COMPILER, ["-static"]))]


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    flags = [
        "-O0",
        "-g1",
        "-Wno-sign-conversion",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
    ]  # -O1 takes minutes
    return [str(build(tmp_path_factory.mktemp("sanitized"), "gcc", flags))]


def compilers() -> list[str]:
    """``clang``, and all versions of gcc and clang with a number in their names."""
    folders = [Path(folder) for folder in os.get_exec_path() if Path(folder).is_dir()]
    names = {path.name for folder in folders for path in folder.iterdir()}
    return ["clang", *sorted(name for name in names if re.fullmatch(r"(gcc|clang)-\d+", name))]


@pytest.fixture(scope="module", params=compilers())
def compiled(request, tmp_path_factory):
    if shutil.which(request.param) is None:
        pytest.skip(f"needs {request.param} (Debian: {request.param})")
    return [str(build(tmp_path_factory.mktemp(request.param), request.param, []))]


@pytest.mark.parametrize("isa", ["neon", "scalar"])
@pytest.mark.parametrize("kind", TYPES.values(), ids=lambda kind: kind.name)
def test_aarch64_equals_ggml(neon, kind, isa):
    assert_answers(neon, list(requests(kind, isa)))


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
@pytest.mark.parametrize("kind", TYPES.values(), ids=lambda kind: kind.name)
def test_sanitizers_see_nothing(sanitized, kind, isa):

    if isa not in isa_names():
        pytest.skip(f"this machine has no {isa}")
    assert_answers(sanitized, list(requests(kind, isa)))


@pytest.mark.parametrize("kind", TYPES.values(), ids=lambda kind: kind.name)
def test_each_compiler_equals_ggml(compiled, kind):
    for isa in isa_names():
        assert_answers(compiled, list(requests(kind, isa)))
