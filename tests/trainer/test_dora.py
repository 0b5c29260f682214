"""`--dora`: a LoRA adapter that learns each output's size apart, which is PEFT's DoRA and is served as such."""

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support.training import make_workplace, train
from tucka_runtime.llm import LLM
from tucka_runtime.messages import SamplingParams

SCALE = 2.0  # lora_alpha over r, by default


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_workplace(tmp_path_factory.mktemp("dora"))
    flags = ("--method", "lora", "--dora", "--steps", "20", "--lr", "3e-2", "--eval-fraction", "0.4")
    assert train(folder, *flags, "--target-modules", "q_proj", "v_proj", "down_proj") == 0
    return folder


def test_what_was_trained_is_the_papers_formula(workplace: Path) -> None:
    """W' = m · (W + s·BA) / ‖W + s·BA‖, each row by its own norm (arXiv 2402.09353, eq. 5), put into the base."""
    assert json.loads((workplace / "out" / "adapter_config.json").read_text())["use_dora"] is True
    base = AutoModelForCausalLM.from_pretrained(workplace / "base").double().eval()
    weights = {name: tensor.double() for name, tensor in load_file(workplace / "out/adapter_model.safetensors").items()}
    moved = 0.0
    with torch.no_grad():
        for name in [name for name in weights if name.endswith(".lora_magnitude_vector")]:
            path = name.removesuffix(".lora_magnitude_vector")
            linear = base.get_submodule(path.removeprefix("base_model.model."))
            moved = max(moved, (weights[name] - linear.weight.norm(dim=1)).abs().max().item())
            changed = linear.weight + SCALE * weights[f"{path}.lora_B.weight"] @ weights[f"{path}.lora_A.weight"]
            linear.weight.copy_(weights[name][:, None] * changed / changed.norm(dim=1, keepdim=True))
    assert moved > 1e-3  # the sizes were learnt too
    fresh = AutoModelForCausalLM.from_pretrained(workplace / "base").double()
    model = peft.PeftModel.from_pretrained(fresh, str(workplace / "out"), autocast_adapter_dtype=False).double().eval()
    ids = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, base(input_ids=ids).logits, rtol=1e-6, atol=1e-6)


def test_it_is_served_as_it_was_measured(workplace: Path) -> None:
    rows = [json.loads(line) for line in (workplace / "out" / "predictions.jsonl").read_text().splitlines()]
    measured = json.loads((workplace / "out" / "training.json").read_text())["eval"]
    llm = LLM(workplace / "base", adapters={"dora": str(workplace / "out")})
    found = llm.generate([row["prompt"] for row in rows], SamplingParams(temperature=0, max_tokens=4), "dora")
    said = [output.outputs[0].text for output in found]
    assert said == [row["said"] for row in rows]
    assert measured["loss"] < measured["base"]["loss"] - 0.1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "dora are LoRA's"),
        (("--method", "lora", "--sweep", "lr=1e-3,1e-2"), "Run tucka train once for each"),
    ],
)
def test_what_does_not_go_together_is_said(
    workplace: Path, tmp_path: Path, flags: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(workplace, "--dora", "--out", str(tmp_path / "out"), *flags) == 2
    assert words in capsys.readouterr().err
