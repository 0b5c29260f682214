"""Bases in a GGUF file: what is made of them, once, and what is refused."""

import fcntl
import hashlib
import json
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support.gguf_files import small_model, write_gguf
from tucka_runtime import LLM, SamplingParams, base_gguf
from tucka_runtime.base_gguf import SOURCE, gguf_folder
from tucka_runtime.bases import find_base, with_base
from tucka_runtime.config import EngineConfig, ServerConfig
from tucka_runtime.errors import ConfigError, ModelLoadError
from tucka_runtime.models.dequantise import convert
from tucka_runtime.models.weights import fingerprint, read_config
from tucka_runtime.tokenizer import Tokenizer

PROMPTS = ("The date is", "a b c", "5 March 2024, and", "你好")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture(scope="module")
def meant(home: Path) -> dict[str, torch.Tensor]:
    """The weights that `tiny.Q4_1.gguf` stands for."""
    return write_gguf(home / "tiny.Q4_1.gguf")


@pytest.fixture(scope="module")
def said() -> list[str]:
    return []


@pytest.fixture(scope="module")
def folder(home: Path, meant: dict[str, torch.Tensor], said: list[str]) -> Path:
    """What is made of that file, in fp32, by the child of a command."""
    return gguf_folder(home / "tiny.Q4_1.gguf", "float32", home / "state" / "bases", said.append)


def test_its_weights_are_those_of_the_file(folder: Path, meant: dict[str, torch.Tensor], said: list[str]) -> None:
    stored = load_file(folder / "model.safetensors")
    stored.pop("lm_head.weight", None)
    assert stored.keys() == meant.keys()
    assert all(torch.equal(stored[name], meant[name]) for name in meant)
    assert said[-1].startswith("tiny.Q4_1.gguf: dequantised from Q4_1 to float32, 0 MB, in ")


def test_its_tokenizer_template_and_ends_are_those_of_the_file(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    assert [tokenizer.token(i) for i in tokenizer.ends] == ["</s>", "<|end|>"]
    prompt = tokenizer.render([{"role": "user", "content": "5 March"}])
    assert prompt == "<s><|user|>5 March<|end|>[answer]"
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    assert [tokenizer.token(i) for i in ids[:2]] == ["<s>", "<|user|>"]
    assert tokenizer.decode(ids, skip_special_tokens=False) == prompt


def test_greedy_answers_are_those_of_transformers(
    home: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    (home / "cache" / "tucka").mkdir(parents=True)
    (home / "cache" / "tucka" / "bases").symlink_to(folder.parent)
    llm = LLM(home / "tiny.Q4_1.gguf", dtype="float32", device="cpu", num_threads=1)
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    outputs = llm.generate(list(PROMPTS), SamplingParams(temperature=0, max_tokens=16, ignore_eos=True))
    for output in outputs:
        prompt = torch.tensor([output.prompt_token_ids])
        expected = reference.generate(
            prompt, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0
        )  # fmt: skip
        assert output.outputs[0].token_ids == expected[0, prompt.shape[1] :].tolist()


def test_it_is_found_again_by_its_content(
    home: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    """Under another name as well, and by every command that takes a base; nothing is started for it."""
    monkeypatch.setattr(subprocess, "Popen", None)
    renamed = home / "my model.gguf"
    renamed.write_bytes((home / "tiny.Q4_1.gguf").read_bytes())
    state = str(home / "state")
    assert find_base(renamed, "float32", state_dir=state, say=said.append) == (folder, "my-model")
    engine, server = with_base(EngineConfig(model=str(renamed), dtype="float32"), ServerConfig(state_dir=state))
    assert (engine.model, server.served_model_name) == (str(folder), ("my-model",))


@pytest.mark.parametrize(
    ("family", "kind", "auto"),
    [
        ("qwen2", Kind.Q8_0, torch.bfloat16),
        ("qwen3", Kind.F32, torch.float32),
        ("llama", Kind.F16, torch.float16),
    ],
)
def test_auto_is_the_type_in_the_file_or_bfloat16(tmp_path: Path, family: str, kind: Kind, auto: torch.dtype) -> None:
    """Every family that it can be, and the architecture as well as the weights."""
    (tmp_path / "out").mkdir()
    meant = write_gguf(tmp_path / "model.gguf", kind, family)
    convert(tmp_path / "model.gguf", tmp_path / "out", "auto")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(stored[name], value.to(auto)) for name, value in meant.items())
    assert json.loads((tmp_path / "out" / SOURCE).read_text())["quantised"] == (kind is Kind.Q8_0)
    config, arch = read_config(tmp_path / "out")
    expected, expected_arch = read_config(_saved(small_model(family, arch.vocab), tmp_path / "meant"))
    assert arch == expected_arch
    assert getattr(config, "rope_parameters", None) == getattr(expected, "rope_parameters", None)


def _saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def test_a_base_has_the_identity_of_its_file_whatever_its_type(folder: Path, tmp_path: Path) -> None:
    """So that an adapter that was trained on one type is served on another, as with every other base."""
    digest = hashlib.sha256((folder.parents[2] / "tiny.Q4_1.gguf").read_bytes()).hexdigest()
    assert fingerprint(folder) == digest
    (tmp_path / SOURCE).write_text((folder / SOURCE).read_text())
    assert fingerprint(tmp_path) == digest


@pytest.mark.parametrize(
    ("more", "without", "reason"),
    [
        ({"rope__scaling__type": "yarn"}, "", "llama.rope.scaling.type = yarn"),
        ({"expert_count": 8}, "", "llama.expert_count = 8"),
        ({"feed_forward_length": 64}, "", r"shape \(64, 96\).* makes \(64, 64\)"),
        ({}, "blk.1.ffn_up.weight", "lacks tensors"),
        ({"rope__scaling__type": "none"}, None, "read"),
    ],
)
def test_what_transformers_does_not_read_is_refused(
    tmp_path: Path, more: dict[str, int | str], without: str | None, reason: str
) -> None:
    """With an extra tensor in the last, as Llama 3.1's rotary factors are."""
    file = tmp_path / "model.gguf"
    write_gguf(file, without=without or "", extra="rope_freqs.weight" if without is None else "", **more)
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelLoadError, match=reason):
        convert(file, tmp_path / "out", "auto")


def test_what_is_no_gguf_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"PK\3\4 and more")
    (tmp_path / "of files").mkdir()
    (tmp_path / "of files" / "a.gguf").write_bytes(b"GGUF")
    for name, reason in (
        ("model.gguf", "no GGUF"), ("there is none.gguf", "no file"), ("of files", "Name the file: .*a.gguf"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=reason):
            find_base(tmp_path / name, state_dir=str(tmp_path / "state"), say=print)
    assert not (tmp_path / "state").exists()


def test_a_damaged_file_leaves_nothing_behind(home: Path, meant: dict[str, torch.Tensor], tmp_path: Path) -> None:
    file = tmp_path / "cut.gguf"
    file.write_bytes((home / "tiny.Q4_1.gguf").read_bytes()[:-5000])
    with pytest.raises(ConfigError, match=r"cannot be used: it cannot be read .* Is it whole\?") as refused:
        gguf_folder(file, "auto", tmp_path / "bases", lambda said: None)
    assert "Traceback" not in refused.value.message and len(refused.value.message) < 1000
    assert [path.suffix for path in (tmp_path / "bases").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("installed", lambda extra: False), r"install\.sh gguf"),
        (("python", lambda *arguments: ["sh", "-c", "kill -9 $$"]), "signal 9 .* memory"),
        (("python", lambda *arguments: ["sh", "-c", "echo Traceback: a, b >&2; exit 3"]), "Traceback: a, b"),
    ],
)
def test_what_stops_it_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: tuple[str, Callable[..., object]], reason: str
) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(base_gguf, *change)
    with pytest.raises(ConfigError, match=reason):
        gguf_folder(tmp_path / "a.gguf", "auto", tmp_path / "bases", lambda said: None)
    assert [path.suffix for path in (tmp_path / "bases").iterdir()] == [".lock"]


def test_where_it_would_be_kept_must_take_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    (tmp_path / "state").write_text("a file")
    with pytest.raises(ConfigError, match="--state-dir"):
        find_base(tmp_path / "a.gguf", state_dir=str(tmp_path / "state"), say=print)


def test_a_full_disk_is_said_before_the_work(home: Path, meant: dict[str, torch.Tensor], tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr("tucka_runtime.models.dequantise.SPARE_BYTES", 2**62)
    with pytest.raises(ModelLoadError, match="MB are free there"):
        convert(home / "tiny.Q4_1.gguf", tmp_path, "auto")
    assert list(tmp_path.iterdir()) == []


def test_of_two_that_want_it_one_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, kept = tmp_path / "a.gguf", tmp_path / "bases"
    file.write_bytes(b"GGUF")
    kept.mkdir()
    digest = hashlib.sha256(b"GGUF").hexdigest()
    waits = threading.Event()
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        waits.set()

    found: list[Path] = []
    with (kept / f".{digest[:16]}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        other = threading.Thread(target=lambda: found.append(gguf_folder(file, "auto", kept, say)))
        other.start()
        assert waits.wait(60)
        made = kept / f"a-bfloat16-{digest[:16]}"
        made.mkdir()
        about = {"type": "Q4_1", "quantised": True, "dtype": "bfloat16", "auto": "bfloat16", "bytes": 1}
        (made / SOURCE).write_text(json.dumps(about | {"sha256": digest}))
    other.join(60)
    assert found == [made]
    assert "another process" in said[0]
