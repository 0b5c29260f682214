"""The file of API keys (`--api-key-file`): what each of them may do, and of the key itself only its SHA-256.

A key has 192 random bits. A slow hash (bcrypt, Argon2) makes guessing dear, which protects passwords that people
choose; nobody guesses these, and a slow hash would only let anybody who sends keys at random spend the server's time.
"""

import fcntl
import hashlib
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from tucka_runtime.durable import write_file
from tucka_runtime.errors import ConfigError

ROLES = ("infer", "admin", "metrics")
_KEY = re.compile(rb"tucka_([0-9a-f]{12})_[0-9a-f]{48}")

Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}\Z")]
Glob = Annotated[str, msgspec.Meta(pattern=r"^[\x21-\x7e]{1,128}\Z")]
Limit = Annotated[int, msgspec.Meta(ge=1, le=10**12)] | None


class KeyRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One key. `id` is the part of it that is no secret, `sha256` is of the whole key; `adapters` are patterns
    (fnmatch) of the models' names that it sees, the base's among them. Keys of one `tenant` share cached prompts and
    turns; without one a key is its own. A limit that is None is none."""

    name: Name
    id: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{12}\Z")]
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
    roles: tuple[Literal["infer", "admin", "metrics"], ...] = ("infer",)
    adapters: tuple[Glob, ...] = ("*",)
    requests_per_minute: Limit = None
    tokens_per_minute: Limit = None
    concurrent_requests: Limit = None
    tenant: Name | None = None
    created: str = ""


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    keys: tuple[KeyRecord, ...]


def digest_of(key: bytes) -> str:
    """What the file has of a key."""
    return hashlib.sha256(key).hexdigest()


def id_of(key: bytes) -> str | None:
    """The id within a key; None where it is no key that `new_key` makes."""
    match = _KEY.fullmatch(key)
    return None if match is None else match[1].decode()


def new_key() -> tuple[str, str]:
    """An id and the key that has it, which secret scanners know by its first letters."""
    key_id = secrets.token_hex(6)
    return key_id, f"tucka_{key_id}_{secrets.token_hex(24)}"


def now() -> str:
    """The time as the file has it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_key_file(path: str | Path) -> tuple[KeyRecord, ...]:
    """Raises ConfigError, which names no hash."""
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"The key file {path} is not there. `tucka keys add NAME --file {path}` makes it.") from None
    except OSError as error:
        raise ConfigError(f"The key file {path} cannot be read: {error.strerror}.") from None
    try:
        keys = msgspec.json.decode(content, type=_File).keys
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"The key file {path} is not as `tucka keys` writes it: {error}.") from None
    for what, values in (("name", [key.name for key in keys]), ("id", [key.id for key in keys])):
        if len(set(values)) < len(values):
            twice = next(value for value in values if values.count(value) > 1)
            raise ConfigError(f"The key file {path} has two keys of the {what} {twice}.")
    return keys


def change_key_file(path: str | Path, change: Callable[[tuple[KeyRecord, ...]], tuple[KeyRecord, ...]]) -> None:
    """Reads, changes and replaces the file while no other such change is under way: who reads it meets the old or the
    new one, whole. It is made where it is not there. Raises ConfigError, and what `change` raises."""
    target = Path(os.path.realpath(path))
    try:
        with _locked(target):
            _replace(target, change(read_key_file(target) if target.exists() else ()))
    except OSError as error:
        raise ConfigError(f"The key file {path} cannot be written: {error.strerror}. Nothing was changed.") from None


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """The lock is another file: a replaced one would be locked in vain."""
    lock = os.open(target.with_name(f"{target.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _replace(target: Path, keys: tuple[KeyRecord, ...]) -> None:
    """A new file is for its owner alone. One that is replaced keeps owner and group where this process may give them,
    and its mode but for what it gave to everybody."""

    def keep(file: int) -> None:
        if target.exists():
            old = target.stat()
            with suppress(PermissionError):
                os.fchown(file, old.st_uid, old.st_gid)
            os.fchmod(file, old.st_mode & 0o770)

    content = msgspec.json.format(msgspec.json.encode(_File(keys)), indent=2) + b"\n"
    write_file(target.parent, target.name, content, 0o600, keep)
