"""Schemathesis against a server of its own: `python -m tests.chaos.described --examples N`.

What /openapi.json says is asked of every route, right and wrong, so many examples each. None may be answered by a 5xx,
by what is no JSON where that is said, by a form that is not described, or by a success to a body that it forbids; and
none that it allows is refused by the models that it is made of (`tests/chaos/described_checks.py`). Schemathesis' own
`positive_data_acceptance` would have all of those succeed. What is refused beyond, no description of a form can say:
docs/bad-input.md has the kinds.

The description knows no names of models and no adapters' folders; ours are put into it: most others end at a 404.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx

from tests.support import ROOT
from tests.support.servers import start_command
from tucka_runtime.embedded import FOLDER

CHECKS = "not_a_server_error,content_type_conformance,response_schema_conformance,negative_data_rejection"
CHECKS += ",valid_bodies_fit_their_models"

NAMES = ("base", "sql")
KNOWN = {"model": NAMES, "path": ("words", "triage"), "lora_path": ("words", "triage")}


def described(url: str) -> dict[str, Any]:
    """The server's description, with names that there are. FastAPI writes every bound as a float, near which a 64-bit
    integer has no neighbour: schemathesis would take the bound for it."""
    document: dict[str, Any] = json.loads(httpx.get(url + "/openapi.json").text, parse_float=_integer_if_it_is)
    for schema in document["components"]["schemas"].values():
        for name, field in schema.get("properties", {}).items():
            if name in KNOWN and '"string"' in json.dumps(field):  # where it can be no more than null it stays so
                schema["properties"][name] = {"anyOf": [{"enum": list(KNOWN[name])}, field]}
    for operations in document["paths"].values():
        for parameter in operations.get("get", {}).get("parameters", ()):
            parameter["schema"] = {"anyOf": [{"enum": list(NAMES)}, parameter["schema"]]}
    return document


def _integer_if_it_is(number: str) -> int | float:
    return int(float(number)) if float(number).is_integer() else float(number)


def main(given: list[str] | None = None) -> int:
    """Returns schemathesis' status: 0 where it found nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1000, help="per route")
    parser.add_argument("--phases", default="examples,coverage,fuzzing")
    parser.add_argument("--path", help="one route alone")
    parser.add_argument("--seed", type=int, default=1)
    flags = parser.parse_args(given)
    with tempfile.TemporaryDirectory() as folder:
        adapters = ("--adapter-root", str(FOLDER / "adapters"), "--adapter", f"sql={FOLDER / 'adapters' / 'sql'}")
        process, url = start_command(*adapters, "--max-model-len", "128", log=Path(folder) / "log")
        try:
            document = Path(folder) / "openapi.json"
            document.write_text(json.dumps(described(url)))
            command = [
                *(sys.executable, "-m", "schemathesis.cli", "run", str(document), "--url", url, "--checks", CHECKS),
                *("--phases", flags.phases, "--max-examples", str(flags.examples), "--seed", str(flags.seed)),
                *("--generation-database", "none", "--suppress-health-check", "all", "--request-timeout", "120"),
                *(("--include-path", flags.path) if flags.path else ()),
            ]
            environment = os.environ | {"SCHEMATHESIS_HOOKS": "tests.chaos.described_checks", "PYTHONPATH": str(ROOT)}
            status = subprocess.run(command, cwd=folder, env=environment, check=False).returncode
        finally:
            process.terminate()
            process.wait(60)
        said = (Path(folder) / "log").read_text()
    if "Traceback" in said:
        print(said[said.find("Traceback") :][:6000])
    return status or int("Traceback" in said)


if __name__ == "__main__":
    sys.exit(main())
