"""Does every adapter give its own answer, whoever else is being served?

Before the load each adapter answers the canary prompts alone, greedily; under load it must answer the same. All
adapters get the same prompts, so an answer that belongs to another one is recognised:

    own       the reference, byte for byte
    leaked    another adapter's (or the base's) reference
    stale     what the same name answered from another of its paths (churn with several paths)
    tied      it left its reference for the second best token where that was nearly as good: in 16 bits a batch's size
              alone can do that
    changed   none of these: not deterministic under load
    failed    no answer
    unjudged  its adapter was exchanged while it ran, and the answer is not its own

Under TuckA's route scope `request` a route does not depend on the batch, so canaries ask for it where the server knows
the field (vLLM ignores what it does not know, so a scope that does not exist is tried first); under scope `batch`,
`changed` is no error. `twins` are adapters with the same references: between them a leak cannot be seen.
"""

import random
from collections import Counter
from collections.abc import Iterable
from typing import Any

from tucka_runtime.loadtest.client import LoadClient
from tucka_runtime.loadtest.record import Record
from tucka_runtime.loadtest.settings import Settings
from tucka_runtime.loadtest.workload import WORDS

Identity = tuple[str, str | None]  # model, and the path it was loaded from where churn knows it
TIE = 0.5  # nats between the best and the second token: a few units in the last place of a bf16 logit between 16 and 32


class Canaries:
    """References, then verdicts. A canary's `index` is the number of its prompt."""

    def __init__(self, settings: Settings, client: LoadClient) -> None:
        self.client, self.tokens = client, settings.canary_tokens
        rng = random.Random(f"{settings.seed}/canaries")
        drawn = [" ".join(rng.choices(WORDS, k=12)) for _ in range(2)]
        self.prompts = list(settings.canary_prompt) or drawn
        logprobs = {"logprobs": True, "top_logprobs": 2} if client.chat else {"logprobs": 2}
        self.optional: dict[str, dict[str, Any]] = {"route": {"route": "request"}, "logprobs": logprobs}
        self.taken: dict[str, tuple[str, ...]] = {}  # which of them each model took
        self.route_known: bool | None = None
        self.references: dict[Identity, list[Record]] = {}
        self.unstable: set[str] = set()
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[dict[str, Any]] = []

    async def ask(self, model: str, number: int, kind: str) -> Record:
        """One canary. Greedy, with as many of the optional fields as the model took first."""
        candidates = [("route", "logprobs"), ("route",), ("logprobs",), ()]
        for names in [self.taken[model]] if model in self.taken else candidates:
            if "route" in names and not self.route_known:
                continue
            body = self.client.body(model, self.prompts[number], self.tokens, 0.0)
            for name in names:
                body |= self.optional[name]
            record = await self.client.generate(Record(kind, model, index=number), body)
            if record.status not in (400, 422):
                self.taken.setdefault(model, names)
                break
        return record

    async def record_references(self, model: str, path: str | None) -> list[Record]:
        """Asks alone, the first prompt twice: an adapter that differs from itself then is `unstable`, not judged."""
        tried = []
        if self.route_known is None:
            body = self.client.body(model, self.prompts[0], 1, 0.0) | {"route": "?"}
            tried = [await self.client.generate(Record("reference", model), body)]
            self.route_known = tried[0].status in (400, 422)
        records = [await self.ask(model, number, "reference") for number in (*range(len(self.prompts)), 0)]
        if all(r.ok for r in records):
            self.references[model, path] = records[:-1]
            if records[0].text != records[-1].text:
                self.unstable.add(model)
        return tried + records

    def judge(self, record: Record, path: str | None, exchanged: bool) -> str:
        """Compares, counts, and says what it was."""
        own = self.references.get((record.model, path))
        outcome, owner = "unjudged", None
        if own is not None and record.ok and record.text == own[record.index].text:
            outcome = "own"
        elif own is not None and not exchanged and record.model not in self.unstable:
            outcome, owner = self.explain(record, own[record.index])
        if owner is not None or outcome == "changed":
            wrong = {"at": record.start, "model": record.model, "outcome": outcome, "answered_as": owner}
            self.wrong.append(wrong | {"expected": own[record.index].text if own else None, "text": record.text})
        self.outcomes[outcome] += 1
        return outcome

    def explain(self, record: Record, own: Record) -> tuple[str, str | None]:
        """What an answer is that is not the adapter's own, and whose."""
        if not record.ok:
            return "failed", None
        owners = [model for (model, _), known in self.references.items() if known[record.index].text == record.text]
        if record.model in owners:
            return "stale", record.model
        if owners:
            return "leaked", owners[0]
        return ("tied" if tied(own, record) else "changed"), None

    def twins(self) -> list[list[str]]:
        """Groups of identities that answer every canary alike."""
        groups: dict[tuple[str, ...], list[str]] = {}
        for (model, path), known in self.references.items():
            groups.setdefault(tuple(r.text for r in known), []).append(model if path is None else f"{model} ({path})")
        return [names for names in groups.values() if len(names) > 1]

    def result(self) -> dict[str, Any]:
        return {
            "sent": sum(self.outcomes.values()),
            "outcomes": dict(self.outcomes),
            "route_request": bool(self.taken) and all("route" in names for names in self.taken.values()),
            "models": sorted({model for model, _ in self.references}),
            "unstable_alone": sorted(self.unstable),
            "twins": self.twins(),
            "wrong": self.wrong[:50],
        }


def tied(reference: Record, record: Record) -> bool:
    """Whether the first token that differs was the reference's second choice by less than TIE."""
    pairs = zip(reference.tokens or (), record.tokens or (), strict=False)
    first = next(((own, other) for own, other in pairs if own.text != other.text), None)
    return first is not None and first[0].second == first[1].text and first[0].margin < TIE


def passed(results: Iterable[dict[str, Any]]) -> bool:
    """Whether no canary was answered as another adapter or with old weights; in request scope none changed either."""
    for result in results:
        bad = {"leaked", "stale"} | ({"changed"} if result["route_request"] else set())
        if any(result["outcomes"].get(name) for name in bad):
            return False
    return True
