"""Flags, environment, file, default: in this order, from the fields of the config and nowhere else."""

import argparse
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from tucka_runtime import embedded
from tucka_runtime.cli.main import main
from tucka_runtime.cli.settings import add_flags, read_settings, unknown_variables
from tucka_runtime.config import KERNELS, EngineConfig, ServerConfig
from tucka_runtime.embedded import with_embedded_default
from tucka_runtime.errors import ConfigError
from tucka_runtime.kernels import dispatch
from tucka_runtime.kernels.dispatch import BACKENDS


def read(*flags: str, environment: dict[str, str] | None = None) -> tuple[EngineConfig, ServerConfig]:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return read_settings(vars(parser.parse_args(flags)), environment or {})


def write(folder: Path, text: str) -> str:
    (folder / "tucka.yaml").write_text(text)
    return str(folder / "tucka.yaml")


def test_kernels_are_named_as_the_backends() -> None:
    assert ("auto", *BACKENDS) == KERNELS


def test_defaults_are_the_configs() -> None:
    assert read() == (EngineConfig(), ServerConfig())


def test_a_flag_wins_over_the_environment_over_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "port: 1\nhost: file\nmax-num-seqs: 3\nroute: request\nadapter: [a=b]\napi_key: one\n")
    environment = {"TUCKA_PORT": "2", "TUCKA_HOST": "environment", "TUCKA_API_KEY": "x,y"}
    engine, server = read("--config", file, "--port", "3", environment=environment)
    assert (server.port, server.host, server.route) == (3, "environment", "request")
    assert (server.adapter, server.api_key) == (("a=b",), ("x", "y"))
    assert engine.max_num_seqs == 3


def test_repeatable_flags() -> None:
    _, server = read("--adapter", "a=1", "--adapter", "b=2", "--adapter-root", "/x")
    assert server.adapter == ("a=1", "b=2") and server.adapter_root == ("/x",)


@pytest.mark.parametrize(
    "text",
    [
        "no_such: 1",
        "port: '1'",
        "port: true",
        "port: [1]",
        "host: 5",
        "adapter: {a: b}",
        "adapter: [1]",
        "- a",
        "{",
        "route: x",
    ],
)  # fmt: skip
def test_a_file_that_is_wrong(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        read("--config", write(tmp_path, text))


def test_a_byte_order_mark_may_begin_the_file(tmp_path: Path) -> None:
    (tmp_path / "tucka.yaml").write_text("port: 7", "utf-8-sig")
    assert read("--config", str(tmp_path / "tucka.yaml"))[1].port == 7


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        read("--config", str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("port: 1\nhost: a: b", "line 2, column 8"),
        ("port: 2020-13-45", "month must be in 1..12"),
        ("port: many", "port .* a whole number"),
        ("log_prompts: 3", "true or false"),
        ("decode_stretch: many", "decode_stretch .* a number"),
        ("sse_heartbeat: .inf", "sse_heartbeat must be a finite number"),
        ("adapter: {law: /a/law}", r"`adapter: \[NAME=PATH, \.\.\.\]`"),
    ],
)
def test_a_files_error_says_where_and_what(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read("--config", write(tmp_path, text))


def test_numbers_with_and_without_a_fraction(tmp_path: Path) -> None:
    engine, server = read("--config", write(tmp_path, "decode_stretch: 2\nsse_heartbeat: 1.5"))
    assert (engine.decode_stretch, server.sse_heartbeat) == (2.0, 1.5)
    with pytest.raises(ConfigError, match="TUCKA_DECODE_STRETCH must be a number"):
        read(environment={"TUCKA_DECODE_STRETCH": "abc"})
    for given in ({"environment": {"TUCKA_DECODE_STRETCH": "nan"}}, {"environment": {"TUCKA_SSE_HEARTBEAT": "inf"}}):
        with pytest.raises(ConfigError, match="finite"):
            read(**given)
    with pytest.raises(ConfigError, match="finite"):
        read("--decode-stretch", "nan")


def test_a_service_named_tucka_is_told_from_a_port() -> None:
    with pytest.raises(ConfigError, match="enableServiceLinks"):
        read(environment={"TUCKA_PORT": "tcp://10.0.0.1:8000"})


def test_a_variable_that_sets_nothing_is_named() -> None:
    ours = {"TUCKA_PROT": "1", "TUCKA_PORT": "1", "TUCKA_CLIENT_KEY": "x", "PATH": "/bin"}
    links = {"TUCKA_SERVICE_HOST": "10.0.0.1", "TUCKA_PORT_8000_TCP_PROTO": "tcp", "TUCKA_UI_PORT": "tcp://10.0.0.2:80"}
    assert unknown_variables(ours | links) == ["TUCKA_PROT"]


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_is_none(port: int) -> None:
    with pytest.raises(ConfigError, match="between 0 and 65535"):
        ServerConfig(port=port)


@pytest.mark.parametrize("url", ["localhost:4318", "http://", "ftp://host/v1/traces"])
def test_an_endpoint_that_is_none(url: str) -> None:
    with pytest.raises(ConfigError, match="whole URL"):
        ServerConfig(otlp_traces_endpoint=url)


@pytest.mark.parametrize("environment", [{"TUCKA_PORT": "x"}, {"TUCKA_ROUTE": "pinned"}, {"TUCKA_MAX_NUM_SEQS": "0"}])
def test_an_environment_that_is_wrong(environment: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        read(environment=environment)


@pytest.mark.parametrize(
    "keys", [{"api_key": ("",)}, {"api_key": ("a", " \t")}, {"api_key": ("a",), "admin_key": ("",)}]
)
def test_an_empty_key_opens_nothing(keys: dict[str, tuple[str, ...]]) -> None:
    with pytest.raises(ConfigError, match="empty key"):
        ServerConfig(**keys)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", " ", ",", "a,,b"])
def test_an_empty_key_in_the_environment_is_no_open_server(text: str) -> None:
    with pytest.raises(ConfigError, match="empty key"):
        read(environment={"TUCKA_API_KEY": text})


def test_help_has_every_field_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for config in (EngineConfig, ServerConfig):
        for field in fields(config):
            assert f"--{field.name.replace('_', '-')}" in shown
            if isinstance(field.default, int | str):
                assert f"(default: {field.default})" in shown


def test_wrong_settings_are_one_line(capsys: pytest.CaptureFixture[str], monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(embedded, "FOLDER", tmp_path)
    assert main(["serve", "--port", "-1"]) == 1
    assert capsys.readouterr().err == "tucka: port must be between 0 and 65535; 0 takes a free one\n"
    assert main(["serve", "--port", "0"]) == 1
    assert "--model" in capsys.readouterr().err


def test_the_embedded_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(embedded, "FOLDER", tmp_path)
    for folder in ("base", "adapters/b", "adapters/a"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "base" / "config.json").write_text("{}")
    engine, server = with_embedded_default(EngineConfig(), ServerConfig(adapter=("c=d",)))
    assert engine.model == str(tmp_path / "base")
    assert server.adapter == (f"a={tmp_path}/adapters/a", f"b={tmp_path}/adapters/b", "c=d")
    assert server.adapter_root == (f"{tmp_path}/adapters",), "what was unloaded can come back"
    _, server = with_embedded_default(EngineConfig(), ServerConfig(adapter=("a=d",)))
    assert server.adapter == (f"b={tmp_path}/adapters/b", "a=d"), "one's own takes the embedded one's place"
    named = EngineConfig(model="x"), ServerConfig()
    assert with_embedded_default(*named) == named


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert f"kernels: {dispatch.describe(dispatch.best(device))}" in shown
    for word in (
        "Python",
        "torch",
        "triton",
        "cores, by ",
        "GiB available, by ",
        "will use",
        "for tucka train",
        "for traces",
    ):
        assert word in shown
