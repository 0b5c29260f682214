"""What drafts by n-gram lookup bring and cost: `python -m tucka_runtime.bench_ngram`.

Makes a random Llama (8 layers, hidden 512) and one random TuckA adapter, and lets both answer with and without
`--speculate ngram`, one request alone and eight at once. Three workloads: a greedy answer, which for a random model
soon repeats itself; one drawn from the whole vocabulary, in which nothing repeats; and one drawn from 16 tokens, in
which every pair of tokens repeats and hardly a draft is right: the worst there is. Rounds are interleaved; medians of
the tokens per second once every prompt is in, their ratio, how many tokens a sequence got per step, and how many of the
drafted tokens were right are printed. Both engines must answer alike, else it ends with an error.
"""

import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from tucka_runtime.engine import environment

environment.prepare()  # torch reads it when it is imported

import torch  # noqa: E402

from tucka_runtime import LLM, SamplingParams  # noqa: E402
from tucka_runtime.bench import arguments, make_adapter, make_model, small  # noqa: E402
from tucka_runtime.messages import Request, RouteScope  # noqa: E402

FEW = tuple(range(100, 116))
WORKLOADS = {
    "repetitive": SamplingParams(temperature=0.0, ignore_eos=True),
    "random": SamplingParams(temperature=1.0, seed=1, ignore_eos=True),
    "misleading": SamplingParams(temperature=1.0, seed=1, ignore_eos=True, allowed_token_ids=FEW),
}


@dataclass(frozen=True)
class Trial:
    """Seconds and tokens of decoding, sequences' steps in it, what was drafted and was right, and all tokens."""

    seconds: float
    tokens: int
    steps: int
    drafted: int
    accepted: int
    answers: list[list[int]]


def answer(llm: LLM, request: Request) -> Trial:
    """One request with several prompts, alone. Decoding begins when every prompt has its first token."""
    engine = llm.engine
    answers: list[list[int]] = [[] for _ in request.prompts]
    begin, tokens, steps, drafted, accepted = 0.0, 0, 0, 0, 0
    engine.add(request)
    while engine.busy:
        outputs, stats = engine.step()
        if begin and stats is not None:
            tokens, steps = tokens + len(outputs), steps + stats.sequences
            drafted, accepted = drafted + stats.draft_tokens, accepted + stats.accepted_tokens
        for out in outputs:
            answers[out.index] += out.token_ids
        if not begin and all(answers):
            begin = time.perf_counter()
    return Trial(time.perf_counter() - begin, tokens, steps, drafted, accepted, answers)


def measure(llms: dict[str, LLM], concurrency: int, new: int, rounds: int) -> dict[tuple[str, str], list[list[Trial]]]:
    """The runs of every round without drafts and with them, by workload and model. Raises RuntimeError if they do not
    answer alike. The first round warms up."""
    found: dict[tuple[str, str], list[list[Trial]]] = {}
    make = random.Random(0)
    for number in range(rounds + 1):
        prompts = tuple(tuple(make.choices(FEW, k=64)) for _ in range(concurrency))
        for workload, sampling in WORKLOADS.items():
            for model in ("base", "adapter"):
                runs = []
                for llm in llms.values():
                    key = llm.adapters["adapter"].key if model == "adapter" else None
                    params = replace(sampling, max_tokens=new)
                    runs.append(answer(llm, Request("it", prompts, params, 1, key, RouteScope.REQUEST)))
                if runs[0].answers != runs[1].answers:
                    raise RuntimeError(f"{workload}, {model}: with drafts the answers are others")
                found.setdefault((workload, model), []).extend([runs] if number else [])
    return found


def show(concurrency: int, found: dict[tuple[str, str], list[list[Trial]]]) -> None:
    """Prints a line for each workload and model."""
    print(f"\n{concurrency} at once")
    for (workload, model), rounds in found.items():
        off, on = (statistics.median(run.tokens / run.seconds for run in own) for own in zip(*rounds, strict=True))
        drafting = [runs[1] for runs in rounds]
        tokens, steps, drafted, accepted = (
            sum(getattr(run, name) for run in drafting) for name in ("tokens", "steps", "drafted", "accepted")
        )
        print(
            f"  {workload:11} {model:8} {off:8.1f} tok/s, with drafts {on:8.1f}: {on / off:5.2f} x   "
            f"{tokens / steps:5.2f} tokens a step   {accepted} of {drafted} drafted tokens right"
        )


def main() -> int:
    parser = arguments("bench_ngram", __doc__, rounds=3)
    parser.add_argument("--new", type=int, default=192, help="tokens of each answer")
    parser.add_argument("--concurrency", default="1,8", help="requests at once, a table for each")
    parser.add_argument("--tokens", type=int, default=None, help="--speculate-tokens (default: the server's)")
    args = parser.parse_args()
    drafting = {"speculate": "ngram"} | ({"speculate_tokens": args.tokens} if args.tokens else {})
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        make_model(scratch / "model", small(args.layers, args.hidden), torch.float32)
        llms = {}
        for name, own in (("off", {}), ("on", drafting)):
            llm = llms[name] = LLM(scratch / "model", kv_cache_tokens=8192, num_threads=args.threads, **own)
            if name == "off":
                make_adapter(scratch / "adapter", llm.engine.layout, ["q_proj", "v_proj"], 16, seed=0)
            llm.load_adapter("adapter", scratch / "adapter")
        info = llms["on"].engine.info
        print(f"torch {torch.__version__}, {info.device}, {info.num_threads} threads, {info.kernels} kernels")
        for count in map(int, args.concurrency.split(",")):
            show(count, measure(llms, count, args.new, args.rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
