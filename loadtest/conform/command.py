"""The command line of `tucka loadtest conform`, its table and its JSON."""

import argparse
import asyncio
import json
from pathlib import Path
from typing import Any

from tucka_runtime.errors import ConfigError
from tucka_runtime.loadtest import settings

FORMAT = "tucka-conform/1"
DESCRIPTION = """Hold a server's adapters to what isolation asks, from outside: chat/completions or completions,
/v1/models, and vLLM's /v1/load_lora_adapter and /v1/unload_lora_adapter. What is right is what each adapter answers
greedily when it is the only one loaded. Nothing else should use the server meanwhile, and a server in float32 leaves
rounding no room. Exit status: 0; 1 if a row fails, or nothing could be held. docs/conform.md has every row."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("url", nargs="?", default=argparse.SUPPRESS, metavar="URL", help="the server, as --url")
    settings.add_flags(parser, defaults=False, only="server")
    kit = parser.add_argument_group("adapters (folders of yours, or made here)")
    kit.add_argument(
        "--adapter", nargs="+", action="extend", default=[], metavar="DIR",
        help="folders of adapters, as the server knows them; two at least, four are better",
    )  # fmt: skip
    kit.add_argument(
        "--base", dest="base_folder", type=Path, metavar="DIR",
        help="make the adapters for this base, a local Hugging Face folder",
    )  # fmt: skip
    kit.add_argument(
        "--folder", type=Path, metavar="DIR", help="where they are made: the server must be able to load from there"
    )
    kit.add_argument("--tucka", action="store_true", help="make every second one a TuckA adapter (default: all LoRA)")
    kit.add_argument(
        "--slots", type=int, default=0, metavar="N",
        help="how many adapters the server serves at once (vLLM's --max-loras); two more than that are made",
    )  # fmt: skip
    rows = parser.add_argument_group("rows")
    rows.add_argument("--rows", metavar="NAME,NAME", help="hold these alone (default: all)")
    rows.add_argument("--tokens", type=int, default=24, help="tokens of a short answer (default 24)")
    rows.add_argument(
        "--stream-tokens", type=int, default=192, metavar="N",
        help="tokens of an answer that something happens to meanwhile, as far as the context allows (default 192)",
    )  # fmt: skip
    rows.add_argument("--json", default=argparse.SUPPRESS, metavar="FILE", help="write rows with every answer here")


def run(args: argparse.Namespace) -> int:
    """0, or 1 if a row failed. Raises ConfigError and ServerError where nothing could be held."""
    out = Path(args.json) if args.json else None
    if out is not None and not out.resolve().parent.is_dir():
        raise ConfigError(f"{out} cannot be written: its folder does not exist")
    if args.tokens < 8 or args.stream_tokens < args.tokens or args.slots < 0:
        raise ConfigError("--tokens must be at least 8, --stream-tokens no fewer, --slots no negative number")
    result = asyncio.run(hold(args))
    if out is not None:  # before the table: whoever reads that may go away first
        try:
            out.write_text(json.dumps(result, indent=1), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{out} cannot be written: {error.strerror}") from None
    print(render(result))
    return 0 if result["passed"] else 1


async def hold(args: argparse.Namespace) -> dict[str, Any]:
    """The result as JSON has it: everything about the run, and a row for each thing held."""
    from tucka_runtime.loadtest.client import LoadClient
    from tucka_runtime.loadtest.conform.kit import CORE, Kit
    from tucka_runtime.loadtest.conform.oracle import Oracle, label
    from tucka_runtime.loadtest.conform.rows import ROWS

    test = settings.from_args(args)
    names = args.rows.split(",") if args.rows else [row.name for row in ROWS]
    if unknown := set(names) - {row.name for row in ROWS}:
        raise ConfigError(f"--rows: no {', '.join(sorted(unknown))}; there are {', '.join(row.name for row in ROWS)}")
    contents = adapters(args, max(CORE, args.slots + 2))
    async with LoadClient(test) as client:
        base = next((card for card in await client.models() if card.parent is None), None)
        if base is None:
            raise ConfigError("/v1/models lists no base: a card without a parent")
        oracle = Oracle(client, base.name, args.tokens, args.stream_tokens)
        await oracle.learn_fields(base.max_model_len)
        kit = Kit(client, oracle, contents, made=args.base_folder is not None, slots=args.slots)
        try:
            await kit.set_up()
            rows = await kit.run([row for row in ROWS if row.name in names])
        finally:
            await kit.clear()
    return {
        "format": FORMAT,
        "url": settings.without_password(client.url),
        "base": base.name,
        "endpoint": test.endpoint,
        "tokens": oracle.tokens,
        "stream_tokens": oracle.stream_tokens,
        "fields": sorted(oracle.optional),
        "logprobs": oracle.logprobs,
        "slots": args.slots,
        "adapters": [label(content) for content in contents],
        "unstable": sorted(label(content) for content in oracle.unstable),
        "passed": all(row["verdict"] != "fail" for row in rows),
        "rows": rows,
    }


def adapters(args: argparse.Namespace, count: int) -> list[str]:
    """The folders of the adapters, as they are told to the server."""
    from tucka_runtime.loadtest.conform.made import make

    if bool(args.adapter) == (args.base_folder is not None):
        raise ConfigError("give adapters with --adapter DIR DIR, or a base to make some for with --base DIR")
    if args.base_folder is not None:
        if args.folder is None:
            raise ConfigError("--base needs --folder DIR: where the adapters are made, and the server loads them from")
        return [str(path) for path in make(args.base_folder, args.folder.resolve(), count, args.tucka)]
    if len(set(args.adapter)) < 2 or len(set(args.adapter)) < len(args.adapter):
        raise ConfigError("--adapter needs at least two folders, each once")
    return list(args.adapter)


def render(result: dict[str, Any]) -> str:
    """A line for each row, and below it what was wrong, or why it says nothing."""
    lines = [
        f"{result['url']}, base {result['base']}, {len(result['adapters'])} adapters: {', '.join(result['adapters'])}",
        f"answers of {result['tokens']} and {result['stream_tokens']} tokens, "
        f"{'with' if result['logprobs'] else 'without'} log-probabilities",
    ]
    if result["unstable"]:
        lines.append(f"differs from itself even alone, and is not judged: {', '.join(result['unstable'])}")
    for row in result["rows"]:
        lines += ["", f"{row['verdict'].upper() if row['verdict'] == 'fail' else row['verdict']:5} {row['name']}"]
        lines[-1] += f": {row['holds']}"
        lines += [f"      sent: {row['sent']}", f"      came back: {row['came_back']}"]
        if row["reason"] and row["verdict"] == "n/a":
            lines.append(f"      not applicable: {row['reason']}")
        lines += [f"      ! {line}" for line in row["evidence"][:5]]
    counts = {v: sum(row["verdict"] == v for row in result["rows"]) for v in ("pass", "fail", "n/a")}
    return "\n".join([*lines, "", ", ".join(f"{count} {verdict}" for verdict, count in counts.items())])
