"""Every setting of a load test, stated once: name, default, help. Command line and JSON result read these fields."""

import argparse
import json
import math
import re
from dataclasses import dataclass, field, fields
from typing import Any

from tucka_runtime.client import server_address
from tucka_runtime.errors import ConfigError
from tucka_runtime.loadtest import arrivals, lengths, popularity, slo

ENDPOINTS = ("completions", "chat")
SCORES = ("exact", "prefix", "contains")
SECRET = ("api_key", "admin_key")
KINDS: dict[Any, Any] = {int: int, float: float, int | None: int, float | None: float}


def _setting(default: Any, group: str, help: str, **extra: Any) -> Any:
    return field(default=default, metadata={"group": group, "help": help, **extra})


@dataclass(frozen=True)
class Settings:
    """What to send, how fast, to whom, and what to check."""

    url: str = _setting("http://127.0.0.1:8000", "server", "server under test; a /v1 at the end is understood")
    endpoint: str = _setting("completions", "server", "/v1/completions or /v1/chat/completions", choices=ENDPOINTS)
    api_key: str | None = _setting(
        None, "server", "bearer key (default: $TUCKA_CLIENT_KEY or $OPENAI_API_KEY)", metavar="KEY"
    )
    admin_key: str | None = _setting(None, "server", "key for loading adapters (default: same)", metavar="KEY")
    timeout: float = _setting(120.0, "server", "seconds after which a request counts as failed", metavar="S")
    extra_body: str | None = _setting(
        None, "server", 'JSON merged into every request, as {"route": "request"}', metavar="JSON"
    )

    rate: str = _setting(
        "closed",
        "arrivals",
        "open loop: conversations per second as R, ramp:FROM:TO (linear), exp:FROM:TO, steps:R1,R2,... or inf (all "
        "at once); 'closed' starts the next one when an answer is in",
    )
    concurrency: int | None = _setting(
        None, "arrivals", "closed loop: conversations in flight (default 4); open loop: a cap (default: none)"
    )
    burstiness: float = _setting(
        1.0, "arrivals", "shape of the Gamma-distributed gaps: 1 is Poisson, 0.25 bursty, 'inf' a metronome"
    )
    trace: str | None = _setting(None, "arrivals", "JSONL to replay; lines have 'at' (seconds)", metavar="FILE")
    trace_speed: float = _setting(1.0, "arrivals", "replay the trace this many times as fast")
    duration: float | None = _setting(
        None, "arrivals", "seconds during which conversations start (default: 30, or until --requests or --trace end)",
        metavar="S",
    )  # fmt: skip
    requests: int | None = _setting(None, "arrivals", "stop after this many conversations")
    seed: int = _setting(0, "arrivals", "seed of everything drawn; the same seed sends the same bytes")

    models: str | None = _setting(
        None, "adapters", "names to use, comma-separated (default: every adapter that /v1/models lists)"
    )
    popularity: str = _setting(
        "zipf:1", "adapters", "uniform, zipf:ALPHA (first name is the most popular), or weighted:NAME=W,NAME=W"
    )
    base: str | None = _setting(None, "adapters", "name of the base model (default: the card without a parent)")
    base_share: float = _setting(0.0, "adapters", "share of conversations that go to the base model")

    prompt_tokens: str = _setting(
        "64",
        "requests",
        "tokens of a prompt: N, uniform:LOW:HIGH, normal:MEAN:STD or lognormal:MEDIAN:SIGMA",
        metavar="DIST",
    )
    max_tokens: str = _setting("32", "requests", "longest answer in tokens, likewise", metavar="DIST")
    ignore_eos: bool = _setting(False, "requests", "ask for answers of exactly max_tokens (vLLM and TuckA know it)")
    temperature: float = _setting(0.0, "requests", "sampling temperature")
    prefixes: int = _setting(0, "requests", "prompts begin with one of this many shared prefixes (0: none)")
    prefix_tokens: str = _setting("256", "requests", "tokens in a shared prefix", metavar="DIST")
    turns: str = _setting("1", "requests", "turns in a conversation; a turn carries all before it", metavar="DIST")
    think: float = _setting(0.0, "requests", "mean seconds between an answer and the next turn", metavar="S")
    dataset: str | None = _setting(
        None,
        "requests",
        "JSONL to draw prompts from: prompt (text or ids) or messages, and model, max_tokens, expected if you like",
        metavar="FILE",
    )
    score: str = _setting("exact", "requests", "how an answer is held against 'expected'", choices=SCORES)

    churn_rate: float = _setting(0.0, "churn", "adapters loaded, reloaded or unloaded per second during the run")
    churn_adapter: tuple[str, ...] = _setting(
        (),
        "churn",
        "adapter to churn; several paths take turns at each load; repeatable (default: all that are used, if "
        "/v1/models tells their paths: vLLM's does, TuckA's does not)",
        metavar="NAME=PATH[,PATH]",
    )  # fmt: skip
    churn_drain: bool = _setting(
        False, "churn", "unload an adapter only when its own requests are answered, as a careful router does"
    )
    churn_inplace: bool = _setting(
        False, "churn", "reload without unloading first (load_inplace of vLLM and TuckA): requests go on meanwhile"
    )

    goodput: tuple[str, ...] = _setting(
        (), "checks", "SLO in ms, as ttft:500 tpot:50 e2el:5000 itl:200 (itl: the worst gap)", metavar="NAME:MS"
    )
    canary_rate: float = _setting(1.0, "checks", "canaries per second beside the load (0: none)")
    canary_prompt: tuple[str, ...] = _setting(
        (), "checks", "prompt of the canaries; repeatable (default: two drawn from the seed)", metavar="TEXT"
    )
    canary_tokens: int = _setting(16, "checks", "tokens in a canary's answer")
    canary_models: int = _setting(16, "checks", "most models that get canaries (each costs some requests beforehand)")

    repeats: int = _setting(1, "statistics", "run all of it this often; gives 95% confidence intervals")
    versus_base: bool = _setting(
        False, "statistics", "run each repeat twice, on the adapters and on the base, in alternating order: their ratio"
    )
    warmup: int = _setting(4, "statistics", "requests sent before the clock starts")
    percentiles: str = _setting("50,90,99", "statistics", "percentiles to report")
    count_empty: bool = _setting(
        False, "statistics", "events without text count for TTFT and ITL, exactly as in `vllm bench serve`"
    )

    json: str | None = _setting(None, "output", "write the result with all raw timestamps here", metavar="FILE")
    html: str | None = _setting(None, "output", "write the report, one self-contained page, here", metavar="FILE")
    no_raw: bool = _setting(False, "output", "leave the single requests and timestamps out of the JSON")
    label: str | None = _setting(None, "output", "name of this result in reports and comparisons")
    quiet: bool = _setting(False, "output", "no progress on stderr")

    def __post_init__(self) -> None:
        if not server_address(self.url).startswith(("http://", "https://")):
            raise ConfigError("--url must be an address of HTTP, as http://127.0.0.1:8000")
        for name in ("timeout", "trace_speed", "duration", "burstiness"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{flag(name)} must be positive")
        for name in ("temperature", "think", "churn_rate", "canary_rate", "prefixes", "warmup"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ConfigError(f"{flag(name)} must be at least 0")
        for name in ("concurrency", "requests", "repeats", "canary_tokens", "canary_models"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{flag(name)} must be at least 1")
        if not 0 <= self.base_share <= 1:
            raise ConfigError("--base-share must be between 0 and 1")
        if self.rate == "inf" and self.requests is None:
            raise ConfigError("--rate inf sends everything at once: say how much with --requests")
        if self.versus_base and (self.churn_rate or self.base_share):
            raise ConfigError("--versus-base compares equal loads: leave out --churn-rate and --base-share")
        for name in ("prompt_tokens", "max_tokens", "prefix_tokens", "turns"):
            lengths.parse(getattr(self, name), flag(name))
        popularity.check(self.popularity)
        slo.parse(self.goodput)
        _ = self.percentile_list, self.extra  # raise if they are wrong
        if self.open_loop and not self.trace and self.rate != "inf":
            arrivals.RateCurve.parse(self.rate, self.span)

    @property
    def span(self) -> float:
        """Seconds during which conversations start; infinite where their number bounds the run."""
        if self.duration is not None:
            return self.duration
        counted = self.trace is not None or (self.requests is not None and ":" not in self.rate)
        return math.inf if counted else 30.0

    @property
    def open_loop(self) -> bool:
        return self.trace is not None or self.rate != "closed"

    @property
    def extra(self) -> dict[str, Any]:
        """`extra_body` as an object."""
        try:
            value = json.loads(self.extra_body or "{}")
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise ConfigError('--extra-body must be a JSON object, as {"route": "request"}')
        return value

    @property
    def percentile_list(self) -> list[float]:
        try:
            values = [float(p) for p in self.percentiles.split(",")]
        except ValueError:
            values = [-1.0]
        if not all(0 < p < 100 for p in values):
            raise ConfigError("--percentiles must be numbers between 0 and 100, as 50,90,99")
        return values


def without_password(url: str) -> str:
    """The url without user and password: what results show."""
    return re.sub(r"^([^/?#]*//)?[^/?#]*@", r"\1", url)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser, *, defaults: bool = True, only: str | None = None) -> None:
    """One flag per field, `only` of one group. Without `defaults` only those given appear in the parsed namespace."""
    wanted = [f for f in fields(Settings) if only in (None, f.metadata["group"])]
    groups = {name: parser.add_argument_group(name) for name in {f.metadata["group"]: 0 for f in wanted}}
    for f in wanted:
        shown = f.metadata["help"].replace("%", "%%")
        if f.default not in (None, False, ()) and "(default" not in shown:
            shown += f" (default {f.default})"
        options: dict[str, Any] = {"help": shown, "default": None if defaults else argparse.SUPPRESS}
        if f.type is bool:
            options["action"] = "store_true"
        elif f.type == tuple[str, ...]:
            options |= {"nargs": "+", "action": "extend"}
        else:
            options["type"] = KINDS.get(f.type, str)
        for extra in ("choices", "metavar"):
            if extra in f.metadata:
                options[extra] = f.metadata[extra]
        if options.get("type") is str and "metavar" not in options and "choices" not in options:
            options["metavar"] = f.name.upper()
        groups[f.metadata["group"]].add_argument(flag(f.name), **options)


def from_args(args: argparse.Namespace) -> Settings:
    """Flags that were not given keep the field's default."""
    given = {f.name: getattr(args, f.name) for f in fields(Settings) if getattr(args, f.name, None) is not None}
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    return Settings(**values)
