"""Archives of an adapter, mutated: `python -m tests.chaos.archives --count N`.

Right is that each is refused by name or unpacks to files that an adapter has, within its folder. Anything else that is
raised ends the run with the number of the archive.
"""

import argparse
import functools
import gzip
import io
import random
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tucka_runtime.adapters.archive import unpack
from tucka_runtime.adapters.files import FILE_LIMITS
from tucka_runtime.errors import InvalidAdapterError

CONFIG = b'{"peft_type": "LORA"}'
WEIGHTS = bytes(range(256)) * 20


def made(members: Iterable[tuple[str, bytes | None]], form: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar of (name, content); a folder has None."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.type, info.size = (tarfile.DIRTYPE, 0) if data is None else (tarfile.REGTYPE, len(data))
            tar.addfile(info, None if data is None else io.BytesIO(data))
    return file.getvalue()


@functools.cache
def seeds() -> list[bytes]:
    members = [("law/", None), ("law/" + "long" * 15 + "/" + "long" * 15, b"x"), ("law/adapter_config.json", CONFIG)]
    members.append(("law/adapter_model.safetensors", WEIGHTS))
    return [made(members, form) for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Bytes of headers changed, with their checksums made right in half of the cases, blocks moved, cut, packed."""
    made = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        block = 512 * chance.randrange(max(len(made) // 512, 1))
        place = block + chance.choice((chance.randrange(512), 124 + chance.randrange(12), 156, 257, 345))
        kind = chance.randrange(6)
        if kind < 3:
            made[place : place + 1] = bytes([chance.choice((0, 0x80, 0xFF, 0x2D, 0x78, 0x67, 0x4C, 0x53, 0x35, 0x37))])
        elif kind == 3:
            made[block : block + 512] = made[: chance.choice((512, 1024))]
        elif kind == 4:
            del made[chance.randrange(len(made) + 1) :]
        if chance.random() < 0.5 and len(made) >= block + 512:
            header = made[block : block + 512]
            total = sum(header[:148]) + 8 * 32 + sum(header[156:])
            made[block + 148 : block + 156] = b"%06o\0 " % total
    packed = bytearray(gzip.compress(bytes(made), 1)) if chance.random() < 0.3 else made
    if packed is not made and chance.random() < 0.5 and packed:
        packed[chance.randrange(len(packed))] ^= 1 << chance.randrange(8)
    return bytes(packed)


def trial(folder: Path, count: int, chance: random.Random) -> Counter[str]:
    """Unpacks `count` mutated archives; how many were unpacked, and how many refused."""
    counts: Counter[str] = Counter()
    for number in range(count):
        data = mutated(chance.choice(seeds()), chance)
        archive, target = folder / "archive", folder / f"{number}"
        archive.write_bytes(data)
        target.mkdir()
        try:
            unpack(archive, target)
            counts["unpacked"] += 1
        except InvalidAdapterError:
            counts["refused"] += 1
        except BaseException:
            print(f"archive {number} fails", file=sys.stderr)
            raise
        assert {path.name for path in target.iterdir()} <= FILE_LIMITS.keys()
        for path in target.iterdir():
            path.unlink()
        target.rmdir()
        assert {path.name for path in folder.iterdir()} == {"archive"}
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(dict(trial(Path(folder), flags.count, random.Random(flags.seed))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
