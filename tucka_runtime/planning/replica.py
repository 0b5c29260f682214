"""One replica on paper: slots, queue and steps as the engine has them."""

import math
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush

from tucka_runtime.config import EngineConfig
from tucka_runtime.planning.arrivals import Arrivals
from tucka_runtime.planning.profile import Profile
from tucka_runtime.planning.slots import Event, Later, Slots

LEAST_PROMPT = 16
"""Tokens of prompts that a step takes beside decoding ones at least, as engine/pace.py has it."""

SERVE = EngineConfig()


@dataclass(frozen=True)
class ReplicaSettings:
    """What `tucka serve` would be started with. `host` is the host cache's room, in adapters."""

    slots: int
    host: int
    max_num_seqs: int = SERVE.max_num_seqs
    max_num_batched_tokens: int = SERVE.max_num_batched_tokens
    decode_stretch: float = SERVE.decode_stretch


class Times:
    """What steps take, looked up: by rows and adapters. `room` has the tokens of prompts that fit beside so many
    decoding rows, as the engine's `Pace` lets them."""

    def __init__(self, profile: Profile, settings: ReplicaSettings) -> None:
        most, stretch = settings.max_num_seqs, settings.decode_stretch
        self.steps = [
            [max(profile.step(rows, adapters), 1e-9) for adapters in range(rows + 1)] for rows in range(most + 1)
        ]
        self.prompt_token = profile.prompt_token
        self.room = [settings.max_num_batched_tokens - rows for rows in range(most + 1)]
        if stretch and self.prompt_token:
            for rows in range(1, most + 1):
                beside = int((stretch - 1) * self.steps[rows][1] / self.prompt_token)
                self.room[rows] = min(self.room[rows], max(beside, LEAST_PROMPT))


class PaperReplica:
    """Serves requests, numbers of `arrivals`, in the order in which they have their slots. `first` gets the time of
    each one's first token; `finished` is told of its last. Every sequence gets the KV blocks that it needs: nothing is
    preempted, and no prompt shares another's beginning."""

    def __init__(
        self,
        arrivals: Arrivals,
        settings: ReplicaSettings,
        profile: Profile,
        times: Times,
        later: Later,
        first: Callable[[int, float], None],
        finished: Callable[[int, float], None],
    ) -> None:
        self._adapter, self._prompt, self._output = arrivals.adapter, arrivals.prompt, arrivals.output
        self._seats, self._times = settings.max_num_seqs, times
        self._later, self._first, self._finished = later, first, finished
        self.slots = Slots(settings.slots, settings.host, profile.load, profile.activate, later)
        self._waiting: deque[int] = deque()
        self._prefilling: list[list[int]] = []  # (request, tokens of its prompt that are left), in order
        self._decoding: list[tuple[int, int]] = []  # a heap of (`_done` at its last token, request)
        self._done = 0  # decoding steps so far
        self._adapters: Counter[int] = Counter()  # of the running sequences
        self._begin = self._end = 0.0
        self._steps = 0  # that are under way, each of them `_seconds` long
        self._seconds = 0.0
        self.busy = 0.0
        """Seconds in which it computed."""

    def arrive(self, request: int, now: float) -> None:
        self._take_in(self.slots.want(self._adapter[request], request, now), now)

    def happen(self, event: Event, now: float) -> None:
        """An event that it asked for is there."""
        if event is Event.LOADED:
            self._take_in(self.slots.loaded(now), now)
        elif event is Event.TURN:
            self._take_in(self.slots.turn(now), now)
        elif now == self._end and self._steps:  # else a later event was put in its place
            self._end_steps(now)
            self._begin_steps(now)

    def _take_in(self, requests: list[int], now: float) -> None:
        """These wait for a seat in the batch from now on."""
        self._waiting.extend(requests)
        if not requests:
            return
        if not self._steps:
            self._begin_steps(now)
        elif self._steps > 1 and len(self._decoding) < self._seats:
            # Steps that only decode are planned together up to the next end; now only the one under way is made.
            made = max(math.ceil((now - self._begin) / self._seconds - 1e-9), 1)
            if made < self._steps:
                self._plan(self._begin, made, self._seconds)

    def _plan(self, begin: float, steps: int, seconds: float) -> None:
        self._begin, self._steps, self._seconds = begin, steps, seconds
        self._end = begin + steps * seconds
        self._later(self._end, Event.STEP)

    def _begin_steps(self, now: float) -> None:
        """Composes the next step as the engine's `Scheduler` does: what runs, then what waits."""
        rows = len(self._decoding)
        room = self._times.room[rows]
        tokens = prompts = 0
        for entry in self._prefilling:
            if tokens == room:
                break
            count = min(entry[1], room - tokens)
            entry[1] -= count
            tokens, prompts = tokens + count, prompts + 1
        seats = self._seats - rows - len(self._prefilling)
        while self._waiting and seats and tokens < room:
            request = self._waiting.popleft()
            self._adapters[self._adapter[request]] += 1
            count = min(self._prompt[request], room - tokens)
            self._prefilling.append([request, self._prompt[request] - count])
            tokens, prompts, seats = tokens + count, prompts + 1, seats - 1
        if not rows + prompts:
            return
        seconds = self._times.steps[rows + prompts][min(len(self._adapters), rows + prompts)]
        seconds += (tokens - prompts) * self._times.prompt_token
        self._plan(now, 1 if prompts else self._decoding[0][0] - self._done, seconds)

    def _end_steps(self, now: float) -> None:
        self._done += self._steps
        self.busy += self._steps * self._seconds
        self._steps = 0
        while self._decoding and self._decoding[0][0] <= self._done:
            self._finish(heappop(self._decoding)[1], now)
        if not self._prefilling:
            return
        for request, left in self._prefilling:
            if left:
                continue
            self._first(request, now)
            if self._output[request] > 1:
                heappush(self._decoding, (self._done + self._output[request] - 1, request))
            else:
                self._finish(request, now)
        self._prefilling = [entry for entry in self._prefilling if entry[1]]

    def _finish(self, request: int, now: float) -> None:
        adapter = self._adapter[request]
        self._adapters[adapter] -= 1
        if not self._adapters[adapter]:
            del self._adapters[adapter]
        self._waiting.extend(self.slots.leave(adapter, now))
        self._finished(request, now)
