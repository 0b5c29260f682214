"""`tucka keys`: makes, lists and revokes the keys of a key file. A server that uses it reads it again on SIGHUP."""

import argparse
import os
import sys
from collections.abc import Sequence

import msgspec

from tucka_runtime.errors import ConfigError
from tucka_runtime.server.http.key_file import (
    ROLES,
    KeyRecord,
    change_key_file,
    digest_of,
    new_key,
    now,
    read_key_file,
)

VARIABLE = "TUCKA_API_KEY_FILE"
ONCE = "Prints the key, and nothing else, to stdout. The file has only its SHA-256: nobody can show it again."
AGAIN = "A server that runs reads the file again on SIGHUP."


def add_actions(parser: argparse.ArgumentParser) -> None:
    """Adds the actions of `tucka keys`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    adding = actions.add_parser("add", help="make a key and print it, once", description=ONCE)
    adding.add_argument("name", help="whose it is: what logs, metrics and the audit log call it")
    _add_file(adding)
    adding.add_argument("--role", action="append", choices=ROLES, help="what it may do; repeatable (default: infer)")
    adding.add_argument(
        "--adapters",
        action="append",
        metavar="GLOB",
        help="pattern of the models' names that it sees, the base's among them; repeatable (default: *, all)",
    )
    for flag, what in (
        ("--requests-per-minute", "requests a minute"),
        ("--tokens-per-minute", "tokens a minute, of prompts and answers"),
        ("--concurrent-requests", "requests at once"),
    ):
        adding.add_argument(flag, type=int, metavar="N", help=f"most {what} (default: any number)")
    adding.add_argument(
        "--tenant", metavar="NAME", help="keys of one tenant share cached prompts and turns (default: its own)"
    )
    adding.set_defaults(run=add)
    listing = actions.add_parser("list", help="show the keys' names, roles, adapters and limits")
    _add_file(listing)
    listing.set_defaults(run=show)
    revoking = actions.add_parser("revoke", help="remove a key; its running requests finish")
    revoking.add_argument("name", help="its name")
    _add_file(revoking)
    revoking.set_defaults(run=revoke)


def _add_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--file", metavar="FILE", default=None, help=f"the key file (default: {VARIABLE})")


def _file(flags: argparse.Namespace) -> str:
    path: str | None = flags.file or os.environ.get(VARIABLE)
    if not path:
        raise ConfigError(f"Which key file? Give --file FILE, or set {VARIABLE}.")
    return path


def add(flags: argparse.Namespace) -> int:
    """Raises ConfigError."""
    key_id, key = new_key()
    try:
        record = msgspec.convert(
            {
                "name": flags.name,
                "id": key_id,
                "sha256": digest_of(key.encode()),
                "roles": list(dict.fromkeys(flags.role or ["infer"])),
                "adapters": list(dict.fromkeys(flags.adapters or ["*"])),
                "requests_per_minute": flags.requests_per_minute,
                "tokens_per_minute": flags.tokens_per_minute,
                "concurrent_requests": flags.concurrent_requests,
                "tenant": flags.tenant,
                "created": now(),
            },
            KeyRecord,
        )
    except msgspec.ValidationError as error:
        raise ConfigError(f"The key cannot be made: {error}.") from None

    def change(keys: Sequence[KeyRecord]) -> tuple[KeyRecord, ...]:
        if any(other.name == record.name for other in keys):
            raise ConfigError(f"There is a key of the name {record.name}. Revoke it first, or choose another name.")
        return (*keys, record)

    path = _file(flags)
    change_key_file(path, change)
    if not _shown(key):
        change_key_file(path, lambda keys: tuple(other for other in keys if other.name != record.name))
        raise ConfigError("The key could not be shown, since stdout takes nothing, and was not kept. Give it another.")
    print(f"{record.name} is in {path}. The key is shown this once. {AGAIN}", file=sys.stderr)
    return 0


def _shown(key: str) -> bool:
    """Prints it. Whether somebody can have read it."""
    if sys.stdout is None:  # closed by who started this
        return False
    try:
        print(key, flush=True)
    except OSError:
        with open(os.devnull, "w") as nowhere:  # for what Python writes when it ends
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return False
    return True


def show(flags: argparse.Namespace) -> int:
    """Raises ConfigError."""
    keys = read_key_file(_file(flags))
    for key in keys:
        limits = [
            f"{limit} {what}"
            for limit, what in (
                (key.requests_per_minute, "requests/min"),
                (key.tokens_per_minute, "tokens/min"),
                (key.concurrent_requests, "at once"),
            )
            if limit is not None
        ]
        tenant = f"  tenant {key.tenant}" if key.tenant else ""
        print(
            f"{key.name}  tucka_{key.id}_…  {','.join(key.roles)}  {' '.join(key.adapters)}  "
            f"{', '.join(limits) or 'no limits'}{tenant}  {key.created}".rstrip()
        )
    if not keys:
        print("there are no keys")
    return 0


def revoke(flags: argparse.Namespace) -> int:
    """Raises ConfigError."""

    def change(keys: Sequence[KeyRecord]) -> tuple[KeyRecord, ...]:
        left = tuple(key for key in keys if key.name != flags.name)
        if len(left) == len(keys):
            raise ConfigError("There is no key of that name. `tucka keys list` shows those that there are.")
        return left

    path = _file(flags)
    read_key_file(path)  # one that is not there is not made
    change_key_file(path, change)
    print(f"{flags.name} is revoked. {AGAIN}")
    return 0
