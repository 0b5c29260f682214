"""The result as one JSON object: figures at the top under the names of `vllm bench serve`, then what is ours."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tucka_runtime.errors import ConfigError
from tucka_runtime.loadtest import canary, saturation, slo
from tucka_runtime.loadtest.record import Record
from tucka_runtime.loadtest.report import metrics, stats
from tucka_runtime.loadtest.runner import CLOSED_LOOP_CONCURRENCY, RunResult
from tucka_runtime.loadtest.session import SessionResult
from tucka_runtime.loadtest.settings import SECRET, Settings, without_password

FORMAT = "tucka-loadtest/1"
# Summed over repeats; all other figures are means over repeats.
SUMS = ("duration", "completed", "failed", "total_input_tokens", "total_output_tokens")
# Figures whose ratio adapter ÷ base is reported: with equal loads, what an adapter costs.
RATIOS = ("output_throughput", "mean_ttft_ms", "median_ttft_ms", "mean_tpot_ms", "median_tpot_ms", "median_e2el_ms")


def figures(run: RunResult, settings: Settings) -> metrics.Figures:
    limits = slo.parse(settings.goodput)
    return metrics.Figures(run.load, run.duration, limits, settings.percentile_list, settings.count_empty)


def run_json(run: RunResult, settings: Settings) -> dict[str, Any]:
    """One run: its figures, what to draw, and the raw requests."""
    f = figures(run, settings)
    summary = f.summary()
    starts = sorted(r.planned for r in run.load if r.planned is not None)
    lags = [r.start - r.planned for r in run.load if r.planned is not None]
    gap = (starts[-1] - starts[0]) / (len(starts) - 1) if len(starts) > 1 else None
    capped = settings.open_loop and settings.concurrency is not None
    result = {
        **summary,
        "failures": metrics.failures(run.load),
        "client": saturation.verdict(
            run.loop_lags, run.core_waits, run.cpu_share, lags, gap, f.samples["ttft"], capped
        ),
        "cdf_ms": {k: [round(v * 1000, 4) for v in stats.quantile_curve(s)] for k, s in f.samples.items()},
        "series": metrics.series(run.load, run.duration),
        "churn_events": run.churn_events,
        "redirected": run.redirected,
        "interrupted": run.interrupted,
        "seed": run.seed,
    }
    if not settings.no_raw:
        result["requests"] = [r.to_json() for r in run.records]
    return result


def confidence(runs: Sequence[metrics.Figures], summaries: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """95% intervals by figure: from repeats where there are several, else of percentiles from order statistics."""
    result: dict[str, dict[str, Any]] = {}
    for name in summaries[0].keys() - set(SUMS):
        values = [s[name] for s in summaries]
        if len(values) > 1 and all(isinstance(v, int | float) for v in values):
            _, low, high = stats.mean_interval(values)
            result[name] = {"low": max(low, 0.0), "high": high, "from": "repeats"}  # no figure can be negative
    if len(runs) == 1:
        for latency, samples in runs[0].samples.items():
            for key, p in [("median", 50.0), *((f"p{p:g}", p) for p in runs[0].percentiles)]:
                if len(samples) > 1:
                    low, high = stats.percentile_interval(samples, p)
                    name = f"{key}_{latency}_ms"
                    result[name] = {"low": low * 1000, "high": high * 1000, "from": "order statistics"}
    return result


def ratios(runs: Iterable[dict[str, Any]], base_runs: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """adapter ÷ base of the paired runs, geometric mean."""
    pairs = list(zip(runs, base_runs, strict=False))
    result = {}
    for name in RATIOS:
        values = [a[name] / b[name] for a, b in pairs if a[name] and b[name]]
        if values:
            mean, low, high = stats.ratio_interval(values)
            result[name] = {"ratio": mean, "low": _number(low), "high": _number(high), "pairs": len(values)}
    return result


def settings_json(settings: Settings) -> dict[str, Any]:
    """What was asked for, without keys, the url's password too, and without where the results went."""
    left_out = (*SECRET, "json", "html", "quiet")
    values = {k: v for k, v in asdict(settings).items() if k not in left_out and v is not None}
    values["url"] = without_password(settings.url)
    return {k: _json(v) for k, v in values.items()}


def _json(value: Any) -> Any:
    """The value as it will be read back: without tuples and infinity."""
    if isinstance(value, tuple):
        return list(value)
    return "inf" if value == math.inf else value


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def totals(records: Iterable[Record]) -> dict[str, int]:
    """All traffic that the server saw, canaries and warm-up included: what its own counters should agree with."""
    records = list(records)
    return {
        "requests": len(records),
        "answered": sum(r.ok for r in records),
        "input_tokens": sum(r.prompt_tokens or 0 for r in records),
        "output_tokens": sum(r.output_tokens or 0 for r in records),
    }


def build(session: SessionResult) -> dict[str, Any]:
    """The whole result. Top figures are means (counts: sums) over repeats; per-adapter ones pool all repeats."""
    settings = session.settings
    runs = [run_json(run, settings) for run in session.runs]
    base_runs = [run_json(run, settings) for run in session.base_runs]
    each = [figures(run, settings) for run in session.runs]
    summaries = [f.summary() for f in each]
    records = [r for run in session.runs for r in run.records]
    everything = session.prepared + records + [r for run in session.base_runs for r in run.records]
    load = [r for r in records if r.kind == "load"]
    pooled = metrics.Figures(
        load, sum(r.duration for r in session.runs), slo.parse(settings.goodput), settings.percentile_list,
        settings.count_empty,
    )  # fmt: skip
    per_adapter = pooled.per_adapter()
    top = {name: (sum if name in SUMS else _mean)([s[name] for s in summaries]) for name in summaries[0]}
    scored = [r.correct for r in load if r.correct is not None]
    probes = [r for r in records if r.kind == "probe"]
    constant = settings.open_loop and not settings.trace and ":" not in settings.rate and settings.rate != "inf"
    canaries = session.canaries.result() if session.canaries else None
    answered_away = [r.model for r in probes if r.status == 200]
    return {
        "format": FORMAT,
        "date": datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
        "label": settings.label,
        "backend": "openai-chat" if settings.endpoint == "chat" else "openai",
        "endpoint_type": "openai-chat" if settings.endpoint == "chat" else "openai",
        "model_id": session.base or session.models[0],
        "models": session.models,
        "num_prompts": len(load),
        "request_rate": float(settings.rate) if constant else settings.rate,
        "burstiness": _json(settings.burstiness),
        "max_concurrency": settings.concurrency or (None if settings.open_loop else CLOSED_LOOP_CONCURRENCY),
        **top,
        "repeats": len(runs),
        "confidence": confidence(each, summaries),
        "goodput_slo_ms": slo.parse(settings.goodput),
        "per_adapter": per_adapter,
        "fairness": metrics.fairness(per_adapter),
        "cold": metrics.cold_and_warm(records, settings.percentile_list, settings.count_empty),
        "score": sum(scored) / len(scored) if scored else None,
        "failures": metrics.failures(load),
        "failure_details": metrics.first_details(load),
        "client_limited": any(run["client"]["client_limited"] for run in runs + base_runs),
        "canaries": canaries,
        "unloaded_but_answered": answered_away,
        "correct": not answered_away and (canaries is None or canary.passed([canaries])),
        "ratio_to_base": ratios(runs, base_runs),
        "all_traffic": totals(everything),
        "settings": settings_json(settings),
        "runs": runs,
        "base_runs": base_runs,
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def write(result: dict[str, Any], path: str) -> None:
    try:
        Path(path).write_text(json.dumps(result, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None


def is_sweep(result: dict[str, Any]) -> bool:
    return str(result.get("format", "")).startswith("tucka-loadtest-sweep")


def read(path: str, sweeps: bool = False) -> dict[str, Any]:
    """A result of ours, of a sweep too where those are taken, or the JSON that `vllm bench serve --save-result` wrote.
    Raises ConfigError."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not a readable JSON file: {type(error).__name__}") from None
    if not isinstance(result, dict) or not ((sweeps and is_sweep(result)) or "request_throughput" in result):
        raise ConfigError(f"{path} is not the result of a load test")
    return result
