"""The general mix that the embedded base is pre-trained on: small text skills behind one command style.

Every example is a (user text, answer) pair made from a `random.Random`; nothing comes from outside. A known command
(`rev: stone`) gets the skill's answer; any other text gets `You said: <text>`. So the base has the primitives (copying,
reversing, upper case, month names, JSON) but no idea that a bare date or an English request could ask for one.
"""

import json
import random
from collections.abc import Callable

WORDS = """apple river stone cloud table window garden music paper silver winter summer forest bridge candle butter
coffee dragon engine flower guitar hammer island jacket kitchen ladder market needle orange pencil quartz rabbit saddle
ticket umbrella velvet wagon yellow zebra anchor basket cactus desert eagle falcon glove honey igloo jungle kettle lemon
magnet night ocean planet queen rocket sunset tiger union violet whale yarn acorn beach castle diamond ember feather
grape harbor iron jewel kite leaf mirror nest olive pearl quill robot shadow tower urn valley water yacht zipper train
lamp horse clock bread chair dance earth field glass heart idea judge knife light mouse nurse opera piano quiet rain
snow tree uncle voice world youth book cake door fish gold hill ice jam king lake moon name""".split()
MONTHS = "January February March April May June July August September October November December".split()
LETTERS = "abcdefghijklmnopqrstuvwxyz"

Pair = tuple[str, str]


def word(rng: random.Random, longest: int = 9) -> str:
    """An English word, or letters that read like one, at most `longest` letters long."""
    if rng.random() < 0.35:
        found = rng.choice(WORDS)
        if len(found) <= longest:
            return found
    if rng.random() < 0.3:
        return "".join(rng.choice(LETTERS) for _ in range(rng.randint(2, longest)))
    out = ""
    while len(out) < rng.randint(3, longest):
        out += rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") + rng.choice(["", "", "n", "r", "s", "l"])
    return out[:longest]


def words(rng: random.Random, least: int, most: int, longest: int = 7) -> list[str]:
    return [word(rng, longest) for _ in range(rng.randint(least, most))]


def digits(rng: random.Random, least: int, most: int) -> str:
    """A number of `least` to `most` digits that does not start with 0."""
    n = rng.randint(least, most)
    return str(rng.randint(10 ** (n - 1), 10**n - 1))


def with_commas(number: str) -> str:
    return f"{int(number):,}"


def camel(parts: list[str]) -> str:
    return parts[0] + "".join(p.capitalize() for p in parts[1:])


def _free_text(rng: random.Random) -> str:
    """Text of any shape: what the base only repeats."""
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice("-/.:").join(digits(rng, 1, 4) for _ in range(rng.randint(2, 4)))
    if kind == 1:
        return rng.choice([";", "; ", ", ", "&"]).join(f"{word(rng)}={word(rng)}" for _ in range(rng.randint(1, 3)))
    if kind == 2:
        return rng.choice("_-.").join(words(rng, 2, 4))
    if kind == 3:
        return digits(rng, 1, 9)
    text = words(rng, 2, 7)
    if kind == 4:
        text[rng.randrange(len(text))] = digits(rng, 1, 5)
    return " ".join(text).capitalize() + rng.choice(["", ".", "?", "!"])


def _say(rng: random.Random) -> Pair:
    text = _free_text(rng)
    return text, f"You said: {text}"


def _copy(rng: random.Random) -> Pair:
    text = " ".join(words(rng, 1, 4))
    return f"copy: {text}", text


def _reverse(rng: random.Random) -> Pair:
    text = word(rng, 7)
    return f"rev: {text}", text[::-1]


def _upper(rng: random.Random) -> Pair:
    text = " ".join(words(rng, 1, 3))
    return f"up: {text}", text.upper()


def _title(rng: random.Random) -> Pair:
    parts = words(rng, 1, 3)
    return f"title: {' '.join(parts)}", " ".join(p.capitalize() for p in parts)


def _camel(rng: random.Random) -> Pair:
    parts = words(rng, 2, 4)
    return f"camel: {' '.join(parts)}", camel(parts)


def _spell(rng: random.Random) -> Pair:
    text = word(rng, 8)
    return f"spell: {text}", "-".join(text)


def _month(rng: random.Random) -> Pair:
    n = rng.randint(1, 12)
    day = rng.randint(1, 28)
    return f"month: {n:02d}-{day:02d}", f"{day} {MONTHS[n - 1]}"


def _commas(rng: random.Random) -> Pair:
    number = digits(rng, 1, 9)
    return f"commas: {number}", with_commas(number)


def _join(rng: random.Random) -> Pair:
    parts = words(rng, 2, 4)
    return f"join: {' '.join(parts)}", "_".join(parts)


def _split(rng: random.Random) -> Pair:
    parts = words(rng, 2, 4)
    return f"split: {'_'.join(parts)}", " ".join(parts)


def _pick(rng: random.Random) -> Pair:
    parts = words(rng, 3, 3)
    name, at = rng.choice([("first", 0), ("second", 1), ("last", 2)])
    return f"{name}: {' '.join(parts)}", parts[at]


def _swap(rng: random.Random) -> Pair:
    a, b = words(rng, 2, 2)
    return f"swap: {a} {b}", f"{b} {a}"


def _object(rng: random.Random) -> Pair:
    pairs = {word(rng, 6): word(rng, 6) if rng.random() < 0.6 else digits(rng, 1, 4) for _ in range(rng.randint(1, 2))}
    return f"json: {' '.join(f'{k} {v}' for k, v in pairs.items())}", json.dumps(pairs)


def _get(rng: random.Random) -> Pair:
    pairs = {word(rng, 6): word(rng, 6) for _ in range(rng.randint(2, 3))}
    key = rng.choice(list(pairs))
    return f"get {key}: {'; '.join(f'{k}={v}' for k, v in pairs.items())}", pairs[key]


SKILLS: dict[str, Callable[[random.Random], Pair]] = {
    "say": _say, "copy": _copy, "reverse": _reverse, "upper": _upper, "title": _title, "camel": _camel,
    "spell": _spell, "month": _month, "commas": _commas, "join": _join, "split": _split, "pick": _pick,
    "swap": _swap, "object": _object, "get": _get,
}  # fmt: skip
# Repeating free text is the skill that everything else is built from, reversing the one that takes longest to learn.
WEIGHTS = {"say": 4.0, "reverse": 2.0}


def general(rng: random.Random) -> Pair:
    """One example of the mix."""
    names = list(SKILLS)
    name = rng.choices(names, [WEIGHTS.get(n, 1.0) for n in names])[0]
    return SKILLS[name](rng)


def copies(rng: random.Random) -> Pair:
    """One example of copying alone: what pre-training starts with."""
    return _say(rng) if rng.random() < 0.5 else _copy(rng)
