"""What a command says to whoever runs it."""

import os
import sys
from collections.abc import Sequence
from typing import TextIO


def say(line: str, stream: TextIO | None = None) -> None:
    """Prints a line at once, to stdout where no other stream is named. Where nobody reads it any more, as behind
    `| head`, this and what follows go nowhere, and the work is done all the same."""
    stream = stream or sys.stdout
    try:
        print(line, file=stream, flush=True)
    except BrokenPipeError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells in columns."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
