"""The method inside PEFT itself, as it would be proposed there: the same files give the same adapter."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tucka_runtime.adapters.config import parse_config
from tucka_runtime.errors import ConfigError
from tucka_runtime.trainer import TuckAConfig
from tucka_runtime.trainer.experiments import peft_tests
from tucka_runtime.trainer.upstream import BEHIND, put

INSIDE = """
import sys, torch
from transformers import LlamaForCausalLM
import peft
assert "tucka_runtime" not in sys.modules and peft.__file__.startswith(sys.argv[1])
model = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(sys.argv[2]), sys.argv[3]).eval()
assert type(model.peft_config["default"]) is peft.TuckAConfig and model.peft_type == peft.PeftType.TUCKA
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(3, 23).view(2, 10)).logits, sys.argv[4])
model.save_pretrained(sys.argv[5])
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The installed PEFT, laid out as a checkout, with a line of each further file that is sought."""
    root = tmp_path / "peft"
    shutil.copytree(Path(peft.__file__).parent, root / "src/peft", ignore=shutil.ignore_patterns("__pycache__"))
    for name, places in BEHIND.items():
        if not (root / name).exists():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text("".join(sought for sought, _ in places))
    return root


def test_pefts_own_method_gives_what_the_plug_in_gives(checkout: Path, tmp_path: Path) -> None:
    written = put(checkout)
    assert put(checkout) == written  # again, with nothing twice
    for name in ("config", "model", "layer", "routing"):
        text = (checkout / f"src/peft/tuners/tucka/{name}.py").read_text()
        assert "tucka_runtime" not in text and text.startswith("# Copyright")
    assert (checkout / "src/peft/utils/peft_types.py").read_text().count("TUCKA") == 2
    for name in written:
        if name.startswith(("src", "examples")) and name.endswith(".py"):
            compile((checkout / name).read_text(), name, "exec")
    for name in (n for n in written if n.endswith("adapter_config.json")):
        table = json.loads((checkout / name).read_text())
        assert table["peft_type"] == "TUCKA" and table["target_modules"] == ["q_proj", "v_proj"]

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    base.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, TuckAConfig(r=4, k=2, t=2, p=2, alpha=32, target_modules="all-linear")).eval()
    with torch.no_grad():
        wanted = model(input_ids=torch.arange(3, 23).view(2, 10)).logits
    model.save_pretrained(str(tmp_path / "adapter"))
    paths = [checkout / "src/peft", tmp_path / "base", tmp_path / "adapter", tmp_path / "logits", tmp_path / "again"]
    done = subprocess.run(
        [sys.executable, "-P", "-c", INSIDE, *map(str, paths)],
        env={"PYTHONPATH": str(checkout / "src"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits"), wanted)
    both = [(tmp_path / folder / "adapter_model.safetensors").read_bytes() for folder in ("adapter", "again")]
    assert both[0] == both[1]
    configs = [json.loads((tmp_path / folder / "adapter_config.json").read_text()) for folder in ("adapter", "again")]
    assert configs[1]["peft_version"] and "peft_version" not in configs[0]  # PEFT's own keys, and the official files'
    read = [parse_config((tmp_path / folder / "adapter_config.json").read_bytes()) for folder in ("adapter", "again")]
    same = ("r", "k", "t", "p", "alpha", "router_name", "bias")
    assert [getattr(read[0], name) for name in same] == [
        getattr(read[1], name) for name in same
    ]  # the server takes both


def test_another_peft_is_said(checkout: Path, tmp_path: Path) -> None:
    (checkout / "tests/test_config.py").write_text("")
    with pytest.raises(ConfigError, match=r"tests/test_config.py has no 'LilyConfig,'"):
        put(checkout)
    with pytest.raises(ConfigError, match="is no checkout of PEFT"):
        put(tmp_path / "elsewhere")


def test_what_pefts_tests_say_is_summed_up(capsys: pytest.CaptureFixture[str]) -> None:
    told = """<testsuite>
      <testcase classname="tests.test_config.TestPeftConfig" name="test_a[TuckA]"/>
      <testcase classname="tests.test_config.TestPeftConfig" name="test_b[TuckA]">
        <failure message="ValueError: Can't find it">huggingface_hub.errors.OfflineModeIsEnabled: offline</failure>
      </testcase>
      <testcase classname="tests.test_seq_classifier.TestX" name="test_c[TuckA-bert]">
        <failure message="RuntimeError: wrong&#10;at all">...</failure></testcase>
      <testcase classname="tests.test_seq_classifier.TestX" name="test_d[TuckA-bert]">
        <skipped message="TuckA does not merge"/></testcase>
    </testsuite>"""
    assert peft_tests.report(list(ElementTree.fromstring(told).iter("testcase"))) == 1  # but for the Hub's
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "test_config 1 passed, 1 failed, 0 skipped",
        "test_seq_classifier 0 passed, 1 failed, 1 skipped",
        "all 1 passed, 2 failed, 1 skipped",
        "failed 1 test_b: asks the Hub, which is off",
        "failed 1 test_c: RuntimeError: wrong at all",
        "skipped 1 TuckA does not merge",
    ]
