"""What is right, and what an answer is that is not.

Right is what a content (an adapter's folder; the base) answered greedily when nothing else was loaded and nothing else
ran. An answer under test is

    own         byte for byte that
    other       byte for byte what another content answers, which is named
    tied        it left its own for the second best token where that was nearly as good: rounding can do that
    changed     neither: a mixture, old keys and values, or weights that are nobody's
    unsure      neither, and without log-probabilities rounding cannot be ruled out
    failed      no answer, or a part of one
    busy        refused with 429 or 503: the server says that it has too much to do
"""

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tucka_runtime.loadtest.canary import tied
from tucka_runtime.loadtest.client import LoadClient, ServerError
from tucka_runtime.loadtest.record import Record
from tucka_runtime.loadtest.workload import WORDS

BASE = "base"  # how the base's content is called; an adapter's is its folder's path
PROMPT_WORDS = 20
FIRST, SECOND, STREAM = range(3)  # the questions: two short ones, and one whose answer takes a while
REFUSED = (400, 422)
BUSY = (429, 503)
SHOWN = 60  # characters of an answer in a line


@dataclass(frozen=True)
class Judgement:
    """One answer and what it is. `content` is whose it should be, `owner` whose it is where that is another's."""

    record: Record
    content: str
    outcome: str
    owner: str | None
    expected: str

    @property
    def agrees(self) -> int:
        """How many characters are as they should be before the first that is not."""
        pairs = zip(self.expected, self.record.text, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self.expected), len(self.record.text)))

    def line(self) -> str:
        r = self.record
        if self.outcome == "failed":
            return f"{r.model} gave no whole answer: {r.cause} {r.detail}".rstrip()
        what = f"answered as {label(self.owner)}" if self.owner else f"{self.outcome} after {self.agrees} characters"
        return f"{r.model} (has {label(self.content)}) {what}: {r.text[:SHOWN]!r} for {self.expected[:SHOWN]!r}"

    def to_json(self) -> dict[str, Any]:
        r = self.record
        sent = {"model": r.model, "question": r.index, "content": label(self.content)}
        came = {"status": r.status, "cause": r.cause, "detail": r.detail, "text": r.text, "expected": self.expected}
        return sent | came | {"outcome": self.outcome, "answered_as": self.owner and label(self.owner)}


def label(content: str) -> str:
    return content.rstrip("/").rpartition("/")[2]


@dataclass
class Oracle:
    """Asks, remembers what was right, and judges."""

    client: LoadClient
    base: str
    tokens: int
    stream_tokens: int
    optional: dict[str, Any] = field(default_factory=dict)  # of the optional fields, those that the server takes
    logprobs: bool = False
    references: dict[str, list[Record]] = field(default_factory=dict)
    unstable: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        rng = random.Random("conform")
        self.prompts = [" ".join(rng.choices(WORDS, k=PROMPT_WORDS)) for _ in range(3)]

    async def learn_fields(self, context: int | None) -> None:
        """Which optional fields the server takes: log-probabilities, answers of full length, and TuckA's route scope
        under which a route is the request's own; and how long answers may be within `context` tokens.

        Raises ServerError if it does not answer at all.
        """
        tops = {"logprobs": True, "top_logprobs": 2} if self.client.chat else {"logprobs": 2}
        for fields in (None, tops, {"ignore_eos": True}, {"route": "request"}):
            body = self.client.body(self.base, self.prompts[0], 1, 0.0) | (fields or {})
            record = await self.client.generate(Record("reference", self.base), body)
            if fields is None and not record.ok:
                raise ServerError(f"the base does not answer ({record.cause}): {record.detail or 'no details'}")
            if fields is None and context is not None:
                room = context - 2 * (record.prompt_tokens or 0)  # the others have about as many words
                self.stream_tokens = max(self.tokens, min(self.stream_tokens, room))
            if fields is not None and record.status not in REFUSED:
                self.optional |= fields
                self.logprobs |= bool(record.tokens)

    def question(self, model: str, number: int) -> tuple[Record, dict[str, Any]]:
        tokens = self.stream_tokens if number == STREAM else self.tokens
        body = self.client.body(model, self.prompts[number], tokens, 0.0) | self.optional
        return Record("conform", model, index=number), body

    async def ask(self, model: str, number: int) -> Record:
        return await self.client.generate(*self.question(model, number))

    async def record_references(self, model: str, content: str) -> None:
        """All questions, the first twice. Raises ServerError where one is not answered."""
        records = [await self.ask(model, number) for number in (FIRST, SECOND, STREAM, FIRST)]
        for record in records:
            if not record.ok:
                raise ServerError(
                    f"{label(content)}, alone on the server, gave no answer ({record.cause}): {record.detail}"
                )
        self.references[content] = records[:3]
        if records[3].text != records[0].text and not tied(records[0], records[3]):
            self.unstable.add(content)

    def twins(self) -> list[tuple[str, str]]:
        """Contents whose answers to both short questions are the same."""
        found, texts = [], {c: [r.text for r in known[:STREAM]] for c, known in self.references.items()}
        for content, answers in texts.items():
            for other, others in texts.items():
                if other == content:
                    break
                if others == answers:
                    found.append((other, content))
        return found

    def judge(self, record: Record, content: str) -> Judgement:
        own = self.references[content][record.index]
        outcome, owner = "changed", None
        if not record.ok:
            outcome = "busy" if record.status in BUSY else "failed"
        elif record.text == own.text:
            outcome = "own"
        else:
            known = self.references.items()
            owner = next((other for other, answers in known if answers[record.index].text == record.text), None)
            if owner is not None:
                outcome = "other"
            elif tied(own, record):
                outcome = "tied"
            elif not self.logprobs or content in self.unstable:
                outcome = "unsure"
        return Judgement(record, content, outcome, owner, own.text)


WRONG = ("other", "changed", "failed")


@dataclass
class Findings:
    """What one row saw, and the verdict that follows."""

    answers: list[Judgement] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    inapplicable: str | None = None

    def verdict(self) -> str:
        """fail where anything was wrong; pass where something was right; else n/a."""
        if self.faults or any(answer.outcome in WRONG for answer in self.answers):
            return "fail"
        counts = Counter(answer.outcome for answer in self.answers)
        if self.inapplicable is None and not counts["own"]:
            self.inapplicable = "no answer could be judged"
        if self.inapplicable is None and counts["unsure"]:
            self.inapplicable = (
                f"{counts['unsure']} answers differ from what was answered alone, and rounding cannot be ruled out: "
                "the server tells no log-probabilities, or differs from itself even alone"
            )
        return "pass" if self.inapplicable is None else "n/a"

    def came_back(self) -> str:
        counts = Counter(answer.outcome for answer in self.answers)
        parts = [f"{count} {outcome}" for outcome, count in counts.items()]
        return "; ".join([", ".join(parts) or "no answers", *self.notes])

    def evidence(self) -> list[str]:
        """What was wrong, each kind of it once."""
        lines = [answer.line() for answer in self.answers if answer.outcome in WRONG]
        return list(dict.fromkeys(self.faults + lines))
