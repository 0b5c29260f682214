"""What is shipped to run the server elsewhere says true things."""

import importlib.util
import json
import os
import re
import shlex
import tomllib
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from tests.support import ROOT
from tests.support.monitoring import DEPLOY
from tucka_runtime.cli import healthcheck
from tucka_runtime.config import EngineConfig, ServerConfig
from tucka_runtime.extras import EXTRAS

DOCKERFILE = (ROOT / "Dockerfile").read_text()
EXACT_TAG = re.compile(r"[\w./-]+:v?\d+(\.\d+)+(-\w+)?")


@pytest.fixture(scope="module")
def try_image() -> ModuleType:
    spec = importlib.util.spec_from_file_location("try_image", DEPLOY / "try-image.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    __import__("sys").modules["try_image"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def steps(try_image: ModuleType) -> list[tuple[str, str]]:
    return try_image.instructions(DOCKERFILE)


def test_the_bases_are_pinned(steps: list[tuple[str, str]]) -> None:
    images = [rest.split()[0] for word, rest in steps if word == "FROM"]
    assert len(images) == 2 and all(EXACT_TAG.fullmatch(image) for image in images)


def test_what_is_copied_is_there_and_not_ignored(steps: list[tuple[str, str]]) -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    sources = [
        source for word, rest in steps if word == "COPY" and "--from" not in rest for source in rest.split()[:-1]
    ]
    assert set(sources) == kept and all((ROOT / source).exists() for source in sources)


def test_the_image_is_not_roots_and_stops_by_draining(steps: list[tuple[str, str]]) -> None:
    last = dict(steps)
    assert last["USER"] == "tucka" and last["STOPSIGNAL"] == "SIGTERM"
    assert json.loads(last["ENTRYPOINT"]) + json.loads(last["CMD"]) == ["tucka", "serve"]
    assert last["HEALTHCHECK"].endswith('CMD ["python3", "-m", "tucka_runtime.cli.healthcheck"]')
    assert json.loads(last["VOLUME"]) == ["/models", "/adapters", "/state"]


def test_its_health_check_follows_the_servers_flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TUCKA_PORT", "8000")
    monkeypatch.setenv("TUCKA_HOST", "0.0.0.0")
    (tmp_path / "file.yaml").write_text("port: 7000")
    for command, address in (
        ("python3 /opt/tucka/bin/tucka serve", "127.0.0.1:8000"),
        ("/sbin/docker-init -- tucka serve --model /m --port 9000", "127.0.0.1:9000"),
        ("tucka serve --port=9001 --host 10.0.0.1", "10.0.0.1:9001"),
        ("tucka serve --host :: --no-such-flag 1", "[::1]:8000"),
        ("sleep 5", "127.0.0.1:8000"),
    ):
        assert healthcheck.url(command.split()) == f"http://{address}/ready"
    monkeypatch.delenv("TUCKA_PORT")
    assert healthcheck.url(f"tucka serve --config {tmp_path}/file.yaml".split()) == "http://127.0.0.1:7000/ready"


def test_its_environment_names_real_settings(steps: list[tuple[str, str]]) -> None:
    env = dict(item.split("=", 1) for word, rest in steps if word == "ENV" for item in shlex.split(rest))
    known = {f"TUCKA_{field.name.upper()}" for kind in (EngineConfig, ServerConfig) for field in fields(kind)}
    assert {name for name in env if name.startswith("TUCKA_")} <= known
    pin = (DEPLOY / "torch.txt").read_text()
    assert re.fullmatch(r"torch==\d+\.\d+\.\d+\n", pin)
    for text in (DOCKERFILE, (DEPLOY / "install.sh").read_text()):
        assert "torch.txt" in text and "torch==" not in text, "one version of torch everywhere"


def test_the_extras_are_named_where_one_looks_for_them() -> None:
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    assert set(EXTRAS) | {"test"} == extras
    comment = [line for line in (DEPLOY / "install.sh").read_text().splitlines() if line.startswith("#")]
    assert extras <= set(re.findall(r"\w+", " ".join(comment)))
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        assert "tucka-runtime[" not in page.read_text(), f"{page.name}: there is no such package in a registry"


def test_the_readmes_python_runs_after_its_install() -> None:
    """What its examples import is a dependency of the package, or has its `pip install` above them."""
    text = (ROOT / "README.md").read_text()
    needed = {
        name
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        for name in re.findall(r"^(?:from|import) (\w+)", block, re.MULTILINE)
    }
    installed = {name for line in re.findall(r"pip install ([\w ]+)", text) for name in line.split()}
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert "openai" in needed
    assert needed <= installed | {re.split(r"\W", name)[0] for name in dependencies} | {"tucka_runtime"}


def test_no_server_is_open_to_strangers(compose: dict, steps: list[tuple[str, str]]) -> None:
    """In a container it listens on all addresses: compose publishes what has no keys on this machine alone. The image
    leaves it to who runs it, and every line that the page has for that starts."""
    page = (ROOT / "docs" / "deploy.md").read_text()
    tucka = compose["services"]["tucka"]
    assert tucka["environment"] == {"TUCKA_INSECURE": "true"}
    assert all(port.startswith("127.0.0.1:") for port in tucka["ports"])
    assert "TUCKA_INSECURE=" not in dict(steps)["ENV"]
    runs = [run for run in re.findall(r"^    .*docker run (?:[^\n\\]|\\\n)*", page, re.MULTILINE) if " -p " in run]
    assert [re.findall(r"-p \S+|-e \w+", run) for run in runs] == [
        ["-p 127.0.0.1:8000:8000", "-e TUCKA_INSECURE"],
        ["-p 8000:8000", "-e TUCKA_API_KEY_FILE"],
    ]


@pytest.fixture(scope="module")
def compose() -> dict:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def test_compose_has_the_three(compose: dict) -> None:
    services = compose["services"]
    assert set(services) == {"tucka", "prometheus", "grafana"}
    assert services["tucka"]["read_only"] and services["tucka"]["tmpfs"] == ["/tmp"]
    for name in ("prometheus", "grafana"):
        assert EXACT_TAG.fullmatch(services[name]["image"])
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_compose_mounts_what_is_there(compose: dict) -> None:
    named = set(compose["volumes"])
    for service in compose["services"].values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if not source.startswith("$"):
                assert source in named or (DEPLOY / source).exists(), volume
    context = DEPLOY / compose["services"]["tucka"]["build"]["context"]
    assert Path(os.path.normpath(context)) == ROOT


def test_grafana_finds_prometheus_and_the_dashboard(compose: dict) -> None:
    folder = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((folder / "dashboards" / "tucka.yml").read_text())["providers"]
    mounts = [volume.split(":") for volume in compose["services"]["grafana"]["volumes"]]
    assert any(m[0] == "./grafana/tucka.json" and m[1].startswith(provider["options"]["path"]) for m in mounts)


def test_the_dashboards_panels_do_not_overlap() -> None:
    panels = json.loads((DEPLOY / "grafana" / "tucka.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert [panel["title"] for panel in panels if panel["type"] == "row"] == [
        "Overview",
        "Per adapter",
        "Expert load",
        "Engine",
    ]
    taken: set[tuple[int, int]] = set()
    for position in (panel["gridPos"] for panel in panels):
        cells = {(x, y) for x in range(position["x"], position["x"] + position["w"])
                 for y in range(position["y"], position["y"] + position["h"])}  # fmt: skip
        assert not cells & taken and position["x"] + position["w"] <= 24
        taken |= cells
