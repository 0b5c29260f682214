"""The result as Markdown: what was measured with what, over HTTP, alone, and how each was started."""

import statistics
from typing import Any

from tucka_runtime.loadtest.peers.contenders import (
    BASE,
    COUNTS,
    KINDS,
    OPENVINO,
    OURS,
    VLLM,
    VLLM_LORA,
    adapted,
)

FLOOR, PACKED = "bare matrix products", "packed matrix products"
LINEARS = {"qv": "q, v", "all": "all seven"}
assert tuple(LINEARS) == KINDS


def render(result: dict[str, Any]) -> str:
    parts = [about(result), over_http(result), alone(result), starts(result)]
    return "\n\n".join(part for part in parts if part)


def about(result: dict[str, Any]) -> str:
    machine, settings = result["machine"], result["settings"]
    lines = [
        f"{result['date']}. {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, Linux "
        f"{machine['kernel']}; {' '.join(machine['flags'])}.",
        f"{settings['concurrency']} at once, prompts of {settings['prompt']} tokens, answers of {settings['new']}, "
        f"greedy, bfloat16; medians of {settings['rounds']} interleaved rounds, in brackets the least and the most.",
        *(f"{name}: {', '.join(f'{k} {v}' for k, v in found.items())}." for name, found in result["versions"].items()),
        *(f"{name} was not run: {reason}." for name, reason in result["not_run"].items()),
    ]
    return "\n".join(lines)


def over_http(result: dict[str, Any]) -> str:
    rows = []
    for model, found in result["models"].items():
        for case, figures in found["http"].items():
            ours, theirs = figures.get(OURS), figures.get(VLLM)
            unit = "ms" if "first token" in case else "tok/s"
            rows.append([model, f"{case}, {unit}", spread(ours), spread(theirs), ratio(ours, theirs)])
    if not rows:
        return ""
    head = ["model", "over HTTP, streamed", OURS, VLLM, f"{OURS} ÷ {VLLM}"]
    notes = [
        f"{OURS}'s adapters are TuckA's, {VLLM}'s are LoRAs, of rank 16. {VLLM}'s base is a server without LoRA. At a "
        "long context the prompts are those of the row before, whose KV both keep: decoding alone. A server that is "
        "not asked is stopped, for OpenMP's threads spin on behind an answer.",
    ]
    return "\n".join([*markdown(head, rows), "", *notes])


def alone(result: dict[str, Any]) -> str:
    head = ["model", "engine alone, tok/s", OURS, OPENVINO, f"÷ {OPENVINO}", "÷ base", PACKED, f"÷ {PACKED}", FLOOR]
    rows = []
    for model, found in result["models"].items():
        figures = {case: (own.get(OURS), own.get(OPENVINO)) for case, own in found["alone"].items()}
        if not figures:
            continue
        base, theirs = figures[BASE]
        floor, packed = figures[FLOOR][0], figures[PACKED][0]
        beside = ["", spread(packed), ratio(base, packed), spread(floor)]
        rows.append([model, "base", spread(base), spread(theirs), ratio(base, theirs), *beside])
        for kind, on in LINEARS.items():
            for count in COUNTS:
                ours, theirs = figures[adapted(kind, count)]
                beside = [ratio(ours, theirs), ratio(ours, base), "", "", ""]
                rows.append([model, f"{COUNTS[count]} on {on}", spread(ours), spread(theirs), *beside])
    if not rows:
        return ""
    note = (
        f"{OPENVINO} does not mix adapters: its 8 answers of 8 adapters are made one after another, all others at once."
    )
    return "\n".join([*markdown(head, rows), "", note])


def starts(result: dict[str, Any]) -> str:
    order = [name for name in (OURS, VLLM, VLLM_LORA, OPENVINO) if name in result["start_lines"]]
    return "\n\n".join(f"{name}:\n\n    {result['start_lines'][name]}" for name in order)


def spread(values: list[float] | None) -> str:
    if not values:
        return "not run"
    middle = number(statistics.median(values))
    return f"{middle} [{number(min(values))}–{number(max(values))}]" if len(values) > 1 else middle


def ratio(ours: list[float] | None, theirs: list[float] | None) -> str:
    """Of the medians."""
    if not ours or not theirs:
        return "–"
    return f"**{statistics.median(ours) / statistics.median(theirs):.2f}**"


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
