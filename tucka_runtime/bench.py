"""What adapters cost the engine: `python -m tucka_runtime.bench`.

Makes a random Llama (8 layers, hidden 512) and random adapters, and generates with the base alone, with one adapter and
with several, beside the floor: the model's bare matrix products in torch, same rows, nothing else. Rounds are
interleaved, so that what else the machine does hits all alike; the medians' ratios are the result.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import linear

from tucka_runtime.adapters.format import TuckAConfig, write_adapter
from tucka_runtime.config import SPIN, EngineConfig
from tucka_runtime.engine import Engine
from tucka_runtime.sequence import AdapterKey, Request, RouteScope, SamplingParams

VOCAB = 32000


def make_model(folder: Path, layers: int, hidden: int, dtype: torch.dtype) -> None:
    """A random Llama of the given shape: heads of 64, half as many KV heads, feed-forward 2.75 x hidden."""
    from transformers import LlamaConfig, LlamaForCausalLM, logging

    logging.disable_progress_bar()

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 128),
        max_position_embeddings=2048,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.save_pretrained(folder)


def make_adapter(folder: Path, engine: Engine, targets: list[str], rank: int, seed: int) -> None:
    """A random TuckA adapter of k = 4 groups, t = 3 experts, p = 2 slices."""
    generator = torch.Generator().manual_seed(seed)
    config = TuckAConfig(r=rank, k=4, t=3, p=2, alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    tensors: dict[str, torch.Tensor] = {}
    for path, (d_in, _) in engine.layout.linears.items():
        if path.rsplit(".", 1)[-1] in targets:
            if not tensors:
                tensors[f"{path}.tucka_ec"] = torch.randn(12, d_in, generator=generator)
            tensors[f"{path}.tucka_g"] = torch.randn(4, 2, rank, rank, generator=generator)
            tensors[f"{path}.tucka_c"] = torch.randn(3, 2, generator=generator)
            tensors[f"{path}.tucka_u"] = torch.randn(d_in, rank, generator=generator)
    write_adapter(folder, config, tensors)


def generate(engine: Engine, keys: list[AdapterKey | None], prompt: int, new: int, scope: RouteScope) -> float:
    """Seconds that one request per key takes, all at once. Prompts are new each time: KV is never reused."""
    for i, key in enumerate(keys):
        ids = tuple(random.randrange(10, VOCAB) for _ in range(prompt))
        sampling = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
        engine.add(Request(f"bench-{i}", (ids,), sampling, adapter=key, route_scope=scope))
    begin = time.perf_counter()
    while engine.busy:
        engine.step()
    return time.perf_counter() - begin


def floor(engine: Engine, sequences: int, prompt: int, new: int) -> float:
    """Seconds of the model's matrix products alone: the prompts' rows once, then one row per sequence and token."""
    weights = engine.runner.model.weights
    like = weights.embed
    matrices = [torch.randn(m.shape).to(like) for layer in weights.layers for m in layer.linears]
    head = torch.randn(weights.head.shape).to(like)
    widths = {m.shape[1] for m in [*matrices, head]}
    inputs = {(r, w): torch.randn(r, w).to(like) for r in (sequences, sequences * prompt) for w in widths}

    def products(rows: int) -> None:
        for matrix in matrices:
            linear(inputs[rows, matrix.shape[1]], matrix)
        linear(inputs[sequences, head.shape[1]], head)

    begin = time.perf_counter()
    with torch.inference_mode():
        products(sequences * prompt)
        for _ in range(new - 1):
            products(sequences)
        if like.is_cuda:
            torch.cuda.synchronize()
    return time.perf_counter() - begin


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tucka_runtime.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--adapters", type=int, default=8, help="adapters in the last case")
    parser.add_argument("--targets", default="q_proj,v_proj", help="adapted linears, by name")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--scope", default="batch", choices=("batch", "request"))
    parser.add_argument("--concurrency", type=int, default=8, help="sequences at once")
    parser.add_argument("--prompt", type=int, default=64, help="tokens in each prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens generated by each")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved repeats; medians are printed")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()
    if any(name not in os.environ for name in SPIN):  # read when torch starts: begin again as the engine's process does
        os.execve(sys.executable, [sys.executable, "-m", "tucka_runtime.bench", *sys.argv[1:]], {**SPIN, **os.environ})

    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch, "model")
        make_model(model, args.layers, args.hidden, getattr(torch, args.dtype))
        tokens = args.concurrency * (args.prompt + args.new + 16)
        engine = Engine(EngineConfig(model=str(model), max_model_len=2048, kv_cache_tokens=max(tokens, 2048)))
        keys = [AdapterKey(f"adapter-{i}", 1) for i in range(args.adapters)]
        for i, key in enumerate(keys):
            make_adapter(Path(scratch, key.name), engine, args.targets.split(","), args.rank, seed=i)
            engine.load_adapter(key, Path(scratch, key.name))
        n, scope = args.concurrency, RouteScope(args.scope)
        cases: dict[str, Callable[[], float]] = {
            "bare matrix products": lambda: floor(engine, n, args.prompt, args.new),
            "base only": lambda: generate(engine, [None] * n, args.prompt, args.new, scope),
            "1 adapter": lambda: generate(engine, [keys[0]] * n, args.prompt, args.new, scope),
            f"{args.adapters} adapters": lambda: generate(
                engine, [keys[i % args.adapters] for i in range(n)], args.prompt, args.new, scope
            ),
        }
        times: dict[str, list[float]] = {name: [] for name in cases}
        for r in range(args.rounds + 1):
            for name, run in cases.items():
                seconds = run()
                if r:  # the first round warms up
                    times[name].append(seconds)
            print(f"\rround {r}/{args.rounds}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)

    median = {name: statistics.median(t) for name, t in times.items()}
    rates = {name: n * args.new / t for name, t in median.items()}
    result = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "settings": vars(args),
        "tokens_per_second": rates,
        "base_over_floor": median["bare matrix products"] / median["base only"],
        "one_over_base": median["base only"] / median["1 adapter"],
        "all_over_base": median["base only"] / median[f"{args.adapters} adapters"],
    }
    if args.json:
        print(json.dumps(result, indent=1))
        return 0
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.dtype}, scope {args.scope}")
    for name, rate in rates.items():
        spread = (max(times[name]) - min(times[name])) / median[name]
        print(f"{name:22} {rate:9.1f} tok/s   {1000 * median[name] / args.new:7.2f} ms/step   spread {spread:4.0%}")
    print(f"base / floor       {result['base_over_floor']:.2f}")
    print(f"1 adapter / base   {result['one_over_base']:.2f}")
    print(f"{args.adapters} adapters / base  {result['all_over_base']:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
