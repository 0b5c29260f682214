"""Key files with keys in them, and how they are sent."""

from pathlib import Path

import httpx

from tests.support.servers import Server
from tucka_runtime.server.http.key_file import KeyRecord, change_key_file, digest_of, new_key

PROMPT = list(range(10, 20))


def write_keys(path: Path, **records: dict[str, object]) -> dict[str, str]:
    """Adds a key for each name, with what the record says of it; the keys by name, `_` in it for `-`."""
    keys, made = {}, []
    for name, settings in records.items():
        key_id, key = new_key()
        keys[name] = key
        made.append(KeyRecord(name.replace("_", "-"), key_id, digest_of(key.encode()), **settings))  # type: ignore[arg-type]
    change_key_file(path, lambda before: (*before, *made))
    return keys


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def ask(server: Server, key: str, max_tokens: int = 5, **more: object) -> httpx.Response:
    """A completion of ten prompt tokens."""
    body = {"model": "base", "prompt": PROMPT, "max_tokens": max_tokens, "ignore_eos": True} | more
    return server.post("/v1/completions", body, headers=bearer(key))
