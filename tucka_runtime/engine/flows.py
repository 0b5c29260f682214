"""Who waits, flow by flow, and whose turn it is. No torch.

A flow is what one tenant (an API key, or several that share) asks of one adapter, or of the base. Every flow has a
virtual token counter (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024): what it was served so far.
The flow that was served least is next. A flow that begins to wait is lifted to the least of those that wait already:
nobody saves turns up.
"""

import itertools
from bisect import insort
from collections import Counter
from collections.abc import Iterator

from tucka_runtime.engine.sequence import Sequence
from tucka_runtime.messages import FlowKey

PROMPT_TOKEN, ANSWER_TOKEN = 1, 2
"""What a computed token counts: the paper's weights. Tokens that the cache had count nothing."""


class Flow:
    """One flow: what waits of it, in the order of its turns, how many of its sequences run, and its counter."""

    __slots__ = ("running", "served", "waiting")

    def __init__(self) -> None:
        self.waiting: list[Sequence] = []
        self.running = 0
        self.served = 0

    @property
    def active(self) -> bool:
        return bool(self.waiting or self.running)


def _turn(seq: Sequence) -> tuple[int, int]:
    """The order within a flow: by priority, the least first, then by arrival."""
    return seq.request.priority, seq.number


class FairQueue:
    """All sequences that wait. Who runs is told by `take` and `stopped`, and counts for its flow until it ends.

    A flow without sequences keeps its counter as long as that is more than a newcomer would get.
    """

    def __init__(self) -> None:
        self.flows: dict[FlowKey, Flow] = {}
        self._last: Flow | None = None  # whose waiting sequences were the last to come to an end
        self._numbers = itertools.count()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Sequence]:
        for flow in self.flows.values():
            yield from flow.waiting

    @property
    def num_active(self) -> int:
        """Flows that wait or run."""
        return len([flow for flow in self.flows.values() if flow.running or flow.waiting])

    def of(self, seq: Sequence) -> Flow:
        """The flow of a sequence that waits or runs."""
        return self.flows[seq.flow]

    def add(self, seq: Sequence) -> None:
        """Takes a new sequence in."""
        seq.number = next(self._numbers)
        if seq.flow not in self.flows:
            self._forget()
            self.flows[seq.flow] = Flow()
        self._put(seq)

    def next(self) -> Flow | None:
        """The flow whose turn it is: the one served least, of several the one that runs least, then the first come."""
        waiting = [flow for flow in self.flows.values() if flow.waiting]
        if len(waiting) < 2:
            return waiting[0] if waiting else None
        least = min([flow.served for flow in waiting])
        return min(
            [flow for flow in waiting if flow.served == least],
            key=lambda flow: (flow.running, flow.waiting[0].number),
        )

    def take(self, flow: Flow) -> Sequence:
        """The flow's first sequence, which runs from now on."""
        seq = flow.waiting.pop(0)
        flow.running += 1
        self._left(flow)
        return seq

    def put_back(self, seq: Sequence) -> None:
        """A running sequence waits again, before all of its flow that came later."""
        self.of(seq).running -= 1
        self._put(seq)

    def ended(self, seq: Sequence, running: bool) -> None:
        """A sequence is no more, whether it ran or waited."""
        flow = self.of(seq)
        if running:
            flow.running -= 1
        else:
            flow.waiting.remove(seq)
            self._left(flow)
        if not any(other.active for other in self.flows.values()):
            self.flows.clear()
            self._last = None

    def charge(self, seq: Sequence, start: int, end: int) -> None:
        """Counts a sequence's tokens `start` to `end` as served to its flow, each once: what is computed again because
        the sequence had to give way is not counted."""
        if start < seq.charged:
            start = seq.charged
        if end > start:
            prompt = max(min(end, seq.num_prompt) - start, 0) if start < seq.num_prompt else 0
            self.flows[seq.flow].served += PROMPT_TOKEN * prompt + ANSWER_TOKEN * (end - start - prompt)
            seq.charged = end

    def _put(self, seq: Sequence) -> None:
        flow = self.of(seq)
        if not flow.waiting:
            flow.served = max(flow.served, self._level())
        insort(flow.waiting, seq, key=_turn)
        self._length += 1

    def _left(self, flow: Flow) -> None:
        self._length -= 1
        if not flow.waiting:
            self._last = flow

    def _level(self) -> int:
        """What a newcomer's counter begins at."""
        nobody = self._last.served if self._last is not None else 0
        return min((flow.served for flow in self.flows.values() if flow.waiting), default=nobody)

    def _forget(self) -> None:
        """Drops flows without sequences that would get the same counter if they came back."""
        level = self._level()
        self.flows = {key: flow for key, flow in self.flows.items() if flow.active or flow.served > level}

    def check_integrity(self, running: list[Sequence]) -> None:
        """Raises RuntimeError unless the flows have what runs, and count what waits."""
        counts = Counter(seq.flow for seq in running)
        if any(flow.running != counts.pop(key, 0) for key, flow in self.flows.items()) or counts:
            raise RuntimeError("flows: the running sequences are counted wrong")
        if self._length != sum(len(flow.waiting) for flow in self.flows.values()):
            raise RuntimeError("flows: the waiting sequences are counted wrong")
