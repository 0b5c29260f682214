"""Bases in a GGUF file: made once into a Hugging Face folder, which later starts find by the file's content.

The work is a child's (`models/dequantise.py`): it needs torch, which the API's process never imports, and for a while
twice the model's memory.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tucka_runtime.base_files import read_json
from tucka_runtime.children import python
from tucka_runtime.durable import sync_folder
from tucka_runtime.errors import ConfigError
from tucka_runtime.extras import how_to_install, installed

SOURCE = "gguf.json"
"""In the folder that is made: `sha256` of the file, the `type` of most of its values, the `dtype` that they have now,
the one that "auto" stands for, and the `bytes` of the weights."""

_DIGITS = 16  # of the digest, in a folder's name
_NEWS_SECONDS = 30
_LONGEST_REASON = 600


def gguf_folder(file: Path, dtype: str, kept: Path, say: Callable[[str], None]) -> Path:
    """The folder below `kept` of the model in a GGUF file, made where it is not there yet. Its values are of `dtype`;
    "auto" is the type that most of them have in the file, bfloat16 where that is a quantised one. `say` is told what is
    done. Raises ConfigError."""
    digest = _digest(file)
    try:
        kept.mkdir(parents=True, exist_ok=True)
        with _alone(kept / f".{digest[:_DIGITS]}.lock", file, say):
            folder = _made(kept, digest, dtype)
            if folder is None:
                folder = _make(file, digest, dtype, kept, say)
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        raise ConfigError(
            f"The base {file} has to be kept in {kept}, dequantised, and {error.filename or kept}: {reason}. Mend "
            "that, or let another folder keep it: --state-dir, or XDG_CACHE_HOME."
        ) from None
    about = read_json(folder / SOURCE)
    what = "dequantised" if about["dtype"] != about["auto"] or about["quantised"] else "converted"
    say(f"{file.name}: {what} from {about['type']} to {about['dtype']}, {about['bytes'] / 1e6:.0f} MB, in {folder}")
    return folder


def model_name(file: Path) -> str:
    """What requests call the model of a file, and its folder begins with."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).strip("-.")[:80] or "model"


def _digest(file: Path) -> str:
    """SHA-256 of the file. Raises ConfigError where it is no GGUF."""
    try:
        with file.open("rb") as opened:
            if opened.read(4) == b"GGUF":
                opened.seek(0)
                return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"The base {file} cannot be read: {(error.strerror or str(error)).lower()}.") from None
    raise ConfigError(
        f"The base {file} is a file, but no GGUF: it does not begin with those four letters. Give a GGUF file, the "
        "folder of a Hugging Face model, or its name there: org/name."
    )


@contextmanager
def _alone(path: Path, file: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Holds the lock of a file's content: of several processes that want it one converts, and the others wait."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{file.name}: another process dequantises it; waiting for that")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _made(kept: Path, digest: str, dtype: str) -> Path | None:
    """The folder of that content and type, whatever the file was called when it was made."""
    for path in sorted(kept.glob(f"*-{digest[:_DIGITS]}/{SOURCE}")):
        about = read_json(path)
        if about["sha256"] == digest and about["dtype"] == (about["auto"] if dtype == "auto" else dtype):
            return path.parent
    return None


def _make(file: Path, digest: str, dtype: str, kept: Path, say: Callable[[str], None]) -> Path:
    """Raises ConfigError, OSError."""
    if not installed("gguf"):
        raise ConfigError(f"The base {file} is a GGUF, and what reads it is not installed: {how_to_install('gguf')}.")
    unfinished = kept / f".{digest[:_DIGITS]}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed: the lock is ours
    unfinished.mkdir()
    try:
        _run(file, unfinished, dtype, say)
        about = read_json(unfinished / SOURCE) | {"sha256": digest}
        (unfinished / SOURCE).write_text(json.dumps(about, indent=2) + "\n")
        for path in unfinished.iterdir():
            with path.open("rb") as written:
                os.fsync(written.fileno())
        folder = kept / f"{model_name(file)}-{about['dtype']}-{digest[:_DIGITS]}"
        unfinished.rename(folder)
        sync_folder(kept)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _run(file: Path, folder: Path, dtype: str, say: Callable[[str], None]) -> None:
    """Raises ConfigError with what the child says, where it comes to nothing."""
    say(f"{file.name}: dequantising it, once ...")
    started = time.monotonic()
    child = subprocess.Popen(
        python("-m", "tucka_runtime.models.dequantise", str(os.getpid()), str(file.absolute()), str(folder), dtype),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
        env=os.environ | {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"},
    )  # fmt: skip
    try:
        while True:
            try:
                said, trouble = child.communicate(timeout=_NEWS_SECONDS)
                break
            except subprocess.TimeoutExpired:
                written = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
                say(f"{file.name}: dequantising for {time.monotonic() - started:.0f} s, {written:.0f} MB written")
    finally:
        child.kill()
        child.wait()
    if child.returncode < 0:
        raise ConfigError(
            f"The base {file} could not be dequantised: signal {-child.returncode} ended the process that did it, as "
            "happens where memory runs out. It takes twice the memory of the model in the type it is to have: free "
            "some, or do it on another machine and give the folder that is made."
        )
    if child.returncode:
        reason = " ".join((said or trouble).split()[:200])[-_LONGEST_REASON:]
        raise ConfigError(f"The base {file} cannot be used: {reason}")
