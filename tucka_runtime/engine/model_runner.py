"""The device: model, KV tensors, one forward pass per step."""

import os
import time
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from tucka_runtime.adapters.format import Adapter
from tucka_runtime.config import EngineConfig
from tucka_runtime.engine.adapters.active import ActiveSet
from tucka_runtime.engine.adapters.delta import Routes, RouteSum
from tucka_runtime.engine.adapters.fold import fold
from tucka_runtime.engine.adapters.folded import FoldedAdapter
from tucka_runtime.engine.adapters.store import AdapterStore
from tucka_runtime.engine.batch import Batch, Chosen, row_order
from tucka_runtime.engine.cuda_graphs import Graphs
from tucka_runtime.engine.decoder import Decoder
from tucka_runtime.engine.sampler import Choice, Sampler, logprobs
from tucka_runtime.engine.scheduler import Work
from tucka_runtime.engine.sequence import Sequence, Status
from tucka_runtime.errors import AdapterCapacityError, ModelLoadError
from tucka_runtime.kernels import dispatch
from tucka_runtime.messages import AdapterKey, Route, RouteScope, TokenLogprob
from tucka_runtime.models.weights import fingerprint, load_weights, read_config

CPU_MEMORY_SHARE = 0.25  # of what is free, for the KV cache: the rest is the operating system's, and other processes'
# Of what is free once the weights are loaded. The rest is for activations, graphs and adapters, of which 256 for all
# seven linears of a Llama-3-8B at r 16 take 10.7 GB.
GPU_MEMORY_SHARE = 0.85
SCORED_ROWS = 256  # prompt rows whose logits exist at once


@dataclass(frozen=True, slots=True)
class Stages:
    """Seconds of one pass on the host: packing the batch, routes and cores known from token ids, the layers, and the
    choice of tokens."""

    batch: float
    route: float
    forward: float
    sample: float


@dataclass(eq=False)
class Launched:
    """A pass that the device was given: its works in row order, the segment of each, those that bring a token."""

    works: list[Work]
    segment_of: list[int | None]
    due: list[int]
    choice: Choice | None
    tokens: Tensor | None
    """The chosen ones, on the host once `done` has passed; so are the routes."""
    routes: list[Routes]
    done: torch.cuda.Event | None
    scores: dict[int, list[TokenLogprob]] = field(default_factory=dict)
    """Of prompts that are scored, by work."""
    stages: Stages = Stages(0.0, 0.0, 0.0, 0.0)

    @property
    def settles(self) -> bool:
        """Whether what comes next depends on what this brings: a route that must be known to go on, penalties for the
        tokens so far, a schema, log-probabilities, which are computed on the host."""
        return any(_settles(work.seq) for work in self.works)


def _settles(seq: Sequence) -> bool:
    p = seq.sampling
    unrouted = seq.scope is RouteScope.REQUEST and seq.route is None
    held = p.penalised or p.json_schema is not None
    return bool(held or unrouted or p.logprobs is not None or p.prompt_logprobs is not None)


@dataclass(eq=False)
class Result:
    """What one piece of work brought: the next token if it was due, its segment and that one's route, prompt scores."""

    segment: int | None = None
    token: int | None = None
    logprob: TokenLogprob | None = None
    route: Route | None = None
    prompt_logprobs: list[TokenLogprob] | None = None


class Runner:
    """Loads the model and runs batches. Raises ModelLoadError if the model cannot be served as configured."""

    def __init__(self, config: EngineConfig, fused: bool | None = None):
        if config.model is None:
            raise ModelLoadError("No model was given: name a folder with --model.")
        folder = Path(config.model)
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        self.device = torch.device(_device(config.device))
        self.ops = dispatch.choose(self.device, fused)
        pretrained, arch = read_config(folder)
        weights, self.dtype = load_weights(folder, arch, config.dtype, self.device)
        self.arch = arch
        self.fingerprint = fingerprint(folder)
        self.max_len = _max_len(config, pretrained, arch.max_len, arch.positions is not None)
        self.model = Decoder(pretrained, arch, weights, self.max_len, self.ops)
        self.eos = _eos(folder, pretrained, arch.vocab)
        self.block_size = config.block_size
        self.num_blocks = self._num_blocks(config)
        shape = (self.num_blocks * self.block_size, arch.kv_heads, arch.head_dim)
        self.caches = [
            (
                torch.zeros(shape, dtype=self.dtype, device=self.device),
                torch.zeros(shape, dtype=self.dtype, device=self.device),
            )
            for _ in range(arch.num_layers)
        ]
        # The reference kernels take the small products of a delta in fp32: torch's bf16 ones cost 15 us each on a CPU
        # however small (d 512, one adapter on q and v: 105 us a site against 38).
        self.factor_dtype = self.dtype if self.ops.fused else torch.float32
        self.store = AdapterStore(arch, self.device, self.factor_dtype, config.max_loaded_adapters, self.ops.fused)
        self.sampler = Sampler(self.ops, arch.vocab, self.eos, self.device, folder)
        self.chosen = Chosen(config.max_num_seqs, self.device)
        self.graphs: Graphs | None = None
        if self.store.table is not None:
            self.graphs = Graphs(
                self.model,
                self.caches,
                self.store.table,
                self.chosen,
                config.max_num_seqs,
                self.max_len,
                self.block_size,
            )
        self.loading = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def _num_blocks(self, config: EngineConfig) -> int:
        arch = self.arch
        token_bytes = 2 * arch.num_layers * arch.kv_heads * arch.head_dim * self.dtype.itemsize
        wanted = config.kv_cache_tokens
        if wanted is None:
            if self.device.type == "cuda":
                room = torch.cuda.mem_get_info(self.device)[0] * GPU_MEMORY_SHARE
            else:
                room = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * CPU_MEMORY_SHARE
            # More than every sequence at full length can never be used.
            wanted = min(int(room / token_bytes), config.max_num_seqs * (self.max_len + self.block_size))
        if wanted < self.max_len:
            raise ModelLoadError(
                f"The KV cache holds {wanted} tokens, fewer than one sequence of {self.max_len} needs. "
                "Lower --max-model-len, or raise --kv-cache-tokens."
            )
        return -(-wanted // self.block_size)

    def fold(self, key: AdapterKey, adapter: Adapter, pinned: Route | None = None) -> FoldedAdapter:
        """The adapter in the serving form, made beside the step loop: safe in another thread, and on a GPU on a stream
        of its own. Raises InvalidAdapterError, or AdapterCapacityError if the GPU has no memory for it."""
        if self.loading is None:
            return fold(key, adapter, self.model, self.factor_dtype, pinned)
        try:
            with torch.cuda.stream(self.loading):
                folded = fold(key, adapter, self.model, self.factor_dtype, pinned)
        except torch.OutOfMemoryError as e:
            raise AdapterCapacityError(
                "The GPU has no memory left for the adapter. Unload one, or restart with a smaller --kv-cache-tokens."
            ) from e
        self.loading.synchronize()
        for tensor in folded.tensors():  # memory of one stream, read on another: it is free when both are done
            tensor.record_stream(torch.cuda.default_stream(self.device))
        return folded

    def start_routing(self, work: Work) -> None:
        """Request scope: a prompt that comes in chunks and whose router is inside the model is routed before it is
        computed, so that the route does not depend on how it is cut."""
        seq = work.seq
        if seq.scope is not RouteScope.REQUEST or seq.route is not None or work.start or work.count >= seq.num_prompt:
            return
        assert seq.adapter is not None
        routed = self.store.loaded[seq.adapter].folded.routed
        if routed is not None and routed.router.table is None:
            seq.route_sum = RouteSum(seq.adapter)

    @torch.inference_mode()
    def launch(self, works: Rows[Work]) -> Launched:
        """Gives the device one forward pass and the choice of the tokens that are due. On a GPU it does not wait."""
        begin = time.monotonic()
        for work in works:
            self.start_routing(work)
        keys = {w.seq.adapter for w in works if w.seq.adapter is not None}
        active = self.store.activate(keys) if keys else None
        if self.graphs is not None and self.graphs.fit(works, active):
            return self._replay(works, active, begin)
        rotary = self.model.rotary
        limit = rotary.stretch_from if rotary else None
        batch = Batch.build(
            works, active, self.block_size, limit, self.chosen, self.ops, self.factor_dtype, self.device
        )
        prepared = time.monotonic()
        hidden = self.model.forward(batch.ids, batch.positions, batch.lengths, batch.pages, self.caches, batch.delta)
        computed = time.monotonic()
        due = [batch.works[i].seq for i in batch.due]
        choice = tokens = None
        if due:
            choice = self.sampler.choose(self.model.logits(hidden, batch.due_rows, batch.delta), due)
            tokens = self.chosen.keep(choice.tokens, due)
        routes = [known.to_host() for known in batch.delta.routes]
        launched = Launched(batch.works, batch.segment_of, batch.due, choice, tokens, routes, self._event())
        launched.scores = self._score(batch, hidden)
        launched.stages = Stages(
            batch=prepared - begin - batch.delta.route_seconds,
            route=batch.delta.route_seconds,
            forward=computed - prepared,
            sample=time.monotonic() - computed,
        )
        return launched

    def _replay(self, works: Rows[Work], active: ActiveSet | None, begin: float) -> Launched:
        """The same by a graph: routes, layers and choice are launched at once."""
        assert self.graphs is not None
        bucket = self.graphs.bucket(len(works), active)
        works = sorted(works, key=row_order)
        segment_of = bucket.fill(works, active)
        prepared = time.monotonic()
        bucket.run()
        computed = time.monotonic()
        seqs = [w.seq for w in works]
        choice = Choice(bucket.tokens[: len(seqs)])
        if not all(map(self.sampler.plain, seqs)):
            choice = self.sampler.choose(bucket.logits[: len(seqs)].clone(), seqs)
        tokens = self.chosen.keep(choice.tokens, seqs)
        routes = [known.to_host() for known in bucket.routes()]
        launched = Launched(works, segment_of, list(range(len(works))), choice, tokens, routes, self._event())
        launched.stages = Stages(prepared - begin, 0.0, computed - prepared, time.monotonic() - computed)
        return launched

    def _event(self) -> torch.cuda.Event | None:
        """Passed once the device has come so far."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def collect(self, launched: Launched) -> tuple[list[tuple[Work, Result]], Stages]:
        """What a launched pass brought; waits for it."""
        begin = time.monotonic()
        results = [Result() for _ in launched.works]
        if launched.done is not None:
            launched.done.synchronize()
        if launched.choice is not None and launched.tokens is not None:
            tokens = launched.tokens.tolist()
            seqs = [launched.works[i].seq for i in launched.due]
            for i, token, score in zip(
                launched.due, tokens, self.sampler.entries(launched.choice, tokens, seqs), strict=True
            ):
                results[i].token, results[i].logprob = token, score
        for i, scores in launched.scores.items():
            results[i].prompt_logprobs = scores
        routes = dict(item for known in launched.routes for item in known.items())
        for segment, result in zip(launched.segment_of, results, strict=True):
            if segment is not None:
                result.segment, result.route = segment, routes.get(segment)
        for work, result in zip(launched.works, results, strict=True):
            seq = work.seq
            if seq.status is Status.FINISHED:
                continue  # aborted meanwhile: its adapter may be gone
            if isinstance(seq.route_sum, RouteSum) and work.start + work.count >= seq.num_prompt:
                result.route = self._summed_route(seq.route_sum)
        stages = replace(launched.stages, forward=launched.stages.forward + time.monotonic() - begin)
        return list(zip(launched.works, results, strict=True)), stages

    def _score(self, batch: Batch, hidden: Tensor) -> dict[int, list[TokenLogprob]]:
        """Log-probabilities of the prompt tokens that this pass's rows predict, by work."""
        scores = {}
        for i, work in enumerate(batch.works):
            seq = work.seq
            wanted = seq.sampling.prompt_logprobs
            if wanted is None or seq.route_sum is not None:
                continue
            out: list[TokenLogprob] = []
            end = min(work.start + work.count, seq.num_prompt - 1)
            for first in range(work.start, end, SCORED_ROWS):
                last = min(first + SCORED_ROWS, end)
                offset = batch.first_rows[i] - work.start
                rows = torch.arange(first + offset, last + offset, device=self.device)
                logits = self.model.logits(hidden, rows, batch.delta)
                out += logprobs(logits, seq.tokens[first + 1 : last + 1], [wanted] * (last - first))
            scores[i] = out
        return scores

    def _summed_route(self, part: RouteSum) -> Route:
        routed = self.store.loaded[part.adapter].folded.routed
        assert routed is not None and part.total is not None
        logits = routed.router.centroids @ (part.total / part.count)
        groups, weights = self.ops.route.select(logits[None], routed.router.t)
        return Route(int(groups[0]), tuple(weights[0].tolist()))


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelLoadError(
            "--device cuda was asked for, but torch sees no GPU. Use --device cpu, or install a driver."
        )
    return name


def _max_len(config: EngineConfig, pretrained: object, trained: int, learned: bool) -> int:
    """The context served. Scaled rotary positions may go past the trained length by their factor."""
    if config.max_model_len is None:
        return trained
    scaling = {} if learned else getattr(pretrained, "rope_parameters", None) or {}
    longest = trained if scaling.get("rope_type", "default") == "default" else int(trained * scaling.get("factor", 1.0))
    if config.max_model_len > longest:
        raise ModelLoadError(f"--max-model-len {config.max_model_len} exceeds what the model can do: {longest}.")
    return config.max_model_len


def _eos(folder: Path, pretrained: object, vocab: int) -> frozenset[int]:
    """Tokens that end a text: those of generation_config.json, else config.json's. Some files name
    ones beyond the vocabulary, or -1 for none."""
    from transformers import GenerationConfig

    found: int | list[int] | None = None
    if (folder / "generation_config.json").is_file():
        try:
            found = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
        except (OSError, ValueError) as e:
            raise ModelLoadError(f"{folder / 'generation_config.json'} cannot be read: {e}") from e
    if found is None:
        found = getattr(pretrained, "eos_token_id", None)
    if found is None:
        return frozenset()
    return frozenset(i for i in (found if isinstance(found, list) else [found]) if 0 <= i < vocab)
