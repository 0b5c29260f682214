"""Which modules an adapter touches: PEFT's matching of names, with regular expressions kept on a leash.

A regular expression in an adapter's configuration is foreign input, and Python's backtracking matcher can run for years
on a short one while it holds the interpreter. Names without operators are matched here; anything else is matched by a
child interpreter with limits on its processor time, memory and wall clock, which costs about 30 ms.
"""

import json
import re
import signal
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from tucka_runtime.adapters.config import PeftSpec
from tucka_runtime.adapters.files import CONFIG_NAME
from tucka_runtime.children import python
from tucka_runtime.errors import InvalidAdapterError, TuckaError

MAX_REGEX_SECONDS = 2  # processor time; an ordinary expression takes milliseconds on a model's few hundred names
MAX_REGEX_WAIT = 20  # wall clock, on a machine that has other things to do
MAX_REGEX_BYTES = 256 * 2**20
MAX_MATCHES_HERE = 50_000  # about 30 ms; a rank pattern may have thousands of entries, each tried on every name

ALL_LINEAR = "all-linear"

V = TypeVar("V")

_PLAIN = re.compile(r"\^?[\w.-]*\$?", re.ASCII)

_MALFORMED = 3  # the child's exit status; Python's own for whatever else happens is 1

_CHILD = f"""
import json, re, resource, sys
seconds, memory, patterns, names = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
try:
    rows = [[bool(regex.fullmatch(name)) for name in names] for regex in map(re.compile, patterns)]
except (re.error, OverflowError, RecursionError, MemoryError):
    sys.exit({_MALFORMED})
json.dump(rows, sys.stdout)
"""


def match_targets(config: PeftSpec, names: Iterable[str]) -> list[str]:
    """Returns those of `names` (dotted module paths) that the configuration adapts, in the given order.

    As PEFT has it: an entry of a list matches the name it equals and those that end with "." + entry, of which
    `layers_to_transform` keeps the listed layers; a string is a regular expression for the whole name; what
    `exclude_modules` or `modules_to_save` reach is left out. "all-linear" takes every name: give linears only.
    Raises InvalidAdapterError for a regular expression that is malformed or takes too long, TuckaError where the
    matching itself failed, which is not the adapter's fault.
    """
    names = list(names)
    if config.exclude_modules:
        excluded = _matching(config.exclude_modules, names)
        names = [name for name in names if name not in excluded]
    for saved in set(config.modules_to_save or ()):
        names = [name for name in names if f".{saved}." not in f".{name}."]
    if is_all_linear(config):
        return names
    matching = _matching(config.target_modules, names)
    exact = set(config.target_modules)
    return [name for name in names if name in matching and (name in exact or _in_layers(config, name))]


def is_all_linear(config: PeftSpec) -> bool:
    """Whether the target is PEFT's shorthand for every linear but the head."""
    return isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR


def pattern_values(patterns: Mapping[str, V], names: Sequence[str], default: V) -> dict[str, V]:
    """Returns for each name the value of the first pattern that matches its end at a dot, else the default (PEFT's
    `rank_pattern` and `alpha_pattern`). Raises InvalidAdapterError as `match_targets` does."""
    found = dict.fromkeys(names, default)
    hits = _fullmatch([rf"(.*\.)?({pattern})" for pattern in patterns], names, plain=patterns)
    for value, row in reversed(list(zip(patterns.values(), hits, strict=True))):
        found.update({name: value for name, hit in zip(names, row, strict=True) if hit})
    return found


def _matching(entries: list[str] | str, names: list[str]) -> set[str]:
    if isinstance(entries, str):
        (row,) = _fullmatch([entries], names, plain=[entries])
        return {name for name, hit in zip(names, row, strict=True) if hit}
    wanted = set(entries)
    return {name for name in names if not wanted.isdisjoint(_suffixes(name))}


def _suffixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _in_layers(config: PeftSpec, name: str) -> bool:
    wanted = config.layers_to_transform
    if wanted is None or wanted == []:
        return True
    patterns = config.layers_pattern or [""]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        index = _layer_index(name, pattern)
        if index is not None:
            return index == wanted if isinstance(wanted, int) else index in wanted
    return False


def _layer_index(name: str, pattern: str) -> int | None:
    """The first number in the name that stands behind `pattern` (any two parts if that is empty) and before a part."""
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        behind = i >= 2 if not pattern else f".{'.'.join(parts[:i])}".endswith(f".{pattern}")
        if part.isdecimal() and behind:
            return int(part)
    return None


def _fullmatch(patterns: Sequence[str], names: Sequence[str], plain: Iterable[str]) -> list[list[bool]]:
    """A row per pattern, a column per name. In this process if all of `plain`, what the adapter wrote, is harmless."""
    if len(patterns) * len(names) <= MAX_MATCHES_HERE and all(_PLAIN.fullmatch(text) for text in plain):
        return [[regex.fullmatch(name) is not None for name in names] for regex in map(re.compile, patterns)]
    job = json.dumps([MAX_REGEX_SECONDS, MAX_REGEX_BYTES, list(patterns), list(names)])
    try:
        child = subprocess.run(
            python("-I", "-S", "-W", "ignore", "-c", _CHILD),
            input=job.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=MAX_REGEX_WAIT,
            env={},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _failed(type(error).__name__) from error
    if child.returncode == -signal.SIGXCPU:
        raise _refused("takes too long")
    if child.returncode == _MALFORMED:
        raise _refused("is malformed")
    if child.returncode:
        raise _failed(f"status {child.returncode}")
    rows: list[list[bool]] = json.loads(child.stdout)
    return rows


def _refused(why: str) -> InvalidAdapterError:
    return InvalidAdapterError(
        f"the adapter's {CONFIG_NAME} cannot be used: a regular expression in it {why}. List the module names instead."
    )


def _failed(why: str) -> TuckaError:
    return TuckaError(
        f"The adapter's regular expressions could not be matched: their process failed ({why}). Try again."
    )
