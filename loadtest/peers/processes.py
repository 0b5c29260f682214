"""The processes that are compared: each in a group of its own, which is stopped while others are asked
and ends with this one."""

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from tucka_runtime.errors import TuckaError

START_SECONDS = 600
STOP_SECONDS = 20
SHOWN_LINES = 3


class PeerError(TuckaError):
    """A peer is not there, does not start, or does not answer as asked."""


@dataclass(frozen=True)
class StartLine:
    """How a process is started, in the folder of its model: paths of files there are relative."""

    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)

    def shown(self) -> str:
        """The line without where things lie on this machine; of words that differ in numbers alone the first and the
        last."""
        variables = [f"{name}={_bare(value)}" for name, value in self.environment.items()]
        words = [_bare(word) for word in self.command]
        kinds = [re.sub(r"\d+", "#", word) for word in words]
        shown = list(variables)
        for i, word in enumerate(words):
            if kinds[i - 1 : i + 2] != [kinds[i]] * 3:
                shown.append("PORT" if word == "{port}" else shlex.quote(word))
            elif shown[-1] != "...":
                shown.append("...")
        return " ".join(shown)


def _bare(text: str) -> str:
    """`text` with the last parts alone of absolute paths, which a colon may part."""
    return ":".join(Path(part).name if part.startswith("/") else part for part in text.split(":"))


@dataclass(frozen=True)
class ProcessGroup:
    """A running process and all that it started. `log` has what they wrote to stderr, and, but for a child that is
    spoken with, to stdout."""

    process: subprocess.Popen[str]
    log: Path

    def last_words(self) -> str:
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return " / ".join(lines[-SHOWN_LINES:])[:600] or "it wrote nothing"


@contextlib.contextmanager
def stopped(groups: Sequence[ProcessGroup]) -> Iterator[None]:
    """Within it the groups do nothing: OpenMP's threads spin on behind the last answer, on the cores of the next."""
    for group in groups:
        os.killpg(group.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for group in groups:
            os.killpg(group.process.pid, signal.SIGCONT)


@contextlib.contextmanager
def running(line: StartLine, folder: Path, log: Path, spoken: bool = False) -> Iterator[ProcessGroup]:
    """The group, until the context is left. With `spoken` standard input and output are pipes. Raises PeerError."""
    pipe = subprocess.PIPE if spoken else None
    with log.open("w") as file:
        out: IO[str] | int = subprocess.PIPE if spoken else file
        try:
            process = subprocess.Popen(
                line.command, cwd=folder, env=os.environ | dict(line.environment), stdin=pipe, stdout=out, stderr=file,
                text=True, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise PeerError(f"{line.command[0]} cannot be started: {error.strerror}") from None
    try:
        yield ProcessGroup(process, log)
    finally:
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """What is left of the group is killed: a worker may outlive the process that started it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


@dataclass(frozen=True)
class PeerServer:
    url: str
    group: ProcessGroup


@contextlib.contextmanager
def serving(line: StartLine, folder: Path, log: Path, health: str) -> Iterator[PeerServer]:
    """A server on a free port, once `health` answers 200. The line says `{port}` where it belongs. Raises PeerError."""
    port = free_port()
    words = [word.replace("{port}", str(port)) for word in line.command]
    url = f"http://127.0.0.1:{port}"
    with running(StartLine(words, line.environment), folder, log) as group:
        deadline = time.monotonic() + START_SECONDS
        while not _answers(url + health):
            if group.process.poll() is not None:
                raise PeerError(f"it ended with {group.process.returncode} before it was ready: {group.last_words()}")
            if time.monotonic() > deadline:
                raise PeerError(f"it was not ready after {START_SECONDS} s: {group.last_words()}")
            time.sleep(0.2)
        yield PeerServer(url, group)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def output(*command: str, seconds: float = START_SECONDS, folder: Path | None = None) -> str:
    """What a command prints. Raises PeerError with its last words if it fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, cwd=folder, stdin=subprocess.DEVNULL, check=False
        )
    except OSError as error:
        raise PeerError(f"{command[0]} cannot be started: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise PeerError(f"{shlex.join(command)[:200]} took longer than {seconds:g} s") from None
    if done.returncode:
        last = " / ".join(line.strip() for line in done.stderr.splitlines()[-SHOWN_LINES:])
        raise PeerError(f"{shlex.join(command)[:200]} ended with {done.returncode}: {last[:600]}")
    return done.stdout
