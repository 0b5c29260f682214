"""Changes a registry over and over and says what is done, until it is killed (test_registry.py).

    registry_child.py ROOT SOURCES [CRASH_AT]

SOURCES holds the adapters 0, 1, …. With CRASH_AT the process ends, as if killed, at that call that touches the disk.
"""

import io
import itertools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tucka_runtime.adapters import blobs, files, journal, registry
from tucka_runtime.adapters.entry import RegistryEntry
from tucka_runtime.adapters.registry import AdapterRegistry
from tucka_runtime.names import Alias

State = dict[str, Any]


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


def state(registry: AdapterRegistry) -> State:
    """What the registry remembers: of each name its generation and those of its versions, of each alias its targets."""
    names = {entry.name: [entry.generation, *(v.generation for v in entry.versions)] for entry in registry.names()}
    return {**names, **{alias.name: dict(alias.targets) for alias in registry.aliases()}}


def change(registry: AdapterRegistry, then: State, does: Callable[[], None]) -> None:
    """Says what is to be, does it, says that it is done."""
    print(json.dumps(then), flush=True)
    does()
    print("done", flush=True)


def run(registry: AdapterRegistry, sources: list[Path]) -> None:
    """Loads and replaces a name, rolls it back, points an alias at it, removes both, without end."""
    print(json.dumps(state(registry)), flush=True)
    print("done", flush=True)
    before = max((entry.generation for entry in registry.names()), default=0)
    for generation in itertools.count(before + 1):
        stored = registry.ingest(sources[generation % len(sources)])
        old = next(iter(registry.names()), None)
        earlier = [] if old is None else [old, *old.versions]
        new = RegistryEntry("name", stored.digest, stored.blob, generation, "here", None, "base").after(earlier, 3)
        if generation % 4 == 3 and old is not None and old.versions:  # a rollback
            back = old.versions[-1]
            new = replace(back, name="name", generation=generation, version_of=None).after(earlier, 3)
        now = state(registry) | {"name": [new.generation, *(version.generation for version in new.versions)]}
        change(registry, now, lambda new=new: registry.put(new))  # type: ignore[misc]
        registry.release(stored)
        registry.collect()
        alias = Alias("alias", (("name", generation),))
        change(registry, now | {"alias": dict(alias.targets)}, lambda alias=alias: registry.put_alias(alias))  # type: ignore[misc]
        for name, every in (("alias", 2), ("name", 6)):
            if generation % every == 0:
                then = {known: value for known, value in state(registry).items() if known != name}
                change(registry, then, lambda name=name: registry.remove(name))  # type: ignore[misc]


if __name__ == "__main__":
    made = AdapterRegistry(Path(sys.argv[1]))
    if len(sys.argv) > 3:
        crash_at(int(sys.argv[3]))
    run(made, sorted(Path(sys.argv[2]).iterdir()))
