"""What an int8 KV cache costs in accuracy: `python -m tucka_runtime.bench_kv`.

The embedded model and its adapters, held-out prompts of each adapter's task with their right answers, each cache beside
the plain one of the same weights, in float32 and in bfloat16. All tokens of a prompt and its answer are scored in one
pass, and every key and value that attention reads comes from the cache. Printed for each: the perplexity of those
texts; how far a token's log-probability is from float32's with a plain cache, on average and at most; how many of the
likeliest next tokens are another; and how many prompts are answered exactly right, greedily.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from itertools import islice

from tucka_runtime.engine import environment

environment.prepare()  # torch reads it when it is imported

import torch  # noqa: E402

from tucka_runtime import LLM, SamplingParams  # noqa: E402
from tucka_runtime.config import KERNELS  # noqa: E402
from tucka_runtime.embedded import FOLDER  # noqa: E402
from tucka_runtime.trainer.experiments.tasks import TASKS  # noqa: E402

CASES = [(dtype, cache) for dtype in ("float32", "bfloat16") for cache in ("auto", "int8")]
SEED = 77
"""Of prompts that the adapters were neither trained nor chosen by."""
SCORED = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)


@dataclass(frozen=True)
class Scores:
    """Of every token of the texts behind its first: its log-probability, and the likeliest token there. `right`:
    prompts answered exactly."""

    logprobs: list[float]
    likeliest: list[int]
    right: int
    slot_bytes: int
    """Of a token in the whole cache."""


def score(llm: LLM, task: str, count: int) -> Scores:
    """The task's adapter on `count` held-out prompts."""
    records = list(islice(TASKS[task].records(SEED, True), count))
    turns = [[{"role": "user", "content": prompt}] for prompt, _, _ in records]
    assert llm.tokenizer is not None
    texts = [llm.tokenizer.render(turn) + answer for turn, (_, answer, _) in zip(turns, records, strict=True)]
    prompts = [llm.tokenizer.encode(text, False) for text in texts]
    logprobs, likeliest = [], []
    for output in llm.generate(prompts, SCORED, task):
        assert output.prompt_logprobs is not None
        for entry in output.prompt_logprobs[1:]:
            assert entry is not None
            logprobs.append(entry.logprob)
            likeliest.append(entry.top[0][0])
    answers = llm.chat(turns, SamplingParams(max_tokens=96, temperature=0.0), task)
    right = sum(out.outputs[0].text == answer for out, (_, answer, _) in zip(answers, records, strict=True))
    runner = llm.engine.runner
    size = sum(cache.untyped_storage().nbytes() for pair in runner.caches for cache in pair)
    return Scores(logprobs, likeliest, right, size // (runner.num_blocks * runner.block_size))


def measure(count: int, kernels: str, threads: int | None) -> dict[tuple[str, str], dict[str, Scores]]:
    """By type of the weights and of the cache, and by task."""
    found = {}
    for dtype, cache in CASES:
        adapters = {task: FOLDER / "adapters" / task for task in TASKS}
        llm = LLM(
            adapters=adapters, dtype=dtype, kv_cache_dtype=cache, kernels=kernels, num_threads=threads,
            kv_cache_tokens=8192,
        )  # fmt: skip
        found[dtype, cache] = {task: score(llm, task, count) for task in TASKS}
    return found


def show(found: dict[tuple[str, str], dict[str, Scores]], count: int) -> None:
    """Prints a line for each task and cache."""
    print(f"{'':10}{'weights':10}{'cache':7}{'B/token':>8}{'perplexity':>12}{'mean off':>10}{'most off':>10}", end="")
    print(f"{'other best':>12}{'right':>10}")
    exact = found[CASES[0]]
    for task in TASKS:
        for (dtype, cache), scores in found.items():
            own, true = scores[task], exact[task]
            off = [abs(a - b) for a, b in zip(own.logprobs, true.logprobs, strict=True)]
            other = sum(a != b for a, b in zip(own.likeliest, true.likeliest, strict=True)) / len(off)
            perplexity = math.exp(-sum(own.logprobs) / len(off))
            print(f"{task:10}{dtype:10}{cache:7}{own.slot_bytes:8}{perplexity:12.4f}", end="")
            print(f"{sum(off) / len(off):10.5f}{max(off):10.4f}{other:12.2%}{own.right:6}/{count}")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tucka_runtime.bench_kv",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--prompts", type=int, default=200, help="of each adapter's task")
    parser.add_argument("--kernels", default="auto", choices=KERNELS)
    parser.add_argument("--threads", type=int, help="torch's CPU threads (default: as many as a server takes)")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {args.prompts} held-out prompts of each task")
    show(measure(args.prompts, args.kernels, args.threads), args.prompts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
