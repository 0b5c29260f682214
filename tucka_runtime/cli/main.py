"""The command `tucka`."""

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tucka_runtime import __version__
from tucka_runtime.cli import keys, settings, vllm_flags
from tucka_runtime.cli.adapters import add_actions, add_server_flags
from tucka_runtime.config import ServerConfig
from tucka_runtime.errors import ConfigError, TuckaError
from tucka_runtime.extras import EXTRAS, how_to_install, installed
from tucka_runtime.logs import set_up_logging

log = logging.getLogger("tucka_runtime.cli")

BATCH = (
    "Answers requests from a file (custom_id, method, url, body; one JSON object a line) as the server would: "
    "/v1/completions, /v1/chat/completions, /v1/embeddings. A line that is wrong gets its error and stops nothing. "
    "Answers are written as they are ready; a run that was ended is gone on with by the same command. "
    "Settings are those of tucka serve."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns its exit status. Imports only what that one needs."""
    parser = argparse.ArgumentParser(
        prog="tucka", description="One base model, many TuckA or LoRA adapters; every request picks its own."
    )
    parser.add_argument("--version", action="version", version=f"tucka {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="serve a model and its adapters over HTTP", description=settings.SOURCES)
    serve.usage = "%(prog)s [--model DIR] [--adapter NAME=PATH ...] [flags]"
    settings.add_flags(serve)
    serve.add_argument(
        "--ray",
        metavar="FILE",
        help="serve many of these under Ray Serve, as this YAML file says (docs/scale.md); needs the extra ray",
    )
    serve.set_defaults(run=_serve)

    batch = commands.add_parser("batch", help="answer a file of requests, without a server", description=BATCH)
    batch.usage = "%(prog)s IN.jsonl OUT.jsonl [--model DIR] [--adapter NAME=PATH ...] [flags of tucka serve]"
    batch.add_argument("source", type=Path, metavar="IN.jsonl", help="requests, in OpenAI's batch format")
    batch.add_argument("target", type=Path, metavar="OUT.jsonl", help="answers; what is there is not asked again")
    settings.add_flags(batch)
    batch.set_defaults(run=_batch)

    adapters = commands.add_parser(
        "adapters", help="list, load, upload and unload a server's adapters, look into folders of them"
    )
    add_actions(adapters)

    keys.add_actions(commands.add_parser("keys", help="make, list and revoke API keys"))

    doctor = commands.add_parser("doctor", help="show what this machine has and what would be used")
    doctor.set_defaults(run=_doctor)

    top = commands.add_parser("top", help="watch a server's load, its adapters and their experts")
    top.add_argument("server", nargs="?", default=None, metavar="URL", help="the server's address, as --url")
    add_server_flags(top)
    top.add_argument(
        "--interval", type=interval, default=2.0, metavar="SECONDS", help="time between pictures (default: 2)"
    )
    top.add_argument("--once", action="store_true", help="print one picture and end")
    top.set_defaults(run=_top)

    _add_other(commands, "train", "tucka_runtime.cli.train", "train an adapter", arguments)
    _add_other(commands, "compress", "tucka_runtime.cli.compress", "make one bank of many adapters", arguments)
    _add_other(commands, "eval", "tucka_runtime.cli.eval", "score a base and adapters on records", arguments, "train")
    _add_other(commands, "loadtest", "tucka_runtime.loadtest.cli", "put a server under load and report", arguments)
    _add_other(commands, "plan", "tucka_runtime.cli.plan", "size a fleet on paper", arguments, "loadtest")

    given = list(sys.argv[1:] if arguments is None else arguments)
    translated: list[str] = []
    if given[:1] == ["serve"]:
        try:
            given[1:], translated = vllm_flags.translate(given[1:])
        except ConfigError as error:
            serve.error(error.message)
    serve.set_defaults(translated=translated)
    flags, unknown = parser.parse_known_args(given)
    if unknown:
        hints = "".join(f"\n{hint}" for hint in vllm_flags.hints(unknown)) if flags.command == "serve" else ""
        commands.choices[flags.command].error(f"unrecognized arguments: {' '.join(unknown)}{hints}")
    try:
        status: int = flags.run(flags)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # who read has enough, as `| head`: what is still buffered goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except TuckaError as error:
        print(f"tucka: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def interval(text: str) -> float:
    """A flag's type; argparse names it where the text is no number."""
    seconds = float(text)
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError("must be between 0.1 and 3600 seconds")
    return seconds


def _serve(flags: argparse.Namespace) -> int:
    if flags.ray is not None:
        return _serve_fleet(flags)
    engine_config, server_config = settings.from_environment(flags)
    _begin_log(flags, server_config)
    try:
        from tucka_runtime.server.serve import serve

        status = serve(engine_config, server_config)
    except KeyboardInterrupt:  # before the server's own handler stands: as after it, no error
        return 0
    if status == 0:  # it has served, and all is closed: taking torch's modules apart takes seconds and is noisy
        logging.shutdown()
        os._exit(0)
    return status


def _serve_fleet(flags: argparse.Namespace) -> int:
    from tucka_runtime.server.ray.fleet import read_fleet

    if getattr(flags, "config", None):
        raise ConfigError("--config has no place beside --ray: its settings stand in that file, below `serve`.")
    fleet = read_fleet(Path(flags.ray))
    engine_config, server_config = settings.from_environment(flags, fleet.serve)
    _begin_log(flags, server_config)
    if not installed("ray"):
        raise ConfigError(f"--ray needs Ray Serve, which is not installed. To get it, {how_to_install('ray')}.")
    from tucka_runtime.server.ray.app import run

    return run(fleet, engine_config, server_config)


def _begin_log(flags: argparse.Namespace, config: ServerConfig) -> None:
    set_up_logging(config.log_format, "server")
    for line in flags.translated:
        log.info("vLLM's command line: %s", line)
    for variable in settings.unknown_variables(os.environ):
        log.warning("%s is no setting of this server and has no effect: tucka serve --help lists those", variable)


def _batch(flags: argparse.Namespace) -> int:
    engine_config, server_config = settings.from_environment(flags)
    set_up_logging(server_config.log_format, "server")
    from tucka_runtime.server.batch import batch

    return batch(engine_config, server_config, flags.source, flags.target)


def _doctor(flags: argparse.Namespace) -> int:
    from tucka_runtime.cli.doctor import doctor

    return doctor()


def _top(flags: argparse.Namespace) -> int:
    from tucka_runtime.cli.top import top
    from tucka_runtime.client import Client

    return top(Client(flags.server or flags.url, flags.api_key), flags.interval, flags.once)


def _add_other(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    module: str,
    help: str,
    arguments: Sequence[str] | None,
    extra: str | None = None,
) -> None:
    """A subcommand of another part, which is imported only when it is the one that is asked for. To run, which its
    help does not, it may need an `extra`, by default that of its name."""
    needed = extra or name
    parser = commands.add_parser(name, help=help)
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] != [name]:
        return
    part = importlib.import_module(module)
    part.add_arguments(parser)

    def run(flags: argparse.Namespace) -> int:
        try:
            status: int = part.run(flags)
            return status
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            if needed not in EXTRAS or missing not in EXTRAS[needed].modules:
                raise
            parser.exit(2, f"tucka {name}: {missing} is not installed. To get it, {how_to_install(needed)}.\n")

    parser.set_defaults(run=run)


if __name__ == "__main__":
    sys.exit(main())
