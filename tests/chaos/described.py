"""Schemathesis against a server of its own: `python -m tests.chaos.described --examples N`.

What /openapi.json says is asked of every route, right and wrong, so many examples each. None may be answered by a 5xx,
by what is no JSON where that is said, by a form that is not described, or by a success to a body that it forbids.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.servers import start_command
from tucka_runtime.embedded import FOLDER

CHECKS = "not_a_server_error,content_type_conformance,response_schema_conformance,negative_data_rejection"


def main(given: list[str] | None = None) -> int:
    """Returns schemathesis' status: 0 where it found nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1000, help="per route")
    parser.add_argument("--phases", default="examples,coverage,fuzzing")
    parser.add_argument("--path", help="one route alone")
    parser.add_argument("--seed", type=int, default=1)
    flags = parser.parse_args(given)
    with tempfile.TemporaryDirectory() as folder:
        roots = ("--adapter-root", str(FOLDER / "adapters"), "--max-model-len", "128")
        process, url = start_command(*roots, log=Path(folder) / "log")
        try:
            command = [
                *(sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--checks", CHECKS),
                *("--phases", flags.phases, "--max-examples", str(flags.examples), "--seed", str(flags.seed)),
                *("--generation-database", "none", "--suppress-health-check", "all"),
                *(("--include-path", flags.path) if flags.path else ()),
            ]
            status = subprocess.run(command, cwd=folder, check=False).returncode
        finally:
            process.terminate()
            process.wait(60)
        said = (Path(folder) / "log").read_text()
    if "Traceback" in said:
        print(said[said.find("Traceback") :][:6000])
    return status or int("Traceback" in said)


if __name__ == "__main__":
    sys.exit(main())
