"""The narrowest limit counts: cgroups of both versions, from the innermost out, affinity, RLIMIT_AS."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tucka_runtime import machine

GIB = 1 << 30
CORES = len(os.sched_getaffinity(0))


def tree(root: Path, files: dict[str, str]) -> Path:
    """A root with /proc and /sys of a machine of which 8 GiB are available."""
    for name, text in {"proc/meminfo": f"MemFree: 1 kB\nMemAvailable: {8 << 20} kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_without_a_limit_it_is_what_the_kernel_says_is_available(tmp_path: Path) -> None:
    root = tree(tmp_path, {"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "max\n"})
    assert machine.memory(root) == machine.Memory(8 * GIB, "the machine")
    assert machine.cores(root) == machine.Cores(CORES, "its affinity")


def test_the_real_machine_has_something_left() -> None:
    assert 0 < machine.memory().available < machine.total_memory()
    assert 1 <= machine.cores().count <= CORES


@pytest.mark.parametrize("path", ["/a/b", "/../elsewhere/c"])
def test_a_cgroup_leaves_its_limit_less_what_is_used_and_cannot_go(tmp_path: Path, path: str) -> None:
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": f"0::{path}\n",
            "sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/memory.current": f"{3 * GIB}\n",
            "sys/fs/cgroup/memory.stat": f"anon 5\ninactive_file {GIB}\n",
            "sys/fs/cgroup/a/b/memory.max": f"{6 * GIB}\n",
            "sys/fs/cgroup/a/b/memory.current": f"{GIB}\n",
        },
    )
    assert machine.memory(root) == machine.Memory(2 * GIB, "its cgroup"), "an outer limit binds as well"


def test_a_cgroup_of_version_1(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "5:memory:/job\n4:cpu,cpuacct:/job\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "0\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{3 * GIB}\n",
            "sys/fs/cgroup/memory/job/memory.usage_in_bytes": f"{2 * GIB}\n",
            "sys/fs/cgroup/memory/job/memory.stat": "total_inactive_file 7\n",
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "150000\n",
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000\n",
        },
    )
    assert machine.memory(root) == machine.Memory(GIB + 7, "its cgroup")
    assert machine.cores(root) == machine.Cores(1, "its affinity" if CORES == 1 else "its cgroup's quota")


@pytest.mark.parametrize(("quota", "count"), [("50000 100000", 1), ("max 100000", CORES), ("99900000 100000", CORES)])
def test_a_quota_is_rounded_down_to_whole_cores_and_never_to_none(tmp_path: Path, quota: str, count: int) -> None:
    files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": f"{quota}\n"}
    assert machine.cores(tree(tmp_path, files)).count == count


def test_an_address_space_limit_is_seen() -> None:
    """In a process of its own, for a limit cannot be raised again."""
    code = "from tucka_runtime import machine; print(machine.memory().available, machine.memory().limited_by)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (GIB, GIB)),
        capture_output=True,
        text=True,
        check=True,
    )
    available, by = done.stdout.split(maxsplit=1)
    assert 0 < int(available) < GIB
    assert by.strip() == "RLIMIT_AS"
