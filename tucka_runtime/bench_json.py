"""What it costs that answers are held to a JSON schema: `python -m tucka_runtime.bench_json`.

Makes a random Llama (8 layers, hidden 512) with a tokenizer of 32,000 tokens, learnt from Python's own library, and
lets it answer at once so many requests, free and held to a schema that has no end. Rounds are interleaved, so that what
else the machine does hits both alike; the ratio of the medians of a decoding step is the result.
"""

import json
import random
import statistics
import sys
import sysconfig
import tempfile
from pathlib import Path

from tucka_runtime.engine import environment

environment.prepare()  # torch reads it when it is imported

import torch  # noqa: E402

from tucka_runtime import LLM, SamplingParams, grammars  # noqa: E402
from tucka_runtime.bench import arguments, make_model, small  # noqa: E402

TICKET = {
    "type": "object",
    "properties": {
        "title": {"type": "string"},
        "kind": {"enum": ["bug", "wish", "question"]},
        "count": {"type": "integer", "minimum": 0},
        "tags": {"type": "array", "items": {"type": "string"}},
        "author": {"type": "object", "properties": {"name": {"type": "string"}, "mail": {"type": ["string", "null"]}}},
    },
    "required": ["title", "kind", "count", "tags", "author"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": TICKET, "minItems": 10_000}


def make_tokenizer(folder: Path, vocab: int) -> int:
    """A byte-level BPE tokenizer of at most so many tokens, learnt from the standard library's sources. Returns how
    many it has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    tokenizer.train_from_iterator((path.read_text("utf-8", "replace") for path in sources), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return tokenizer.get_vocab_size()


def measure(llm: LLM, concurrency: int, new: int, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of a decoding step, free and held, of every round; one more before them warms up."""
    free = SamplingParams(max_tokens=new, temperature=1.0, ignore_eos=True)
    held = SamplingParams(
        max_tokens=new, temperature=1.0, ignore_eos=True, grammar=grammars.of_schema(json.dumps(SCHEMA))
    )
    took: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for sampling, own in zip((free, held), took, strict=True):
            prompts = [[random.randrange(10, 300) for _ in range(32)] for _ in range(concurrency)]
            answers = llm.generate(prompts, sampling)
            assert all(len(answer.outputs[0].token_ids) == new for answer in answers)
            timings = [timing for answer in answers if (timing := answer.outputs[0].timing) is not None]
            seconds = max(t.finished for t in timings) - max(t.first_token for t in timings)
            own += [seconds / (new - 1)] if number else []
    return took


def main() -> int:
    parser = arguments("bench_json", __doc__, rounds=5)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--new", type=int, default=96, help="tokens of each answer")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        known = make_tokenizer(Path(folder), args.vocab)
        shape = small(args.layers, args.hidden) | {"vocab_size": args.vocab, "bos_token_id": 0, "eos_token_id": 1}
        make_model(Path(folder), shape, torch.float32)
        llm = LLM(Path(folder), kv_cache_tokens=16384, num_threads=args.threads)
        info = llm.engine.info
        print(f"torch {torch.__version__}, {info.device}, {info.num_threads} threads, {info.kernels} kernels")
        free, held = (statistics.median(own) for own in measure(llm, args.concurrency, args.new, args.rounds))
        print(
            f"concurrency {args.concurrency}, {known} tokens known: free {1000 * free:.2f} ms/step, "
            f"JSON {1000 * held:.2f} ms/step, ratio {held / free:.3f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
