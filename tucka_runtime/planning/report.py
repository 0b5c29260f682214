"""What a plan says: the table, the JSON, the page."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tucka_runtime.loadtest.report import svg
from tucka_runtime.loadtest.report.markup import card, document, keys, table
from tucka_runtime.loadtest.report.table import columns, number
from tucka_runtime.planning.fleet import MOST
from tucka_runtime.planning.policies import POLICIES
from tucka_runtime.planning.simulation import FleetFigures, Limit


@dataclass(frozen=True)
class FleetPlan:
    """All that was found. `smallest` has each policy's smallest fleet, None where the largest that is tried does not
    keep the limit; it is empty without a limit."""

    about: str
    fleets: list[FleetFigures]
    limit: Limit | None
    smallest: dict[str, int | None]


def as_json(plan: FleetPlan, inputs: dict[str, Any]) -> dict[str, Any]:
    """One object; seconds are seconds."""
    return {
        "format": "tucka-plan/1",
        "inputs": inputs,
        "fleets": [
            asdict(f) | {"first_token": {f"p{p:g}": seconds for p, seconds in f.first_token.items()}}
            for f in plan.fleets
        ],
        "slo": asdict(plan.limit) if plan.limit else None,
        "smallest_fleet": plan.smallest,
    }


def render(plan: FleetPlan) -> str:
    """For a terminal."""
    lines = [plan.about]
    for replicas in dict.fromkeys(f.replicas for f in plan.fleets):
        own = [f for f in plan.fleets if f.replicas == replicas]
        lines += ["", f"{replicas} replica{'s' if replicas > 1 else ''}", *columns([_head(own), *map(_row, own)])]
    if plan.limit:
        lines += ["", f"smallest fleet with {_objective(plan.limit)}"]
        lines += columns([[policy, _fleet(plan.smallest[policy])] for policy in plan.smallest])
    return "\n".join(lines)


def page(plan: FleetPlan) -> str:
    """The same as a page, with figures over the number of replicas."""
    policies = list(dict.fromkeys(f.policy for f in plan.fleets))
    styles = {policy: f"s{list(POLICIES).index(policy)}" for policy in policies}
    top = max(plan.fleets[0].first_token)
    body = f'<h1>A fleet on paper</h1><p class="soft">{plan.about}</p>'
    cards = []
    shown: list[tuple[str, str, Callable[[FleetFigures], float]]] = [
        (f"First token, p{top:g}", "ms", lambda f: 1000 * f.first_token[top]),
        ("Requests that found their adapter in a slot", "%", lambda f: 100 * (f.hit_rate or 0.0)),
    ]
    for title, unit, value in shown:
        curves = []
        for policy in policies:
            own = sorted((f for f in plan.fleets if f.policy == policy), key=lambda f: f.replicas)
            curves.append(svg.Line(policy, [f.replicas for f in own], [value(f) for f in own], styles[policy]))
        cards.append(card(f"{title}{keys(styles)}", svg.chart(curves, "replicas", unit, log_x=True)))
    body += f'<div class="two">{"".join(cards)}</div><h2>Figures</h2>'
    body += table(["replicas", *_head(plan.fleets)], [[str(f.replicas), *_row(f)] for f in plan.fleets])
    if plan.limit:
        body += f"<h2>Smallest fleet with {_objective(plan.limit)}</h2>"
        body += table(["policy", "replicas"], [[policy, _fleet(n)] for policy, n in plan.smallest.items()])
    return document("A fleet on paper", body)


def _head(fleets: Sequence[FleetFigures]) -> list[str]:
    waits = [f"p{p:g} (ms)" for p in fleets[0].first_token]
    return ["policy", "hits", *waits, "tok/s", "requests/s", "busy", "busiest"]


def _row(figures: FleetFigures) -> list[str]:
    hits = "-" if figures.hit_rate is None else f"{figures.hit_rate:.1%}"
    waits = [number(1000 * seconds) for seconds in figures.first_token.values()]
    rates = [number(figures.output_tokens_per_second), number(figures.requests_per_second)]
    return [figures.policy, hits, *waits, *rates, f"{figures.busy:.0%}", f"{figures.most_busy:.0%}"]


def _objective(limit: Limit) -> str:
    return f"{limit.percentile:g}% of first tokens within {1000 * limit.seconds:g} ms"


def _fleet(replicas: int | None) -> str:
    return f"more than {MOST}" if replicas is None else str(replicas)
