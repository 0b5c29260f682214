"""`tucka compress`: folders in, one bank out, and figures that are those of the bank that was written."""

import re
from pathlib import Path

import pytest
import torch

from tests.support.driving import build, save_lora, save_model, save_tucka
from tucka_runtime.adapters.format import BankModule, LoRAModule, read_adapter
from tucka_runtime.cli.main import main
from tucka_runtime.llm import LLM
from tucka_runtime.messages import Route, SamplingParams


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, three LoRAs, one of them of other modules and another rank, and a TuckA adapter."""
    own = tmp_path_factory.mktemp("compress")
    save_model(own / "base")
    layout = build(own / "base").layout
    save_lora(own / "a", layout, seed=1)
    save_lora(own / "b", layout, seed=2)
    save_lora(own / "c", layout, seed=3, targets=("q_proj", "up_proj"), r=2)
    save_tucka(own / "t", layout, targets=("q_proj",))
    return own


def compress(folders: Path, out: Path, members: list[str], rank: int, *more: str) -> int:
    flags = ["--out", str(out), "--rank", str(rank), "--model", str(folders / "base")]
    return main(["compress", *[m if "=" in m else str(folders / m) for m in members], *flags, *more])


def figure(text: str, name: str) -> float:
    found = re.search(rf"{name} ([\d.e-]+)", text)
    assert found
    return float(found[1])


@pytest.mark.parametrize(("core", "rank"), [("full", 5), ("diagonal", 5), ("full", 8)])
def test_the_error_that_is_printed_is_that_of_the_file(
    core: str, rank: int, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bank"
    assert compress(folders, out, ["a", f"law={folders / 'b'}", "c"], rank, "--core", core) == 0
    text = capsys.readouterr().out
    layout = build(folders / "base").layout
    bank = read_adapter(out, layout)
    assert bank.config.members == ["a", "law", "c"] and bank.config.core == core
    assert bank.training == {"base_fingerprint": layout.fingerprint} and bank.digest in text
    errors = []
    for i, name in enumerate("abc"):
        own, lost, whole = read_adapter(folders / name, layout), 0.0, 0.0
        for path, module in bank.modules.items():
            lora = own.modules.get(path)
            assert isinstance(module, BankModule) and (lora is None or isinstance(lora, LoRAModule))
            want = (
                torch.zeros(layout.linears[path][::-1])
                if lora is None
                else lora.scale * lora.b.double() @ lora.a.double()
            )
            m = module.core[i].double()
            ours = (module.u.double().T @ (m if m.dim() == 2 else m.diag()) @ module.e.double()).T
            lost, whole = lost + (ours - want.double()).square().sum(), whole + want.double().square().sum()
        errors.append(float((lost / whole).sqrt()))
    shown = [figure(text, name) for name in ("min", "median", "max")]
    assert shown == pytest.approx(sorted(errors), rel=0.05)
    if rank == 8:  # all ranks together
        assert max(errors) < 1e-6
    else:
        assert 0.05 < max(errors) < 1


def test_a_bank_answers_as_its_members_do(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """TuckA adapters under one route among them."""
    out = tmp_path / "bank"
    assert compress(folders, out, ["a", "t"], 12, "--route", "group=1") == 0
    assert main(["adapters", "inspect", str(out), "--model", str(folders / "base")]) == 0
    text = capsys.readouterr().out
    assert "bank of 2, full cores" in text and re.search("members +a, t\n", text) and "served\n" in text
    assert main(["adapters", "verify", str(out), "--model", str(folders / "base")]) == 0
    llm = LLM(folders / "base", {"bank": out, "a": folders / "a"}, kv_cache_tokens=512)
    llm.load_adapter("t", folders / "t", Route(1, (0.5, 0.5)))
    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    ids = [5, 60, 7, 33, 12]
    for name in "at":
        own, banked = llm.generate([ids, ids], sampling, [name, f"bank/{name}"])
        pairs = zip(own.prompt_logprobs[1:], banked.prompt_logprobs[1:], strict=True)
        assert all(mine.logprob == pytest.approx(its.logprob, abs=1e-4) for mine, its in pairs)


def test_answers_are_compared(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same adapter as two members, which is no change; then one whose core was put out of order."""
    import tucka_runtime.cli.compress as command

    class Read(LLM):
        """The tiny base has no tokenizer: a prompt's characters are its tokens."""

        def _ids(self, prompt, add_special_tokens):
            return tuple(3 + ord(c) % 90 for c in prompt)

    monkeypatch.setattr(command, "LLM", Read)
    (tmp_path / "prompts").write_text("one\ntwo\nthree\nfour\n")
    more = ["--prompts", str(tmp_path / "prompts"), "--max-tokens", "4"]
    assert compress(folders, tmp_path / "exact", ["a", "b"], 6, *more) == 0
    assert "min 100%, median 100%, max 100% of the prompts" in capsys.readouterr().out
    assert compress(folders, tmp_path / "poor", ["a", "b"], 1, "--core", "diagonal", *more) == 0
    assert "min 100%" not in capsys.readouterr().out


def test_what_a_bank_cannot_hold_is_said(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = build(folders / "base").layout
    save_lora(tmp_path / "dora", layout, dora=True)
    save_tucka(tmp_path / "head", layout, saved={"lm_head.weight": torch.ones(layout.parameters["lm_head.weight"])},
               modules_to_save=["lm_head"])  # fmt: skip
    assert compress(folders, tmp_path / "bank", ["a"], 3) == 0
    for members, rank, more, said in [
        ([f"x={tmp_path / 'dora'}"], 3, [], "DoRA"),
        ([f"x={tmp_path / 'head'}"], 3, ["--route", "group=0"], "embedding or the head"),
        ([f"x={tmp_path / 'bank'}"], 3, [], "a bank itself"),
        (["t"], 3, [], "--route"),
        (["a", f"a={folders / 'b'}"], 3, [], "same name"),
        ([f"a b={folders / 'a'}"], 3, [], "NAME=PATH"),
        (["a"], 0, [], "--rank"),
        (["a"], 513, [], "--rank"),
        (["a"], 3, ["--prompts", str(tmp_path / "none")], "prompts"),
    ]:
        capsys.readouterr()
        assert compress(folders, tmp_path / "out", members, rank, *more) == 1
        assert said in capsys.readouterr().err
    assert compress(folders, tmp_path / "bank", ["a"], 3) == 1
    assert "Name a new one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
