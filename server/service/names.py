"""What each name stands for, and where that is: read by everybody, written by adapters.py and restored.py alone.

Names, their kept versions (`name@digest`) and aliases share one namespace, and the base's name is in it.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

from tucka_runtime.adapters.entry import RegistryEntry
from tucka_runtime.errors import ModelNotFoundError, StorageError
from tucka_runtime.messages import AdapterInfo
from tucka_runtime.names import Alias, split_version, version_name
from tucka_runtime.server.http.access import Sees, everything
from tucka_runtime.server.metrics.metrics import AdapterTiers, Metrics
from tucka_runtime.server.metrics.vllm import Residence
from tucka_runtime.server.service.aliases import Aliases, choose
from tucka_runtime.server.service.coming import Tier
from tucka_runtime.server.service.copies import lost
from tucka_runtime.server.service.leases import LoadedAdapter
from tucka_runtime.server.service.residency import Residency


class Names:
    """Names and their adapters. `base_names`, one or more, are taken by the base model."""

    def __init__(self, base_names: Sequence[str], residency: Residency, metrics: Metrics):
        self.base_names = tuple(dict.fromkeys(base_names))
        self.residency = residency
        self._metrics = metrics
        self.aliases = Aliases()
        self._loaded: dict[str, LoadedAdapter] = {}  # versions too, each under its own name
        self._lost: dict[str, RegistryEntry] = {}

    @property
    def lost(self) -> int:
        """How many names that were promised (loaded once, and never unloaded) have no adapter: neither their copy nor
        their source could be read when it was wanted."""
        return len(self._lost)

    def get(self, name: str, sees: Sees = everything) -> LoadedAdapter:
        """What the name, or version, stands for now. Raises ModelNotFoundError, also where it is not seen, and
        StorageError where its adapter was lost."""
        known = self._called(name)
        if not sees(name) or (known not in self._loaded and known not in self._lost):
            raise self._unknown(sees, name)
        if known in self._lost:
            raise lost()
        return self._loaded[known]

    def find(self, name: str) -> LoadedAdapter | None:
        """What the name stands for now, if anything."""
        return self._loaded.get(name)

    def knows(self, name: str) -> bool:
        """Whether the name stands for something, or was promised to."""
        return name in self.base_names or name in self.aliases or name in self._loaded or name in self._lost

    def alias(self, name: str, sees: Sees = everything) -> Alias | None:
        """The alias of that name, or `base:name` as SGLang has it, for who sees it."""
        found = self.aliases.find(name) or self.aliases.find(self._behind_base(name))
        return found if found is not None and sees(found.name) else None

    def alias_of(self, name: str, sees: Sees = everything) -> Alias:
        """The alias of that very name. Raises ModelNotFoundError, also where it is not seen."""
        found = self.aliases.find(name)
        if found is None or not sees(name):
            raise self._unknown(sees)
        return found

    def asked(self, name: str, sees: Sees = everything, who: str | None = None) -> LoadedAdapter:
        """What a request of `who` for the name gets. Raises what `named` and `target` do."""
        alias = self.alias(name, sees)
        return self.named(name, sees) if alias is None else self.target(alias, who)

    def target(self, alias: Alias, who: str | None = None) -> LoadedAdapter:
        """The target of the alias for `who`, of those that are there. Who asks need not see it. Raises
        ModelNotFoundError without any, and StorageError where one was lost."""
        there: dict[str, LoadedAdapter] = {}
        gone: StorageError | None = None
        for name, _ in alias.targets:
            try:
                there[name] = self.model(name)
            except ModelNotFoundError:
                pass
            except StorageError as error:
                gone = error
        if (target := choose(alias, who, there.__contains__)) is not None:
            return there[target]
        if gone is not None:
            raise gone
        raise ModelNotFoundError(
            "None of the adapters is loaded that this alias stands for. Load one of them, or give the alias others.",
            "model",
        )

    def _behind_base(self, name: str) -> str:
        """What follows `base:`, as SGLang has it; the name itself where that is not its beginning."""
        found = (name.removeprefix(f"{base}:") for base in self.base_names if name.startswith(f"{base}:"))
        return next(found, name)

    def _called(self, name: str) -> str:
        """The name under which a version is known that may be named by more digits of its digest, and may be what its
        name stands for at the moment."""
        if name in self._loaded or name in self._lost or (version := split_version(name)) is None:
            return name
        owner, digits = version
        for known in (owner, version_name(owner, digits)):
            adapter = self._loaded.get(known)
            entry = self._lost.get(known) if adapter is None else adapter.entry
            if entry is not None and entry.digest.startswith(digits):
                return known
        return name

    def _unknown(self, sees: Sees, name: str | None = None) -> ModelNotFoundError:
        """For a name that is nobody's. Where it would be a version, the others of its name are named first."""
        names = [*self.base_names, *self._loaded, *(alias.name for alias in self.aliases)]
        if name is not None and (version := split_version(name)) is not None and version[0] in self._loaded:
            names.sort(key=lambda known: (split_version(known) or (known,))[0] != version[0])
        return ModelNotFoundError.among(filter(sees, names))

    def all(self, sees: Sees = everything) -> list[LoadedAdapter]:
        return [adapter for name, adapter in self._loaded.items() if sees(name)]

    @property
    def tiers(self) -> AdapterTiers:
        """Where all of them are."""
        residency = self.residency
        residents = residency.residents()
        own = [(key, info) for key, info in residents if info.kind != "combination"]
        resident = [Residence(key.name, info.r, residency.kept(key)) for key, info in own]
        cached = [self._loaded[key.name] for key in residency.host if key.name in self._loaded]
        return AdapterTiers(
            len(self._loaded),
            tuple(resident),
            tuple([Residence(adapter.key.name, adapter.info.r) for adapter in cached]),
            residency.host.bytes,
            residency.awaited,
            residency.awaited_names,
            len(residents) - len(own),
        )

    def tier(self, adapter: LoadedAdapter) -> Tier:
        return self.residency.tier(adapter.key)

    def named(self, name: str, sees: Sees = everything) -> LoadedAdapter:
        """What a request gets for the name, or for `base:name` as SGLang has it. Raises what `model` does."""
        for own in (name, self._behind_base(name)):
            called = self._called(own)
            if (sees(own) and (called in self._loaded or called in self._lost)) or self.member(own, sees) is not None:
                return self.model(own, sees)
        raise self._unknown(sees, name)

    def model(self, name: str, sees: Sees = everything) -> LoadedAdapter:
        """An adapter, or `bank/member`. Raises what `get` does; a bank by itself is no model."""
        found = self.card(name, sees)
        if found.member is None and found.info.members:
            raise ModelNotFoundError("This is a bank of adapters. Ask for one of them, as `bank/member`.", "model")
        return found

    def member(self, name: str, sees: Sees = everything) -> LoadedAdapter | None:
        """What `bank/member` stands for now, unless an adapter has that very name. Raises StorageError where the bank
        was lost."""
        bank, slash, own = name.rpartition("/")
        if not slash or not sees(name) or name in self._loaded or name in self._lost:
            return None
        bank = self._called(bank)
        if bank in self._lost:
            raise lost()
        found = self._loaded.get(bank)
        if found is None or own not in found.info.members:
            return None
        return replace(found, member=found.info.members.index(own))

    def card(self, name: str, sees: Sees = everything) -> LoadedAdapter:
        """An adapter, a bank, or a member of one. Raises what `get` does."""
        return self.member(name, sees) or self.get(name, sees)

    def _stand(self, entry: RegistryEntry, info: AdapterInfo, created: int | None = None) -> LoadedAdapter:
        """Lets a name stand for an adapter from now on."""
        self._lost.pop(entry.name, None)
        old = self._loaded.get(entry.name)
        if created is None:
            created = old.created if old is not None and old.key == entry.key else int(time.time())
        adapter = self._loaded[entry.name] = LoadedAdapter(entry, info, created)
        return adapter

    def _lose(self, entry: RegistryEntry) -> None:
        """The name has no adapter any more, unless it stands for another by now."""
        adapter = self._loaded.get(entry.name)
        if adapter is None or adapter.key == entry.key:
            self._forget(entry.name)
            self._lost[entry.name] = entry

    def _forget(self, name: str) -> None:
        if self._loaded.pop(name, None) is not None:
            self._metrics.adapter_unloaded(name)
