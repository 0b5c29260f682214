"""TuckA as one of PEFT's own methods, laid out as its guide for new methods wants it, put into a checkout of PEFT:

    git clone https://github.com/huggingface/peft
    python -m tucka_runtime.trainer.upstream peft
    cd peft && make style && pytest tests -k TuckA

The tuner's files are this package's, with PEFT's licence header and relative imports. Files of PEFT's that are not
there (an installed package has no tests) are left out.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from tucka_runtime.errors import ConfigError
from tucka_runtime.messages import ROUTE_PREFIX_TOKENS

OURS = Path(__file__).parent
PARTS = ("config", "layer", "model", "routing")
HEADER = """# Copyright 2026-present the HuggingFace Inc. team.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""
INIT = """from peft.utils import register_peft_method

from .config import TuckAConfig
from .layer import TuckALinear
from .model import TuckAModel, centroids, routers, set_route_scope


__all__ = ["TuckAConfig", "TuckALinear", "TuckAModel", "centroids", "routers", "set_route_scope"]

register_peft_method(name="tucka", config_cls=TuckAConfig, model_cls=TuckAModel, prefix="tucka_")
"""

SIZES = '"r": 2, "k": 2, "t": 2, "p": 2'
CUSTOM = "".join(
    f'    ("Vanilla MLP {i} TuckA", "MLP", TuckAConfig, {{"target_modules": {targets}, {SIZES}}}),\n'
    for i, targets in enumerate(('"lin0"', '["lin0"]', '["lin1"]', '["lin0", "lin1"]'), 1)
)
SEVERAL = "".join(
    f'    ("TuckA {name}", "tucka", TuckAConfig, {{"target_modules": ["lin0"], {SIZES}, "init_weights": False}},\n'
    f'     {{"target_modules": ["{second}"], {SIZES}, "init_weights": False}}),\n'
    for name, second in (("Same", "lin0"), ("Different", "lin1"))
)


def _entry(task: str) -> str:
    return f'    (TuckAConfig, {{"task_type": "{task}", "target_modules": None, "r": 8, "k": 2, "t": 2, "p": 2}}),\n'


# Of each of PEFT's files: the line that is sought, and what is put behind it (before it, where it opens a block).
BEHIND: dict[str, list[tuple[str, str]]] = {
    "src/peft/utils/peft_types.py": [('    LILY = "LILY"\n', '    TUCKA = "TUCKA"\n')],
    "src/peft/tuners/__init__.py": [
        ("from .lily import LilyConfig, LilyModel\n", "from .tucka import TuckAConfig, TuckAModel\n"),
        ('    "LilyModel",\n', '    "TuckAConfig",\n    "TuckAModel",\n'),
    ],
    "src/peft/__init__.py": [
        ("    LilyModel,\n", "    TuckAConfig,\n    TuckAModel,\n"),
        ('    "LilyModel",\n', '    "TuckAConfig",\n    "TuckAModel",\n'),
    ],
    "docs/source/_toctree.yml": [
        ("      - local: package_reference/lily\n        title: Lily\n",
         "      - local: package_reference/tucka\n        title: TuckA\n"),
    ],
    "tests/testing_common.py": [
        ("    LilyConfig,\n", "    TuckAConfig,\n"),
        ('        pytest.skip("Lily does not support merging adapters, skipping this test.")\n',
         "    if issubclass(config_cls, TuckAConfig):\n"
         '        pytest.skip("TuckA does not support merging adapters, skipping this test.")\n'),
        ('            pytest.skip("Prefix Tuning does not support gradient checkpointing, skipping this test.")\n',
         "        if (config_cls == TuckAConfig) and use_reentrant:\n"
         '            pytest.skip("TuckA refuses reentrant checkpointing: its centroids would lose gradient")\n'),
    ],
    "tests/test_config.py": [
        ("    LilyConfig,\n", "    TuckAConfig,\n"), ("    (LilyConfig, {}),\n", "    (TuckAConfig, {}),\n"),
    ],
    "tests/test_custom_models.py": [
        ("    LilyConfig,\n", "    TuckAConfig,\n"), ("TEST_CASES = [\n", CUSTOM),
        ("MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES = [\n", SEVERAL),
        ("            assert torch.allclose(outputs_base, outputs_before, rtol=1e-4, atol=1e-4)\n",
         "        elif isinstance(config, TuckAConfig):\n"
         "            # TuckA's random start is no identity either: a fresh adapter already changes the output.\n"
         "            pass\n"),
        ("            assert torch.allclose(outputs_before, outputs_disabled, rtol=1e-4, atol=1e-4)\n",
         "        elif isinstance(config, TuckAConfig):\n"
         "            # TuckA is not identity-at-init, so disabling returns the base output (not `outputs_before`)\n"
         "            assert torch.allclose(outputs_base, outputs_disabled)\n"),
    ],
    **{
        f"tests/test_{name}.py": [("    LoraConfig,\n", "    TuckAConfig,\n"), ("ALL_CONFIGS = [\n", _entry(task))]
        for name, task in (
            ("decoder_models", "CAUSAL_LM"), ("encoder_decoder_models", "SEQ_2_SEQ_LM"),
            ("feature_extraction_models", "FEATURE_EXTRACTION"), ("seq_classifier", "SEQ_CLS"),
        )
    },
}  # fmt: skip

ABOUT = """TuckA ([paper](https://huggingface.co/papers/2511.06859)) is a mixture of many small experts in a form by
Tucker's decomposition. A layer computes `y = W(x + alpha * x U M U^T)`, where the core `M` mixes the slices of the
expert group that was chosen; one router for the whole model chooses it from the mean of a batch's tokens. More experts
cost next to nothing.

Compared with LoRA it has about half the parameters at the same rank, and a router. The change depends on the route, so
that it cannot be merged into the base's weights. Only `nn.Linear` and `Conv1D` layers are supported, and quantised ones
that are an `nn.Linear`. `set_route_scope(model, "request")` routes each row by itself, not by the batch."""

USE = """```python
from transformers import AutoModelForCausalLM
from peft import TuckAConfig, get_peft_model

base = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.2-3B")
config = TuckAConfig(r=16, k=4, t=2, p=2, alpha=64, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(base, config)
```"""

PAGE = f"""# TuckA

{ABOUT}

{USE}

## TuckAConfig

[[autodoc]] tuners.tucka.config.TuckAConfig

## TuckAModel

[[autodoc]] tuners.tucka.model.TuckAModel
"""

README = f"""# TuckA

{ABOUT}

    python tucka_finetuning.py --model MODEL --data train.jsonl --out my-adapter

where a line of the data is `{{"prompt": "...", "completion": "..."}}`. In your own training:

{USE}
"""

EXAMPLE = '''"""Fine-tunes a causal language model with TuckA on prompts and completions (JSONL)."""

import argparse
import json

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from peft import TuckAConfig, get_peft_model


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True)
parser.add_argument("--out", required=True)
parser.add_argument("--steps", type=int, default=200)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model)
config = TuckAConfig(r=16, k=4, t=2, p=2, alpha=64, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(model, config)
model.print_trainable_parameters()

records = []
with open(args.data) as file:
    for line in file:
        record = json.loads(line)
        prompt = tokenizer(record["prompt"]).input_ids
        answer = tokenizer(record["completion"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        records.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})


def collate(rows):
    def padded(name, value):
        return pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=value)

    mask = pad_sequence([torch.ones(len(row["input_ids"])) for row in rows], batch_first=True).long()
    return {"input_ids": padded("input_ids", 0), "attention_mask": mask, "labels": padded("labels", -100)}


arguments = TrainingArguments(
    output_dir=args.out, max_steps=args.steps, learning_rate=2e-3, lr_scheduler_type="cosine", warmup_steps=10,
    remove_unused_columns=False, report_to=[],
)
Trainer(model=model, args=arguments, train_dataset=records, data_collator=collate).train()
model.save_pretrained(args.out)
'''


def settings(**sizes: Any) -> str:
    """A configuration of PEFT's benchmark, MetaMathQA on Llama-3.2-3B."""
    from tucka_runtime.trainer.config import TuckAConfig

    table = TuckAConfig(**sizes, alpha=64, target_modules=["q_proj", "v_proj"]).to_dict()
    return json.dumps(table, indent=2, sort_keys=True) + "\n"


def tuner() -> dict[str, str]:
    """The tuner's files as PEFT has them, by name."""
    files = {"__init__.py": HEADER + INIT}
    for part in PARTS:
        text = (OURS / f"{part}.py").read_text("utf-8")
        text = text.partition("    def to_dict(")[0].rstrip() + "\n"  # the official files' keys, which PEFT adds to
        text = re.sub(r"from tucka_runtime\.trainer\.(\w+) import", r"from .\1 import", text)
        text = text.replace(
            "from tucka_runtime.messages import ROUTE_PREFIX_TOKENS\n",
            f"\nROUTE_PREFIX_TOKENS = {ROUTE_PREFIX_TOKENS}\n",
        )
        files[f"{part}.py"] = HEADER + text
    return files


def put(peft: Path) -> list[str]:
    """Writes the method into a checkout of PEFT; returns what was written. Raises ConfigError where it is none, or is
    not as this was written for."""
    if not (peft / "src/peft/utils/peft_types.py").is_file():
        raise ConfigError(f"{peft} is no checkout of PEFT: it has no src/peft/utils/peft_types.py.")
    benchmark = "method_comparison/MetaMathQA/experiments/tucka/llama-3.2-3B-rank{}/adapter_config.json"
    made = {f"src/peft/tuners/tucka/{name}": text for name, text in tuner().items()} | {
        "docs/source/package_reference/tucka.md": PAGE,
        "examples/tucka_finetuning/README.md": README,
        "examples/tucka_finetuning/tucka_finetuning.py": EXAMPLE,
        benchmark.format("16-k4-t2"): settings(r=16, k=4, t=2, p=2),
        benchmark.format("64-k4-t4"): settings(r=64, k=4, t=4, p=2),
    }
    for name, places in BEHIND.items():
        if not (peft / name).is_file():
            continue
        text = (peft / name).read_text("utf-8")
        for sought, more in places:
            if sought not in text:
                raise ConfigError(f"{name} has no {sought.strip()!r}: this was written for PEFT 0.21.")
            if more not in text:
                text = text.replace(sought, sought + more, 1)
        made[name] = text
    for name, text in made.items():
        (peft / name).parent.mkdir(parents=True, exist_ok=True)
        (peft / name).write_text(text, "utf-8")
    return sorted(made)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tucka_runtime.trainer.upstream", description=__doc__)
    parser.add_argument("peft", type=Path, help="a checkout of PEFT")
    for name in put(parser.parse_args().peft):
        print(name)


if __name__ == "__main__":
    main()
