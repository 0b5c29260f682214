"""Third of three on a fresh device, ten minutes: the engine, end to end, and what it does when memory is full. From the
checkout's folder:

    PYTHONPATH=. python docs/measurements/first-run/engine.py
    TRITON_INTERPRET=1 PYTHONPATH=. python docs/measurements/first-run/engine.py --small   tiny, no device
"""

import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from report import Figures, Report

from tucka_runtime import LLM, SamplingParams
from tucka_runtime.bench import LLAMA_3_8B, generate, make_adapter, make_model, small
from tucka_runtime.errors import AdapterCapacityError
from tucka_runtime.messages import AdapterKey, Request

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class EngineRun:
    """One engine and the adapters of the sections."""

    def __init__(self, report: Report, folder: Path):
        self.small, self.folder = report.small, folder
        self.adapters, self.rows = (2, 2) if report.small else (32, 64)
        self.prompt, self.new = (4, 2) if report.small else (1024, 64)

    def start(self) -> Figures:
        """Seconds until a model is loaded, its kernels are compiled and its first graphs captured."""
        shape = {**small(1, 128), "vocab_size": 512} if self.small else {**LLAMA_3_8B, "num_hidden_layers": 32}
        make_model(self.folder / "model", shape, torch.float32 if self.small else torch.bfloat16)
        begin = time.monotonic()
        settings: dict[str, object] = {"device": "cpu", "kernels": "fused"} if self.small else {}
        tokens = self.rows * (self.prompt + self.new + 16)
        self.llm = LLM(
            self.folder / "model",
            max_model_len=max(256, self.prompt + self.new + 16),
            kv_cache_tokens=max(256, tokens),
            max_num_seqs=self.rows,
            max_num_batched_tokens=16 if self.small else 2048,
            **settings,
        )
        ready = time.monotonic() - begin
        self.llm.engine.rehearsal.time_longest_step()
        memory = self.llm.engine.runner.memory
        return {
            "ready s": round(ready, 1),
            "step MB": memory.step_bytes // 10**6,
            "room MB": (memory.room or 0) // 10**6,
        }

    def graphs(self) -> Figures:
        """What the graphs of one more kind of adapters take: decides cuda_graphs.MOST."""
        folder = self.folder / "adapter"
        make_adapter(folder, self.llm.engine.layout, ALL, 16, seed=0)
        begin, count = time.monotonic(), 0
        before = 0 if self.small else torch.cuda.memory_reserved()
        for i in range(self.adapters):
            self.llm.load_adapter(f"a{i}", folder)
        loaded = time.monotonic() - begin
        self.llm.engine.overlap = not self.small
        while self.llm.engine.rehearsal.prepare():
            count += 1
        taken = 0 if self.small else torch.cuda.memory_reserved() - before
        return {"load s": round(loaded, 1), "prepared": count, "adapters and graphs MB": taken // 10**6}

    def throughput(self) -> Figures:
        """Tokens per second, and milliseconds a decoding step, without adapters and with 1 and all."""
        found: Figures = {}
        for count in (0, 1, self.adapters):
            names = [f"a{i % count}" if count else None for i in range(self.rows)]
            took = [generate(self.llm, names, self.prompt, self.new, "batch") for _ in range(1 if self.small else 3)]
            best = min(took, key=lambda t: t.step)
            found[f"{count} adapters"] = f"{self.rows * self.new / best.total:.0f} tok/s {best.step * 1e3:.2f} ms/step"
        return found

    def mixed(self) -> Figures:
        """Milliseconds a step while a prompt arrives at every one, by graphs and launch by launch: what the host costs,
        and from how many rows on it does not matter, which decides prompt_bucket.MOST_ROWS."""
        runner, found = self.llm.engine.runner, dict[str, object]()
        graphs = runner.graphs
        for length in (4,) if self.small else (32, 160, 288, 448):
            found[f"{length} by graphs"] = self._prompts_arriving(length)
            runner.graphs = None
            try:
                found[f"{length} launched"] = self._prompts_arriving(length)
            finally:
                runner.graphs = graphs
        return found

    def _prompts_arriving(self, length: int) -> float:
        engine, sampling = self.llm.engine, SamplingParams(max_tokens=self.new, ignore_eos=True)
        for i in range(self.rows // 2):
            engine.add(self._request(f"d{i}", f"a{i % self.adapters}", 4, sampling))
        while any(seq.num_generated < 1 for group in engine.requests.values() for seq in group):
            engine.step()
        times, one = [], SamplingParams(max_tokens=1, ignore_eos=True)
        for i in range(2 if self.small else 40):
            engine.add(self._request(f"p{i}", f"a{i % self.adapters}", length, one))
            begin = time.monotonic()
            engine.step()
            times.append(time.monotonic() - begin)
        while engine.busy:
            engine.step()
        return round(sorted(times)[len(times) // 2] * 1e3, 2)

    def quiet(self) -> Figures:
        """Greedy tokens of a batch whose prompts are in the cache while nothing else happens, and while adapters are
        folded and graphs captured; and of its first request alone, whose products the device may add up in another
        order."""
        names = ["a0", None, "a1", "a0"]
        self._answer(names)
        alone, before = self._answer(["a0"]), self._answer(names)
        folder, engine, errors = self.folder / "adapter", self.llm.engine, []
        other = self.folder / "other"
        make_adapter(other, engine.layout, ["q_proj", "o_proj"], 32, seed=1)
        engine.load_adapter(AdapterKey("other", 1), other)

        def fold() -> None:
            try:
                for i in range(2 if self.small else 8):
                    engine.prepare_adapter(AdapterKey(f"beside-{i}", 1), folder)
            except Exception as error:  # a border: the thread's error is this section's
                errors.append(error)

        thread = threading.Thread(target=fold)
        thread.start()
        beside = self._answer(names)
        while thread.is_alive():
            engine.rehearsal.prepare()
        thread.join()
        if errors:
            raise errors[0]
        same, company = (sum(a == b for a, b in zip(own, beside, strict=True)) for own in (before, alone))
        return {"tokens": len(alone), "the same as quiet": same, "as alone": company}

    def full(self) -> Figures:
        """Adapters are loaded until one is refused; the engine goes on and says the same. All but the memory of a few
        is taken first: to load hundreds would take minutes."""
        engine, before, count = self.llm.engine, self._answer(["a0"]), 0
        memory, each = engine.runner.memory, engine.adapters.serving()[0].num_bytes
        # Two more stay at least, beside what a third would take: it is folded from three copies.
        left = memory.taken + (5 if self.small else 20) * each
        rest = 0 if self.small else (memory.room or left) - left
        memory.room = left
        taken = torch.empty(max(0, rest), dtype=torch.uint8, device="cpu" if self.small else "cuda")
        reason = ""
        while not reason and count < 10_000:
            try:
                engine.load_adapter(AdapterKey(f"more-{count}", 1), self.folder / "adapter")
                count += 1
            except AdapterCapacityError as error:
                reason = error.message
        if not count or self._answer(["a0"]) != before:
            raise RuntimeError(f"{count} adapters were loaded until {reason!r}, or the answer is another one then")
        engine.rehearsal.prepare()
        engine.check_integrity()
        return {"taken MB": len(taken) // 10**6, "loaded": count, "refused": reason}

    def _answer(self, names: list[str | None]) -> list[int]:
        sampling = SamplingParams(max_tokens=self.new, temperature=0, ignore_eos=True)
        prompts = [list(range(10, 10 + self.prompt))] * len(names)
        return list(self.llm.generate(prompts, sampling, names, "request")[0].outputs[0].token_ids)

    def _request(self, name: str, adapter: str, length: int, sampling: SamplingParams) -> Request:
        vocab = self.llm.engine.info.vocab_size
        prompt = tuple(random.randrange(10, vocab) for _ in range(length))
        return Request(name, (prompt,), sampling, adapter=self.llm.adapters[adapter].key)


if __name__ == "__main__":
    report = Report("engine", __doc__)
    with tempfile.TemporaryDirectory() as scratch:
        session = EngineRun(report, Path(scratch))
        steps: list[Callable[[], Figures]] = [
            session.start, session.graphs, session.throughput, session.mixed, session.quiet, session.full
        ]  # fmt: skip
        for run in steps:
            report.section(run.__name__, run)
    sys.exit(report.end())
