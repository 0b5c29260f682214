#!/usr/bin/env python3
"""Builds and runs the Dockerfile where there is no container engine: its own steps, each in a fresh Debian root.

    sudo python3 deploy/try-image.py WORKDIR [--bind HOST[:PATH]]... [--env NAME=VALUE]... [--build-arg NAME=VALUE]...

Needs root, debootstrap and unshare. Every `FROM debian:12...` becomes a copy of one root made by debootstrap (kept in
WORKDIR/debian). RUN steps run there as the file says; `--bind` and `--env` bring what this machine's pip and apt need
to reach their registries, during RUN only. Then the last stage runs as its USER with its ENTRYPOINT and CMD, read-only
but for /tmp and its volumes; the script waits for its HEALTHCHECK, sends `--request` to the port, asks it to stop
with its STOPSIGNAL while another request is under way, and wants that one answered and exit status 0.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
SUITE = "bookworm"  # Debian 12
CHROOT = shutil.which("chroot") or "/usr/sbin/chroot"


@dataclass
class Stage:
    """A root file system and what the instructions have said of it so far."""

    root: Path
    name: str | None = None
    env: dict[str, str] = field(default_factory=dict)
    args: dict[str, str] = field(default_factory=dict)
    user: str = "root"
    workdir: str = "/"
    volumes: list[str] = field(default_factory=list)
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)
    stopsignal: str = "SIGTERM"


def instructions(text: str) -> list[tuple[str, str]]:
    """(INSTRUCTION, rest) in order; continued lines joined, comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [
        (word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--mirror", default="http://deb.debian.org/debian")
    parser.add_argument("--bind", action="append", default=[], metavar="HOST[:PATH]", help="visible during RUN")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="set during RUN")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--request", default=None, metavar="JSON", help="body for /v1/chat/completions")
    parser.add_argument("--keep", action="store_true", help="run the roots that an earlier call has built")
    flags = parser.parse_args()
    if os.environ.get("TRY_IMAGE_UNSHARED") != "1":  # mounts vanish with the namespace
        environment = os.environ | {"TRY_IMAGE_UNSHARED": "1"}
        return subprocess.run(
            ["unshare", "--mount", sys.executable, *sys.argv], env=environment, check=False
        ).returncode
    flags.workdir.mkdir(parents=True, exist_ok=True)
    last = build(flags)
    size = subprocess.run(["du", "-sm", str(last.root)], capture_output=True, text=True, check=True).stdout.split()[0]
    print(f"built: {size} MB")
    return try_out(last, flags)


def build(flags: argparse.Namespace) -> Stage:
    given = dict(item.split("=", 1) for item in flags.build_arg)
    stages: list[Stage] = []
    for word, rest in instructions((REPOSITORY / "Dockerfile").read_text()):
        if word == "FROM":
            stages.append(start_stage(rest, len(stages), flags))
            continue
        stage = stages[-1]
        print(f"[{len(stages)}] {word} {rest[:100]}", flush=True)
        began = time.monotonic()
        apply(word, rest, stage, stages, given, flags)
        if word == "RUN":
            print(f"    {time.monotonic() - began:.0f} s", flush=True)
    return stages[-1]


def start_stage(rest: str, number: int, flags: argparse.Namespace) -> Stage:
    image, _, name = rest.partition(" AS ")
    if not image.startswith("debian:12"):
        raise SystemExit(f"{image}: only Debian 12 can be made here")
    root, base = flags.workdir / f"stage{number}", flags.workdir / "debian"
    if not (base / "etc/debian_version").is_file():
        subprocess.run(["debootstrap", "--variant=minbase", SUITE, str(base), flags.mirror], check=True)
    if not flags.keep:
        shutil.rmtree(root, ignore_errors=True)
        subprocess.run(["cp", "-a", str(base), str(root)], check=True)
    return Stage(root, name or None)


def apply(
    word: str, rest: str, stage: Stage, stages: list[Stage], given: dict[str, str], flags: argparse.Namespace
) -> None:
    """One instruction. Raises SystemExit for one that is not known here."""
    match word:
        case "ARG":
            name, _, default = rest.partition("=")
            stage.args[name] = given.get(name, default)
        case "ENV":
            stage.env |= dict(item.split("=", 1) for item in shlex.split(rest))
        case "RUN":
            if not flags.keep:
                run(rest, stage, flags)
        case "COPY":
            if not flags.keep:
                copy(rest, stage, stages)
        case "WORKDIR":
            stage.workdir = rest
            (stage.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
        case "USER":
            stage.user = rest
        case "VOLUME":
            stage.volumes = json.loads(rest)
        case "STOPSIGNAL":
            stage.stopsignal = rest
        case "HEALTHCHECK":
            stage.healthcheck = json.loads(rest[rest.index("CMD ") + 4 :])
        case "ENTRYPOINT":
            stage.entrypoint = json.loads(rest)
        case "CMD":
            stage.command = json.loads(rest)
        case "EXPOSE":
            pass
        case _:
            raise SystemExit(f"{word}: this script does not know it")


def run(command: str, stage: Stage, flags: argparse.Namespace) -> None:
    """A RUN step, with the machine's --bind and --env."""
    mounts: list[Path] = []

    def mount(*arguments: str, on: Path) -> None:
        subprocess.run(["mount", *arguments, str(on)], check=True)
        mounts.append(on)

    mount("-t", "proc", "proc", on=stage.root / "proc")
    mount("--bind", "/dev", on=stage.root / "dev")
    for item in ["/etc/resolv.conf", *flags.bind]:
        host, _, path = item.partition(":")
        target = stage.root / (path or host).lstrip("/")
        if Path(host).is_dir():
            target.mkdir(parents=True, exist_ok=True)
        elif not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()
        mount("--bind", "-o", "ro", host, on=target)
    extra = dict(item.split("=", 1) for item in flags.env)
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    environment = {"PATH": path, "HOME": "/root"} | stage.env | stage.args | extra
    try:
        inside = [CHROOT, str(stage.root), "/bin/sh", "-c", f"cd {shlex.quote(stage.workdir)} && {{ {command}\n}}"]
        done = subprocess.run(inside, env=environment, check=False, capture_output=True, text=True)
    finally:
        for target in reversed(mounts):
            subprocess.run(["umount", str(target)], check=True)
    if done.returncode:
        raise SystemExit(f"{done.stdout[-4000:]}{done.stderr[-4000:]}\nRUN {command}\nfailed with {done.returncode}")


def copy(rest: str, stage: Stage, stages: list[Stage]) -> None:
    words = rest.split()
    origin = REPOSITORY
    if words[0].startswith("--from="):
        name = words.pop(0).removeprefix("--from=")
        origin = next(s.root for s in stages if s.name == name)
    *sources, last = words
    target = stage.root / os.path.normpath(os.path.join(stage.workdir, last)).lstrip("/")
    for source in sources:
        path = origin / source.lstrip("/")
        if path.is_dir():
            shutil.copytree(
                path, target, symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
                if origin == REPOSITORY else None,
            )  # fmt: skip
        else:
            shutil.copy2(path, target / path.name if last.endswith("/") else target)


def try_out(stage: Stage, flags: argparse.Namespace) -> int:
    """Runs the image; 0 when all that the docstring promises held."""
    url = f"http://127.0.0.1:{flags.port}"
    environment = stage.env | {"TUCKA_PORT": str(flags.port), "TUCKA_INSECURE": "true"}
    for mount in (
        ["--bind", str(stage.root), str(stage.root)],
        ["-o", "remount,bind,ro", str(stage.root)],
        ["-t", "proc", "proc", str(stage.root / "proc")],
        ["--bind", "/dev", str(stage.root / "dev")],
        ["-t", "tmpfs", "tmpfs", str(stage.root / "tmp")],
    ):
        subprocess.run(["mount", *mount], check=True)
    for volume in stage.volumes:
        here = flags.workdir / "volumes" / volume.strip("/")
        here.mkdir(parents=True, exist_ok=True)
        owner = (stage.root / volume.strip("/")).stat()
        os.chown(here, owner.st_uid, owner.st_gid)
        subprocess.run(["mount", "--bind", str(here), str(stage.root / volume.strip("/"))], check=True)

    inside = [CHROOT, "--userspec", f"{stage.user}:{stage.user}", str(stage.root)]
    began = time.monotonic()
    server = subprocess.Popen([*inside, *stage.entrypoint, *stage.command], env=environment)
    try:
        while subprocess.run([*inside, *stage.healthcheck], env=environment, capture_output=True).returncode:
            if server.poll() is not None or time.monotonic() - began > 180:
                print("it did not become healthy", file=sys.stderr)
                return 1
            time.sleep(0.5)
        print(f"healthy after {time.monotonic() - began:.1f} s")
        status = Path(f"/proc/{server.pid}/status").read_text()
        print("runs as", re.search(r"Uid:\s+(\d+)", status)[1])  # type: ignore[index]
        print("cannot write to /opt:", not can_write(inside, environment))
        models = json.loads(call(f"{url}/v1/models"))["data"]
        print("models:", ", ".join(card["id"] for card in models))
        message = {"role": "user", "content": "2024-03-05"}
        body = flags.request or json.dumps({"model": "formats", "messages": [message], "temperature": 0})
        print("answer:", call(f"{url}/v1/chat/completions", body)[:400])
        return drain(server, stage, url, models[0]["id"])
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()


def drain(server: "subprocess.Popen[bytes]", stage: Stage, url: str, model: str) -> int:
    """Asks it to stop while a request runs."""
    long = json.dumps({"model": model, "prompt": "Hello", "max_tokens": 200, "ignore_eos": True})
    answers: list[str] = []
    asking = threading.Thread(target=lambda: answers.append(call(f"{url}/v1/completions", long)))
    asking.start()
    time.sleep(0.3)
    alive = asking.is_alive()
    server.send_signal(signal.Signals[stage.stopsignal])
    began = time.monotonic()
    status = server.wait(60)
    asking.join()
    tokens = json.loads(answers[0])["usage"]["completion_tokens"] if answers else 0
    print(f"{stage.stopsignal} while a request ran ({alive}): it got its {tokens} tokens,", end=" ")
    print(f"then status {status} after {time.monotonic() - began:.1f} s")
    return 0 if alive and tokens == 200 and status == 0 else 1


def can_write(inside: list[str], environment: dict[str, str]) -> bool:
    return not subprocess.run([*inside, "touch", "/opt/x"], env=environment, capture_output=True).returncode


def call(url: str, body: str | None = None) -> str:
    request = urllib.request.Request(url, body.encode() if body else None, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return answer.read().decode()


if __name__ == "__main__":
    sys.exit(main())
