"""Prometheus text of every model that requests can name: the base, and one row per adapter that has a slot, or had one.

A row keeps its text, and only rows that changed are written again: at a scrape, or before more than `MAX_STALE` are
due. Rows stand in blocks whose text is joined already: 15,000 short texts all over the memory are 2 ms of a scrape.
"""

import math
from collections.abc import Callable, Mapping

from tucka_runtime.messages import AdapterInfo, AdapterKey, FinishReason, Route
from tucka_runtime.names import split_combined
from tucka_runtime.server.metrics.exposition import Histogram, head, label

MAX_IDLE_ROWS = 1024  # rows of adapters that had a slot and have none
MAX_STALE = 32  # rows written again at one scrape at most, 20 us each with their block
BLOCK = 16  # rows
TTFT_SECONDS = (0.1, 0.2, 0.5, 1, 2, 5)
LATENCY_SECONDS = (0.5, 1, 2, 5, 10, 30)
WEIGHTS = (0.3, 0.4, 0.5, 0.6, 0.7)  # a route's weight is in [0.269, 0.731]: sigmoid of a cosine
RECENT = 1024  # selections after which one counts half in the load balance

_FAMILIES = (
    ("requests_total", "counter", "sequences finished, by finish reason"),
    ("errors_total", "counter", "requests that ended with an error"),
    ("overflows_total", "counter", "requests that ended because its content overflows in the forward pass"),
    ("prompt_tokens_total", "counter", "prompt tokens of admitted requests"),
    ("generation_tokens_total", "counter", "tokens generated"),
    ("time_to_first_token_seconds", "histogram", "request's first bytes to first token sent"),
    ("request_latency_seconds", "histogram", "request's first bytes to last token sent"),
    ("info", "gauge", "1; kind and first 12 digits of the digest"),
    ("generation", "gauge", "number of its load; all names share one count, so it skips"),
    ("loads_total", "counter", "times that it got a slot"),
    ("load_seconds", "gauge", "duration of the last load, by stage"),
    ("resident_bytes", "gauge", "bytes of its tensors in its slot, 0 without one"),
    ("group_selections_total", "counter", "forward passes routed to the expert group"),
    ("route_weight", "histogram", "weights of the chosen group's experts"),
    ("route_changes_total", "counter", "times that decoding went on in another group"),
    ("load_balance", "gauge", "normalised entropy of the last ~1,000 selections: 1 is even, 0 is one group only"),
)
_PREFIX = "tucka_adapter_"
_OLDEST = ("oldest_waiting_seconds", "gauge", "age of the oldest request without a first token")
FAMILIES = tuple(_PREFIX + name for name, _, _ in _FAMILIES)
_HEADS = tuple(head(_PREFIX + name, kind, help).encode() for name, kind, help in _FAMILIES)


class AdapterMetrics:
    """Rows by name. What is said of a name that has no row (its adapter was unloaded meanwhile) is not counted."""

    def __init__(self, base_name: str):
        self._rows: dict[str, _Row] = {}
        self._blocks: list[_Block] = []
        self._stale: set[str] = set()
        self._idle: dict[str, None] = {}  # the rows of adapters that have no slot, as they lost it
        self.base_name = base_name
        self._add(base_name)

    def __contains__(self, name: str) -> bool:
        return name in self._rows and name != self.base_name

    def arrived(self, info: AdapterInfo) -> None:
        """An adapter has a slot: its counters go on, those of the experts begin again where its content is new."""
        name = info.key.name
        self._trim()
        row = self._rows.get(name) or self._add(name)
        self._idle.pop(name, None)
        row.arrive(info)
        self._changed(name)

    def left(self, key: AdapterKey) -> None:
        """An adapter has lost its slot. Its row stays while it is one of the last MAX_IDLE_ROWS of that kind."""
        row = self._rows.get(key.name)
        if row is not None and row.generation == key.generation:
            row.leave()
            self._idle[key.name] = None
            self._changed(key.name)

    def unloaded(self, name: str) -> None:
        if name in self:
            block = self._rows.pop(name).block
            block.remove(name)
            if not block.rows:
                self._blocks.remove(block)
            self._stale.discard(name)
            self._idle.pop(name, None)

    def _trim(self) -> None:
        while len(self._idle) > MAX_IDLE_ROWS:
            self.unloaded(next(iter(self._idle)))

    def admitted(self, name: str, prompt_tokens: int) -> None:
        if (row := self._rows.get(name)) is not None:
            row.prompt_tokens += prompt_tokens
            self._changed(name)

    def first_token(self, name: str, seconds: float) -> None:
        if (row := self._rows.get(name)) is not None:
            row.ttft.observe(seconds)
            self._changed(name)

    def finished(self, name: str, reason: FinishReason, count: int, route_changes: int = 0) -> None:
        """`count` sequences ended for this reason."""
        if (row := self._rows.get(name)) is not None:
            row.requests[reason] = row.requests.get(reason, 0) + count
            row.route_changes += route_changes
            self._changed(name)

    def closed(self, name: str, seconds: float, generated: int, failed: bool) -> None:
        """A request ended after `seconds`, with so many tokens."""
        if (row := self._rows.get(name)) is not None:
            row.latency.observe(seconds)
            row.generated += generated
            row.errors += failed
            self._changed(name)

    def overflowed(self, name: str) -> None:
        """A request ended because the forward pass brought no finite logits."""
        if (row := self._rows.get(name)) is not None:
            row.overflows += 1
            self._changed(name)

    def overflows(self, name: str) -> int:
        """Requests that ended so."""
        return self._rows[name].overflows if name in self._rows else 0

    def routed(self, key: AdapterKey, route: Route) -> None:
        """One forward pass of one segment. A generation that was replaced meanwhile is not counted."""
        row = self._rows.get(key.name)
        if row is not None and row.generation == key.generation and row.experts is not None:
            row.experts.select(route)
            self._changed(key.name)

    def render(self, ages: Mapping[str, float] | None = None, sees: Callable[[str], bool] | None = None) -> list[bytes]:
        """The exposition text, in parts, of the names that `sees` is true of; None is all. `ages` are those of the
        oldest requests that wait: only who waits has that series."""
        self._write_stale()
        texts = [block.text for block in self._blocks]
        if sees is not None:
            seen = {name for name in self._rows if all(map(sees, split_combined(name)))}
            texts = [text for block in self._blocks for name, text in block.rows.items() if name in seen]
            ages = {name: age for name, age in (ages or {}).items() if name in seen}
        parts: list[bytes] = []
        columns = zip(*texts, strict=True) if texts else ((),) * len(_HEADS)
        for lines, column in zip(_HEADS, columns, strict=True):
            parts.append(lines)
            parts += column
        waiting = [
            _line(_OLDEST[0], self._rows[name].label, f"{age:.3f}")
            for name, age in (ages or {}).items()
            if name in self._rows
        ]
        return [*parts, "".join([head(_PREFIX + _OLDEST[0], *_OLDEST[1:]), *waiting]).encode()] if waiting else parts

    def _add(self, name: str) -> "_Row":
        block = next((block for block in self._blocks if len(block.rows) < BLOCK), None)
        if block is None:
            block = _Block()
            self._blocks.append(block)
        row = self._rows[name] = _Row(name, block)
        block.rows[name] = row.render()
        self._changed(name)
        return row

    def _changed(self, name: str) -> None:
        self._stale.add(name)
        if len(self._stale) > MAX_STALE:
            self._write_stale()

    def _write_stale(self) -> None:
        blocks = set()
        for name in self._stale:
            row = self._rows[name]
            row.block.rows[name] = row.render()
            blocks.add(row.block)
        for block in blocks:
            block.join()
        self._stale.clear()


class _Block:
    """The text of rows that stand together: of each, one text per family, and all of theirs joined."""

    def __init__(self) -> None:
        self.rows: dict[str, tuple[bytes, ...]] = {}
        self.text: tuple[bytes, ...] = ()

    def remove(self, name: str) -> None:
        del self.rows[name]
        self.join()

    def join(self) -> None:
        self.text = tuple(map(b"".join, zip(*self.rows.values(), strict=True)))


class _Row:
    """The figures of one name."""

    def __init__(self, name: str, block: _Block):
        self.block = block
        self.label = label("model", name)
        self.requests: dict[FinishReason, int] = {}
        self.errors = 0
        self.overflows = 0
        self.prompt_tokens = 0
        self.generated = 0
        self.route_changes = 0
        self.ttft = Histogram(_PREFIX + "time_to_first_token_seconds", TTFT_SECONDS, self.label)
        self.latency = Histogram(_PREFIX + "request_latency_seconds", LATENCY_SECONDS, self.label)
        self.experts: _Experts | None = None
        self.generation = 0
        self._loads = 0
        self._loaded: tuple[bytes, ...] = (b"",) * 5  # the text that only a load changes

    def arrive(self, info: AdapterInfo) -> None:
        label = self.label
        self._loads += 1
        if self.generation != info.key.generation:
            self.generation = info.key.generation
            routed = info.kind == "tucka" and info.scope != "pinned" and info.k
            self.experts = _Experts(label, info.k) if routed and info.k else None
        seconds = info.load_seconds
        texts = (
            f'{_PREFIX}info{{{label},kind="{info.kind}",digest="{info.digest[:12]}"}} 1\n',
            _line("generation", label, self.generation),
            _line("loads_total", label, self._loads),
            "".join(_line("load_seconds", f'{label},stage="{name}"', f"{s:.6f}") for name, s in seconds.items()),
            _line("resident_bytes", label, info.bytes),
        )
        self._loaded = tuple([text.encode() for text in texts])

    def leave(self) -> None:
        """It has no bytes in a slot any more."""
        self._loaded = (*self._loaded[:-1], _line("resident_bytes", self.label, 0).encode())

    def render(self) -> tuple[bytes, ...]:
        """One text per family."""
        label = self.label
        reasons = "".join(
            f'{_PREFIX}requests_total{{{label},finish_reason="{reason}"}} {count}\n'
            for reason, count in self.requests.items()
        )
        own = (
            reasons.encode(),
            _line("errors_total", label, self.errors).encode(),
            _line("overflows_total", label, self.overflows).encode(),
            _line("prompt_tokens_total", label, self.prompt_tokens).encode(),
            _line("generation_tokens_total", label, self.generated).encode(),
            _observed(self.ttft),
            _observed(self.latency),
        )
        if self.experts is None:
            return (*own, *self._loaded, b"", b"", b"", b"")
        groups, weights, balance = self.experts.render()
        changes = _line("route_changes_total", label, self.route_changes).encode()
        return (*own, *self._loaded, groups, weights, changes, balance)


class _Experts:
    """How a routed adapter uses its `k` groups."""

    def __init__(self, label: str, k: int):
        self._counts = [0] * k
        self._recent = [0.0] * k
        self._gain = 1.0  # what a selection weighs now: it grows instead of the others decaying
        self._weights = Histogram(_PREFIX + "route_weight", WEIGHTS, label)
        self._label = label
        line = _PREFIX + 'group_selections_total{%s,group="%d"} %%d\n'
        self._template = "".join(line % (label.replace("%", "%%"), group) for group in range(k))

    def select(self, route: Route) -> None:
        self._counts[route.group] += 1
        self._gain *= 2 ** (1 / RECENT)
        self._recent[route.group] += self._gain
        for weight in route.weights:
            self._weights.observe(weight)
        if self._gain > 1e100:
            self._recent = [value / self._gain for value in self._recent]
            self._gain = 1.0

    def balance(self) -> float:
        total = sum(self._recent)
        if not total or len(self._recent) == 1:
            return 1.0
        shares = [value / total for value in self._recent if value]
        return abs(sum(share * math.log(share) for share in shares)) / math.log(len(self._recent))

    def render(self) -> tuple[bytes, bytes, bytes]:
        """Selections, weights, and the balance once something was selected."""
        balance = _line("load_balance", self._label, f"{self.balance():.4f}") if any(self._counts) else ""
        return (self._template % tuple(self._counts)).encode(), _observed(self._weights), balance.encode()


def _observed(histogram: Histogram) -> bytes:
    """Nothing before the first observation."""
    return histogram.render().encode() if histogram else b""


def _line(name: str, label: str, value: int | str) -> str:
    return f"{_PREFIX}{name}{{{label}}} {value}\n"
