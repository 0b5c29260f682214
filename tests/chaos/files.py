"""Files that nobody vouches for, mutated: `python -m tests.chaos.files --count N`.

In equal parts adapters' configurations, their weights, archives of adapters, and indices of bases in shards. Right is
that each is refused by name, with a status of 4xx, or loads; archives unpack to files that an adapter has. A fault is
anything else that is raised, a file that is opened outside of the folder, a module that is imported, a process or a
connection that is begun: Python's audit events tell of those. A file that is a fault is kept.
"""

import argparse
import json
import logging
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tests.chaos import archives
from tests.chaos.mutations import mutated
from tests.support.banks import save_bank
from tests.support.driving import build, save_lora, save_model, save_tucka
from tucka_runtime.adapters import targets
from tucka_runtime.adapters.archive import unpack
from tucka_runtime.adapters.files import CONFIG_NAME, FILE_LIMITS, TRAINING_NAME, WEIGHTS_NAME
from tucka_runtime.engine.engine import Engine
from tucka_runtime.errors import ModelLoadError, TuckaError
from tucka_runtime.messages import AdapterKey
from tucka_runtime.models.weights import fingerprint, load_weights

Read = Callable[[], None]
BEGUN = ("subprocess.", "os.exec", "os.system", "os.posix_spawn", "os.fork", "pickle.", "socket.")
OWN = ("/proc/self/", "/proc/meminfo", "/sys/fs/cgroup", "/dev/null", sys.prefix)
"""What a load opens besides: how much memory there is, and for the child that matches regular expressions."""
KEY = AdapterKey("mutated", 1)
INDEX_NAME = "model.safetensors.index.json"
HOSTILE: dict[str, tuple[Any, ...]] = {
    "auto_map": ({"AutoModel": "modeling.Model"}, None),
    "auto_mapping": ({"base_model_class": "os", "parent_library": "subprocess"}, ["antigravity"]),
    "trust_remote_code": (True,),
    "base_model_name_or_path": ("../../etc/passwd", "https://169.254.169.254/", "x\0y"),
    "target_modules": ("all-linear", ".*", "(a+)+$", ["../q_proj"], ["q_proj"] * 5000, {"q_proj": 1}),
    "modules_to_save": (["lm_head"], ["antigravity"], [""], "lm_head"),
    "r": (True, "8", 0, -1, 10**9, 0.5, 2**63, None),
    "lora_alpha": (float("nan"), float("inf"), -1, "16", 10**30),
    "rank_pattern": ({"q_proj": 9}, {"(": 2}, {"q_proj": 10**9}),
    "init_lora_weights": ("pissa", "os.system", False),
    "bias": ("lora_only", "all", 3),
    "use_dora": (True,),
    "trainable_token_indices": ([0, 96], [97], {"embed_tokens": [-1]}),
    "peft_type": ("LORA", "TUCKA", "TUCKA_BANK", "IA3", None),
    "members": (["../x"], ["a"] * 9),
    "router_name": ("os", "model.layers.1.self_attn.v_proj"),
}  # fmt: skip
NAMES = ("../outside.safetensors", "/etc/passwd", "..", ".", "", "config.json", "x" * 300, "a\0b", "\ud800", 7, None)


class Watch:
    """Takes Python's audit events while a file is read. A hook cannot be taken away: it does nothing in between."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.seen: list[str] = []
        self.learn()
        sys.addaudithook(self._hook)

    def learn(self) -> None:
        """What has been imported by now is nothing that a file brings in."""
        self.known = {name.partition(".")[0] for name in sys.modules} | set(sys.stdlib_module_names)

    @contextmanager
    def over(self, folder: Path) -> Iterator[None]:
        """Raises AssertionError after anything that reading this folder must not do."""
        self.seen.clear()
        self.folder = folder
        try:
            yield
        finally:
            self.folder = None
            if self.seen:
                raise AssertionError(self.seen)

    def _hook(self, event: str, given: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event == "open":
            path = str(given[0])
            own = path.startswith(OWN) or isinstance(given[0], int)
            beside = path.startswith("/") and not path.startswith(f"{self.folder}/") and path != str(self.folder)
            if not own and (beside or ".." in path.split("/")):
                self.seen.append(f"open {path}")
        elif event == "import":
            if str(given[0]).partition(".")[0] not in self.known:
                self.seen.append(f"import {given[0]}")
        elif event.startswith(BEGUN) and not any(targets._CHILD in own for own in given if isinstance(own, list)):
            self.seen.append(event)


def scrambled(data: bytes, chance: random.Random) -> bytes:
    """Bytes flipped, put in, taken out, doubled or cut."""
    made = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(made) + 1)
        match chance.randrange(5):
            case 0 | 1 if at < len(made):
                made[at] = chance.choice((0, 0x7F, 0x80, 0xFF, 0x22, 0x7B, 0x5D, chance.randrange(256)))
            case 2:
                made[at:at] = chance.choice((b"\0", b"\xff" * 8, b'"', b"[" * 50, b"\xef\xbb\xbf", b"NaN"))
            case 3:
                del made[at : at + chance.choice((1, 8, 512))]
            case _:
                del made[at:]
    return bytes(made)


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


class Trial:
    """Files of one tiny base and of an adapter of each kind, and a folder for those that are mutated."""

    def __init__(self, root: Path):
        self.root, self.watch = root, Watch()
        base = root / "base"
        save_model(base, max_shard_size="10KB")
        shutil.copy(next(base.glob("*.safetensors")), root / "outside.safetensors")
        self.engine: Engine = build(base, kv_cache_tokens=128)
        layout = self.engine.layout
        made = root / "made"
        self.seeds = [
            save_tucka(made / "tucka", layout),
            save_lora(made / "lora", layout),
            save_lora(made / "dora", layout, dora=True),
            save_bank(made / "bank", layout, "full"),
        ]
        self.base = base
        self.index = json.loads((base / INDEX_NAME).read_text())
        self.folder = root / "mutated"
        self._warm_up()

    def _warm_up(self) -> None:
        """Reads what is right, so that what is imported for it has been."""
        for folder, read in [*((seed, self._load_adapter) for seed in self.seeds), (self.base, self._load_base)]:
            shutil.copytree(folder, self.folder)
            read()
            shutil.rmtree(self.folder)
        self.watch.learn()

    def config(self, chance: random.Random) -> Read:
        """An adapter's configuration, and sometimes the training.json beside it."""
        seed = chance.choice(self.seeds)
        shutil.copytree(seed, self.folder)
        config = mutated(json.loads((seed / CONFIG_NAME).read_text()), chance) if chance.random() < 0.7 else {}
        config = config or json.loads((seed / CONFIG_NAME).read_text())
        for name in chance.sample(list(HOSTILE), chance.choice((0, 0, 1, 2))):
            config[name] = chance.choice(HOSTILE[name])
        data = as_json(config)
        (self.folder / CONFIG_NAME).write_bytes(scrambled(data, chance) if chance.random() < 0.3 else data)
        if chance.random() < 0.2:
            training = {"base_fingerprint": self.engine.info.fingerprint, "route": "prefix", "route_prefix_tokens": 9}
            data = as_json(mutated(training, chance))
            (self.folder / TRAINING_NAME).write_bytes(scrambled(data, chance) if chance.random() < 0.3 else data)
        return self._load_adapter

    def weights(self, chance: random.Random) -> Read:
        """The safetensors file: its header's JSON, the length before it, the bytes behind it, or any of its bytes."""
        seed = chance.choice(self.seeds)
        shutil.copytree(seed, self.folder)
        data = (seed / WEIGHTS_NAME).read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        if chance.random() < 0.6:
            header = as_json(mutated(json.loads(data[8:end]), chance))
            lengths = (0, 1, len(header) - 1, len(header) + 1, 2**63, 2**64 - 1)
            length = len(header) if chance.random() < 0.85 else chance.choice(lengths)
            data = length.to_bytes(8, "little") + header + data[end:]
        else:
            data = scrambled(data, chance) if chance.random() < 0.5 else data[:end] + scrambled(data[end:], chance)
        (self.folder / WEIGHTS_NAME).write_bytes(data)
        return self._load_adapter

    def archive(self, chance: random.Random) -> Read:
        """A tar, packed or not."""
        self.folder.mkdir()
        (self.folder / "archive").write_bytes(archives.mutated(chance.choice(archives.seeds()), chance))
        return self._unpack

    def base_index(self, chance: random.Random) -> Read:
        """Which shard has which of a base's tensors."""
        self.folder.mkdir()
        for path in self.base.iterdir():
            (self.folder / path.name).hardlink_to(path)
        index = json.loads(json.dumps(self.index))
        for _ in range(chance.choice((0, 1, 2))):
            index["weight_map"][chance.choice([*index["weight_map"], "x"])] = chance.choice(NAMES)
        data = as_json(mutated(index, chance) if chance.random() < 0.7 else index)
        (self.folder / INDEX_NAME).unlink()
        (self.folder / INDEX_NAME).write_bytes(scrambled(data, chance) if chance.random() < 0.3 else data)
        return self._load_base

    def _load_adapter(self) -> None:
        self.engine.prepare_adapter(KEY, self.folder)

    def _unpack(self) -> None:
        (target := self.folder / "unpacked").mkdir()
        try:
            unpack(self.folder / "archive", target)
        finally:
            assert {path.name for path in target.iterdir()} <= FILE_LIMITS.keys()
            assert all(path.is_file() and not path.is_symlink() for path in target.iterdir())
            assert {path.name for path in self.folder.iterdir()} == {"archive", "unpacked"}

    def _load_base(self) -> None:
        runner = self.engine.runner
        fingerprint(self.folder)
        load_weights(self.folder, runner.arch, "auto", torch.device("cpu"), runner.ops.linear)

    def run(self, make: Callable[[random.Random], Read], chance: random.Random) -> str:
        """What came of one file. Raises what is a fault, and leaves the file then."""
        shutil.rmtree(self.folder, ignore_errors=True)
        read = make(chance)
        try:
            with self.watch.over(self.folder):
                read()
            return "taken"
        except ModelLoadError:
            if read != self._load_base:  # of the operator's own folder, at the start
                raise
            return "refused"
        except TuckaError as error:
            if error.status >= 500:
                raise
            return "refused"


def trial(root: Path, count: int, seed: int) -> tuple[dict[str, Counter[str]], float]:
    """How many of `count` files of each kind were taken and refused, and the seconds that the slowest of them took."""
    files = Trial(root)
    counts: dict[str, Counter[str]] = {}
    slowest = 0.0
    for make in (files.config, files.weights, files.archive, files.base_index):
        own = counts[make.__name__] = Counter()
        chance = random.Random(f"{seed} {make.__name__}")
        for number in range(count // 4):
            begin = time.monotonic()
            try:
                own[files.run(make, chance)] += 1
            except BaseException:
                kept = Path(tempfile.mkdtemp(prefix="fault-")) / "mutated"
                shutil.copytree(files.folder, kept)
                print(f"{make.__name__} {number} fails; it is kept as {kept}", file=sys.stderr)
                raise
            slowest = max(slowest, time.monotonic() - begin)
    return counts, slowest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    logging.disable(logging.WARNING)  # every adapter that says that it was trained on another base would have a line
    with tempfile.TemporaryDirectory() as root:
        counts, slowest = trial(Path(root), flags.count, flags.seed)
    for kind, own in counts.items():
        print(f"{kind:12} {own['taken']:8} taken {own['refused']:8} refused")
    print(f"the slowest took {slowest:.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
