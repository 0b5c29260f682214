"""Training data: JSONL records to token examples, checked line by line before anything trains.

A record is `{"prompt": str, "completion": str}` or `{"messages": [{"role", "content"}, ...]}` whose last message is the
assistant's; either may carry `"task": str`, which names its sub-task (figures show it; under `batch`
routes, a batch holds one sub-task).
"""

import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tucka_runtime.errors import TuckaError
from tucka_runtime.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
SHOWN = 10  # bad lines listed in one error


class DataError(TuckaError):
    """The training data cannot be used; the message lists line numbers and reasons."""


@dataclass(frozen=True)
class Example:
    """ids of prompt and completion (with the end token) and where the completion starts."""

    ids: tuple[int, ...]
    start: int
    task: str


def _text(record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{key!r} must be a non-empty string")
    _check_whole(value)
    return value


def _check_whole(text: str) -> None:
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise ValueError("a text holds half a surrogate pair: a character was cut in two where the file was written")


def _messages(record: dict[str, Any]) -> list[dict[str, str]]:
    messages = record["messages"]
    if not isinstance(messages, list) or len(messages) < 2:
        raise ValueError("'messages' must be a list of at least two messages")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise ValueError(f"message {i + 1} must be an object with exactly 'role' and 'content'")
        if message["role"] not in ROLES:
            raise ValueError(f"message {i + 1} has a role other than {', '.join(ROLES)}")
        if not isinstance(message["content"], str) or not message["content"]:
            raise ValueError(f"message {i + 1} needs a non-empty string as 'content'")
        _check_whole(message["content"])
    if messages[-1]["role"] != "assistant":
        raise ValueError("the last message must be the assistant's: it is what is learnt")
    return messages


def encode(record: Any, tokenizer: Tokenizer, max_length: int) -> Example:
    """One record to an example, in the tokens that a request and its answer have where they are served.

    Raises ValueError with the reason when it cannot be used, DataError when no other of its kind could be either.
    """
    if not isinstance(record, dict):
        raise ValueError("a record must be a JSON object")
    chat = "messages" in record
    unknown = set(record) - ({"messages", "task"} if chat else {"prompt", "completion", "task"})
    if unknown:
        raise ValueError(f"unknown key {sorted(unknown)[0]!r}; expected prompt and completion, or messages")
    task = record.get("task", "all")
    if not isinstance(task, str):
        raise ValueError("'task' must be a string")
    if chat:
        if tokenizer.chat_template is None:
            raise DataError(
                "The records have 'messages', which need a chat template, and this base's tokenizer has none. Use "
                "records with prompt/completion, or the base's chat version; nothing was trained."
            )
        messages = _messages(record)
        prompt, completion = tokenizer.render(messages[:-1]), tokenizer.shield(messages[-1]["content"])
    else:
        prompt, completion = _text(record, "prompt"), _text(record, "completion")
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=not chat)
    answer = tokenizer.encode_completion(prompt, completion, add_special_tokens=not chat)
    ids = [*prompt_ids, *answer, tokenizer.ends[0]]
    if not prompt_ids:
        raise ValueError("the prompt has no tokens")
    if len(ids) > max_length:
        raise ValueError(f"{len(ids)} tokens are more than the limit of {max_length}; shorten it or raise --max-length")
    return Example(tuple(ids), len(prompt_ids), task)


def encode_all(lines: Iterable[tuple[int, Any]], tokenizer: Tokenizer, max_length: int) -> list[Example]:
    """(line number, record or its JSON text) pairs to examples. Raises DataError listing every bad line's reason."""
    examples, bad = [], []
    for number, line in lines:
        try:
            record = json.loads(line) if isinstance(line, str) else line
            examples.append(encode(record, tokenizer, max_length))
        except json.JSONDecodeError as error:
            bad.append(f"line {number}: not JSON ({error.msg} at column {error.colno})")
        except ValueError as error:
            bad.append(f"line {number}: {error}")
    if bad:
        more = f"\n... and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise DataError(f"{len(bad)} bad records; nothing was trained:\n" + "\n".join(bad[:SHOWN]) + more)
    return examples


def load(path: Path, tokenizer: Tokenizer, max_length: int) -> list[Example]:
    """Examples of a JSONL file, with a byte order mark or not; blank lines are skipped.

    Raises DataError for bad lines, bad UTF-8, or no records.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"line {line}: not UTF-8. Save the file as UTF-8; nothing was trained.") from error
    except OSError as error:
        raise DataError(f"The data file {path} cannot be read: {error.strerror}.") from error
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise DataError(f"The data file {path} holds no records: one JSON object a line is expected.")
    return encode_all(lines, tokenizer, max_length)


def split(examples: list[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(training, evaluation): `fraction` of the distinct prompts, at least one where possible, is held out.

    Equal prompts stay on one side, so that evaluation never sees a trained prompt.
    """
    by_prompt: dict[tuple[int, ...], list[Example]] = defaultdict(list)
    for example in examples:
        by_prompt[example.ids[: example.start]].append(example)
    prompts = sorted(by_prompt)
    random.Random(seed).shuffle(prompts)
    count = 0 if fraction == 0 or len(prompts) < 2 else max(1, round(fraction * len(prompts)))
    held = prompts[:count]
    return ([e for p in prompts[count:] for e in by_prompt[p]], [e for p in sorted(held) for e in by_prompt[p]])


def epoch(examples: list[Example], batch_size: int, seed: int, number: int, by_task: bool) -> list[list[Example]]:
    """Micro-batches of one epoch: a function of (seed, number) alone, so that a resumed run sees the same ones.

    by_task: every batch holds one sub-task only, so that its single route means something. A last batch that is not
    full is topped up from the start of the same sub-task's order.
    """
    rng = random.Random(seed * 1_000_003 + number)
    pools: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        pools[example.task if by_task else ""].append(example)
    batches = []
    for name in sorted(pools):
        pool = pools[name]
        rng.shuffle(pool)
        size = min(batch_size, len(pool))
        for i in range(0, len(pool), size):
            batch = pool[i : i + size]
            batches.append(batch + pool[: size - len(batch)])
    rng.shuffle(batches)
    return batches


def collate(batch: list[Example], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, attention_mask and labels (-100 outside completions), all (B, S), padded on the right."""
    longest = max(len(e.ids) for e in batch)
    ids = torch.full((len(batch), longest), pad)
    mask = torch.zeros((len(batch), longest), dtype=torch.int64)
    labels = torch.full((len(batch), longest), -100)
    for row, e in enumerate(batch):
        tokens = torch.tensor(e.ids)
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
        labels[row, e.start : len(tokens)] = tokens[e.start :]
    return ids, mask, labels


def tasks(examples: list[Example]) -> dict[str, int]:
    """How many examples each sub-task has."""
    return dict(sorted(Counter(e.task for e in examples).items()))
