"""A live server under load, scraped by a real Prometheus with the shipped rules."""

import json
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator

import httpx
import pytest

from tests.support import GOLDEN
from tests.support.monitoring import DEPLOY, Load, Prometheus, binary, wait_until
from tests.support.servers import start_command


@pytest.fixture(scope="session")
def promtool() -> str:
    return binary("promtool")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    broken = folder / "adapters" / "broken"
    broken.mkdir(parents=True)
    (broken / "adapter_config.json").write_text("{}")
    (broken / "adapter_model.safetensors").write_bytes(b"nothing")
    process, url = start_command(
        "--model", str(GOLDEN / "bases" / "llama-tiny"), "--served-model-name", "base",
        "--adapter", f"fin={GOLDEN / 'llama-qv-r8k3t3' / 'adapter'}",
        "--adapter", f"law={GOLDEN / 'llama-all7-r4k2t2' / 'adapter'}",
        "--adapter", f"plain={GOLDEN / 'llama-odown-r8k1t1' / 'adapter'}",
        "--adapter-root", str(folder / "adapters"),
        log=folder / "log",
    )  # fmt: skip
    yield url
    process.terminate()
    assert process.wait(30) == 0


@pytest.fixture(scope="session")
def prometheus(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus with the shipped configuration, but for its address book and its pace."""
    folder = tmp_path_factory.mktemp("prometheus")
    shutil.copy(DEPLOY / "prometheus" / "rules.yml", folder)
    config = (DEPLOY / "prometheus" / "prometheus.yml").read_text()
    for ours, here in (("15s", "1s"), ("tucka:8000", server.removeprefix("http://"))):
        assert ours in config
        config = config.replace(ours, here)
    (folder / "prometheus.yml").write_text(config)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                binary("prometheus"),
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    prometheus = Prometheus(f"http://127.0.0.1:{port}")

    def up() -> bool:
        try:
            return httpx.get(prometheus.url + "/-/ready").status_code == 200 and prometheus.value("up") == 1
        except httpx.TransportError:
            return False

    try:
        wait_until(up, 60, lambda: (folder / "log").read_text())
        yield prometheus
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="session")
def load(server: str, prometheus: Prometheus) -> Iterator[Load]:
    """Running; what it saw so far may be read at any time."""
    load = Load(server)
    threads = [threading.Thread(target=load.run, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    yield load
    load.stopping = True
    for thread in threads:
        thread.join(60)


@pytest.fixture(scope="session")
def dashboard() -> dict:
    return json.loads((DEPLOY / "grafana" / "tucka.json").read_text())
