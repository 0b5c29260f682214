"""The step loop's one turn: schedule, run, account. Knows nothing of processes or HTTP."""

import random
import time
from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tucka_runtime.adapters.format import Adapter, read_adapter
from tucka_runtime.channel_messages import AdapterPart
from tucka_runtime.config import EngineConfig
from tucka_runtime.engine.adapters.combine import describe_combination
from tucka_runtime.engine.adapters.fold import describe
from tucka_runtime.engine.adapters.folded import FoldedAdapter
from tucka_runtime.engine.adapters.host_cache import HostCache
from tucka_runtime.engine.block_manager import BlockManager
from tucka_runtime.engine.launched import Launched, Result
from tucka_runtime.engine.model_runner import ModelRunner
from tucka_runtime.engine.ngram import NgramIndex
from tucka_runtime.engine.pace import Pace
from tucka_runtime.engine.rehearsal import Rehearsal
from tucka_runtime.engine.scheduler import ScheduledChunk, Scheduler
from tucka_runtime.engine.sequence import Sequence, Status
from tucka_runtime.engine.turns import Turns, Work, once, whole
from tucka_runtime.errors import InvalidRequestError, TuckaError
from tucka_runtime.messages import (
    AdapterInfo,
    AdapterKey,
    EngineLoad,
    Finish,
    FinishReason,
    Request,
    Route,
    RouteReport,
    SequenceOutput,
    StepStats,
    Timing,
    TokenLogprob,
)

if TYPE_CHECKING:
    from tucka_runtime.engine.adapters.reader import AdapterReader

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class _InFlight:
    """A step that was launched. `schedule` are the seconds that choosing its chunks took."""

    chunks: list[ScheduledChunk]
    launched: Launched
    schedule: float


class Engine:
    """Requests in, tokens out, one step at a time: `add`, then `step` while `busy`.

    Raises ModelLoadError if the model cannot be served as configured.
    """

    def __init__(self, config: EngineConfig):
        self.config = config
        self.runner = ModelRunner(config)
        self.info = self.runner.info
        self.layout = self.runner.layout
        self.adapters = self.runner.adapters
        self.host = HostCache()
        self.reader: AdapterReader | None = None
        """The process that adapters are read in; without one they are where they are loaded."""
        self.blocks = BlockManager(self.runner.num_blocks, config.block_size)
        self.scheduler = Scheduler(
            self.blocks, config.max_num_batched_tokens, config.max_num_seqs, self.runner.rope_limit
        )
        self.pace = Pace(config.decode_stretch)
        self.turns = Turns()
        """Of the step loop and of the thread that loads, where there is one."""
        self.requests: dict[str, list[Sequence]] = {}
        self.random = random.Random(config.seed)
        # On a GPU the next step is scheduled and launched while the last one runs.
        self.overlap = self.runner.on_gpu
        self.in_flight: _InFlight | None = None
        self.rehearsal = Rehearsal(self)
        if self.overlap:
            self.rehearsal.warm_up()

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.waiting or self.scheduler.running or self.in_flight)

    @property
    def load(self) -> EngineLoad:
        """What stands in the books now."""
        return EngineLoad(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            blocks_used=self.blocks.num_blocks - self.blocks.num_free,
            blocks_total=self.blocks.num_blocks,
            preemptions=self.scheduler.num_preemptions,
            displacements=self.scheduler.num_displacements,
        )

    def add(self, request: Request) -> None:
        """Takes a request on; every sequence of it leases the adapter. Raises ModelNotFoundError if that is gone, and
        InvalidRequestError for what can never run (the HTTP door says so before)."""
        self._check(request)
        seed = request.sampling.seed if request.sampling.seed is not None else self.random.getrandbits(63)
        sequences = []
        for index in range(request.num_sequences):
            # A route scope is for adapters that are routed: not for the base, LoRA and pinned ones.
            key = request.adapter
            routed = self.adapters.lease(key, request.member).routed if key is not None else None
            scope, prefix = (request.route_scope, routed.router.prefix_tokens) if routed else (None, 0)
            # One request's answers differ; the multiplier spreads indices over the seed's upper half.
            own_seed = (seed + index * 0x9E3779B97F4A7C15) & 0x7FFFFFFFFFFFFFFF
            seq = Sequence(request, index, scope, own_seed, time.monotonic(), prefix)
            seq.ngrams = NgramIndex.of(self.config, scope)
            sequences.append(seq)
        self.requests[request.id] = sequences
        for seq in sequences:
            self.scheduler.add(seq)

    def _check(self, request: Request) -> None:
        """Raises InvalidRequestError for what can never run."""
        limit, vocab = self.info.max_model_len, self.adapters.vocab_size(request.adapter)
        for prompt in request.prompts:
            if not prompt or len(prompt) + request.sampling.max_tokens > limit:
                raise InvalidRequestError(f"A prompt is empty or does not fit the context of {limit} tokens.", "prompt")
            if min(prompt) < 0 or max(prompt) >= vocab:
                raise InvalidRequestError(f"A prompt has token ids outside 0..{vocab - 1}.", "prompt")
        if request.id in self.requests:
            raise InvalidRequestError("Another request of this id is in flight.")

    def abort(self, request_id: str, index: int | None = None) -> list[SequenceOutput]:
        """Ends what is left of a request, or one sequence of it. Unknown ones are nothing to do."""
        return [
            self._finish(seq, SequenceOutput(request_id, seq.index), Finish(FinishReason.ABORT))
            for seq in self.requests.get(request_id, [])[:]
            if index is None or seq.index == index
        ]

    def step(self) -> tuple[list[SequenceOutput], StepStats | None]:
        """One forward pass for everything that fits, its outputs and its figures. With `overlap` the following one is
        launched before the outcome of this one is looked at. No figures where nothing could be scheduled."""
        step = self.in_flight or self._launch()
        self.in_flight = None
        if step is None:
            return [], None
        if self.overlap and not step.launched.settles:
            self.in_flight = self._launch()
        outputs, stats = self._collect(step)
        self.pace.note(stats.seconds, stats.prefill_tokens, stats.decode_tokens)
        return outputs, stats

    def _launch(self) -> _InFlight | None:
        begin = time.monotonic()
        chunks = self.scheduler.schedule(self.pace.prompt_tokens())
        if not chunks:
            return None
        scheduled = time.monotonic()
        for chunk in chunks:
            chunk.seq.scheduled_at = chunk.seq.scheduled_at or scheduled
        launched = self.runner.launch(chunks)
        if drafted := {chunk.seq.key: len(chunk.draft) for chunk in chunks if chunk.draft}:
            for chunk in launched.chunks:
                if chunk.seq.key in drafted:
                    self.scheduler.verified(chunk, drafted[chunk.seq.key])
        for seq in launched.due_sequences:
            seq.pending += 1
        return _InFlight(chunks, launched, scheduled - begin)

    def _collect(self, step: _InFlight) -> tuple[list[SequenceOutput], StepStats]:
        results, stages = self.runner.collect(step.launched)
        ran = time.monotonic()
        outputs = [out for chunk, result in results for out in self._account(chunk, result)]
        # What a preempted sequence had said before counts as prompt when it is computed once more.
        decodes = [c for c in step.chunks if c.draft or (c.start >= c.seq.num_prompt and c.count == 1)]
        decode_tokens = sum(chunk.count for chunk in decodes)
        adapters = {chunk.seq.adapter for chunk in step.chunks if chunk.seq.adapter is not None}
        # One a segment; a prompt that was only routed has none, and stands for itself.
        routes = {
            (chunk.seq.adapter, chunk.seq.key if result.segment is None else result.segment): result.route
            for chunk, result in results
            if result.route is not None and chunk.seq.adapter is not None and all(map(isfinite, result.route.weights))
        }
        return outputs, StepStats(
            schedule=step.schedule,
            batch=stages.batch,
            route=stages.route,
            forward=stages.forward,
            sample=stages.sample,
            output=time.monotonic() - ran,
            prefill_tokens=sum(chunk.count for chunk in step.chunks) - decode_tokens,
            decode_tokens=decode_tokens,
            drafts=sum(bool(chunk.draft) for chunk in step.chunks),
            draft_tokens=sum(len(chunk.draft or ()) for chunk in step.chunks),
            accepted_tokens=sum(len(chunk.draft or ()) for chunk in step.launched.chunks),
            sequences=len(step.chunks),
            adapters=tuple(adapters),
            routes=tuple((key, route) for (key, _), route in routes.items()),
        )

    def _account(self, chunk: ScheduledChunk, result: Result) -> list[SequenceOutput]:
        """Books what a chunk brought; an output for every token, or for the end without one."""
        seq = chunk.seq
        if result.tokens:
            seq.pending -= 1
        if seq.status is Status.FINISHED:  # it ended, or was aborted, while the device was at work
            return []
        if seq.routing:
            if result.route is not None:
                self.scheduler.routed(seq, result.route)
                seq.routing, seq.num_computed = False, 0
            return []
        self._note_route(chunk, result.route)
        self.scheduler.computed(chunk)
        self._note_scores(chunk, result.prompt_logprobs)
        return self._advance(seq, result) if chunk.last or result.error is not None else []

    def _note_route(self, chunk: ScheduledChunk, route: Route | None) -> None:
        seq = chunk.seq
        if route is None:
            return
        if seq.routes_itself and seq.route is None:
            self.scheduler.routed(seq, route)
        if chunk.start + chunk.count < seq.num_prompt:
            return
        if seq.prompt_route is None:
            seq.prompt_route = route
        elif route.group != seq.last_group:
            seq.route_changes += 1
        seq.last_group = route.group

    def _note_scores(self, chunk: ScheduledChunk, scores: list[TokenLogprob] | None) -> None:
        """The prompt's own log-probabilities, chunk by chunk; after a preemption they start over."""
        seq = chunk.seq
        if scores is not None and not seq.num_known:
            before: list[TokenLogprob | None] = seq.prompt_logprobs if chunk.start else [None]
            seq.prompt_logprobs = [*before, *scores]

    def _advance(self, seq: Sequence, result: Result) -> list[SequenceOutput]:
        """The outputs of a sequence whose last token went through the model, one for each token. Those of a draft,
        which come first, are the sequence's already, and end nothing."""
        tokens = zip(result.tokens, result.logprobs, strict=True)
        *drafted, out = [self._output(seq, *entry) for entry in tokens] or [self._output(seq)]
        if not seq.num_known:
            seq.first_token_at = time.monotonic()
            out.timing = Timing(seq.arrived, seq.scheduled_at, seq.first_token_at, 0.0)
            out.embedding = result.embedding
            if seq.sampling.prompt_logprobs is not None:
                out.prompt_logprobs = seq.prompt_logprobs
        finish = self._take_token(seq, result.error, out)
        return [*drafted, out if finish is None else self._finish(seq, out, finish)]

    def _output(self, seq: Sequence, token: int | None = None, logprob: TokenLogprob | None = None) -> SequenceOutput:
        """What a sequence says with a token, or without one."""
        return SequenceOutput(
            seq.request.id,
            seq.index,
            [token] if token is not None else [],
            [logprob] if logprob is not None else None,
            route=RouteReport(seq.prompt_route, seq.route_changes) if seq.prompt_route is not None else None,
            cached_tokens=seq.cached_tokens,
        )

    def _take_token(self, seq: Sequence, error: TuckaError | None, out: SequenceOutput) -> Finish | None:
        """Adds an output's token to the sequence, unless there was an error; why the sequence ends with it, if it
        does."""
        if error is not None:
            out.token_ids, out.logprobs = [], None
            return Finish(FinishReason.ERROR, error=error)
        if not out.token_ids:  # nothing was to be generated: the prompt was scored or embedded
            return Finish(FinishReason.LENGTH)
        (token,) = out.token_ids
        seq.tokens.append(token)
        if seq.num_known > seq.sampling.least_tokens and token in self.runner.stops(seq):
            return Finish(FinishReason.STOP, stop_token_id=token)
        if seq.num_known >= seq.sampling.max_tokens or len(seq.tokens) >= self.info.max_model_len:
            return Finish(FinishReason.LENGTH)
        return None

    def _finish(self, seq: Sequence, out: SequenceOutput, finish: Finish) -> SequenceOutput:
        if seq.status is not Status.FINISHED:
            self.scheduler.finish(seq)
        out.finish = finish
        out.timing = Timing(seq.arrived, seq.scheduled_at, seq.first_token_at, time.monotonic())
        self.runner.forget(seq)
        if seq.adapter is not None:
            self.adapters.release(seq.adapter)
        siblings = self.requests[seq.request.id]
        siblings.remove(seq)
        if not siblings:
            del self.requests[seq.request.id]
        return out

    def activate_adapter(self, key: AdapterKey) -> tuple[FoldedAdapter, AdapterInfo] | None:
        """An adapter of the host cache, on the device; None if it is not there. Like `prepare_adapter` it belongs to
        the thread that loads. Raises AdapterCapacityError."""
        begin = time.monotonic()
        if (found := self.host.find(key)) is None:
            return None
        self.adapters.check_room()
        folded = self.runner.memory.to_device(found[0])
        self.host.take(key)
        return folded, replace(found[1], load_seconds={"activate": time.monotonic() - begin})

    def cache_adapter(self, folded: FoldedAdapter) -> None:
        """Keeps a prepared adapter, or one that was evicted from its slot, in the host cache."""
        self.host.put(self.runner.memory.to_host(folded))

    def prepare_adapter(
        self,
        key: AdapterKey,
        folder: Path,
        pinned: Route | None = None,
        blob: str | None = None,
        resident: bool = True,
    ) -> tuple[FoldedAdapter, AdapterInfo]:
        """Reads, checks and folds an adapter without touching what runs: safe beside `step`. Only a `resident` one
        needs a slot. Raises AdapterError, and StorageError if its content is not `blob`."""
        begin = time.monotonic()
        if resident:
            self.adapters.check_room()  # before gigabytes are read; `add` finds out for certain
        read = self._read(folder, blob)
        checked = time.monotonic()

        def work() -> Work[tuple[FoldedAdapter, AdapterInfo]]:
            adapter = read()
            yield
            folded = yield from self.runner.fold(key, adapter, pinned)
            seconds = {"read": checked - begin, "fold": time.monotonic() - checked}
            return folded, describe(folded, adapter, pinned, seconds)

        return self._in_turns(work())

    def combine_adapters(
        self, key: AdapterKey, parts: Rows[AdapterPart], resident: bool = True
    ) -> tuple[FoldedAdapter, AdapterInfo]:
        """The same of several adapters as one. Raises InvalidRequestError where they cannot be combined."""
        begin = time.monotonic()
        if resident:
            self.adapters.check_room()
        reads = [self._read(part.folder, part.blob) for part in parts]
        checked = time.monotonic()

        def work() -> Work[tuple[FoldedAdapter, AdapterInfo]]:
            adapters = []
            for read in reads:
                adapters.append(read())
                yield
            folded = yield from self.runner.combine(key, list(zip(adapters, parts, strict=True)))
            seconds = {"read": checked - begin, "fold": time.monotonic() - checked}
            return folded, describe_combination(folded, seconds)

        return self._in_turns(work())

    def _in_turns(self, work: Work[T]) -> T:
        """What comes of work that a GPU does on a stream of its own beside the steps, and a CPU in turns with them."""
        return whole(work) if self.runner.on_gpu else self.turns.run(work)

    def _read(self, folder: Path, blob: str | None) -> Callable[[], Adapter]:
        """Raises AdapterError, StorageError, and TuckaError where the reader's process fails."""
        if self.reader is None:
            adapter = read_adapter(folder, self.layout, blob)
            return lambda: adapter
        # Where steps are made: for each of the files that say what room there is, Python's lock is given away.
        room = self._in_turns(once(self.runner.memory.room_to_read))
        return self.reader.read(folder, self.layout, blob, room)

    def add_adapter(self, folded: FoldedAdapter) -> None:
        """Makes a prepared adapter known to new requests. Raises AdapterCapacityError, AdapterConflictError."""
        self.adapters.add(folded)

    def load_adapter(self, key: AdapterKey, folder: Path, pinned: Route | None = None) -> AdapterInfo:
        """`prepare_adapter` and `add_adapter` at once. Raises AdapterError."""
        folded, info = self.prepare_adapter(key, folder, pinned)
        self.add_adapter(folded)
        return info

    def evict_adapter(self, key: AdapterKey) -> FoldedAdapter | None:
        """Frees an adapter's slot, and returns what `cache_adapter` may keep."""
        return self.adapters.evict(key)

    def unload_adapter(self, key: AdapterKey) -> None:
        """Ends its leasing. What the host cache has of it is dropped in the thread that loads."""
        self.adapters.unload(key)

    def check_integrity(self) -> None:
        """Raises RuntimeError if the books do not agree; for tests and idle moments."""
        self.scheduler.check_integrity()
        leases: dict[AdapterKey, int] = {}
        for seq in (s for group in self.requests.values() for s in group):
            if seq.adapter is not None:
                leases[seq.adapter] = leases.get(seq.adapter, 0) + 1
        if leases != self.adapters.leases():
            raise RuntimeError("adapters: the leases differ from the sequences in flight")
