"""`tucka adapters`: lists, loads and unloads a server's adapters."""

import json
import urllib.parse

from tucka_runtime.client import Client


def list_adapters(client: Client) -> int:
    cards = json.loads(client.get("/v1/adapters"))["data"]
    for card in cards:
        detail = card["tucka"]
        shape = " ".join(f"{name}={detail[name]}" for name in "rktp" if detail[name] is not None)
        print(f"{card['id']}  {detail['kind']}  {shape}  generation {detail['generation']}  {detail['digest'][:12]}")
    if not cards:
        print("no adapters are loaded")
    return 0


def load_adapter(client: Client, name: str, path: str, replace: bool) -> int:
    card = json.loads(client.post("/v1/adapters", {"name": name, "path": path, "load_inplace": replace}))
    print(f"{card['id']} is loaded: generation {card['tucka']['generation']}, digest {card['tucka']['digest'][:12]}")
    return 0


def unload_adapter(client: Client, name: str) -> int:
    client.delete(f"/v1/adapters/{urllib.parse.quote(name)}")
    print(f"{name} is unloaded")
    return 0
