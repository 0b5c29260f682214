"""Changes a registry over and over and says what is done, until it is killed (test_registry.py).

    registry_child.py ROOT SOURCES [COUNT ...]

SOURCES holds the adapters 0, 1, …. For each COUNT a process of its own goes on in the registry ROOT/COUNT and ends, as
if killed, at that call that touches the disk; what it says is in ROOT/COUNT.said.
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

from tucka_runtime import durable
from tucka_runtime.adapters import blobs, journal, registry
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

    os.fsync = lambda descriptor: step()  # the machine goes on: what was written is there
    for name in ("replace", "rename", "mkdir", "open", "unlink", "rmdir", "ftruncate"):
        setattr(os, name, counted(getattr(os, name)))
    for module in (blobs, durable, journal, registry):
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


def crash_each(root: Path, sources: list[Path], counts: list[int]) -> None:
    for count in counts:
        if not (child := os.fork()):
            os.dup2(os.open(root / f"{count}.said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
            made = AdapterRegistry(root / str(count))
            crash_at(count)
            run(made, sources)
        if (status := os.waitpid(child, 0)[1]) != 9 << 8:
            sys.exit(f"the process of {count} ended with {status}")


if __name__ == "__main__":
    given = Path(sys.argv[1]), sorted(Path(sys.argv[2]).iterdir())
    if len(sys.argv) > 3:
        crash_each(*given, [int(count) for count in sys.argv[3:]])
    else:
        run(AdapterRegistry(given[0]), given[1])
