"""Banks on disk: what the reader takes, and that it takes nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.adapter_files import put
from tucka_runtime.adapters.format import BankModule, read_adapter
from tucka_runtime.errors import BaseModelMismatchError, InvalidAdapterError
from tucka_runtime.messages import BaseLayout

R = 3
MEMBERS = ["law", "tax-2"]
TARGETS = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
FILE = "base_model.model."


def bank_config(**changes: Any) -> dict[str, Any]:
    own = {"peft_type": "TUCKA_BANK", "r": R, "core": "full", "members": MEMBERS, "target_modules": TARGETS}
    return {**own, **changes}


def bank_tensors(base: BaseLayout, core: tuple[int, ...] = (R, R), count: int = 2) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in TARGETS:
        d_in, d_out = base.linears[path]
        tensors[f"{FILE}{path}.bank_u"] = torch.randn(R, d_in)
        tensors[f"{FILE}{path}.bank_e"] = torch.randn(R, d_out)
        tensors[f"{FILE}{path}.bank_core"] = torch.randn(count, *core)
    return tensors


@pytest.mark.parametrize(("core", "shape"), [("full", (R, R)), ("diagonal", (R,))])
def test_a_bank_is_read(core: str, shape: tuple[int, ...], tmp_path: Path, base: BaseLayout) -> None:
    tensors = bank_tensors(base, shape)
    adapter = read_adapter(put(tmp_path, bank_config(core=core), tensors), base)
    assert adapter.kind == "bank" and list(adapter.modules) == TARGETS
    for path, module in adapter.modules.items():
        assert isinstance(module, BankModule)
        for name in ("u", "e", "core"):
            assert torch.equal(getattr(module, name), tensors[f"{FILE}{path}.bank_{name}"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("core", "tucker"),
        ("core", ["full"]),
        ("core", None),
        ("members", []),
        ("members", "law"),
        ("members", ["law", "law"]),
        ("members", ["law", "../tax"]),
        ("members", ["law", ".."]),
        ("members", ["law", "a/b"]),
        ("members", ["law", "tax\n"]),
        ("members", ["law", "\x1b[31m"]),
        ("members", ["law", "x" * 65]),
        ("members", ["law", 2]),
        ("members", [f"m{i}" for i in range(4097)]),
        ("members", None),
        ("target_modules", "all-linear"),
        ("target_modules", ".*q_proj"),
        ("target_modules", []),
        ("r", 0),
        ("r", 513),
        ("r", True),
        ("auto_map", {"AutoModel": "evil.Model"}),
        ("modules_to_save", ["lm_head"]),
        ("lora_alpha", 4),
    ],
)
def test_bad_fields_are_refused(field: str, value: Any, tmp_path: Path, base: BaseLayout) -> None:
    with pytest.raises(InvalidAdapterError) as refusal:
        read_adapter(put(tmp_path, bank_config(**{field: value}), bank_tensors(base)), base)
    assert "tax" not in str(refusal.value) and "\x1b" not in str(refusal.value)


def test_bad_tensors_are_refused(tmp_path: Path, base: BaseLayout) -> None:
    good = bank_tensors(base)
    core = f"{FILE}{TARGETS[0]}.bank_core"
    bad = {
        "fewer cores than members": good | {core: good[core][:1]},
        "cores of another rank": bank_tensors(base, (R + 1, R)),
        "diagonal cores": bank_tensors(base, (R,)),
        "not finite": good | {core: good[core] * torch.nan},
        "missing": {name: value for name, value in good.items() if name != core},
        "beside": good | {f"{FILE}{TARGETS[0]}.bank_d": torch.ones(1)},
        "the base's own head": good | {f"{FILE}lm_head.weight": torch.ones(base.parameters["lm_head.weight"])},
    }
    for what, tensors in bad.items():
        with pytest.raises(InvalidAdapterError):
            read_adapter(put(tmp_path / what, bank_config(), tensors), base)


def test_a_bank_of_another_base_is_refused(tmp_path: Path, base: BaseLayout) -> None:
    others = [*TARGETS, "model.layers.7.self_attn.q_proj"]
    with pytest.raises(BaseModelMismatchError, match=r"layers\.7"):
        read_adapter(put(tmp_path / "a", bank_config(target_modules=others), bank_tensors(base)), base)
    with pytest.raises(BaseModelMismatchError):
        read_adapter(put(tmp_path / "b", bank_config(target_modules=["lm_head"]), bank_tensors(base)), base)
    wide = {n: torch.randn(R, 99) if n.endswith("bank_e") else t for n, t in bank_tensors(base).items()}
    with pytest.raises(BaseModelMismatchError):
        read_adapter(put(tmp_path / "c", bank_config(), wide), base)
    folder = put(tmp_path / "d", bank_config(), bank_tensors(base))
    (folder / "training.json").write_text(json.dumps({"base_fingerprint": "another"}))
    with pytest.raises(BaseModelMismatchError, match="fingerprint"):
        read_adapter(folder, base)
