"""The quick clients against the embedded default, and that a client which does not work is never said to."""

import sys
from pathlib import Path

import pytest

from tests.clients.run import BASE, HERE, ended, install, judged, run
from tests.clients.table import CLIENTS, Client
from tests.support import ROOT


@pytest.mark.parametrize("name", ["curl", "httpx", "openai, Python"])
def test_quick_clients_work(embedded: tuple[str, Path], tmp_path: Path, name: str) -> None:
    """In the tests' own environment, which has them."""
    (client,) = (client for client in CLIENTS if client.name == name)
    words = [sys.executable, str(HERE / client.script), embedded[0], str(BASE)]
    outcome = judged(client, ended(words, tmp_path, client.timeout, tmp_path))
    assert outcome.works, outcome.row()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("from checks import check\ncheck('all')(lambda: None)", "works"),
        (
            "from checks import check, same\ncheck('sums')(lambda: same(2, 3))",
            "fails: sums: AssertionError: 2 in place",
        ),
        ("from checks import check\ncheck('all')(lambda: None)\nraise SystemExit(3)", "its script ended with 3"),
        ("import a_package_that_is_not_there", "ModuleNotFoundError"),
        ("from checks import check\ncheck('all')(lambda: None)\nimport time; time.sleep(60)", "not done in 2 s"),
        ("pass", "its script checked nothing"),
    ],
)
def test_what_is_said_of_a_client(tmp_path: Path, script: str, said: str) -> None:
    (tmp_path / "with_it.py").write_text(f"import sys; sys.path.insert(0, {str(HERE)!r})\n{script}")
    words = [sys.executable, str(tmp_path / "with_it.py"), "http://127.0.0.1:9", str(BASE)]
    outcome = judged(Client("it", "with_it.py", timeout=2), ended(words, tmp_path, 2, tmp_path))
    assert said in outcome.row()
    assert outcome.works == (said == "works")


def test_a_client_that_is_not_there_is_not_run(tmp_path: Path) -> None:
    outcome = run(Client("it", "with_it.py", command="no-such-program"), tmp_path, "http://127.0.0.1:9")
    assert outcome.row().endswith("| not run: there is no no-such-program |") and not outcome.works
    nowhere = Client("it", "with_it.py", (("--no-index", "no-such-package==1.0"),))
    reason = install(nowhere, tmp_path / "it")
    assert reason is not None and "no-such-package==1.0" in reason
    assert install(nowhere, tmp_path / "it") == reason, "what was not installed is tried again"


def test_every_client_has_its_script_and_its_row() -> None:
    page = (ROOT / "docs" / "compatibility.md").read_text()
    rows = [line.split(" | ")[:2] for line in page.splitlines() if line.startswith("| ")][1:]
    assert [[f"| {client.name}", client.version] for client in CLIENTS] == rows
    assert {client.script for client in CLIENTS} == {path.name for path in HERE.glob("with_*")}
