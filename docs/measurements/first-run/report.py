"""What the three scripts of a first run share: sections with a deadline, one JSON file, one table at the end."""

import argparse
import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

Figures = dict[str, object]


class Report:
    """Runs sections one after the other until `seconds` are over, and keeps what they return. A section that fails, or
    that no time is left for, has a line that says so: those after it run all the same."""

    def __init__(self, name: str, doc: str | None):
        parser = argparse.ArgumentParser(description=doc)
        parser.add_argument("--small", action="store_true", help="tiny shapes, in Triton's interpreter on a CPU")
        parser.add_argument("--seconds", type=float, default=570, help="when no further section is begun (570)")
        parser.add_argument(
            "--out", type=Path, default=Path(os.environ.get("OUT", ".")), help="folder of the JSON file"
        )
        parser.add_argument("--only", nargs="+", metavar="SECTION", help="run these sections and no others")
        self.args = parser.parse_args()
        self.name, self.begin = name, time.monotonic()
        self.small: bool = self.args.small
        self.device = torch.device("cpu" if self.small else "cuda")
        self.found: dict[str, Figures] = {}

    def section(self, name: str, run: Callable[[], Figures]) -> None:
        """Runs one section and writes all that is known so far."""
        begin = time.monotonic()
        if self.args.only and name not in self.args.only:
            self.found[name] = {"skipped": "not asked for"}
        elif begin - self.begin > self.args.seconds:
            self.found[name] = {"failed": "no time was left"}
        else:
            try:
                self.found[name] = run()
            except Exception as error:  # a border: the sections after it are worth having
                traceback.print_exc()
                self.found[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
            self.found[name]["seconds"] = round(time.monotonic() - begin, 1)
        where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        result = {"device": where, "torch": torch.__version__, "small": self.small, "sections": self.found}
        (self.args.out / f"{self.name}.json").write_text(json.dumps(result, indent=1))

    def end(self) -> int:
        """Prints the table. Returns 1 if a section failed."""
        for name, figures in self.found.items():
            print(f"{name:22} " + "  ".join(f"{key} {value}" for key, value in figures.items()))
        return int(any("failed" in figures for figures in self.found.values()))
