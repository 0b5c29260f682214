"""Installs clients that people point at such a server, runs each, and prints the table of docs/compatibility.md.

    python -m tests.clients.run --cache DIR                       starts the embedded default, runs all of them
    python -m tests.clients.run --cache DIR --only httpx --only instructor
    python -m tests.clients.run --cache DIR --url http://127.0.0.1:8000      a server that serves the embedded default

Each client lies in a folder of its own below --cache, a venv or a node_modules, and is installed once. Start it at the
top of the repository, in the environment that has TuckA runtime. The exit status is 1 unless every client works.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.clients.table import CLIENTS, Client
from tests.support import ROOT
from tests.support.servers import start_command

HERE = Path(__file__).parent
BASE = ROOT / "tucka_runtime" / "default" / "base"
INSTALL_TIMEOUT = 1800
"""Seconds for one client: some bring torch."""


@dataclass(frozen=True)
class Outcome:
    """What became of a client: the checks that it ran, those that failed and why, and why it was not run, if so."""

    client: Client
    checks: tuple[str, ...] = ()
    fails: tuple[str, ...] = ()
    not_run: str | None = None

    @property
    def works(self) -> bool:
        return self.not_run is None and not self.fails

    def row(self) -> str:
        verdict = f"not run: {self.not_run}" if self.not_run else "fails: " + "; ".join(self.fails)
        cells = (self.client.name, self.client.version, "; ".join(self.checks), "works" if self.works else verdict)
        return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"


@dataclass(frozen=True)
class Ended:
    """How a command ended: its status, None if it ran out of time, and its outputs."""

    status: int | None
    out: str
    error: str

    @property
    def last_line(self) -> str:
        lines = [line.strip() for line in (self.out + "\n" + self.error).splitlines() if line.strip()]
        return lines[-1][:300] if lines else "it said nothing"


def ended(words: list[str], folder: Path, timeout: int, path: Path) -> Ended:
    """Runs a command with `path` first in PATH; what it started ends with it."""
    # litellm would fetch a list of prices, and waits for it where there is no network.
    own = {"OPENAI_API_KEY": "none", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    environment = os.environ | own | {"PATH": f"{path}:{os.environ['PATH']}"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
        process = subprocess.Popen(
            words, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=error,
            start_new_session=True,
        )  # fmt: skip
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout)
        status = process.poll()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        out.seek(0)
        error.seek(0)
        return Ended(status, out.read(), error.read())


def install(client: Client, folder: Path) -> str | None:
    """Makes the client's folder unless it is there as the table has it. Returns why that cannot be done, if so."""
    wanted, done = json.dumps([*client.steps, *client.unwanted]), folder / "installed.json"
    if done.exists() and done.read_text() == wanted:
        return None
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if client.node:
        commands = [["npm", "install", "--no-audit", "--no-fund", "--prefix", ".", *step] for step in client.steps]
    else:
        python = str(folder / "bin" / "python")
        pip = [python, "-m", "pip"]
        installing = (
            [python, "-m", "uv", "pip", "install", "-q", "--python", python] if client.uv else [*pip, "install", "-q"]
        )
        commands = [[sys.executable, "-m", "venv", "."], *([[*pip, "install", "-q", "uv"]] if client.uv else [])]
        commands += [[*installing, *step] for step in client.steps]
        commands += [[*pip, "uninstall", "-q", "-y", *client.unwanted]] if client.unwanted else []
    for command in commands:
        if shutil.which(command[0]) is None:
            return f"there is no {command[0]}"
        outcome = ended(command, folder, INSTALL_TIMEOUT, folder / "bin")
        if outcome.status is None:
            return f"not installed in {INSTALL_TIMEOUT} s"
        if outcome.status:
            return f"not installed: {outcome.last_line}"
    done.write_text(wanted)
    return None


def run(client: Client, cache: Path, url: str) -> Outcome:
    """Installs the client, and runs its script against the server."""
    folder = cache / client.folder
    if client.command and shutil.which(client.command) is None:
        return Outcome(client, not_run=f"there is no {client.command}")
    if reason := install(client, folder):
        return Outcome(client, not_run=reason)
    if client.node:
        # A module finds its packages from where it lies.
        for name in (client.script, "checks.mjs", "asks.json"):
            shutil.copy(HERE / name, folder)
        words = ["node", str(folder / client.script)]
    else:
        words = [str(folder / "bin" / "python"), str(HERE / client.script)]
    path = folder / ("node_modules/.bin" if client.node else "bin")
    with tempfile.TemporaryDirectory() as work:
        outcome = ended([*words, url, str(BASE)], Path(work), client.timeout, path)
    (folder / "last.log").write_text(outcome.out + outcome.error)
    return judged(client, outcome)


def judged(client: Client, outcome: Ended) -> Outcome:
    """A client works if its script ran checks, all of them held, and it ended well."""
    found = [json.loads(line) for line in outcome.out.splitlines() if line.startswith('{"check":')]
    fails = [f"{one['check']}: {one['failed'][:300]}" for one in found if one["failed"] is not None]
    if outcome.status is None:
        fails.append(f"not done in {client.timeout} s")
    elif outcome.status:
        fails.append(f"its script ended with {outcome.status}: {outcome.last_line}")
    elif not found:
        fails.append("its script checked nothing")
    return Outcome(client, tuple(one["check"] for one in found), tuple(fails))


@contextlib.contextmanager
def serving(url: str | None) -> Iterator[str]:
    """The address of a server of the embedded default: the given one, or one that is started here."""
    if url is not None:
        yield url.rstrip("/").removesuffix("/v1")
        return
    with tempfile.TemporaryDirectory() as folder:
        process, address = start_command(log=Path(folder) / "log")
        try:
            yield address
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="where clients are installed, and found again")
    parser.add_argument("--url", help="a server of the embedded default that runs already")
    parser.add_argument("--only", action="append", metavar="NAME", choices=[client.name for client in CLIENTS])
    given = parser.parse_args()
    chosen = [client for client in CLIENTS if given.only is None or client.name in given.only]
    works = True
    with serving(given.url) as url:
        print("| client | version | what was run | |\n|---|---|---|---|", flush=True)
        for client in chosen:
            outcome = run(client, given.cache.absolute(), url)
            works = works and outcome.works
            print(outcome.row(), flush=True)
    return 0 if works else 1


if __name__ == "__main__":
    sys.exit(main())
