"""What this process may use of the machine: cores and memory, by the narrowest of the limits that are set on it.

The machine's own figures mislead in a container, whose quota they do not show, and where the page cache is full: free
memory is what nobody uses even as a cache.
"""

import contextlib
import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HUGE = 1 << 60
"""Limits from here on mean none: cgroup v1 writes a page short of 2^63 for it."""

NARROW = 512
"""Models whose hidden states are narrower get one thread: more only take the cores from the API process. Two against
one, `python -m tucka_runtime.bench`, base only: d 128 1796 and 2056 tok/s, d 256 1208 and 1136, d 512 588 and 452; with
`tucka loadtest --rate 4` on the embedded default (d 128) a token takes 14.3 and 6.5 ms. On 2 cores."""


@dataclass(frozen=True)
class Memory:
    """Bytes that can still be allocated, and in words what limits them."""

    available: int
    limited_by: str


@dataclass(frozen=True)
class Resident:
    """Bytes of this process that lie in memory: now, and the most that did since `forget_peak`."""

    now: int
    most: int


@dataclass(frozen=True)
class Cores:
    """Cores that threads can run on at once, and in words what limits them."""

    count: int
    limited_by: str


def memory(root: Path = Path("/")) -> Memory:
    """The least of what the kernel says is available, what each enclosing cgroup leaves, and RLIMIT_AS.

    A cgroup's file pages that were not used of late count as free: the kernel gives them up before it kills.
    `root` is where /proc and /sys are looked for.
    """
    found = [Memory(_available(root), "the machine")]
    for folder in _cgroups(root, "memory"):
        limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        if limit is None or limit >= HUGE:
            continue
        used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes")
        if used is None:
            continue
        stat = _table(folder / "memory.stat")
        idle = stat.get("total_inactive_file", stat.get("inactive_file", 0))
        found.append(Memory(max(limit - used + idle, 0), "its cgroup"))
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        found.append(Memory(max(soft - mapped, 0), "RLIMIT_AS"))
    return min(found, key=lambda m: m.available)


def total_memory() -> int:
    """The machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def resident() -> Resident:
    """As the kernel counts them, by pages."""
    rows = (line.split() for line in _lines(Path("/proc/self/status")) if line.startswith(("VmRSS:", "VmHWM:")))
    found = {row[0]: int(row[1]) * 1024 for row in rows}
    return Resident(found.get("VmRSS:", 0), found.get("VmHWM:", 0))


def forget_peak() -> None:
    """Lets `Resident.most` begin anew. Where a container forbids it, it stays the most since the process began."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def cores(root: Path = Path("/")) -> Cores:
    """The least of this process's affinity and the enclosing cgroups' quotas, which are rounded down: a thread more
    than the quota allows stops all of them for the rest of every period."""
    found = [Cores(len(os.sched_getaffinity(0)), "its affinity")]
    for folder in _cgroups(root, "cpu"):
        words = _words(folder / "cpu.max")
        quota, period = (
            words if len(words) == 2 else (_word(folder / "cpu.cfs_quota_us"), _word(folder / "cpu.cfs_period_us"))
        )
        if quota.isdigit() and period.isdigit() and int(period):
            found.append(Cores(max(int(quota) // int(period), 1), "its cgroup's quota"))
    return min(found, key=lambda c: c.count)


def threads(hidden: int, most: int) -> int:
    """How many threads a model with hidden states of this width gets, served or trained: as many as torch would take
    (`most`), but no more than this process's share of the machine's cores."""
    return 1 if hidden < NARROW else min(most, cores().count)


def _available(root: Path) -> int:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's cgroup and of those around it, innermost first; of version 2, and of version 1
    where the controller has a hierarchy of its own. In a container its own cgroup is mounted as the top one, and the
    path that the kernel names does not exist there: then the top one is all that can be seen."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            tops = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif controller in controllers.split(","):
            tops = [root / "sys/fs/cgroup" / controller, root / "sys/fs/cgroup" / controllers]
        else:
            continue
        for top in tops:
            if not top.is_dir():
                continue
            inner = top / path.strip("/")
            while not inner.is_dir() and inner != top:
                inner = inner.parent
            yield inner
            while inner != top:
                inner = inner.parent
                yield inner
            break


def _lines(path: Path) -> list[str]:
    """The lines of a file, none if it cannot be read."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _words(path: Path) -> list[str]:
    lines = _lines(path)
    return lines[0].split() if lines else []


def _word(path: Path) -> str:
    return next(iter(_words(path)), "")


def _number(path: Path) -> int | None:
    """None where there is no such file, or it says "max"."""
    word = _word(path)
    return int(word) if word.isdigit() else None


def _table(path: Path) -> dict[str, int]:
    return {name: int(value) for name, value in (line.split() for line in _lines(path)) if value.isdigit()}
