"""What adapters cost the engine: `python -m tucka_runtime.bench`.

Makes a random Llama (8 layers, hidden 512) and random adapters, and generates with the base alone and with adapters,
beside the floor: the model's bare matrix products in torch, same rows, nothing else; on a CPU that has products of the
type also with weights packed for oneDNN. Rounds are interleaved, so that what else the machine does hits all alike; the
medians' ratios are the result. `ms/step` is a decoding step's, counted from when every prompt is in.

On a GPU, at the shape of a Llama-3-8B, beside transformers' continuous batching:

    python -m tucka_runtime.bench --llama-3-8b --transformers --concurrency 64 --prompt 1024 --adapters 1,8,32 \\
        --targets q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj
"""

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tucka_runtime.engine import environment

environment.prepare()  # torch reads it when it is imported

import torch  # noqa: E402
from torch.nn.functional import linear  # noqa: E402

from tucka_runtime import LLM, SamplingParams  # noqa: E402
from tucka_runtime.adapters.format import TuckASpec, write_adapter  # noqa: E402
from tucka_runtime.config import KERNELS, ROUTE_SCOPES  # noqa: E402
from tucka_runtime.messages import BaseLayout  # noqa: E402

LLAMA_3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}


PACKED = "packed matrix products"


def small(layers: int, hidden: int) -> dict[str, Any]:
    """Heads of 64, half as many KV heads, feed-forward 2.75 x hidden."""
    return {
        "vocab_size": 32000,
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": max(1, hidden // 128),
        "max_position_embeddings": 2048,
    }


def make_model(folder: Path, shape: dict[str, Any], dtype: torch.dtype) -> None:
    """A random Llama of the given shape, made on a GPU where there is one."""
    from transformers import LlamaConfig, LlamaForCausalLM, logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(LlamaConfig(**shape))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)


def make_adapter(folder: Path, layout: BaseLayout, targets: list[str], rank: int, seed: int) -> None:
    """A random TuckA adapter of k = 4 groups, t = 3 experts, p = 2 slices."""
    generator = torch.Generator().manual_seed(seed)
    config = TuckASpec(r=rank, k=4, t=3, p=2, alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    tensors: dict[str, torch.Tensor] = {}
    for path, (d_in, _) in layout.linears.items():
        if path.rsplit(".", 1)[-1] in targets:
            if not tensors:
                tensors[f"{path}.tucka_ec"] = torch.randn(12, d_in, generator=generator)
            tensors[f"{path}.tucka_g"] = torch.randn(4, 2, rank, rank, generator=generator)
            tensors[f"{path}.tucka_c"] = torch.randn(3, 2, generator=generator)
            tensors[f"{path}.tucka_u"] = torch.randn(d_in, rank, generator=generator)
    write_adapter(folder, config, tensors)


@dataclass(frozen=True)
class Took:
    """Seconds of a whole run, and of one decoding step in it, once every prompt is in; CPU seconds of such a step."""

    total: float
    step: float
    cpu: float = float("nan")


def generate(llm: LLM, names: list[str | None], prompt: int, new: int, scope: str) -> Took:
    """One request per name, all at once. Prompts are new each time: KV is never reused."""
    vocab = llm.engine.info.vocab_size
    prompts = [[random.randrange(10, vocab) for _ in range(prompt)] for _ in names]
    sampling = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
    begin = time.perf_counter()
    answers = llm.generate(prompts, sampling, names, scope)
    total = time.perf_counter() - begin
    timings = [timing for answer in answers if (timing := answer.outputs[0].timing) is not None]
    decoding = max(t.finished for t in timings) - max(t.first_token for t in timings)
    return Took(total, decoding / max(new - 1, 1))


def with_cpu(run: Callable[[int], Took], new: int) -> Took:
    """A run of `new` tokens, and what its decoding steps cost the CPU beyond a run of one token. With one thread that
    does not depend on what else the machine does; more spin while they wait, which counts."""
    begin = time.process_time()
    run(1)
    first = time.process_time()
    took = run(new)
    return replace(took, cpu=(time.process_time() - first - (first - begin)) / max(new - 1, 1))


@contextmanager
def peer(folder: Path, sequences: int, prompt: int, new: int, dtype: torch.dtype) -> Iterator[Callable[[], Took]]:
    """transformers' continuous batching of the base. It runs from the first round to the last, as a server would: to
    start it fills its cache and, on a GPU, may capture graphs. All at its defaults, but for the share of the free
    memory that it takes, which would be nearly all. Without flash-attention it has torch's own, with masks, and no
    graphs."""
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
    torch.nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
    settings = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)

    share = ContinuousBatchingConfig(max_memory_percent=0.4)
    with model.continuous_batching_context_manager(settings, continuous_batching_config=share) as manager:

        def run() -> Took:
            vocab = model.config.vocab_size
            prompts = [[random.randrange(10, vocab) for _ in range(prompt)] for _ in range(sequences)]
            begin = time.perf_counter()
            manager.add_requests(prompts, max_new_tokens=new)
            answers = [manager.get_result() for _ in range(sequences)]
            seconds = time.perf_counter() - begin
            if sum(len(a.generated_tokens) for a in answers if a is not None) != sequences * new:
                raise RuntimeError("transformers generated another number of tokens than asked for")
            return Took(seconds, float("nan"))

        yield run


def packed(matrix: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The product with a weight that oneDNN has laid out for a few rows."""
    weight = torch.ops.mkldnn._reorder_linear_weight(matrix, 8)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN packs weights of the type here: bf16 only where the CPU multiplies it."""
    if torch.cuda.is_available() or not torch.backends.mkldnn.is_available():
        return False
    bf16 = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 or bool(bf16)


def floor(llm: LLM, sequences: int, prompt: int, new: int, pack: bool = False) -> Took:
    """Seconds of the model's matrix products alone: the prompts' rows once, then one row per sequence and token."""
    weights = llm.engine.runner.model.weights
    like = weights.embed
    own = [m for layer in weights.layers for m in layer.linears]
    # On a CPU the engine's are packed, and torch's own product is asked for plain ones.
    matrices = [m.dense() if like.is_cuda else torch.randn(m.shape).to(like) for m in own]
    head = weights.head.dense() if like.is_cuda else torch.randn(weights.head.shape).to(like)
    widths = {m.shape[1] for m in [*matrices, head]}
    inputs = {
        (r, w): torch.randn(r, w, dtype=like.dtype, device=like.device)
        for r in (sequences, sequences * prompt)
        for w in widths
    }

    product = packed if pack else lambda matrix: lambda x: linear(x, matrix)
    layers = [(matrix.shape[1], product(matrix)) for matrix in matrices]
    last = product(head)

    def products(rows: int) -> None:
        for width, multiply in layers:
            multiply(inputs[rows, width])
        last(inputs[sequences, head.shape[1]])

    begin = time.perf_counter()
    with torch.inference_mode():
        products(sequences * prompt)
        if like.is_cuda:
            torch.cuda.synchronize()
        all_in = time.perf_counter()
        for _ in range(new - 1):
            products(sequences)
        if like.is_cuda:
            torch.cuda.synchronize()
    end = time.perf_counter()
    return Took(end - begin, (end - all_in) / max(new - 1, 1))


def arguments(module: str, about: str | None, rounds: int) -> argparse.ArgumentParser:
    """What all benches of the engine on a random Llama have on their command line."""
    parser = argparse.ArgumentParser(
        prog=f"python -m tucka_runtime.{module}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=rounds, help="interleaved repeats; medians are printed")
    parser.add_argument("--threads", type=int, help="torch's CPU threads (default: as many as a server takes)")
    return parser


def main() -> int:
    parser = arguments("bench", __doc__, rounds=7)
    parser.add_argument("--llama-3-8b", action="store_true", help="that shape instead of --layers and --hidden")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="this base instead of a random one")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--kernels", default="auto", choices=KERNELS)
    parser.add_argument("--adapters", default="1,8", help="numbers of adapters, a case for each")
    parser.add_argument("--targets", default="q_proj,v_proj", help="adapted linears, by name")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--scope", default="batch", choices=ROUTE_SCOPES)
    parser.add_argument("--concurrency", type=int, default=8, help="sequences at once")
    parser.add_argument("--prompt", type=int, default=64, help="tokens in each prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens generated by each")
    parser.add_argument("--transformers", action="store_true", help="measure its continuous batching of the base too")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()
    counts = [int(count) for count in args.adapters.split(",")]
    n, dtype = args.concurrency, getattr(torch, args.dtype)
    with tempfile.TemporaryDirectory() as scratch:
        times = _measure(args, Path(scratch), counts, dtype)

    median = {name: statistics.median(t.total for t in own) for name, own in times.items()}
    steps = {name: statistics.median(t.step for t in own) for name, own in times.items()}
    cpu = {name: statistics.median(t.cpu for t in own) for name, own in times.items()}
    base = median["base only"]
    ratios = {
        "base / floor": median["bare matrix products"] / base,
        **({"base / packed floor": median[PACKED] / base} if PACKED in median else {}),
        **{f"{name} / base": base / seconds for name, seconds in median.items() if "adapter" in name},
    }
    if args.transformers:
        ratios["base / transformers"] = median["transformers"] / base
    result = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "settings": vars(args),
        "tokens_per_second": {name: n * args.new / seconds for name, seconds in median.items()},
        "seconds_per_decoding_step": steps,
        "cpu_seconds_per_decoding_step": cpu,
        "ratios": ratios,
    }
    if args.json:
        print(json.dumps(result, indent=1))
        return 0
    print(f"torch {result['torch']}, {result['device']}, {result['threads']} threads, {args.dtype}, scope {args.scope}")
    for name, seconds in median.items():
        spread = (max(t.total for t in times[name]) - min(t.total for t in times[name])) / seconds
        print(
            f"{name:22} {n * args.new / seconds:9.1f} tok/s   {1000 * steps[name]:8.3f} ms/step   "
            f"{1000 * cpu[name]:8.3f} CPU ms/step   spread {spread:4.0%}"
        )
    for name, ratio in ratios.items():
        print(f"{name:22} {ratio:9.2f}")
    return 0


def _measure(args: argparse.Namespace, scratch: Path, counts: list[int], dtype: torch.dtype) -> dict[str, list[Took]]:
    model, n = args.model or scratch / "model", args.concurrency
    if args.model is None:
        make_model(model, LLAMA_3_8B if args.llama_3_8b else small(args.layers, args.hidden), dtype)
    length = args.prompt + args.new + 16
    llm = LLM(
        model,
        kernels=args.kernels,
        max_model_len=max(length, 2048),
        kv_cache_tokens=max(n * length, 2048),
        max_num_seqs=max(n, 8),
    )
    names = [f"adapter-{i}" for i in range(max(counts))]
    for i, name in enumerate(names):
        make_adapter(scratch / name, llm.engine.layout, args.targets.split(","), args.rank, seed=i)
        llm.load_adapter(name, scratch / name)
    while llm.engine.rehearsal.prepare():
        pass

    def run(own: list[str | None]) -> Callable[[], Took]:
        return lambda: with_cpu(lambda new: generate(llm, own, args.prompt, new, args.scope), args.new)

    def taking_turns(members: list[str]) -> Callable[[], Took]:
        """More adapters than sequences come by turns: a batch has others than the one before."""
        order = itertools.cycle(members)
        return lambda: run([next(order) for _ in range(n)])()

    cases: dict[str, Callable[[], Took]] = {
        "bare matrix products": lambda: floor(llm, n, args.prompt, args.new),
        "base only": run([None] * n),
    }
    if packs(dtype):
        cases[PACKED] = lambda: floor(llm, n, args.prompt, args.new, pack=True)
    for count in counts:
        name = "1 adapter" if count == 1 else f"{count} adapters"
        cases[name] = taking_turns(names[:count])
    with ExitStack() as running:
        if args.transformers:
            cases["transformers"] = running.enter_context(peer(model, n, args.prompt, args.new, dtype))
        times: dict[str, list[Took]] = {name: [] for name in cases}
        for r in range(args.rounds + 1):
            for name, case in cases.items():
                took = case()
                if r:  # the first round warms up
                    times[name].append(took)
            print(f"\rround {r}/{args.rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return times


if __name__ == "__main__":
    sys.exit(main())
