"""Key files with keys in them, and how they are sent."""

from pathlib import Path

from tucka_runtime.server.http.key_file import KeyRecord, change_key_file, digest_of, new_key


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
