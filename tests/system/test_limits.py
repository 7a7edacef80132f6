"""CPUs and memory as control groups limit them, on trees of files as Linux lays them out."""

import ctypes
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from gguflora.system.cgroups import control_groups
from gguflora.system.cpus import cpu_quotas, usable_cpus
from gguflora.system.memory import available_memory, give_back_memory, held_memory, total_memory
from support.processes import resident_bytes

GB = 1 << 30
MEMINFO = f"MemTotal: {64 * GB >> 10} kB\nMemFree: 1024 kB\nMemAvailable: {48 * GB >> 10} kB\n"
V2_MOUNT = "31 23 0:28 {root} /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNTS = (
    "32 31 0:29 {root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "36 31 0:33 {root} /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
)


def lay(root: Path, files: dict[str, str]) -> Path:
    for name, content in {"proc/meminfo": MEMINFO, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def v2(root: Path, path: str, files: dict[str, str], mount_root: str = "/") -> Path:
    proc = {"proc/self/cgroup": f"0::{path}\n", "proc/self/mountinfo": V2_MOUNT.format(root=mount_root)}
    return lay(root, proc | {f"sys/fs/cgroup/{name}": content for name, content in files.items()})


def v1(root: Path, path: str, files: dict[str, str], mount_root: str = "/") -> Path:
    lines = f"5:memory:{path}\n3:cpuset:{path}\n2:cpu,cpuacct:{path}\n1:name=systemd:{path}\n0::/\n"
    proc = {"proc/self/cgroup": lines, "proc/self/mountinfo": V1_MOUNTS.format(root=mount_root)}
    return lay(root, proc | {f"sys/fs/cgroup/{name}": content for name, content in files.items()})


def test_no_groups_no_limits(tmp_path):
    lay(tmp_path, {})
    assert (control_groups("cpu", tmp_path), cpu_quotas(tmp_path)) == ([], [])
    assert (available_memory(tmp_path), total_memory(tmp_path)) == (48 * GB, 64 * GB)


@pytest.mark.parametrize(
    ("content", "quotas"),
    [("200000 100000\n", [2]), ("150000 100000\n", [2]), ("5000 100000\n", [1]), ("max 100000\n", []), ("?", [])],
)
def test_quota_of_version_2(tmp_path, content, quotas):
    assert cpu_quotas(v2(tmp_path, "/", {"cpu.max": content})) == quotas


@pytest.mark.parametrize(("quota", "quotas"), [("250000\n", [3]), ("-1\n", [])])
def test_quota_of_version_1(tmp_path, quota, quotas):
    """A container sees its own group at the mount point, and a path of the host that is not there."""
    files = {"cpu,cpuacct/cpu.cfs_quota_us": quota, "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}
    assert cpu_quotas(v1(tmp_path, "/docker/0123", files, "/docker/0123")) == quotas
    assert cpu_quotas(v1(tmp_path, "/docker/0123", files)) == quotas


def test_group_around_counts(tmp_path):
    files = {"a/b/cpu.max": "max 100000", "a/cpu.max": "400000 100000", "a/memory.max": f"{3 * GB}"}
    root = v2(tmp_path, "/a/b", files | {"a/b/memory.max": "max"})
    assert cpu_quotas(root) == [4]
    assert total_memory(root) == available_memory(root) == 3 * GB


def test_used_memory_is_not_available_but_its_file_cache_is(tmp_path):
    files = {
        "memory.max": f"{8 * GB}\n",
        "memory.high": "max\n",
        "memory.current": f"{6 * GB}\n",
        "memory.stat": f"anon {GB}\nfile {5 * GB}\ninactive_file {4 * GB}\n",
    }
    root = v2(tmp_path, "/", files)
    assert (available_memory(root), total_memory(root)) == (6 * GB, 8 * GB)
    (root / "sys/fs/cgroup/memory.high").write_text(f"{4 * GB}\n")
    assert (available_memory(root), total_memory(root)) == (2 * GB, 4 * GB)


def test_memory_of_version_1(tmp_path):
    files = {
        "memory/memory.limit_in_bytes": f"{8 * GB}",
        "memory/memory.usage_in_bytes": f"{10 * GB}",
        "memory/memory.stat": f"inactive_file 0\ntotal_inactive_file {GB}\n",
    }
    root = v1(tmp_path, "/docker/1", files, "/docker/1")
    assert (available_memory(root), total_memory(root)) == (0, 8 * GB)
    (root / "sys/fs/cgroup/memory/memory.limit_in_bytes").write_text("9223372036854771712")
    assert (available_memory(root), total_memory(root)) == (48 * GB, 64 * GB)


def test_path_of_another_namespace_is_not_followed(tmp_path):
    (tmp_path / "sys/secret").mkdir(parents=True)
    groups = control_groups("cpu", v2(tmp_path, "/../../secret", {"cpu.max": "100000 100000"}))
    assert [group.folder for group in groups] == [tmp_path / "sys/fs/cgroup"]


@pytest.mark.skipif(not hasattr(__import__("os"), "sched_setaffinity"), reason="this system has no affinity")
def test_affinity_of_a_process_counts():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    code += "from gguflora.system.cpus import usable_cpus; print(usable_cpus())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
    assert usable_cpus() >= 1


def test_this_machine():
    assert 0 < available_memory() <= total_memory() < 1 << 50


def test_memory_of_a_process(tmp_path):
    lay(tmp_path, {"proc/7/status": "Name:\tx\nVmRSS:\t  9000 kB\nRssAnon:\t    512 kB\nRssFile:\t  8488 kB\n"})
    assert held_memory(7, tmp_path) == 512 << 10
    assert held_memory(8, tmp_path) == 0
    code = "import sys; block = bytearray(b'x' * (64 << 20)); print(len(block), flush=True); sys.stdin.read()"
    command = [sys.executable, "-P", "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert 64 << 20 <= held_memory(process.pid) < 256 << 20
        process.stdin.close()


def test_freed_memory_goes_back_to_the_system():
    has_glibc = platform.libc_ver()[0] == "glibc"
    assert give_back_memory() == has_glibc
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    size = 64 << 10  # too small for a mapping of its own
    blocks = [libc.malloc(size) for _ in range(1024)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for block in blocks[:-1]:  # the last one keeps the end of the heap in use
        libc.free(block)
    before = resident_bytes()
    give_back_memory()
    assert resident_bytes() < before - (40 << 20) or not has_glibc
    libc.free(blocks[-1])


_ENDS_OF_HEAPS = """
import ctypes, platform, re, sys, threading
from pathlib import Path
from gguflora.system.memory import bound_free_memory, give_back_memory

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10

assert bound_free_memory() == (platform.libc_ver()[0] == "glibc")
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def use(blocks, size):
    held = [libc.malloc(size) for _ in range(blocks)]
    for block in held:
        ctypes.memset(block, 1, size)
    for block in reversed(held):
        libc.free(block)

before = resident()
for _ in range(4):
    thread = threading.Thread(target=use, args=(1, 30 << 20))
    thread.start(); thread.join()
    thread = threading.Thread(target=use, args=(300, 100_000))
    thread.start(); thread.join()
give_back_memory()
print(resident() - before)
"""


def test_the_ends_of_heaps_stay_small():
    done = subprocess.run([sys.executable, "-P", "-c", _ENDS_OF_HEAPS], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 12 or platform.libc_ver()[0] != "glibc"
