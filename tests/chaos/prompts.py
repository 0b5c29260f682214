"""Long prompts arrive beside streams: `python -m tests.chaos.prompts --hidden 512 --layers 8 --prompt 1500`.

The engine alone, a random Llama, 8 sequences that decode without end and one long prompt at a time, a new one as soon
as the last has its first token. Printed is what a step with decoding rows takes, that is the time between two tokens of
a stream, and how long the prompts take, without a limit (--decode-stretch 0) and with the server's own.
"""

import argparse
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
    parser.add_argument("--prompt", type=int, default=1500, help="tokens of each long prompt")
    parser.add_argument("--prompts", type=int, default=6, help="how many of them")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--ratio", type=float, default=2.0, help="p99 between tokens against their p50 alone, at most")
    return parser.parse_args(given)


def run(folder: Path, flags: argparse.Namespace, stretch: float) -> tuple[float, float, float]:
    """Returns p50 of decoding alone, p99 beside prompts, and the median prompt's time to its first token, in
    seconds."""
    from tucka_runtime.engine.engine import Engine

    config = EngineConfig(
        str(folder), device="cpu", decode_stretch=stretch, max_model_len=4096, kv_cache_tokens=16384, max_num_seqs=16
    )
    engine = Engine(config)
    engine.rehearsal.time_longest_step()
    endless = SamplingParams(max_tokens=3000, ignore_eos=True, temperature=0)
    engine.add(Request("streams", tuple(tuple(range(i + 1, i + 65)) for i in range(flags.streams)), endless))
    alone, beside, waited = [], [], []
    for _ in range(60):
        begin = time.monotonic()
        engine.step()
        alone.append(time.monotonic() - begin)
    for number in range(flags.prompts):
        tokens = tuple((7 * number + i) % 250 + 1 for i in range(flags.prompt))
        engine.add(Request(str(number), (tokens,), SamplingParams(max_tokens=1, temperature=0)))
        begun, done = time.monotonic(), False
        while not done:
            begin = time.monotonic()
            outputs, _ = engine.step()
            beside.append(time.monotonic() - begin)
            done = any(output.request_id == str(number) for output in outputs)
        waited.append(time.monotonic() - begun)
    ranked = sorted(beside)
    return statistics.median(alone[10:]), ranked[int(0.99 * (len(ranked) - 1))], statistics.median(waited)


def main(given: list[str] | None = None) -> int:
    """Returns 1 where a stream waited longer than it may."""
    flags = arguments(given)
    ratio = 0.0
    with tempfile.TemporaryDirectory() as name:
        make_model(Path(name), small(flags.layers, flags.hidden) | {"max_position_embeddings": 4096}, torch.float32)
        for stretch in (0.0, EngineConfig().decode_stretch):
            half, most, first = run(Path(name), flags, stretch)
            ratio = most / half
            print(
                f"--decode-stretch {stretch:.1f}: between tokens p50 {1e3 * half:6.1f} ms alone, "
                f"p99 {1e3 * most:7.1f} ms beside prompts, {ratio:5.2f} times; "
                f"a prompt's first token after {first:5.2f} s",
                flush=True,
            )
    return int(ratio > flags.ratio)


if __name__ == "__main__":
    environment.prepare()
    sys.exit(main())
