"""An adapter's folder on disk: which files, how large, how they are opened and named. Standard library only.

Every file is opened once, without following a symbolic link, and only if it is a regular file within its limit; the
bytes that are hashed are the bytes that are used, whatever happens to the folder meanwhile. Errors name the file, never
its path on the server.
"""

import errno
import hashlib
import json
import math
import os
import stat
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from tucka_runtime.errors import InvalidAdapterError, StorageError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
TRAINING_NAME = "training.json"
TEMPLATE_NAME = "chat_template.jinja"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
TOKENIZER_NAME = "tokenizer.json"
GENERATION_NAME = "generation_config.json"

MAX_CONFIG_BYTES = 2**20  # a target list that names every linear of a large model in full is about 100 KiB
MAX_WEIGHTS_BYTES = 8 * 2**30  # rank 64 on every linear of a 70B model in fp32, with its own lm_head, is about 7 GiB
MAX_TRAINING_BYTES = 64 * 2**10  # it is shown in adapter cards
FILE_LIMITS = {
    CONFIG_NAME: MAX_CONFIG_BYTES,
    WEIGHTS_NAME: MAX_WEIGHTS_BYTES,
    TRAINING_NAME: MAX_TRAINING_BYTES,
}
"""The files of every adapter; the last may be missing."""

DEFAULTS_LIMITS = {
    TEMPLATE_NAME: 2**18,
    TOKENIZER_CONFIG_NAME: 2**22,  # Gemma 3's, which spells every added token, has 1.1 MiB
    GENERATION_NAME: MAX_TRAINING_BYTES,
    TOKENIZER_NAME: 2**26,  # Gemma 3's has 33 MB
}
"""Files of a folder from which its requests' defaults come, where the operator wants that; each may be missing."""

OPTIONAL = {TRAINING_NAME, *DEFAULTS_LIMITS}


def served_files(defaults: bool) -> dict[str, int]:
    """The files that are taken of an adapter's folder, with the size that each may have."""
    return FILE_LIMITS | DEFAULTS_LIMITS if defaults else FILE_LIMITS


MAX_JSON_DEPTH = 32  # far above what PEFT writes, far below the interpreter's recursion limit

_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def start_digest(config: bytes | bytearray, weights_size: int) -> "hashlib._Hash":
    """SHA-256 over length, config, length, weights (lengths: 8 bytes, little-endian). The weights are yet to be fed."""
    return hashlib.sha256(len(config).to_bytes(8, "little") + config + weights_size.to_bytes(8, "little"))


def blob_name(
    digest: str, training: bytes | bytearray | None, defaults: Mapping[str, bytes | bytearray] | None = None
) -> str:
    """What a copy is kept under: the digest of config and weights and, where there are such, behind `-` that of
    training.json and behind `+` that of the files of DEFAULTS_LIMITS."""
    name = digest if training is None else f"{digest}-{hashlib.sha256(training).hexdigest()[:16]}"
    return f"{name}+{defaults_digest(defaults)}" if defaults else name


def weights_blob(blob: str) -> str:
    """What the engine reads of a copy of that name: all but the defaults."""
    return blob.partition("+")[0]


def defaults_digest(defaults: Mapping[str, bytes | bytearray]) -> str:
    """The beginning of a SHA-256 over names and contents, each preceded by its length."""
    parts = [part for name in sorted(defaults) for part in (name.encode(), defaults[name])]
    return hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).hexdigest()[:16]


def blob_of(folder: Path, digest: str) -> str:
    """The same of a folder whose config and weights have this digest. Raises InvalidAdapterError."""
    with open_folder(folder) as folder_fd:
        return blob_name(digest, read_training(folder_fd))


@contextmanager
def open_folder(folder: Path) -> Iterator[int]:
    """A descriptor of the adapter's folder. Raises InvalidAdapterError if it is none."""
    try:
        folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        _check_own_fault(error)
        raise InvalidAdapterError(
            "the adapter's folder does not exist or cannot be opened. Give the folder that holds adapter_config.json."
        ) from None
    try:
        yield folder_fd
    finally:
        os.close(folder_fd)


@contextmanager
def open_file(folder_fd: int, name: str, limit: int) -> Iterator[tuple[BufferedIOBase, int]]:
    """The regular file `name`, open for reading, and its size of at most `limit` bytes. Raises InvalidAdapterError."""
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder_fd)
    except FileNotFoundError:
        raise InvalidAdapterError(_why_missing(folder_fd, name)) from None
    except OSError as error:
        _check_own_fault(error)
        if error.errno == errno.ELOOP:
            raise InvalidAdapterError(
                f"the adapter's {name} is a symbolic link, which is never followed. Copy the files themselves "
                "(`cp -rL` for a Hugging Face cache)."
            ) from None
        raise InvalidAdapterError(f"the adapter's {name} cannot be opened; check its permissions.") from None
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        os.close(fd)
        raise InvalidAdapterError(f"the adapter's {name} is not a regular file.")
    with os.fdopen(fd, "rb") as file:
        if info.st_size > limit:
            raise InvalidAdapterError(f"the adapter's {name} is larger than {limit} bytes.")
        yield file, info.st_size


def read_exactly(file: BufferedIOBase, size: int, name: str) -> bytearray:
    """The next `size` bytes. Raises InvalidAdapterError if the file ends before, or its disk does not give them."""
    data = bytearray(size)
    read_into(file, memoryview(data), name)
    return data


def read_into(file: BufferedIOBase, data: memoryview, name: str) -> None:
    """Fills `data` with the next bytes. Raises what `read_exactly` does."""
    try:
        read = file.readinto(data)
    except OSError as error:
        raise InvalidAdapterError(
            f"the adapter's {name} cannot be read ({error.strerror}). Copy it again, or mend its disk."
        ) from error
    if read != len(data):
        raise InvalidAdapterError(f"the adapter's {name} is truncated, or was changed while it was read.")


def read_config(folder_fd: int) -> bytearray:
    """The bytes of adapter_config.json. Raises InvalidAdapterError."""
    with open_file(folder_fd, CONFIG_NAME, MAX_CONFIG_BYTES) as (file, size):
        return read_exactly(file, size, CONFIG_NAME)


def read_training(folder_fd: int) -> bytearray | None:
    """The bytes of training.json; None where there is no usable one, since it only informs."""
    try:
        with open_file(folder_fd, TRAINING_NAME, MAX_TRAINING_BYTES) as (file, size):
            return read_exactly(file, size, TRAINING_NAME)
    except InvalidAdapterError:
        return None


def read_defaults(folder_fd: int) -> dict[str, bytearray]:
    """Those of the files of DEFAULTS_LIMITS that are there. Raises InvalidAdapterError."""
    found = {}
    for name, limit in DEFAULTS_LIMITS.items():
        try:
            os.stat(name, dir_fd=folder_fd, follow_symlinks=False)
        except FileNotFoundError:
            continue
        with open_file(folder_fd, name, limit) as (file, size):
            found[name] = read_exactly(file, size, name)
    return found


def parse_training(data: bytes | bytearray | None) -> dict[str, Any] | None:
    """The object that a training.json has; None where there is none, or nothing that could be told of: it is about the
    adapter, and no reason not to serve it."""
    try:
        training = strict_json(data.removeprefix(BOM_UTF8)) if data else None
    except ValueError:
        return None
    return training if isinstance(training, dict) and _fits(training) else None


def _fits(value: Any) -> bool:
    """Whether all whole numbers in it have 64 bits at most, as messages between processes do."""
    if isinstance(value, dict):
        return all(map(_fits, value.values()))
    if isinstance(value, list):
        return all(map(_fits, value))
    return not isinstance(value, int) or -(1 << 63) <= value < 1 << 64


def strict_json(data: bytes | bytearray) -> Any:
    """JSON in UTF-8 without duplicate keys, non-finite numbers, lone surrogates or deep nesting.

    Raises ValueError with a reason that repeats nothing of the input.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
        _check_depth(value)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeError:
        raise ValueError("it is not valid UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON from character {error.pos} on") from None
    return value


def _check_own_fault(error: Exception) -> None:
    """Raises StorageError where it is not the file that cannot be opened but this process that can open none."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        raise StorageError(
            f"The server cannot open files: {error.strerror}. Raise its limit, and try again."
        ) from error


def _why_missing(folder_fd: int, name: str) -> str:
    try:
        entries = os.listdir(folder_fd)
    except OSError:  # a network mount that is gone
        entries = []
    if name == WEIGHTS_NAME and any(entry.endswith(_PICKLED) for entry in entries):
        return (
            f"the adapter has no {WEIGHTS_NAME}, only pickled weights, which are never opened because they can run "
            "code. Save it again with safe_serialization=True."
        )
    if name == CONFIG_NAME and any(_is_file(folder_fd, f"{entry}/{name}") for entry in entries):
        return (
            f"the adapter's folder has no {name}, but subfolders with one: PEFT writes a subfolder for each adapter "
            "that is not named `default`. Give the subfolder of the one to load."
        )
    return f"the adapter has no {name}. Give the folder that PEFT's save_pretrained wrote."


def _is_file(folder_fd: int, name: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(name, dir_fd=folder_fd, follow_symlinks=False).st_mode)
    except OSError:
        return False


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("it has a duplicate key")
    return result


def _refuse_constant(_: str) -> None:
    raise ValueError("it has NaN or Infinity")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("it has a number beyond the range of a float")
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [item for parent in level if isinstance(parent, dict | list) for item in _children(parent)]
        if not level:
            return
    raise ValueError("it is nested too deeply")


def _children(parent: dict[str, Any] | list[Any]) -> list[Any]:
    return list(parent.values()) if isinstance(parent, dict) else parent
