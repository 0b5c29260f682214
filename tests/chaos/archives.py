"""Archives of an adapter, made and mutated."""

import functools
import gzip
import io
import random
import tarfile
from collections.abc import Iterable

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
