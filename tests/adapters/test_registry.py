"""Names and copies survive crashes; paths and names that mean harm are refused."""

import errno
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import ROOT
from tests.support.adapter_files import put, tucka_config, tucka_tensors
from tests.support.registry_child import state
from tucka_runtime.adapters import blobs, journal
from tucka_runtime.adapters.blobs import StoredAdapter
from tucka_runtime.adapters.entry import RegistryEntry
from tucka_runtime.adapters.files import CONFIG_NAME, TRAINING_NAME, WEIGHTS_NAME
from tucka_runtime.adapters.format import read_adapter
from tucka_runtime.adapters.journal import Journal
from tucka_runtime.adapters.registry import AdapterRegistry
from tucka_runtime.adapters.sources import resolve_source
from tucka_runtime.errors import ConfigError, InvalidAdapterError, InvalidRequestError, StorageError
from tucka_runtime.messages import AdapterInfo, AdapterKey, Route
from tucka_runtime.names import Alias, check_name, split_version

CHILD = ROOT / "tests" / "support" / "registry_child.py"


@pytest.fixture
def source(tmp_path, base) -> Path:
    return put(tmp_path / "source", tucka_config(), tucka_tensors(base))


@pytest.fixture
def registry(tmp_path):
    with AdapterRegistry(tmp_path / "state") as registry:
        yield registry


def entry(
    name: str, stored: StoredAdapter, generation: int = 1, source: str = "x", pinned: Route | None = None, base="f"
) -> RegistryEntry:
    return RegistryEntry(name, stored.digest, stored.blob, generation, source, pinned, base)


# --- copies ---


def test_ingest_copies_the_known_files_and_nothing_else(registry, source, base):
    (source / TRAINING_NAME).write_text("{}")
    (source / "README.md").write_text("x")
    (source / "handler.py").write_text("x")
    stored = registry.ingest(source)
    assert sorted(os.listdir(stored.folder)) == [CONFIG_NAME, WEIGHTS_NAME, TRAINING_NAME]
    for name in (CONFIG_NAME, WEIGHTS_NAME, TRAINING_NAME):
        assert (stored.folder / name).read_bytes() == (source / name).read_bytes()
    assert stored.digest == read_adapter(stored.folder, base).digest == read_adapter(source, base).digest
    assert stored.folder.name.startswith(f"{stored.digest}-")


def test_training_json_is_part_of_the_copy_but_not_of_the_digest(registry, source):
    plain = registry.ingest(source)
    (source / TRAINING_NAME).write_text("{}")
    first = registry.ingest(source)
    (source / TRAINING_NAME).write_text('{"route":"request"}')
    second = registry.ingest(source)
    assert plain.digest == first.digest == second.digest
    assert len({plain.folder, first.folder, second.folder}) == 3
    assert (second.folder / TRAINING_NAME).read_text() == '{"route":"request"}'


def test_entries_of_before_there_were_blobs(tmp_path, source):
    root = tmp_path / "state"
    with AdapterRegistry(root) as registry:
        stored = registry.ingest(source)
        registry.put(entry("a", stored, 1, "x", None, "f"))
        before = registry.names()
    table = json.loads((root / "registry.json").read_text())
    del table["adapters"][0]["blob"]
    (root / "registry.json").write_text(json.dumps(table))
    with AdapterRegistry(root) as registry:
        assert registry.names() == before


def test_same_content_twice_is_one_copy(registry, source):
    first = registry.ingest(source)
    inode = (first.folder / WEIGHTS_NAME).stat().st_ino
    assert registry.ingest(source) == first
    assert (first.folder / WEIGHTS_NAME).stat().st_ino == inode
    assert len(os.listdir(first.folder.parent)) == 1


def test_same_content_at_once(registry, source):
    stored = []
    threads = [threading.Thread(target=lambda: stored.append(registry.ingest(source))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stored) == 4 and len(set(stored)) == 1
    assert len(os.listdir(stored[0].folder.parent)) == 1


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
@pytest.mark.parametrize("how", ["missing", "link", "fifo", "folder", "huge"])
def test_a_failed_ingest_leaves_nothing(registry, source, tmp_path, name, how):
    path = source / name
    path.rename(tmp_path / "aside")
    if how == "link":
        path.symlink_to(tmp_path / "aside")
    elif how == "fifo":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how == "huge":
        path.touch()
        os.truncate(path, 9 * 2**30)  # sparse
    with pytest.raises(InvalidAdapterError):
        registry.ingest(source)
    assert os.listdir(tmp_path / "state" / "blobs") == []


def test_weights_cut_off_while_they_are_copied(registry, source, monkeypatch):
    monkeypatch.setattr("tucka_runtime.adapters.blobs.COPY_BYTES", 64)
    real = os.fstat

    def cut(fd):
        info = real(fd)
        if info.st_size == os.path.getsize(source / WEIGHTS_NAME):
            os.truncate(source / WEIGHTS_NAME, 100)
        return info

    monkeypatch.setattr(os, "fstat", cut)
    with pytest.raises(InvalidAdapterError, match="changed while it was read"):
        registry.ingest(source)


def test_collect_keeps_what_is_named_or_asked_for(registry, tmp_path, base):
    stored = [registry.ingest(put(tmp_path / str(i), tucka_config(alpha=i), tucka_tensors(base))) for i in range(3)]
    registry.put(entry("a", stored[0], 1, "x", None, "f"))
    registry.collect()
    assert all(item.folder.exists() for item in stored), "not before they are released"
    for item in stored:
        registry.release(item)
    registry.collect(keep=[stored[1].folder.name])
    assert [item.folder.exists() for item in stored] == [True, True, False]
    registry.remove("a")
    registry.collect()
    assert os.listdir(stored[0].folder.parent) == []


# --- names ---


def test_names_come_back(tmp_path, source):
    root = tmp_path / "state"
    with AdapterRegistry(root) as registry:
        stored = registry.ingest(source)
        registry.put(entry("a", stored, 1, "somewhere/\udc80", None, "f"))
        registry.put(entry("b", stored, 2, "é", Route(1, (0.5, 0.25)), "f"))
        registry.put(entry("a", stored, 3, "there", Route(0, (0.3,)), "g"))
        registry.put(entry("c", stored, 4, "there", None, "g"))
        registry.remove("c")
        registry.remove("never")
        before = registry.names()
    with AdapterRegistry(root) as registry:
        assert registry.names() == before
        assert [(entry.name, entry.generation, entry.pinned_route) for entry in before] == [
            ("a", 3, Route(0, (0.3,))),
            ("b", 2, Route(1, (0.5, 0.25))),
        ]
        assert registry.ingest(source) == stored


def test_put_needs_the_content(registry):
    with pytest.raises(StorageError, match="gone"):
        registry.put(entry("a", StoredAdapter("0" * 64, registry.folder("0" * 64))))


@pytest.mark.parametrize("changes", [0, 1, 3])
def test_a_full_disk_changes_nothing(tmp_path, source, monkeypatch, changes):
    """Whether the table or its log is written next, and what was refused does not come up after a restart."""
    root = tmp_path / "state"
    with AdapterRegistry(root) as registry:
        stored = registry.ingest(source)
        for generation in range(changes):
            registry.put(entry("a", stored, generation))
        before = registry.names()
        with monkeypatch.context() as patch:
            fill_disk(patch)
            for name in ("b", "c"):
                with pytest.raises(StorageError, match="No space left on device"):
                    registry.put(entry(name, stored))
        assert registry.names() == before
        assert not [name for name in os.listdir(root) if name.startswith(".")]
    with AdapterRegistry(root) as registry:
        assert registry.names() == before
        registry.put(entry("d", stored))
    with AdapterRegistry(root) as registry:
        assert registry.names() == [*before, entry("d", stored)]


def three_names(root, source) -> Path:
    """Makes a registry of them. The log that has the last two."""
    with AdapterRegistry(root) as registry:
        stored = registry.ingest(source)
        for generation in range(3):
            registry.put(entry(f"n{generation}", stored, generation))
    (log,) = root.glob("registry.log.*")
    return log


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_line_that_a_crash_cut_off_is_no_change(tmp_path, source, cut):
    root = tmp_path / "state"
    log = three_names(root, source)
    log.write_bytes(log.read_bytes()[:-cut])
    for _ in range(2):
        with AdapterRegistry(root) as registry:
            assert [known.name for known in registry.names()] == ["n0", "n1"]
    with AdapterRegistry(root) as registry:
        registry.put(replace(registry.names()[0], name="n3"))
    with AdapterRegistry(root) as registry:
        assert [known.name for known in registry.names()] == ["n0", "n1", "n3"]


def test_a_log_that_was_damaged_before_its_end_is_said(tmp_path, source):
    root = tmp_path / "state"
    log = three_names(root, source)
    log.write_bytes(b"x" + log.read_bytes()[1:])
    with pytest.raises(ConfigError, match=r"registry\.json"):
        AdapterRegistry(root)


def test_thousands_of_names_cost_as_much_as_thousands_of_changes(tmp_path, source, monkeypatch):
    """What is written and synced for a change does not grow with the names that there are, and they all come back."""
    count, root = 5_000, tmp_path / "state"
    synced: list[int] = []
    written: list[int] = []
    append, write_file = Journal._append, journal.write_file

    def counted_append(self, line):
        written.append(len(line))
        append(self, line)

    def counted_write(folder, name, data):
        written.append(len(data))
        write_file(folder, name, data)

    with AdapterRegistry(root) as registry:
        stored = registry.ingest(source)
        monkeypatch.setattr(os, "fsync", synced.append)
        monkeypatch.setattr(Journal, "_append", counted_append)
        monkeypatch.setattr(journal, "write_file", counted_write)
        for i in range(count):
            registry.put(entry(f"team/{i}", stored, i, base="0" * 64))
        before = registry.names()
    logs = list(root.glob("registry.log.*"))
    whole = (root / "registry.json").stat().st_size + sum(log.stat().st_size for log in logs)
    assert len(logs) == 1 and len(synced) < 1.1 * count and sum(written) < 3 * whole
    with AdapterRegistry(root) as registry:
        assert registry.names() == before and len(before) == count


def test_the_card_of_an_adapter_comes_back(tmp_path, source):
    info = AdapterInfo(
        AdapterKey("a", 1), "d", "tucka", 2, 3, 2, 2, 16.0, ("q_proj",), 4, "layers.0", "prefix", 9, None, 64
    )
    with AdapterRegistry(tmp_path) as registry:
        stored = registry.ingest(source)
        told = replace(entry("a", stored), keep_resident=True, info=info)
        registry.put(told)
    with AdapterRegistry(tmp_path) as registry:
        assert registry.names() == [told]
    text = (tmp_path / "registry.json").read_text()
    (tmp_path / "registry.json").write_text(text.replace('"kind"', '"another"'))  # as another version has it
    with AdapterRegistry(tmp_path) as registry:
        assert registry.names() == [replace(told, info=None)]


def test_one_copy_is_discarded_when_no_name_has_it(registry, tmp_path, base):
    one, two = (registry.ingest(put(tmp_path / str(i), tucka_config(alpha=i), tucka_tensors(base))) for i in range(2))
    registry.put(entry("a", one))
    registry.put(entry("b", one))
    for item in (one, two):
        registry.discard(item.blob)  # not before it is released
        registry.release(item)
    registry.put(entry("a", two))
    registry.discard(one.blob)
    assert registry.has(one.blob) and registry.has(two.blob)
    registry.remove("b")
    registry.discard(one.blob)
    registry.discard(two.blob)
    assert not registry.has(one.blob) and registry.has(two.blob)


def fill_disk(monkeypatch) -> None:
    """From now on nothing that is written reaches the disk."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)


@pytest.mark.parametrize("small", [True, False])
def test_what_is_here_already_needs_no_room(registry, source, tmp_path, base, monkeypatch, small):
    """Nor is anything of it written, where it is small."""
    monkeypatch.setattr(blobs, "SMALL_BYTES", 2**20 if small else 0)
    stored = registry.ingest(source)
    if small:
        with monkeypatch.context() as patched:
            patched.setattr(blobs.tempfile, "mkdtemp", None)
            assert registry.ingest(source) == stored
    fill_disk(monkeypatch)
    assert registry.ingest(source) == stored
    other = put(tmp_path / "other", tucka_config(alpha=3), tucka_tensors(base))
    with pytest.raises(StorageError, match="No space left on device"):
        registry.ingest(other)
    assert os.listdir(stored.folder.parent) == [stored.blob]


def test_a_full_disk_gives_room_back(registry, source, monkeypatch):
    stored = registry.ingest(source)
    registry.release(stored)
    fill_disk(monkeypatch)
    monkeypatch.setattr(os, "mkdir", os.fsync)
    registry.collect()
    assert os.listdir(stored.folder.parent) == []


@pytest.mark.parametrize("file", [CONFIG_NAME, WEIGHTS_NAME, TRAINING_NAME])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_a_damaged_copy_is_found_and_replaced(registry, source, base, file, how):
    (source / TRAINING_NAME).write_text('{"route": "batch"}')
    stored = registry.ingest(source)
    copy = stored.folder / file
    whole = copy.read_bytes()
    if how == "gone":
        copy.unlink()
    else:  # the last byte of JSON is a bracket: one bit makes it something else
        copy.write_bytes(whole[:-1] if how == "cut" else whole[:-1] + bytes([whole[-1] ^ 4]))
    with pytest.raises((StorageError, InvalidAdapterError)):
        read_adapter(stored.folder, base, stored.blob)
    assert registry.ingest(source) == stored
    assert copy.read_bytes() == whole
    assert read_adapter(stored.folder, base, stored.blob).digest == stored.digest
    assert os.listdir(stored.folder.parent) == [stored.blob]


def test_a_flipped_bit_of_a_weight_is_a_fault_of_the_disk(registry, source, base):
    stored = registry.ingest(source)
    weights = stored.folder / WEIGHTS_NAME
    data = bytearray(weights.read_bytes())
    data[-4] ^= 1  # the lowest bit of a float
    weights.write_bytes(data)
    read_adapter(stored.folder, base)  # it is an adapter, but another one
    with pytest.raises(StorageError, match="damaged"):
        read_adapter(stored.folder, base, stored.blob)


@pytest.mark.parametrize("temporary", [False, True])
def test_a_root_that_a_cleaner_removed_is_made_again(tmp_path, source, base, monkeypatch, temporary):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    root = tmp_path / "state"
    with AdapterRegistry(None if temporary else root) as registry:
        stored = registry.ingest(source)
        registry.put(entry("a", stored))
        shutil.rmtree(registry.root)
        with pytest.raises(StorageError, match="gone"):
            registry.put(entry("b", stored))
        assert [known.name for known in registry.names()] == ["a"]
        again = registry.ingest(source)
        registry.put(entry("b", again, 2))
        assert again.blob == stored.blob and registry.folder(stored.blob) == again.folder
        assert read_adapter(again.folder, base, again.blob).digest == stored.digest
        if temporary:
            assert registry.root.stat().st_mode & 0o077 == 0
        else:
            with pytest.raises(ConfigError, match="in use by another server"):
                AdapterRegistry(root)
    if not temporary:
        with AdapterRegistry(root) as registry:
            assert [known.name for known in registry.names()] == ["a", "b"]


def test_a_root_without_names_that_a_cleaner_removed_is_made_again(tmp_path, source):
    """A log that is open and has no file any more takes what is written to it, and keeps none."""
    root = tmp_path / "state"
    with AdapterRegistry(root) as registry:
        registry.put(entry("a", registry.ingest(source)))
        registry.remove("a")
        shutil.rmtree(root)
        registry.put_alias(Alias("b", {"a": 1}))
    with AdapterRegistry(root) as registry:
        assert [alias.name for alias in registry.aliases()] == ["b"]


def test_a_root_that_another_server_made_again_is_left_to_it(tmp_path, source):
    root = tmp_path / "state"
    with AdapterRegistry(root) as registry:
        shutil.rmtree(root)
        with AdapterRegistry(root), pytest.raises(StorageError, match="another server"):
            registry.ingest(source)


def test_no_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"TMPDIR.*--state-dir"):
        AdapterRegistry(None)


def test_a_temporary_root_goes(source):
    with AdapterRegistry(None) as registry:
        registry.ingest(source)
        root = registry.root
        assert root.stat().st_mode & 0o077 == 0
    assert not root.exists()


def test_what_a_killed_server_left_goes_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    AdapterRegistry(tmp_path / "tucka-state").close()  # somebody's --state-dir
    (tmp_path / "tucka-file").touch()
    code = f"""
import os, tempfile
tempfile.tempdir = {str(tmp_path)!r}
from tucka_runtime.adapters.journal import Journal
from tucka_runtime.adapters.registry import AdapterRegistry
registry = AdapterRegistry(None)
os.kill(os.getpid(), 9)
"""
    with AdapterRegistry(None) as running:
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
        assert len(list(tmp_path.glob("tucka-*"))) == 4
        with AdapterRegistry(None) as next_one:
            kept = {tmp_path / "tucka-state", tmp_path / "tucka-file", running.root, next_one.root}
            assert set(tmp_path.glob("tucka-*")) == kept


def test_one_server_per_root(tmp_path):
    with AdapterRegistry(tmp_path), pytest.raises(ConfigError, match="in use by another server"):
        AdapterRegistry(tmp_path)
    AdapterRegistry(tmp_path).close()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"adapters": 1}', '{"adapters": ["x"]}', '{"adapters": [{"name": "a"}]}', "\xff"]
)
def test_a_registry_that_cannot_be_read_is_said(tmp_path, text):
    (tmp_path / "registry.json").write_bytes(text.encode("latin-1"))
    for _ in range(2):  # the lock is not kept
        with pytest.raises(ConfigError, match=r"registry\.json"):
            AdapterRegistry(tmp_path)


GOOD_ENTRY = {
    "name": "a",
    "digest": "0" * 64,
    "blob": "0" * 64,
    "generation": 1,
    "source": "x",
    "pinned_route": None,
    "base_fingerprint": "f",
}


@pytest.mark.parametrize(
    "changes",
    [
        {"generation": None},
        {"generation": "1"},
        {"generation": -1},
        {"name": 5},
        {"name": "a b"},
        {"digest": "1" * 64},
        {"blob": "../../etc"},
        {"source": None},
        {"pinned_route": 3},
        {"pinned_route": {"group": 0, "weights": [None]}},
        {"base_fingerprint": None},
        {"keep_resident": 1},
    ],
)
def test_every_field_of_an_entry_is_checked(tmp_path, changes):
    (tmp_path / "registry.json").write_text(json.dumps({"version": 1, "adapters": [GOOD_ENTRY | changes]}))
    with pytest.raises(ConfigError, match=r"registry\.json"):
        AdapterRegistry(tmp_path)


def test_what_newer_versions_add_is_left_out_and_newer_formats_are_named(tmp_path):
    file = tmp_path / "registry.json"
    file.write_text(json.dumps({"version": 1, "more": 1, "adapters": [GOOD_ENTRY | {"newer": {"x": 1}}]}))
    with AdapterRegistry(tmp_path) as registry:
        assert [known.name for known in registry.names()] == ["a"]
    file.write_text(json.dumps({"version": 4, "adapters": {}}))
    with pytest.raises(ConfigError, match="newer version"):
        AdapterRegistry(tmp_path)


def test_root_that_cannot_be_used(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        AdapterRegistry(tmp_path / "file")


# --- versions and aliases ---


def versions(registry, tmp_path, base, count: int, keep: int) -> list[RegistryEntry]:
    """What the name "a" stood for one after the other, each with what is kept of those before."""
    made: list[RegistryEntry] = []
    for i in range(count):
        stored = registry.ingest(put(tmp_path / f"v{i}", tucka_config(alpha=i), tucka_tensors(base)))
        last = made[-1:] and [made[-1], *made[-1].versions]
        made.append(entry("a", stored, i).after(last, keep))
        registry.put(made[-1])
        registry.release(stored)
        registry.collect()
    return made


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_contents_are_kept_and_no_more(tmp_path, base, keep):
    root = tmp_path / "state"
    with AdapterRegistry(root) as registry:
        made = versions(registry, tmp_path, base, 5, keep)
        assert [v.generation for v in made[-1].versions] == [3, 2, 1, 0][: keep - 1]
        assert {blob.name for blob in (root / "blobs").iterdir()} == set(made[-1].blobs) and len(made[-1].blobs) == keep
    with AdapterRegistry(root) as registry:
        (back,) = registry.names()
        assert back == made[-1]
        for version in back.versions:
            assert split_version(version.name) == ("a", version.digest[:12]) and version.owner == "a"
        registry.discard(back.blobs[-1])
        assert registry.has(back.blobs[-1])
        registry.remove("a")
        registry.collect()
        assert not list((root / "blobs").iterdir())


def test_a_content_is_there_once(registry, tmp_path, base):
    """The one that stands, or the newest of those before."""
    first, second = versions(registry, tmp_path, base, 2, 3)
    again = replace(first, generation=2).after([second, *second.versions], 3)
    assert [v.digest for v in again.versions] == [second.digest]


def test_aliases_come_back_and_share_the_table(tmp_path, source):
    root = tmp_path / "state"
    alias = Alias("b", (("a", 90), ("a@0123456789ab", 10)))
    with AdapterRegistry(root) as registry:
        registry.put(entry("a", registry.ingest(source)))
        registry.put_alias(Alias("gone", (("a", 1),)))
        registry.put_alias(Alias("b", (("a", 1),)))
        registry.put_alias(alias)
        registry.remove("gone")
    for _ in range(2):
        with AdapterRegistry(root) as registry:
            assert registry.aliases() == [alias] and [known.name for known in registry.names()] == ["a"]


@pytest.mark.parametrize(
    "row",
    [
        {"name": "a", "targets": {}},
        {"name": "a", "targets": {"b": 0}},
        {"name": "a", "targets": {"b": True}},
        {"name": "a", "targets": {"b c": 1}},
        {"name": "a", "targets": ["b"]},
        {"name": 5, "targets": {"b": 1}},
        GOOD_ENTRY | {"versions": 3},
        GOOD_ENTRY | {"versions": [GOOD_ENTRY]},
        GOOD_ENTRY | {"versions": [GOOD_ENTRY | {"name": "a@" + "1" * 12}]},
        GOOD_ENTRY | {"versions": [GOOD_ENTRY | {"name": "a@" + "0" * 12, "generation": -1}]},
    ],
)
def test_every_field_of_a_version_and_an_alias_is_checked(tmp_path, row):
    (tmp_path / "registry.json").write_text(json.dumps({"version": 3, "adapters": [row]}))
    with pytest.raises(ConfigError, match=r"registry\.json"):
        AdapterRegistry(tmp_path)


# --- crashes ---


@pytest.fixture
def sources(tmp_path, base) -> Path:
    folder = tmp_path / "sources"
    folder.mkdir()
    for i in range(4):
        put(folder / str(i), tucka_config(alpha=i), tucka_tensors(base))
    return folder


def check_after_crash(root: Path, said: list[str], base) -> None:
    """What was said to be done is done, or the one change that was begun after it, and nothing else; every name and
    version has its whole content, and nothing half is there."""
    states = [json.loads(line) for line in said if line != "done"]
    allowed = states[-2:] if said and said[-1] != "done" else states[-1:]
    with AdapterRegistry(root) as registry:
        if allowed:
            assert state(registry) in allowed
        for entry in registry.names():
            for known in (entry, *entry.versions):
                assert read_adapter(registry.folder(known.blob), base).digest == known.digest
        for blob in (root / "blobs").iterdir():
            assert read_adapter(blob, base).digest == blob.name


def test_every_step_may_be_the_last(tmp_path, sources, base):
    """Each of the calls that touch the disk, from a registry's first to beyond the first removal of a name; then others
    in what some of those crashes left."""
    for counts in (range(270), range(0, 270, 10)):
        command = [sys.executable, CHILD, tmp_path, sources, *map(str, counts)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        for count in counts:
            check_after_crash(tmp_path / f"{count}", (tmp_path / f"{count}.said").read_text().splitlines(), base)
    states = [json.loads(line) for line in (tmp_path / "269.said").read_text().splitlines() if line != "done"]
    assert any("name" in before and "name" not in after for before, after in itertools.pairwise(states))


def test_kill_9_at_any_moment(tmp_path, sources, base):
    root = tmp_path / "state"
    dice = random.Random(0)
    for _ in range(8):
        (root / "registry.json").unlink(missing_ok=True)
        with subprocess.Popen([sys.executable, CHILD, root, sources], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            said = [child.stdout.readline()]
            time.sleep(dice.uniform(0, 0.1))
            child.kill()
            said += child.stdout.readlines()
        check_after_crash(root, [line.rstrip("\n") for line in said if line.endswith("\n")], base)


# --- paths and names from outside ---


@pytest.fixture
def roots(tmp_path) -> list[Path]:
    for folder in ("one/a", "two/b/c", "outside/x"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "one" / "file").touch()
    (tmp_path / "one" / "out").symlink_to(tmp_path / "outside" / "x")
    (tmp_path / "one" / "in").symlink_to(tmp_path / "one" / "a")
    (tmp_path / "one" / "loop").symlink_to(tmp_path / "one" / "loop")
    (tmp_path / "linked").symlink_to(tmp_path / "two")
    return [tmp_path / "one", tmp_path / "linked"]


def test_paths_below_the_roots(tmp_path, roots):
    one, two = tmp_path / "one" / "a", tmp_path / "two" / "b" / "c"
    for path in ("a", "a/", "./a", "in", str(one)):
        assert resolve_source(path, roots) == one
    for path in ("b/c", str(two), str(tmp_path / "linked" / "b" / "c")):
        assert resolve_source(path, roots) == two


@pytest.mark.parametrize(
    "path",
    [
        "",
        "a\0",
        "a\nb",
        "\x1b[31m",
        "\ud800",
        "x" * 5000,
        "../outside/x",
        "a/../../outside/x",
        "..",
        "/etc",
        "/",
        "{tmp}/outside/x",
        "{tmp}/one/../outside/x",
        "out",
        "{tmp}/one/out",
        "loop",
        "file",
        "nowhere",
        "x" * 300,
        "http://127.0.0.1/a",
        "https://example.com/a",
        "file:///etc",
        "s3://bucket/a",
        "HTTP:a",
        "//host/share",
        "\\\\host\\share",
        "a\\b",
        "169.254.169.254/latest/meta-data",
        "169.254.169.254:80/latest",
        "[fe80::1]/a",
        "[fe80::1%eth0]:80/a",
        "fe80::1/a",
        "::1",
        "C:/a",
    ],
)
def test_paths_that_are_refused(tmp_path, roots, path):
    path = path.replace("{tmp}", str(tmp_path))
    with pytest.raises(InvalidAdapterError) as error:
        resolve_source(path, roots)
    assert str(tmp_path) not in error.value.message
    assert len(path) < 4 or path not in error.value.message


def test_a_relative_path_starts_below_the_root(tmp_path):
    (tmp_path / "ad" / "law").mkdir(parents=True)
    assert resolve_source("law", [tmp_path / "ad"]).name == "law"
    with pytest.raises(InvalidAdapterError, match="looked for below each --adapter-root"):
        resolve_source("ad/law", [tmp_path / "ad"])


def test_hosts_are_refused_before_the_disk_is_touched(monkeypatch):
    def touched(*_, **__):
        raise AssertionError("the disk was touched")

    monkeypatch.setattr(os, "stat", touched)
    monkeypatch.setattr(os, "lstat", touched)
    monkeypatch.setattr(Path, "resolve", touched)
    for path in ("http://a/b", "//host/a", "\\\\host\\a", "169.254.169.254/a", "[fe80::1]/a", "../a", "a\0"):
        with pytest.raises(InvalidAdapterError):
            resolve_source(path, [Path("/somewhere")])


def test_no_roots_no_paths(source):
    with pytest.raises(InvalidAdapterError, match="started without an --adapter-root"):
        resolve_source(str(source), [])


@pytest.mark.parametrize("name", ["a", "org/name", "v1.2:latest", "a@b", "x" * 128, "..."])
def test_names_that_are_allowed(name):
    check_name(name)


@pytest.mark.parametrize(
    "name", ["", "x" * 129, ".", "..", "a/../b", "a//b", "/a", "a/", "a b", "a\n", "é", "a\0", "%2e"]
)
def test_names_that_are_refused(name):
    with pytest.raises(InvalidRequestError):
        check_name(name)


@settings(max_examples=200, deadline=2000)
@given(st.text(max_size=40), st.booleans())
def test_any_path_stays_below_the_roots(text, absolute):
    root = Path(__file__).parent.resolve()
    try:
        folder = resolve_source(f"{root}/{text}" if absolute else text, [root])
    except InvalidAdapterError:
        return
    assert folder.is_relative_to(root)


@pytest.mark.parametrize(
    ("text", "told"),
    [(b'\xef\xbb\xbf{"steps": 3}', {"steps": 3}), (b"[1]", None), (b'{"steps": [%d]}' % 2**70, None), (b"{", None)],
)
def test_training_is_told_as_it_is_read(registry, source, base, text, told):
    """By one rule, on a card and by the engine. What no message can carry is not told, and no reason not to load."""
    (source / "training.json").write_bytes(text)
    assert read_adapter(source, base).training == told
    assert registry.training(registry.ingest(source).blob) == told


def test_a_copy_that_could_not_be_looked_at_is_let_go(registry, source, monkeypatch):
    stored = registry.ingest(source)
    registry.release(stored)

    def full(*_):
        raise StorageError("Too many open files.")

    monkeypatch.setattr(registry._blobs, "_intact", full)
    for take in (registry._blobs.copy, registry._blobs.find):
        with pytest.raises(StorageError):
            take(source)
        assert not registry._blobs._held
