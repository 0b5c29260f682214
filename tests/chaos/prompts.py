"""Long prompts arrive beside streams: `python -m tests.chaos.prompts --hidden 512 --layers 8 --prompt 1500`.

The engine alone, a random Llama, 8 sequences that decode without end and one long prompt after the other. Printed is
what a step takes, that is the time between two tokens of a stream, beside a prompt as times what the streams take alone
just before it and after (their contexts grow, and their steps with them), and how long the prompts take, without a
limit (--decode-stretch 0) and with the server's own.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from tucka_runtime.bench import make_model, small
from tucka_runtime.config import EngineConfig
from tucka_runtime.engine import environment
from tucka_runtime.messages import Request, SamplingParams


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--prompt", type=int, default=1500, help="tokens of each long prompt")
    parser.add_argument("--prompts", type=int, default=6, help="how many of them")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--ratio", type=float, default=2.0, help="p99 between tokens against their p50 alone, at most")
    return parser.parse_args(given)


WARM, ALONE = 60, 30  # steps before the first prompt, and between two of them


def run(folder: Path, flags: argparse.Namespace, stretch: float) -> tuple[float, float, float]:
    """Returns the median step of decoding alone, in seconds, the p99 of steps beside prompts, in steps alone, and the
    median prompt's time to its first token, in seconds."""
    from tucka_runtime.engine.engine import Engine

    config = EngineConfig(
        str(folder), device="cpu", decode_stretch=stretch, max_model_len=4096, kv_cache_tokens=24576, max_num_seqs=16
    )
    engine = Engine(config)

    def step() -> tuple[float, set[str]]:
        begin = time.monotonic()
        outputs, _ = engine.step()
        return time.monotonic() - begin, {output.request_id for output in outputs}

    engine.rehearsal.time_longest_step()
    endless = SamplingParams(max_tokens=3900, ignore_eos=True, temperature=0)
    engine.add(Request("streams", tuple(tuple(range(i + 1, i + 65)) for i in range(flags.streams)), endless))
    for _ in range(WARM):
        step()
    alone, stretched, waited = [[step()[0] for _ in range(ALONE)]], [], []
    for number in range(flags.prompts):
        tokens = tuple((7 * number + i) % 250 + 1 for i in range(flags.prompt))
        engine.add(Request(str(number), (tokens,), SamplingParams(max_tokens=1, temperature=0)))
        beside, seen = [], set[str]()
        while str(number) not in seen:
            took, seen = step()
            beside.append(took)
        alone.append([step()[0] for _ in range(ALONE)])
        around = statistics.median(alone[-2] + alone[-1])
        stretched += [took / around for took in beside]
        waited.append(sum(beside))
    p99 = sorted(stretched)[int(0.99 * (len(stretched) - 1))]
    return statistics.median(itertools.chain(*alone)), p99, statistics.median(waited)


def main(given: list[str] | None = None) -> int:
    """Returns 1 where a stream waited longer than it may."""
    flags = arguments(given)
    p99 = 0.0
    with tempfile.TemporaryDirectory() as name:
        model = small(flags.layers, flags.hidden) | {"max_position_embeddings": 4096}
        make_model(Path(name), model, getattr(torch, flags.dtype))
        for stretch in (0.0, EngineConfig().decode_stretch):
            half, p99, first = run(Path(name), flags, stretch)
            print(
                f"--decode-stretch {stretch:.1f}: between tokens p50 {1e3 * half:6.1f} ms alone, "
                f"p99 {p99:5.2f} times as long beside prompts; a prompt's first token after {first:5.2f} s",
                flush=True,
            )
    return int(p99 > flags.ratio)


if __name__ == "__main__":
    environment.prepare()
    sys.exit(main())
