"""Which tokens go through the model next. Policy only: no torch.

Each step first serves what runs (a decode, or the next chunk of a prompt), oldest first; then it admits what waits,
flow by flow as flows.py says. A sequence gets the blocks of its whole prompt when it is admitted, and one more whenever
it needs it; when none is left the youngest sequence of the flow that runs most gives all of its own back and is
computed again later. The same makes room for a flow that runs less than half of its share: see `Scheduler._displace`.
The oldest running sequence never gives way to another, so that there is always one that comes to its end.
"""

import itertools
from array import array
from dataclasses import dataclass, replace

from tucka_runtime.engine.block_manager import BlockManager, chain
from tucka_runtime.engine.flows import FairQueue, Flow
from tucka_runtime.engine.route_cache import RouteCache, owner
from tucka_runtime.engine.sequence import Sequence, Status
from tucka_runtime.messages import Pooling, Route, RouteScope


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """Tokens `start` to `start + count` of a sequence, for one step; `last` tells whether its last one is among
    them. Behind that may stand a `draft` of what follows, counted by `count`; once it is verified, those of it that
    are right."""

    seq: Sequence
    start: int
    count: int
    last: bool
    draft: tuple[int, ...] | None = None

    @property
    def due(self) -> bool:
        """Whether the chunk brings a token: one of a prompt that is only being routed, or scored, does not."""
        return self.last and not self.seq.routing and self.seq.sampling.max_tokens > 0


def cache_namespace(seq: Sequence, rope_limit: int | None = None) -> bytes | None:
    """The name under which a sequence's KV may be shared: of its owner and its exact route. None if it may not be,
    since its route is its batch's or is not known yet, or since all of its prompt has to be seen: scored, or
    averaged."""
    unrouted = seq.routes_itself and seq.route is None
    seen = seq.sampling.prompt_logprobs is not None or seq.request.pooling is Pooling.MEAN
    if unrouted or seq.scope is RouteScope.BATCH or seen:
        return None
    route = (seq.route.group, seq.route.weights) if seq.route else None
    return repr((*owner(seq, rope_limit), route)).encode()


class Scheduler:
    """Waiting and running sequences. `max_tokens` and `max_seqs` bound one step; `rope_limit` is owner's."""

    def __init__(self, blocks: BlockManager, max_tokens: int, max_seqs: int, rope_limit: int | None = None):
        self.blocks = blocks
        self.rope_limit = rope_limit
        # Every route with KV in the cache has a block of its own there.
        self.routes = RouteCache(blocks.num_blocks, rope_limit)
        self.max_tokens = max_tokens
        self.max_seqs = max_seqs
        self.waiting = FairQueue()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_displacements = 0

    def add(self, seq: Sequence) -> None:
        self.waiting.add(seq)

    def schedule(self, prompt_tokens: int | None = None) -> list[ScheduledChunk]:
        """The next step's chunks; empty if there is nothing to do. Every count is at least 1.

        `prompt_tokens` is how many tokens of prompts there may be beside decoding sequences, None for no limit. What is
        routed with its batch is not cut for it: its route is that of the tokens that are computed together.
        """
        self._displace()
        chunks: list[ScheduledChunk] = []
        budget = self.max_tokens
        decoding = any(len(seq) - seq.num_computed == 1 for seq in self.running)
        room = prompt_tokens if decoding and prompt_tokens is not None else budget
        preempted = self.num_preemptions
        position = 0
        while position < len(self.running) and budget:
            seq = self.running[position]
            count = self._count(seq, budget, room)
            if not count or (seq.pending and seq.num_generated >= seq.sampling.max_tokens):
                position += 1  # it ends with what the device is at, or waits for room
                continue
            if not self._grow(seq, seq.num_computed + count):
                break  # seq itself was the one and went back to waiting
            room -= count if count > 1 else 0
            budget -= self._take(chunks, seq, count)
            position += 1
        if self.num_preemptions == preempted:
            self._admit(chunks, budget, room)
        self._speculate(chunks)
        return chunks

    def _count(self, seq: Sequence, budget: int, room: int) -> int:
        """How many of a sequence's tokens the step takes, if `room` is left for prompts."""
        left = (seq.route_tokens if seq.routing else len(seq)) - seq.num_computed
        whole = left == 1 or seq.scope is RouteScope.BATCH
        return max(min(left, budget if whole else min(budget, room)), 0)

    def _grow(self, seq: Sequence, tokens: int) -> bool:
        """Blocks for the first `tokens` tokens, taken if need be from sequences that this step has not served yet.
        False: seq lost its own."""
        need = self.blocks.blocks_for(tokens) - len(seq.block_table)
        while not self.blocks.can_allocate(need):
            unserved = self.running[self.running.index(seq) :]
            most = max(self.waiting.of(other).running for other in unserved)
            victim = next(other for other in reversed(unserved) if self.waiting.of(other).running == most)
            self._preempt(victim)
            self.num_preemptions += 1
            if victim is seq:
                return False
        seq.block_table.extend(self.blocks.allocate(need))
        return True

    def _displace(self) -> None:
        """Makes room for the flow whose turn it is, if it runs less than half of its share: what runs, split evenly
        between the flows that are there. Flows that run more than theirs, and more than one, give sequences back, the
        largest flow first, of its sequences the one that did so least often, then the youngest.

        Half, because flows that are about even are left alone: they get seats as those come free. A flow that gave way
        has its share, so it does not take the seat back; and each of its sequences gives way before one does twice.
        """
        flow = self.waiting.next()
        if flow is None:
            return
        share = len(self.running) / self.waiting.num_active
        while flow.running < share / 2 and not self._has_room(flow):
            others = [seq for seq in self.running[1:] if self.waiting.of(seq).running > max(share, 1)]
            if not others:
                return
            most = max(self.waiting.of(seq).running for seq in others)
            largest = [seq for seq in reversed(others) if self.waiting.of(seq).running == most]
            victim = min(largest, key=lambda seq: seq.displaced)
            victim.displaced += 1
            self.num_displacements += 1
            self._preempt(victim)

    def _has_room(self, flow: Flow) -> bool:
        """Whether there are a seat and blocks for the flow's first sequence."""
        if len(self.running) >= self.max_seqs:
            return False
        reuse, need = self._needs(flow.waiting[0])
        return self.blocks.can_allocate(need, reuse)

    def _preempt(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self._release(seq)
        seq.status = Status.WAITING
        self.waiting.put_back(seq)

    def _release(self, seq: Sequence) -> None:
        self.blocks.release(seq.block_table)
        seq.block_table = array("i")
        seq.num_computed = 0

    def _admit(self, chunks: list[ScheduledChunk], budget: int, room: int) -> None:
        while budget and len(self.running) < self.max_seqs and (flow := self.waiting.next()) is not None:
            seq = flow.waiting[0]
            if seq.pending:  # it gave way just now, and its last token is not known yet
                return
            if self._should_wait(flow, budget) or not self._count(seq, budget, room) or not self._place(seq):
                return
            self.waiting.take(flow)
            seq.status = Status.RUNNING
            self.running.append(seq)
            count = self._count(seq, budget, room)
            room -= count
            budget -= self._take(chunks, seq, count)

    def _take(self, chunks: list[ScheduledChunk], seq: Sequence, count: int) -> int:
        """Puts a sequence's next `count` tokens on the list; they count as computed, and as served to its flow, from
        now on."""
        end = seq.num_computed + count
        chunks.append(ScheduledChunk(seq, seq.num_computed, count, end == len(seq)))
        self.waiting.charge(seq, seq.num_computed, end)
        seq.num_computed = end
        return count

    def _speculate(self, chunks: list[ScheduledChunk]) -> None:
        """Puts drafts behind decoding rows. They get what is left of the step's budget and of the free blocks, until
        they are verified: nobody waits or gives way for one."""
        drafting = [i for i, chunk in enumerate(chunks) if chunk.seq.ngrams is not None]
        budget = self.max_tokens - sum(chunk.count for chunk in chunks) if drafting else 0
        for i in drafting:
            chunk = chunks[i]
            seq, end = chunk.seq, chunk.start + 1
            if seq.ngrams is None or seq.pending or chunk.count > 1 or chunk.start < seq.num_prompt:
                continue
            room = (len(seq.block_table) + self.blocks.num_free) * self.blocks.block_size - end
            draft = seq.ngrams.draft(seq.tokens, min(budget, room, seq.sampling.max_tokens - seq.num_known - 1))
            if not draft:
                continue
            seq.num_computed = end + len(draft)
            need = self.blocks.blocks_for(seq.num_computed) - len(seq.block_table)
            seq.block_table.extend(self.blocks.allocate(need))
            chunks[i] = replace(chunk, count=1 + len(draft), draft=tuple(draft))
            budget -= len(draft)

    def verified(self, chunk: ScheduledChunk, drafted: int) -> None:
        """Takes back what a draft of `drafted` tokens got for those that are wrong: the sequence is then as it would be
        had its `chunk.draft` come one by one."""
        seq = chunk.seq
        assert seq.ngrams is not None and chunk.draft is not None
        seq.ngrams.verified(drafted, len(chunk.draft))
        seq.num_computed = chunk.start + chunk.count
        self.waiting.charge(seq, chunk.start, seq.num_computed)
        kept = self.blocks.blocks_for(seq.num_computed)
        self.blocks.release(seq.block_table[kept:])
        del seq.block_table[kept:]

    def _group(self, flow: Flow) -> list[Sequence]:
        """The first of a flow's waiting and what should share its first forward pass: under the scope `batch` the
        prompts of one request are routed together, which only works if they are computed together."""
        head = flow.waiting[0]
        if head.scope is not RouteScope.BATCH or any(s.request is head.request for s in self.running):
            return [head]
        return list(itertools.takewhile(lambda seq: seq.request is head.request, flow.waiting))

    def _should_wait(self, flow: Flow, budget: int) -> bool:
        """Whether a group that does not fit this step would fit one of its own: then it waits rather than being torn
        apart. The wait ends, since nothing else is admitted meanwhile; so nobody else may be waiting."""
        group = self._group(flow)
        if len(group) == 1 or len(self.waiting) > len(flow.waiting):
            return False
        tokens, blocks = sum(map(len, group)), sum(self.blocks.blocks_for(len(s)) for s in group)
        seats = self.max_seqs - len(self.running)
        fits = len(group) <= seats and tokens <= budget and self.blocks.can_allocate(blocks)
        possible = len(group) <= self.max_seqs and tokens <= self.max_tokens and blocks <= self.blocks.num_blocks
        return possible and not fits

    def _place(self, seq: Sequence) -> bool:
        """Blocks for a waiting sequence, cached ones first; at least its last token is left to compute."""
        reuse, need = self._needs(seq)
        if not self.blocks.can_allocate(need, reuse):
            return False
        self.blocks.hold(reuse)
        seq.block_table = array("i", reuse + self.blocks.allocate(need))
        seq.num_computed = len(reuse) * self.blocks.block_size
        if not seq.scheduled_at:  # its own blocks, found again after a preemption, are no gift of the cache
            seq.cached_tokens = seq.num_computed
        return True

    def _needs(self, seq: Sequence) -> tuple[list[int], int]:
        """The cached blocks of a waiting sequence, and how many fresh ones it needs beside them."""
        if seq.routes_itself and seq.route is None:
            seq.route = self.routes.find(seq)
            seq.routing = seq.routing and seq.route is None
        reuse = self.blocks.match(self._hashes(seq, (len(seq) - 1) // self.blocks.block_size))
        return reuse, self.blocks.blocks_for(len(seq)) - len(reuse)

    def _hashes(self, seq: Sequence, count: int) -> list[bytes]:
        """Hashes of a sequence's first `count` full blocks, each computed once; none if it does not share its KV."""
        namespace = cache_namespace(seq, self.rope_limit)
        if namespace is None:
            return []
        known, size = seq.block_hashes, self.blocks.block_size
        while len(known) < count:
            start = len(known) * size
            known.append(chain(known[-1] if known else namespace, seq.tokens[start : start + size]))
        return known[:count]

    def routed(self, seq: Sequence, route: Route) -> None:
        """Fixes a sequence's own route, and remembers it for prompts that begin with the same tokens."""
        seq.route = route
        self.routes.keep(seq)

    def computed(self, chunk: ScheduledChunk) -> None:
        """Offers the blocks that this chunk filled for reuse, unless the sequence lost them meanwhile."""
        seq, end = chunk.seq, chunk.start + chunk.count
        if seq.status is not Status.RUNNING or seq.num_computed < end:
            return
        size = self.blocks.block_size
        hashes = self._hashes(seq, end // size)
        for i in range(chunk.start // size, len(hashes)):
            self.blocks.register(seq.block_table[i], hashes[i])

    def finish(self, seq: Sequence) -> None:
        """Takes a sequence out, wherever it is, and frees its blocks."""
        running = seq.status is Status.RUNNING
        if running:
            self.running.remove(seq)
        self.waiting.ended(seq, running)
        self._release(seq)
        seq.status = Status.FINISHED

    def check_integrity(self) -> None:
        """Raises RuntimeError if blocks or queues disagree with each other."""
        self.blocks.check_integrity([s.block_table for s in self.running])
        if any(s.status is not Status.RUNNING for s in self.running) or len(self.running) > self.max_seqs:
            raise RuntimeError("scheduler: a sequence is in the wrong queue")
        if any(s.status is not Status.WAITING or s.block_table for s in self.waiting):
            raise RuntimeError("scheduler: a waiting sequence holds blocks")
        self.waiting.check_integrity(self.running)
