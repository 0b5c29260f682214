"""The step loop's one turn: schedule, run, account. Knows nothing of processes or HTTP."""

import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

from tucka_runtime.adapters.base_layout import base_layout
from tucka_runtime.adapters.format import TuckAConfig, read_adapter
from tucka_runtime.config import EngineConfig
from tucka_runtime.engine.adapters.folded import FoldedAdapter
from tucka_runtime.engine.block_manager import BlockManager
from tucka_runtime.engine.model_runner import Launched, Result, Runner
from tucka_runtime.engine.scheduler import Scheduler, Work
from tucka_runtime.engine.sequence import Sequence, Status
from tucka_runtime.errors import InvalidRequestError
from tucka_runtime.kernels.tables.segments import SMALL_BATCH
from tucka_runtime.messages import (
    AdapterInfo,
    AdapterKey,
    EngineInfo,
    FinishReason,
    Request,
    Route,
    RouteReport,
    RouteScope,
    SamplingParams,
    SequenceOutput,
    StepStats,
    Timing,
    TokenLogprob,
)


@dataclass(frozen=True, eq=False)
class _InFlight:
    """A step that was launched. `schedule` are the seconds that choosing its work took."""

    works: list[Work]
    launched: Launched
    schedule: float


class Engine:
    """Requests in, tokens out, one step at a time: `add`, then `step` while `busy`."""

    def __init__(self, config: EngineConfig, fused: bool | None = None):
        self.runner = Runner(config, fused)
        self.blocks = BlockManager(self.runner.num_blocks, config.block_size)
        rotary = self.runner.model.rotary
        self.scheduler = Scheduler(
            self.blocks, config.max_num_batched_tokens, config.max_num_seqs, rotary.stretch_from if rotary else None
        )
        self.requests: dict[str, list[Sequence]] = {}
        self.random = random.Random(config.seed)
        self.layout = base_layout(self.runner.arch, self.runner.fingerprint, config.model or "")
        # On a GPU the next step is scheduled and launched while the last one runs.
        self.overlap = self.runner.device.type == "cuda"
        self.in_flight: _InFlight | None = None
        self.rehearsed: set[object] = set()
        """Shapes of adapters whose kernels are compiled."""
        if self.overlap:
            self.warm_up()

    def warm_up(self) -> None:
        """Compiles the kernels and captures the graphs, so that no request waits for it."""
        if self.runner.graphs is not None:
            self.runner.graphs.warm_up()
        self._rehearse(None)
        self.blocks.forget_all()

    def prepare(self) -> bool:
        """Does a part of what loaded adapters will need and nobody waits for yet: captures a graph (under a second), or
        compiles what prompts take (seconds, the first time on a machine). False once all is done. For idle moments."""
        if self.runner.graphs is None or not self.overlap:
            return False
        loaded = [entry.folded for entry in self.runner.store.loaded.values() if not entry.unloading]
        if self.runner.graphs.prepare(loaded):
            return True
        for folded in loaded:
            if folded.shape not in self.rehearsed:
                self.rehearsed.add(folded.shape)
                self._rehearse(folded.key)
                return True
        return False

    def _rehearse(self, adapter: AdapterKey | None) -> None:
        """Prompts of several lengths, for the kernels cut longer ones in other ways."""
        sampling = SamplingParams(max_tokens=2, temperature=1.0, seed=0, ignore_eos=True)
        longest = min(self.runner.max_len - 2, self.scheduler.max_tokens)
        for length in sorted({min(length, longest) for length in (32, SMALL_BATCH + 1, longest)}):
            self.add(Request("warm-up", ((0,) * length,), sampling, adapter=adapter))
            while self.busy:
                self.step()

    @property
    def info(self) -> EngineInfo:
        runner = self.runner
        return EngineInfo(
            model_type=runner.arch.model_type,
            vocab_size=runner.arch.vocab,
            max_model_len=runner.max_len,
            eos_token_ids=tuple(sorted(runner.eos)),
            dtype=str(runner.dtype).removeprefix("torch."),
            device=str(runner.device),
            kv_cache_tokens=runner.num_blocks * runner.block_size,
            fingerprint=runner.fingerprint,
            max_num_batched_tokens=self.scheduler.max_tokens,
        )

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.waiting or self.scheduler.running or self.in_flight)

    def add(self, request: Request) -> None:
        """Takes a request on; every sequence of it leases the adapter. Raises ModelNotFoundError if that is gone, and
        InvalidRequestError for what can never run (the HTTP door says so before)."""
        limit = self.runner.max_len
        for prompt in request.prompts:
            if not prompt or len(prompt) + request.sampling.max_tokens > limit:
                raise InvalidRequestError(f"A prompt is empty or does not fit the context of {limit} tokens.", "prompt")
            if min(prompt) < 0 or max(prompt) >= self.runner.arch.vocab:
                raise InvalidRequestError(f"A prompt has token ids outside 0..{self.runner.arch.vocab - 1}.", "prompt")
        if request.id in self.requests:
            raise InvalidRequestError("Another request of this id is in flight.")
        store = self.runner.store
        base_seed = request.sampling.seed if request.sampling.seed is not None else self.random.getrandbits(63)
        sequences = []
        for index in range(request.num_sequences):
            scope = None
            if request.adapter is not None:
                store.lease(request.adapter)
                scope = store.scope(request.adapter, request.route_scope)
            # One request's answers differ; the multiplier spreads indices over the seed's upper half.
            seed = (base_seed + index * 0x9E3779B97F4A7C15) & 0x7FFFFFFFFFFFFFFF
            seq = Sequence(request, index, scope, seed, time.monotonic())
            sequences.append(seq)
        self.requests[request.id] = sequences
        for seq in sequences:
            self.scheduler.add(seq)

    def abort(self, request_id: str, index: int | None = None) -> list[SequenceOutput]:
        """Ends what is left of a request, or one sequence of it. Unknown ones are nothing to do."""
        return [
            self._finish(seq, SequenceOutput(request_id, seq.index), FinishReason.ABORT)
            for seq in self.requests.get(request_id, [])[:]
            if index is None or seq.index == index
        ]

    def step(self) -> tuple[list[SequenceOutput], StepStats | None]:
        """One forward pass for everything that fits. With `overlap` the following one is launched before the outcome of
        this one is looked at. None where nothing could be done: all that runs ends with tokens already chosen."""
        step = self.in_flight or self._launch()
        self.in_flight = None
        if step is None:
            return [], None
        if self.overlap and not step.launched.settles:
            self.in_flight = self._launch()
        return self._collect(step)

    def _launch(self) -> "_InFlight | None":
        begin = time.monotonic()
        works = self.scheduler.schedule()
        if not works:
            return None
        scheduled = time.monotonic()
        for work in works:
            work.seq.scheduled_at = work.seq.scheduled_at or scheduled
        launched = self.runner.launch(works)
        for i in launched.due:
            launched.works[i].seq.pending += 1
        return _InFlight(works, launched, scheduled - begin)

    def _collect(self, step: "_InFlight") -> tuple[list[SequenceOutput], StepStats]:
        works = step.works
        results, stages = self.runner.collect(step.launched)
        ran = time.monotonic()
        outputs = [out for work, result in results if (out := self._account(work, result)) is not None]
        decodes = sum(w.start >= w.seq.num_prompt for w in works)
        active = {w.seq.adapter for w in works if w.seq.adapter is not None}
        routes = {
            (result.segment, w.seq.adapter): result.route
            for w, result in results
            if result.route is not None and w.seq.adapter is not None
        }
        return outputs, replace(
            self.held(),
            schedule=step.schedule,
            batch=stages.batch,
            route=stages.route,
            forward=stages.forward,
            sample=stages.sample,
            output=time.monotonic() - ran,
            prefill_tokens=sum(w.count for w in works) - decodes,
            decode_tokens=decodes,
            adapters=len(active),
            routes=tuple((key, route) for (_, key), route in routes.items()),
            sequences=len(works),
            active=tuple(active),
        )

    def held(self) -> StepStats:
        """What stands in the books now, and no step."""
        return StepStats(
            *(0.0,) * 6,
            prefill_tokens=0,
            decode_tokens=0,
            adapters=0,
            routes=(),
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            blocks_used=self.blocks.num_blocks - self.blocks.num_free,
            blocks_total=self.blocks.num_blocks,
            preemptions=self.scheduler.num_preemptions,
        )

    def _account(self, work: Work, result: Result) -> SequenceOutput | None:
        """Books a piece of work; an output if it brought a token or an end."""
        seq = work.seq
        if result.token is not None:
            seq.pending -= 1
        if seq.status is Status.FINISHED:
            return None  # it ended, or was aborted, while the device was at work
        known = len(seq.tokens) - seq.num_prompt
        if seq.route_sum is not None:
            if result.route is not None:
                seq.route, seq.route_sum, seq.num_computed = result.route, None, 0
            return None
        self.scheduler.computed(work)
        if result.route is not None:
            self._note_route(seq, work, result.route)
        if result.prompt_logprobs is not None and not known:
            # After a preemption it starts over.
            before: list[TokenLogprob | None] = seq.prompt_logprobs if work.start else [None]
            seq.prompt_logprobs = [*before, *result.prompt_logprobs]
        if not work.last:
            return None
        out = SequenceOutput(seq.request.id, seq.index, cached_tokens=seq.cached_tokens)
        if seq.prompt_route is not None:
            out.route = RouteReport(seq.prompt_route, seq.route_changes)
        if not known:
            seq.first_token_at = time.monotonic()
            out.timing = Timing(seq.arrived, seq.scheduled_at, seq.first_token_at, 0.0)
            if seq.sampling.prompt_logprobs is not None:
                out.prompt_logprobs = seq.prompt_logprobs
        if seq.key in self.runner.sampler.grammars.broken:
            return self._finish(seq, out, FinishReason.ERROR)
        if result.token is None:
            return self._finish(seq, out, FinishReason.LENGTH)
        seq.tokens.append(result.token)
        out.token_ids = [result.token]
        if result.logprob is not None:
            out.logprobs = [result.logprob]
        sampling = seq.sampling
        if result.token in self.runner.sampler.stops(seq) and known + 1 >= sampling.least_tokens:
            out.stop_token_id = result.token
            return self._finish(seq, out, FinishReason.STOP)
        if known + 1 >= sampling.max_tokens or len(seq.tokens) >= self.runner.max_len:
            return self._finish(seq, out, FinishReason.LENGTH)
        return out

    def _note_route(self, seq: Sequence, work: Work, route: Route) -> None:
        if seq.scope is RouteScope.REQUEST:
            seq.route = route
        if work.start + work.count < seq.num_prompt:
            return
        if seq.prompt_route is None:
            seq.prompt_route = route
        elif route.group != seq.last_group:
            seq.route_changes += 1
        seq.last_group = route.group

    def _finish(self, seq: Sequence, out: SequenceOutput, reason: FinishReason) -> SequenceOutput:
        if seq.status is not Status.FINISHED:
            self.scheduler.finish(seq)
        out.finish_reason = reason
        out.timing = Timing(seq.arrived, seq.scheduled_at, seq.first_token_at, time.monotonic())
        self.runner.sampler.forget(seq)
        if seq.adapter is not None:
            self.runner.store.release(seq.adapter)
        siblings = self.requests[seq.request.id]
        siblings.remove(seq)
        if not siblings:
            del self.requests[seq.request.id]
        return out

    def prepare_adapter(
        self, key: AdapterKey, folder: Path, pinned: Route | None = None
    ) -> tuple[FoldedAdapter, AdapterInfo]:
        """Reads, checks and folds an adapter without touching what runs: safe beside `step`. Raises AdapterError."""
        begin = time.monotonic()
        adapter = read_adapter(folder, self.layout)
        checked = time.monotonic()
        folded = self.runner.fold(key, adapter, pinned)
        folding = time.monotonic() - checked
        config = adapter.config
        tucka = config if isinstance(config, TuckAConfig) else None
        alpha = config.alpha if isinstance(config, TuckAConfig) else config.lora_alpha
        scope = None
        if tucka is not None:
            trained = (adapter.training or {}).get("route")
            scope = RouteScope(trained) if trained in (RouteScope.BATCH, RouteScope.REQUEST) else None
            scope = RouteScope.PINNED if pinned is not None else scope
        return folded, AdapterInfo(
            key=key,
            digest=adapter.digest,
            kind=adapter.kind,
            r=config.r,
            k=tucka.k if tucka else None,
            t=tucka.t if tucka else None,
            p=tucka.p if tucka else None,
            alpha=alpha,
            target_modules=tuple(sorted({path.rsplit(".", 1)[-1] for path in adapter.modules})),
            num_modules=len(adapter.modules),
            router=adapter.router,
            scope=scope,
            bytes=folded.num_bytes,
            training=adapter.training,
            load_seconds={"read": checked - begin, "fold": folding},
        )

    def add_adapter(self, folded: FoldedAdapter) -> None:
        """Makes a prepared adapter known to new requests. Raises AdapterCapacityError."""
        self.runner.store.add(folded)

    def load_adapter(self, key: AdapterKey, folder: Path, pinned: Route | None = None) -> AdapterInfo:
        """`prepare_adapter` and `add_adapter` at once. Raises AdapterError."""
        folded, info = self.prepare_adapter(key, folder, pinned)
        self.add_adapter(folded)
        return info

    def unload_adapter(self, key: AdapterKey) -> None:
        self.runner.store.unload(key)

    def check_integrity(self) -> None:
        """Raises RuntimeError if the books do not agree; for tests and idle moments."""
        self.scheduler.check_integrity()
        leases: dict[AdapterKey, int] = {}
        for seq in (s for group in self.requests.values() for s in group):
            if seq.adapter is not None:
                leases[seq.adapter] = leases.get(seq.adapter, 0) + 1
        held = {key: entry.leases for key, entry in self.runner.store.loaded.items() if entry.leases}
        if leases != held:
            raise RuntimeError("adapters: the leases differ from the sequences in flight")
