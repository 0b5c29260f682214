"""What the route scope `prefix` costs in accuracy against `request`, and whether training for it wins that back.

    python -m tucka_runtime.trainer.experiments.prefix
    python -m tucka_runtime.trainer.experiments.prefix --train words --steps 100 --tokens 16
    python -m tucka_runtime.trainer.experiments.prefix --train words --chats --steps 100 --tokens 32

The first measures the embedded adapters on the 200 held-out prompts of each. The others train an adapter anew, with
routes from whole prompts and with routes from their first tokens, and measure both; with `--chats` on conversations of
two turns, whose second prompt is the one that is measured: `prefix` routes it by what the first was about. Everything
comes from fixed seeds; one thread a process.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch

from tucka_runtime.embedded import FOLDER
from tucka_runtime.trainer.adapter import router_of
from tucka_runtime.trainer.base_model import load_base
from tucka_runtime.trainer.data import Example, load
from tucka_runtime.trainer.evaluate import evaluate
from tucka_runtime.trainer.experiments.default import ADAPTERS, HELD_RECORDS, SEED, TRAIN_RECORDS, train_all
from tucka_runtime.trainer.experiments.tasks import TASKS
from tucka_runtime.trainer.model import set_route_scope
from tucka_runtime.trainer.records import read

TOKENS = (16, 32, 64, 128)
TUCKA = [name for name, flags in ADAPTERS.items() if "--method tucka" in flags]


def make_chats(path: Path) -> None:
    """Makes conversations of a file's records: each goes on behind the one before it."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    before = [records[-1], *records[:-1]]
    chats = [b | {"messages": a["messages"] + b["messages"]} for a, b in zip(before, records, strict=True)]
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))


def measure(title: str, adapter: Path, held: list[Example], tokens: list[int]) -> None:
    """Prints the exact match under the scope `request`, and under `prefix` with each number of tokens."""
    base, _, device = load_base(FOLDER / "base", "float32", "cpu")
    model = peft.PeftModel.from_pretrained(base, str(adapter)).eval()
    router, pad = router_of(model), held[0].ids[-1]
    print(f"{title:<30}", end="")
    for scope, count in [("request", 0), *(("prefix", count) for count in tokens)]:
        set_route_scope(model, scope, prefix_tokens=count)
        exact = evaluate(model, held, pad, device, router=router).exact
        print(f"   {scope} {f'{count} ' if count else ''}{exact:.3f}", end="", flush=True)
    print()


def train(work: Path, name: str, held: list[Example], steps: int, tokens: list[int]) -> None:
    """Trains an adapter by whole prompts and by their first tokens, and measures each."""
    routes: dict[str, list[str]] = {"per-sample": []}
    routes |= {f"prefix {count}": ["--route-prefix-tokens", str(count)] for count in tokens}
    for route, flags in routes.items():
        more = ["--route-batch", route.split()[0], *flags]
        train_all(FOLDER / "base", work, work / route, [name], 1, steps, print, more)
        measure(f"{name}, trained {route}", work / route / name, held, tokens)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tucka_runtime.trainer.experiments.prefix", description=__doc__)
    parser.add_argument("--train", choices=TUCKA, help="train this adapter anew instead of measuring all")
    parser.add_argument("--chats", action="store_true", help="train on conversations of two turns")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS), help="lengths of the prefix")
    args = parser.parse_args()
    torch.set_num_threads(1)
    _, tokenizer, _ = load_base(FOLDER / "base", "float32", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name in [args.train] if args.train else TUCKA:
            TASKS[name].write(work, SEED, TRAIN_RECORDS, HELD_RECORDS)
            if args.chats:
                make_chats(work / f"{name}.jsonl")
                make_chats(work / f"{name}.held.jsonl")
            held: list[Any] = load(read(work / f"{name}.held.jsonl"), tokenizer, 1024, "last")
            longer = ", ".join(f"{sum(e.start > count for e in held)} over {count}" for count in args.tokens)
            print(f"{name}: {len(held)} held-out prompts, {longer} tokens", flush=True)
            if args.train:
                train(work, name, held, args.steps, args.tokens)
            else:
                measure(name, FOLDER / "adapters" / name, held, args.tokens)


if __name__ == "__main__":
    main()
