"""Training data: records to token examples, checked one by one before anything trains.

What a record may look like, and the files they stand in: `records`. A record's `task` names its sub-task (figures show
it; under `batch` routes, a batch holds one sub-task).
"""

import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Protocol, TypeVar

import torch
from jinja2 import TemplateError
from torch import Tensor

from tucka_runtime.tokenizer import Tokenizer
from tucka_runtime.trainer.records import DataError, DataFile, TrainingRecord, normalise
from tucka_runtime.trainer.routing import UNLEARNT
from tucka_runtime.trainer.turns import Talk, piecewise

SHOWN = 10  # bad lines listed in one error
WINDOW = 50  # batches whose examples are grouped by length, as Hugging Face's Trainer does


class Learnt(Protocol):
    """What batches are made of. `key` is what may not be on both sides of what is held out; `tokens` is how many a step
    computes of it."""

    @property
    def task(self) -> str: ...

    @property
    def key(self) -> tuple[int, ...]: ...

    @property
    def tokens(self) -> int: ...


T = TypeVar("T", bound=Learnt)


@dataclass(frozen=True)
class Example:
    """ids of prompt and completion (with the end token) and where the completion starts.

    `opening` are the ids of the conversation's first prompt, where this is a later turn of it, and of a plain text all
    of its ids: else none. `gaps` are the places (first, behind the last) between turns that one example holds
    together: they are not learnt.
    """

    ids: tuple[int, ...]
    start: int
    task: str
    opening: tuple[int, ...] = ()
    gaps: tuple[tuple[int, int], ...] = field(default=(), repr=False)

    @property
    def answer(self) -> tuple[int, ...]:
        """What the first prompt is answered, without the end token."""
        return self.ids[self.start : (self.gaps[0][0] if self.gaps else len(self.ids)) - 1]

    @property
    def key(self) -> tuple[int, ...]:
        """The prompt, or that of the conversation's first turn; a plain text, which has none, is its own."""
        return self.opening or self.ids[: self.start]

    @property
    def asks(self) -> bool:
        """Whether its prompt asks for something: a plain text's first token does not."""
        return self.opening != self.ids

    @property
    def tokens(self) -> int:
        return len(self.ids)


def encode(record: Any, tokenizer: Tokenizer, max_length: int) -> Example:
    """One record's last turn, in the tokens that a request and its answer have where they are served.

    Raises ValueError with the reason when it cannot be used, DataError when no other of its kind could be either.
    """
    return encode_turns(normalise(record), tokenizer, max_length, "last")[-1]


def encode_turns(record: TrainingRecord, tokenizer: Tokenizer, max_length: int, learn: str) -> list[Example]:
    """An example for each turn of the assistant that is learnt: "all", or the "last". Each has the prompt that a
    request for that turn would have. By "generation" one example has all turns. Raises as `encode` does."""
    if record.text:
        ids = tokenizer.encode(record.text, add_special_tokens=True)
        prefix = len(tokenizer.encode("", add_special_tokens=True))
        # The first token is asked of nobody: it is the prompt where the tokenizer puts none before a text.
        start = max(prefix, 1)
        text = _example(ids[:start], _ended(ids[start:], tokenizer), record.task, max_length)
        return [replace(text, opening=text.ids)]
    if not record.messages:
        ids = tokenizer.encode(record.prompt, True)
        said = tokenizer.encode_completion(record.prompt, record.completion, True)
        return [_example(ids, _ended(said, tokenizer), record.task, max_length)]
    if learn == "generation":
        return [_whole(record, tokenizer, max_length)]
    found: list[Example] = []
    for prompt, answer, end in list(Talk(record, tokenizer).turns())[0 if learn == "all" else -1 :]:
        ids, said = (tokenizer.encode(prompt, False), tokenizer.encode_completion(prompt, answer, False))
        example = _example(ids, [*said, end], record.task, max_length)
        opening = found[0].ids[: found[0].start] if found else ()
        found.append(Example(example.ids, example.start, example.task, opening))
    return found


def _ended(said: list[int], tokenizer: Tokenizer) -> list[int]:
    """With the end token, which many data sets have spelled behind their texts already."""
    return said if said and said[-1] in tokenizer.ends else [*said, tokenizer.ends[0]]


def _whole(record: TrainingRecord, tokenizer: Tokenizer, max_length: int) -> Example:
    """A conversation as one example, in which every turn that the template marks is learnt."""
    ids, learnt = piecewise(Talk(record, tokenizer).marked(), tokenizer)
    if not learnt:
        raise ValueError("the chat template marks nothing in it with {% generation %}")
    start, end = learnt[0][0], learnt[-1][1]
    gaps = tuple((a[1], b[0]) for a, b in pairwise(learnt))
    example = _example(ids[:start], ids[start:end], record.task, max_length)
    return Example(example.ids, start, record.task, gaps=gaps)


def _example(prompt: list[int], completion: list[int], task: str, max_length: int) -> Example:
    ids = [*prompt, *completion]
    if not prompt:
        raise ValueError("the prompt has no tokens")
    check_length(ids, max_length)
    return Example(tuple(ids), len(prompt), task)


def check_length(ids: list[int], max_length: int) -> None:
    """Raises ValueError where a record is too long."""
    if len(ids) > max_length:
        raise ValueError(f"{len(ids)} tokens are more than the limit of {max_length}; shorten it or raise --max-length")


def encode_all(
    file: DataFile, encode: Callable[[Any], tuple[list[T], frozenset[str]]], strict: bool,
    tell: Callable[[str], None] | None,
) -> list[T]:  # fmt: skip
    """A file's rows to what is learnt. `encode` makes it of a record and gives the keys that it ignored, of which
    `tell` is told.

    Raises DataError listing every bad record's reason; with `strict` a key that would be ignored is one.
    """
    examples: list[T] = []
    bad: list[str] = []
    ignored: set[str] = set()
    for where, line in file.rows:
        try:
            made, unused = encode(json.loads(line) if isinstance(line, str) else line)
            if strict and unused:
                raise ValueError(f"unknown keys: {_names(unused)} (--strict)")
            ignored |= unused
            examples += made
        except json.JSONDecodeError as error:
            bad.append(f"{where}: not JSON ({error.msg} at column {error.colno})")
        except RecursionError:
            bad.append(f"{where}: nested too deeply")
        except ValueError as error:
            bad.append(f"{where}: {error}")
        except TemplateError as error:
            bad.append(f"{where}: the base's chat template refuses it: {error}")
    if bad:
        more = f"\n... and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise DataError(
            f"{len(bad)} bad records in {file.name}; nothing was trained:\n" + "\n".join(bad[:SHOWN]) + more
        )
    if ignored and tell:
        tell(f"{file.name}: ignored keys: {_names(ignored)}")
    return examples


def _names(keys: Iterable[str]) -> str:
    return ", ".join(ascii(key)[1:-1] for key in sorted(keys))


def load(
    file: DataFile, tokenizer: Tokenizer, max_length: int, learn: str = "all", strict: bool = False,
    tell: Callable[[str], None] | None = None,
) -> list[Example]:  # fmt: skip
    """Examples of a file; `tell` is told of keys that were ignored. Raises DataError as `encode_all` does."""

    def encoded(record: Any) -> tuple[list[Example], frozenset[str]]:
        known = normalise(record)
        return encode_turns(known, tokenizer, max_length, learn), known.ignored

    return encode_all(file, encoded, strict, tell)


def split(examples: list[T], fraction: float, seed: int) -> tuple[list[T], list[T]]:
    """(training, evaluation): `fraction` of the distinct prompts, at least one where possible and never all, is held
    out.

    Equal prompts stay on one side, and so do a conversation's turns, so that evaluation never sees a trained prompt.
    """
    by_prompt: dict[tuple[int, ...], list[T]] = defaultdict(list)
    for example in examples:
        by_prompt[example.key].append(example)
    prompts = sorted(by_prompt)
    random.Random(seed).shuffle(prompts)
    count = 0 if fraction == 0 or len(prompts) < 2 else min(max(1, round(fraction * len(prompts))), len(prompts) - 1)
    held = prompts[:count]
    return ([e for p in prompts[count:] for e in by_prompt[p]], [e for p in sorted(held) for e in by_prompt[p]])


def epoch(
    examples: list[T], batch_size: int, seed: int, number: int, by_task: bool, by_length: bool = False
) -> list[list[T]]:
    """Micro-batches of one epoch: a function of (seed, number) alone, so that a resumed run sees the same ones.

    by_task: every batch holds one sub-task only, so that its single route means something. A last batch that is not
    full is topped up from the start of the same sub-task's order. by_length: of WINDOW batches' examples those of
    similar length go together, so that less is padded.
    """
    rng = random.Random(seed * 1_000_003 + number)
    pools: dict[str, list[T]] = defaultdict(list)
    for example in examples:
        pools[example.task if by_task else ""].append(example)
    batches = []
    for name in sorted(pools):
        pool = pools[name]
        rng.shuffle(pool)
        size = min(batch_size, len(pool))
        if by_length:
            window = WINDOW * size
            pool = [
                e for i in range(0, len(pool), window)
                for e in sorted(pool[i : i + window], key=lambda e: -e.tokens)
            ]  # fmt: skip
        for i in range(0, len(pool), size):
            batch = pool[i : i + size]
            batches.append(batch + pool[: size - len(batch)])
    rng.shuffle(batches)
    return batches


def collate(batch: list[Example], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, attention_mask and labels (UNLEARNT outside completions), all (B, S), padded on the right."""
    longest = max(len(e.ids) for e in batch)
    ids = torch.full((len(batch), longest), pad)
    mask = torch.zeros((len(batch), longest), dtype=torch.int64)
    labels = torch.full((len(batch), longest), UNLEARNT)
    for row, e in enumerate(batch):
        tokens = torch.tensor(e.ids)
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
        labels[row, e.start : len(tokens)] = tokens[e.start :]
        for first, last in e.gaps:
            labels[row, first:last] = UNLEARNT
    return ids, mask, labels


def pack(batch: list[Example], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, position_ids and labels, all (B, S), with several examples in a row where they fit: none is cut, no
    row is longer than the longest, and positions begin anew with each, by which the model keeps them apart.

    The longest go first, each into the row that it fills best. Padding is examples of one token, without a label.
    """
    longest = max(len(e.ids) for e in batch)
    rows: list[list[Example]] = []
    left: list[int] = []
    for e in sorted(batch, key=lambda e: -len(e.ids)):
        fits = [i for i, room in enumerate(left) if room >= len(e.ids)]
        if fits:
            best = min(fits, key=left.__getitem__)
            rows[best].append(e)
            left[best] -= len(e.ids)
        else:
            rows.append([e])
            left.append(longest - len(e.ids))
    ids = torch.full((len(rows), longest), pad)
    positions = torch.zeros((len(rows), longest), dtype=torch.int64)
    labels = torch.full((len(rows), longest), UNLEARNT)
    for row, packed in enumerate(rows):
        at = 0
        for e in packed:
            own, _, learnt = collate([e], pad)
            end = at + len(e.ids)
            ids[row, at:end], labels[row, at:end] = own[0], learnt[0]
            positions[row, at:end] = torch.arange(len(e.ids))
            at = end
    return ids, positions, labels


def tasks(examples: list[Example]) -> dict[str, int]:
    """How many examples each sub-task has."""
    return dict(sorted(Counter(e.task for e in examples).items()))
