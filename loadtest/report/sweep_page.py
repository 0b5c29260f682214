"""The report of a sweep."""

from typing import Any

from tucka_runtime.loadtest.report import svg
from tucka_runtime.loadtest.report.markup import card, keys, table
from tucka_runtime.loadtest.report.table import number

BANNERS = {
    "client": "ended because the client was the limit",
    "interrupted": "was interrupted",
    "nothing": "ended because a run sent no request",
}


def body(outcome: dict[str, Any]) -> str:
    points = sorted(outcome["points"], key=lambda p: p["rate"])
    x = [p["rate"] for p in points]
    limits = ", ".join(f"{n.upper()} ≤ {v:g} ms" for n, v in outcome["goodput_slo_ms"].items())
    knee = f"{number(outcome['knee'])} conversations/s" if outcome["knee"] else "no rate held"
    marks = [svg.Mark(outcome["knee"], "knee", "slo")] if outcome["knee"] else []
    good = [svg.Line("good", x, [p["good_share"] for p in points], "s0")]
    ttft = [svg.Line("p99", x, [p["p99_ttft_ms"] or 0 for p in points], "s1")]
    ttft.append(svg.Line("median", x, [p["median_ttft_ms"] or 0 for p in points], "s0"))
    done = [svg.Line("answered", x, [p["request_throughput"] for p in points], "s2")]
    tokens = [svg.Line("tokens", x, [p["output_throughput"] for p in points], "s3")]
    axis = "conversations per second"
    cards = [
        card("Share of good requests", svg.chart(good, axis, "share", marks, y_max=1.05)),
        card(f"TTFT{keys({'median': 's0', 'p99': 's1'})}", svg.chart(ttft, axis, "ms", marks)),
        card("Requests answered per second", svg.chart(done, axis, "1/s", marks)),
        card("Output tokens per second", svg.chart(tokens, axis, "1/s", marks)),
    ]
    head = ["rate", "good", "answered/s", "tok/s", "median TTFT", "p99 TTFT", "median TPOT", ""]
    names = ("request_throughput", "output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms")
    rows = []
    for p in points:
        verdict = "client limited" if p["client_limited"] else "holds" if p["holds"] else "fails"
        rows.append([number(p["rate"]), f"{p['good_share']:.1%}", *(number(p[n]) for n in names), verdict])
    html = f'<h1>Sweep: {knee}</h1><p class="soft">highest rate with {outcome["share"]:.0%} of requests at {limits}</p>'
    if outcome["ended"] in BANNERS:
        html += f'<div class="banner">The sweep {BANNERS[outcome["ended"]]}.</div>'
    html += f'<h2>By rate{keys({"knee": "bad"})}</h2><div class="two">{"".join(cards)}</div>'
    return html + f"<h2>Runs</h2>{table(head, rows)}"
