"""`tucka train` before its first step and after its last: what is refused early, and that nothing trained is lost."""

import errno
import json
import os
import re
import shlex
import signal
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tests.support.training import make_workplace, train
from tucka_runtime.trainer import adapter, base_model, loop, preflight, tracking
from tucka_runtime.trainer.progress import Step, TrainingProgress

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    return make_workplace(tmp_path)


class FakeAdmin(HTTPServer):
    """The routes that publishing uses. `refusal` is what an upload answers; without one what has no files is
    refused."""

    def __init__(self) -> None:
        self.loaded: list[tuple[str, list[bytes]]] = []
        self.names = ["taken"]
        self.keys: set[str | None] = set()
        self.refusal: tuple[int, str] | None = None
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self.server_port}/v1"  # as people write it for OpenAI's clients


class Handler(BaseHTTPRequestHandler):
    server: FakeAdmin

    def do_GET(self) -> None:
        assert self.path == "/v1/adapters"
        self._answer(200, {"data": [{"id": name} for name in self.server.names]})

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.keys.add(self.headers["Authorization"])
        if self.server.refusal:
            self._answer(self.server.refusal[0], {"error": {"message": self.server.refusal[1]}})
        elif b'filename="adapter_config.json"' not in body:
            self._answer(400, {"error": {"message": "the adapter has no adapter_config.json."}})
        else:
            self.server.loaded.append((self.path, re.findall(rb'filename="(.*?)"', body)))
            self._answer(200, {})

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def admin() -> Iterator[FakeAdmin]:
    server = FakeAdmin()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--r", "513"), "`r` must be an integer from 1 to 512"),
        (("--k", "64", "--t", "8"), "exceeds 256"),
        (("--alpha", "1e7"), "`alpha` must be a number"),
        (("--alpha", "inf", "--method", "lora"), "alpha must be a finite number"),
        (("--balance", "-1"), "balance one from 0"),
        (("--epochs", "nan"), "--epochs must be above 0"),
        (("--lr", "inf"), "lr must be above 0"),
        (("--checkpoint-every", "-1"), "checkpoint_every must be at least 0"),
        (("--target-modules", "q_proj", "query"), "no linear layer query. It has down_proj, gate_proj, k_proj"),
        (("--max-length", "9999"), "more than the base's context of"),
        (("--max-length", "1"), "at least 2"),
        (("--num-threads", "0"), "--num-threads must be at least 1"),
        (("--resume", "--overwrite"), "give one of the two"),
        (("--dropout", "0.1"), "dropout, rslora and dora are LoRA's"),
        (("--report-to", "trackio"), "pip install trackio"),
        (("--publish", "127.0.0.1:9"), "No answer from http://127.0.0.1:9"),
    ],
)
def test_refused_before_the_base_is_loaded(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: tuple[str], words: str
) -> None:
    monkeypatch.setattr(base_model, "load_model", None)
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    assert train(workplace, *flags) == 2
    assert words in capsys.readouterr().err
    assert not (workplace / "out").exists()


def test_a_disk_that_is_too_small_is_seen_before_the_first_step(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20 + 4 * 5000))
    assert train(workplace, "--steps", "1") == 2
    assert "--checkpoint-every 0" in capsys.readouterr().err
    assert train(workplace, "--steps", "1", "--checkpoint-every", "0") == 0  # the weights alone fit


def test_publish_checks_first_and_loads_at_last(
    workplace: Path, admin: FakeAdmin, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUCKA_CLIENT_KEY", "k")
    publish = ("--steps", "1", "--overwrite", "--publish", admin.url)
    assert train(workplace, *publish) == 0
    files = [b"adapter_config.json", b"adapter_model.safetensors", b"training.json"]
    assert admin.loaded == [("/v1/adapters/out?load_inplace=false", files)]
    assert admin.keys == {"Bearer k"}
    assert train(workplace, *publish, "--name", "taken", "--replace") == 0
    assert admin.loaded[-1] == ("/v1/adapters/taken?load_inplace=true", files)
    with monkeypatch.context() as patch:
        patch.setattr(base_model, "load_model", None)
        assert train(workplace, *publish, "--name", "taken") == 2
        assert "--replace" in capsys.readouterr().err
        admin.refusal = (403, "This key may not manage adapters.")
        assert train(workplace, *publish) == 2
        assert "may not manage adapters" in capsys.readouterr().err


def test_a_failed_publish_prints_the_command_that_does_it(
    workplace: Path, admin: FakeAdmin, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: TrainingProgress, step: Step) -> None:
        admin.refusal = (409, "An adapter of that name is loaded. Load it with `load_inplace: true`.")

    monkeypatch.setattr(TrainingProgress, "step", full)
    assert train(workplace, "--steps", "1", "--publish", admin.url, "--api-key", "secret") == 2
    said = capsys.readouterr().err
    command = f"tucka adapters upload out {workplace.resolve()}/out --url {admin.url} --replace"
    assert said.endswith(f"To publish it, with the same --api-key: {command}\n")
    assert "secret" not in said


def test_ctrl_c_saves_a_checkpoint_and_says_how_to_go_on(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = ("--steps", "5", "--checkpoint-every", "0")
    assert train(workplace, *steps) == 0
    whole = (workplace / "out/adapter_model.safetensors").read_bytes()
    step = TrainingProgress.step

    def press(self: TrainingProgress, at: Step) -> None:
        step(self, at)
        if at.number == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingProgress, "step", press)
        assert train(workplace, *steps, "--overwrite") == 130
    said = capsys.readouterr().out
    assert "stopped after step 2 of 5" in said
    words = shlex.split(said.splitlines()[-1])
    assert words[:2] == ["tucka", "train"] and "--overwrite" not in words
    assert train(workplace, *words[2:]) == 0
    assert (workplace / "out/adapter_model.safetensors").read_bytes() == whole
    assert not (workplace / "out/checkpoint.pt").exists()


def test_a_second_ctrl_c_ends_at_once(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def press(self: TrainingProgress, at: Step) -> None:
        """Once, and once more when the first was seen: two that come together are one."""
        before = signal.getsignal(signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        while signal.getsignal(signal.SIGINT) is before:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)  # which the interrupt ends

    monkeypatch.setattr(TrainingProgress, "step", press)
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            train(workplace, "--steps", "3", "--checkpoint-every", "0")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert not (workplace / "out").exists()


def test_a_full_disk_keeps_the_weights_somewhere(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = adapter.write

    def full(model: Any, folder: Path, *rest: Any) -> None:
        if folder == workplace / "out":
            raise FULL
        write(model, folder, *rest)

    monkeypatch.setattr(adapter, "write", full)
    monkeypatch.setattr(loop, "write_file", lambda *_: (_ for _ in ()).throw(FULL))
    assert train(workplace, "--steps", "3") == 2
    said = capsys.readouterr().err
    assert "no checkpoint was written at step 1: No space left on device" in said
    elsewhere = Path(said.rpartition("the adapter is in ")[2].removesuffix(" instead.\n"))
    assert elsewhere.parent == workplace
    assert {"adapter_model.safetensors", "adapter_config.json", "training.json"} <= set(os.listdir(elsewhere))


def test_the_settings_of_a_file_are_those_of_flags(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = workplace / "run.yaml"
    file.write_text("steps: 2\nlr: 2e-3\nr: 2\ntarget-modules: [q_proj, v_proj]\nmethod: lora\ncheckpoint_every: 0\n")
    assert train(workplace, "--config", str(file)) == 0
    config = json.loads((workplace / "out/adapter_config.json").read_text())
    assert config["r"] == 4  # a flag wins
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    for text, words in (
        ("rank: 3", "no flag of tucka train: rank"),
        ("r: high", "r in the configuration file must be a int"),
        ("method: full", "one of tucka, lora"),
        ("[1]", "must be a mapping"),
        ("a: [", "not valid YAML"),
        ("a: 2020-13-45", "not valid YAML"),
    ):
        file.write_text(text)
        assert train(workplace, "--config", str(file)) == 2
        assert words in capsys.readouterr().err
    assert yaml.safe_load("lr: 2e-3") == {"lr": "2e-3"}  # why text is taken where a number is wanted
