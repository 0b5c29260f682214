"""`tucka adapters`: lists, loads, uploads and unloads a server's adapters."""

import argparse
import json
import urllib.parse
from pathlib import Path

from tucka_runtime.adapters.files import CONFIG_NAME, FILE_LIMITS
from tucka_runtime.client import KEY_VARIABLES, Client
from tucka_runtime.errors import TuckaError


def add_actions(parser: argparse.ArgumentParser) -> None:
    """Adds the actions of `tucka adapters`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="show the loaded adapters")
    listing.set_defaults(run=lambda flags: list_adapters(_client(flags)))
    load = actions.add_parser("load", help="load an adapter from a folder below the server's --adapter-root")
    load.add_argument("name", help="name for requests")
    load.add_argument("path", help="the adapter's folder, as the server sees it")
    load.add_argument("--replace", action="store_true", help="replace other content of that name")
    load.set_defaults(run=lambda flags: load_adapter(_client(flags), flags.name, flags.path, flags.replace))
    upload = actions.add_parser("upload", help="send an adapter's files to the server, which needs no shared disk")
    upload.add_argument("name", help="name for requests")
    upload.add_argument("folder", type=Path, help="the adapter's folder on this machine")
    upload.add_argument("--replace", action="store_true", help="replace other content of that name")
    upload.set_defaults(run=lambda flags: upload_adapter(_client(flags), flags.name, flags.folder, flags.replace))
    unload = actions.add_parser("unload", help="unload an adapter; its running requests finish")
    unload.add_argument("name", help="its name")
    unload.set_defaults(run=lambda flags: unload_adapter(_client(flags), flags.name))
    for action in (listing, load, upload, unload):
        add_server_flags(action)


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Adds what every command that speaks to a server takes."""
    parser.add_argument(
        "--url", default="http://127.0.0.1:8000", help="the server's address (default: http://127.0.0.1:8000)"
    )
    variables = " or ".join(KEY_VARIABLES)
    parser.add_argument("--api-key", default=None, metavar="KEY", help=f"its (admin) key (default: {variables})")


def _client(flags: argparse.Namespace) -> Client:
    return Client(flags.url, flags.api_key)


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
    return _loaded(client.post("/v1/adapters", {"name": name, "path": path, "load_inplace": replace}))


def upload_adapter(client: Client, name: str, folder: Path, replace: bool) -> int:
    if not folder.is_dir():
        raise TuckaError(f"{folder} is no folder here. Give the one that holds {CONFIG_NAME}.")
    return _loaded(client.upload(name, folder, FILE_LIMITS, replace))


def _loaded(answer: bytes) -> int:
    card = json.loads(answer)
    print(f"{card['id']} is loaded: generation {card['tucka']['generation']}, digest {card['tucka']['digest'][:12]}")
    return 0


def unload_adapter(client: Client, name: str) -> int:
    client.delete(f"/v1/adapters/{urllib.parse.quote(name)}")
    print(f"{name} is unloaded")
    return 0
