"""What a chat and a few-shot prompt recompute: `python -m tucka_runtime.bench_reuse`.

Makes a random Llama (8 layers, hidden 512) and one random TuckA adapter, and asks it, one request at a time: the turns
of a chat behind a system prompt, those of a chat whose first prompt is shorter than what routes it under the scope
`prefix`, questions behind the same twenty shots, and the first chat once more, as one that comes back after others have
taken its blocks. Each under the scopes `request` and `prefix`, and with a fixed
route, which makes it what a LoRA adapter is to the engine. Prints the prompt's tokens that were computed and the time
to the first token; all tokens are drawn from fixed seeds, and nothing is shared between two rounds. Last, what it takes
to copy the blocks of such a prompt elsewhere and back, which is what a cache of evicted blocks would do instead.
"""

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tucka_runtime.engine import environment

environment.prepare()  # torch reads it when it is imported

import torch  # noqa: E402

from tucka_runtime import LLM, Route, SamplingParams  # noqa: E402
from tucka_runtime.bench import arguments, make_adapter, make_model, small  # noqa: E402
from tucka_runtime.config import KV_CACHE_DTYPES  # noqa: E402

TURNS = 5
SAYS, ANSWERS = 48, 32
"""Tokens of what the user says in a turn, and of what is answered."""
SYSTEM = 256
SHORT = 40
"""Tokens of a first prompt that is shorter than the 64 that route it."""
SHOTS, SHOT = 20, 40
EVICTED = "evicted between turns"
CASES: dict[str, tuple[str, str | None]] = {
    "TuckA, request": ("routed", "request"),
    "TuckA, prefix": ("routed", "prefix"),
    "as LoRA": ("fixed", None),
}


@dataclass(frozen=True)
class PromptCost:
    """A prompt's tokens, those of them that were computed, and the seconds to the first token of the answer."""

    prompt: int
    computed: int
    seconds: float


def draw(seed: str, count: int, vocab: int) -> list[int]:
    """Tokens that only depend on the seed."""
    make = random.Random(seed)
    return [make.randrange(10, vocab) for _ in range(count)]


def ask(llm: LLM, case: str, prompt: list[int]) -> tuple[PromptCost, list[int]]:
    """One request alone, and its answer."""
    adapter, scope = CASES[case]
    sampling = SamplingParams(max_tokens=ANSWERS, temperature=0, ignore_eos=True)
    (output,) = llm.generate([prompt], sampling, adapter, scope)
    answer = output.outputs[0]
    assert answer.timing is not None
    seconds = answer.timing.first_token - answer.timing.arrived
    return PromptCost(len(prompt), len(prompt) - output.cached_tokens, seconds), answer.token_ids


def chat(llm: LLM, case: str, seed: str, first: int, evicted: bool = False) -> Iterator[PromptCost]:
    """A conversation whose first prompt has `first` tokens, and which finds nothing of itself if it is `evicted`."""
    vocab = llm.engine.info.vocab_size
    text = draw(f"{seed} {case} first", first, vocab)
    for turn in range(TURNS):
        if evicted:
            llm.engine.blocks.forget_all()
        took, answer = ask(llm, case, text)
        yield took
        text = [*text, *answer, *draw(f"{seed} {case} {turn}", SAYS, vocab)]


def few_shot(llm: LLM, case: str, seed: str) -> Iterator[PromptCost]:
    """Questions behind the same shots."""
    vocab = llm.engine.info.vocab_size
    shots = draw(f"{seed} {case} shots", SHOTS * SHOT, vocab)
    for turn in range(TURNS):
        yield ask(llm, case, [*shots, *draw(f"{seed} {case} {turn}", SAYS, vocab)])[0]


def measure(llm: LLM, rounds: int) -> dict[str, dict[str, list[list[PromptCost]]]]:
    """The turns of every round, by what was asked and by case. Rounds are interleaved; the first warms up."""
    found: dict[str, dict[str, list[list[PromptCost]]]] = {}
    for number in range(rounds + 1):
        for case in CASES:
            asked = {
                f"chat, system prompt of {SYSTEM} tokens": list(chat(llm, case, f"long {number}", SYSTEM + SAYS)),
                f"chat, first prompt of {SHORT} tokens": list(chat(llm, case, f"short {number}", SHORT)),
                f"{SHOTS} shots of {SHOT} tokens": list(few_shot(llm, case, f"shots {number}")),
                f"the first chat, {EVICTED}": list(chat(llm, case, f"gone {number}", SYSTEM + SAYS, evicted=True)),
            }
            for what, turns in asked.items():
                own = found.setdefault(what, {}).setdefault(case, [])
                own += [turns] if number else []
    return found


def copy_blocks(llm: LLM, tokens: int, rounds: int) -> tuple[int, float, float]:
    """Bytes of the blocks that so many tokens fill, and the median seconds that copying them out and back takes."""
    runner = llm.engine.runner
    slots = -(-tokens // runner.block_size) * runner.block_size
    rows = [cache[:slots] for pair in runner.caches for cache in pair]
    kept = [torch.empty_like(row, device="cpu") for row in rows]
    out, back = [], []
    for number in range(rounds + 1):
        begin = time.perf_counter()
        for to, row in zip(kept, rows, strict=True):
            to.copy_(row)
        between = time.perf_counter()
        for to, row in zip(rows, kept, strict=True):
            to.copy_(row)
        if runner.device.type == "cuda":
            torch.cuda.synchronize()
        if number:  # the first touches the memory
            out.append(between - begin)
            back.append(time.perf_counter() - between)
    return sum(row.nbytes for row in rows), statistics.median(out), statistics.median(back)


def show(found: dict[str, dict[str, list[list[PromptCost]]]]) -> None:
    """Prints a table for each thing that was asked: computed tokens and the median milliseconds, turn by turn."""
    for what, cases in found.items():
        prompts = ", ".join(str(turn.prompt) for turn in next(iter(cases.values()))[0])
        print(f"\n{what}: prompts of {prompts} tokens")
        for case, rounds in cases.items():
            columns = list(zip(*rounds, strict=True))
            cells = [
                f"{own[0].computed:5} {1000 * statistics.median(turn.seconds for turn in own):7.1f} ms"
                for own in columns
            ]
            hits = 1 - sum(t.computed for t in rounds[0]) / sum(t.prompt for t in rounds[0])
            print(f"  {case:16}" + "".join(cells) + f"   reused {hits:6.1%}")


def main() -> int:
    parser = arguments("bench_reuse", __doc__, rounds=3)
    parser.add_argument("--targets", default="q_proj,v_proj", help="adapted linears, by name")
    parser.add_argument("--kv-cache-dtype", default="auto", choices=KV_CACHE_DTYPES)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        make_model(scratch / "model", small(args.layers, args.hidden), torch.float32)
        llm = LLM(
            scratch / "model", kv_cache_tokens=32768, num_threads=args.threads, kv_cache_dtype=args.kv_cache_dtype
        )
        make_adapter(scratch / "adapter", llm.engine.layout, args.targets.split(","), 16, seed=0)
        llm.load_adapter("routed", scratch / "adapter")
        llm.load_adapter("fixed", scratch / "adapter", Route(0, (0.5, 0.5, 0.5)))
        info = llm.engine.info
        print(f"torch {torch.__version__}, {info.device}, {info.num_threads} threads, {info.kernels} kernels")
        found = measure(llm, args.rounds)
        show(found)
        for turn in next(iter(found.values()))["as LoRA"][0]:
            size, out, back = copy_blocks(llm, turn.prompt, 5)
            print(
                f"{turn.prompt} tokens' blocks, {size / 2**20:.1f} MiB: copied out in {1000 * out:.1f} ms, "
                f"back in {1000 * back:.1f} ms"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
