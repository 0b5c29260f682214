"""The adapters of the engine offline: by name, and several of them with weights as one."""

import itertools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from tucka_runtime.adapters.files import blob_of
from tucka_runtime.channel_messages import AdapterPart
from tucka_runtime.errors import InvalidRequestError, ModelNotFoundError, StorageError
from tucka_runtime.messages import AdapterInfo, AdapterKey, Route, RouteScope
from tucka_runtime.names import combined_name

if TYPE_CHECKING:
    from tucka_runtime.engine.engine import Engine

Weighted = Sequence[Mapping[str, Any]]
"""Several adapters at once: of each its `name`, and its `weight`, which is 1 unless given."""

Adapters = str | Weighted | None
"""What a prompt is answered with; None is the base."""

Parts = tuple[tuple[str, int | None, float], ...]
"""Adapters by name, which member is meant where one is a bank, and their weights."""


class OfflineAdapters:
    """`infos` are the cards of what is loaded. Combinations take a slot while calls ask for them."""

    def __init__(self, engine: "Engine"):
        self._engine = engine
        self.infos: dict[str, AdapterInfo] = {}
        self._sources: dict[str, tuple[Path, Route | None, str]] = {}  # with the blob of what was loaded
        self._combined: dict[Parts, AdapterKey] = {}  # those of the last call
        self._generations = itertools.count(1)

    def load(self, name: str, folder: Path, pinned: Route | None) -> AdapterInfo:
        """Makes a name stand for the adapter in a folder, instead of what it stood for. Raises AdapterError."""
        info = self._engine.load_adapter(AdapterKey(name, next(self._generations)), folder, pinned)
        self.unload(name)
        self.infos[name] = info
        self._sources[name] = folder, pinned, blob_of(folder, info.digest)
        return info

    def unload(self, name: str) -> None:
        """Forgets a name. An unknown one is nothing to do."""
        if (old := self.infos.pop(name, None)) is not None:
            self._engine.unload_adapter(old.key)
            self._keep([parts for parts in self._combined if all(name != own for own, _, _ in parts)])

    def choose(self, adapters: Sequence[Adapters]) -> list[Parts]:
        """What each of a call's prompts is answered with. Of combinations those stay that are among them, and are made
        where they are not there. Raises InvalidRequestError, ModelNotFoundError, AdapterCapacityError."""
        chosen = [self._parts(choice) for choice in adapters]
        wanted = {parts: None for parts in chosen if _is_combination(parts)}
        self._keep(wanted)
        for parts in wanted:
            if parts not in self._combined:
                self._combined[parts] = self._combine(parts)
        return chosen

    def served(self, parts: Parts) -> tuple[AdapterKey | None, int | None]:
        """What the engine calls it, and the member of a bank."""
        if _is_combination(parts):
            return self._combined[parts], None
        return (self.infos[parts[0][0]].key, parts[0][1]) if parts else (None, None)

    def scope(self, parts: Parts) -> str | None:
        """The route scope that an adapter, or all of a combination that have a router, were trained for."""
        scopes = {self.infos[name].scope for name, _, _ in parts if self.infos[name].kind == "tucka"}
        if _is_combination(parts):
            scopes.discard(RouteScope.PINNED)
        return scopes.pop() if len(scopes) == 1 else None

    def _parts(self, choice: Adapters) -> Parts:
        if choice is None or isinstance(choice, str):
            return () if choice is None else ((*self._find(choice), 1.0),)
        found = []
        for one in choice:
            name, weight = one.get("name"), one.get("weight", 1.0)
            if one.keys() - {"name", "weight"} or not isinstance(name, str) or not isinstance(weight, int | float):
                raise InvalidRequestError(
                    "Of several adapters each is a `name`, and a number as its `weight` or none.", "adapter"
                )
            found.append((*self._find(name), float(weight)))
        if not found:
            raise InvalidRequestError("A list of adapters names none. Give None for the base.", "adapter")
        return tuple(found)

    def _find(self, name: str) -> tuple[str, int | None]:
        """An adapter's own name, or the bank's and which of its members is `bank/member`."""
        bank, _, own = name.rpartition("/")
        if name in self.infos and not self.infos[name].members:
            return name, None
        if bank in self.infos and own in self.infos[bank].members:
            return bank, self.infos[bank].members.index(own)
        if name in self.infos:
            raise ModelNotFoundError("That is a bank of adapters: name one of them, as `bank/member`.", "adapter")
        known = ", ".join(self.infos) or "none is loaded"
        raise ModelNotFoundError(f"No adapter of that name; there are: {known}.", "adapter")

    def _keep(self, wanted: Collection[Parts]) -> None:
        """Combinations beside these go."""
        for parts in [parts for parts in self._combined if parts not in wanted]:
            self._engine.unload_adapter(self._combined.pop(parts))

    def _combine(self, parts: Parts) -> AdapterKey:
        """Several adapters as one, made of their folders."""
        key = AdapterKey(combined_name(name for name, _, _ in parts), next(self._generations))
        made_of = [AdapterPart(*self._sources[name], member, weight) for name, member, weight in parts]
        try:
            folded, _ = self._engine.combine_adapters(key, made_of)
        except StorageError:
            raise InvalidRequestError(
                "The folder of one of these adapters has other content than when it was loaded. Load it again.",
                "adapter",
            ) from None
        self._engine.add_adapter(folded)
        return key


def is_weighted(adapter: Adapters | Sequence[Adapters]) -> TypeGuard[Weighted]:
    """Whether it is one weighted list for all prompts, not one choice for each."""
    return not isinstance(adapter, str) and bool(adapter) and all(isinstance(one, Mapping) for one in adapter or ())


def _is_combination(parts: Parts) -> bool:
    """One adapter by itself is itself."""
    return len(parts) > 1 or (len(parts) == 1 and parts[0][2] != 1)
