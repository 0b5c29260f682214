"""`tucka top`: a live picture of a server's /metrics in a terminal, for people without Grafana."""

import re
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from tucka_runtime.client import Client
from tucka_runtime.errors import TuckaError

BARS = " ▁▂▃▄▅▆▇█"
BOLD, DIM, RED, GREEN, YELLOW, OFF = "\x1b[1m", "\x1b[2m", "\x1b[31m", "\x1b[32m", "\x1b[33m", "\x1b[0m"
HOME, REST_OF_LINE, REST_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"
_COLOUR = re.compile(r"\x1b\[\d+m")
COLLAPSED = 0.5  # a load balance below this is shown in red
STAGES = ("schedule", "batch", "route", "forward", "sample", "output")

Labels = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Scrape:
    """All samples at one moment. `at` is `time.monotonic()`."""

    at: float
    samples: Mapping[tuple[str, Labels], float]
    models: list[str] = field(default_factory=list)
    groups: Mapping[str, list[float]] = field(default_factory=dict)

    @staticmethod
    def of(text: str, at: float) -> "Scrape":
        """Reads the exposition text; what is not ours is left out. Raises TuckaError where it is none."""
        samples: dict[tuple[str, Labels], float] = {}
        models: dict[str, None] = {}
        groups: dict[str, list[float]] = {}
        try:
            families = list(text_string_to_metric_families(text))
        except ValueError:
            raise TuckaError("The answer at /metrics is none of Prometheus. Is the address a server's?") from None
        for family in families:
            if not family.name.startswith("tucka_"):
                continue
            for sample in family.samples:
                samples[sample.name, frozenset(sample.labels.items())] = sample.value
                if (model := sample.labels.get("model")) is not None:
                    models[model] = None
                if sample.name == "tucka_adapter_group_selections_total":
                    groups.setdefault(sample.labels["model"], []).append(sample.value)
        return Scrape(at, samples, list(models), groups)

    def get(self, name: str, **labels: str) -> float:
        """0 where there is no such series."""
        return self.samples.get((f"tucka_{name}", frozenset(labels.items())), 0.0)


class Change:
    """What happened between two scrapes. A counter that went down began again at 0."""

    def __init__(self, before: Scrape, now: Scrape):
        self._before, self.now = before, now
        self.seconds = max(now.at - before.at, 1e-9)

    def count(self, name: str, **labels: str) -> float:
        new, old = self.now.get(name, **labels), self._before.get(name, **labels)
        return new - old if new >= old else new

    def rate(self, name: str, **labels: str) -> float:
        return self.count(name, **labels) / self.seconds

    def mean(self, name: str, **labels: str) -> float | None:
        """The mean of a histogram's observations; None if there were none."""
        observed = self.count(f"{name}_count", **labels)
        return self.count(f"{name}_sum", **labels) / observed if observed else None


def top(client: Client, interval: float, once: bool) -> int:
    """Redraws every `interval` seconds until Ctrl-C, also while a server restarts; with `once` prints one picture, of
    that long, without colours. Raises TuckaError where nobody answers at first."""
    colours = sys.stdout.isatty() and not once
    before = Scrape.of(client.get("/metrics").decode(), time.monotonic())
    while True:
        time.sleep(interval)
        columns, rows = shutil.get_terminal_size()
        try:
            now = Scrape.of(client.get("/metrics").decode(), time.monotonic())
        except TuckaError as error:
            if once:
                raise
            lines = [error.message]
        else:
            lines = draw(Change(before, now), columns, None if once else rows - 1)
            before = now
        if colours:
            lines = [clip(line, columns) + REST_OF_LINE for line in lines]
            sys.stdout.write(HOME + "\n".join(lines) + "\n" + REST_OF_SCREEN)
        else:
            sys.stdout.write(_COLOUR.sub("", "\n".join(lines)) + "\n")
        sys.stdout.flush()
        if once:
            return 0


def draw(change: Change, width: int, height: int | None) -> list[str]:
    """The picture, at most `height` lines; busiest adapters first."""
    now = change.now
    lines = [*_server(change, width), "", _header()]
    names = sorted(now.models, key=lambda name: -change.rate("adapter_generation_tokens_total", model=name))
    room = len(names) if height is None else max(height - len(lines) - 1, 1)
    lines += [_adapter(change, name) for name in names[:room]]
    if len(names) > room:
        lines.append(f"{DIM}... and {len(names) - room} more{OFF}")
    return lines


def clip(line: str, width: int) -> str:
    """The line's first `width` visible characters; colours take no room."""
    shown, left = [], width
    for colour, text in re.findall(r"(\x1b\[\d+m)|([^\x1b]+)", line):
        shown.append(colour or text[:left])
        left -= len(text[:left])
    return "".join(shown) + OFF


def _server(change: Change, width: int) -> list[str]:
    now = change.now
    up = f"{GREEN}up{OFF}" if now.get("engine_up") else f"{RED}down{OFF}"
    used, total = now.get("kv_blocks_used"), now.get("kv_blocks")
    share = used / total if total else 0.0
    prompt, cached = change.count("prompt_tokens_total"), change.count("cached_prompt_tokens_total")
    failed = change.rate("requests_total", finish_reason="error")
    steps = change.count("steps_total")
    busy = {stage: change.count("step_seconds_total", stage=stage) for stage in STAGES}
    spent = sum(busy.values())
    split = "  ".join(f"{stage} {100 * seconds / spent:.0f}%" for stage, seconds in busy.items()) if spent else "idle"
    finished = sum(change.rate("requests_total", finish_reason=reason) for reason in ("stop", "length"))
    return [
        f"{BOLD}engine{OFF} {up}, restarts {now.get('engine_restarts_total'):.0f}   "
        f"{BOLD}running{OFF} {now.get('requests_running'):.0f}   "
        f"{BOLD}waiting{OFF} {now.get('requests_waiting'):.0f}   "
        f"{BOLD}adapters{OFF} {now.get('adapters_loaded'):.0f}, "
        f"{BOLD}slots{OFF} {now.get('adapters', tier='resident'):.0f}/{now.get('adapter_slots'):.0f}",
        f"{BOLD}tokens/s{OFF} {change.rate('generation_tokens_total'):.1f} out, {prompt / change.seconds:.1f} in   "
        f"{BOLD}requests/s{OFF} {finished:.1f}   {BOLD}errors/s{OFF} {RED if failed else ''}{failed:.1f}{OFF}",
        f"{BOLD}TTFT{OFF} {_ms(change.mean('time_to_first_token_seconds'))}   "
        f"{BOLD}per token{OFF} {_ms(change.mean('inter_token_seconds'))}   "
        f"{BOLD}queue{OFF} {_ms(change.mean('request_queue_seconds'))}   "
        f"{BOLD}whole{OFF} {_ms(change.mean('request_latency_seconds'))}",
        f"{BOLD}KV{OFF} {_meter(share, min(max(width - 60, 10), 40))} {100 * share:.0f}%   "
        f"{BOLD}prefix hits{OFF} {100 * cached / prompt if prompt else 0:.0f}%   "
        f"{BOLD}preempted{OFF} {change.count('preemptions_total'):.0f}",
        f"{BOLD}step{OFF} {_ms(spent / steps if steps else None)}   {DIM}{split}{OFF}",
    ]


def _header() -> str:
    names = f"{'model':24} {'req/s':>6} {'tok/s':>8} {'TTFT':>9} {'whole':>9} {'errors':>6} {'balance':>7}  experts"
    return f"{BOLD}{names}{OFF}"


def _adapter(change: Change, name: str) -> str:
    now = change.now
    reasons = ("stop", "length", "abort", "error")
    requests = sum(change.rate("adapter_requests_total", model=name, finish_reason=reason) for reason in reasons)
    tokens = change.rate("adapter_generation_tokens_total", model=name)
    errors = now.get("adapter_errors_total", model=name)
    experts, balance = "", ""
    if name in now.groups:
        experts = _groups(now.groups[name])
        if sum(now.groups[name]) and len(now.groups[name]) > 1:
            value = now.get("adapter_load_balance", model=name)
            balance = f"{RED if value < COLLAPSED else GREEN}{value:7.2f}{OFF}"
    return (
        f"{name if len(name) <= 24 else name[:23] + '…':24} {requests:6.1f} {tokens:8.1f} "
        f"{_ms(change.mean('adapter_time_to_first_token_seconds', model=name)):>9} "
        f"{_ms(change.mean('adapter_request_latency_seconds', model=name)):>9} "
        f"{RED if errors else ''}{errors:6.0f}{OFF} {balance or ' ' * 7}  {experts}"
    )


def _groups(counts: list[float]) -> str:
    """A bar per expert group, the most used one full, and the share of that one."""
    total, most = sum(counts), max(counts)
    if not total:
        return f"{DIM}{'·' * len(counts)}{OFF}"
    bars = "".join(BARS[max(round((len(BARS) - 1) * count / most), count > 0)] for count in counts)
    return f"{YELLOW}{bars}{OFF} {DIM}top {100 * most / total:.0f}%{OFF}"


def _meter(share: float, width: int) -> str:
    full = round(share * width)
    return f"{RED if share > 0.9 else GREEN}{'█' * full}{OFF}{DIM}{'░' * (width - full)}{OFF}"


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"
