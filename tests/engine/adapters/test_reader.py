"""The process that adapters are read in: what comes through is what is read here, however it ends meanwhile."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.adapter_files import put
from tests.support.banks import save_bank
from tests.support.driving import build, save_lora, save_model, save_tucka
from tests.support.processes import PATIENCE
from tucka_runtime.adapters import reader_process
from tucka_runtime.adapters.files import WEIGHTS_NAME
from tucka_runtime.adapters.format import Adapter, read_adapter
from tucka_runtime.adapters.manifest import PREFIX
from tucka_runtime.embedded import FOLDER
from tucka_runtime.engine.adapters import reader as reader_module
from tucka_runtime.engine.adapters.reader import AdapterReader
from tucka_runtime.errors import AdapterCapacityError, InvalidAdapterError, TuckaError
from tucka_runtime.messages import BaseLayout

ROOM = 1 << 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder, and adapters of every kind for it."""
    folder = tmp_path_factory.mktemp("read")
    save_model(folder / "model")
    layout = build(folder / "model").layout
    save_tucka(folder / "tucka", layout)
    save_lora(folder / "lora", layout)
    save_bank(folder / "bank", layout, "diagonal")
    return folder


@pytest.fixture(scope="module")
def layout(folder: Path) -> BaseLayout:
    return build(folder / "model").layout


@pytest.fixture(scope="module")
def reader() -> Iterator[AdapterReader]:
    """One for all tests, as the server has it."""
    reader = AdapterReader("text")
    yield reader
    reader.close()


def plain(value: Any) -> Any:
    """What can be compared."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.tolist()
    if is_dataclass(value):
        return type(value), [plain(getattr(value, field.name)) for field in fields(value)]
    if isinstance(value, dict):
        return [(key, plain(item)) for key, item in value.items()]
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def shared_memory() -> int:
    """Mappings and descriptors of adapters in this process."""
    files = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sum("memfd:adapter" in name for name in [*files, *Path("/proc/self/maps").read_text().splitlines()])


@pytest.mark.parametrize("kind", ["tucka", "lora", "bank"])
def test_what_comes_through_is_what_is_read_here(
    reader: AdapterReader, folder: Path, layout: BaseLayout, kind: str
) -> None:
    assert plain(reader.read(folder / kind, layout, None, ROOM)()) == plain(read_adapter(folder / kind, layout))


def test_rows_of_tokens_come_through(reader: AdapterReader, layout: BaseLayout, tmp_path: Path) -> None:
    """Their ids are no numbers of the file, and their rows are put in order."""
    width = layout.parameters[f"{layout.embed}.weight"][1]
    tensors = {f"{PREFIX}{layout.embed}.token_adapter.trainable_tokens_delta": torch.rand(3, width)}
    for path, (d_in, d_out) in layout.linears.items():
        if path.endswith("q_proj"):
            tensors[f"{PREFIX}{path}.lora_A.weight"] = torch.rand(2, d_in)
            tensors[f"{PREFIX}{path}.lora_B.weight"] = torch.rand(d_out, 2)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    put(tmp_path, config | {"trainable_token_indices": [9, 4, 7]}, tensors)
    found = reader.read(tmp_path, layout, None, ROOM)()
    assert found.tokens and plain(found) == plain(read_adapter(tmp_path, layout))


@pytest.mark.parametrize("what", ["nowhere", "cut", "nan", "config", "blob"])
def test_errors_are_the_same_to_the_letter(
    reader: AdapterReader, folder: Path, layout: BaseLayout, tmp_path: Path, what: str
) -> None:
    broken, blob = save_tucka(tmp_path / "broken", layout), None
    weights = bytearray((broken / WEIGHTS_NAME).read_bytes())
    match what:
        case "nowhere":
            broken = tmp_path / "nowhere"
        case "cut":
            (broken / WEIGHTS_NAME).write_bytes(weights[:-4])
        case "nan":
            weights[-4:] = b"\xff" * 4
            (broken / WEIGHTS_NAME).write_bytes(weights)
        case "config":
            (broken / "adapter_config.json").write_text('{"peft_type": "LOHA"}')
        case "blob":
            blob = "another"
    with pytest.raises(TuckaError) as here:
        read_adapter(broken, layout, blob)
    with pytest.raises(TuckaError) as there:
        reader.read(broken, layout, blob, ROOM)
    assert type(there.value) is type(here.value)
    assert (there.value.message, there.value.param) == (here.value.message, here.value.param)


def test_what_there_is_no_room_for_is_not_read(reader: AdapterReader, folder: Path, layout: BaseLayout) -> None:
    with pytest.raises(AdapterCapacityError, match="--kv-cache-tokens") as refused:
        reader.read(folder / "tucka", layout, None, 1000)
    size = refused.value.missing + 1000
    assert reader.read(folder / "tucka", layout, None, size)


def test_it_gives_its_core_away_while_it_reads() -> None:
    """The kernel would let it go on for a tick of 4 ms, whoever else wants the core."""
    layout, reader = build(FOLDER / "base", max_model_len=512).layout, AdapterReader("text")

    def rests() -> int:
        status = Path(f"/proc/{reader.pid}/status").read_text().split()
        return int(status[status.index("voluntary_ctxt_switches:") + 1])

    try:
        reader.read(FOLDER / "adapters" / "words", layout, None, ROOM)
        before, begin = rests(), time.monotonic()
        for _ in range(20):
            reader.read(FOLDER / "adapters" / "words", layout, None, ROOM)
        took = time.monotonic() - begin
        assert rests() - before > 0.25 * took / reader_process.WORK_SECONDS
    finally:
        reader.close()


def at_rest(reader: AdapterReader, folder: Path, layout: BaseLayout) -> None:
    """Waits until the process is done with its last answer, which it lets go of once it is sent: it answers another
    question then, here one that takes no memory."""
    with pytest.raises(InvalidAdapterError):
        reader.read(folder / "missing", layout, None, ROOM)


def test_memory_comes_back(reader: AdapterReader, folder: Path, layout: BaseLayout) -> None:
    """Here with the last tensor, there at once: no descriptor and no mapping is left after 50 loads."""
    adapter: Adapter | None = reader.read(folder / "tucka", layout, None, ROOM)()
    assert shared_memory()
    there = Path(f"/proc/{reader.pid}")
    at_rest(reader, folder, layout)
    held = len(os.listdir(there / "fd"))
    for _ in range(50):
        adapter = reader.read(folder / "lora", layout, None, ROOM)()
    assert "memfd:adapter" in Path("/proc/self/maps").read_text()
    del adapter
    at_rest(reader, folder, layout)
    assert not shared_memory()
    assert len(os.listdir(there / "fd")) == held
    assert "memfd:adapter" not in (there / "maps").read_text()


def test_a_reader_killed_in_the_middle_of_a_load(reader: AdapterReader, folder: Path, layout: BaseLayout) -> None:
    """Another one reads it: nobody notices."""
    reader.read(folder / "tucka", layout, None, ROOM)
    pid = reader.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)  # so that the question is under way, and not answered, when it is killed
    killing = threading.Timer(0.3, os.kill, (pid, signal.SIGKILL))
    killing.start()
    assert reader.read(folder / "tucka", layout, None, ROOM)().digest
    killing.join()
    assert reader.pid != pid


def test_a_reader_that_hangs_costs_one_load(
    reader: AdapterReader, folder: Path, layout: BaseLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader.read(folder / "tucka", layout, None, ROOM)
    pid = reader.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    with monkeypatch.context() as patched:
        patched.setattr(reader_module, "READ_SECONDS", 0.3)
        begin = time.monotonic()
        with pytest.raises(TuckaError, match="does not answer"):
            reader.read(folder / "tucka", layout, None, ROOM)
        assert time.monotonic() - begin < PATIENCE
    assert reader.pid is None and not Path(f"/proc/{pid}").exists()
    assert reader.read(folder / "tucka", layout, None, ROOM)().digest
