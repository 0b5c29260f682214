"""The result in the terminal."""

from typing import Any

from tucka_runtime.loadtest.report.metrics import LATENCIES

MOST_ADAPTERS = 15


def number(value: Any) -> str:
    """Four significant digits at least; a dash where there is none."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def between(interval: dict[str, Any] | None) -> str:
    return f" [{number(interval['low'])} .. {number(interval['high'])}]" if interval else ""


def columns(rows: list[list[str]], indent: str = "  ") -> list[str]:
    """Left-aligned first column, right-aligned others."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    pad = [str.ljust] + [str.rjust] * (len(widths) - 1)
    return [indent + "  ".join(p(c, w) for p, c, w in zip(pad, row, widths, strict=True)).rstrip() for row in rows]


def render(result: dict[str, Any]) -> str:
    """Everything that a person wants to know first, warnings before figures."""
    parts = [warnings(result), throughput(result), latencies(result), adapters(result), checks(result)]
    return "\n\n".join("\n".join(part) for part in parts if part)


def warnings(result: dict[str, Any]) -> list[str]:
    lines = []
    for run in result["runs"] + result["base_runs"]:
        lines += [f"! the client was the limit: {reason}" for reason in run["client"]["reasons"]]
        lines += [f"! the machine was busy: {warning}" for warning in run["client"].get("warnings", ())]
    if not result["completed"]:
        lines.append("! NO REQUEST WAS ANSWERED")
    if not result["correct"]:
        lines.append("! WRONG ANSWERS: see the canaries below")
    failed = [e for run in result["runs"] for e in run["churn_events"] if not e["ok"]]
    if failed:
        first = failed[0]
        lines.append(
            f"! {len(failed)} adapter calls failed; the first, {first['call']} {first['name']}: {first['detail']}"
        )
    if any(run["interrupted"] for run in result["runs"]):
        lines.append("! interrupted: the figures are of what had run by then")
    return list(dict.fromkeys(lines))


def throughput(result: dict[str, Any]) -> list[str]:
    def with_interval(name: str) -> str:
        return number(result[name]) + between(result["confidence"].get(name))

    rows = [
        ("requests answered / failed", f"{result['completed']} / {result['failed']}"),
        ("duration (s)", number(result["duration"])),
        ("request throughput (1/s)", with_interval("request_throughput")),
        ("output tokens (1/s)", with_interval("output_throughput")),
        ("total tokens (1/s)", number(result["total_token_throughput"])),
        ("most in flight", number(result["most_in_flight"])),
    ]
    if result["goodput_slo_ms"]:
        limits = ", ".join(f"{name} <= {limit:g} ms" for name, limit in result["goodput_slo_ms"].items())
        good = f"{number(result['request_goodput'])}, {share(result['good_share'])}"
        rows.append((f"goodput (1/s) at {limits}", good))
    if result["score"] is not None:
        rows.append(("answers as expected", f"{result['score']:.1%}"))
    for cause, count in result["failures"].items():
        said = result["failure_details"].get(cause)
        rows.append((f"  failed: {cause}", f"{count}, the first: {said}" if said else str(count)))
    width = max(len(name) for name, _ in rows)
    return [f"  {name.ljust(width)}  {value}" for name, value in rows]


def latencies(result: dict[str, Any]) -> list[str]:
    """One row a latency; in brackets the 95% interval of the highest percentile."""
    keys = ["mean", *(k.removesuffix("_ttft_ms") for k in result if k.startswith("p") and k.endswith("_ttft_ms"))]
    last = keys[-1]
    rows = [["ms", *keys, f"95% of {last}"]]
    for name in LATENCIES:
        interval = between(result["confidence"].get(f"{last}_{name}_ms")).strip()
        rows.append([name.upper(), *(number(result[f"{key}_{name}_ms"]) for key in keys), interval])
    source = next((c["from"] for c in result["confidence"].values()), None)
    note = [f"  (intervals from {source}{'; use --repeats for better ones' if source != 'repeats' else ''})"]
    lines = columns(rows) + (note if source else [])
    cold = result["cold"]
    if cold["cold_requests"]:
        lines.append(
            f"  TTFT right after a load: median {number(cold['median_cold_ttft_ms'])} ms of {cold['cold_requests']};"
            f" warm, same adapters: {number(cold['median_warm_ttft_ms'])} ms of {cold['warm_requests']}"
        )
    for name, ratio in result["ratio_to_base"].items():
        lines.append(f"  adapter / base, {name}: {number(ratio['ratio'])}{between(ratio) if ratio['low'] else ''}")
    return lines


def adapters(result: dict[str, Any]) -> list[str]:
    per_adapter, fairness = result["per_adapter"], result["fairness"]
    scored = result["score"] is not None
    rows = [["adapter", "requests", "answered", "good", "median TTFT", "tok/s", *(["score"] if scored else [])]]
    for name, a in list(per_adapter.items())[:MOST_ADAPTERS]:
        row = [name[:40], str(a["requests"]), str(a["completed"]), f"{a['good_share']:.0%}"]
        row += [number(a["median_ttft_ms"]), number(a["tokens_per_second_of_a_request"])]
        rows.append(row + ([number(a["score"])] if scored else []))
    lines = columns(rows)
    if len(per_adapter) > MOST_ADAPTERS:
        lines.append(f"  ... and {len(per_adapter) - MOST_ADAPTERS} more (all in the JSON)")
    if len(per_adapter) > 1:
        good, speed = number(fairness["jain_goodput"]), number(fairness["jain_speed"])
        lines.append(f"  Jain's index: {good} of good shares, {speed} of speed")
    return lines


def checks(result: dict[str, Any]) -> list[str]:
    lines = []
    if canaries := result["canaries"]:
        outcomes = ", ".join(f"{count} {name}" for name, count in canaries["outcomes"].items()) or "none"
        scope = "route scope request" if canaries["route_request"] else "the server has no route scope"
        lines.append(f"  canaries: {canaries['sent']} sent: {outcomes} ({len(canaries['models'])} models, {scope})")
        for wrong in canaries["wrong"][:5]:
            whose = f" as {wrong['answered_as']}" if wrong["answered_as"] else ""
            lines.append(f"    {wrong['outcome']}: {wrong['model']} answered{whose} at {wrong['at']:.1f} s")
        if canaries["unstable_alone"]:
            lines.append(f"    differ from themselves even alone: {', '.join(canaries['unstable_alone'][:8])}")
        if canaries["twins"]:
            lines.append(f"    answer alike, no leak between them can be seen: {canaries['twins'][:3]}")
    events = [e for run in result["runs"] for e in run["churn_events"] if e["action"] != "restore" or not e["ok"]]
    if events:
        failed = sum(not e["ok"] for e in events)
        elsewhere = sum(run["redirected"] for run in result["runs"])
        lines.append(
            f"  churn: {len(events)} calls, {failed} failed; {elsewhere} conversations sent elsewhere meanwhile"
        )
    if result["unloaded_but_answered"]:
        lines.append(f"  unloaded adapters that answered: {sorted(set(result['unloaded_but_answered']))}")
    return lines
