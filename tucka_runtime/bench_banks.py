"""What a bank's members cost beside separate adapters: `python -m tucka_runtime.bench_banks`.

Makes a random Llama (8 layers, hidden 512), a random bank of `--members` members, and eight random LoRAs of the bank's
rank, and asks `--requests` times for an answer: of the base alone, of the eight LoRAs by turns, then of 1, 8, 64 and
all members by turns. `--concurrency` requests are in a batch. Cases alternate; medians are printed, as a share of the
eight LoRAs' tokens per second too, and the bytes of each. Prompts are new each time: KV is never reused.
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tucka_runtime.engine import environment

environment.prepare()  # torch reads it when it is imported

import torch  # noqa: E402

from tucka_runtime import LLM, SamplingParams  # noqa: E402
from tucka_runtime.adapters.format import BankSpec, LoRASpec, write_adapter  # noqa: E402
from tucka_runtime.bench import arguments, make_model, small  # noqa: E402
from tucka_runtime.messages import BaseLayout  # noqa: E402

SEPARATE = 8
IN_USE = (1, 8, 64)
TARGETS = ("q_proj", "v_proj")


def make_bank(folder: Path, layout: BaseLayout, rank: int, members: int, core: str) -> None:
    """Random members `0`, `1`, ..."""
    generator = torch.Generator().manual_seed(0)
    paths = [path for path in layout.linears if path.endswith(TARGETS)]
    tensors = {}
    for path in paths:
        d_in, d_out = layout.linears[path]
        shape = (members, rank) if core == "diagonal" else (members, rank, rank)
        tensors[f"{path}.bank_u"] = torch.randn(rank, d_in, generator=generator) / d_in**0.5
        tensors[f"{path}.bank_e"] = torch.randn(rank, d_out, generator=generator) / rank
        tensors[f"{path}.bank_core"] = torch.randn(*shape, generator=generator)
    names = [str(member) for member in range(members)]
    write_adapter(folder, BankSpec(rank, core, names, paths), tensors)


def make_lora(folder: Path, layout: BaseLayout, rank: int, seed: int, targets: Sequence[str] = TARGETS) -> None:
    """A random LoRA, by default on a bank's linears."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, (d_in, d_out) in layout.linears.items():
        if path.endswith(tuple(targets)):
            tensors[f"{path}.lora_A.weight"] = torch.randn(rank, d_in, generator=generator) / d_in**0.5
            tensors[f"{path}.lora_B.weight"] = torch.randn(d_out, rank, generator=generator) / rank
    write_adapter(folder, LoRASpec(r=rank, lora_alpha=rank, target_modules=list(targets)), tensors)


def generate(llm: LLM, names: Sequence[str | None], requests: int, prompt: int, new: int) -> float:
    """Tokens per second of so many requests, the names by turns."""
    vocab = llm.engine.info.vocab_size
    prompts = [[random.randrange(10, vocab) for _ in range(prompt)] for _ in range(requests)]
    sampling = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
    begin = time.perf_counter()
    llm.generate(prompts, sampling, [names[i % len(names)] for i in range(requests)])
    return requests * new / (time.perf_counter() - begin)


def measure(llm: LLM, members: int, args: argparse.Namespace) -> dict[str, list[float]]:
    """Tokens per second of each case and round, after one that warms up. The adapters are `bank` and `lora0` and so
    on."""
    separate = f"{SEPARATE} LoRAs"
    cases: dict[str, list[str | None]] = {"base": [None], separate: [f"lora{i}" for i in range(SEPARATE)]}
    for count in (*(n for n in IN_USE if n < members), members):
        cases[f"{count} members"] = [f"bank/{member}" for member in range(count)]
    found: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(args.rounds + 1):
        for name, names in cases.items():
            rate = generate(llm, names, args.requests, args.prompt, args.new)
            if number:
                found[name].append(rate)
    return found


def show(found: dict[str, list[float]]) -> None:
    """Prints the table."""
    median = {name: statistics.median(rates) for name, rates in found.items()}
    separate = median[f"{SEPARATE} LoRAs"]
    print(f"{'':16}{'tok/s':>10}{f'/ {SEPARATE} LoRAs':>12}{'spread':>9}")
    for name, rate in median.items():
        spread = (max(found[name]) - min(found[name])) / rate
        print(f"{name:16}{rate:10.1f}{rate / separate:12.3f}{spread:9.0%}")


def main(argv: list[str] | None = None) -> int:
    parser = arguments("bench_banks", __doc__, rounds=5)
    parser.add_argument("--members", type=int, default=1000, help="of the bank (default: 1000)")
    parser.add_argument("--core", choices=("full", "diagonal"), default="full")
    parser.add_argument("--rank", type=int, default=16, help="of the bank and of the LoRAs (default: 16)")
    parser.add_argument("--requests", type=int, default=1000, help="in a case (default: 1000)")
    parser.add_argument("--concurrency", type=int, default=64, help="requests at once (default: 64)")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of a prompt (default: 16)")
    parser.add_argument("--new", type=int, default=32, help="tokens of an answer (default: 32)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        make_model(scratch / "model", small(args.layers, args.hidden), torch.float32)
        room = args.concurrency * (args.prompt + args.new + 16)
        llm = LLM(
            scratch / "model",
            kv_cache_tokens=max(room, 2048),
            max_num_seqs=args.concurrency,
            adapter_slots=SEPARATE + 1,
            num_threads=args.threads,
        )
        layout = llm.engine.layout
        make_bank(scratch / "bank", layout, args.rank, args.members, args.core)
        for number in range(SEPARATE):
            make_lora(scratch / f"lora{number}", layout, args.rank, number)
        names = ["bank", *(f"lora{number}" for number in range(SEPARATE))]
        infos = {name: llm.load_adapter(name, scratch / name) for name in names}
        print(
            f"torch {torch.__version__}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {args.core} cores"
        )
        print(f"{args.members} members in {infos['bank'].bytes:,} bytes; a LoRA is {infos['lora0'].bytes:,}")
        show(measure(llm, args.members, args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
