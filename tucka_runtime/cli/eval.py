"""`tucka eval`: held-out records are asked of the base and its adapters, in a folder or of a running server."""

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tucka_runtime import __version__
from tucka_runtime.bases import command_base
from tucka_runtime.client import KEY_VARIABLES
from tucka_runtime.errors import ConfigError, TuckaError
from tucka_runtime.messages import RouteScope
from tucka_runtime.terminal import say

if TYPE_CHECKING:
    from tucka_runtime.evals.asking import Respondent

SCOPES = [scope.value for scope in RouteScope if scope is not RouteScope.PINNED]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags; imports nothing heavy."""
    parser.description = (
        "Asks the base and each adapter the records of DATA, greedily, and compares their answers with what the "
        "records say: exact match (without blanks around and thoughts before it) and F1 of words."
    )
    parser.usage = (
        "%(prog)s DATA [--model DIR] --adapter NAME=DIR ... [flags]\n"
        "       %(prog)s DATA --url URL [--adapter NAME ...] [flags]\n"
        "       %(prog)s --tasks TASK,... --url URL [--adapter NAME ...] [flags]"
    )
    parser.add_argument("data", type=Path, nargs="?", metavar="DATA", help="records in any form that tucka train reads")
    parser.add_argument(
        "--tasks", nargs="+", default=[], metavar="TASK",
        help="ask lm-eval's tasks of these names instead of DATA, of the server at --url (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--include-path", type=Path, metavar="DIR", help="a folder of your own tasks for --tasks (default: lm-eval's)"
    )
    parser.add_argument(
        "--num-fewshot", type=int, metavar="N", help="examples in a prompt of --tasks (default: each task's)"
    )
    parser.add_argument(
        "--apply-chat-template", action="store_true",
        help="ask --tasks as chats; those that compare log-likelihoods cannot be (default: as completions)",
    )  # fmt: skip
    parser.add_argument("--model", metavar="MODEL", help="the base, as in tucka train (default: the embedded one)")
    parser.add_argument("--url", help="ask this running server instead (default: none)")
    parser.add_argument(
        "--adapter", nargs="+", action="extend", default=[], metavar="NAME[=DIR]",
        help="adapters to ask beside the base; with --url their names there (default: with --url all of them)",
    )  # fmt: skip
    parser.add_argument(
        "--route", nargs="+", default=[], choices=SCOPES,
        help="route scopes under which TuckA adapters are asked, a row each (default: the one each was trained for)",
    )  # fmt: skip
    parser.add_argument("--limit", type=int, metavar="N", help="ask the first N records alone (default: all)")
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="longest answer (default: 256)")
    parser.add_argument("--num-threads", type=int, help="CPU threads without --url (default: the server's rule)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="folder for report.json, wrong.jsonl (the wrong answers) and report.png (default: the table alone)",
    )  # fmt: skip
    keys = " or ".join(KEY_VARIABLES)
    parser.add_argument("--api-key", metavar="KEY", help=f"the server's key (default: {keys})")


def run(args: argparse.Namespace) -> int:
    """Prints the table; returns the exit status."""
    try:
        return _run(args)
    except TuckaError as error:
        say(f"tucka eval: {error.message}", sys.stderr)
    except OSError as error:
        say(f"tucka eval: {error.filename}: {error.strerror}.", sys.stderr)
    return 2


def _run(args: argparse.Namespace) -> int:
    _check(args)
    if args.tasks:
        return _run_tasks(args)
    from tucka_runtime.evals import report
    from tucka_runtime.evals.asking import plan
    from tucka_runtime.evals.questions import questions

    wanted, left_out, sha256 = questions(args.data, args.limit)
    if left_out:
        say(f"left out: {left_out} records that no text answers (calls, plain texts)", sys.stderr)
    asked = _asked(args)
    wanted = [question.without(asked.ends) for question in wanted]
    rows, mistakes = [], []
    for model, route in plan(asked, args.route):
        say(f"asking {model}{f' ({route})' if route else ''} ...", sys.stderr)
        answers = asked.ask(wanted, model, route)
        rows.append(report.score(wanted, answers, model, route))
        mistakes += report.wrong(wanted, answers, rows[-1])
    say(report.table(rows))
    if cut := [f"{row.cut} of {row.model}" for row in rows if row.cut]:
        say(f"warning: answers had not ended after --max-tokens {args.max_tokens}: {', '.join(cut)}.", sys.stderr)
    if args.out:
        data = {"file": args.data.name, "sha256": sha256}
        report.write(args.out, rows, mistakes, _about(args, data=data, asked=args.url or asked.base))
        say(f"written to {args.out}")
    return 0


def _run_tasks(args: argparse.Namespace) -> int:
    from tucka_runtime.evals import harness
    from tucka_runtime.evals.asking import Server, plan

    names = [name for word in args.tasks for name in word.split(",") if name]
    asked = harness.Harness(
        args.url, args.api_key, names, args.include_path, args.num_fewshot, args.limit, args.max_tokens,
        args.apply_chat_template,
    )  # fmt: skip
    asked.check()
    rows = []
    for model, route in plan(Server(args.url, args.api_key, args.adapter, args.max_tokens), args.route):
        say(f"asking {model}{f' ({route})' if route else ''} ...", sys.stderr)
        rows += asked.ask(model, route)
    say(harness.table(rows))
    if args.out:
        more = {"num_fewshot": args.num_fewshot, "limit": args.limit, "chat": args.apply_chat_template}
        harness.write(args.out, rows, _about(args, tasks=names, asked=args.url, **more))
        say(f"written to {args.out}")
    return 0


def _about(args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """What a report says of itself."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"made_by": f"tucka eval {__version__}", "date": date, **more, "max_tokens": args.max_tokens}


def _check(args: argparse.Namespace) -> None:
    """Raises ConfigError for flags that do not go together."""
    if args.url and (args.model or any("=" in name for name in args.adapter)):
        raise ConfigError("--url asks a server for what is loaded there: leave --model out, and name adapters alone.")
    if not args.url and not all(0 < name.find("=") < len(name) - 1 for name in args.adapter):
        raise ConfigError("--adapter must be NAME=DIR; to ask a running server for NAME give its --url.")
    if bool(args.tasks) == bool(args.data):
        raise ConfigError("Name the records to ask (DATA), or tasks of lm-eval (--tasks): one of the two.")
    if args.tasks and not args.url:
        raise ConfigError("--tasks are asked of a running server: give its --url (tucka serve starts one).")
    if not args.tasks and (args.include_path or args.num_fewshot is not None or args.apply_chat_template):
        raise ConfigError("--include-path, --num-fewshot and --apply-chat-template belong to --tasks.")
    for path in filter(None, (args.data, args.include_path)):
        if not path.exists():
            raise ConfigError(f"{path} does not exist.")
    for name in ("limit", "max_tokens", "num_threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1.")


def _asked(args: argparse.Namespace) -> "Respondent":
    from tucka_runtime.evals.asking import Folder, Server

    if args.url:
        return Server(args.url, args.api_key, args.adapter, args.max_tokens)
    adapters = dict(name.split("=", 1) for name in args.adapter)
    return Folder(command_base(args.model), adapters, args.max_tokens, args.num_threads)
