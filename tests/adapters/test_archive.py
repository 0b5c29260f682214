"""Adapters in archives: what is taken, and that what is hostile is refused and writes nothing beside its folder."""

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.archives import CONFIG, WEIGHTS, made
from tucka_runtime.adapters import archive
from tucka_runtime.adapters.archive import unpack
from tucka_runtime.errors import InvalidAdapterError


def unpacked(data: bytes, tmp_path: Path) -> dict[str, bytes]:
    """The files that an archive unpacks to. Nothing lies beside their folder but the archive, whatever happens."""
    (tmp_path / "archive").write_bytes(data)
    (tmp_path / "folder").mkdir()
    try:
        unpack(tmp_path / "archive", tmp_path / "folder")
    finally:
        assert {path.name for path in tmp_path.iterdir()} == {"archive", "folder"}
        assert all(path.is_file() and not path.is_symlink() for path in (tmp_path / "folder").iterdir())
    return {path.name: path.read_bytes() for path in (tmp_path / "folder").iterdir()}


FILES = {"adapter_config.json": CONFIG, "adapter_model.safetensors": WEIGHTS}


@pytest.mark.parametrize("prefix", ["", "./", "law/", "./runs/law/"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["tar", "tar.gz"])
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_what_tar_writes(tmp_path: Path, prefix: str, pack: Callable[[bytes], bytes], form: int) -> None:
    members = [(prefix or "./", None), (f"{prefix}README.md", b"# hello")]
    data = made([*members, *((prefix + name, text) for name, text in FILES.items())], form)
    assert unpacked(pack(data), tmp_path) == FILES


def test_buffers_of_python_3_14(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They ask for twice as much at once as those before."""

    class Buffered(tarfile.ExFileObject):
        def __init__(self, file: Any, info: Any):
            io.BufferedReader.__init__(
                self, tarfile._FileInFile(file.fileobj, info.offset_data, info.size, None), 2**17
            )

    monkeypatch.setattr(tarfile.TarFile, "fileobject", Buffered)
    weights = bytes(range(256)) * 2000
    with tarfile.open(tmp_path / "made", "w") as made_of:
        for name, data in (("adapter_config.json", CONFIG), ("adapter_model.safetensors", weights)):
            made_of.addfile(entry(name, size=len(data)), io.BytesIO(data))
    found = unpacked((tmp_path / "made").rename(tmp_path / "archive").read_bytes(), tmp_path)
    assert found == {"adapter_config.json": CONFIG, "adapter_model.safetensors": weights}


def entry(name: str, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def with_entry(info: tarfile.TarInfo, data: bytes = b"") -> bytes:
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512 + 1024)


GOOD = [*FILES.items()]
WEIGHTS_LINK = {"name": "adapter_model.safetensors", "linkname": "/etc/passwd"}
HOSTILE = {
    "symbolic link": (with_entry(entry(**WEIGHTS_LINK, type=tarfile.SYMTYPE)), "link"),
    "hard link": (with_entry(entry(**WEIGHTS_LINK, type=tarfile.LNKTYPE)), "link"),
    "link beside": (with_entry(entry("x", linkname="..", type=tarfile.SYMTYPE)), "link"),
    "device": (with_entry(entry("adapter_config.json", type=tarfile.CHRTYPE)), "neither a plain file"),
    "block device": (with_entry(entry("sda", type=tarfile.BLKTYPE)), "neither a plain file"),
    "pipe": (with_entry(entry("adapter_config.json", type=tarfile.FIFOTYPE)), "neither a plain file"),
    "sparse": (with_entry(entry("adapter_config.json", type=tarfile.GNUTYPE_SPARSE)), "neither a plain file"),
    "dots": (made([("../adapter_config.json", CONFIG)]), "`..`"),
    "dots within": (made([("a/../../adapter_config.json", CONFIG)]), "`..`"),
    "absolute": (made([("/tmp/adapter_config.json", CONFIG)]), "absolute"),
    "twice": (made([*GOOD, GOOD[0]]), "twice"),
    "checkpoints": (made([*GOOD, ("checkpoint-10/adapter_config.json", CONFIG)]), "two folders"),
    "scattered": (made([("a/adapter_config.json", CONFIG), ("b/adapter_model.safetensors", WEIGHTS)]), "several"),
    "folder of that name": (made([("adapter_config.json/", None)]), "a folder"),
    "config too large": (made([("adapter_config.json", bytes(2**20 + 1))]), "larger than 1048576"),
    "many": (made([(f"{i}", b"") for i in range(1001)]), "entries"),
    "cut off": (made(GOOD)[:700], "longer than it is"),
    "cut off, packed": (gzip.compress(made(GOOD))[:60], "damaged"),
    "text": (b"hello", "neither a .tar"),
    "nothing": (b"", "neither a .tar"),
    "zip": (b"PK\x03\x04" + bytes(600), "neither a .tar"),
    "bomb": (gzip.compress(made([("README", bytes(2**27))]), 9), "far more than an adapter"),
    "bomb in the weights": (gzip.compress(made([("adapter_model.safetensors", bytes(2**27))]), 9), "far more than"),
    "claims to be huge": (with_entry(entry("README", size=2**62), b""), "longer than it is"),
}


def test_row_52_hostile_archives(tmp_path: Path) -> None:
    for what, (data, why) in HOSTILE.items():
        folder = tmp_path / what
        folder.mkdir()
        with pytest.raises(InvalidAdapterError) as error:
            unpacked(data, folder)
        assert why in error.value.message, what
        assert "passwd" not in error.value.message and str(tmp_path) not in error.value.message


def test_row_52_headers_that_grow(tmp_path: Path) -> None:
    """tarfile takes an extended header whole, and one behind another by calling itself."""
    huge = tarfile.TarInfo("pax")
    huge.type, huge.size = tarfile.XHDTYPE, 2**30
    chain = with_entry(entry("././@LongLink", type=tarfile.GNUTYPE_LONGNAME, size=4), b"abcd")[:1024]
    for data, why in ((huge.tobuf() + bytes(1024), "header"), (chain * 5000 + bytes(1024), "damaged")):
        (tmp_path / why).mkdir()
        with pytest.raises(InvalidAdapterError, match=why):
            unpacked(data, tmp_path / why)


def test_no_more_is_unpacked_than_any_adapter_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_ARCHIVE_BYTES", 5000)
    with pytest.raises(InvalidAdapterError, match="far more"):
        unpacked(made([("README", bytes(9000)), *GOOD]), tmp_path)
