"""Who asks: the keys of the settings and of the key file, and what each may do and see."""

import fnmatch
import hmac
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from tucka_runtime.config import ServerConfig
from tucka_runtime.names import split_version
from tucka_runtime.server.http.errors import ForbiddenNameError
from tucka_runtime.server.http.key_file import ROLES, KeyRecord, digest_of, id_of, read_key_file
from tucka_runtime.server.http.limits import Admission, Allowance, KeyLimits

Sees = Callable[[str], bool]
"""Whether a key sees the model of this name. Who sees a name sees its versions (`name@digest`)."""

_NO_DIGEST = "0" * 64


def everything(name: str) -> bool:
    """What a key sees that is for all models."""
    return True


@dataclass(frozen=True, eq=False)
class Access:
    """What a key opens. `name` is None where no key is needed; `tenant` separates cached prompts and shares turns out;
    `patterns` are those of the names that it sees."""

    name: str | None = None
    roles: frozenset[str] = frozenset(ROLES)
    tenant: str = ""
    patterns: tuple[str, ...] = ("*",)
    limits: KeyLimits | None = None

    @cached_property
    def sees_all(self) -> bool:
        return "*" in self.patterns

    @cached_property
    def sees(self) -> Sees:
        if self.sees_all:
            return everything
        found = re.compile("|".join(map(fnmatch.translate, self.patterns))).match
        return lambda name: (
            found(name) is not None or ((of := split_version(name)) is not None and found(of[0]) is not None)
        )

    def check_name(self, name: str) -> None:
        """Raises ForbiddenNameError where nothing may be put under this name: alike whether there is something."""
        if not self.sees(name):
            raise ForbiddenNameError(
                "This key may not use that name. Choose one that its patterns allow; the server's operator has them.",
                "name",
            )

    def admit(self) -> Admission:
        """One request of the key. Raises RateLimitError."""
        return Admission(self.limits)


OPEN = Access()
"""What everybody may where there are no keys."""


class Meter(Protocol):
    """Who counts what keys do, by their names in the key file."""

    def names(self, names: Sequence[str]) -> None:
        """These keys there are; those of other names are gone."""

    def refused(self, name: str, reason: str) -> None:
        """A request of the key was refused: for want of a role, or by one of its limits."""


@dataclass(frozen=True)
class Reloaded:
    """How a key file differs from before, by keys' names."""

    count: int
    added: list[str]
    changed: list[str]
    removed: list[str]


class Keys:
    """All keys of a server. Without any it is open.

    `admin_keys` are good for everything; where there are none, every one of `api_keys` is. What a key of the file used
    up stays known when the file is read again, by its id. Raises ConfigError for the file.
    """

    def __init__(self, config: ServerConfig, meter: Meter):
        self._meter = meter
        self._path = config.api_key_file
        user = frozenset(ROLES) if not config.admin_key else frozenset(ROLES) - {"admin"}
        self._plain = [
            *(_plain(f"admin-key-{i}", key, frozenset(ROLES)) for i, key in enumerate(config.admin_key, 1)),
            *(_plain(f"api-key-{i}", key, user) for i, key in enumerate(config.api_key, 1)),
        ]
        self._records: dict[str, KeyRecord] = {}
        self._access: dict[str, Access] = {}
        if self._path is not None:
            self.replace(read_key_file(self._path))

    @property
    def open(self) -> bool:
        """Whether no key is needed."""
        return self._path is None and not self._plain

    @property
    def count(self) -> int:
        return len(self._plain) + len(self._records)

    def find(self, given: bytes) -> Access | None:
        """The key's access; None where it is not one of these. Looked up by the part of it that is no secret, compared
        in constant time."""
        record = self._records.get(id_of(given) or "")
        right = hmac.compare_digest(digest_of(given), _NO_DIGEST if record is None else record.sha256)
        if record is not None and right:
            return self._access[record.id]
        which = matching(given, [key for key, _ in self._plain])
        return None if which is None else self._plain[which][1]

    def replace(self, read: Sequence[KeyRecord]) -> Reloaded:
        """These are the key file's keys from now on. Requests under way go on to their end."""
        records = {record.id: record for record in read}
        before, self._records = self._records, records
        self._access = {key_id: self._entry(record, self._access.get(key_id)) for key_id, record in records.items()}
        self._meter.names([record.name for record in records.values()])
        return Reloaded(
            len(records),
            [record.name for key_id, record in records.items() if key_id not in before],
            [record.name for key_id, record in records.items() if before.get(key_id, record) != record],
            [record.name for key_id, record in before.items() if key_id not in records],
        )

    def _entry(self, record: KeyRecord, before: Access | None) -> Access:
        allowance = Allowance(record.requests_per_minute, record.tokens_per_minute, record.concurrent_requests)
        if before is not None and before.limits is not None:
            limits = before.limits
            limits.set(allowance)
        else:
            limits = KeyLimits(allowance)
        limits.refused = lambda limit: self._meter.refused(record.name, limit)
        tenant = f"key:{record.id}" if record.tenant is None else f"tenant:{record.tenant}"
        return Access(record.name, frozenset(record.roles), tenant, record.adapters, limits)


def matching(given: bytes, keys: Sequence[bytes]) -> int | None:
    """The place of the first of `keys` that this is. Compares with every one, each in constant time."""
    found = [i for i, key in enumerate(keys) if hmac.compare_digest(given, key)]
    return found[0] if found else None


def _plain(name: str, key: str, roles: frozenset[str]) -> tuple[bytes, Access]:
    """A key of the settings. Its tenant says nothing of it."""
    encoded = key.encode()
    return encoded, Access(name, roles, digest_of(encoded))
