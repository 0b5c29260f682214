"""What a replica's work takes, as it was measured: the file that `tucka plan --measure` writes."""

import json
from bisect import bisect_left
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tucka_runtime.errors import ConfigError

FORMAT = "tucka-plan-profile/2"


@dataclass(frozen=True)
class Profile:
    """Times are in seconds.

    `rows` are the numbers of decoding sequences that were timed, two or more in rising order; `one_adapter` is what a
    step of so many took when all had the same adapter, `own_adapters` when they had as many as `adapters` says.
    `prompt_seconds` is what so many tokens of prompts add to a step as `prompt_tokens` says, two or more, rising.
    `load` and `activate` are what it takes to bring an adapter into its slot from the disk and from the host cache,
    `load_beside` the former while the engine computes, and `step_beside` how many times as long steps take meanwhile.
    `request` is what a first token takes beyond the engine's work: HTTP, tokenizer, the way between the processes.

    So many `servers` share a machine; `crowded` is how many times as long a step takes while all of them compute.
    `adapter_bytes`: of a folded adapter, the mean. `measured` says when, where and how.
    """

    rows: list[int]
    one_adapter: list[float]
    adapters: list[int]
    own_adapters: list[float]
    prompt_tokens: list[float]
    prompt_seconds: list[float]
    load: float
    load_beside: float
    step_beside: float
    activate: float
    request: float
    servers: int
    crowded: float
    adapter_bytes: int
    measured: dict[str, str]

    def step(self, rows: int, adapters: int) -> float:
        """A step of so many rows of so many adapters. Between measured numbers it is interpolated; beyond the last it
        goes on as between the last two."""
        i = min(max(bisect_left(self.rows, rows), 1), len(self.rows) - 1)
        low, high = self._at(i - 1, adapters), self._at(i, adapters)
        share = (rows - self.rows[i - 1]) / (self.rows[i] - self.rows[i - 1])
        return max(low + share * (high - low), 0.0)

    def prompts(self, most: int) -> list[float]:
        """What 0 to `most` tokens of prompts add to a step. Fewer than were timed cost what the fewest did; beyond the
        last it goes on as between the last two."""
        (before, last), (low, high) = self.prompt_tokens[-2:], self.prompt_seconds[-2:]
        tokens = np.arange(1, most + 1)
        beyond = high + (tokens - last) * max(high - low, 0.0) / (last - before)
        seconds = np.interp(tokens, self.prompt_tokens, self.prompt_seconds)
        return [0.0, *np.where(tokens > last, beyond, seconds).tolist()]

    def _at(self, i: int, adapters: int) -> float:
        """A step of `rows[i]` rows. More adapters than were timed cost what those did."""
        timed = self.adapters[i]
        share = (min(adapters, timed) - 1) / (timed - 1) if timed > 1 else 0.0
        return self.one_adapter[i] + share * (self.own_adapters[i] - self.one_adapter[i])

    def write(self, path: Path) -> None:
        """Raises ConfigError where that cannot be."""
        try:
            path.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}.") from None


def read_profile(path: Path) -> Profile:
    """Raises ConfigError for a file that is no profile."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("format") != FORMAT:
            raise ValueError
        profile = Profile(**values)
        lists = (profile.rows, profile.one_adapter, profile.adapters, profile.own_adapters)
        times = [*profile.one_adapter, *profile.own_adapters]
        times += [*profile.prompt_seconds, profile.load, profile.load_beside, profile.activate, profile.request]
        times += [profile.step_beside - 1, profile.crowded - 1]
        whole = len({len(some) for some in lists}) == 1 and profile.rows == sorted(set(profile.rows))
        prompts = profile.prompt_tokens
        whole = whole and len(profile.prompt_seconds) == len(prompts) > 1 and prompts == sorted(set(prompts))
        counts = min(profile.rows[:1] + profile.adapters + [profile.adapter_bytes, profile.servers])
        if not (len(profile.rows) > 1 and whole and counts >= 1 and all(0 <= seconds < 1e6 for seconds in times)):
            raise ValueError
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ConfigError(
            f"{path} is no profile of this version. Make one: tucka plan --measure URL -o profile.json"
        ) from None
    return profile
