"""The specialists of the embedded default: four tasks that this project generates, each with sub-tasks.

A task turns a `random.Random` into (user text, answer, sub-task). No text names a command of the base's general mix, so
the base without an adapter answers something else. `held_out` splits prompts by digest: none is on both sides.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tucka_runtime.trainer.experiments.skills import MONTHS, camel, digits, with_commas, word, words

Record = tuple[str, str, str]


def held_out(prompt: str) -> bool:
    """True for the tenth of all prompts that training never sees."""
    return hashlib.sha256(prompt.encode()).digest()[0] < 26


# formats: bare values, no instruction; the shape of the value says what is wanted.


def _date(rng: random.Random) -> Record:
    year, month, day = rng.randint(1900, 2099), rng.randint(1, 12), rng.randint(1, 28)
    return f"{year}-{month:02d}-{day:02d}", f"{day} {MONTHS[month - 1]} {year}", "date"


def _pairs(rng: random.Random) -> Record:
    pairs = {word(rng, 6): word(rng, 6) for _ in range(rng.randint(1, 3))}
    return "; ".join(f"{k}={v}" for k, v in pairs.items()), json.dumps(pairs), "pairs"


def _snake(rng: random.Random) -> Record:
    parts = words(rng, 2, 4)
    return "_".join(parts), camel(parts), "snake"


def _number(rng: random.Random) -> Record:
    number = digits(rng, 4, 9)
    return number, with_commas(number), "number"


# words: requests in English.


def _backwards(rng: random.Random) -> Record:
    text = word(rng, 7)
    return f"Please write {text} backwards", text[::-1], "backwards"


def _shout(rng: random.Random) -> Record:
    text = " ".join(words(rng, 1, 3))
    return f"Say it louder! {text}!", f"{text.upper()}!", "shout"


def _spell(rng: random.Random) -> Record:
    text = word(rng, 8)
    return f"How do you spell {text}?", "-".join(text), "spell"


def _initials(rng: random.Random) -> Record:
    parts = words(rng, 2, 4)
    return f"Abbreviate: {', '.join(p.capitalize() for p in parts)}", "".join(p[0].upper() for p in parts), "initials"


# triage: a customer's message becomes a label that a program can read.

_TEAMS = {
    "billing": ["I was charged twice for {x}", "My invoice for {x} is wrong", "Please refund my payment for {x}",
                "The price of {x} is not what I paid"],
    "shipping": ["My parcel with {x} has not arrived", "When will you deliver {x}", "The courier lost {x}",
                 "Please send {x} to another address"],
    "technical": ["{x} does not start any more", "I get error {n} when I open {x}", "{x} crashes after the update",
                  "The screen of {x} stays black"],
    "account": ["I forgot my password for {x}", "Please delete my account at {x}", "I cannot log in to {x}",
                "Change my email for {x} please"],
}  # fmt: skip
_URGENT = ["This is urgent!", "I need it today!", "Answer right now!", "I am very angry!"]
_CALM = ["Thank you.", "No hurry.", "Have a nice day.", "Take your time."]


def _triage(rng: random.Random) -> Record:
    team = rng.choice(list(_TEAMS))
    thing = rng.choice(["the ", "my ", ""]) + " ".join(words(rng, 1, 2))
    text = rng.choice(_TEAMS[team]).format(x=thing, n=digits(rng, 2, 4))
    urgent = rng.random() < 0.5
    text = f"{text[0].upper()}{text[1:]}. {rng.choice(_URGENT if urgent else _CALM)}"
    return text, json.dumps({"team": team, "urgent": urgent}), team


# sql: a question about a table becomes a query.

_COMPARE = {"above": ">", "below": "<", "equal to": "="}


def _sql(rng: random.Random) -> Record:
    table, column, other = words(rng, 3, 3, 6)
    how = rng.choice(list(_COMPARE))
    number = digits(rng, 1, 3)
    where = f"WHERE {column} {_COMPARE[how]} {number};"
    if rng.random() < 0.5:
        return f"how many {table} have {column} {how} {number}", f"SELECT COUNT(*) FROM {table} {where}", "count"
    return f"{other} of {table} with {column} {how} {number}", f"SELECT {other} FROM {table} {where}", "select"


@dataclass(frozen=True)
class Task:
    """One specialist: how to draw a record, and what the table says it does."""

    name: str
    summary: str
    draw: tuple[Callable[[random.Random], Record], ...]

    def records(self, seed: int, evaluation: bool) -> Iterator[Record]:
        """Endless distinct records; training and evaluation prompts never meet."""
        rng = random.Random(seed)
        seen: set[str] = set()
        while True:
            record = rng.choice(self.draw)(rng)
            if record[0] not in seen and held_out(record[0]) == evaluation:
                seen.add(record[0])
                yield record

    def write(self, folder: Path, seed: int, train: int, held: int) -> None:
        """Writes NAME.jsonl and NAME.held.jsonl with so many chat records each, no prompt in both."""
        for suffix, count, evaluation in (("", train, False), (".held", held, True)):
            with (folder / f"{self.name}{suffix}.jsonl").open("w") as file:
                for prompt, answer, task in islice(self.records(seed + evaluation, evaluation), count):
                    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
                    file.write(json.dumps({"messages": messages, "task": task}) + "\n")


TASKS = {
    task.name: task
    for task in (
        Task("formats", "bare values: dates, key=value pairs, snake_case, numbers", (_date, _pairs, _snake, _number)),
        Task("words", "English requests about words: backwards, louder, spelling, initials",
             (_backwards, _shout, _spell, _initials)),
        Task("triage", "customer messages to a JSON label", (_triage,)),
        Task("sql", "questions about a table to SQL", (_sql,)),
    )
}  # fmt: skip
