"""PEFT's own tests of TuckA, run on a copy of PEFT that the method is put into, without the Hub.

    pip download --no-binary peft --no-deps peft==0.21.2 && tar xzf peft-0.21.2.tar.gz
    python -m tucka_runtime.trainer.experiments.peft_tests peft-0.21.2

The models that the tests take from the Hub are made here, under the same names, tiny and of random weights; what
`diffusers` has, which no test of TuckA uses, is an empty class if it is not installed. Needs pytest (extra `test`).
The exit status is 0 when nothing failed but what asks the Hub for something else.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
import transformers

from tucka_runtime.children import python
from tucka_runtime.errors import ConfigError
from tucka_runtime.trainer.upstream import put

FILES = (
    "custom_models", "config", "decoder_models", "feature_extraction_models", "seq_classifier",
    "encoder_decoder_models",
)  # fmt: skip

VOCABULARY, WIDTH, WIDE, LAYERS, HEADS, LENGTH = 1024, 32, 64, 2, 4, 128
ENDS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 5}
_GPT2 = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": LENGTH} | ENDS
_OPT = {
    "hidden_size": WIDTH, "word_embed_proj_dim": WIDTH, "ffn_dim": WIDE, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "max_position_embeddings": LENGTH,
} | ENDS  # fmt: skip
_LLAMA = {
    "hidden_size": WIDTH, "intermediate_size": WIDE, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
} | ENDS  # fmt: skip
_BERT = {
    "hidden_size": WIDTH, "intermediate_size": WIDE, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "max_position_embeddings": LENGTH,
}  # fmt: skip
_DEBERTA = _BERT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
_T5 = {
    "d_model": WIDTH, "d_kv": WIDTH // HEADS, "d_ff": WIDE, "num_layers": LAYERS, "num_heads": HEADS,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
_BART = {"d_model": WIDTH, "max_position_embeddings": LENGTH, "decoder_start_token_id": 2} | {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in (("layers", LAYERS), ("attention_heads", HEADS), ("ffn_dim", WIDE))
}

# The models of PEFT's test matrix: name on the Hub, class, configuration.
MODELS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("peft-internal-testing/tiny-random-OPTForCausalLM", "OPTForCausalLM", _OPT),
    ("peft-internal-testing/tiny-random-GPT2LMHeadModel", "GPT2LMHeadModel", _GPT2),
    ("hf-internal-testing/tiny-random-gpt2", "GPT2LMHeadModel", _GPT2),
    ("peft-internal-testing/tiny-random-GPTJForCausalLM", "GPTJForCausalLM", _GPT2 | {"rotary_dim": 4}),
    ("trl-internal-testing/tiny-random-LlamaForCausalLM", "LlamaForCausalLM", _LLAMA),
    ("peft-internal-testing/tiny-dummy-qwen2", "Qwen2ForCausalLM", _LLAMA | {"num_key_value_heads": 2}),
    ("hf-internal-testing/tiny-random-MistralForCausalLM", "MistralForCausalLM", _LLAMA | {"num_key_value_heads": 2}),
    (
        "hf-internal-testing/tiny-random-Gemma3ForCausalLM", "Gemma3ForCausalLM",
        _LLAMA | {"num_key_value_heads": 2, "head_dim": 8},
    ),
    ("peft-internal-testing/tiny-random-BertModel", "BertModel", _BERT),
    ("peft-internal-testing/tiny-random-RobertaModel", "RobertaModel", _BERT),
    ("peft-internal-testing/tiny-random-DebertaModel", "DebertaModel", _DEBERTA),
    ("peft-internal-testing/tiny-random-DebertaV2Model", "DebertaV2Model", _DEBERTA),
    ("peft-internal-testing/tiny-random-BertForSequenceClassification", "BertForSequenceClassification", _BERT),
    ("peft-internal-testing/tiny-random-RobertaForSequenceClassification", "RobertaForSequenceClassification", _BERT),
    ("trl-internal-testing/tiny-LlamaForSequenceClassification-3.2", "LlamaForSequenceClassification", _LLAMA),
    (
        "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated", "T5ForConditionalGeneration", _T5,
    ),
    ("peft-internal-testing/tiny-random-BartForConditionalGeneration", "BartForConditionalGeneration", _BART),
)  # fmt: skip


def make_models(folder: Path) -> None:
    for name, kind, fields in MODELS:
        torch.manual_seed(0)
        of = getattr(transformers, kind)
        of(of.config_class(vocab_size=VOCABULARY, **fields)).save_pretrained(folder / name)


def run(peft: Path, place: Path, files: list[str], chosen: str) -> list[ElementTree.Element]:
    """PEFT's test cases whose names `chosen` matches, with their outcomes; they are run on a copy in `place`."""
    copy = place / "peft"
    shutil.copytree(peft, copy, ignore=shutil.ignore_patterns(".git", "__pycache__"))
    put(copy)
    (copy / "tests/__init__.py").touch()  # PEFT's source package leaves it out
    make_models(copy)
    if importlib.util.find_spec("diffusers") is None:
        (copy / "src/diffusers.py").write_text("def __getattr__(name):\n    return type(name, (), {})\n")
    tests = [f"tests/test_{name}.py" for name in files]
    report = place / "report.xml"
    command = python("-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-W", "ignore", "-q")
    subprocess.run(
        [*command, "--tb=short", f"--junit-xml={report}", "-k", chosen, *tests],
        cwd=copy,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(copy / "src")},
        stdout=sys.stderr,
        check=False,
    )
    if not report.exists():
        raise ConfigError("pytest did not come to its end; what it said stands above.")
    return list(ElementTree.parse(report).iter("testcase"))


def outcome(case: ElementTree.Element) -> tuple[str, str]:
    """passed, failed or skipped, and why."""
    for tag in ("failure", "error", "skipped"):
        if (found := case.find(tag)) is not None:
            if tag == "skipped":
                return "skipped", found.get("message", "")
            if "OfflineModeIsEnabled" in (found.text or ""):
                return "failed", "asks the Hub, which is off"
            return "failed", textwrap.shorten(found.get("message", ""), 160)
    return "passed", ""


def report(cases: list[ElementTree.Element]) -> int:
    """Prints passed, failed and skipped of each file, and the reasons of the latter; the number that failed, but for
    those that ask the Hub."""
    totals: Counter[tuple[str, str]] = Counter()
    failed: Counter[tuple[str, str]] = Counter()
    skipped: Counter[str] = Counter()
    for case in cases:
        state, why = outcome(case)
        file = case.get("classname", "").removeprefix("tests.").partition(".")[0]
        totals[file, state] += 1
        totals["all", state] += 1
        if state == "failed":
            failed[case.get("name", "").partition("[")[0], why] += 1
        elif state == "skipped":
            skipped[why] += 1
    for file in dict.fromkeys(file for file, _ in totals if file != "all"):
        print(f"{file:<32}", ", ".join(f"{totals[file, state]} {state}" for state in ("passed", "failed", "skipped")))
    print(f"{'all':<32}", ", ".join(f"{totals['all', state]} {state}" for state in ("passed", "failed", "skipped")))
    for (name, why), count in failed.items():
        print(f"failed  {count:>3}  {name}: {why}")
    for why, count in skipped.most_common():
        print(f"skipped {count:>3}  {why}")
    return sum(count for (_, why), count in failed.items() if not why.startswith("asks the Hub"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peft", type=Path, help="the folder of PEFT's sources; it is not changed")
    parser.add_argument("--files", nargs="+", choices=FILES, default=list(FILES), help="of PEFT's tests/test_*.py")
    parser.add_argument("-k", default="TuckA", help="which tests, as pytest's -k has it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        try:
            cases = run(args.peft, Path(place), args.files, args.k)
        except ConfigError as error:
            print(error, file=sys.stderr)
            return 2
    return 1 if report(cases) else 0


if __name__ == "__main__":
    sys.exit(main())
