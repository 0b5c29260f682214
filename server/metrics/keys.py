"""What each key of the key file did, by its name: nobody else's, so that the file bounds the series."""

from collections.abc import Sequence

from tucka_runtime.server.metrics.exposition import head, label

REASONS = ("requests", "tokens", "concurrent", "role")

_FAMILIES = (
    ("tucka_key_requests_total", "requests that were sent to the engine with the key"),
    ("tucka_key_prompt_tokens_total", "prompt tokens of those that have ended"),
    ("tucka_key_generation_tokens_total", "tokens generated for them"),
    ("tucka_key_refusals_total", "requests refused by a limit of the key, or for want of a role"),
)


class _Row:
    __slots__ = ("generated", "prompt", "refusals", "requests")

    def __init__(self) -> None:
        self.requests = self.prompt = self.generated = 0
        self.refusals = dict.fromkeys(REASONS, 0)


class KeyMetrics:
    """Rows by name. What is said of a name that has none (its key was revoked meanwhile) is not counted."""

    def __init__(self) -> None:
        self._rows: dict[str, _Row] = {}

    def names(self, names: Sequence[str]) -> None:
        """These keys there are: new ones begin at 0, those that are gone are forgotten."""
        self._rows = {name: self._rows.get(name) or _Row() for name in names}

    def refused(self, name: str, reason: str) -> None:
        """One of REASONS."""
        if (row := self._rows.get(name)) is not None:
            row.refusals[reason] += 1

    def admitted(self, name: str | None) -> None:
        """A request was sent to the engine."""
        if name is not None and (row := self._rows.get(name)) is not None:
            row.requests += 1

    def used(self, name: str | None, prompt: int, generated: int) -> None:
        """A request ended: what it took of the key's tokens."""
        if name is not None and (row := self._rows.get(name)) is not None:
            row.prompt += prompt
            row.generated += generated

    def render(self, only: str | None = None) -> bytes:
        """The exposition text; nothing without keys. `only`: of this one alone."""
        rows = {name: row for name, row in self._rows.items() if only is None or name == only}
        if not rows:
            return b""
        lines: list[list[str]] = [[head(name, "counter", help)] for name, help in _FAMILIES]
        for name, row in rows.items():
            key = label("key", name)
            for family, value in zip(range(3), (row.requests, row.prompt, row.generated), strict=True):
                lines[family].append(f"{_FAMILIES[family][0]}{{{key}}} {value}\n")
            for reason, count in row.refusals.items():
                lines[3].append(f'{_FAMILIES[3][0]}{{{key},reason="{reason}"}} {count}\n')
        return "".join(["".join(family) for family in lines]).encode()
