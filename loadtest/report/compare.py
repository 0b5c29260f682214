"""Two results side by side. Also reads what `vllm bench serve --save-result` wrote."""

import math
from typing import Any

from tucka_runtime.loadtest.report.table import columns, number

HIGHER = ("request_throughput", "request_goodput", "output_throughput", "total_token_throughput", "score", "good_share")


def comparable(result: dict[str, Any]) -> dict[str, float]:
    names = [k for k in result if k in HIGHER or (k.endswith("_ms") and k.split("_")[0] not in ("std", "p50"))]
    return {k: result[k] for k in names if isinstance(result[k], int | float)}


def compare(a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, Any]]:
    """For each figure that both have: both values, B ÷ A, and `verdict`.

    Where both have 95% intervals from repeats, a difference counts only if it exceeds the noise: the difference's
    interval is the root of the sum of both half-widths squared, and `same` means that it holds zero. Without repeats
    the noise is not known and the verdict is `better?` or `worse?`.
    """
    first, second = comparable(a), comparable(b)
    rows = []
    for name in first.keys() & second.keys():
        x, y = first[name], second[name]
        noise = _noise(a, b, name)
        better = (y > x) == (name in HIGHER)
        verdict = "better" if better else "worse"
        if x == y or (noise is not None and abs(y - x) <= noise):
            verdict = "same"
        elif noise is None:
            verdict += "?"
        rows.append({"name": name, "a": x, "b": y, "ratio": y / x if x else None, "verdict": verdict})
    names = list(first)
    return sorted(rows, key=lambda row: (row["name"] not in HIGHER, names.index(row["name"])))


def _noise(a: dict[str, Any], b: dict[str, Any], name: str) -> float | None:
    halves = []
    for result in (a, b):
        interval = result.get("confidence", {}).get(name)
        if not interval or interval["from"] != "repeats":
            return None
        halves.append(interval["high"] - result[name])  # the other side may have been cut off at 0
    return math.hypot(*halves)


def differing_settings(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Settings that are not the same, as lines: figures of different loads do not compare."""
    ours, theirs = a.get("settings", {}), b.get("settings", {})
    ignored = {"label", "url", "no_raw"}
    names = sorted((ours.keys() | theirs.keys()) - ignored)
    return [f"{n}: {ours.get(n)} / {theirs.get(n)}" for n in names if ours.get(n) != theirs.get(n)]


def render(a: dict[str, Any], b: dict[str, Any], names: tuple[str, str]) -> str:
    rows = [["", *(r.get("label") or n for r, n in zip((a, b), names, strict=True)), "B / A", ""]]
    for row in compare(a, b):
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.3f}"
        rows.append([row["name"], number(row["a"]), number(row["b"]), ratio, row["verdict"]])
    lines = columns(rows, "")
    if any(line.rstrip().endswith("?") for line in lines):
        lines.append("? one run has no noise estimate: repeat both with --repeats 3 or more")
    for which, result in zip("AB", (a, b), strict=True):
        if result.get("client_limited"):
            lines.append(f"! in {which} the client was the limit")
        if result.get("correct") is False:
            lines.append(f"! {which} has wrong answers")
    if a.get("settings") and b.get("settings") and (differences := differing_settings(a, b)):
        lines += ["! the loads differ:", *(f"    {line}" for line in differences)]
    return "\n".join(lines)
