"""One replica on paper: slots, queue and steps as the engine has them."""

import math
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush

from tucka_runtime.config import EngineConfig
from tucka_runtime.engine.pace import FRESH, Pace
from tucka_runtime.planning.arrivals import Arrivals
from tucka_runtime.planning.profile import Profile
from tucka_runtime.planning.slots import Event, Later, Slots

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
    """What steps take, looked up: `steps` by rows and adapters, `prompts` what tokens of prompts add to them."""

    def __init__(self, profile: Profile, settings: ReplicaSettings) -> None:
        self.steps = [
            [max(profile.step(rows, adapters), 1e-9) for adapters in range(rows + 1)]
            for rows in range(settings.max_num_seqs + 1)
        ]
        self.prompts = profile.prompts(settings.max_num_batched_tokens)
        self.profile = profile


ALIKE = math.ceil(math.log(0.01) / math.log(1 - FRESH))
"""Of steps that take the same, so many say all to a `Pace`."""


class PaperReplica:
    """Serves requests, numbers of `arrivals`, in the order in which they have their slots. `first` gets the time of
    each one's first token; `finished` is told of its last. Every sequence gets the KV blocks that it needs: nothing is
    preempted, and no prompt shares another's beginning.

    `neighbours` are the replicas that share its machine: a step is slower that begins while they compute, or while an
    adapter is read. A load takes what it would if all stayed as it is when it begins."""

    def __init__(
        self,
        arrivals: Arrivals,
        settings: ReplicaSettings,
        times: Times,
        later: Later,
        first: Callable[[int, float], None],
        finished: Callable[[int, float], None],
    ) -> None:
        self._adapter, self._prompt, self._output = arrivals.adapter, arrivals.prompt, arrivals.output
        self._seats, self._tokens, self._times = settings.max_num_seqs, settings.max_num_batched_tokens, times
        self._later, self._first, self._finished = later, first, finished
        self.neighbours: list[PaperReplica] = []
        self.slots = Slots(settings.slots, settings.host, self._load_seconds, later)
        self._pace = Pace(settings.decode_stretch)
        self._waiting: deque[int] = deque()
        self._prefilling: list[list[int]] = []  # (request, tokens of its prompt that are left), in order
        self._decoding: list[tuple[int, int]] = []  # a heap of (`_done` at its last token, request)
        self._done = 0  # decoding steps so far
        self._adapters: Counter[int] = Counter()  # of the running sequences
        self._begin = self._end = 0.0
        self._steps = 0  # that are under way, each of them `_seconds` long
        self._seconds = 0.0
        self._step_tokens = 0  # of prompts, in the one that is under way
        self._computed = self._read = False  # as of the last event
        self.busy = 0.0
        """Seconds in which it computed."""

    def arrive(self, request: int, now: float) -> None:
        self._take_in(self.slots.want(self._adapter[request], request, now), now)
        self._tell(now)

    def happen(self, event: Event, now: float) -> None:
        """An event that it asked for is there."""
        if event is Event.LOADED:
            self.slots.done(now)
            if not self._steps:  # else the engine seats it between two steps
                self._take_in(self.slots.loaded(now), now)
        elif event is Event.TURN:
            self._take_in(self.slots.turn(now), now)
        elif now == self._end and self._steps:  # else a later event was put in its place
            self._end_steps(now)
            self._begin_steps(now)
            # Who waited for an adapter is sent to the engine when that has its slot, and the next step has begun.
            self._take_in(self.slots.loaded(now), now)
        self._tell(now)

    @property
    def computes(self) -> bool:
        return self._steps > 0 or self.slots.reading

    def recompose(self, now: float) -> None:
        """Steps that only decode are planned together up to the next end; now only the one under way is made."""
        if self._steps > 1:
            made = max(math.ceil((now - self._begin) / self._seconds - 1e-9), 1)
            if made < self._steps:
                self._plan(self._begin, made, self._seconds)

    def _tell(self, now: float) -> None:
        """Has steps recomposed that take longer, or not any more, for what has begun or ended here."""
        if self._read != self.slots.reading:
            self._read = self.slots.reading
            self.recompose(now)
        if self._computed != self.computes:
            self._computed = self.computes
            for neighbour in self.neighbours:
                neighbour.recompose(now)

    def _slower(self) -> float:
        """How many times as long as alone on its machine the replica takes for anything."""
        if not self.neighbours:
            return 1.0
        profile, others = self._times.profile, sum(neighbour.computes for neighbour in self.neighbours)
        return 1 + (profile.crowded - 1) * others / (profile.servers - 1)

    def _load_seconds(self, cached: bool) -> float:
        profile = self._times.profile
        if cached:
            return profile.activate
        return self._slower() * (profile.load_beside if self._steps else profile.load)

    def _take_in(self, requests: list[int], now: float) -> None:
        """These wait for a seat in the batch from now on."""
        self._waiting.extend(requests)
        if not requests:
            return
        if not self._steps:
            self._begin_steps(now)
        elif len(self._decoding) < self._seats:
            self.recompose(now)

    def _plan(self, begin: float, steps: int, seconds: float) -> None:
        self._begin, self._steps, self._seconds = begin, steps, seconds
        self._end = begin + steps * seconds
        self._later(self._end, Event.STEP)

    def _begin_steps(self, now: float) -> None:
        """Composes the next step as the engine's `Scheduler` does: what runs, then what waits."""
        rows = len(self._decoding)
        room = self._tokens - rows
        if rows and (most := self._pace.prompt_tokens()) is not None:
            room = min(room, most)
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
        seconds = (seconds + self._times.prompts[tokens]) * self._slower()
        if self.slots.reading:
            seconds *= self._times.profile.step_beside
        self._step_tokens = tokens
        alone = not self._prefilling and not (self._waiting and seats)
        self._plan(now, self._decoding[0][0] - self._done if alone else 1, seconds)

    def _end_steps(self, now: float) -> None:
        rows = len(self._decoding)
        for _ in range(min(self._steps, ALIKE)):
            self._pace.note(self._seconds, self._step_tokens, rows)
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
