"""What is known of one request: raw times and what came back. Every figure is computed from these."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class StreamedToken:
    """What was chosen, what would have been next, and by how many nats the first was better."""

    text: str
    second: str | None
    margin: float


@dataclass(slots=True)
class Record:
    """Times are seconds since the run began. `events` are the SSE events that had `choices`: (arrival, characters of
    text and of reasoning), in order. `cause` is None for a request that was answered whole.

    `kind`: load (counted in the figures), canary, cold (the first request after an adapter was loaded), warmup,
    reference (a canary's answer before the load), probe (to an unloaded adapter; it must fail).
    """

    kind: str
    model: str
    index: int = 0
    turn: int = 0
    planned: float | None = None
    start: float = 0.0
    end: float = 0.0
    events: list[tuple[float, int]] = field(default_factory=list)
    status: int | None = None
    cause: str | None = None
    detail: str = ""
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    finish_reason: str | None = None
    text: str = ""
    expected: str | None = None
    correct: bool | None = None
    generation: int = 0
    tokens: list[StreamedToken] | None = None  # where log-probabilities were asked for

    @property
    def ok(self) -> bool:
        return self.cause is None

    def to_json(self) -> dict[str, Any]:
        """Fields that are set but for `tokens`; `events` in microseconds since `start`, which keeps the file small."""
        values = {name: getattr(self, name) for name in self.__slots__ if name != "tokens"}
        values["events"] = [[round((t - self.start) * 1e6), chars] for t, chars in self.events]
        values |= {name: round(values[name], 6) for name in ("start", "end", "planned") if values[name] is not None}
        return {k: v for k, v in values.items() if v is not None and v != ""}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Record":
        start = values["start"]
        events = [(start + us / 1e6, chars) for us, chars in values.get("events", [])]
        return cls(**(values | {"events": events}))
