"""Changes a registry over and over and says what is done, until it is killed (test_registry.py).

    registry_child.py ROOT SOURCES [CRASH_AT]

SOURCES holds the adapters 0, 1, …. With CRASH_AT the process ends, as if killed, at that call that touches the disk.
"""

import io
import itertools
import os
import sys
from pathlib import Path

from tucka_runtime.adapters import blobs, files, journal, registry


def crash_at(count: int) -> None:
    calls = itertools.count()

    def step() -> None:
        if next(calls) == count:
            os._exit(9)

    def counted(function):
        def call(*args, **kwargs):
            step()
            return function(*args, **kwargs)

        return call

    class TornFile(io.FileIO):
        def write(self, data) -> int:
            half = len(data) // 2
            super().write(data[:half])
            step()
            super().write(data[half:])
            return len(data)

    for name in ("fsync", "replace", "rename", "mkdir", "open", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    for module in (blobs, files, journal, registry):
        module.open = lambda path, mode, buffering=-1: TornFile(path, mode.replace("b", ""))  # type: ignore[attr-defined]


root, sources = Path(sys.argv[1]), sorted(Path(sys.argv[2]).iterdir())
adapters = registry.AdapterRegistry(root)
if len(sys.argv) > 3:
    crash_at(int(sys.argv[3]))
for generation in itertools.count(1):
    source = sources[generation % len(sources)]
    stored = adapters.ingest(source)
    adapters.put(registry.RegistryEntry("name", stored.digest, stored.blob, generation, "here", None, "base"))
    print("put", generation, stored.digest, flush=True)
    adapters.release(stored)
    adapters.collect()
    if generation % 3 == 0:
        adapters.remove("name")
        print("removed", generation, "-", flush=True)
