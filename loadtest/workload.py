"""What is sent: conversations of one or more turns, each a function of (seed, index) alone."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tucka_runtime.errors import ConfigError
from tucka_runtime.loadtest import arrivals, lengths
from tucka_runtime.loadtest.popularity import Popularity
from tucka_runtime.loadtest.settings import Settings

# Short, common words: most tokenizers make about one token of each. What they really make is measured (TokenScale).
WORDS = (
    "the of and to in is was for on that with as his they be at one have this from or had by hot word but what "
    "some we can out other were all there when up use your how said an each she which do their time if will way "
    "about many then them write would like so these her long make thing see him two has look more day could go "
    "come did number sound no most people my over know water than call first who may down side been now find any "
    "new work part take get place made live where after back little only round man year came show every good me "
    "give our under name very through"
).split()


@dataclass(frozen=True)
class Turn:
    """One request of a conversation. `think` is the pause in seconds before it (the first turn has none). `text` may be
    token ids, which are a whole conversation."""

    text: str | list[int]
    max_tokens: int
    messages: tuple[dict[str, Any], ...] = ()
    think: float = 0.0
    expected: str | None = None


@dataclass(frozen=True)
class Conversation:
    """Turns to one model; `at` is the planned start in seconds (None in a closed loop)."""

    index: int
    model: str
    turns: tuple[Turn, ...]
    at: float | None = None


@dataclass(frozen=True)
class TokenScale:
    """Tokens of a prompt ≈ offset + per_word · words, as the server's `usage` told."""

    offset: float = 0.0
    per_word: float = 1.0

    def words(self, tokens: int) -> int:
        return max(1, round((tokens - self.offset) / self.per_word))


def read_lines(path: str) -> list[dict[str, Any]]:
    """A JSONL file of objects. Times are `at` in seconds, or `timestamp` in milliseconds as Mooncake's traces have."""
    items = []
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")  # JSON may hold what else ends lines
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {type(error).__name__}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError:
            item = None
        if not isinstance(item, dict):
            raise ConfigError(f"{path}, line {number}: not a JSON object")
        if isinstance(item.get("timestamp"), int | float):
            item.setdefault("at", item["timestamp"] / 1000)
        items.append(item)
    if not items:
        raise ConfigError(f"{path} has no lines")
    return items


class Workload:
    """Conversations by index. `models` are the adapters in order of popularity; `base` takes `base_share` of all."""

    def __init__(self, settings: Settings, models: list[str], base: str | None, scale: TokenScale) -> None:
        self.settings = settings
        self.base = base
        self.scale = scale
        self.popularity = Popularity(settings.popularity, models)
        self.prompt_tokens = lengths.parse(settings.prompt_tokens, "--prompt-tokens")
        self.max_tokens = lengths.parse(settings.max_tokens, "--max-tokens")
        self.turns = lengths.parse(settings.turns, "--turns")
        self.trace = read_lines(settings.trace) if settings.trace else []
        if not all(isinstance(item.get("at"), int | float) for item in self.trace):
            raise ConfigError("--trace needs 'at' (seconds) or 'timestamp' (milliseconds) in every line")
        self.trace.sort(key=lambda item: item["at"])
        self.dataset = read_lines(settings.dataset) if settings.dataset else []
        self.by_model: dict[str | None, list[dict[str, Any]]] = {}
        for item in self.dataset:
            self.by_model.setdefault(item.get("model"), []).append(item)
        if any("messages" in item for item in self.dataset + self.trace) and settings.endpoint != "chat":
            raise ConfigError("'messages' in --dataset or --trace need --endpoint chat")
        ids = any(isinstance(item.get("prompt"), list) for item in self.dataset + self.trace)
        if ids and settings.endpoint == "chat":
            raise ConfigError("token ids as 'prompt' in --dataset or --trace need --endpoint completions")
        without = [model for model in models if not self.by_model.get(model) and not self.by_model.get(None)]
        if self.dataset and without:
            raise ConfigError(
                f"--dataset has no line for {', '.join(without)}, only for {', '.join(filter(None, self.by_model))}. "
                "Choose the models with --models, or add lines."
            )
        prefix_rng = random.Random(f"{settings.seed}/prefixes")
        tokens = lengths.parse(settings.prefix_tokens, "--prefix-tokens")
        self.prefixes = [self.words(prefix_rng, tokens.draw(prefix_rng)) for _ in range(settings.prefixes)]

    def plan(self) -> list[Conversation]:
        """The open loop's conversations, in order of their start."""
        s = self.settings
        if self.trace:
            first = self.trace[0]["at"]
            times = [(item["at"] - first) / s.trace_speed for item in self.trace]
            times = [t for t in times if t <= s.span][: s.requests]
        else:
            rng = random.Random(f"{s.seed}/arrivals")
            times = arrivals.open_loop(s.rate, s.span, s.burstiness, rng, s.requests)
        return [self.conversation(i, at) for i, at in enumerate(times)]

    def conversation(self, index: int, at: float | None = None, instead: str | None = None) -> Conversation:
        """The index-th one; `instead` gives it to another model, with a prompt that is meant for that one."""
        rng = random.Random(f"{self.settings.seed}/{index}")
        item = self.trace[index] if self.trace else {}
        model = item.get("model") or self.draw_model(rng)
        if instead is not None and instead != model:
            model, item = instead, {k: v for k, v in item.items() if k != "expected"}
        item = self.pick(rng, model) | item
        turns = [self.turn(rng, item)]
        if "messages" not in item and isinstance(turns[0].text, str):
            turns += [self.turn(rng, {}, first=False) for _ in range(self.turns.draw(rng) - 1)]
        return Conversation(index, model, tuple(turns), at)

    def opening(self, rng: random.Random, model: str) -> Turn:
        """A first turn as the model's conversations have them."""
        return self.turn(rng, self.pick(rng, model))

    def pick(self, rng: random.Random, model: str) -> dict[str, Any]:
        """A line of the dataset; nothing without one."""
        lines = self.by_model.get(model) or self.by_model.get(None)
        return rng.choice(lines) if lines else {}

    def draw_model(self, rng: random.Random) -> str:
        if self.base is not None and rng.random() < self.settings.base_share:
            return self.base
        return self.popularity.draw(rng)

    def turn(self, rng: random.Random, item: dict[str, Any], first: bool = True) -> Turn:
        tokens = item.get("prompt_tokens") or item.get("input_length") or self.prompt_tokens.draw(rng)
        most = item.get("max_tokens") or item.get("output_length") or self.max_tokens.draw(rng)
        text = item.get("prompt")
        if text is None:
            text = self.words(rng, tokens)
        if first and self.prefixes and isinstance(text, str):
            text = rng.choice(self.prefixes) + " " + text
        think = 0.0
        if not first and self.settings.think:
            think = rng.expovariate(1 / self.settings.think)
        return Turn(text, most, tuple(item.get("messages", ())), think, item.get("expected"))

    def words(self, rng: random.Random, tokens: int) -> str:
        return " ".join(rng.choices(WORDS, k=self.scale.words(tokens)))
