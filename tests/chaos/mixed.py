"""Mixed traffic held to solo runs: `python -m tests.chaos.mixed --tokens 100000`.

The embedded base and its adapters in fp32, and engines of random shape one after the other: tiny KV pools, so that
sequences are preempted, few seats, small steps, overlapping steps or not, with drafts and without in turn. Traffic is
random: the base, LoRA, TuckA under every route scope and with a fixed route, several answers, greedy and drawn with
penalties, stops, bad words, log-probabilities and schemas; requests that are aborted; adapters that are replaced under
their name by another's content. Whatever came of a request is compared, token for token, with the same request alone in
a roomy engine that keeps nothing and drafts nothing. Under the scope `batch` others change a route by design: such an
answer is compared where its adapter was its own and it was computed in one piece, and counted apart where not.

Prints what was compared and ends with 1 if a token differs.
"""

import argparse
import json
import random
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from tests.support.driving import Answer, build, check_idle, run
from tucka_runtime.embedded import FOLDER
from tucka_runtime.engine.engine import Engine
from tucka_runtime.engine.scheduler import ScheduledChunk
from tucka_runtime.grammars import of_schema
from tucka_runtime.messages import AdapterKey, FinishReason, Request, Route, RouteScope, SamplingParams
from tucka_runtime.tokenizer import Tokenizer

NAMES = ("formats", "words", "triage", "sql")
FIXED = "fixed"
CONTEXT = 256
TEXTS = (
    "2024-03-05",
    "1234567",
    "Please write garden backwards",
    "I was charged twice for my chair",
    "How many customers are there in Oslo?",
    "Once upon a time there was a small house, and in the small house there was a small cat.",
)
SCHEMA = {"type": "array", "items": {"type": "object", "properties": {"team": {"enum": ["billing", "sales"]}}}}
SAMPLINGS = (
    SamplingParams(temperature=0.0, ignore_eos=True),
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.8, seed=3, top_p=0.95, ignore_eos=True),
    SamplingParams(temperature=0.4, seed=4, top_k=5, logprobs=2, bad_words=((101, 32), (97,))),
    SamplingParams(temperature=0.0, repetition_penalty=1.05, frequency_penalty=0.1, ignore_eos=True),
    SamplingParams(temperature=0.5, seed=5, stop_token_ids=(102, 115), min_tokens=6),
    SamplingParams(temperature=0.9, seed=6, grammar=of_schema(json.dumps(SCHEMA))),
)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000, help="answers' tokens to compare, at least")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(given)


@dataclass
class Sent:
    """A request, the content behind its adapter, and what became of it: aborted, or, under the scope `batch`, routed
    with others or in pieces."""

    request: Request
    content: str | None
    answers: list[Answer]
    aborted: bool = False
    disturbed: bool = False


@dataclass
class Report:
    """Tokens that were compared, by kind of request and whether there were drafts; those under the scope `batch` that
    others changed; what differed; and how much there was of what makes it hard."""

    compared: Counter[str] = field(default_factory=Counter)
    disturbed: int = 0
    mismatches: list[str] = field(default_factory=list)
    happened: Counter[str] = field(default_factory=Counter)

    @property
    def tokens(self) -> int:
        return sum(self.compared.values())


def serve(**settings: Any) -> Engine:
    return build(FOLDER / "base", dtype="float32", max_model_len=CONTEXT, num_threads=1, **settings)


def load(engine: Engine, key: AdapterKey, content: str) -> None:
    route = Route(1, (0.6, 0.4)) if key.name == FIXED else None
    engine.load_adapter(key, FOLDER / "adapters" / content, route)


class Solo:
    """What a request gives alone: on one seat, so that under the scope `batch` its answers do not route each other."""

    def __init__(self) -> None:
        self.engine = serve(kv_cache_tokens=8192, max_num_seqs=1)
        self.keys: dict[tuple[bool, str], AdapterKey] = {}

    def __call__(self, asked: Sent) -> list[Answer]:
        request, key = asked.request, None
        if request.adapter is not None and asked.content is not None:
            fixed = request.adapter.name == FIXED
            key = self.keys.get((fixed, asked.content))
            if key is None:
                key = AdapterKey(FIXED if fixed else asked.content, len(self.keys))
                load(self.engine, key, asked.content)
                self.keys[fixed, asked.content] = key
        self.engine.blocks.forget_all()
        self.engine.scheduler.routes.routes.clear()
        (answers,) = run(self.engine, replace(request, id="solo", adapter=key))
        return answers


class Traffic:
    """One engine and what is asked of it."""

    def __init__(self, make: random.Random, tokenizer: Tokenizer, drafts: bool):
        self.make, self.tokenizer = make, tokenizer
        seats = make.choice((2, 3, 5, 8))
        self.engine = serve(
            kv_cache_tokens=make.choice((CONTEXT, CONTEXT + 64, 2 * CONTEXT)),
            block_size=make.choice((4, 8, 16)),
            max_num_seqs=seats,
            max_num_batched_tokens=max(seats, make.choice((8, 24, 64, 512))),
            speculate="ngram" if drafts else "none",
            speculate_tokens=make.choice((3, 5, 8)),
            speculate_min_ngram=make.choice((1, 2)),
        )
        self.engine.overlap = make.random() < 0.5
        self.report = Report()
        self.asked: dict[str, Sent] = {}
        self.served: dict[str, tuple[AdapterKey, str]] = {}
        self.loads = 0
        for name in NAMES:
            self.replace(name, name)
        self.replace(FIXED, make.choice(NAMES[:3]))
        self._watch()

    def replace(self, name: str, content: str) -> None:
        """A name stands for that content from now on."""
        self.loads += 1
        key = AdapterKey(name, self.loads)
        load(self.engine, key, content)
        if name in self.served:
            self.engine.unload_adapter(self.served[name][0])
        self.served[name] = key, content

    def _watch(self) -> None:
        """Notes which answers under the scope `batch` are disturbed."""
        launch = self.engine.runner.launch

        def watched(chunks: list[ScheduledChunk]) -> Any:
            routed = [chunk for chunk in chunks if chunk.seq.scope is RouteScope.BATCH]
            users = Counter(chunk.seq.adapter for chunk in routed)
            for chunk in routed:
                seq = chunk.seq
                whole = (chunk.start == 0 and chunk.count == seq.num_prompt) or chunk.start >= seq.num_prompt
                again = chunk.start == 0 and seq.num_known
                if users[seq.adapter] > 1 or not whole or again:
                    self.asked[seq.request.id].disturbed = True
            return launch(chunks)

        self.engine.runner.launch = watched  # type: ignore[method-assign]

    def request(self, id: str) -> Sent:
        make = self.make
        name = make.choice((None, FIXED, *NAMES))
        key, content = self.served[name] if name is not None else (None, None)
        text = make.choice(TEXTS) + make.choice(("", " ", " " + make.choice(TEXTS)))
        ids = tuple(self.tokenizer.encode(text, True)) * make.choice((1, 1, 2))
        sampling = replace(make.choice(SAMPLINGS), max_tokens=make.randrange(1, 60))
        request = Request(
            id,
            (ids[: CONTEXT - 60],),
            sampling,
            make.choice((1, 1, 1, 3)),
            key,
            make.choice((RouteScope.BATCH, RouteScope.REQUEST, RouteScope.PREFIX)),
            tenant=make.choice(("", "b")),
        )
        return Sent(request, content, [Answer() for _ in range(request.n)])

    def step(self) -> None:
        outputs, stats = self.engine.step()
        if stats is not None:
            self.report.happened["drafted tokens"] += stats.draft_tokens
            self.report.happened["of them right"] += stats.accepted_tokens
        for out in outputs:
            self.asked[out.request_id].answers[out.index].take(out)
        self.engine.check_integrity()

    def run(self, requests: int) -> None:
        """So many requests, one after the other between steps, to their end."""
        make = self.make
        for number in range(requests):
            if make.random() < 0.15:
                name = make.choice((*NAMES, FIXED))
                self.replace(name, make.choice(NAMES[:3] if name == FIXED else NAMES))
                self.report.happened["reloads"] += 1
            asked = self.request(f"r{number}")
            self.asked[asked.request.id] = asked
            self.engine.add(asked.request)
            for _ in range(make.choice((0, 0, 1, 4, 12))):
                self.step()
            if make.random() < 0.1:
                asked = self.asked[make.choice(list(self.asked))]
                for out in self.engine.abort(asked.request.id):
                    asked.answers[out.index].take(out)
                    asked.aborted = True
        while self.engine.busy:
            self.step()
        check_idle(self.engine)
        self.report.happened["preemptions"] += self.engine.scheduler.num_preemptions
        self.report.happened["aborted"] += sum(asked.aborted for asked in self.asked.values())


def compare(traffic: Traffic, solo: Solo, drafts: bool, report: Report) -> None:
    """Adds what an engine's answers are beside those of solo runs."""
    for asked in traffic.asked.values():
        if asked.disturbed:
            report.disturbed += sum(len(answer.token_ids) for answer in asked.answers)
            continue
        key, scope = asked.request.adapter, str(asked.request.route_scope)
        lora = asked.content == "sql" or (key is not None and key.name == FIXED)
        kind = "base" if key is None else "LoRA or fixed" if lora else scope
        for index, (answer, alone) in enumerate(zip(asked.answers, solo(asked), strict=True)):
            count = len(answer.token_ids)
            same = answer.token_ids == alone.token_ids[:count]
            if answer.finish_reason is not FinishReason.ABORT:
                same = answer.token_ids == alone.token_ids and answer.finish_reason is alone.finish_reason
                same = same and [e.token_id for e in answer.logprobs] == [e.token_id for e in alone.logprobs]
            report.compared[f"{kind}, {'with' if drafts else 'without'} drafts"] += count
            if not same:
                report.mismatches.append(f"{asked.request} answer {index}: {answer.token_ids}, alone {alone.token_ids}")


def check(tokens: int, seed: int = 0) -> Report:
    """Compares so many tokens, at least, with drafts and without."""
    make, solo, report = random.Random(seed), Solo(), Report()
    tokenizer = Tokenizer.load(FOLDER / "base")
    assert tokenizer is not None
    drafts = True
    while report.tokens < tokens or not drafts:
        traffic = Traffic(make, tokenizer, drafts)
        traffic.run(requests=min(40, 4 + tokens // 100))
        compare(traffic, solo, drafts, report)
        report.happened += traffic.report.happened
        drafts = not drafts
        print(f"\r{report.tokens} tokens, {len(report.mismatches)} mismatches", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return report


def show(report: Report) -> None:
    for kind, count in sorted(report.compared.items()):
        print(f"{kind:32} {count:8} tokens")
    print(f"{'batch scope, changed by others':32} {report.disturbed:8} tokens, not compared")
    print(", ".join(f"{name}: {count}" for name, count in report.happened.items()))
    for mismatch in report.mismatches[:5]:
        print(mismatch)
    print(f"{report.tokens} tokens compared: {len(report.mismatches)} mismatches")


def main() -> int:
    flags = arguments()
    report = check(flags.tokens, flags.seed)
    show(report)
    return 1 if report.mismatches else 0


if __name__ == "__main__":
    sys.exit(main())
