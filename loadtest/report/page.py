"""The report: one HTML page with nothing outside itself. All text that came from a server is escaped."""

from datetime import datetime
from html import escape
from typing import Any

from tucka_runtime.loadtest.report import svg, sweep_page
from tucka_runtime.loadtest.report.markup import card, document, keys, table
from tucka_runtime.loadtest.report.metrics import LATENCIES
from tucka_runtime.loadtest.report.report import is_sweep
from tucka_runtime.loadtest.report.table import number, share

TITLES = {
    "ttft": "Time to first token (TTFT)",
    "tpot": "Time per output token (TPOT)",
    "itl": "Inter-token latency (ITL)",
    "e2el": "End-to-end latency (E2EL)",
}
MOST_BARS = 24


def render(result: dict[str, Any]) -> str:
    """The page of a run's result, of a sweep's outcome, or (figures only) of vLLM's JSON."""
    if is_sweep(result):
        return document("Load test: sweep", sweep_page.body(result))
    return document("Load test", run_body(result))


def run_body(result: dict[str, Any]) -> str:
    if "runs" not in result:
        return f"<h1>Load test</h1>{tiles(result)}{figures(result)}"
    parts = [header(result), banners(result), tiles(result), figures(result), distributions(result)]
    parts += [over_time(result), adapters(result), correctness(result), client(result), settings(result)]
    return "".join(parts)


def header(result: dict[str, Any]) -> str:
    s = result["settings"]
    if s.get("trace"):
        load = "trace replay"
    elif result["max_concurrency"] and result["request_rate"] == "closed":
        load = f"closed loop, {result['max_concurrency']} conversations at a time"
    else:
        load = f"open loop, {result['request_rate']} conversations/s, burstiness {s['burstiness']:g}"
    what = f"{len(result['models'])} models, popularity {s['popularity']}, "
    what += "prompts of a dataset" if s.get("dataset") else f"prompts of {s['prompt_tokens']} tokens"
    what += "" if s.get("dataset") else f", answers of up to {s['max_tokens']}"
    churn = f", churn {s['churn_rate']:g}/s" if s.get("churn_rate") else ""
    repeats = f", {result['repeats']} repeats" if result["repeats"] > 1 else ""
    day = datetime.strptime(result["date"], "%Y%m%d-%H%M%S")
    title = result["label"] or result["model_id"]
    return (
        f"<h1>Load test: {escape(str(title))}</h1>"
        f'<p class="soft">{escape(load)}; {escape(what + churn + repeats)}; {day:%Y-%m-%d %H:%M} UTC</p>'
    )


def banners(result: dict[str, Any]) -> str:
    clients = [run["client"] for run in result["runs"] + result["base_runs"]]
    reasons = dict.fromkeys(r for client in clients for r in client["reasons"])
    lines = [f'<div class="banner">The client, not the server, was the limit: {escape(r)}.</div>' for r in reasons]
    warnings = dict.fromkeys(w for client in clients for w in client.get("warnings", ()))
    lines += [f'<div class="banner">The machine was busy: {escape(w)}.</div>' for w in warnings]
    if not result["correct"]:
        lines.insert(0, '<div class="banner bad">Wrong answers under load: see Correctness.</div>')
    failed = [e for run in result["runs"] for e in run["churn_events"] if not e["ok"]]
    if failed:
        what = escape(f"{failed[0]['call']} {failed[0]['name']}: {failed[0]['detail']}")
        lines.append(f'<div class="banner">{len(failed)} adapter calls failed; the first, {what}</div>')
    if any(run["interrupted"] for run in result["runs"]):
        lines.append('<div class="banner">The run was interrupted: figures are of what had run by then.</div>')
    return "".join(lines)


def tiles(result: dict[str, Any]) -> str:
    def tile(value: str, name: str, style: str = "") -> str:
        return f'<div class="tile"><b class="{style}">{value}</b><span>{name}</span></div>'

    items = [
        tile(f"{number(result['request_throughput'])}/s", f"requests, {result['completed']} answered"),
        tile(f"{number(result['output_throughput'])}/s", "output tokens"),
        tile(f"{number(result['median_ttft_ms'])} ms", "median TTFT"),
        tile(f"{number(result['median_tpot_ms'])} ms", "median TPOT"),
        tile(str(result["failed"]), "failed requests", "bad" if result["failed"] else "good"),
    ]
    if result.get("goodput_slo_ms"):
        limits = ", ".join(f"{n.upper()} ≤ {v:g} ms" for n, v in result["goodput_slo_ms"].items())
        items.append(tile(share(result["good_share"]), f"good: {limits}"))
    if result.get("score") is not None:
        items.append(tile(f"{result['score']:.1%}", "answers as expected"))
    if canaries := result.get("canaries"):
        own = canaries["outcomes"].get("own", 0)
        items.append(
            tile(f"{own}/{canaries['sent']}", "canaries gave their own answer", "good" if result["correct"] else "bad")
        )
    return f'<div class="tiles">{"".join(items)}</div>'


def figures(result: dict[str, Any]) -> str:
    confidence = result.get("confidence", {})

    def cell(name: str) -> str:
        interval = confidence.get(name)
        note = f" <i>{number(interval['low'])} to {number(interval['high'])}</i>" if interval else ""
        return number(result.get(name)) + note

    keys = ["mean", *(k.removesuffix("_ttft_ms") for k in result if k.startswith("p") and k.endswith("_ttft_ms"))]
    rows = [[TITLES[n], *(cell(f"{k}_{n}_ms") for k in keys)] for n in LATENCIES if f"mean_{n}_ms" in result]
    html = "<h2>Latency</h2>" + table(["ms", *keys], rows)
    if source := next((c["from"] for c in confidence.values()), None):
        html += f'<p class="soft small">Small figures: 95% intervals from {source}.</p>'
    cold = result.get("cold", {})
    if cold.get("cold_requests"):
        html += (
            f"<p>TTFT of the first request after a load: median {number(cold['median_cold_ttft_ms'])} ms "
            f"({cold['cold_requests']} loads); all others to the same adapters: "
            f"{number(cold['median_warm_ttft_ms'])} ms ({cold['warm_requests']}).</p>"
        )
    if ratio := result.get("ratio_to_base"):
        rows = [
            [n, number(r["ratio"]), f"{number(r['low'])} to {number(r['high'])}", str(r["pairs"])]
            for n, r in ratio.items()
        ]
        html += "<h2>Adapter ÷ base</h2>" + table(["figure", "ratio", "95%", "pairs"], rows)
    return html


def distributions(result: dict[str, Any]) -> str:
    """Cumulated distributions; repeats lie over one another, the base's are in another colour."""
    cards = []
    for name in LATENCIES:
        lines = []
        for style, runs, who in (("s1", result["base_runs"], "base"), ("s0", result["runs"], "run")):
            thin = " thin" if len(runs) > 1 else ""
            for i, run in enumerate(runs):
                values = run["cdf_ms"][name]
                share = [j / max(len(values) - 1, 1) for j in range(len(values))]
                lines.append(svg.Line(f"{who} {i + 1}", values, share, style + thin))
        limit = result["goodput_slo_ms"].get(name)
        marks = [svg.Mark(limit, f"SLO {limit:g} ms", "slo")] if limit else []
        cards.append(card(TITLES[name], svg.chart(lines, "ms (log)", "share of samples", marks, log_x=True, y_max=1.0)))
    legend = keys({"adapters": "s0", "base": "s1"}) if result["base_runs"] else ""
    slo = keys({"SLO": "bad"}) if result["goodput_slo_ms"] else ""
    return f'<h2>Distributions{legend}{slo}</h2><div class="two">{"".join(cards)}</div>'


def over_time(result: dict[str, Any]) -> str:
    """A chart of each repeat: output and what was in flight, with marks where adapters came and went or answers were
    wrong."""
    html = []
    wrong = (result["canaries"] or {}).get("wrong", []) if len(result["runs"]) == 1 else []
    for i, run in enumerate(result["runs"]):
        s = run["series"]
        x = [(j + 0.5) * s["width"] for j in range(len(s["in_flight"]))]
        marks = [
            svg.Mark(
                e["at"], f"{e['action']} {e['name']}: {e['call']} {e['status']}", e["action"] if e["ok"] else "wrong"
            )
            for e in run["churn_events"]
            if e["action"] != "restore"
        ]
        marks += [svg.Mark(w["at"], f"canary {w['outcome']}: {w['model']}", "wrong") for w in wrong]
        end = run["duration"]
        tokens = [svg.Line("output", x, s["output_events_per_s"], "s0", filled=True)]
        flight = [
            svg.Line("in flight", x, s["in_flight"], "s3", filled=True),
            svg.Line("failed per s", x, s["failed_per_s"], "s1"),
        ]
        which = f", repeat {i + 1}" if len(result["runs"]) > 1 else ""
        html.append(card(f"Output events per second{which}", svg.chart(tokens, "s", "1/s", marks, x_max=end)))
        html.append(
            card(f"In flight{keys({'in flight': 's3', 'failed per s': 's1'})}", svg.chart(flight, "s", "", x_max=end))
        )
    churned = any(run["churn_events"] for run in result["runs"])
    legend = (
        keys({"load": "s2", "reload": "s3", "unload": "s1", "failed call or wrong answer": "bad"}) if churned else ""
    )
    return f'<h2>Over time{legend}</h2><div class="two">{"".join(html)}</div>'


def adapters(result: dict[str, Any]) -> str:
    per_adapter = dict(list(result["per_adapter"].items())[:MOST_BARS])
    requests = [(n, a["requests"], None, str(a["requests"])) for n, a in per_adapter.items()]
    good = [(n, a["good_share"], None, f"{a['good_share']:.1%}") for n, a in per_adapter.items()]
    top = next(
        (k for k in reversed(list(next(iter(per_adapter.values()), {}))) if k.endswith("_ttft_ms")), "p99_ttft_ms"
    )
    ttft = [
        (n, a["median_ttft_ms"] or 0.0, a[top], f"{a['median_ttft_ms'] or 0:.0f} / {a[top] or 0:.0f} ms")
        for n, a in per_adapter.items()
    ]
    what = "within the SLO" if result["goodput_slo_ms"] else "answered (no SLO given)"
    cards = [card("Requests", svg.bars(requests, "requests")), card(f"Share {what}", svg.bars(good, "share", 1.0))]
    speed = [(n, a["tokens_per_second_of_a_request"] or 0.0) for n, a in per_adapter.items()]
    cards.append(card("Tokens per second of one request", svg.bars([(n, v, None, number(v)) for n, v in speed], "1/s")))
    cards.append(card(f"TTFT: median, whisker to {top.split('_')[0]}", svg.bars(ttft, "ms")))
    if result["score"] is not None:
        scored = [(n, a["score"], None, f"{a['score']:.1%}") for n, a in per_adapter.items() if a["score"] is not None]
        cards.append(card("Answers as expected", svg.bars(scored, "share", 1.0)))
    hidden = len(result["per_adapter"]) - len(per_adapter)
    note = f'<p class="soft small">{hidden} more with fewer requests are in the JSON.</p>' if hidden else ""
    f = result["fairness"]
    jain = f"Jain's index: {number(f['jain_goodput'])} of good shares, {number(f['jain_speed'])} of tokens per second."
    return f'<h2>By adapter</h2><p class="soft small">{jain}</p><div class="two">{"".join(cards)}</div>{note}'


def correctness(result: dict[str, Any]) -> str:
    html = "<h2>Correctness and failures</h2>"
    if result["failures"]:
        said = result.get("failure_details", {})
        rows = [[escape(c), str(n), escape(said.get(c, ""))] for c, n in result["failures"].items()]
        html += table(["failed requests by cause", "count", "what the first one said"], rows)
    else:
        html += "<p>No request failed.</p>"
    if canaries := result["canaries"]:
        scope = "in route scope <code>request</code>" if canaries["route_request"] else "without a route scope"
        outcomes = ", ".join(f"{n} {escape(o)}" for o, n in canaries["outcomes"].items()) or "none"
        html += f"<p>{canaries['sent']} canaries to {len(canaries['models'])} models {scope}: {outcomes}.</p>"
        rows = [
            [escape(str(w[k] or "-")[:48]) for k in ("model", "outcome", "answered_as", "expected", "text")]
            for w in canaries["wrong"][:20]
        ]
        if rows:
            html += table(["canary", "outcome", "answered as", "expected", "answered"], rows)
        if canaries["twins"]:
            twins = escape(str(canaries["twins"][:5]))
            html += f'<p class="soft small">No leak can be seen between {twins}: they answer alike.</p>'
    if result["unloaded_but_answered"]:
        html += f"<p>Unloaded but answering: {escape(', '.join(sorted(set(result['unloaded_but_answered']))))}</p>"
    events = [e for run in result["runs"] for e in run["churn_events"]]
    if events:
        rows = [
            [
                f"{e['at']:.2f} s",
                escape(e["action"]),
                escape(e["call"]),
                escape(e["name"]),
                str(e["status"]),
                number(e["seconds"] * 1000),
            ]
            for e in events
        ]
        head = ["at", "action", "call", "adapter", "status", "ms"]
        html += f"<details><summary>{len(events)} adapter calls</summary>{table(head, rows)}</details>"
    return html


def client(result: dict[str, Any]) -> str:
    names = ("loop_lag_p50_ms", "loop_lag_p99_ms", "loop_lag_max_ms", "send_lag_p99_ms", "send_lag_max_ms")
    rows = []
    for who, runs in (("run", result["runs"]), ("base", result["base_runs"])):
        for i, run in enumerate(runs):
            c = run["client"]
            limited = "yes" if c["client_limited"] else "no"
            rows.append([f"{who} {i + 1}", f"{c['cpu_share']:.0%}", *(number(c[n]) for n in names), limited])
    head = ["", "CPU of a core", "loop lag p50", "p99", "max (ms)", "late sends p99", "max (ms)", "client limited"]
    return "<h2>The tester itself</h2>" + table(head, rows)


def settings(result: dict[str, Any]) -> str:
    rows = [
        [escape(k), f"<code>{escape(', '.join(v) if isinstance(v, list) else str(v))}</code>"]
        for k, v in sorted(result["settings"].items())
        if v not in ([], False)
    ]
    return f"<details><summary>Settings</summary>{table(['setting', 'value'], rows)}</details>"
