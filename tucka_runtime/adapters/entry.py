"""What the registry remembers of a name: the adapter that it stands for, or the adapters that it is an alias of.

An entry is a row of the registry's table (journal.py); what is read of one is checked. Standard library and msgspec.
"""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import msgspec

from tucka_runtime.adapters.journal import JournalRow
from tucka_runtime.messages import AdapterInfo, AdapterKey, Route
from tucka_runtime.names import MAX_TARGETS, MAX_WEIGHT, VERSION_DIGITS, Alias, check_name, version_name

_BLOB = re.compile(r"[0-9a-f]{64}(-[0-9a-f]{16})?(\+[0-9a-f]{16})?")


@dataclass(frozen=True)
class RegistryEntry:
    """What a name stands for. `source` is where it was loaded from: for people to read, and to copy it again from there
    where the private copy is lost. `keep_resident`: it always has a slot. `info` is its card, without what is in the
    copy's training.json; None in entries of versions that did not keep it. `defaults` names what its files set for
    requests (`AdapterDefaults.names`).

    `versions` are the contents that the name stood for before, the newest first, each an entry of its own: `version_of`
    is that name, `name` the version's. Of two contents whose digests begin alike only one is there."""

    name: str
    digest: str
    blob: str
    generation: int
    source: str
    pinned_route: Route | None
    base_fingerprint: str
    keep_resident: bool = False
    info: AdapterInfo | None = None
    defaults: tuple[str, ...] = ()
    version_of: str | None = None
    versions: tuple["RegistryEntry", ...] = ()

    @property
    def key(self) -> AdapterKey:
        return AdapterKey(self.name, self.generation)

    @property
    def blobs(self) -> list[str]:
        """The names of the copies of all contents that are kept under the name."""
        return [self.blob, *(version.blob for version in self.versions)]

    @property
    def owner(self) -> str:
        """The name whose content this is or was."""
        return self.version_of or self.name

    def after(self, earlier: Iterable["RegistryEntry"], keep: int) -> "RegistryEntry":
        """This entry with what its name stood for before, the newest first, of `keep` contents in all."""
        digits = {self.digest[:VERSION_DIGITS]}
        versions: list[RegistryEntry] = []
        for entry in earlier:
            if entry.digest[:VERSION_DIGITS] not in digits and len(versions) < keep - 1:
                digits.add(entry.digest[:VERSION_DIGITS])
                versions.append(entry if entry.version_of else _version(entry))
        return replace(self, versions=tuple(versions))

    def row(self) -> JournalRow:
        """As `entry_of` reads it."""
        row = asdict(self)
        del row["version_of"]
        row["versions"] = [version.row() for version in self.versions]
        return row


def _version(entry: RegistryEntry) -> RegistryEntry:
    """The entry as one of the versions of its name."""
    name = version_name(entry.name, entry.digest)
    info = entry.info and replace(entry.info, key=AdapterKey(name, entry.generation))
    return replace(entry, name=name, keep_resident=False, info=info, version_of=entry.name, versions=())


def alias_of(row: JournalRow) -> Alias | None:
    """The alias that a row is; None where it is an adapter's. Raises ValueError, KeyError, TypeError or
    InvalidRequestError if it is neither."""
    if "targets" not in row:
        return None
    check_name(row["name"])
    targets = tuple(row["targets"].items())
    if not 0 < len(targets) <= MAX_TARGETS:
        raise ValueError("an alias has no `targets`, or too many")
    for target, weight in targets:
        check_name(target)
        if type(weight) is not int or not 0 < weight <= MAX_WEIGHT:
            raise ValueError("a weight of an alias is no natural number")
    return Alias(row["name"], targets)


def entry_of(row: JournalRow, version_of: str | None = None) -> RegistryEntry:
    """An entry as it stands in the file; what later versions of the same format add is left out. Raises ValueError,
    KeyError, TypeError or InvalidRequestError if it is none."""
    item = {"blob": row["digest"], **row}  # the first versions had no blob
    names = ("name", "digest", "blob", "generation", "source", "pinned_route", "base_fingerprint")
    known = {name: item[name] for name in names}
    if not all(isinstance(known[name], str) for name in ("name", "digest", "blob", "source", "base_fingerprint")):
        raise ValueError("a text of an entry is none")
    if not _BLOB.fullmatch(known["blob"]) or known["blob"][:64] != known["digest"]:
        raise ValueError("a `blob` is not the name of a copy")
    if version_of is None:
        check_name(known["name"])
    elif known["name"] != version_name(version_of, known["digest"]):
        raise ValueError("a version has another name than its digest's")
    if type(known["generation"]) is not int or known["generation"] < 0:
        raise ValueError("a `generation` is not a natural number")
    if (pinned := known["pinned_route"]) is not None:
        if type(pinned["group"]) is not int or not all(type(weight) in (int, float) for weight in pinned["weights"]):
            raise ValueError("a `pinned_route` is not a group and its weights")
        known["pinned_route"] = Route(pinned["group"], tuple(pinned["weights"]))
    keep, info = item.get("keep_resident", False), item.get("info")
    if type(keep) is not bool:
        raise ValueError("a `keep_resident` is neither true nor false")
    defaults = tuple(item.get("defaults", ()))
    if not all(isinstance(name, str) for name in defaults):
        raise ValueError("a name of an entry's `defaults` is no text")
    versions = () if version_of is not None else tuple(entry_of(v, known["name"]) for v in item.get("versions", ()))
    return RegistryEntry(
        **known,
        keep_resident=keep,
        info=_info(info),
        defaults=defaults,
        version_of=version_of,
        versions=versions,
    )


def _info(item: Any) -> AdapterInfo | None:
    """A card as it stands in the file. One of another version, whose cards have other fields, is made anew when the
    adapter is loaded."""
    try:
        return None if item is None else msgspec.convert(item, AdapterInfo)
    except msgspec.ValidationError:
        return None
