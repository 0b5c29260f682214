"""The device: model, KV tensors, one forward pass per step."""

import math
import time
from array import array
from collections.abc import Collection
from collections.abc import Sequence as Rows
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tucka_runtime import machine
from tucka_runtime.adapters.base_layout import base_layout
from tucka_runtime.adapters.format import Adapter
from tucka_runtime.base_files import end_tokens
from tucka_runtime.channel_messages import AdapterPart
from tucka_runtime.config import EngineConfig
from tucka_runtime.engine.adapters.active import ActiveSet
from tucka_runtime.engine.adapters.combine import Weighted, combine
from tucka_runtime.engine.adapters.fold import fold
from tucka_runtime.engine.adapters.folded import FoldedAdapter
from tucka_runtime.engine.adapters.footprint import folded_bytes
from tucka_runtime.engine.adapters.segment import RouteSum
from tucka_runtime.engine.adapters.store import AdapterStore
from tucka_runtime.engine.batch import Batch, BatchBuilder, Chosen, own_vocab_size, row_order
from tucka_runtime.engine.bucket import Bucket
from tucka_runtime.engine.cuda_graphs import CudaGraphs
from tucka_runtime.engine.decoder import Decoder
from tucka_runtime.engine.kv_cache import cache_dtype, count_blocks, make_caches
from tucka_runtime.engine.launched import Launched, Result, Round, Stages
from tucka_runtime.engine.memory import AdapterMemory
from tucka_runtime.engine.pooler import Pooler
from tucka_runtime.engine.sampler import Choice, Sampler, filtered, logprobs
from tucka_runtime.engine.scheduler import ScheduledChunk
from tucka_runtime.engine.sequence import Sequence, Status
from tucka_runtime.engine.turns import Work
from tucka_runtime.engine.verify import choose, read_tokens
from tucka_runtime.errors import ModelLoadError, NonFiniteError
from tucka_runtime.kernels import dispatch
from tucka_runtime.messages import AdapterKey, EngineInfo, Route, TokenLogprob
from tucka_runtime.models.architecture import Architecture
from tucka_runtime.models.weights import fingerprint, load_weights, read_config
from tucka_runtime.tokenizer import Tokenizer

SCORED_ROWS = 256  # prompt rows whose logits exist at once


class ModelRunner:
    """Loads the model and runs batches. Raises ModelLoadError if the model cannot be served as configured."""

    def __init__(self, config: EngineConfig):
        if config.model is None:
            raise ModelLoadError("No model was given: name a folder with --model.")
        folder = Path(config.model)
        self.device = torch.device(_device(config.device))
        self.on_gpu = self.device.type == "cuda"
        try:
            self.ops = dispatch.choose(self.device, config.kernels)
        except dispatch.BackendUnavailableError as e:
            raise ModelLoadError(str(e)) from e
        pretrained, arch = read_config(folder)
        torch.set_num_threads(config.num_threads or machine.threads(arch.hidden, torch.get_num_threads()))
        weights, self.dtype = load_weights(folder, arch, config.dtype, self.device, self.ops.linear)
        self.arch = arch
        max_len = _max_len(config, pretrained, arch)
        self.model = Decoder(pretrained, arch, weights, max_len, self.ops)
        self.rope_limit = self.model.rotary.stretch_from if self.model.rotary else None
        """The length from which rotary positions stretch with the text; None where they do not."""
        tokenizer = Tokenizer.load(folder)
        ends = tokenizer.ends if tokenizer else end_tokens(folder, None)
        self.block_size = config.block_size
        kv_dtype = cache_dtype(config, arch, self.dtype)
        self.num_blocks = count_blocks(config, arch, max_len, kv_dtype, self.device)
        self.caches = make_caches(arch, self.num_blocks * self.block_size, kv_dtype, self.device)
        self.factor_dtype = torch.float32 if self.ops.fp32_factors else self.dtype
        self.adapters = AdapterStore(arch, self.device, self.factor_dtype, config.adapter_slots, self.ops.by_address)
        self.sampler = Sampler(self.ops, arch.vocab, frozenset(ends), self.device, tokenizer)
        self.chosen = Chosen(config.max_num_seqs, self.device)
        self.route_sums: dict[tuple[str, int], RouteSum] = {}
        """The sums of router inputs, by sequence, of the prompts that are being routed."""
        self.batches = BatchBuilder(
            self.ops, self.block_size, self.rope_limit, self.factor_dtype, self.device, self.chosen, self.route_sums
        )
        self.pooler = Pooler()
        self.graphs: CudaGraphs | None = None
        if self.ops.graphs:
            assert self.adapters.table is not None
            self.graphs = CudaGraphs(
                self.model,
                self.caches,
                self.adapters.table,
                self.chosen,
                config.max_num_seqs,
                config.max_num_batched_tokens,
                max_len,
                self.block_size,
            )
        cached = sum(t.untyped_storage().nbytes() for pair in self.caches for t in pair)
        self.memory = AdapterMemory(self.device, cached)
        identity = fingerprint(folder)
        self.layout = base_layout(arch, identity, config.model)
        self.info = EngineInfo(
            model_type=arch.model_type,
            vocab_size=arch.vocab,
            max_model_len=max_len,
            eos_token_ids=tuple(sorted(ends)),
            dtype=str(self.dtype).removeprefix("torch."),
            device=str(self.device),
            kv_cache_tokens=self.num_blocks * self.block_size,
            fingerprint=identity,
            max_num_batched_tokens=config.max_num_batched_tokens,
            kernels=self.ops.name,
            num_threads=torch.get_num_threads(),
            hidden_size=arch.hidden,
            kv_cache_dtype=str(kv_dtype).removeprefix("torch."),
        )

    def fold(self, key: AdapterKey, adapter: Adapter, pinned: Route | None = None) -> Work[FoldedAdapter]:
        """The adapter in the serving form, on a GPU made on a stream of its own. Raises InvalidAdapterError, or
        AdapterCapacityError if there is no memory for it."""
        weights, dtype = self.model.weights, self.factor_dtype
        needed = folded_bytes(adapter, self.arch, self.dtype, dtype, pinned)
        work = fold(key, adapter, self.arch, weights, self.ops, dtype, pinned)
        return (yield from self.memory.make(work, *needed))

    def combine(self, key: AdapterKey, parts: Rows[tuple[Adapter, AdapterPart]]) -> Work[FoldedAdapter]:
        """Several adapters as one in the serving form, likewise. Raises InvalidRequestError where they cannot be, and
        what `fold` does."""
        weights, dtype = self.model.weights, torch.float32
        sizes = [folded_bytes(adapter, self.arch, self.dtype, dtype, part.pinned) for adapter, part in parts]
        kept, passing = sum(own for own, _ in sizes), max(own for _, own in sizes)

        def work() -> Work[FoldedAdapter]:
            own = []
            for adapter, part in parts:
                folded = yield from fold(key, adapter, self.arch, weights, self.ops, dtype, part.pinned)
                own.append(Weighted(folded, part.weight, part.member))
            return combine(key, own, self.factor_dtype)

        return (yield from self.memory.make(work(), kept, kept + passing))

    def warm_up(self) -> None:
        """Captures the graphs that a server without adapters needs."""
        if self.graphs is not None:
            self.graphs.warm_up()

    def prepare(self, adapters: Collection[FoldedAdapter]) -> bool:
        """Captures one graph that batches of these adapters will want; False if there are all, or none can be."""
        return self.graphs is not None and self.graphs.prepare(adapters)

    def stops(self, seq: Sequence) -> frozenset[int]:
        """Tokens that end the sequence."""
        return self.sampler.stops(seq)

    def forget(self, seq: Sequence) -> None:
        """Drops what is kept of a sequence between steps."""
        self.sampler.forget(seq)
        self.pooler.forget(seq)
        self.route_sums.pop(seq.key, None)

    def _start_routing(self, chunk: ScheduledChunk) -> None:
        """A prompt that has a route of its own, from tokens that do not all come in its first chunk, and whose router
        is inside the model, is routed before it is computed, so that the route does not depend on how it is cut."""
        seq = chunk.seq
        at_once = chunk.count >= seq.route_tokens
        if not seq.routes_itself or seq.route is not None or chunk.start or at_once:
            return
        assert seq.adapter is not None
        routed = self.adapters[seq.adapter].routed
        if routed is not None and routed.router.table is None:
            seq.routing = True
            self.route_sums[seq.key] = RouteSum(seq.adapter)

    @torch.inference_mode()
    def launch(self, chunks: Rows[ScheduledChunk]) -> Launched:
        """Gives the device one forward pass and the choice of the tokens that are due. On a GPU it does not wait,
        but to verify drafts."""
        begin = time.monotonic()
        for chunk in chunks:
            self._start_routing(chunk)
        self.sampler.begin([chunk.seq for chunk in chunks if chunk.due])
        keys = {chunk.seq.adapter for chunk in chunks if chunk.seq.adapter is not None}
        active = self.adapters.activate(keys) if keys else None
        bucket = self.graphs.find(chunks, active) if self.graphs is not None else None
        if bucket is not None:
            return self._replay(bucket, chunks, active, begin)
        batch = self.batches.build(chunks, active)
        prepared = time.monotonic()
        hidden = self.model.forward(
            batch.ids, batch.positions, batch.lengths, batch.attention, self.caches, batch.delta
        )
        logits = [self.model.logits(hidden, due.rows, batch.delta, due.vocab_size) for due in batch.due]
        scores = self._score(batch, hidden, active)
        embeddings = self.pooler.pool(batch, hidden)
        computed = time.monotonic()
        rounds = [
            part
            for due, own in zip(batch.due, logits, strict=True)
            for part in choose(self.sampler, self.chosen, own, batch.chunks, due)
        ]
        routes = [part.to_host() for part in batch.delta.routes]
        done = self._event()
        launched = Launched(batch.chunks, batch.segment_of, rounds, routes, done, scores, embeddings)
        launched.stages = Stages(
            batch=prepared - begin - batch.delta.route_seconds,
            route=batch.delta.route_seconds,
            forward=computed - prepared,
            sample=time.monotonic() - computed,
        )
        return launched

    def _replay(self, bucket: Bucket, chunks: Rows[ScheduledChunk], active: ActiveSet | None, begin: float) -> Launched:
        """The same by a graph: routes, layers and choice are launched at once."""
        chunks = sorted(chunks, key=row_order)
        segment_of = bucket.fill(chunks, active)
        prepared = time.monotonic()
        bucket.run()
        computed = time.monotonic()
        seqs = [chunks[i].seq for i in bucket.due]
        choice = Choice(bucket.tokens[: len(seqs)], self.sampler.finite(bucket.logits[: len(seqs)]))
        if not all(map(self.sampler.plain, seqs)):
            choice = self.sampler.choose(bucket.logits[: len(seqs)].clone(), seqs)
        elif any(map(filtered, seqs)):
            assert self.graphs is not None
            self.graphs.choose_filtered(bucket.seqs, seqs)
        rounds = [Round(bucket.due, choice, self.chosen.keep(choice.tokens, seqs))]
        routes = [part.to_host() for part in bucket.routes()]
        launched = Launched(chunks, segment_of, rounds, routes, self._event())
        launched.stages = Stages(prepared - begin, 0.0, computed - prepared, time.monotonic() - computed)
        return launched

    def _event(self) -> torch.cuda.Event | None:
        """An event that has passed once the device has come so far."""
        if not self.on_gpu:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def collect(self, launched: Launched) -> tuple[list[tuple[ScheduledChunk, Result]], Stages]:
        """What a launched pass brought; waits for it."""
        begin = time.monotonic()
        results = [Result() for _ in launched.chunks]
        if launched.done is not None:
            launched.done.synchronize()
        waited = time.monotonic() - begin
        read_tokens(self.sampler, launched, results)
        counted = time.monotonic() - begin - waited
        for i, scores in launched.scores.items():
            results[i].prompt_logprobs = scores
            if any(math.isnan(entry.logprob) for entry in scores):
                results[i].error = NonFiniteError.of(launched.chunks[i].seq.adapter is not None)
        for i, embedding in launched.embeddings.items():
            results[i].embedding = array("f", embedding.numpy().tobytes())
            if not embedding.isfinite().all():
                results[i].error = NonFiniteError.of(launched.chunks[i].seq.adapter is not None)
        routes = dict(item for part in launched.routes for item in part.items())
        for chunk, segment, result in zip(launched.chunks, launched.segment_of, results, strict=True):
            if segment is not None:
                result.segment, result.route = segment, routes.get(segment)
            seq = chunk.seq
            all_read = chunk.start + chunk.count >= seq.route_tokens
            if seq.routing and all_read and seq.status is not Status.FINISHED:  # aborted, its adapter may be gone
                result.route = self._summed_route(self.route_sums.pop(seq.key))
        stages = launched.stages
        stages = replace(stages, forward=stages.forward + waited, sample=stages.sample + counted)
        return list(zip(launched.chunks, results, strict=True)), stages

    def _score(self, batch: Batch, hidden: Tensor, active: ActiveSet | None) -> dict[int, list[TokenLogprob]]:
        """Log-probabilities of the prompt tokens that this pass's rows predict, by chunk."""
        scores = {}
        for i, chunk in enumerate(batch.chunks):
            seq = chunk.seq
            wanted = seq.sampling.prompt_logprobs
            if wanted is None or seq.routing:
                continue
            out: list[TokenLogprob] = []
            end = min(chunk.start + chunk.count, seq.num_prompt - 1)
            for first in range(chunk.start, end, SCORED_ROWS):
                last = min(first + SCORED_ROWS, end)
                offset = batch.first_rows[i] - chunk.start
                rows = torch.arange(first + offset, last + offset, device=self.device)
                logits = self.model.logits(hidden, rows, batch.delta, own_vocab_size(seq, active))
                out += logprobs(logits, seq.tokens[first + 1 : last + 1], [wanted] * (last - first))
            scores[i] = out
        return scores

    def _summed_route(self, part: RouteSum) -> Route:
        routed = self.adapters[part.adapter].routed
        assert routed is not None and part.total is not None
        logits = routed.router.centroids @ (part.total / part.count)
        groups, weights = self.ops.select(logits[None], routed.router.t)
        return Route(int(groups[0]), tuple(weights[0].tolist()))


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelLoadError(
            "--device cuda was asked for, but torch sees no GPU. Use --device cpu, or install a driver."
        )
    return name


def _max_len(config: EngineConfig, pretrained: object, arch: Architecture) -> int:
    """The context served. Scaled rotary positions may go past the trained length by their factor."""
    longest = arch.max_len
    if config.max_model_len is None:
        return longest
    scaling = {} if arch.positions else getattr(pretrained, "rope_parameters", None) or {}
    if scaling.get("rope_type", "default") != "default":
        longest = int(longest * scaling.get("factor", 1.0))
    if config.max_model_len > longest:
        raise ModelLoadError(f"--max-model-len {config.max_model_len} exceeds what the model can do: {longest}.")
    return config.max_model_len
