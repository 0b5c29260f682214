"""`tucka adapters`: lists, loads, uploads, rolls back and unloads a server's adapters, gives them aliases, and looks
into folders of them."""

import argparse
import json
import re
import urllib.parse
from pathlib import Path

from tucka_runtime.adapters.files import CONFIG_NAME, served_files
from tucka_runtime.bases import command_base
from tucka_runtime.client import KEY_VARIABLES, Client
from tucka_runtime.config import DTYPES
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
    load.add_argument(
        "--keep-resident",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="keep it in a slot whatever else is asked for (default: as it is, or not)",
    )
    load.set_defaults(
        run=lambda flags: load_adapter(_client(flags), flags.name, flags.path, flags.replace, flags.keep_resident)
    )
    upload = actions.add_parser("upload", help="send an adapter's files to the server, which needs no shared disk")
    upload.add_argument("name", help="name for requests")
    upload.add_argument("folder", type=Path, help="the adapter's folder on this machine")
    upload.add_argument("--replace", action="store_true", help="replace other content of that name")
    upload.set_defaults(run=lambda flags: upload_adapter(_client(flags), flags.name, flags.folder, flags.replace))
    unload = actions.add_parser("unload", help="unload an adapter; its running requests finish")
    unload.add_argument("name", help="its name")
    unload.set_defaults(run=lambda flags: unload_adapter(_client(flags), flags.name))
    for action in (listing, load, upload, unload, *_version_actions(actions), *_alias_actions(actions)):
        add_server_flags(action)
    _add_folder_actions(actions)


def _version_actions(
    actions: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> tuple[argparse.ArgumentParser, ...]:
    """Those for what a name stood for before (--adapter-versions)."""
    versions = actions.add_parser("versions", help="show the contents of a name that are kept")
    versions.add_argument("name", help="its name")
    versions.set_defaults(run=lambda flags: list_versions(_client(flags), flags.name))
    rollback = actions.add_parser("rollback", help="let a name stand again for what it stood for before")
    rollback.add_argument("name", help="its name")
    rollback.add_argument("--to", metavar="DIGEST", help="the content, by 12 or more digits (default: the last)")
    rollback.set_defaults(run=lambda flags: roll_back(_client(flags), flags.name, flags.to))
    return versions, rollback


def _alias_actions(
    actions: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> tuple[argparse.ArgumentParser, ...]:
    aliases = actions.add_parser("aliases", help="show the aliases and what they stand for")
    aliases.set_defaults(run=lambda flags: list_aliases(_client(flags)))
    alias = actions.add_parser("alias", help="let a name stand for one of several adapters, by their weights")
    alias.add_argument("name", help="the alias")
    alias.add_argument("target", nargs="+", metavar="NAME[=WEIGHT]", help="an adapter, or name@digest (weight: 1)")
    alias.set_defaults(run=lambda flags: set_alias(_client(flags), flags.name, flags.target))
    unalias = actions.add_parser("unalias", help="forget an alias; the adapters stay")
    unalias.add_argument("name", help="the alias")
    unalias.set_defaults(run=lambda flags: remove_alias(_client(flags), flags.name))
    return aliases, alias, unalias


def _add_folder_actions(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Those that need no server. What they run is imported, with torch, only then."""
    inspect = actions.add_parser("inspect", help="show what an adapter's folder holds")
    inspect.add_argument("path", type=Path, help="the adapter's folder")
    inspect.add_argument("--model", metavar="MODEL", help="a base: say whether it is served there, and its size")
    inspect.set_defaults(run=_inspect)
    verify = actions.add_parser("verify", help="compare what is served of an adapter with its definition in float64")
    verify.add_argument("path", type=Path, help="the adapter's folder")
    verify.add_argument("--model", metavar="MODEL", required=True, help="its base")
    verify.add_argument("--dtype", choices=DTYPES, default="auto", help="as in tucka serve (default: auto)")
    verify.set_defaults(run=_verify)
    export = actions.add_parser("export", help="write the plain LoRA that a TuckA adapter is under one route")
    export.add_argument("path", type=Path, help="the adapter's folder")
    export.add_argument("out", type=Path, help="a new folder")
    export.add_argument("--model", metavar="MODEL", required=True, help="its base")
    export.add_argument(
        "--route", required=True, metavar="ROUTE",
        help='group=N, its experts at 0.5 each, or a pinned route: {"group": 0, "weights": [0.5, 0.6]}',
    )  # fmt: skip
    export.add_argument("--to", choices=("lora",), default="lora", help="what to write (default: lora)")
    export.set_defaults(run=_export)


def _inspect(flags: argparse.Namespace) -> int:
    from tucka_runtime.cli.adapter_files import inspect_adapter

    return inspect_adapter(flags.path, command_base(flags.model) if flags.model else None)


def _verify(flags: argparse.Namespace) -> int:
    from tucka_runtime.cli.adapter_files import verify_adapter

    return verify_adapter(flags.path, command_base(flags.model, flags.dtype), flags.dtype)


def _export(flags: argparse.Namespace) -> int:
    from tucka_runtime.cli.adapter_files import export_adapter

    return export_adapter(flags.path, flags.out, command_base(flags.model), flags.route)


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
        tier = "kept resident" if detail["keep_resident"] else detail["tier"]
        version = f"generation {detail['generation']}  {detail['digest'][:12]}"
        print(f"{card['id']}  {detail['kind']}  {shape}  {version}  {tier}")
    if not cards:
        print("no adapters are loaded")
    return 0


def load_adapter(client: Client, name: str, path: str, replace: bool, keep_resident: bool | None) -> int:
    body = {"name": name, "path": path, "load_inplace": replace, "keep_resident": keep_resident}
    return _loaded(client.post("/v1/adapters", body))


def upload_adapter(client: Client, name: str, folder: Path, replace: bool) -> int:
    if not folder.is_dir():
        raise TuckaError(f"{folder} is no folder here. Give the one that holds {CONFIG_NAME}.")
    return _loaded(client.upload(name, folder, served_files(True), replace))


def _loaded(answer: bytes) -> int:
    card = json.loads(answer)
    print(f"{card['id']} is loaded: generation {card['tucka']['generation']}, digest {card['tucka']['digest'][:12]}")
    return 0


def list_versions(client: Client, name: str) -> int:
    card = json.loads(client.get(f"/v1/adapters/{urllib.parse.quote(name)}"))["tucka"]
    print(f"{name}@{card['digest'][:12]}  generation {card['generation']}  now")
    for version in card["versions"]:
        generation = json.loads(client.get(f"/v1/adapters/{urllib.parse.quote(version)}"))["tucka"]["generation"]
        print(f"{version}  generation {generation}")
    return 0


def roll_back(client: Client, name: str, to: str | None) -> int:
    return _loaded(client.post(f"/v1/adapters/{urllib.parse.quote(name)}/rollback", {"to": to}))


def list_aliases(client: Client) -> int:
    aliases = json.loads(client.get("/v1/aliases"))["data"]
    for alias in aliases:
        print(f"{alias['name']}  {' '.join(f'{name}={weight}' for name, weight in alias['targets'].items())}")
    if not aliases:
        print("there are no aliases")
    return 0


def set_alias(client: Client, name: str, targets: list[str]) -> int:
    weights = {}
    for target in targets:
        known, _, weight = target.partition("=")
        if weight and not re.fullmatch("[0-9]{1,9}", weight):
            raise TuckaError("A target is NAME or NAME=WEIGHT, whose weight is a whole number from 1.")
        if known in weights:
            raise TuckaError(f"{known} is named twice. Give each target once, with its whole weight.")
        weights[known] = int(weight or 1)
    client.post("/v1/aliases", {"name": name, "targets": weights})
    print(f"{name} stands for {' '.join(f'{known}={weight}' for known, weight in weights.items())}")
    return 0


def remove_alias(client: Client, name: str) -> int:
    client.delete(f"/v1/aliases/{urllib.parse.quote(name)}")
    print(f"{name} stands for nothing")
    return 0


def unload_adapter(client: Client, name: str) -> int:
    client.delete(f"/v1/adapters/{urllib.parse.quote(name)}")
    print(f"{name} is unloaded")
    return 0
