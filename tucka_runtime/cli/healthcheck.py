"""`python3 -m tucka_runtime.cli.healthcheck`: a container's own health check. Status 0 while its server is ready.

The server is the container's first process: its flags say where it listens, as its environment and its file do.
"""

import argparse
import sys
import urllib.request
from pathlib import Path

from tucka_runtime.cli import settings
from tucka_runtime.cli.vllm_flags import translate


def url(command: list[str]) -> str:
    """Where a server with this command line, and this process's environment, answers whether it is ready."""
    parser = argparse.ArgumentParser()
    settings.add_flags(parser)
    given, _ = translate(command[command.index("serve") + 1 :] if "serve" in command else [])
    _, config = settings.from_environment(parser.parse_known_args(given)[0])
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{config.port}/ready"


def main() -> int:
    """Asks once, and no proxy that the environment names: the server is in the same container."""
    command = Path("/proc/1/cmdline").read_text().split("\0")[:-1]
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url(command), timeout=4):
            return 0
    except OSError:
        return 1


if __name__ == "__main__":
    sys.exit(main())
