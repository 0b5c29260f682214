"""What adapters, versions and aliases may be called. Standard library only."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tucka_runtime.errors import InvalidRequestError

VERSION_DIGITS = 12
"""How many of a digest's digits name a version at least: those in its canonical name, `law@0123456789ab`."""

DESCRIBED_NAME = r"^(?!\.{1,2}(/|$))(?!/)(?!.*/(\.{0,2})(/|$))[A-Za-z0-9._:/@-]{1,128}$"
"""The names that `check_name` lets pass, as one pattern for those who read a JSON schema."""

MAX_TARGETS = 16
MAX_WEIGHT = 1_000_000

_VERSION = re.compile(rf"(.+)@([0-9a-f]{{{VERSION_DIGITS},64}})")


@dataclass(frozen=True)
class Alias:
    """A name for one of several adapters, chosen by their weights. Targets are names, of adapters or versions."""

    name: str
    targets: tuple[tuple[str, int], ...]

    def row(self) -> dict[str, Any]:
        """As the registry keeps it."""
        return {"name": self.name, "targets": dict(self.targets)}


def check_name(name: str) -> None:
    """Raise InvalidRequestError unless `name` can name an adapter: it goes into logs, headers and URLs as it is."""
    if not re.fullmatch(r"[A-Za-z0-9._:/@-]{1,128}", name) or {"", ".", ".."} & set(name.split("/")):
        raise InvalidRequestError(
            "an adapter's name must be 1 to 128 letters, digits or characters of `. _ : / @ -`, without empty, `.` or "
            "`..` parts between slashes. Choose another name.",
            "name",
        )


def loggable(name: str) -> str:
    """The name, or "?" where it is none: a client's own text stays out of logs."""
    try:
        check_name(name)
    except InvalidRequestError:
        return "?"
    return name


def version_name(name: str, digest: str) -> str:
    """What a version of the name is called."""
    return f"{name}@{digest[:VERSION_DIGITS]}"


def combined_name(names: Iterable[str]) -> str:
    """What a combination of adapters is called in metrics: no adapter's name has a plus."""
    return "+".join(names)


def split_combined(name: str) -> list[str]:
    """The names of a combination's adapters; of an adapter its own."""
    return name.split("+")


def split_version(name: str) -> tuple[str, str] | None:
    """The name and the digits of the digest, of what names a version; None of what does not."""
    match = _VERSION.fullmatch(name)
    return (match[1], match[2]) if match else None
